"""How long a step will take, learnt while it runs.

The forward of inference rows is a floor, a price per token that rises at the `KNEES` (few rows are hidden
behind the weights' way from memory, many are bound by arithmetic), and a price per key that is read; none is
negative. Training's calls are simpler: a floor (the weights are read once a call) and a price per token for
each kind, with the mean deviation as a guard. All times are seconds; the model has no clock of its own.

Where calls run beside the forward (a GPU) a step takes the larger of the forward's time and of all
arithmetic, the requests' own and training's. That of the batch's rows is learnt from such steps: what they
took less what the calls should take by themselves. The rest of the forward's time costs training nothing.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect
from collections import deque
from operator import mul

import msgspec

KNEES = (16, 64, 256)  # tokens of a step
STRATA = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
TOKEN_STEP = 8  # of a prompt's part
UNTRIED = 256  # tokens of a step while nothing is known of what one takes
KEEP = 0.95  # of a stratum's sums at each of its observations, so it follows a machine that drifts
SOLVE_EVERY, EARLY = 8, 64
RIDGE = 1e-6
GUARD_STEPS = 128
UNIT_KEEP, UNIT_RIDGE = 0.9, 0.01  # a width that is seldom seen may be of a busier time
GRACE, STALL = 8, 3.0  # after so many calls, one counts at most so many times what was expected
WASTE = 0.05  # of a narrow call's time per token beside a wide one's
FILLED = 0.95  # of a forward's time
WINDOW_RATE = 0.1  # of a step with windows, in what they are known to cost
# Forward windows apart from requests; a layer's backward goes by its policy.
UNIT_KINDS = ("apart", "score", "loss", "layer_a", "layer_b", "layer_c")


class FitState(msgspec.Struct, frozen=True):
    """A `StratifiedFit`, to be saved."""

    count: int
    strata: dict[int, list[list[float]]]


class UnitState(msgspec.Struct, frozen=True):
    """A `UnitCost`, to be saved."""

    count: int
    price: float
    deviation: float
    fit: FitState


class LatencyState(msgspec.Struct, frozen=True):
    """A `LatencyModel`, to be saved: a restarted server knows its costs from the first step."""

    inference: FitState
    units: dict[str, UnitState]
    errors: list[float]
    busy: FitState = FitState(0, {})
    windows: float = 1.0


class StratifiedFit:
    """Least squares of relative errors, y = w . x, that doesn't forget what it rarely sees.

    Observations are kept as decayed sums of w x x^T and w x y with w = 1 / scale^2, apart for each stratum
    (steps of a similar size): a thousand decoding steps leave what was learnt of prompts as it was. Weights
    are solved for by Cholesky's factorisation, every `SOLVE_EVERY` observations once there are enough. Where
    the scale is y itself a stall counts little, being an error relative to its own length.
    """

    def __init__(self, size: int, keep: float = KEEP, first_ridge: float = RIDGE) -> None:
        """`keep` is what a stratum keeps of its sums at each observation; `first_ridge` draws the first
        feature's weight to 0 where the others explain what was seen as well."""
        self.count = 0
        self._size, self._keep = size, keep
        self._ridge = [first_ridge] + [RIDGE] * (size - 1)
        self._strata: dict[int, list[list[float]]] = {}
        self._weights = [0.0] * size
        self._unsolved = 0

    def predict(self, x: list[float]) -> float:
        """The fitted value at features `x`, in the unit of the observations."""
        self._settle()
        found: float = sum(map(mul, self._weights, x))
        return found

    def weight(self, index: int) -> float:
        """The fitted weight of that feature; 0 while unknown."""
        self._settle()
        return self._weights[index]

    def _settle(self) -> None:
        """Solve for the weights where enough was seen since they were."""
        if self._unsolved and (self._unsolved >= SOLVE_EVERY or self.count <= EARLY):
            self._weights = self._solve()
            self._unsolved = 0

    @property
    def strata(self) -> int:
        """How many sizes were seen."""
        return len(self._strata)

    @property
    def largest(self) -> int:
        """The highest stratum that was seen; 0 before any."""
        return max(self._strata, default=0)

    @property
    def next_size(self) -> int:
        """The size above those of the highest stratum: no more than should show what twice as much costs."""
        return STRATA[self.largest] if self.largest < len(STRATA) else sys.maxsize

    def update(self, stratum: int, x: list[float], y: float, scale: float) -> None:
        """One observation: features `x`, measured `y` > 0; its error counts relative to `scale`."""
        size = self._size
        sums = self._strata.get(stratum)
        if sums is None:
            sums = self._strata[stratum] = [[0.0] * (i + 1) for i in range(size)] + [[0.0] * size]
        products, weight = sums[size], 1.0 / (scale * scale)
        for i in range(size):
            row, scaled = sums[i], x[i] * weight
            for j in range(i + 1):
                row[j] = row[j] * self._keep + scaled * x[j]
            products[i] = products[i] * self._keep + scaled * y
        self.count += 1
        self._unsolved += 1

    def state(self) -> FitState:
        """What it has learnt."""
        return FitState(self.count, self._strata)

    def restore(self, state: FitState) -> None:
        """Go on from a state. ValueError where it is of another size or holds no numbers."""
        rows = [*range(1, self._size + 1), self._size]
        for sums in state.strata.values():
            if [len(row) for row in sums] != rows:
                raise ValueError(f"expected sums of {self._size} features")
            if not all(math.isfinite(value) for row in sums for value in row):
                raise ValueError("a sum is not finite")
        self.count, self._strata, self._unsolved = state.count, dict(state.strata), SOLVE_EVERY

    def _solve(self) -> list[float]:
        """No weight is negative: features that would be are left out, worst first, until none is."""
        used = list(range(self._size))
        while True:
            found = self._cholesky(used)
            worst = min(range(len(used)), key=found.__getitem__)
            if found[worst] >= 0.0 or len(used) == 1:
                break
            del used[worst]
        weights = [0.0] * self._size
        for index, weight in zip(used, found, strict=True):
            weights[index] = weight
        return weights

    def _cholesky(self, used: list[int]) -> list[float]:
        size, strata = len(used), list(self._strata.values())
        factor: list[list[float]] = []
        found: list[float] = []
        for i in range(size):
            row = [sum(sums[used[i]][used[j]] for sums in strata) for j in range(i + 1)]
            row[i] += self._ridge[used[i]] * row[i] + 1e-9  # features that were never seen apart
            for j in range(i + 1):
                above = factor[j] if j < i else row
                row[j] -= sum(row[k] * above[k] for k in range(j))
                row[j] = row[j] / above[j] if j < i else max(row[j], 1e-30) ** 0.5
            factor.append(row)
            known = sum(sums[self._size][used[i]] for sums in strata)
            found.append((known - sum(row[k] * found[k] for k in range(i))) / row[i])
        for i in reversed(range(size)):
            found[i] = (found[i] - sum(factor[k][i] * found[k] for k in range(i + 1, size))) / factor[i][i]
        return found


