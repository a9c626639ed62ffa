"""Holds requests, answers, chunks and errors against OpenAI's published OpenAPI file."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import jsonschema
import pytest
import referencing
from referencing.jsonschema import DRAFT202012

from tests.tokenizers import SHARED

FILE = SHARED / "openai-openapi" / "openapi.trimmed.json"
_ROOT = "urn:openai"
_METHODS = ("get", "post", "delete", "put", "patch")


def _plain(schema: Any) -> Any:
    """The file with what it still has of OpenAPI 3.0 (`nullable`, `exclusiveMinimum: true`) said as JSON
    Schema says it."""
    if isinstance(schema, list):
        return [_plain(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: _plain(value) for name, value in schema.items() if name != "nullable"}
    if inner.get("exclusiveMinimum") is True:
        inner["exclusiveMinimum"] = inner.pop("minimum")
    if schema.get("nullable") is True:
        return {"anyOf": [inner, {"type": "null"}]}
    return inner


class Schemas:
    """The file's schemas by name, and its operations."""

    def __init__(self) -> None:
        raw = json.loads(FILE.read_text("utf-8"))
        self.paths: dict[str, dict[str, Any]] = raw["paths"]
        resource = referencing.Resource(_plain(raw), DRAFT202012)
        self._registry = referencing.Registry().with_resource(_ROOT, resource)

    @property
    def operations(self) -> list[tuple[str, str]]:
        """(method, path) of each."""
        return [
            (method.upper(), path)
            for path, methods in self.paths.items()
            for method in methods
            if method in _METHODS
        ]

    def check(self, name: str, value: object) -> None:
        """AssertionError listing each place where `value` isn't what the schema says."""
        self._check({"$ref": f"{_ROOT}#/components/schemas/{name}"}, value, name)

    def check_answer(self, method: str, path: str, value: object) -> None:
        """The same, against what an operation answers with status 200."""
        self._check(self._content(method, path, "responses", "200"), value, f"{method} {path}")

    def check_request(self, method: str, path: str, value: object) -> None:
        """The same, against what an operation takes."""
        self._check(self._content(method, path, "requestBody"), value, f"{method} {path}")

    def has_answer(self, method: str, path: str) -> bool:
        """Whether the file says what an operation answers in JSON."""
        responses = self.paths[path][method.lower()]["responses"]
        return "application/json" in responses.get("200", {}).get("content", {})

    def _content(self, method: str, path: str, *place: str) -> dict[str, str]:
        pointer = [
            "paths",
            path.replace("~", "~0").replace("/", "~1"),
            method.lower(),
            *place,
            "content",
            "application~1json",
            "schema",
        ]
        return {"$ref": f"{_ROOT}#/" + "/".join(re.sub(r"[{}]", _percent, part) for part in pointer)}

    def _check(self, schema: dict[str, str], value: object, what: str) -> None:
        validator = jsonschema.Draft202012Validator(schema, registry=self._registry)
        wrong = [f"{error.json_path}: {error.message[:300]}" for error in validator.iter_errors(value)]
        assert not wrong, f"{what}: " + "; ".join(wrong)


def _percent(match: re.Match[str]) -> str:
    return f"%{ord(match[0]):02X}"


@cache
def schemas() -> Schemas:
    """The one instance; a test that asks for it is skipped where the file isn't beside the checkout."""
    if not FILE.exists():
        pytest.skip("OpenAI's schemas are not beside the checkout")
    return Schemas()
