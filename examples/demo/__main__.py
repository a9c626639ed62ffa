"""Run the demo: `python -m examples.demo [--quick]`. Exits with 0 only if everything it promises held."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
from openai import AsyncOpenAI
from rich.console import Console

from examples.demo import dataset, server
from examples.demo.display import Display
from examples.demo.figures import Training, phase_table
from examples.demo.job import fine_tune
from examples.demo.load import Answer, Clients, ask
from examples.demo.verdict import Check, answer_table, checks

ADAPTER = "ships-mate"
TIME_LIMIT = 270.0  # seconds; whatever takes longer has failed
PLAIN_WIDTH = 140  # columns of the tables where there is no terminal to ask


@dataclass(frozen=True)
class Plan:
    """How long and how much. Chat alone lasts `settle` seconds; each client asks once a `period`."""

    clients: int = 3
    period: float = 0.5
    settle: float = 15.0
    examples: int = 240
    held_out: int = 24
    epochs: int = 4


QUICK = Plan(clients=2, settle=2.0, examples=240, held_out=20, epochs=4)


async def play(plan: Plan, address: server.Address, console: Console) -> list[Check]:
    """All phases against a server that is ready; returns the promises and whether they held."""
    asked = dataset.held_out_examples(plan.held_out)
    chat_questions = [example.question for example in dataset.training_examples(24)]
    training = Training()
    async with AsyncOpenAI(base_url=f"{address.http}/v1", api_key="none", max_retries=0) as client:
        before = await _answers(client, address.model, asked)
        clients = Clients(client, [address.model] * plan.clients, chat_questions, plan.period)
        display = Display(console, clients, training)
        clients.start()
        async with display.phase("before", f"{plan.clients} chat clients, no training yet"):
            await asyncio.sleep(plan.settle)
        with tempfile.TemporaryDirectory(prefix="coserve-demo-") as folder:
            data = Path(folder, "ships_mate.jsonl")
            dataset.write_jsonl(data, dataset.training_examples(plan.examples))
            title = f"The same chat; {plan.examples} examples x {plan.epochs} epochs are trained beside it"
            async with display.phase("during", title):
                name = await fine_tune(address.grpc, data, ADAPTER, plan.epochs, training)
        clients.models[-1] = name
        async with display.phase("after", f"Training is done; the last client now asks {name}"):
            await asyncio.sleep(plan.settle)
        await clients.stop()
        base = await _answers(client, address.model, asked)
        adapter = await _answers(client, name, asked)
    console.print()
    console.print(phase_table(display.rows(), training))
    console.print()
    console.print(answer_table(asked, base, adapter))
    return checks(clients.answers, training, before, base, adapter)


async def _answers(client: AsyncOpenAI, model: str, asked: list[dataset.Example]) -> list[Answer]:
    return [await ask(client, model, example.question) for example in asked]


def main() -> int:
    """Parse the command line, run the demo, say what held; 0 when all did, 1 otherwise, 130 on Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a short form for tests")
    plan = QUICK if parser.parse_args().quick else Plan()
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that the server is ended on the way out
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    console = Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)
    began = time.monotonic()
    try:
        with server.running() as address:
            ready = f"server ready after {time.monotonic() - began:.1f} s, model {address.model}"
            console.print(ready, highlight=False)
            results = asyncio.run(asyncio.wait_for(play(plan, address, console), TIME_LIMIT))
    except KeyboardInterrupt:
        return 130
    except (RuntimeError, TimeoutError, grpc.RpcError) as error:
        said = str(error) or f"not done within {TIME_LIMIT:.0f} s"
        console.print(f"FAIL {said}", highlight=False, markup=False, soft_wrap=True)
        return 1
    console.print()
    for check in results:
        console.print(f"{'ok  ' if check.held else 'FAIL'} {check.what}", highlight=False, soft_wrap=True)
    console.print(f"{time.monotonic() - began:.0f} s in all", highlight=False)
    return 0 if all(check.held for check in results) else 1


if __name__ == "__main__":
    sys.exit(main())
