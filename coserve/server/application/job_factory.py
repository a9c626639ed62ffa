"""From a request to the record of a new job: what it names is looked up, its adapter's shape settled."""

from __future__ import annotations

import asyncio
import re
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from coserve.errors import CoserveError, FailedPrecondition, InvalidRequest, NotFound
from coserve.lora.peft_files import read_adapter_info
from coserve.models.config import ModelConfig
from coserve.server.application.adapters import Adapters
from coserve.server.application.files import Files
from coserve.server.application.job_request import JobRequest, parse_job_request
from coserve.server.application.lora_request import lora_of, parse_lora
from coserve.server.application.models import BaseModel
from coserve.server.application.publish_checks import PublishChecks
from coserve.server.auth import Authenticator, Key, tenant_of
from coserve.server.job_store import JobRecord
from coserve.server.state_dir import StateDir, copy_directory
from coserve.training.job import LoraSpec
from coserve.training.job_memory import job_memory, too_large


class JobFactory:
    """Makes records; whoever stores them decides whether the job begins."""

    def __init__(
        self,
        base: BaseModel,
        model_config: ModelConfig,
        state: StateDir,
        files: Files,
        adapters: Adapters,
        checks: PublishChecks,
        max_rank: int,
        memory: Callable[[], int | None],
    ) -> None:
        """`memory()`: bytes that a job may hold in the engine outside its pool; None while unknown."""
        self._base = base
        self._model_config = model_config
        self._state = state
        self._files = files
        self._adapters = adapters
        self._checks = checks
        self._max_rank = max_rank
        self._memory = memory

    async def make(self, body: object, key: Key | None = None) -> JobRecord:
        """A record in `validating_files`, of `key`'s; the adapter it starts from is copied into the job's
        folder.

        Raises InvalidRequest, NotFound (file, model, adapter), PermissionDenied (priority), and
        FailedPrecondition where its state can never fit in memory.
        """
        request = parse_job_request(body, self._base.max_model_len)
        Authenticator.check_priority(key, request.priority)
        if request.adapter:
            self._adapters.check_name(request.adapter, "adapter", key)
        init_from, source = self._source(request, key)
        lora = await self._lora(request, source)
        self._check_memory(request, lora)
        await self._files.get(request.training_file, key, "training_file")
        if request.validation_file:
            await self._files.get(request.validation_file, key, "validation_file")
        job = self._record(request, lora, init_from, tenant_of(key))
        if not request.adapter:
            self._adapters.check_name(job.publish_as, "adapter", key)
        folder = self._state.job(job.id)
        try:
            await self._checks.keep(request.publish_if, key, folder)
            if source is not None:
                await asyncio.to_thread(copy_directory, source, folder / "init")
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, FileNotFoundError):  # deleted since it was looked up
                raise NotFound("A file or an adapter that the job names is gone.") from None
            raise
        return job

    def _check_memory(self, request: JobRequest, lora: LoraSpec) -> None:
        need, left = job_memory(lora, request.training, self._model_config).total, self._memory()
        if left is not None and need > left:
            raise FailedPrecondition(too_large(need, left), param="lora.r", code="out_of_memory")

    async def _lora(self, request: JobRequest, source: Path | None) -> LoraSpec:
        """The adapter's settings; one that goes on with another adapter keeps its shape."""
        shape = None
        if source is not None:
            info = await asyncio.to_thread(read_adapter_info, source, self._model_config, self._max_rank)
            shape = lora_of(info.config, self._model_config)
        return parse_lora(request.lora, self._model_config, self._max_rank, shape)

    def _source(self, request: JobRequest, key: Key | None) -> tuple[str, Path | None]:
        """(name, directory) of the adapter to go on with: `init_from`, or a `model` that is an adapter."""
        found: tuple[str, Path | None] = ("", None)
        for param, name in (("model", request.model), ("init_from", request.init_from)):
            if param == "init_from" and not name:
                continue
            try:
                target = self._adapters.resolve(name or None, key)
            except CoserveError as error:
                raise type(error)(error.message, param=param, code=error.code) from None
            if target.adapter is not None:
                found = (name, Path(target.adapter.path))
            elif target.live_job:
                raise InvalidRequest(
                    f"{param} can't be a job's live weights; name an adapter or a checkpoint.", param=param
                )
            elif param == "init_from":
                raise InvalidRequest(
                    "init_from must name an adapter or a checkpoint; the base goes without it.", param=param
                )
        return found

    def _record(self, request: JobRequest, lora: LoraSpec, init_from: str, tenant: str) -> JobRecord:
        identity = uuid.uuid4().hex[:24]
        base, suffix = (re.sub(r"[^A-Za-z0-9._-]+", "-", word) for word in (self._base.name, request.suffix))
        return JobRecord(
            id=f"ftjob-{identity}",
            status="validating_files",
            model=self._base.name,
            adapter=request.adapter,
            publish_as=request.adapter or f"ft:{base[:40]}:coserve:{suffix}:{identity[:8]}",
            suffix=request.suffix,
            training_file=request.training_file,
            validation_file=request.validation_file,
            method=request.method,
            lora=lora,
            training=request.training,
            auto=request.auto,
            seed=request.seed,
            init_from=init_from,
            metadata=request.metadata,
            priority=request.priority,
            tenant=tenant,
            idempotency_key=request.idempotency_key,
            publish_if=request.publish_if,
            request_digest=request.digest,
            created_at=int(time.time()),
        )
