"""coserve.v1.FineTuningService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc.aio

from coserve.errors import InvalidRequest
from coserve.server.application.files import UploadWriter, page, upload_limit
from coserve.server.application.preview import DEFAULT_ROWS, MAX_ROWS, preview
from coserve.server.auth import Key, tenant_of
from coserve.server.context import Context
from coserve.server.fields import Fields
from coserve.server.grpc_convert import (
    checkpoint_message,
    event_message,
    file_message,
    job_message,
    plain,
    preview_message,
)
from coserve.server.grpc_gen import fine_tuning_pb2 as pb
from coserve.server.grpc_gen import fine_tuning_pb2_grpc
from coserve.server.grpc_guard import key_of
from coserve.server.grpc_uploads import receive

_DEFAULT_PAGE = 20


class FineTuning(fine_tuning_pb2_grpc.FineTuningServiceServicer):
    """Jobs, their events and checkpoints, files, and previews."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._jobs = context.jobs

    def _key(self, context: grpc.aio.ServicerContext) -> Key | None:
        return key_of(self._context, context.invocation_metadata())

    async def CreateJob(self, request: pb.CreateJobRequest, context: grpc.aio.ServicerContext) -> pb.Job:
        """Check a request and start its job."""
        return job_message(await self._jobs.create(plain(request), self._key(context)))

    async def GetJob(self, request: pb.GetJobRequest, context: grpc.aio.ServicerContext) -> pb.Job:
        """One job."""
        return job_message(await self._jobs.records.get(request.job_id, self._key(context)))

    async def ListJobs(
        self, request: pb.ListJobsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListJobsResponse:
        """Jobs, the newest first."""
        if request.limit < 0:
            raise InvalidRequest("limit must not be negative.", param="limit")
        jobs = await self._jobs.records.list(self._key(context), dict(request.metadata))
        ids = [job.id for job in jobs]
        shown, more = page(jobs, ids, request.after or None, request.limit or _DEFAULT_PAGE)
        return pb.ListJobsResponse(jobs=[job_message(job) for job in shown], has_more=more)

    async def CancelJob(self, request: pb.CancelJobRequest, context: grpc.aio.ServicerContext) -> pb.Job:
        """End a job without publishing."""
        return job_message(await self._jobs.cancel(request.job_id, self._key(context)))

    async def PauseJob(self, request: pb.PauseJobRequest, context: grpc.aio.ServicerContext) -> pb.Job:
        """Stop a job after the step it is in."""
        return job_message(await self._jobs.pause(request.job_id, self._key(context)))

    async def ResumeJob(self, request: pb.ResumeJobRequest, context: grpc.aio.ServicerContext) -> pb.Job:
        """Let a paused job go on."""
        return job_message(await self._jobs.resume(request.job_id, self._key(context)))

    async def WatchJob(
        self, request: pb.WatchJobRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.JobEvent]:
        """All events of a job, then those to come, to the last status."""
        records, key = self._jobs.records, self._key(context)
        async with aclosing(records.watch(request.job_id, request.after, key)) as events:
            async for event in events:
                yield event_message(event)

    async def ListCheckpoints(
        self, request: pb.ListCheckpointsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListCheckpointsResponse:
        """The kept checkpoints, the newest first."""
        key = self._key(context)
        job = await self._jobs.records.get(request.job_id, key)
        rows = await self._jobs.records.checkpoints(job.id, key)
        steps = await self._jobs.records.metrics_of(rows)
        return pb.ListCheckpointsResponse(
            checkpoints=[checkpoint_message(job, row, steps.get(row.id)) for row in rows]
        )

    async def PreviewDataset(
        self, request: pb.PreviewDatasetRequest, context: grpc.aio.ServicerContext
    ) -> pb.PreviewDatasetResponse:
        """Rows as text, tokens and labels."""
        source, key = request.WhichOneof("source"), self._key(context)
        if source is None:
            raise InvalidRequest("file_id or data is required.", param="file_id")
        self._context.adapters.resolve(request.model or None, key)
        training = Fields(plain(request.training), "training.")
        max_length = training.integer("max_length", 0, 0, self._context.base.max_model_len) or 0
        if not 0 <= request.limit <= MAX_ROWS:
            raise InvalidRequest(f"limit must be from 0 to {MAX_ROWS}.", param="limit")
        if source == "file_id":
            file = await self._context.files.get(request.file_id, key)
            data: bytes | object = self._context.files.path(file.id)
        else:
            data = request.data
        limit = request.limit or DEFAULT_ROWS
        max_length = max_length or self._context.base.max_model_len
        return preview_message(
            await asyncio.to_thread(preview, data, self._context.tokenizer, max_length, limit)
        )

    async def UploadFile(
        self, request_iterator: AsyncIterator[pb.UploadFileRequest], context: grpc.aio.ServicerContext
    ) -> pb.File:
        """Take a file in pieces."""
        files, key = self._context.files, self._key(context)
        writer = UploadWriter(files.folder, upload_limit(key))
        try:
            info = await receive(request_iterator, writer)
            purpose, tenant = info.purpose or "fine-tune", tenant_of(key)
            return file_message(await files.add(writer.path, info.filename, purpose, tenant))
        finally:
            writer.discard()
