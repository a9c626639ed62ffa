"""The demo's fine-tuning job over gRPC: upload, create, and follow while everything else goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc

from coserve.server.grpc_gen import fine_tuning_pb2 as pb
from coserve.server.grpc_gen import fine_tuning_pb2_grpc
from examples.demo.figures import Training

LEARNING_RATE = 1e-3
RANK = 16


async def fine_tune(address: str, data: Path, adapter: str, epochs: int, training: Training) -> str:
    """Run one job to its end, keeping `training` up to date; returns the name that chat uses the adapter by.

    Raises RuntimeError with the job's own words unless it succeeds, grpc.RpcError when the server refuses.
    """
    async with grpc.aio.insecure_channel(address) as channel:
        stub = fine_tuning_pb2_grpc.FineTuningServiceStub(channel)
        file = await stub.UploadFile(_upload(data))
        job = await stub.CreateJob(
            pb.CreateJobRequest(
                training_file=file.id,
                adapter=adapter,
                seed=1,
                lora=pb.LoraConfig(r=RANK),
                training=pb.TrainingConfig(n_epochs=epochs, batch_size=8, learning_rate=LEARNING_RATE),
            )
        )
        async for event in stub.WatchJob(pb.WatchJobRequest(job_id=job.id)):
            if event.type == "metrics":
                training.step, training.total_steps = event.step, event.total_steps
                training.losses.append(event.loss)
                training.rates.append(event.tokens_per_second)
            elif event.type == "status":
                training.status, training.message = event.status, event.message
        if training.status != "succeeded":
            raise RuntimeError(f"the job {training.status}: {training.message}")
        return (await stub.GetJob(pb.GetJobRequest(job_id=job.id))).fine_tuned_model


async def _upload(path: Path) -> AsyncIterator[pb.UploadFileRequest]:
    yield pb.UploadFileRequest(info={"filename": path.name, "purpose": "fine-tune"})
    yield pb.UploadFileRequest(data=await asyncio.to_thread(path.read_bytes))
