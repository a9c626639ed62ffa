"""The client commands against a real server: what they say, what they leave, and how they exit."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from examples.demo.dataset import training_examples, write_jsonl
from examples.demo.server import Address, running

KEY = "boss"


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def server() -> Iterator[Address]:
    with running("--admin-api-key", KEY, "--kv-cache-memory-bytes", "64MiB") as address:
        yield address


def coserve(server: Address, *arguments: str, key: str = KEY, typed: str | None = None) -> Ran:
    """Run a client command against the server."""
    where = ["--url", server.http] if arguments[0] == "chat" else ["--grpc", server.grpc]
    command = [sys.executable, "-m", "coserve.cli.main", *arguments, *where]
    if key:
        command += ["--api-key", key]
    ended = subprocess.run(command, capture_output=True, text=True, input=typed, timeout=120)
    return Ran(ended.returncode, ended.stdout, ended.stderr)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "mates.jsonl"
    write_jsonl(path, training_examples(16))
    return path


@pytest.fixture(scope="module")
def tuned(server: Address, data: Path) -> Ran:
    flags = "--adapter mate --rank 4 --target-modules q_proj,v_proj --epochs 2 --batch-size 8 --seed 1"
    flags += " --validation-split 0.25 --eval-steps 2 --tag team=red"
    return coserve(server, "finetune", str(data), *flags.split())


def test_finetune_follows_the_job_to_its_end(tuned: Ran) -> None:
    assert (tuned.code, tuned.err) == (0, "")
    steps = [line for line in tuned.out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["1/4", "2/4", "3/4", "4/4"]
    assert all(re.search(r" loss \d+\.\d{4}( valid \d+\.\d{4})? \d+ tok/s", line) for line in steps)
    assert [" valid " in line for line in steps] == [False, True, True, True]
    assert [bool(re.search(r" eta \d+:\d\d$", line)) for line in steps] == [True, True, True, False]
    assert "model=mate" in tuned.out


def test_jobs_list_get_and_watch(server: Address, tuned: Ran) -> None:
    job = tuned.out.split()[1].rstrip(":")
    assert job.startswith("ftjob-")
    listed = coserve(server, "jobs", "list", "--tag", "team=red").out.splitlines()
    assert len(listed) == 2 and listed[1].split()[:4] == [job, "succeeded", "mate", "4/4"]
    assert all(re.fullmatch(r"\d+\.\d{4}", cell) for cell in listed[1].split()[4:6])
    assert len(coserve(server, "jobs", "list", "--tag", "team=blue").out.splitlines()) == 1
    found = coserve(server, "jobs", "get", job)
    assert found.code == 0 and "fine_tuned_model  mate" in found.out
    assert "training          n_epochs: 2" in found.out
    assert "lora              target_modules: q_proj, v_proj" in found.out
    assert "metadata          team: red" in found.out and "training          eval_steps: 2" in found.out
    kept = [line.split() for line in coserve(server, "jobs", "checkpoints", job).out.splitlines()]
    assert kept[0][:4] == ["CHECKPOINT", "STEP", "LOSS", "VALID"]
    assert [row[1] for row in kept[1:]] == ["4", "2"]
    watched = coserve(server, "jobs", "watch", job)
    assert watched.code == 0
    assert [line for line in watched.out.splitlines() if line.startswith("step ")] == [
        line for line in tuned.out.splitlines() if line.startswith("step ")
    ]


def test_an_adapter_goes_out_and_comes_back(server: Address, tuned: Ran, tmp_path: Path) -> None:
    folder = tmp_path / "mate"
    assert coserve(server, "adapters", "download", "mate", str(folder)).code == 0
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 4)
    assert load_file(folder / "adapter_model.safetensors")
    uploaded = coserve(server, "adapters", "upload", "copy", str(folder))
    assert (uploaded.code, uploaded.out) == (0, "copy@1 rank 4 ready\n")
    rows = {line.split()[0]: line.split() for line in coserve(server, "adapters", "list").out.splitlines()}
    assert rows["copy"][-1] == rows["mate"][-1]
    question = "What is 7 + 5?"
    answers = {coserve(server, "chat", question, "--model", name).out for name in ("mate", "copy")}
    assert len(answers) == 1 and answers != {""}
    assert coserve(server, "adapters", "alias", "prod", "copy@1").out == "prod means copy@1\n"
    assert coserve(server, "adapters", "alias").out.splitlines()[1].split() == ["prod", "copy@1"]
    assert coserve(server, "chat", question, "--model", "prod").out in answers
    assert "prod" in coserve(server, "adapters", "unload", "copy").err
    assert coserve(server, "adapters", "alias", "prod", "--delete").code == 0
    assert coserve(server, "adapters", "alias", "prod").code == 2
    assert coserve(server, "adapters", "unload", "copy").code == 0
    assert coserve(server, "chat", question, "--model", "copy").code == 2


def test_an_adapter_that_fails_its_check_is_not_published(
    server: Address, data: Path, tmp_path: Path
) -> None:
    rows = [["What is 7 + 5?", "Never this."], ["Spell cat.", "c-a-t"]]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(json.dumps({"prompt": ask, "completion": right}) for ask, right in rows))
    flags = ["--adapter", "gated", "--max-steps", "1", "--rank", "2", "--target-modules", "q_proj"]
    gate = ["--publish-if-check", f"sums={questions}", "--publish-if-score"]
    failed = coserve(server, "finetune", str(data), *flags, *gate, "0.9")
    assert failed.code == 1 and "check 'sums', under 0.9" in failed.err
    assert coserve(server, "finetune", str(data), *flags, *gate, "0").code == 0
    assert coserve(server, "chat", "What is 7 + 5?", "--model", "gated").code == 0


def test_chat_reads_questions_from_a_pipe(server: Address) -> None:
    one = coserve(server, "chat", "What is 7 + 5?")
    two = coserve(server, "chat", typed="What is 7 + 5?\n\nSpell cat.\n")
    assert (one.code, two.code) == (0, 0)
    assert two.out.startswith(one.out) and two.out.count("\n") == 2


def test_preview_trains_nothing(server: Address, data: Path) -> None:
    before = coserve(server, "jobs", "list").out
    shown = coserve(server, "finetune", str(data), "--adapter", "none", "--preview")
    assert shown.code == 0 and "Aye, captain!" in shown.out and "trained on" in shown.out
    assert coserve(server, "jobs", "list").out == before


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["finetune", "DATA", "--adapter", "x", "--rank", "500"], 2, "500"),
        (["finetune", "DATA", "--adapter", "x", "--target-modules", "wings"], 2, "wings"),
        (["finetune", "DATA", "--adapter", "x", "--lr-scheduler-type", "zigzag"], 2, "zigzag"),
        (["jobs", "get", "ftjob-none"], 1, "ftjob-none"),
        (["jobs", "cancel", "ftjob-none"], 1, "ftjob-none"),
        (["adapters", "unload", "nobody"], 1, "nobody"),
        (["adapters", "load", "a", "/etc"], 2, "--adapter-root"),
        (["chat", "hello", "--model", "nobody"], 2, "nobody"),
    ],
)
def test_refusals(server: Address, data: Path, arguments: list[str], code: int, words: str) -> None:
    ran = coserve(server, *[str(data) if word == "DATA" else word for word in arguments])
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.startswith("coserve: ") and ran.err.count("\n") == 1 and words in ran.err


@pytest.mark.parametrize("arguments", [["jobs", "list"], ["chat", "hello"]])
def test_a_missing_key_is_asked_for(server: Address, arguments: list[str]) -> None:
    ran = coserve(server, *arguments, key="")
    assert ran.code == 1 and "COSERVE_API_KEY" in ran.err


def test_a_bad_file_is_refused_line_by_line(server: Address, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"messages": []}\nnonsense\n')
    ran = coserve(server, "finetune", str(path), "--adapter", "bad")
    assert ran.code in (1, 2)
    assert "line 1" in ran.err and "line 2" in ran.err


def heed_ctrl_c() -> None:
    """In the child: a shell that runs us in the background would have Ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_leaves_the_job_running(server: Address, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    write_jsonl(path, training_examples(60))
    command = [sys.executable, "-m", "coserve.cli.main", "finetune", str(path), "--adapter", "long"]
    command += ["--epochs", "50", "--grpc", server.grpc, "--api-key", KEY]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c
    )
    assert process.stdout is not None
    job = ""
    for line in process.stdout:
        job = line.split()[1].rstrip(":") if line.startswith("job ") else job
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"coserve jobs watch {job}" in out
    assert "running" in coserve(server, "jobs", "get", job).out
    assert coserve(server, "jobs", "pause", job).code == 0
    assert coserve(server, "jobs", "resume", job).code == 0
    cancelled = coserve(server, "jobs", "cancel", job)
    assert cancelled.code == 0
    assert coserve(server, "jobs", "watch", job).code == 1
