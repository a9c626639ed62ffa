"""Latency targets, and what they leave for training in a step."""

from __future__ import annotations

from dataclasses import dataclass

IDLE_QUANTUM = 0.2  # seconds of training in a step that nobody waits for
WIDEST = 256  # tokens of one call: neither products nor attention gain from more on a CPU
WIDEST_ON_GPU = 2048  # of a layer's: the same work with fewer launches
CALLS_BESIDE = 8  # a forward at most, on a GPU: it waits for their launches
UNIT_SECONDS = 0.04  # of a call, or a layer of a window, while nobody waits; an arrival waits for a piece
AUTO_RATIO = 1.2  # of the predicted inference-only step
AUTO_FLOOR = 0.012  # seconds between tokens below which no reader sees a difference
PROBE_EVERY = 16  # steps with inference between two that carry no training, to see it alone
AUTO_GUARD = 0.1  # most of the model's error that counts then: half of what the ratio leaves
SAFETY = 0.9  # of an explicit target
RISE_STEPS = 3  # with requests, from none to all of the budget
SHARE_WINDOW = 10.0  # seconds over which jobs have their minimum share
PROMPT_RATIO = 3.0  # of the decoding rows' own time, that a step with a part of a prompt may take
PATIENCE = 0.5  # seconds without a first token
MOST_LATE = 2.5  # times that much, and the gaps grow no longer
LEAST_PROMPT_TOKENS = 16  # of a step, so that prompts move whatever the target


class BudgetControl:
    """Training's budget beside requests falls at once and rises slowly, so that what follows a burst, or a
    step that was predicted too short, isn't overrun again."""

    def __init__(self) -> None:
        self.level = 0.0

    def allow(self, wanted: float) -> float:
        """Seconds, of the `wanted` ones: all again after `RISE_STEPS` steps that wanted as much."""
        self.level = min(wanted, self.level + wanted / RISE_STEPS)
        return self.level


class MinimumShare:
    """What jobs are owed of the time, `share` of about the last `SHARE_WINDOW` seconds, whatever the targets.

    A debt is paid back over several steps; a second in which training had all counts for a while, more of
    them don't.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.owed = 0.0  # seconds

    def account(self, seconds: float, training: float) -> None:
        """A step took `seconds`, of which training had its part."""
        most = self.share * SHARE_WINDOW
        self.owed = max(-most / 10, min(most, self.owed + self.share * seconds - training))

    def budget(self, inference_alone: float) -> float:
        """Seconds of training that a step carries at least: its own part, and as much again of a debt."""
        part = inference_alone * self.share / (1.0 - self.share)
        return max(0.0, min(part + self.owed, 2.0 * part))


@dataclass(frozen=True)
class LatencyTargets:
    """Seconds; 0 means automatic: `AUTO_RATIO` times the inference alone, at least `AUTO_FLOOR`."""

    ttft: float = 0.0
    tpot: float = 0.0

    def step_target(self, inference_alone: float) -> float:
        """How long a step with running requests may take."""
        if self.tpot > 0.0:
            return self.tpot * SAFETY
        return max(AUTO_RATIO * inference_alone, AUTO_FLOOR)

    @property
    def patience(self) -> float:
        """Seconds without a first token after which a request is late."""
        return self.ttft / 2 if self.ttft > 0.0 else PATIENCE

    def prompt_limit(self, decode_alone: float, oldest_first_token_wait: float | None) -> float:
        """How long a step of decoding rows that take `decode_alone` may become by parts of prompts. Without a
        target it grows once somebody has waited longer than `PATIENCE`: a queue costs more than a gap."""
        if self.tpot > 0.0:
            return self.tpot * SAFETY
        late = (oldest_first_token_wait or 0.0) / self.patience
        return max(PROMPT_RATIO * decode_alone, AUTO_FLOOR) * min(max(1.0, late), MOST_LATE)

    def training_budget(
        self, inference_alone: float, guard: float, oldest_first_token_wait: float | None
    ) -> float:
        """Seconds of training that a step with inference can carry.

        `inference_alone` is the predicted time of its inference, `guard` the model's own relative error, and
        `oldest_first_token_wait` how long the longest-waiting request has had no first token. The automatic
        target promises nobody a time, so the error takes half of it at most: on a machine whose steps vary
        by a fifth training would stand still otherwise.
        """
        if self.tpot == 0.0:
            guard = min(guard, AUTO_GUARD)
        budget = self.step_target(inference_alone) - inference_alone * (1.0 + guard)
        if self.ttft > 0.0 and oldest_first_token_wait is not None:
            budget = min(budget, self.ttft * SAFETY - oldest_first_token_wait - inference_alone)
        return max(0.0, budget)