class UnitCost:
    """Seconds of one kind of training's calls: a floor and a price per token, plus twice the mean deviation.

    While all calls were of one width nothing tells the two apart, and it is all price.
    """

    def __init__(self) -> None:
        self.deviation = 0.0  # relative to the prediction
        self.count = 0
        self._price = 0.0
        self._fit = StratifiedFit(2, UNIT_KEEP, UNIT_RIDGE)

    def update(self, seconds: float, tokens: int) -> None:
        """Take one measured call in."""
        rate = max(0.05, 1.0 / (self.count + 1))
        expected = self.mean(tokens)
        if expected > 0.0:
            if self.count >= GRACE:
                seconds = min(seconds, STALL * expected)
            self.deviation += rate * (abs(seconds / expected - 1.0) - self.deviation)
        self._price += rate * (seconds / tokens - self._price)
        self._fit.update(bisect(STRATA, tokens), [1.0, tokens / 64.0], seconds, tokens / 64.0)
        self.count += 1

    def state(self) -> UnitState:
        """What it has learnt."""
        return UnitState(self.count, self._price, self.deviation, self._fit.state())

    def restore(self, state: UnitState) -> None:
        """Go on from a state; ValueError as of `StratifiedFit.restore`."""
        if not (math.isfinite(state.price) and math.isfinite(state.deviation)):
            raise ValueError("a cost is not finite")
        self._fit.restore(state.fit)
        self.count, self._price, self.deviation = state.count, state.price, state.deviation

    def mean(self, tokens: int) -> float:
        """Seconds that a call of so many tokens takes on average; 0 while unknown."""
        if self._fit.strata < 2:
            return self._price * tokens
        return self._fit.predict([1.0, tokens / 64.0])

    def predict(self, tokens: int) -> float:
        """Seconds that a call of so many tokens should not exceed: the mean and two deviations."""
        return self.mean(tokens) * (1.0 + 2.0 * self.deviation)

    def tokens_within(self, seconds: float) -> int:
        """How many tokens a call of so many seconds has, at most twice the widest yet; 0 while unknown."""
        floor = self.predict(0)
        price = (self.predict(1024) - floor) / 1024
        if price == 0.0:
            return min(1024, self._fit.next_size) if self.count and seconds >= floor else 0
        return max(0, min(int((seconds - floor) / price), self._fit.next_size))

    def knows(self, tokens: int) -> bool:
        """A call of about so many tokens, or of more, was measured."""
        return bool(self.count) and bisect(STRATA, tokens) <= self._fit.largest

    def unhurried_tokens(self, seconds: float, widest: int) -> int:
        """How many tokens a call has that should take `seconds` on average, up to the `widest`, but no fewer
        than waste `WASTE` beside that one; the widest while nothing is known."""
        floor = self.mean(0)
        price = (self.mean(1024) - floor) / 1024
        wasted = WASTE * price + (1.0 + WASTE) * floor / widest
        if wasted == 0.0 or floor + price * widest <= seconds:
            return widest
        within = (seconds - floor) / price if price > 0.0 else 0.0
        return min(widest, math.ceil(max(within, floor / wasted)))


