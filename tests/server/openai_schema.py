"""Holds answers against OpenAI's published schemas: the part of JSON Schema that its OpenAPI file uses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests.tokenizers import SHARED

FILE = SHARED / "openai-openapi" / "openapi.trimmed.json"
_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


class Schemas:
    """All schemas of the file by name."""

    def __init__(self) -> None:
        self._all = json.loads(FILE.read_text("utf-8"))["components"]["schemas"]

    def check(self, name: str, value: object) -> None:
        """AssertionError listing each place where `value` isn't what the schema says."""
        wrong = list(self._wrong(self._all[name], value, name))
        assert not wrong, "; ".join(wrong)

    def _wrong(self, schema: dict[str, Any], value: object, where: str) -> Iterator[str]:
        if "$ref" in schema:
            yield from self._wrong(self._all[schema["$ref"].rsplit("/", 1)[1]], value, where)
            return
        if value is None and schema.get("nullable"):
            return
        for several in ("anyOf", "oneOf"):
            if several in schema:
                options = [list(self._wrong(option, value, where)) for option in schema[several]]
                if all(options):
                    yield min(options, key=len)[0]
        for part in schema.get("allOf", ()):
            yield from self._wrong(part, value, where)
        yield from self._wrong_value(schema, value, where)
        if isinstance(value, dict):
            for name in schema.get("required", ()):
                if name not in value:
                    yield f"{where}.{name} is missing"
            for name, inner in schema.get("properties", {}).items():
                if name in value:
                    yield from self._wrong(inner, value[name], f"{where}.{name}")
        if isinstance(value, list) and "items" in schema:
            for index, item in enumerate(value):
                yield from self._wrong(schema["items"], item, f"{where}[{index}]")

    @staticmethod
    def _wrong_value(schema: dict[str, Any], value: object, where: str) -> Iterator[str]:
        kind = schema.get("type")
        if kind is not None:
            good = isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))
            if not good:
                yield f"{where} is no {kind}: {value!r}"
        if "enum" in schema and value not in schema["enum"]:
            yield f"{where} is none of {schema['enum']}: {value!r}"
        if isinstance(value, int | float) and value < schema.get("minimum", value):
            yield f"{where} is below {schema['minimum']}: {value!r}"
