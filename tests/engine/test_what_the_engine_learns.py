"""What the engine has learnt of its machine outlives it, and how long arrivals waited is told."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from coserve.engine import messages as m
from coserve.server.state_dir import StateDir
from tests.invariants import world

PROMPT = list(range(3, 20))


def test_a_restarted_engine_knows_its_costs(model: Path, tmp_path: Path) -> None:
    state = StateDir(tmp_path / "state")
    local = world.make_engine(model, latency_file=str(state.latency_model))
    assert not local.engine.model.trained
    stats: list[m.EngineStats] = []
    local.engine.send = lambda message: stats.append(message) if isinstance(message, m.EngineStats) else None
    spec = world.make_job(world.make_data(tmp_path / "data"), tmp_path)
    local.engine.handle(m.SubmitJob(call_id=1, spec=spec))
    local.add("chat", PROMPT, world.GREEDY)
    for _ in range(40):
        local.engine.step()
    local.engine.stop()
    assert stats[-1].latency_model and not any(s.latency_model for s in stats[:-1])
    state.save_latency_model(stats[-1].latency_model)
    again = world.make_engine(model, latency_file=str(state.latency_model)).engine.model
    assert again.trained and again.state() == local.engine.model.state()
    assert again.predict_unit("loss", 16) > 0.0
    assert not list(state.root.glob("*.tmp"))
    state.close()


@pytest.mark.parametrize("damage", ["another model", "cut short", "old version"])
def test_what_does_not_fit_is_left_alone(
    model: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    local, path = world.make_engine(model), tmp_path / "latency_model.json"
    text = local.engine.saved_costs()
    if damage == "another model":
        text = world.make_engine(world.make_model(tmp_path / "m", hidden_size=64)).engine.saved_costs()
    elif damage == "cut short":
        text = text[: len(text) // 2]
    else:
        text = text.replace('"inference"', '"forward"')
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert not world.make_engine(model, latency_file=str(path)).engine.model.trained
    assert "learnt anew" in caplog.text and str(path) in caplog.text


def test_how_long_arrivals_waited_is_told_by_the_step_they_waited_for(model: Path, tmp_path: Path) -> None:
    local = world.make_engine(model)
    local.add("first", PROMPT, world.GREEDY)
    world.submit(local, world.make_job(world.make_data(tmp_path / "data"), tmp_path))
    local.run_until(lambda: "first" in local.finished)
    local.engine.stats.snapshot(0)
    arrival = time.time()
    local.engine.step()
    local.engine.handle(
        m.AddRequest(request_id="late", prompt_token_ids=PROMPT, sampling=world.GREEDY, arrival=arrival)
    )
    ((kind, seconds),) = local.engine.stats.snapshot(0).arrival_waits
    assert kind == "training" and 0.0 < seconds < 60.0
    assert local.engine.stats.snapshot(0).arrival_waits == []
