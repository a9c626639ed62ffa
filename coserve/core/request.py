"""A request: prompt tokens, then one token a step, until it stops."""

from __future__ import annotations

import enum

from coserve.core.sampling_params import SamplingParams
from coserve.core.sequence import Sequence
from coserve.core.slo import LatencyTargets


class RequestStatus(enum.Enum):
    """Where a request stands. PREEMPTED requests wait again and recompute."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class Request(Sequence):
    """One request. `adapter` is the digest of the adapter version it began on, None for the base.

    `token_ids` holds prompt and output. `block_table` lists the blocks that hold its K and V. `targets` are
    its latency class's where those aren't the server's own; `tenant` and `weight` say whose share it is
    served from, and how large that is. Only requests with the same `cache_salt` share cached prefixes.
    `awaits_grammar` keeps it waiting until its grammar is compiled; `end_ids` are the model's end tokens.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        *,
        adapter: str | None = None,
        priority: int = 0,
        targets: LatencyTargets | None = None,
        tenant: str = "",
        weight: float = 1.0,
        arrival: float = 0.0,
        cache_salt: str = "",
        eos_token_ids: tuple[int, ...] = (),
        max_model_len: int,
    ) -> None:
        super().__init__(request_id, adapter)
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.sampling = sampling
        self.priority = priority
        self.targets = targets
        self.tenant = tenant
        self.weight = weight
        self.arrival = arrival
        self.cache_salt = cache_salt
        self.status = RequestStatus.WAITING
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []
        self.num_cached_tokens = 0
        self.num_expected_cached = 0  # when it came, where anybody asked
        self.num_preemptions = 0
        self.scheduled_at: float | None = None
        self.pace_from: float | None = None  # its tokens are due from there on
        self.awaits_grammar = bool(sampling.grammar)
        self.end_ids = frozenset(eos_token_ids)
        self._stop_ids = frozenset(sampling.stop_token_ids) | (
            frozenset() if sampling.ignore_eos else self.end_ids
        )
        self._max_tokens = min(sampling.max_tokens, max_model_len - self.num_prompt_tokens)

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        return len(self.token_ids)

    @property
    def forward_owed(self) -> int:
        """Tokens whose K and V are still to be computed."""
        return len(self.token_ids) - self.cursor

    @property
    def num_output_tokens(self) -> int:
        """Sampled so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end the output: the model's end tokens (unless ignored) and the request's own."""
        return self._stop_ids

    @property
    def order(self) -> tuple[int, float, str]:
        """Who goes first: lower priority number, then earlier arrival."""
        return (self.priority, self.arrival, self.sequence_id)

    @property
    def finished(self) -> bool:
        """It has given its last token, or was aborted."""
        return self.status is RequestStatus.FINISHED

    def append(self, token_id: int) -> tuple[str, int | None] | None:
        """Take a sampled token; returns (finish_reason, stop_token_id) when it was the last one."""
        self.token_ids.append(token_id)
        output = len(self.token_ids) - self.num_prompt_tokens
        if token_id in self._stop_ids and output > self.sampling.min_tokens:
            return ("stop", token_id)
        if self.sampling.grammar and token_id in self.end_ids:
            return ("stop", token_id)  # a grammar lets an end token pass only where it is complete
        if output >= self._max_tokens:
            return ("length", None)
        return None

    @property
    def wants_no_tokens(self) -> bool:
        """Only its prompt is to be scored."""
        return self._max_tokens <= 0

    def preempt(self) -> None:
        """Forget the computed K and V; they are recomputed when the request runs again."""
        self.cursor = 0
        self.block_table = []
        self.status = RequestStatus.PREEMPTED
        self.num_preemptions += 1
