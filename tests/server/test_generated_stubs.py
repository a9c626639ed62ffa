"""The checked-in stubs are what the protos give, and the protos have the agreed fields."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from coserve.server.grpc_gen import adapters_pb2, fine_tuning_pb2, inference_pb2

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ROOT / "coserve" / "server" / "grpc_gen"


def test_generating_again_gives_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    subprocess.run([ROOT / "scripts" / "proto.sh", Path(sys.executable).parent.parent, tmp_path], check=True)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_bytes() for path in GENERATED.glob("*_pb2*.py")}
    assert made == kept


AGREED = {
    fine_tuning_pb2.Job: """id status model adapter fine_tuned_model training_file validation_file method lora
        training seed created_at started_at finished_at estimated_finish trained_tokens step total_steps error
        result_files metadata""",
    fine_tuning_pb2.JobEvent: """id job_id created_at level type message status step total_steps epoch loss
        valid_loss learning_rate grad_norm tokens_per_second share checkpoint""",
    fine_tuning_pb2.CreateJobRequest: """model training_file validation_file adapter suffix method lora
        training seed init_from metadata priority idempotency_key""",
    fine_tuning_pb2.File: "id filename bytes purpose created_at",
    adapters_pb2.Adapter: "name version digest rank status tier job_id created_at",
    adapters_pb2.LoadAdapterRequest: "name path pinned replace",
    inference_pb2.GenerateResponse: "text token_ids logprobs finish_reason usage",
}


@pytest.mark.parametrize("message", list(AGREED), ids=lambda message: message.DESCRIPTOR.name)
def test_agreed_fields(message: type) -> None:
    agreed = AGREED[message].split()
    assert [field.name for field in message.DESCRIPTOR.fields][: len(agreed)] == agreed


@pytest.mark.parametrize("message", [fine_tuning_pb2.LoraConfig, fine_tuning_pb2.TrainingConfig])
def test_settings_tell_absent_from_zero(message: type) -> None:
    scalars = [
        field for field in message.DESCRIPTOR.fields if not field.is_repeated and field.message_type is None
    ]
    assert scalars and all(field.has_presence for field in scalars)
