"""How long answers are, learnt while they run.

Those that have ended are too short a sample: of requests that began together the short ones end first. So the
mean is all tokens that were made by all the ends there were, where those that run count as tokens without an
end; that is what a constant rate of ending makes most likely.
"""

from __future__ import annotations

LATELY = 24  # ends after which an earlier one counts by a third


class Outputs:
    """Tokens made, and requests that ended, each counting less with every end that follows."""

    def __init__(self) -> None:
        self.tokens = 0.0
        self._ends = 0.0

    def end(self) -> None:
        """A request has ended, or was aborted: its place is free."""
        keep = 1.0 - 1.0 / LATELY
        self.tokens *= keep
        self._ends = self._ends * keep + 1.0

    @property
    def mean(self) -> float:
        """Tokens of an answer; 0 before the first end."""
        return self.tokens / self._ends if self._ends else 0.0
