"""Sampling: sessions with fixed weights, and samples."""

from __future__ import annotations

import secrets

from starlette.requests import Request
from starlette.responses import Response

from coserve.core.sampling_params import SamplingParams
from coserve.errors import Gone
from coserve.server.application.sampling import SamplingRequest
from coserve.server.auth import USE, Key, tenant_of
from coserve.server.context import Context
from coserve.server.fields import Fields, shown
from coserve.server.http import Route, json_response
from coserve.server.tinker.futures import Future
from coserve.server.tinker.passes import model_input_from_json
from coserve.server.tinker.routes import PREFIX, digest_of, read_fields
from coserve.server.tinker.samplers import SampleCall, Sampler

MAX_SAMPLES = 256
_CREATE = frozenset({"session_id", "sampling_session_seq_id", "base_model", "model_path"})
_SAMPLE = frozenset(
    {
        "num_samples",
        "prompt",
        "sampling_params",
        "base_model",
        "model_path",
        "sampling_session_id",
        "seq_id",
        "prompt_logprobs",
        "topk_prompt_logprobs",
        "topk_sample_logprobs",
        "target_prompt_logprobs",
        "prompt_alt_tokens_k",
        "prompt_logprobs_last_n",
        "record_stability_info",
    }
)
_PARAMS = frozenset({"max_tokens", "seed", "stop", "temperature", "top_k", "top_p"})
_REFUSED = ("target_prompt_logprobs", "prompt_alt_tokens_k", "record_stability_info")
_MOST = 2**31 - 1
MAX_STOPS = 64


def routes(context: Context) -> list[Route]:
    """/api/v1: create_sampling_session, samplers, asample."""
    sampling = _Sampling(context)
    return [
        Route("POST", PREFIX + "create_sampling_session", sampling.create, USE),
        Route("GET", PREFIX + "samplers/{id}", sampling.get, USE),
        Route("POST", PREFIX + "asample", sampling.sample, USE),
    ]


