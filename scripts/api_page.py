"""docs/api.md: routes with their handlers' docstrings, the fields of requests, errors, gRPC's methods with
the comments of proto/, and metrics. Everything on the page is read off the code.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
from prometheus_client.metrics import MetricWrapperBase

from coserve import errors
from coserve.metrics import Metrics
from coserve.server.app import OPEN_PATHS, route_parts
from coserve.server.application import request_fields
from coserve.server.application.request_fields import RequestField
from coserve.server.errors import grpc_code, http_status
from coserve.server.grpc_adapters import AdapterRpc
from coserve.server.grpc_fine_tuning import FineTuning
from coserve.server.grpc_inference import Inference
from coserve.server.http import Route

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# The API

Made by `make docs` from the code: routes with what their handlers say, fields, errors, gRPC's methods and
metrics. [clients.md](clients.md) says what is worth knowing beyond these tables, [jobs.md](jobs.md) and
[data.md](data.md) what a fine-tuning job takes, [adapters.md](adapters.md) what adapters may be.

HTTP is OpenAI's, on port 8000; gRPC is `coserve.v1`, on port 50051. Both stand on one application layer: what
one refuses the other refuses, with the same `code` and `param`.
"""
_SERVICES = {"AdapterService": AdapterRpc, "FineTuningService": FineTuning, "InferenceService": Inference}
_RPC = re.compile(r"((?:[ ]*//[^\n]*\n)*)[ ]*rpc (\w+)\((stream )?(\w+)\) returns \((stream )?(\w+)\);")


class _Anything:
    """Stands for the server's parts: routes are made, none is called."""

    def __getattr__(self, name: str) -> _Anything:
        return self


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in lines)


def said(thing: Any) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def _rights(route: Route) -> str:
    return "anybody" if route.path in OPEN_PATHS else f"`{route.right}`"


def http_routes() -> Iterator[str]:
    """One table for each module of routes."""
    yield "\n## HTTP\n\n`key` is the role that a key needs, where keys are set ([how](operations.md)).\n"
    for part in route_parts():
        yield f"\n### {said(part)}\n\n"
        routes = part.routes(_Anything())
        yield table(
            ("route", "", "key"),
            [(f"`{route.method} {route.path}`", said(route.handler), _rights(route)) for route in routes],
        )


def fields() -> Iterator[str]:
    """The fields of requests that generate."""
    lists: tuple[tuple[str, tuple[RequestField, ...]], ...] = (
        ("chat and completions", request_fields.SHARED),
        ("`/v1/chat/completions`", request_fields.CHAT),
        ("`/v1/completions`", request_fields.COMPLETIONS),
        ("`/v1/responses`", request_fields.RESPONSES),
    )
    yield "\n## Fields of requests that generate\n"
    for name, found in lists:
        yield f"\n### Of {name}\n\n"
        yield table(
            ("field", "values", ""), [(f"`{field.name}`", field.values, field.effect) for field in found]
        )
    yield "\n### Refused by name\n\n"
    yield table(("field", ""), [(f"`{name}`", why) for name, why in request_fields.REFUSED.items()])


def _kinds(kind: type[errors.CoserveError]) -> Iterator[type[errors.CoserveError]]:
    for below in kind.__subclasses__():
        yield below
        yield from _kinds(below)


def error_table() -> Iterator[str]:
    """Every error of the tree that a client can meet."""
    yield "\n## Errors\n\n"
    yield '`{"error": {"message", "type", "param", "code"}}` on every route; gRPC has the same `code`\n'
    yield "and `param` in `google.rpc.ErrorInfo`, `BadRequest` names the field, `RetryInfo` says when.\n\n"
    rows = []
    for kind in _kinds(errors.CoserveError):
        if kind is errors.ConfigError:
            continue
        error = kind.__new__(kind)
        status, word = http_status(error)
        code = grpc_code(error)
        is_met = code is not grpc.StatusCode.INTERNAL or isinstance(error, errors.InternalError)
        shown = f"`{code.name}`" if is_met else ""
        rows.append((str(status), word, f"`{kind.default_code}`", shown, said(kind)))
    yield table(("HTTP", "type", "code, if no other", "gRPC", ""), sorted(rows))


def rpcs() -> Iterator[str]:
    """gRPC's methods with the comments above them."""
    yield "\n## gRPC\n\nPackage `coserve.v1`, with health and reflection; a key travels as metadata\n"
    yield "`authorization: Bearer KEY`.\n"
    for path in sorted((ROOT / "proto" / "coserve" / "v1").glob("*.proto")):
        text = path.read_text(encoding="utf-8")
        for service in re.finditer(r"service (\w+) \{(.*?)\n\}", text, re.S):
            yield f"\n### {service[1]}\n\n[{path.name}](../{path.relative_to(ROOT)}) has the messages.\n\n"
            rows = []
            for comment, name, sends, request, answers, response in _RPC.findall(service[2]):
                words = " ".join(line.strip().removeprefix("//").strip() for line in comment.splitlines())
                words = words or said(getattr(_SERVICES[service[1]], name))
                rows.append((f"`{name}`", f"{sends}`{request}`", f"{answers}`{response}`", words))
            yield table(("method", "takes", "gives", ""), rows)


def metrics() -> Iterator[str]:
    """What /metrics shows."""
    yield "\n## Metrics\n\n`vllm:*` have vLLM's names, labels and buckets, the others are coserve's.\n\n"
    registry = Metrics("model", 2048, 16).registry
    # A metric that nothing was counted of yet has no sample to read its labels off.
    declared = {
        collector._name: collector._labelnames
        for collector in list(registry._collector_to_names)
        if isinstance(collector, MetricWrapperBase)
    }
    rows = []
    for family in registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        labels |= set(declared.get(family.name, ()))
        shown = ", ".join(f"`{label}`" for label in sorted(labels))
        rows.append((f"`{name}`", family.type, shown, family.documentation))
    yield table(("metric", "type", "labels", ""), sorted(rows))


def page() -> str:
    """The whole page."""
    return HEAD + "".join(
        text for part in (http_routes, fields, error_table, rpcs, metrics) for text in part()
    )
