"""The client process of a replay: sends completions when they are due and notes when each chunk came.

It reads a plan (one line of JSON), says "ready", reads the moment to begin (`time.perf_counter`, which all
processes of a machine share), and writes a record for each request sent. An open loop gives every arrival a
thread when it is due, whatever became of those before; a closed loop keeps `concurrency` of them in flight.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import sys
import time
from itertools import count
from threading import Thread
from typing import Any

from http_load import chunk_times, completion, random_prompt, request_body


class Session:
    """The requests of one replay; `records` grows as they are sent."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan
        draw, vocab = random.Random(plan["seed"]), plan["vocab"]
        self._prompts = [random_prompt(draw, prompt, vocab) for _, prompt, _ in plan["arrivals"]]
        self.records: list[dict[str, Any]] = []
        self._next = count()

    def run(self, began: float) -> None:
        """Send what is due; returns when all is answered or the plan's time is over."""
        plan, threads = self._plan, []
        deadline = began + plan["seconds"] + plan["drain"]
        if plan["concurrency"]:
            stop = began + plan["seconds"]
            threads = [
                Thread(target=self._loop, args=(began, stop), daemon=True) for _ in range(plan["concurrency"])
            ]
            for thread in threads:
                thread.start()
        else:
            for index, (due, _, _) in enumerate(plan["arrivals"]):
                time.sleep(max(0.0, began + due - time.perf_counter()))
                threads.append(Thread(target=self._send, args=(began, index, due), daemon=True))
                threads[-1].start()
        for thread in threads:
            thread.join(max(0.0, deadline - time.perf_counter()))

    def _loop(self, began: float, stop: float) -> None:
        time.sleep(max(0.0, began - time.perf_counter()))
        while (now := time.perf_counter()) < stop:
            self._send(began, next(self._next) % len(self._prompts), now - began)

    def _send(self, began: float, index: int, due: float) -> None:
        output = self._plan["arrivals"][index][2]
        chunks: list[float] = []
        record = {
            "due": due,
            "sent": time.perf_counter() - began,
            "output_tokens": output,
            "chunks": chunks,
            "done": False,
            "error": "",
        }
        self.records.append(record)
        body = request_body(self._plan["model"], self._prompts[index], output, stream=True)
        try:
            with completion(self._plan["port"], body) as response:
                for moment in chunk_times(response):
                    chunks.append(moment - began)
            record["done"] = bool(chunks)
        except (OSError, RuntimeError, http.client.HTTPException, ValueError, KeyError) as error:
            record["error"] = f"{type(error).__name__}: {error}"[:200]


def main() -> None:
    """The process itself. Streams still open at the end are dropped with it."""
    session = Session(json.loads(sys.stdin.readline()))
    print("ready", flush=True)
    session.run(float(sys.stdin.readline()))
    records = [record | {"chunks": list(record["chunks"])} for record in session.records]
    print(json.dumps(records), flush=True)
    os._exit(0)
