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
MOST_GUARD = 0.1  # of the model's error that counts: half of what the automatic ratio leaves
SAFETY = 0.9  # of an explicit target
PACE = 0.97  # of an explicit time per token, that a request's tokens keep on average
LONGEST = 1.1  # of it, that one gap may take where those before took less
LATEST = 2.0  # times it, that a request is behind at most: what was lost before can't be made good
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

    @property
    def patience(self) -> float:
        """Seconds without a first token after which a request is late."""
        return self.ttft / 2 if self.ttft > 0.0 else PATIENCE

    def due(self, pace_from: float, num_tokens: int) -> float:
        """When the token after `num_tokens` is due at an explicit time per token, the first of them having
        come at `pace_from`."""
        return pace_from + PACE * self.tpot * num_tokens

    def pace(self, pace_from: float | None, num_tokens: int, now: float) -> float:
        """`pace_from` once the token after `num_tokens` has come: later, where that is further behind than
        can be made good."""
        if pace_from is None:
            return now
        late = now - self.due(pace_from, num_tokens) - LATEST * self.tpot
        return pace_from + max(0.0, late) if self.tpot > 0.0 else pace_from

    def prompt_limit(
        self,
        decode_alone: float,
        oldest_first_token_wait: float | None,
        early: float | None = None,
        spent: float = 0.0,
    ) -> float:
        """How long a step of decoding rows that take `decode_alone` may become by parts of prompts; the rows'
        last tokens came `spent` seconds before it, their next ones are due in `early` (None: nobody's are).
        Without a target it grows once somebody has waited longer than `PATIENCE`: a queue costs more than a
        gap."""
        if self.tpot > 0.0:
            due = PACE * self.tpot if early is None else early
            return min(due, LONGEST * self.tpot - spent)
        late = (oldest_first_token_wait or 0.0) / self.patience
        return max(PROMPT_RATIO * decode_alone, AUTO_FLOOR) * min(max(1.0, late), MOST_LATE) - spent

    def training_budget(
        self,
        inference_alone: float,
        following: float,
        guard: float,
        oldest_first_token_wait: float | None,
        early: float | None = None,
        least: float = 0.0,
    ) -> float:
        """Seconds of training that a step with inference can carry.

        `inference_alone` is the predicted time of its inference, `following` that of the step after it, whose
        tokens training delays; `guard` is the model's own relative error, `oldest_first_token_wait` how long
        the longest-waiting request has had no first token, and the tokens of this step are due in `early`
        seconds (None: they are first ones); a step of one row takes `least`. What a request's earlier gaps
        left or took too much is settled by the later ones, so the error takes little.
        """
        guard = 1.0 + min(guard, MOST_GUARD)
        if self.tpot > 0.0:
            saved = 0.0 if early is None else early - inference_alone
            gap = min(PACE * self.tpot + saved, LONGEST * self.tpot)
            budget = gap - following * guard
        else:
            ratio = self._automatic_ratio(1.0 - least / inference_alone if least else 0.0)
            budget = max(ratio * inference_alone, AUTO_FLOOR) - inference_alone * guard
        if self.ttft > 0.0 and oldest_first_token_wait is not None:
            budget = min(budget, self.ttft * SAFETY - oldest_first_token_wait - inference_alone)
        return max(0.0, budget)

    @staticmethod
    def _automatic_ratio(load: float) -> float:
        """`AUTO_RATIO` where the rows of a step wait for nothing but memory; less with the part `load` of the
        step that more rows would add to. Requests leave later then and more of them share the steps that
        follow: with load rho a step longer by x makes a wait (1 + x) (1 - rho) / (1 - rho (1 + x)) times as
        long, as in a queue with one server, and that is kept to `AUTO_RATIO`."""
        extra, load = AUTO_RATIO - 1.0, max(0.0, load)
        return 1.0 + extra * (1.0 - load) / (1.0 + extra * load)

    def batch_budget(
        self, inference_alone: float, training_budget: float, early: float | None, spent: float
    ) -> float:
        """Seconds of a step's `training_budget` that may come before its answers, in their own batch; the
        last answers were `spent` seconds ago, the next tokens are due in `early`."""
        if self.tpot == 0.0:
            return training_budget - spent
        gap = LONGEST * self.tpot - spent
        return (gap if early is None else min(gap, early)) - inference_alone
