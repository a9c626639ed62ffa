"""Reading a JSON object field by field, with errors that name the field.

HTTP bodies and gRPC requests (turned into the same plain dictionaries) go through this reader, so that a
range or a type is checked in one place only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coserve.errors import InvalidRequest

PRIORITIES = (-(2**31), 2**31 - 1)
MAX_METADATA, MAX_METADATA_NAME = 16, 64
_SHOWN = 60
_MAX_INTEGER = 2**53  # what JSON readers agree on; larger only where a field says so


def shown(value: object) -> str:
    """A value as an error message may repeat it: short, on one line."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


class Fields:
    """Typed access to `body`; an absent field and an explicit null are the same.

    `path` prefixes names in errors ("training." gives "training.n_epochs"). Every getter raises
    InvalidRequest with `param` set to the dotted name.
    """

    def __init__(self, body: object, path: str = "") -> None:
        if not isinstance(body, Mapping):
            raise InvalidRequest(
                f"{path.rstrip('.') or 'The body'} must be a JSON object.", param=path.rstrip(".") or None
            )
        self.body: Mapping[str, Any] = body
        self.path = path

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.body.get(name) is not None

    def raw(self, name: str) -> Any:
        """The value as it came; None when absent."""
        return self.body.get(name)

    def fail(self, name: str, reason: str) -> InvalidRequest:
        """The error for this field; `reason` goes on after its name."""
        return InvalidRequest(f"{self.path}{name} {reason}", param=self.path + name)

    def only(self, allowed: frozenset[str], where: str) -> None:
        """Refuse any key that isn't in `allowed`, naming it."""
        for key in self.body:
            if key not in allowed:
                raise InvalidRequest(
                    f"Unknown field {self.path}{key} in {where}.",
                    param=self.path + str(key),
                    code="unknown_field",
                )

    def integer(
        self, name: str, default: int | None = None, low: int | None = None, high: int | None = None
    ) -> int | None:
        """A whole number from `low` to `high`; 3.0 is 3."""
        value = self.body.get(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(name, f"must be an integer, not {shown(value)}.")
        self._check_range(
            name, value, -_MAX_INTEGER if low is None else low, _MAX_INTEGER if high is None else high
        )
        return value

    def number(
        self, name: str, default: float | None = None, low: float | None = None, high: float | None = None
    ) -> float | None:
        """A finite number from `low` to `high`."""
        value = self.body.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(name, f"must be a number, not {shown(value)}.")
        value = float(value)
        if value != value or value in (float("inf"), float("-inf")):
            raise self.fail(name, "must be a finite number.")
        self._check_range(name, value, low, high)
        return value

    def _check_range(self, name: str, value: float, low: float | None, high: float | None) -> None:
        if low is not None and value < low:
            raise self.fail(name, f"must be at least {low:g}, not {value:g}.")
        if high is not None and value > high:
            raise self.fail(name, f"must be at most {high:g}, not {value:g}.")

    def boolean(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self.body.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(name, f"must be true or false, not {shown(value)}.")
        return value

    def string(self, name: str, default: str | None = None, max_length: int | None = None) -> str | None:
        """Text of at most `max_length` characters."""
        value = self.body.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.fail(name, f"must be a string, not {shown(value)}.")
        if max_length is not None and len(value) > max_length:
            raise self.fail(name, f"must have at most {max_length} characters, not {len(value)}.")
        return value

    def required_string(self, name: str) -> str:
        """Text that has to be there."""
        value = self.string(name)
        if not value:
            raise InvalidRequest(
                f"{self.path}{name} is required.", param=self.path + name, code="missing_required_parameter"
            )
        return value

    def choice(self, name: str, allowed: Sequence[str], default: str | None = None) -> str | None:
        """One of the words in `allowed`."""
        value = self.string(name, default)
        if value is not None and value not in allowed:
            raise self.fail(name, f"must be one of {', '.join(allowed)}; not {shown(value)}.")
        return value

    def array(self, name: str) -> list[Any] | None:
        """A list of anything."""
        value = self.body.get(name)
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            raise self.fail(name, f"must be an array, not {shown(value)}.")
        return list(value)

    def strings(self, name: str) -> list[str] | None:
        """A list of texts."""
        values = self.array(name)
        if values is None:
            return None
        for index, value in enumerate(values):
            if not isinstance(value, str):
                raise self.fail(f"{name}[{index}]", f"must be a string, not {shown(value)}.")
        return values

    def integers(self, name: str) -> list[int] | None:
        """A list of whole numbers."""
        values = self.array(name)
        if values is None:
            return None
        for index, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, int):
                raise self.fail(f"{name}[{index}]", f"must be an integer, not {shown(value)}.")
        return values

    def object(self, name: str) -> Fields | None:
        """A nested object, with its own path in errors."""
        value = self.body.get(name)
        if value is None:
            return None
        return Fields(value, f"{self.path}{name}.")

    def metadata(self) -> dict[str, str]:
        """OpenAI's `metadata`: at most 16 pairs of strings, names of 64 characters and values of 512."""
        given = self.object("metadata")
        if given is None:
            return {}
        if len(given.body) > MAX_METADATA:
            raise self.fail("metadata", f"must have at most {MAX_METADATA} pairs, not {len(given.body)}.")
        if any(len(name) > MAX_METADATA_NAME for name in given.body):
            raise self.fail("metadata", f"has a key of over {MAX_METADATA_NAME} characters.")
        return {name: given.string(name, "", 512) or "" for name in given.body}
