"""How long a step will take, learnt while it runs.

The forward of inference rows is a floor, a price per token that rises at the `KNEES` (few rows are hidden
behind the weights' way from memory, many are bound by arithmetic), and a price per key that is read; none is
negative. Training units are simpler: one cost per token for each kind, as a moving mean with its mean
deviation as a guard. All times are seconds; the model has no clock of its own.
"""

from __future__ import annotations

from bisect import bisect
from collections import deque

KNEES = (16, 64, 256)  # tokens of a step
STRATA = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
TOKEN_STEP = 8  # of a prompt's part
KEEP = 0.95  # of a stratum's sums at each of its observations, so it follows a machine that drifts
SOLVE_EVERY, EARLY = 8, 64
RIDGE = 1e-6
GUARD_STEPS = 128
# A layer's backward goes by its policy.
UNIT_KINDS = ("forward", "score", "loss", "layer_a", "layer_b", "layer_c")


class StratifiedFit:
    """Least squares of relative errors, y = w . x, that doesn't forget what it rarely sees.

    Observations are kept as decayed sums of w x x^T and w x y with w = 1 / y^2, apart for each stratum (steps
    of a similar size): a thousand decoding steps leave what was learnt of prompts as it was. The weights are
    solved for by Cholesky's factorisation, every `SOLVE_EVERY` observations once there are enough. A stall
    counts little, being an error relative to its own length.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self._size = size
        self._strata: dict[int, list[list[float]]] = {}
        self._weights = [0.0] * size
        self._unsolved = 0

    def predict(self, x: list[float]) -> float:
        """The fitted value at features `x`, in the unit of the observations."""
        if self._unsolved and (self._unsolved >= SOLVE_EVERY or self.count <= EARLY):
            self._weights = self._solve()
            self._unsolved = 0
        return sum(w * v for w, v in zip(self._weights, x, strict=True))

    def update(self, stratum: int, x: list[float], y: float) -> None:
        """One observation: features `x`, measured `y` > 0."""
        size = self._size
        sums = self._strata.get(stratum)
        if sums is None:
            sums = self._strata[stratum] = [[0.0] * (i + 1) for i in range(size)] + [[0.0] * size]
        products, weight = sums[size], 1.0 / (y * y)
        for i in range(size):
            row, scaled = sums[i], x[i] * weight
            for j in range(i + 1):
                row[j] = row[j] * KEEP + scaled * x[j]
            products[i] = products[i] * KEEP + scaled * y
        self.count += 1
        self._unsolved += 1

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
            row[i] += RIDGE * row[i] + 1e-9  # features that were never seen apart
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
    """Seconds per token of one kind of training work: moving mean plus twice its mean deviation."""

    def __init__(self) -> None:
        self.mean = 0.0
        self.deviation = 0.0
        self.count = 0

    def update(self, seconds: float, tokens: int) -> None:
        """Take one measured unit in."""
        value = seconds / tokens
        if self.count == 0:
            self.mean = value
        rate = max(0.05, 1.0 / (self.count + 1))
        self.deviation += rate * (abs(value - self.mean) - self.deviation)
        self.mean += rate * (value - self.mean)
        self.count += 1

    def predict(self, tokens: int) -> float:
        """Seconds that a unit of so many tokens should not exceed: the mean and two deviations."""
        return (self.mean + 2.0 * self.deviation) * tokens


class LatencyModel:
    """Predicts a step's inference forward and the cost of training units."""

    def __init__(self) -> None:
        self._inference = StratifiedFit(3 + len(KNEES))
        self._units = {kind: UnitCost() for kind in UNIT_KINDS}
        self._errors: deque[float] = deque(maxlen=GUARD_STEPS)

    @property
    def trained(self) -> bool:
        """Enough steps were seen for predictions to mean something."""
        return self._inference.count >= 8

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
        """Seconds of a training unit of one of the `UNIT_KINDS`; 0 while unknown."""
        return self._units[kind].predict(tokens)

    def observe_inference(self, tokens: int, context_tokens: int, seconds: float) -> None:
        """A step without training forward rows took `seconds` for its forward."""
        if tokens == 0:
            return
        predicted = self.predict_inference(tokens, context_tokens)
        if predicted > 0.0:
            self._errors.append(seconds / predicted - 1.0)
        self._inference.update(bisect(STRATA, tokens), _features(tokens, context_tokens), max(seconds, 1e-6))

    def observe_unit(self, kind: str, tokens: int, seconds: float) -> None:
        """A training unit of `kind` with `tokens` took `seconds`."""
        if tokens > 0:
            self._units[kind].update(seconds, tokens)


def _features(tokens: int, context_tokens: int) -> list[float]:
    above = [max(0, tokens - knee) / 64.0 for knee in KNEES]
    return [1.0, tokens / 64.0, *above, context_tokens / 4096.0]
