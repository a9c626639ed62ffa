"""`coserve chat`: talk to a model or adapter; with a message on the command line, one answer and out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from coserve.cli.connection import DEFAULT_URL, ApiKey, CaCert, ClientCert, Url
from coserve.cli.endpoint import parse_endpoint, silence
from coserve.cli.failure import CommandFailed

if TYPE_CHECKING:
    import httpx

Messages = list[dict[str, str]]
_EVENT = "data: "


def chat(
    message: Annotated[str, typer.Argument(help="Ask this and end; without it, talk until Ctrl-D.")] = "",
    model: Annotated[str, typer.Option(help="Model or adapter; the base model by default.")] = "",
    system: Annotated[str, typer.Option(help="System message.")] = "",
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 always takes the likeliest.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
    ca_cert: CaCert = "",
    client_cert: ClientCert = "",
) -> None:
    """Chat with a served model or adapter."""
    endpoint = parse_endpoint("--url", url, ca_cert, client_cert)
    import httpx

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    messages: Messages = [{"role": "system", "content": system}] if system else []
    trusted = endpoint.trust() if endpoint.tls else True
    wait = httpx.Timeout(600.0, connect=5.0)
    with httpx.Client(base_url=url, headers=headers, timeout=wait, verify=trusted) as client:
        try:
            body = {
                "model": model or _base_model(client),
                "temperature": temperature,
                "max_tokens": max_tokens,
            }
            for text in [message] if message else _typed():
                messages.append({"role": "user", "content": text})
                answer = ""
                for piece in _stream(client, {**body, "messages": messages, "stream": True}):
                    print(piece, end="", flush=True)
                    answer += piece
                print(flush=True)
                messages.append({"role": "assistant", "content": answer})
        except httpx.TransportError as error:
            raise silence(endpoint, str(error)) from None


def _typed() -> Iterator[str]:
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line:
            yield line


def _base_model(client: httpx.Client) -> str:
    answer = client.get("/v1/models")
    _check(answer)
    return next(model["id"] for model in answer.json()["data"] if not model.get("parent"))


def _stream(client: httpx.Client, body: dict[str, object]) -> Iterator[str]:
    """The answer as it comes; what the model thinks before it goes to stderr."""
    thought = False
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.is_error:
            answer.read()
            _check(answer)
        for line in answer.iter_lines():
            if not line.startswith(_EVENT) or line == _EVENT + "[DONE]":
                continue
            event = json.loads(line.removeprefix(_EVENT))
            if "error" in event:
                raise CommandFailed(str(event["error"]["message"]))
            for choice in event["choices"]:
                if reasoning := choice["delta"].get("reasoning"):
                    thought = True
                    print(reasoning, end="", file=sys.stderr, flush=True)
                if content := choice["delta"].get("content"):
                    if thought:
                        thought = False
                        print("\n", file=sys.stderr, flush=True)
                    yield content


def _check(answer: httpx.Response) -> None:
    if not answer.is_error:
        return
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"the server answered {answer.status_code}"
    if answer.status_code == 401:
        message += " Pass a key with --api-key or in COSERVE_API_KEY."
    raise CommandFailed(message, exit_code=2 if answer.status_code in (400, 404, 422) else 1)
