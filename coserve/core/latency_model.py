"""How long a step will take, learnt while it runs.

The forward of inference rows is fitted as floor + a * tokens + b * context by recursive least squares
with forgetting (Plackett 1950), so it follows a machine that drifts. Training units are simpler: one cost per
token for each kind, as a moving mean with its mean deviation as a guard. All times are seconds; the model has
no clock of its own.
"""

from __future__ import annotations

from collections import deque

FORGETTING = 0.99
GUARD_STEPS = 128
# A layer's backward goes by its policy.
UNIT_KINDS = ("forward", "score", "loss", "layer_a", "layer_b", "layer_c")


class RecursiveLeastSquares:
    """Linear fit of `size` coefficients, updated one observation at a time."""

    def __init__(self, size: int, forgetting: float = FORGETTING) -> None:
        self.weights = [0.0] * size
        self.count = 0
        self._forgetting = forgetting
        self._p = [[1e6 if i == j else 0.0 for j in range(size)] for i in range(size)]

    def predict(self, x: list[float]) -> float:
        """The fitted value at features `x`, in the unit of the observations."""
        return sum(w * v for w, v in zip(self.weights, x, strict=True))

    def update(self, x: list[float], y: float) -> None:
        """One observation: features `x`, measured `y`."""
        px = [sum(a * b for a, b in zip(row, x, strict=True)) for row in self._p]
        denominator = self._forgetting + sum(a * b for a, b in zip(x, px, strict=True))
        gain = [v / denominator for v in px]
        error = y - self.predict(x)
        self.weights = [w + g * error for w, g in zip(self.weights, gain, strict=True)]
        size = len(x)
        for i in range(size):
            for j in range(size):
                self._p[i][j] = (self._p[i][j] - gain[i] * px[j]) / self._forgetting
            # Forgetting blows up directions that are not observed; a bound keeps the filter stable.
            self._p[i][i] = min(self._p[i][i], 1e6)
        self.count += 1


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
        self._inference = RecursiveLeastSquares(3)
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
        return max(0.0, self._inference.predict([1.0, float(tokens), context_tokens / 1000.0]))

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
            # One stall (a page fault, a neighbour) must not bend the fit.
            seconds = min(seconds, 4.0 * predicted)
        self._inference.update([1.0, float(tokens), context_tokens / 1000.0], seconds)

    def observe_unit(self, kind: str, tokens: int, seconds: float) -> None:
        """A training unit of `kind` with `tokens` took `seconds`."""
        if tokens > 0:
            self._units[kind].update(seconds, tokens)
