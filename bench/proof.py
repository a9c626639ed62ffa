"""The sections of bench/coserve.py and what they share: rows, saturation, and points of one replay each."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import frontier
import traces
from arrangements import (
    ARRANGEMENTS,
    Arrangement,
    coserve_job,
    coserve_server,
    measure,
    peft_script,
    settle,
    vllm_server,
)
from replay import Traffic, goodput, replay, tokens_between
from servers import MODEL, Server
from traces import Arrival
from trainers import CoserveJob, Trainer, rate_of_whole_steps

from coserve.core.slo import AUTO_FLOOR, AUTO_RATIO

SEED, PROMPT_CAP, OUTPUT_CAP = 0, 128, 64
HALF, LOADS, PEER_LOADS = 0.5, (0.25, 0.5, 0.75, 0.95), (0.25, 0.75)  # the peers' beside half
TARGETS_MS = {0.0: LOADS, 65.0: LOADS[:3], 100.0: LOADS[:3], 140.0: LOADS}  # 0: automatic
TOKENS = 512  # of an optimizer step
STREAMS, RAMP = 32, 10.0  # of the closed loop: at a time, and the seconds that are not counted
SATURATING_REQUESTS = 600
LONE = [Arrival(2.0 * index, PROMPT_CAP, 4) for index in range(12)]  # each finds a server without requests
BUDGET = 57 * 60.0  # seconds; nothing begins later
AT_PEERS, AT_HALF = "the best two processes' TPOT p50", "half of the best two processes' TPOT p50"
Row = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    seconds: float = 60.0  # of a point
    alone: float = 20.0  # of training alone
    saturating: float = 45.0
    lone: int = len(LONE)
    targets: tuple[float, ...] = tuple(TARGETS_MS)
    loads: tuple[float, ...] = LOADS
    arrangements: tuple[Arrangement, ...] = ARRANGEMENTS


QUICK = Scale(6.0, 2.0, 12.0, 3, (0.0, 100.0), (HALF,), (ARRANGEMENTS[0], ARRANGEMENTS[-1]))


class Proof:
    """The measurements of one run; `rows` grows as they are made."""

    def __init__(self, model: Path, vocab: int, trace: str, scale: Scale) -> None:
        self.model, self.vocab, self.trace, self.scale = model, vocab, trace, scale
        arrivals = traces.load(trace, 3600.0, SEED, PROMPT_CAP, OUTPUT_CAP)
        self.arrivals = traces.capped(arrivals, PROMPT_CAP, OUTPUT_CAP)
        self.rows: list[Row] = []
        self.request_rate = 0.0  # requests/s of our saturation, which loads are parts of
        self._began = time.perf_counter()

    def run(self, *, with_peer: bool) -> str | None:
        """All sections; the name of the best two-process arrangement."""
        self.attempt("coserve, the automatic target", self.alone_and_automatic)
        if not self.request_rate:
            return None
        best: str | None = self.attempt("two processes", self.two_processes) if with_peer else None
        if best:
            self.against(best)
        for target in self.scale.targets[1:]:
            loads = tuple(load for load in TARGETS_MS[target] if load in self.scale.loads)
            self.attempt(f"target {target:.0f} ms", self.with_target, target, loads)
        return best

    # ------------------------------------------------------------------ rows

    def attempt(self, what: str, measurement: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """What it returns; None, and a row that says why, where it fails or no time is left."""
        try:
            if time.perf_counter() > self._began + BUDGET:
                raise TimeoutError("no time is left for it")
            return measurement(*arguments, **named)
        except Exception as error:  # one arrangement that fails must not take the others' figures along
            self.add({"what": what, "failed": f"{type(error).__name__}: {error}"[:2000]})
            return None

    def add(self, row: Row) -> Row:
        """Keep a row and show it."""
        self.rows.append(row)
        shown = " ".join(f"{key}={round(v, 3) if isinstance(v, float) else v}" for key, v in row.items())
        print(f"[{time.perf_counter() - self._began:.0f} s] {shown}", file=sys.stderr, flush=True)
        return row

    def find(self, **fields: Any) -> Row | None:
        """The first row with these values."""
        return next((r for r in self.rows if all(r.get(k) == v for k, v in fields.items())), None)

    def load(self) -> Row:
        """The headline's load."""
        return {
            "trace": self.trace,
            "of_saturation": HALF,
            "requests_per_second": HALF * self.request_rate,
            "prompt_tokens": mean(arrival.prompt_tokens for arrival in self.arrivals),
            "output_tokens": mean(arrival.output_tokens for arrival in self.arrivals),
            "seconds": self.scale.seconds,
        }

    def complete(self) -> None:
        """Add eta, U and rho to the rows with training; training alone is the median over the run for ours,
        the better allocator's for the peer."""
        alone: dict[str, float] = {}
        for server, pick in (("coserve", median), ("vllm", max)):
            rates = [
                row["trained_tokens_per_second"]
                for row in self.rows
                if row.get("arrangement") == "training alone" and row["server"] == server
            ]
            alone |= {server: pick(rates)} if rates else {}
        for row in self.rows:
            server = row.get("server", "")
            saturated = self.find(arrangement="saturated", server=server)
            beside = "load" in row and row["arrangement"] != "serving alone"
            if beside and saturated and server in alone:
                serving = self.find(arrangement="serving alone", server=server, load=row["load"])
                rate = saturated["generated_tokens_per_second"]
                row |= frontier.shares(row, alone[server], rate, serving)

    # ------------------------------------------------------------------ measurements

    def traffic(self, load: float) -> Traffic:
        """The trace at a part of saturation, the same for every server."""
        rate = load * self.request_rate
        shaped = traces.sampled(self.arrivals, rate, self.scale.seconds, self.request_rate, SEED)
        return Traffic(shaped, self.scale.seconds, seed=SEED)

    def saturation(self, name: str, server: Server) -> float:
        """Requests/s of a closed loop over the trace's lengths."""
        seconds, some = self.scale.saturating, self.arrivals[:SATURATING_REQUESTS]
        traffic = Traffic(some, seconds, concurrency=STREAMS, seed=SEED)
        ramp = min(RAMP, seconds / 3)
        answers = replay(server.port, MODEL, self.vocab, traffic)
        tokens = tokens_between(answers, ramp, seconds) / (seconds - ramp)
        if not tokens:
            raise RuntimeError(f"{name}: no token came in {seconds:.0f} s of {STREAMS} requests at a time")
        requests = tokens / mean(arrival.output_tokens for arrival in some)
        row = {"arrangement": "saturated", "server": name, "concurrency": STREAMS}
        self.add(row | {"generated_tokens_per_second": tokens, "requests_per_second": requests})
        return requests

    def point(
        self, server: Server, trainer: Trainer | None, load: float, target_ms: float | None, row: Row
    ) -> Row:
        """One replay; `target_ms` is what goodput is against, None where nobody set one."""
        answers, figures = measure(server, trainer, self.model, self.vocab, self.traffic(load))
        row = row | {"load": load, "target_ms": target_ms} | figures
        row["goodput"] = goodput(answers, target_ms / 1e3) if target_ms else None
        row["goodput_at_ms"] = {f"{t:.0f}": goodput(answers, t / 1e3) for t in TARGETS_MS if t}
        return self.add(row)

    def lone_requests(self, server: Server, beside: str) -> None:
        """TTFT of requests that find no other."""
        settle(server.port)
        lone = LONE[: self.scale.lone]
        traffic = Traffic(lone, lone[-1].time + 1.0, seed=SEED)
        answers = replay(server.port, MODEL, self.vocab, traffic)
        found = [answer.ttft * 1e3 for answer in answers if answer.ttft is not None]
        row = {"arrangement": "a lone request", "server": "coserve", "beside": beside, "requests": len(found)}
        self.add(row | {"ttft_ms_p50": median(found), "ttft_ms_most": max(found)})

    def train_alone(self, server: str, trainer: Trainer, how: str) -> None:
        """Training's rate while nobody asks anything."""
        rate = rate_of_whole_steps(trainer, self.scale.alone)
        row = {"arrangement": "training alone", "server": server, "trainer": how}
        self.add(row | {"trained_tokens_per_second": rate})

    # ------------------------------------------------------------------ coserve

    def alone_and_automatic(self) -> None:
        """One server: saturation, serving alone; then with a job training alone and the automatic target."""
        row = {"server": "coserve", "arrangement": "serving alone"}
        with coserve_server(self.model, self.vocab) as server:
            self.request_rate = self.saturation("coserve", server)
            for load in self.scale.loads:
                self.attempt(f"serving alone at {load}", self.point, server, None, load, None, row)
            self.attempt("a lone request", self.lone_requests, server, "nothing")
            job = coserve_job(server, self.vocab, TOKENS)
            self.train_alone("coserve", job, "automatic target")
            self.attempt("a lone request beside training", self.lone_requests, server, "training")
            for load in self.scale.loads:
                self.attempt(f"automatic target at {load}", self._automatic, server, job, load)

    def _automatic(self, server: Server, job: Trainer, load: float) -> None:
        """Goodput is against the automatic ratio times serving alone's TPOT p99."""
        alone = self.find(arrangement="serving alone", server="coserve", load=load)
        bound = max(AUTO_FLOOR * 1e3, alone["tpot_ms_p50_p99"][1] * AUTO_RATIO) if alone else None
        row = {"server": "coserve", "arrangement": "coserve", "target": "auto"}
        self.point(server, job, load, bound, row)

    @contextmanager
    def _server_and_job(self, target_ms: float) -> Iterator[tuple[Server, CoserveJob]]:
        with coserve_server(self.model, self.vocab, target_ms) as server:
            yield server, coserve_job(server, self.vocab, TOKENS)

    def with_target(self, target_ms: float, loads: tuple[float, ...]) -> None:
        """A server with that target and a job, alone and at these loads."""
        row = {"server": "coserve", "arrangement": "coserve", "target": f"{target_ms:.0f} ms"}
        with self._server_and_job(target_ms) as (server, job):
            self.train_alone("coserve", job, f"target {target_ms:.0f} ms")
            for load in loads:
                what = f"target {target_ms:.0f} ms at {load}"
                self.attempt(what, self.point, server, job, load, target_ms, row)

    def against(self, best: str) -> None:
        """Our server with the best two processes' TPOT p50 as its target, and half of it, at each load."""
        for load in self.scale.loads:
            peer = self.find(arrangement=best, load=load)
            if peer and peer["tpot_ms_p50_p99"][0]:
                for name, part in ((AT_PEERS, 1.0), (AT_HALF, 0.5)):
                    target = round(peer["tpot_ms_p50_p99"][0] * part, 1)
                    self.attempt(f"{name} at {load}", self._beside, name, target, load, best)

    def _beside(self, name: str, target_ms: float, load: float, best: str) -> None:
        """One load at one target, and its figures over those of the two-process arrangements there."""
        row = {"server": "coserve", "arrangement": "coserve", "target": name}
        with self._server_and_job(target_ms) as (server, job):
            ours = self.point(server, job, load, target_ms, row)
        for peer in (best, str(ARRANGEMENTS[0])):
            if theirs := self.find(arrangement=peer, load=load):
                ratios = frontier.against(ours, theirs)
                self.add(
                    {"what": "coserve / two processes", "at": load, "target": name, "peer": peer} | ratios
                )

    # ------------------------------------------------------------------ two processes

    def two_processes(self) -> str | None:
        """Every arrangement at half load, the best at the other loads; its name."""
        for how in ARRANGEMENTS[:2]:
            self.attempt(f"PEFT alone, {how}", self._peft_alone, how)
        rows: list[Row] = []
        self.attempt("two processes on all cores", self._share, rows)
        self.attempt("two processes, half of the cores each", self._apart, rows)
        best = self._best(rows)
        if best and not best.apart and self._other_loads():
            self.attempt(f"{best} at other loads", self._again, best)
        return str(best) if best else None

    def _share(self, rows: list[Row]) -> None:
        with vllm_server(self.model, self.vocab, apart=False) as server:
            self.saturation("vllm", server)
            row = {"server": "vllm", "arrangement": "serving alone"}
            self.point(server, None, HALF, None, row)
            self._candidates(server, rows, apart=False)

    def _apart(self, rows: list[Row]) -> None:
        with vllm_server(self.model, self.vocab, apart=True) as server:
            self._candidates(server, rows, apart=True)
            best = self._best(rows)
            if best and best.apart:
                for load in self._other_loads():
                    self._beside_peft(server, best, load)

    def _again(self, best: Arrangement) -> None:
        with vllm_server(self.model, self.vocab, apart=False) as server:
            for load in self._other_loads():
                self._beside_peft(server, best, load)

    def _candidates(self, server: Server, rows: list[Row], *, apart: bool) -> None:
        for how in self.scale.arrangements:
            if how.apart == apart and (row := self._beside_peft(server, how, HALF)):
                rows.append(row)

    def _other_loads(self) -> list[float]:
        return [load for load in PEER_LOADS if load in self.scale.loads]

    def _best(self, rows: list[Row]) -> Arrangement | None:
        alone = self.find(arrangement="serving alone", server="vllm", load=HALF)
        if not rows or alone is None:
            return None
        name = frontier.best_arrangement(rows, alone["tpot_ms_p50_p99"][0])["arrangement"]
        return next(how for how in ARRANGEMENTS if str(how) == name)

    def _peft_alone(self, how: Arrangement) -> None:
        with peft_script(self.model, self.vocab, TOKENS, how) as script:
            self.train_alone("vllm", script, f"PEFT, {'tuned' if how.tuned else 'default'} allocator")

    def _beside_peft(self, server: Server, how: Arrangement, load: float) -> Row | None:
        def beside() -> Row:
            with peft_script(self.model, self.vocab, TOKENS, how) as script:
                return self.point(server, script, load, None, {"server": "vllm", "arrangement": str(how)})

        found: Row | None = self.attempt(f"{how} at {load}", beside)
        return found