class LatencyModel:
    """Predicts a step's inference forward and the cost of training's calls. `overlaps`: the device runs calls
    beside a forward."""

    def __init__(self, overlaps: bool = False) -> None:
        self.overlaps = overlaps
        self._inference = StratifiedFit(3 + len(KNEES))
        self._busy = StratifiedFit(2, UNIT_KEEP, UNIT_RIDGE)
        self._widest_batch = 0  # rows, with training's
        self._units = {kind: UnitCost() for kind in UNIT_KINDS}
        self._errors: deque[float] = deque(maxlen=GUARD_STEPS)
        self._windows = 1.0  # of a step's time by its rows, what it takes where some are training's

    def state(self) -> LatencyState:
        """What it has learnt."""
        units = {kind: cost.state() for kind, cost in self._units.items() if cost.count}
        shared = self._busy.state(), self._windows
        return LatencyState(self._inference.state(), units, list(self._errors), *shared)

    def restore(self, state: LatencyState) -> None:
        """Go on from a state. ValueError where it is another version's; the model is as new then."""
        fresh = LatencyModel()
        try:
            fresh._inference.restore(state.inference)
            fresh._busy.restore(state.busy)
            for kind, unit in state.units.items():
                fresh._units[kind].restore(unit)
        except KeyError as error:
            raise ValueError(f"there is no kind of call named {error}") from None
        self._inference, self._units, self._busy = fresh._inference, fresh._units, fresh._busy
        self._errors.extend(state.errors)
        self._windows = state.windows

    @property
    def observations(self) -> int:
        """Steps with inference that it has learnt from, here or before a restart."""
        return self._inference.count

    @property
    def trained(self) -> bool:
        """Enough steps were seen for predictions to mean something."""
        return self._inference.count >= 8

    @property
    def most_to_try(self) -> int:
        """Tokens of a step whose time may be known: twice the widest that was measured. The first ones have
        few, on a machine that may be slower than any."""
        return max(UNTRIED, self._inference.next_size) if self.trained else UNTRIED

    def predict_inference(self, tokens: int, context_tokens: int) -> float:
        """Seconds of a step with this much inference and no training; 0 while unknown."""
        if tokens == 0 or not self.trained:
            return 0.0
        return max(1e-6, self._inference.predict(_features(tokens, context_tokens)))

    def tokens_within(self, seconds: float, tokens: int, context_tokens: int) -> int:
        """How many more tokens a step of `tokens` and `context_tokens` takes within `seconds` in all; 0 where
        it takes as long already. A multiple of `TOKEN_STEP`."""
        least, beyond = 0, STRATA[-1] // TOKEN_STEP + 1
        while beyond - least > 1:
            middle = (least + beyond) // 2
            more = middle * TOKEN_STEP
            if self.predict_inference(tokens + more, context_tokens + more) > seconds:
                beyond = middle
            else:
                least = middle
        return least * TOKEN_STEP

    @property
    def guard(self) -> float:
        """How far, as a ratio, steps have lately exceeded their prediction (99th percentile)."""
        if not self._errors:
            return 0.0
        ordered = sorted(self._errors)
        return max(0.0, ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))])

    def predict_unit(self, kind: str, tokens: int) -> float:
        """Seconds of a call of one of the `UNIT_KINDS`; 0 while unknown."""
        return self._units[kind].predict(tokens)

    def mean_unit(self, kind: str, tokens: int) -> float:
        """The same without the guard for its deviations."""
        return self._units[kind].mean(tokens)

    def knows_unit(self, kind: str, tokens: int) -> bool:
        """Calls of that kind as wide as this were measured by themselves."""
        return self._units[kind].knows(tokens)

    def idle_seconds(self, tokens: int, context_tokens: int) -> float:
        """Of a step with this much inference, the seconds in which training costs nothing: its rows wait for
        memory, and the arithmetic for them. 0 where nothing has shown it."""
        if not self._busy.count:
            return 0.0
        busy = max(0.0, self._busy.predict(_busy_features(tokens)))
        return max(0.0, self.predict_inference(tokens, context_tokens) - busy)

    def window_seconds(self, rows: int, tokens: int, context_tokens: int) -> float:
        """Seconds by which `rows` of training lengthen a batch of requests with `tokens` that look at
        `context_tokens`: little while the weights' way from memory takes longer than the arithmetic. On a
        device that runs calls beside a forward, the seconds of their arithmetic. 0 while unknown."""
        if self.overlaps:
            return self._busy.weight(0) * rows / 64.0
        alone = self.predict_inference(tokens, context_tokens)
        return max(0.0, self._windows * self.predict_inference(tokens + rows, context_tokens + rows) - alone)

    def window_rows_within(self, seconds: float, tokens: int, context_tokens: int) -> int:
        """How many rows of training take no more than `seconds` so."""
        if not self.overlaps:
            whole = self.predict_inference(tokens, context_tokens) + seconds
            return self.tokens_within(whole / self._windows, tokens, context_tokens)
        price = self._busy.weight(0) / 64.0
        most = 2 * self._widest_batch
        return min(most, int(seconds / price)) if price > 0.0 else most

    def unit_tokens_within(self, kind: str, seconds: float) -> int:
        """How many tokens a call of that kind has in so many seconds; 0 while unknown."""
        return self._units[kind].tokens_within(seconds)

    def unhurried_unit_tokens(self, kind: str, seconds: float, widest: int) -> int:
        """How many tokens a call of that kind has while nobody waits; see `UnitCost`."""
        return self._units[kind].unhurried_tokens(seconds, widest)

    def observe_step(
        self, tokens: int, context_tokens: int, windows: int, beside: float, seconds: float
    ) -> float:
        """A step of requests took `seconds` for its forward, which had `windows` rows of training, and for
        the calls beside it, which should take `beside` by themselves. Returns the windows' seconds of work.

        Where memory concealed all arithmetic, the step only says how much that was at most; where it should
        not have, less is believed from step to step, until the next ones show it.
        """
        if not windows and not beside:
            self.observe_inference(tokens, context_tokens, seconds)
            return 0.0
        alone = self.predict_inference(tokens, context_tokens)
        if not self.overlaps:
            expected = self.predict_inference(tokens + windows, context_tokens + windows)
            if expected > 0.0:
                ratio = min(max(seconds / expected, 1.0 / STALL), STALL)
                self._windows += WINDOW_RATE * (ratio - self._windows)
            return max(1e-6, seconds - alone)
        features, arithmetic = _busy_features(tokens + windows), max(0.0, seconds - beside)
        expected = self._busy.predict(features)
        is_shown = seconds > alone * (1.0 + self.guard) or not self._busy.count
        if is_shown or expected + beside > FILLED * alone:
            if not is_shown:
                arithmetic = FILLED * min(arithmetic, expected)
            self._busy.update(int(windows > 0), features, arithmetic, max(alone, 1e-6))
            self._widest_batch = max(self._widest_batch, tokens + windows)
        return self.window_seconds(windows, tokens, context_tokens)

    def observe_inference(self, tokens: int, context_tokens: int, seconds: float) -> None:
        """A step without training took `seconds` for its forward."""
        if tokens == 0:
            return
        predicted = self.predict_inference(tokens, context_tokens)
        if predicted > 0.0:
            self._errors.append(seconds / predicted - 1.0)
        seconds = max(seconds, 1e-6)
        self._inference.update(bisect(STRATA, tokens), _features(tokens, context_tokens), seconds, seconds)

    def observe_unit(self, kind: str, tokens: int, seconds: float) -> None:
        """A call of `kind` with `tokens` took `seconds`."""
        if tokens > 0:
            self._units[kind].update(seconds, tokens)


def _features(tokens: int, context_tokens: int) -> list[float]:
    above = [max(0, tokens - knee) / 64.0 for knee in KNEES]
    return [1.0, tokens / 64.0, *above, context_tokens / 4096.0]


def _busy_features(rows: int) -> list[float]:
    """Attention has little arithmetic beside the products. While all steps were alike rows cost nothing."""
    return [rows / 64.0, 1.0]
