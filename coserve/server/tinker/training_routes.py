"""Models in training: made, fed, stepped, saved, loaded."""

from __future__ import annotations

import hashlib
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable
from functools import partial

from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response

from coserve.errors import CoserveError, InvalidRequest
from coserve.server.application.models import unknown_model
from coserve.server.auth import TUNE, Key, sees
from coserve.server.context import Context
from coserve.server.fields import Fields
from coserve.server.http import Route, json_response, media_type, read_body, read_json
from coserve.server.preparing import prepared
from coserve.server.tinker import passes
from coserve.server.tinker.models import TrainedModel, Work
from coserve.server.tinker.routes import (
    PREFIX,
    PROTOBUF,
    check_fields,
    digest_of,
    future_response,
    read_fields,
)
from coserve.server.tinker.runs import SAMPLER, Runs, check_ttl
from coserve.server.tinker.samplers import Sampler
from coserve.server.tinker.service import Tinker
from coserve.server.tinker.service_routes import read_metadata
from coserve.server.tinker.sessions import Session
from coserve.server.tinker.store import Run, Saved
from coserve.training.job import LoraSpec
from coserve.training.lora_settings import resolve_lora
from coserve.training.model_calls import AdamParams, Pass, Update

MAX_BODY = 32 << 20  # bytes of a pass
ALPHA = 32.0  # the API has no alpha; SkyRL's servers take this one too
MLP = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
_MODEL = frozenset({"session_id", "model_seq_id", "base_model", "user_metadata", "lora_config"})
_LORA = frozenset({"rank", "seed", "train_unembed", "train_mlp", "train_attn"})
_CALL = frozenset({"model_id", "seq_id"})
_ADAM = frozenset({"learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm"})
_SAVE = _CALL | {"path", "ttl_seconds", "overwrite", "user_metadata"}
_SAVE_SAMPLER = _CALL | {"path", "sampling_session_seq_id", "kind", "ttl_seconds", "user_metadata"}
_LOAD = _CALL | _MODEL - {"lora_config"} | {"path", "optimizer", "optimizer_config", "weights_access_token"}
_MOST = 2**31 - 1


def routes(context: Context) -> list[Route]:
    """/api/v1: create_model to load_weights."""
    training = _Training(context.tinker)
    return [
        Route("POST", PREFIX + "create_model", training.create_model, TUNE),
        Route("POST", PREFIX + "get_info", training.get_info, TUNE),
        Route("POST", PREFIX + "unload_model", training.unload_model, TUNE),
        Route("POST", PREFIX + "forward", training.forward, TUNE),
        Route("POST", PREFIX + "forward_backward", training.forward_backward, TUNE),
        Route("POST", PREFIX + "optim_step", training.optim_step, TUNE),
        Route("POST", PREFIX + "save_weights", training.save_weights, TUNE),
        Route("POST", PREFIX + "save_weights_for_sampler", training.save_for_sampler, TUNE),
        Route("POST", PREFIX + "load_weights", training.load_weights, TUNE),
    ]


