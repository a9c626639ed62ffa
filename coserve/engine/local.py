"""An engine in this process, without a server: for tests, benches and notebooks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from coserve.config import EngineConfig
from coserve.core.sampling_params import SamplingParams
from coserve.engine import messages as m
from coserve.engine.engine import Engine
from coserve.engine.process import LOADING_POLL_MS

Kind = TypeVar("Kind", bound=m.Message)


class LocalEngine:
    """An engine and what it has sent. The caller makes the steps."""

    def __init__(self, config: EngineConfig) -> None:
        self.sent: list[m.Message] = []
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[m.TokenLogprobs]] = {}
        self.finished: dict[str, m.RequestOutput] = {}
        self.engine = Engine(config, send=self._receive, arrivals=lambda: False)
        self._calls = 0

    def _receive(self, message: m.Message) -> None:
        if isinstance(message, m.StepOutputs):
            for output in message.outputs:
                self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
                self.logprobs.setdefault(output.request_id, []).extend(output.logprobs)
                if output.finish_reason is not None:
                    self.finished[output.request_id] = output
        elif not isinstance(message, m.EngineStats):
            self.sent.append(message)

    def take(self, kind: type[Kind]) -> list[Kind]:
        """Messages of one kind that were sent since they were last taken."""
        found = [message for message in self.sent if isinstance(message, kind)]
        self.sent = [message for message in self.sent if not isinstance(message, kind)]
        return found

    def add(
        self,
        request_id: str,
        prompt: list[int],
        sampling: SamplingParams,
        adapter: m.AdapterRef | None = None,
        priority: int = 0,
        live_job: str = "",
    ) -> None:
        """Queue a request; its tokens appear in `tokens`, its last output in `finished`."""
        self.engine.handle(
            m.AddRequest(
                request_id=request_id,
                prompt_token_ids=prompt,
                sampling=sampling,
                adapter=adapter,
                live_job=live_job,
                priority=priority,
                arrival=time.time(),
            )
        )

    def step(self) -> None:
        """One step; while nothing but loads are under way, what the process would wait for them."""
        if self.engine.is_loading and not self.engine.has_work:
            time.sleep(LOADING_POLL_MS / 1e3)
        self.engine.step()

    def call(self, make: Callable[[int], m.Message], most_steps: int = 10_000) -> m.Reply:
        """Send a call and step until its reply."""
        self._calls += 1
        self.engine.handle(make(self._calls))
        for _ in range(most_steps):
            for reply in self.take(m.Reply):
                if reply.call_id == self._calls:
                    return reply
            self.step()
        raise TimeoutError(f"no reply after {most_steps} steps")

    def run_until(self, done: Callable[[], bool], most_steps: int = 1_000_000) -> float:
        """Step until `done`; returns the seconds it took. Raises TimeoutError after `most_steps`."""
        began = time.perf_counter()
        for _ in range(most_steps):
            if done():
                return time.perf_counter() - began
            self.step()
        raise TimeoutError(f"not done after {most_steps} steps")

    def generate(
        self, prompt: list[int], sampling: SamplingParams, adapter: m.AdapterRef | None = None
    ) -> list[int]:
        """One request alone, to its end."""
        request_id = f"local-{len(self.finished)}-{len(self.tokens)}"
        self.add(request_id, prompt, sampling, adapter)
        self.run_until(lambda: request_id in self.finished)
        return self.tokens.get(request_id, [])
