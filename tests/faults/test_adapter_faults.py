"""Adapters on all tiers under load, while versions are swapped, names go and the engine is killed: every
answer is its own adapter's, and the only error is one that may be retried."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import httpx

from tests.server.fake_engine import write_peft

from .served import Served

NAMES = [f"a{number}" for number in range(8)]
WORKERS, SWAPS = 4, 14


def ask(http: httpx.Client, model: str) -> httpx.Response:
    body = {"model": model, "prompt": "Who are you?", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    return http.post("/v1/completions", json=body)


def load(served: Served, name: str, path: Path, **more: object) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(path), **more}
    return served.http.post("/v1/load_lora_adapter", json=body)


def test_every_answer_is_its_adapter_s_whatever_happens_meanwhile(tmp_path: Path) -> None:
    sources = {name: write_peft(tmp_path / "in" / name, seed=n) for n, name in enumerate(NAMES, 1)}
    flags = ("--adapter-root", str(tmp_path / "in"), "--max-loras", "2", "--max-cpu-loras", "3")
    with Served(tmp_path / "state", *flags, "--max-lora-rank", "4") as served:
        expected: dict[str, str] = {}  # by the weights that answer
        for name, source in sources.items():
            assert load(served, name, source).status_code == 200
            answer = ask(served.http, name).json()
            expected[answer["system_fingerprint"]] = answer["choices"][0]["text"]
        own = {name: ask(served.http, name).json()["system_fingerprint"] for name in NAMES}
        assert len(set(expected.values())) == len(expected) == len(NAMES), "each answers in its own way"
        assert load(served, "moving", sources["a0"]).status_code == 200
        over, wrong, answered = threading.Event(), [], []

        def worker(seed: int) -> None:
            draw = random.Random(seed)
            with httpx.Client(base_url=served.url, timeout=60.0) as http:
                while not over.is_set():
                    name = draw.choice([*NAMES, "moving", "moving"])
                    answer = ask(http, name)
                    if answer.status_code == 503:
                        continue
                    if answer.status_code != 200:
                        wrong.append(answer.text)
                        continue
                    body = answer.json()
                    weights = body["system_fingerprint"]
                    if expected[weights] != body["choices"][0]["text"] or own.get(name, weights) != weights:
                        wrong.append(f"{name}: {body}")
                    answered.append(name)

        threads = [threading.Thread(target=worker, args=(seed,)) for seed in range(WORKERS)]
        for thread in threads:
            thread.start()
        try:
            swapped = 0
            for swap in range(SWAPS):
                if swap == SWAPS // 2:
                    served.kill_engine()
                    served.wait(lambda: ask(served.http, "a1").status_code == 200)
                answer = load(served, "moving", sources[NAMES[swap % len(NAMES)]], load_inplace=True)
                assert answer.status_code in (200, 503), answer.text
                swapped += answer.status_code == 200
        finally:
            over.set()
            for thread in threads:
                thread.join(60)
        assert not wrong, wrong[:3]
        assert swapped >= SWAPS - 2 and len(answered) > SWAPS
        assert ask(served.http, "moving").json()["system_fingerprint"] == own[NAMES[(SWAPS - 1) % len(NAMES)]]
        for name in NAMES:
            assert served.http.delete(f"/v1/models/{name}").status_code == 200
            assert ask(served.http, name).status_code == 404
        assert ask(served.http, "moving").status_code == 200
        served.wait(lambda: [path.name for path in (tmp_path / "state" / "adapters").iterdir()] == ["moving"])
