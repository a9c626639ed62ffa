"""Values of flags that need reading: sizes in bytes, `name=path` pairs, `key=value` maps."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from coserve.config import LoraModule
from coserve.errors import ConfigError

_UNITS = {
    "": 1,
    "k": 1000,
    "m": 1000**2,
    "g": 1000**3,
    "t": 1000**4,
    "ki": 1024,
    "mi": 1024**2,
    "gi": 1024**3,
    "ti": 1024**4,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)


def size_in_bytes(text: str, flag: str) -> int:
    """`512MiB`, `2G`, `1073741824` in bytes; ConfigError naming `flag` for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{flag} {text}: give a size such as 512MiB, 2GB or a number of bytes.", param=flag)
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def pairs(values: Sequence[str], flag: str) -> tuple[tuple[str, str], ...]:
    """`name=value` of a repeatable flag, names unique; ConfigError naming `flag` otherwise."""
    found: dict[str, str] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if not (name and equals and rest):
            raise ConfigError(f"{flag} {value}: write NAME=VALUE.", param=flag)
        if name in found:
            raise ConfigError(f"{flag} {value}: {name} is given twice.", param=flag)
        found[name] = rest
    return tuple(found.items())


def lora_modules(values: Sequence[str]) -> tuple[LoraModule, ...]:
    """`--lora-modules`: NAME=PATH, or as vLLM and SGLang have it JSON with `name` and `path` (`lora_name`,
    `lora_path`), and where they are given `pinned` and `base_model_name`; ConfigError for anything else."""
    flag = "--lora-modules"
    plain = [value for value in values if not value.lstrip().startswith("{")]
    modules = [LoraModule(name, path) for name, path in pairs(plain, flag)]
    modules += [_module(value, flag) for value in values if value not in plain]
    names = [module.name for module in modules]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{flag}: {name} is given twice.", param=flag)
    return tuple(modules)


def _module(text: str, flag: str) -> LoraModule:
    try:
        given = json.loads(text)
    except ValueError:
        raise ConfigError(f"{flag} {text}: this is not valid JSON.", param=flag) from None
    fields = {key.removeprefix("lora_"): value for key, value in given.items()}
    unknown = fields.keys() - {"name", "path", "pinned", "base_model_name"}
    if unknown:
        raise ConfigError(f"{flag} {text}: there is no field {min(unknown)!r}.", param=flag)
    name, path, pinned = fields.get("name"), fields.get("path"), fields.get("pinned") or False
    if not (isinstance(name, str) and name and isinstance(path, str) and path and isinstance(pinned, bool)):
        raise ConfigError(
            f"{flag} {text}: name and path must be strings that aren't empty, pinned true or false.",
            param=flag,
        )
    return LoraModule(name, path, pinned)


def existing_file(path: str, flag: str) -> Path:
    """The absolute path of a file that is there; ConfigError naming `flag` otherwise."""
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise ConfigError(f"{flag} {path}: there is no such file.", param=flag)
    return file


def existing_dir(path: str, flag: str) -> Path:
    """The absolute path of a directory that is there; ConfigError naming `flag` otherwise."""
    directory = Path(path).expanduser().resolve()
    if not directory.is_dir():
        raise ConfigError(f"{flag} {path}: there is no such directory.", param=flag)
    return directory
