"""The engine on a device whose numbers nobody can read: torch's meta device, with Triton's launches noted.

A step that read a tensor back between its launches, or mixed it with one on the host, would fail here; a GPU
would wait, or fail as well. Only what a step answers with may be read: sampled tokens, an optimizer step's
loss, its gradient's norm, whether its parameters are finite.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from coserve.engine.local import LocalEngine
from coserve.kernels import dispatch
from coserve.training import objectives, optimizer, running_job
from coserve.training.objectives import LossSums
from coserve.training.running_job import RunningJob
from coserve.worker import model_runner
from coserve.worker.cuda_graph import BucketedForward
from coserve.worker.sampler import SampledTokens
from tests.invariants import world
from tests.worker.replayed import ReplayedFunctions

FORWARD = {"norm_kernel", "norm_rope_store_kernel", "paged_attention_kernel", "swiglu_kernel"}
LORA = {"fused_shrink_kernel", "expand_kernel"}  # o_proj, which alone shrinks for itself, has no adapter
BACKWARD = {"window_dq_kernel", "window_dkdv_kernel", "norm_backward_kernel", "swiglu_backward_kernel"}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the kernels launched; what a step may read back is made up."""
    triton = pytest.importorskip("triton")
    names: set[str] = set()
    jit = triton.runtime.jit.JITFunction
    monkeypatch.setattr(jit, "run", lambda self, *_, **__: names.add(self.__name__))
    monkeypatch.setattr(dispatch, "_backend", "triton")
    monkeypatch.setattr("coserve.engine.engine.resolve_device", lambda name: torch.device("meta"))

    def sample(logits_SV: torch.Tensor, rows: list[Any]) -> Any:
        assert logits_SV.is_meta
        return SampledTokens([5] * len(rows), [None] * len(rows))

    monkeypatch.setattr(model_runner, "sample", sample)
    monkeypatch.setattr(objectives, "token_sums", lambda microbatch, losses_C: LossSums(1.0, 1, 1))
    for module in (optimizer, running_job):  # of the gradient, and of the parameters
        monkeypatch.setattr(module, "global_norm", lambda numbers: 1.0)
    return names


@pytest.fixture
def local(launched: set[str], tmp_path: Path) -> LocalEngine:
    return world.make_engine(world.make_model(tmp_path / "model"), max_num_batched_tokens=64)


@pytest.mark.parametrize("graphs", (False, True), ids=("plain", "graphs"))
def test_chat_with_and_without_adapter(
    local: LocalEngine, launched: set[str], tmp_path: Path, graphs: bool
) -> None:
    adapter = world.make_adapter(tmp_path / "model", tmp_path / "adapter", 3, 1)
    own = local.engine
    if graphs:
        own.runner._graphs = BucketedForward(own.decoder, own.kv, own.pool, own.slots, ReplayedFunctions())
    assert len(local.generate([5, 9, 3, 40], world.GREEDY)) == world.GREEDY.max_tokens
    assert launched >= FORWARD and not launched & LORA
    assert len(local.generate([5, 9, 3, 40], world.GREEDY, adapter)) == world.GREEDY.max_tokens
    assert launched >= LORA


def test_a_job_beside_a_request(
    local: LocalEngine, launched: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = world.make_job(world.make_data(tmp_path / "data"), tmp_path / "job", n_epochs=1)
    monkeypatch.setattr(RunningJob, "write_checkpoint", lambda job, writer: None)
    local.add("chat", [5, 9, 3, 40], world.GREEDY)
    world.submit(local, spec)
    local.run_until(lambda: len(world.progress(local, spec.job_id)) == 2, 2000)
    assert launched >= FORWARD | LORA | BACKWARD | {"shrink_kernel", "window_kernel", "adamw_kernel"}
    assert "chat" in local.finished
