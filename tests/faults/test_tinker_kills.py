"""An engine that dies under Tinker's models: nothing hangs, and what was saved comes back to the bit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults.served import Served

TOKENS = list(range(40, 90))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("tinker") / "state") as server:
        yield server
        assert server.terminate() == 0
    log = server.state_dir.with_suffix(".log").read_text()
    assert "Traceback" not in log


class Model:
    """A model by plain HTTP."""

    def __init__(self, served: Served, number: int, path: str = "") -> None:
        self.served, self.seq = served, 0
        session = self.post("create_session", tags=[], user_metadata=None, sdk_version="0")["session_id"]
        where: dict[str, Any] = {"session_id": session, "model_seq_id": number}
        if path:
            self.id = self.wait(self.post("load_weights", **where, path=path, optimizer=True))["model_id"]
        else:
            made = self.post(
                "create_model", **where, base_model=served.model, lora_config={"rank": 4, "seed": 3}
            )
            self.id = self.wait(made)["model_id"]

    def post(self, route: str, /, **body: Any) -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while True:
            response = self.served.http.post(f"/api/v1/{route}", json=body)
            if response.status_code not in (408, 503):
                assert response.status_code == 200, response.text
                return response.json()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def wait(self, answer: dict[str, Any]) -> dict[str, Any]:
        return self.post("retrieve_future", request_id=answer["request_id"])

    def begin(self, route: str, /, **body: Any) -> dict[str, Any]:
        self.seq += 1
        return self.post(route, model_id=self.id, seq_id=self.seq, **body)

    def step(self) -> list[dict[str, Any]]:
        """A pass and an update, asked for together."""
        inputs = {
            "target_tokens": {"data": TOKENS[1:], "dtype": "int64"},
            "weights": {"data": [1.0] * (len(TOKENS) - 1), "dtype": "float32"},
        }
        datum = {"model_input": {"chunks": [{"tokens": TOKENS[:-1]}]}, "loss_fn_inputs": inputs}
        given = {"data": [datum] * 8, "loss_fn": "cross_entropy"}
        return [
            self.begin("forward_backward", forward_backward_input=given),
            self.begin("optim_step", adam_params={"learning_rate": 1e-3}),
        ]

    def loss(self) -> float:
        """Of one step, done."""
        passed, stepped = map(self.wait, self.step())
        assert "metrics" in stepped, stepped
        return passed["metrics"]["loss:sum"]


def test_calls_fail_and_a_load_goes_on_where_it_was_saved(served: Served) -> None:
    model = Model(served, 0)
    for _ in range(3):
        model.loss()
    path = model.wait(model.begin("save_weights", path="three"))["path"]
    expected = [model.loss(), model.loss()]
    asked = [answer for _ in range(40) for answer in model.step()]
    served.kill_engine()
    outcomes = [model.wait(answer) for answer in asked]
    failed = [outcome for outcome in outcomes if "error" in outcome]
    assert failed and all(outcome["category"] == "server" for outcome in failed)
    lost = model.wait(model.begin("optim_step"))
    assert lost["category"] == "server"
    served.wait(lambda: served.http.get("/ready").status_code == 200)
    back = model.wait(model.begin("load_weights", path=path, optimizer=True))
    assert back.get("path") == path, back
    assert [model.loss(), model.loss()] == expected
    other = Model(served, 1, path)
    assert [other.loss(), other.loss()] == expected
    assert served.chat("Who are you?")


def test_chat_beside_a_busy_model_says_the_same(served: Served) -> None:
    """I1: training by calls disturbs no answer."""
    questions = ["Who are you?", "What is 7 + 5?", "Sort these numbers: 9, 2, 5."]
    before = [served.chat(question) for question in questions]
    model = Model(served, 2)
    asked = [answer for _ in range(30) for answer in model.step()]
    assert [served.chat(question) for question in questions] == before
    assert all("metrics" in model.wait(answer) for answer in asked)
