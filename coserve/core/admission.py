"""Who is turned away at the door: a request that came too late for its first token, or to a full queue.

A request that is let in keeps its place; saying no at once costs its sender a retry, saying yes would cost
everybody behind it their target.
"""

from __future__ import annotations

from collections import deque

from coserve.core.request import Request
from coserve.core.scheduler import Scheduler
from coserve.core.slo import LEAST_PROMPT_TOKENS, SAFETY, LatencyTargets
from coserve.errors import QueueFull, TargetOutOfReach

PRESSED, MOST_PRESSED = 0.5, 5.0  # seconds after a refusal without training beside requests
RATIOS, LATELY = 64, 30.0  # first tokens by which predictions are judged, of so many seconds
LATE = 0.95  # of them, whose lateness is reckoned with
MOST_RETRY = 60.0  # seconds that anybody is told to stay away
KNOWN_AFTER = 64  # steps with inference; the first ones are slower than those that follow


class Admission:
    """Decides at a request's arrival. `max_queued` bounds the requests that wait, 0: any number may."""

    def __init__(self, scheduler: Scheduler, max_queued: int = 0) -> None:
        self.scheduler = scheduler
        self.max_queued = max_queued
        self._stretch = 1.0 / (1.0 - scheduler.limits.min_training_share)  # of steps
        self._expected: deque[tuple[Request, float, float]] = deque()  # let in, when expected, its own prompt
        self._next_turn = 0.0  # when the next that is refused may come again
        self._ratios: deque[tuple[float, float]] = deque(maxlen=RATIOS)  # when, and how late

    def check(self, request: Request, now: float) -> None:
        """Raise QueueFull, or TargetOutOfReach when the requests ahead leave its first token no time.

        Only an explicit target refuses anybody. A prompt that takes longer than its target on an idle device
        is let in while the queue by itself takes no longer than that: no retry would make it shorter.
        """
        scheduler = self.scheduler
        if self.max_queued:
            self._check_queue(now)
        target = (request.targets or scheduler.targets).ttft
        if target == 0.0 or not scheduler.has_requests:
            return
        total, own = self.predict(request, now)
        waited = max(0.0, now - request.arrival)
        queued = waited + max(0.0, total - own) * self._guard(now)
        late = queued + (own if own <= target else 0.0) - target
        if late > 0.0:
            scheduler.pressed_until = max(
                scheduler.pressed_until, now + min(max(late, PRESSED), MOST_PRESSED)
            )
            raise TargetOutOfReach(
                f"The first token would come after about {queued + own:.2g} s; its target is {target:.3g} s.",
                retry_after=self._turn(late, own, now),
            )
        if total > target / 4:
            self._expected.append((request, waited + total, own))

    def _turn(self, late: float, own: float, now: float) -> float:
        """Seconds after which one that is refused now may come again. After `late` the queue has room for
        one; those who were refused before have their turns first, each taking what its prompt takes of the
        device, or its output of the places."""
        scheduler = self.scheduler
        rows, context = len(scheduler.running), sum(r.num_tokens for r in scheduler.running)
        output = scheduler.outputs.mean * scheduler.model.predict_inference(rows, context)
        turn = max(now + late, self._next_turn)
        self._next_turn = min(now + MOST_RETRY, turn + max(own, output / scheduler.limits.max_num_seqs))
        return turn - now

    def _guard(self, now: float) -> float:
        """By how much first tokens have lately come later than predicted (`LATE` of them less), as a factor.
        A stall is forgotten after a while: those it keeps out could never show that it is over."""
        while self._expected:
            request, expected, own = self._expected[0]
            if request.scheduled_at is not None:
                took = request.scheduled_at - request.arrival + own
                self._ratios.append((request.scheduled_at, took / expected))
            elif not request.finished:
                break
            self._expected.popleft()
        while self._ratios and self._ratios[0][0] < now - LATELY:
            self._ratios.popleft()
        ordered = sorted(ratio for _, ratio in self._ratios)
        return max(1.0 / SAFETY, ordered[int(LATE * len(ordered))] if ordered else 0.0)

    def predict(self, request: Request, now: float) -> tuple[float, float]:
        """Seconds until the request's first token as things stand, without the training that would give way,
        and what they would be on an idle device; zeros while the latency model can't tell."""
        scheduler = self.scheduler
        model = scheduler.model
        if not model.trained:
            return 0.0, 0.0
        ahead = scheduler.ahead_of(request)
        request.num_expected_cached = scheduler.prefixes.cached_tokens(request)
        own = request.forward_owed - request.num_expected_cached
        owed = own + sum(r.forward_owed for r in scheduler.running if r.forward_owed > 1)
        owed += sum(r.forward_owed - r.num_expected_cached for r in ahead)
        rows = [r for r in scheduler.running if r.forward_owed <= 1]
        context = sum(r.num_tokens for r in rows)
        most = min(scheduler.limits.max_num_batched_tokens, model.most_to_try)
        part = max(1, min(most - len(rows), scheduler.prompt_tokens(len(rows), context, now)))
        parts, rest = divmod(owed, part)
        total = parts * model.predict_inference(len(rows) + part, context + part)
        total += model.predict_inference(len(rows) + rest, context + rest) if rest else 0.0
        idle_steps = self._slot_steps(len(ahead)) - parts
        if idle_steps > 0.0:
            total += idle_steps * model.predict_inference(len(rows), context)
        steps, rest = divmod(own, most)
        alone = steps * model.predict_inference(most, own)
        return total * self._stretch, (alone + model.predict_inference(rest, own)) * self._stretch

    def least_targets(self) -> LatencyTargets | None:
        """The targets that one request alone on the device could be held to; None while nobody knows."""
        scheduler = self.scheduler
        if scheduler.model.observations < KNOWN_AFTER:
            return None
        first = scheduler.model.predict_inference(LEAST_PROMPT_TOKENS, LEAST_PROMPT_TOKENS)
        return LatencyTargets(
            ttft=first / SAFETY, tpot=scheduler.model.predict_inference(1, LEAST_PROMPT_TOKENS) / SAFETY
        )

    def _check_queue(self, now: float) -> None:
        scheduler = self.scheduler
        slots = scheduler.limits.max_num_seqs - len(scheduler.running)
        queued = len(scheduler.waiting) - (0 if scheduler.left_waiting else slots)
        if queued >= self.max_queued:
            rows, context = len(scheduler.running), sum(r.num_tokens for r in scheduler.running)
            step = scheduler.model.predict_inference(rows, context)
            raise QueueFull(
                f"{queued} requests wait already, and --max-num-queued-reqs is {self.max_queued}.",
                retry_after=self._turn(self._slot_steps(0) * step, 0.0, now),
            )

    def _slot_steps(self, ahead: int) -> float:
        """Steps until a slot is free for one that has `ahead` before it: requests end at the rate at which
        those that ended lately did."""
        scheduler = self.scheduler
        places = len(scheduler.running) if scheduler.out_of_memory else scheduler.limits.max_num_seqs
        missing = len(scheduler.running) + ahead + 1 - places
        if missing <= 0:
            return 0.0
        return missing * max(1.0, scheduler.outputs.mean) / max(1, len(scheduler.running))
