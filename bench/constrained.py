"""What constrained decoding costs: masks by the token, and steps of free requests beside constrained ones.

Masks: schemas, followed by outputs drawn at random from what is allowed, over the demo model's vocabulary and
any other (`--tokenizer DIR`); compiling too. Steps: the same free requests decode in one engine with free
neighbours and with constrained ones in turn. The headline is the step with constrained neighbours, its peer
that with free ones.
"""

from __future__ import annotations

import json
import random
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import common
import numpy as np

from coserve.config import DEMO_MODEL_DIR
from coserve.core.sampling_params import SamplingParams
from coserve.engine import messages as m
from coserve.engine.local import LocalEngine
from coserve.grammar import GrammarVocabulary
from coserve.server.application.structured_output import json_grammar
from coserve.tokenizer import Tokenizer

FREE, NEIGHBOURS, PROMPT, STEPS = 8, 4, 32, 40
MOST_TOKENS = 150
PEOPLE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "born": {"type": "string", "format": "date"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        "home": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[A-Z][a-z]{1,9}$"}]},
    },
    "required": ["name", "age", "born", "tags", "home"],
    "additionalProperties": False,
}


def schemas(functions: Path | None, count: int) -> list[dict[str, Any]]:
    """Those of functions in a file of lines {"function": [{"parameters": ...}]}, else a few of our own."""
    if functions is None:
        return [PEOPLE, {"type": "object"}, {"type": "array", "items": PEOPLE, "maxItems": 9}]
    named = {'"dict"': '"object"', '"float"': '"number"', '"tuple"': '"array"', '"any"': '"string"'}
    found = []
    for line in functions.read_text("utf-8").splitlines()[:count]:
        text = json.dumps(json.loads(line)["function"][0]["parameters"])
        for theirs, ours in named.items():
            text = text.replace(theirs, ours)
        found.append(json.loads(text))
    return found


def masks(folder: Path, wanted: list[dict[str, Any]]) -> dict[str, Any]:
    """Microseconds of a mask and of taking a token in, milliseconds of compiling, by quantile."""
    tokenizer, draw = Tokenizer.from_dir(folder), random.Random(0)
    vocabulary = GrammarVocabulary(tokenizer, tokenizer.id_limit, tokenizer.eos_token_ids)
    compiling, filling, taking = [], [], []
    words_W = np.zeros(vocabulary.num_words, dtype=np.uint32)
    for schema in wanted:
        began = time.perf_counter()
        matcher = vocabulary.compile(json_grammar(schema))
        compiling.append((time.perf_counter() - began) * 1e3)
        follower = matcher.deep_copy()
        for _ in range(MOST_TOKENS):
            began = time.perf_counter()
            follower.unsafe_compute_mask_ptr(words_W.ctypes.data, words_W.nbytes)
            filling.append((time.perf_counter() - began) * 1e6)
            allowed = np.unpackbits(words_W.view(np.uint8), bitorder="little").nonzero()[0]
            token = int(draw.choice(allowed))
            began = time.perf_counter()
            follower.consume_token(token)
            taking.append((time.perf_counter() - began) * 1e6)
            if token in tokenizer.eos_token_ids:
                break
    return {
        "vocabulary": tokenizer.vocab_size,
        "tokenizer": folder.name,
        "schemas": len(wanted),
        "tokens": len(filling),
        **{f"mask_us_p{q}": common.quantile(filling, q / 100) for q in (50, 90, 99)},
        **{f"take_us_p{q}": common.quantile(taking, q / 100) for q in (50, 99)},
        **{f"compile_ms_p{q}": common.quantile(compiling, q / 100) for q in (50, 99)},
    }


class Batch:
    """An engine with free requests, and neighbours that come and go."""

    def __init__(self, model: Path, temperature: float, **settings: Any) -> None:
        self.local = LocalEngine(common.engine_config(model, max_model_len=2048, **settings))
        self.temperature = temperature
        self.number = 0
        self.filling: list[float] = []
        for _ in range(FREE):
            self.add("")
        self._watch()

    def _watch(self) -> None:
        fill, found = self.local.engine.masks.fill, self.filling

        def timed(requests: Any) -> Any:
            began = time.perf_counter()
            masks = fill(requests)
            found.append((time.perf_counter() - began) * 1e6)
            return masks

        self.local.engine.masks.fill = timed  # type: ignore[method-assign]

    def add(self, grammar: str) -> str:
        """A request that decodes for as long as it may."""
        self.number += 1
        sampling = SamplingParams(
            max_tokens=10**6,
            temperature=self.temperature,
            seed=self.number,
            ignore_eos=True,
            grammar=grammar,
        )
        self.local.add(f"r{self.number}", list(range(300, 300 + PROMPT)), sampling)
        return f"r{self.number}"

    def steps(self, grammar: str, steps: int) -> float:
        """Median milliseconds of a step with neighbours of this grammar; "": free ones."""
        names = [self.add(grammar) for _ in range(NEIGHBOURS)]
        scheduler = self.local.engine.scheduler
        while len(scheduler.running) < FREE + NEIGHBOURS or any(
            r.forward_owed > 1 for r in scheduler.running
        ):
            self.local.engine.step()
        for _ in range(3):
            self.local.engine.step()
        self.filling.clear()
        took = []
        for _ in range(steps):
            began = time.perf_counter()
            self.local.engine.step()
            took.append((time.perf_counter() - began) * 1e3)
        self.local.engine.handle(m.AbortRequests(request_ids=names))
        return median(took)


def main() -> None:
    """Measure and write the result."""
    options = common.arguments(
        __doc__ or "",
        lambda parser: (
            parser.add_argument("--tokenizer", type=Path, action="append", default=[], help="a directory"),
            parser.add_argument("--functions", type=Path, help="JSON lines with functions, BFCL's form"),
        ),
    )
    wanted = schemas(options.functions, 20 if options.quick else 400)
    rows = [masks(folder, wanted) for folder in (DEMO_MODEL_DIR, *options.tokenizer)]
    for row in rows:
        print(json.dumps(row), flush=True)
    rounds, steps = (4, STEPS) if options.quick else (12, STEPS)
    model = DEMO_MODEL_DIR if options.quick else common.model_directory(quick=False)
    settings: dict[str, Any] = {"kv_cache_memory_bytes": (96 if options.quick else 512) << 20}
    if options.quick:
        settings["dtype"] = "float32"
    people = json_grammar({"type": "array", "items": PEOPLE, "minItems": 10**4})
    mine: list[float] = []
    theirs: list[float] = []
    for temperature in (1.0, 0.0):
        batch = Batch(model, temperature, **settings)
        mine, theirs = common.paired(
            partial(batch.steps, people, steps), partial(batch.steps, "", steps), rounds
        )
        ratio = median([a / b for a, b in zip(mine, theirs, strict=True)])
        row = {
            "temperature": temperature,
            "beside_constrained_ms": min(mine),
            "beside_free_ms": min(theirs),
            "ratio": ratio,
            f"{NEIGHBOURS}_masks_us_p50": common.quantile(batch.filling, 0.5),
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    load = {"concurrency": FREE + NEIGHBOURS, "prompt_tokens": PROMPT, "output_tokens": steps * rounds}
    what = f"ms of a decoding step of {FREE} free requests and {NEIGHBOURS} constrained; the peer: all free"
    headline = common.headline(what, "ms", mine, theirs, load)
    common.write("constrained", options.out, {"headline": headline, "rows": rows})


if __name__ == "__main__":
    main()
