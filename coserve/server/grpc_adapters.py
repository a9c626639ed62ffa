"""coserve.v1.AdapterService."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc.aio

from coserve.errors import InvalidRequest, NotFound
from coserve.server.adapter_store import AdapterRow
from coserve.server.alias_store import Alias
from coserve.server.application.files import MAX_UPLOAD_BYTES, UploadWriter, upload_limit
from coserve.server.auth import Key
from coserve.server.context import Context
from coserve.server.grpc_convert import adapter_message
from coserve.server.grpc_gen import adapters_pb2 as pb
from coserve.server.grpc_gen import adapters_pb2_grpc
from coserve.server.grpc_guard import key_of
from coserve.server.grpc_uploads import receive


class AdapterRpc(adapters_pb2_grpc.AdapterServiceServicer):
    """Adapters by name and version."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._adapters = context.adapters

    def _key(self, context: grpc.aio.ServicerContext) -> Key | None:
        return key_of(self._context, context.invocation_metadata())

    def _message(self, row: AdapterRow) -> pb.Adapter:
        return adapter_message(row, self._adapters.tier(row.version.digest))

    async def LoadAdapter(
        self, request: pb.LoadAdapterRequest, context: grpc.aio.ServicerContext
    ) -> pb.Adapter:
        """Load a PEFT directory under an allowed root; without a path pin or unpin one in service, or bring
        back an unloaded one."""
        _require_name(request.name)
        row = await self._adapters.load(
            request.name,
            request.path,
            pinned=request.pinned if not request.path else request.pinned or None,
            replace_existing=request.replace,
            key=self._key(context),
        )
        return self._message(row)

    async def UnloadAdapter(
        self, request: pb.UnloadAdapterRequest, context: grpc.aio.ServicerContext
    ) -> pb.UnloadAdapterResponse:
        """Forget an adapter, or one version of it."""
        _require_name(request.name)
        await self._adapters.unload(request.name, self._key(context), request.version)
        return pb.UnloadAdapterResponse()

    async def GetAdapter(
        self, request: pb.GetAdapterRequest, context: grpc.aio.ServicerContext
    ) -> pb.Adapter:
        """One version of an adapter."""
        _require_name(request.name)
        return self._message(self._adapters.get(request.name, request.version, key=self._key(context)))

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListAdaptersResponse:
        """All versions, of one name where it is given."""
        key = self._key(context)
        rows = self._adapters.all_versions(key)
        if request.name:
            self._adapters.get(request.name, key=key)
            rows = [row for row in rows if row.version.name == request.name]
        return pb.ListAdaptersResponse(adapters=[self._message(row) for row in rows])

    async def PublishVersion(
        self, request: pb.PublishVersionRequest, context: grpc.aio.ServicerContext
    ) -> pb.Adapter:
        """Make a checkpoint the next version of an adapter."""
        checkpoint, key = request.checkpoint, self._key(context)
        if not checkpoint:
            if not request.job_id:
                raise InvalidRequest("checkpoint or job_id is required.", param="checkpoint")
            rows = await self._context.jobs.records.checkpoints(request.job_id, key)
            if not rows:
                raise NotFound("The job has no checkpoint yet.", param="job_id")
            checkpoint = rows[0].id
        return self._message(await self._context.jobs.publish_checkpoint(checkpoint, request.name, key))

    async def RollbackAdapter(
        self, request: pb.RollbackAdapterRequest, context: grpc.aio.ServicerContext
    ) -> pb.Adapter:
        """Let a name mean an earlier version again."""
        _require_name(request.name)
        row = await self._adapters.rollback(request.name, request.version, self._key(context))
        return self._message(row)

    async def UploadAdapter(
        self, request_iterator: AsyncIterator[pb.UploadAdapterRequest], context: grpc.aio.ServicerContext
    ) -> pb.Adapter:
        """Take a PEFT directory as a tar and publish it."""
        key = self._key(context)
        writer = UploadWriter(self._context.files.folder, upload_limit(key))
        try:
            info = await receive(request_iterator, writer)
            row = await self._adapters.upload(
                info.name,
                writer.path,
                MAX_UPLOAD_BYTES,
                key,
                pinned=info.pinned or None,
                sha256=info.sha256,
            )
            return self._message(row)
        finally:
            writer.discard()

    async def DownloadAdapter(
        self, request: pb.DownloadAdapterRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.DownloadAdapterResponse]:
        """A version as a tar of its PEFT directory."""
        _require_name(request.name)
        row = self._adapters.get(request.name, request.version, key=self._key(context))
        async for chunk in self._adapters.archive(row):
            yield pb.DownloadAdapterResponse(data=chunk)

    async def SetAlias(self, request: pb.SetAliasRequest, context: grpc.aio.ServicerContext) -> pb.Alias:
        """Make an alias, or move it."""
        for param in ("alias", "model"):
            _require(getattr(request, param), param)
        return _alias(await self._context.aliases.set(request.alias, request.model, self._key(context)))

    async def DeleteAlias(
        self, request: pb.DeleteAliasRequest, context: grpc.aio.ServicerContext
    ) -> pb.DeleteAliasResponse:
        """Forget an alias."""
        await self._context.aliases.delete(request.alias, self._key(context))
        return pb.DeleteAliasResponse()

    async def ListAliases(
        self, request: pb.ListAliasesRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListAliasesResponse:
        """Every alias."""
        found = self._context.aliases.all(self._key(context))
        return pb.ListAliasesResponse(aliases=[_alias(alias) for alias in found])


def _alias(alias: Alias) -> pb.Alias:
    return pb.Alias(alias=alias.name, model=alias.model, created_at=alias.created_at)


def _require_name(name: str) -> None:
    _require(name, "name")


def _require(value: str, param: str) -> None:
    if not value:
        raise InvalidRequest(f"{param} is required.", param=param, code="missing_required_parameter")
