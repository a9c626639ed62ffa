"""Routes that vLLM added to OpenAI's: runtime adapters and the tokenizer."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from coserve.errors import InvalidRequest
from coserve.server.application.chat import read_conversation
from coserve.server.application.sampling import check_token_ids
from coserve.server.auth import TUNE, USE
from coserve.server.context import Context
from coserve.server.fields import Fields
from coserve.server.http import Route, json_response, read_json
from coserve.server.preparing import prepared


def routes(context: Context) -> list[Route]:
    """Adapter loading by name and path, tokenizing both ways."""
    tokenizer = context.tokenizer

    async def load(request: Request) -> Response:
        """Load an adapter from a directory under an `--adapter-root`; with `pinned` and no path, keep one in
        service on the device, or no longer."""
        fields = await read_json(request)
        name = fields.required_string("lora_name")
        path = fields.string("lora_path") if fields.has("pinned") else fields.required_string("lora_path")
        await context.adapters.load(
            name,
            path or "",
            pinned=fields.boolean("pinned") if fields.has("pinned") else None,
            replace_existing=fields.boolean("load_inplace"),
            key=request.state.key,
        )
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(request: Request) -> Response:
        """Take an adapter, or one version of it ("NAME@3"), out of service."""
        fields = await read_json(request)
        name = fields.required_string("lora_name")
        await context.adapters.unload(name, request.state.key)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    def read_ids(fields: Fields) -> list[int]:
        prompt = fields.string("prompt")
        if prompt is not None:
            return tokenizer.encode(prompt, add_special_tokens=fields.boolean("add_special_tokens", True))
        if fields.has("messages"):
            return read_conversation(fields, context.chat).token_ids
        raise InvalidRequest("prompt or messages is required.", param="prompt")

    async def tokenize(request: Request) -> Response:
        """Text or a conversation as token ids."""
        fields = await read_json(request)
        context.adapters.resolve(fields.string("model"), request.state.key)
        ids = await prepared(partial(read_ids, fields), request.state.size)
        strings = (
            [tokenizer.token_text(token) for token in ids] if fields.boolean("return_token_strs") else None
        )
        return json_response(
            {
                "count": len(ids),
                "max_model_len": context.base.max_model_len,
                "tokens": ids,
                "token_strs": strings,
            }
        )

    def read_text(fields: Fields) -> str:
        if not isinstance(fields.raw("tokens"), list):
            raise InvalidRequest("tokens must be an array of token ids.", param="tokens")
        ids = fields.integers("tokens") or []
        check_token_ids(ids, context.base.vocab_size, "tokens")
        return tokenizer.decode(ids, skip_special_tokens=False)

    async def detokenize(request: Request) -> Response:
        """Token ids as text."""
        fields = await read_json(request)
        context.adapters.resolve(fields.string("model"), request.state.key)
        text = await prepared(partial(read_text, fields), request.state.size)
        return json_response({"prompt": text})

    return [
        Route("POST", "/v1/load_lora_adapter", load, TUNE),
        Route("POST", "/v1/unload_lora_adapter", unload, TUNE),
        Route("POST", "/tokenize", tokenize, USE),
        Route("POST", "/detokenize", detokenize, USE),
    ]
