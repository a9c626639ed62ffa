"""What steps look like while the latency model knows nothing, or no step as wide as the prompts that wait."""

from __future__ import annotations

from coserve.core.latency_model import UNTRIED, LatencyModel

from .simulation import PER_TOKEN, STEP_FLOOR, Simulation

WIDE = 2048


def test_a_burst_on_a_machine_nobody_knows_has_its_first_token_after_a_part() -> None:
    """In one step of all it may hold, 2048 tokens, nobody would have a token until all of them were done."""
    sim = Simulation(blocks=4000, max_num_seqs=64, max_tokens=WIDE)
    for number in range(32):
        sim.request(f"r{number:02}", 200, 4)
    part = STEP_FLOOR + (UNTRIED + 32) * PER_TOKEN
    answered = 0.0
    while sim.scheduler.waiting or any(r.num_output_tokens == 0 for r in sim.scheduler.running):
        sim.step()
        if not sim.model.trained:
            assert sim.now - answered <= part, "somebody has a token after every part"
        if sim.sampled:
            answered = sim.now
    sim.run()
    assert all(plan.inference_tokens <= UNTRIED + 32 for plan in sim.plans[:8])


def test_steps_grow_by_what_was_measured() -> None:
    sim = Simulation(blocks=4000, max_num_seqs=64, max_tokens=WIDE)
    widths = []
    for number in range(24):
        sim.request(f"r{number:02}", 2000, 1)
    while sim.scheduler.has_requests:
        sim.step()
        widths.append(sim.plans[-1].inference_tokens)
    assert widths[:8] == [UNTRIED] * 8
    assert max(widths) == WIDE
    for place, width in enumerate(widths[1:], 1):
        assert width <= 2 * max(widths[:place])


def test_a_restarted_server_need_not_learn_how_wide_a_step_may_be() -> None:
    sim = Simulation(blocks=4000, max_tokens=WIDE)
    for number in range(24):
        sim.request(f"r{number:02}", 2000, 1)
    sim.run()
    again = LatencyModel()
    again.restore(sim.model.state())
    assert again.most_to_try == sim.model.most_to_try >= WIDE