class _Sampling:
    """The handlers."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._tinker = context.tinker

    async def create(self, request: Request) -> Response:
        """Fix the weights to sample from: the base, or what a model has saved."""
        fields = await read_fields(request, _CREATE, "create_sampling_session")
        session = self._tinker.sessions.get(fields.required_string("session_id"), request.state.key)
        seq = fields.integer("sampling_session_seq_id", None, 0, _MOST)
        if seq is None:
            raise fields.fail("sampling_session_seq_id", "is required.")
        base, path = self._weights(fields, request.state.key)
        digest = "" if path is None else self._tinker.runs.saved(path, request.state.key).digest
        sampler = Sampler(f"{session.id}:sample:{seq}", session.id, session.tenant, base, path, digest)
        if sampler.id not in session.sampler_ids:
            session.sampler_ids.append(sampler.id)
        elif self._tinker.samplers.get(sampler.id, request.state.key) != sampler:
            raise fields.fail("sampling_session_seq_id", "is another sampling session's.")
        self._tinker.samplers.add(sampler)
        return json_response({"type": "create_sampling_session", "sampling_session_id": sampler.id})

    def _weights(self, fields: Fields, key: Key | None) -> tuple[str, str | None]:
        """The base's name, and the path of what is to be sampled from in its stead."""
        own = self._tinker.base.name
        base, path = fields.string("base_model"), fields.string("model_path")
        if path is not None:
            own = self._tinker.runs.run_of(self._tinker.runs.saved(path, key, "model_path")).base_model
        elif base is None:
            raise fields.fail("model_path", "or base_model is required.")
        if base is not None and base != own:
            raise fields.fail("base_model", f"must be {own}, not {shown(base)}.")
        return own, path

    async def get(self, request: Request) -> Response:
        """What a sampling session samples from."""
        sampler = self._tinker.samplers.get(request.path_params["id"], request.state.key)
        return json_response(
            {"sampler_id": sampler.id, "base_model": sampler.base_model, "model_path": sampler.path}
        )

    async def sample(self, request: Request) -> Response:
        """Sample from a sampling session's weights, or from those that the request names."""
        fields, key = await read_fields(request, _SAMPLE, "sample"), request.state.key
        sampler_id, session_id, digest = fields.string("sampling_session_id"), "", None
        if sampler_id is not None:
            sampler = self._tinker.samplers.get(sampler_id, key)
            session_id, path, digest = sampler.session_id, sampler.path, sampler.digest
            self._tinker.sessions.get(session_id, key)  # a sign of life
            seq = fields.integer("seq_id", None, 0)
            if seq is None:
                raise fields.fail("seq_id", "is required with sampling_session_id.")
            request_id = f"{sampler_id}:{seq}"
        else:
            _, path = self._weights(fields, key)
            request_id = f"sample:{secrets.token_hex(16)}"
        call, body = self._read(fields), digest_of(fields)
        futures = self._tinker.futures
        future = futures.known(request_id, body)
        if future is None:
            if path is not None:
                saved = self._tinker.runs.saved(path, key, "model_path")
                if digest not in (None, saved.digest):
                    raise Gone(f"Other weights were saved at {path}.", param="sampling_session_id")
            target = self._context.adapters.resolve(path or self._tinker.base.name, key)
            service = self._context.tiers.read(Fields({}), key)
            future = futures.make(request_id, session_id, tenant_of(key), body)
            future.can_be_cancelled = True
            futures.begin(future, self._tinker.samplers.sample(call, target, service, future))
        return _response(future, call.request.n)

    def _read(self, fields: Fields) -> SampleCall:
        for name in _REFUSED:
            if fields.raw(name):
                raise fields.fail(name, "is not supported.")
        prompt = model_input_from_json(fields, "prompt")
        rules = self._context.rules
        most = rules.vocab_size if rules.max_logprobs < 0 else rules.max_logprobs
        prompt_top = fields.integer("topk_prompt_logprobs", 0, 0, most) or 0
        scores = fields.boolean("prompt_logprobs") or prompt_top > 0
        last_n = fields.integer("prompt_logprobs_last_n", None, 1, max(1, len(prompt) - 1))
        if last_n is not None and not scores:
            raise fields.fail("prompt_logprobs_last_n", "needs prompt_logprobs.")
        top = fields.integer("topk_sample_logprobs", 0, 0, most) or 0
        n = fields.integer("num_samples", 1, 1, MAX_SAMPLES) or 1
        given = fields.object("sampling_params") or Fields({}, "sampling_params.")
        request = self._params(given, n, top, prompt_top if scores else None)
        self._context.generator.samples(request, [prompt])  # what is wrong with lengths and ids, at once
        return SampleCall(prompt, request, top, scores, prompt_top, last_n)

    def _params(self, fields: Fields, n: int, top: int, prompt_top: int | None) -> SamplingRequest:
        fields.only(_PARAMS, "the sampling parameters")
        stops, stop_ids, ignore_eos = self._stops(fields)
        top_p = fields.number("top_p", 1.0, 0.0, 1.0)
        if top_p == 0.0:
            raise fields.fail("top_p", "must be greater than 0; use temperature 0 for the likeliest token.")
        seed = fields.integer("seed", None, -(2**63), 2**64 - 1)
        sampling = SamplingParams(
            temperature=fields.number("temperature", 1.0, 0.0, 100.0) or 0.0,
            top_p=1.0 if top_p is None else top_p,
            top_k=max(0, fields.integer("top_k", -1, -1) or 0),
            seed=secrets.randbits(63) if seed is None else seed % 2**64,
            stop_token_ids=stop_ids,
            ignore_eos=ignore_eos,
            logprobs=top,
            prompt_logprobs=prompt_top,
        )
        max_tokens = fields.integer("max_tokens", None, 1)
        return SamplingRequest(sampling, max_tokens, n, stops, include_stop=True, skip_special_tokens=False)

    def _stops(self, fields: Fields) -> tuple[tuple[str, ...], tuple[int, ...], bool]:
        """Strings, ids, and whether not even the model's own end ends a sample: with an empty list."""
        raw = fields.raw("stop")
        if raw is None:
            return (), (), False
        stops = [raw] if isinstance(raw, str) else fields.array("stop") or []
        if len(stops) > MAX_STOPS:
            raise fields.fail("stop", f"must have at most {MAX_STOPS} entries, not {len(stops)}.")
        if all(isinstance(stop, str) and stop for stop in stops):
            return tuple(stops), (), not stops
        if all(isinstance(stop, int) and not isinstance(stop, bool) for stop in stops):
            vocab_size = self._tinker.limits.vocab_size
            if not all(0 <= stop < vocab_size for stop in stops):
                raise fields.fail("stop", f"has a token id outside the vocabulary of {vocab_size}.")
            return (), tuple(stops), False
        raise fields.fail("stop", "must be a string, an array of strings, or one of token ids.")


def _response(future: Future, samples: int) -> Response:
    ids = [f"{future.request_id}:{number}" for number in range(samples)]
    return json_response({"request_id": future.request_id, "sample_sequence_ids": ids})
