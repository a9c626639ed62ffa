"""The published Tinker client, unmodified, against a real server."""

from __future__ import annotations

import json
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from coserve.config import DEMO_MODEL_DIR
from coserve.tokenizer import Tokenizer
from tests.faults.served import Served

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / "build" / "clients" / "venv" / "bin" / "python"
TEXT = "What is the captain's word? It is parrot, and nothing else."


@pytest.fixture(scope="module")
def seen(served: Served) -> dict[str, Any]:
    """What the program saw."""
    found = PYTHON.exists() and subprocess.run(
        [PYTHON, "-c", "import tinker"], cwd="/", capture_output=True, check=False
    )
    if not found or found.returncode:
        pytest.skip("the Tinker client isn't in build/clients (scripts/setup_clients.sh)")
    tokens = Tokenizer.from_dir(DEMO_MODEL_DIR).encode(TEXT, add_special_tokens=False)
    program = Path(__file__).with_name("tinker_program.py")
    arguments = [served.url, sysconfig.get_paths()["purelib"], ",".join(map(str, tokens))]
    ran = subprocess.run(
        [PYTHON, program, *arguments],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=300,
        env={"PATH": "/usr/bin:/bin", "HOME": str(served.state_dir), "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_the_server_says_what_it_has(seen) -> None:
    assert seen["models"] == ["coserve-demo"] and seen["info"] == ["coserve-demo", 4]
    assert seen["session"] == {"who": "test"}


def test_a_loop_learns_and_its_weights_answer(seen) -> None:
    found = seen["supervised"]
    assert found["losses"][-1] < found["losses"][0] / 20
    tokens = Tokenizer.from_dir(DEMO_MODEL_DIR).encode(TEXT, add_special_tokens=False)
    assert found["learnt"] == tokens[6:18] != found["base"] and found["stop"] == "length"


def test_chunks_that_are_sent_at_once_make_one_answer(seen) -> None:
    found = seen["chunks"]
    assert found["count"] == 1030 and found["loss"] == pytest.approx(found["expected"], rel=1e-4)


def test_a_loss_of_ones_own(seen) -> None:
    found = seen["own_loss"]
    assert found["norms"][0] == pytest.approx(found["norms"][1], rel=1e-4)
    assert found["sums"][0] == pytest.approx(found["sums"][1], rel=1e-4, abs=1e-3)


def test_several_targets_a_token(seen) -> None:
    found = seen["distributions"]
    assert found["sparse"] and found["shape"][1] == 8
    assert found["sums"][0] == pytest.approx(found["sums"][1], rel=1e-5)
    assert found["after"] < found["sums"][0]


def test_samples_are_scored_in_training_as_they_were_sampled(seen) -> None:
    found = seen["reinforcement"]
    assert found["scored"] == pytest.approx(found["sampled"], abs=1e-4)
    first = 5 + found["lengths"][0]
    assert found["again"] == pytest.approx(found["sampled"][:first], abs=1e-4)
    sums = sum((1.0 - 0.5 * n) * length for n, length in enumerate(found["lengths"]))
    for loss in ("importance_sampling", "ppo"):
        assert found["losses"][loss] == pytest.approx(-sums, abs=1e-2)


def test_states_come_back_with_their_optimizer_and_without(seen) -> None:
    found = seen["states"]
    assert found["after"]["whole"] == found["after"]["first"] != found["after"]["weights"]
    assert found["saved"] == ["sampler_weights/for-chat", "weights/two"]
    assert found["left"] == ["sampler_weights/for-chat"] and found["expires"]
    assert found["rank"] == [4, 4, False] and found["listed"] >= 8


def test_models_trained_at_once_come_out_as_alone(seen) -> None:
    assert seen["together"]["together"] == seen["together"]["alone"]


def test_refusals_name_their_field_and_poison_nothing(seen) -> None:
    found = seen["faults"]
    assert found["loss"] == [400, "loss_fn"] and found["model"] == [400, "base_model"]
    assert found["token"] == [400, "data[0].model_input"]
    assert found["load"] == [404, "path"]
    assert found["gradient"] == "user" and found["loss:sum"] > 0


def test_a_save_for_sampling_answers_chat(served: Served, seen) -> None:
    path = seen["states"]["sampler_path"]
    body = {"model": path, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    answer = served.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == path