class _Training:
    """The handlers."""

    def __init__(self, tinker: Tinker) -> None:
        self._tinker = tinker

    async def create_model(self, request: Request) -> Response:
        """A LoRA adapter on the base model, drawn from its seed; `lora_config` says on what it sits."""
        fields = await read_fields(request, _MODEL | {"optimizer_config"}, "create_model")
        session, run_id, metadata = self._new_model(fields, request.state.key)
        _check_optimizer(fields)
        name = fields.required_string("base_model")
        if not sees(request.state.key, self._tinker.base.name):
            raise unknown_model(name)
        if name != self._tinker.base.name:
            raise fields.fail("base_model", f"must be {self._tinker.base.name}, which this server has.")
        lora = fields.object("lora_config")
        if lora is None:
            raise fields.fail("lora_config", "is required: this server trains LoRA adapters.")
        run = self._run(run_id, session, lora, metadata)
        future = self._tinker.models.create(run, session, digest_of(fields), None, False)
        return future_response(future, run.id)

    def _new_model(self, fields: Fields, key: Key | None) -> tuple[Session, str, dict[str, object] | None]:
        session = self._tinker.sessions.get(fields.required_string("session_id"), key)
        seq = fields.integer("model_seq_id", None, 0, _MOST)
        if seq is None:
            raise fields.fail("model_seq_id", "is required.")
        return session, f"{session.id}:train:{seq}", read_metadata(fields)

    def _run(self, run_id: str, session: Session, fields: Fields, metadata: dict[str, object] | None) -> Run:
        """A new run by its LoRA configuration."""
        fields.only(_LORA, "a LoRA configuration")
        rank = fields.integer("rank", 32, 1, self._tinker.max_rank) or 32
        parts = {name: fields.boolean(f"train_{name}", True) for name in ("mlp", "attn", "unembed")}
        linear = self._tinker.model_config.linear_modules
        targets = [name for name in linear if parts["mlp" if name in MLP else "attn"]]
        targets += ["lm_head"] if parts["unembed"] else []
        if not targets:
            raise fields.fail("train_mlp", "or train_attn or train_unembed must be true.")
        lora = LoraSpec(r=rank, lora_alpha=ALPHA, target_modules=tuple(targets))
        resolve_lora(lora, self._tinker.model_config)
        seed = fields.integer("seed", None, 0)
        now = time.time()
        return Run(
            id=run_id,
            session_id=session.id,
            tenant=session.tenant,
            base_model=self._tinker.base.name,
            lora=lora,
            seed=secrets.randbits(31) if seed is None else seed,
            train_mlp=parts["mlp"],
            train_attn=parts["attn"],
            train_unembed=parts["unembed"],
            created_at=now,
            seen_at=now,
            user_metadata=metadata,
        )

    async def get_info(self, request: Request) -> Response:
        """What a model is."""
        fields = await read_fields(request, frozenset({"model_id"}), "get_info")
        run = self._tinker.models.get(fields.required_string("model_id"), request.state.key).run
        model = {
            "arch": self._tinker.model_config.family,
            "model_name": run.base_model,
            "tokenizer_id": None,
        }
        return json_response(
            {
                "type": "get_info",
                "model_data": model,
                "model_id": run.id,
                "is_lora": True,
                "lora_rank": run.lora.r,
                "model_name": run.base_model,
            }
        )

    async def unload_model(self, request: Request) -> Response:
        """Free what a model holds, at once; calls that wait fail. What it has saved stays."""
        fields = await read_fields(request, frozenset({"model_id"}), "unload_model")
        model = self._tinker.models.get(fields.required_string("model_id"), request.state.key)
        return future_response(self._tinker.models.unload_later(model), model.id)

    # ------------------------------------------------------------------ calls in order

    async def forward(self, request: Request) -> Response:
        """Score data; no gradient."""
        return await self._pass_from_json(request, "forward_input", backward=False)

    async def forward_backward(self, request: Request) -> Response:
        """Score data, and add the gradient of the summed loss to what is there. As JSON or protobuf, which
        with `forward_only` only scores."""
        if media_type(request) != PROTOBUF:
            return await self._pass_from_json(request, "forward_backward_input", backward=True)
        body = await read_body(request, MAX_BODY)
        message = passes.parse_protobuf(body)
        model, limits = self._model(message.model_id, request.state.key), self._tinker.limits

        async def call() -> Pass:
            return await prepared(partial(passes.pass_from_protobuf, message, limits), len(body))

        return await self._submit_pass(model, message.seq_id, hashlib.sha256(body).digest(), call, len(body))

    async def _pass_from_json(self, request: Request, name: str, *, backward: bool) -> Response:
        fields = await read_json(request)
        model, seq = self._addressed(fields, request.state.key)
        size, limits = request.state.size, self._tinker.limits

        async def call() -> Pass:
            check_fields(fields, _CALL | {name}, name.removesuffix("_input"))
            given = fields.object(name)
            if given is None:
                raise fields.fail(name, "is required.")
            plain = Fields(given.body)  # its fields go by the same names as in protobuf
            return await prepared(partial(passes.pass_from_json, plain, backward, limits), size)

        return await self._submit_pass(model, seq, digest_of(fields), call, size)

    async def _submit_pass(
        self,
        model: TrainedModel,
        seq: int | None,
        digest: bytes,
        make: Callable[[], Awaitable[Pass]],
        size: int,
    ) -> Response:
        try:
            call = await make()
        except CoserveError:
            _skip(model, seq)
            raise
        work = self._tinker.models.run_pass(model, call)
        future = self._tinker.models.submit(model, seq, digest, work, held=size)
        return future_response(future, model.id)

    async def optim_step(self, request: Request) -> Response:
        """One step of AdamW with the gradients since the last, with the settings that it brings along."""
        return await self._call(request, self._read_step)

    def _read_step(self, fields: Fields, model: TrainedModel) -> Work:
        check_fields(fields, _CALL | {"adam_params", "optim_params", "optimizer_params"}, "optim_step")
        if fields.has("optimizer_params"):
            raise fields.fail("optimizer_params", "must be adam_params: this server steps by AdamW.")
        name = "optim_params" if fields.has("optim_params") else "adam_params"
        given = fields.object(name) or Fields({}, name + ".")
        given.only(_ADAM, "the parameters of Adam")
        default = AdamParams()
        adam = AdamParams(
            learning_rate=_number(given, "learning_rate", default.learning_rate),
            beta1=_beta(given, "beta1", default.beta1),
            beta2=_beta(given, "beta2", default.beta2),
            eps=_number(given, "eps", default.eps),
            weight_decay=_number(given, "weight_decay", default.weight_decay),
            grad_clip_norm=max(0.0, given.number("grad_clip_norm", 0.0) or 0.0),
        )
        return self._tinker.models.update(model, Update(adam=adam))

    async def save_weights(self, request: Request) -> Response:
        """Make weights and optimizer state durable under a name."""
        return await self._call(request, self._read_save)

    def _read_save(self, fields: Fields, model: TrainedModel) -> Work:
        check_fields(fields, _SAVE, "save_weights")
        name = Runs.check_name(fields.string("path") or f"{time.time_ns():x}")
        return self._tinker.models.save(
            model,
            name,
            ttl=check_ttl(fields.integer("ttl_seconds")),
            overwrite=fields.boolean("overwrite"),
            user_metadata=_strings(fields),
        )

    async def save_for_sampler(self, request: Request) -> Response:
        """Make a snapshot of the weights to sample from: durable under a name, or for this session only."""
        return await self._call(request, self._read_save_for_sampler)

    def _read_save_for_sampler(self, fields: Fields, model: TrainedModel) -> Work:
        check_fields(fields, _SAVE_SAMPLER, "save_weights_for_sampler")
        if fields.string("kind", "snapshot") != "snapshot":
            raise fields.fail("kind", "must be snapshot: weights that change under a sampler aren't served.")
        ttl, metadata = check_ttl(fields.integer("ttl_seconds")), _strings(fields)
        seq = fields.integer("sampling_session_seq_id", None, 0, _MOST)
        name = fields.string("path")
        if name is None and seq is not None:
            sampler_id = f"{model.session.id}:sample:{seq}"

            def begin(saved: Saved) -> str:
                session, base = model.session, model.run.base_model
                sampler = Sampler(sampler_id, session.id, session.tenant, base, saved.path, saved.digest)
                self._tinker.samplers.add(sampler)
                session.sampler_ids.append(sampler_id)
                return sampler_id

            return self._tinker.models.snapshot(model, f"ephemeral-{uuid.uuid4().hex[:16]}", begin)
        if name is None:
            raise fields.fail("path", "or sampling_session_seq_id is required.")
        Runs.check_name(name)
        return self._tinker.models.save(
            model, name, ttl=ttl, overwrite=False, user_metadata=metadata, kind=SAMPLER
        )

    async def load_weights(self, request: Request) -> Response:
        """Set a model's weights from a save, with `optimizer` its state too, else with a fresh one. With
        `session_id` and `model_seq_id` in place of `model_id` it is a new model's first call."""
        fields = await read_json(request)
        if not fields.has("session_id"):
            return await self._call(request, self._read_load, fields)
        check_fields(fields, _LOAD, "load_weights")
        session, run_id, metadata = self._new_model(fields, request.state.key)
        saved = self._saved(fields, request.state.key)
        before = self._tinker.runs.run_of(saved)
        if fields.string("base_model", before.base_model) != before.base_model:
            raise fields.fail("base_model", f"must be {before.base_model}, which the weights belong to.")
        _check_optimizer(fields)
        changes = {"id": run_id, "session_id": session.id, "tenant": session.tenant}
        now = time.time()
        run = replace(before, **changes, created_at=now, seen_at=now, user_metadata=metadata)
        optimizer = fields.boolean("optimizer")
        future = self._tinker.models.create(run, session, digest_of(fields), saved, optimizer)
        return future_response(future, run.id)

    def _read_load(self, fields: Fields, model: TrainedModel) -> Work:
        check_fields(fields, _LOAD, "load_weights")
        _check_optimizer(fields)
        saved = self._saved(fields, model.session.key)
        return self._tinker.models.load(model, saved, fields.boolean("optimizer"))

    def _saved(self, fields: Fields, key: Key | None) -> Saved:
        if fields.has("weights_access_token"):
            raise fields.fail("weights_access_token", "is not supported: a key loads what it has saved.")
        saved = self._tinker.runs.saved(fields.required_string("path"), key)
        if fields.boolean("optimizer") and saved.kind == SAMPLER:
            raise fields.fail("optimizer", "must be false: sampler weights come without its state.")
        return saved

    # ------------------------------------------------------------------ what they share

    async def _call(
        self,
        request: Request,
        read: Callable[[Fields, TrainedModel], Work],
        fields: Fields | None = None,
    ) -> Response:
        fields = fields or await read_json(request)
        model, seq = self._addressed(fields, request.state.key)
        try:
            work = read(fields, model)
        except CoserveError:
            _skip(model, seq)
            raise
        alone = read == self._read_load
        future = self._tinker.models.submit(model, seq, digest_of(fields), work, alone=alone)
        return future_response(future, model.id)

    def _addressed(self, fields: Fields, key: Key | None) -> tuple[TrainedModel, int | None]:
        model = self._model(fields.required_string("model_id"), key)
        return model, fields.integer("seq_id", None, 1, _MOST)

    def _model(self, model_id: str, key: Key | None) -> TrainedModel:
        model = self._tinker.models.get(model_id, key)
        self._tinker.sessions.get(model.session.id, key)  # a sign of life
        return model


def _skip(model: TrainedModel, seq: int | None) -> None:
    """A refused call's number counts as used: those behind it would wait for ever."""
    if seq is not None and seq >= 1:
        model.skip(seq)


def _check_optimizer(fields: Fields) -> None:
    given = fields.object("optimizer_config")
    if given is None:
        return
    given.only(frozenset({"type"}), "an optimizer configuration")
    if given.string("type", "adamw") != "adamw":
        raise given.fail("type", "must be adamw.")


def _number(fields: Fields, name: str, default: float) -> float:
    value = fields.number(name, default, 0.0)
    return default if value is None else value


def _beta(fields: Fields, name: str, default: float) -> float:
    value = _number(fields, name, default)
    if value >= 1.0:
        raise fields.fail(name, f"must be less than 1, not {value:g}.")
    return value


def _strings(fields: Fields) -> dict[str, str] | None:
    metadata = read_metadata(fields)
    for name, value in (metadata or {}).items():
        if not isinstance(value, str):
            raise InvalidRequest(f"user_metadata.{name} must be a string.", param=f"user_metadata.{name}")
    return metadata
