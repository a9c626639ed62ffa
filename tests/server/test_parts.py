"""Small parts alone: keys files, sampling defaults, the log's lines."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path

import pytest

from coserve import log
from coserve.core.slo import LatencyTargets
from coserve.errors import ConfigError, PermissionDenied, Unauthenticated
from coserve.server.application.job_data import Sources, prepare
from coserve.server.application.sampling import SamplingDefaults
from coserve.server.auth import Authenticator
from coserve.server.keys_file import read_keys_file
from coserve.training.job import TrainingSpec
from tests.server.fake_engine import TOKENIZER


def test_keys_files(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    digest = hashlib.sha256(b"secret").hexdigest()
    path.write_text(json.dumps({"keys": [{"sha256": digest, "role": "tune"}, {"key": "plain"}]}))
    auth = Authenticator.from_config((), (), read_keys_file(str(path), LatencyTargets()).keys)
    tune, use = auth.key("Bearer secret"), auth.key("bearer plain")
    assert tune is not None and tune.role == "tune" and use is not None and use.role == "use"
    for wrong in (None, "", "Bearer", "Bearer other", "secret", "Basic secret"):
        with pytest.raises(Unauthenticated):
            auth.key(wrong)
    auth.require(tune, "use")
    with pytest.raises(PermissionDenied):
        auth.require(use, "tune")


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "{", '{"keys": [1]}', '{"keys": [{"key": "a", "role": "king"}]}',
     '{"keys": [{"sha256": "ab"}]}',
     '{"keys": [{"key": "a", "sha256": "b"}]}', '{"keys": [{"key": "a", "limit": 3}]}'],
)  # fmt: skip
def test_bad_keys_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="--keys-file"):
        read_keys_file(str(path), LatencyTargets())
    with pytest.raises(ConfigError, match="--keys-file"):
        read_keys_file(str(tmp_path / "none.toml"), LatencyTargets())


def test_sampling_defaults(tmp_path: Path) -> None:
    assert SamplingDefaults.from_dir(tmp_path) == SamplingDefaults()
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "do_sample": true}')
    assert SamplingDefaults.from_dir(tmp_path) == SamplingDefaults(temperature=0.6, top_k=20)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": false}')
    assert SamplingDefaults.from_dir(tmp_path).temperature == 0.0


def test_log_lines() -> None:
    assert log.line("did it", id="a-1", seconds=0.25, path="/x y") == 'did it id=a-1 seconds=0.25 path="/x y"'
    assert log.line("x", a='q"\n') == 'x a="q\\"\\n"'


def test_preparing_a_file_stops_when_it_is_not_wanted(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    source = tmp_path / "big.jsonl"
    source.write_bytes(b"\n".join([json.dumps(row).encode()] * 20_000))

    async def begin_and_leave() -> None:
        work = prepare(Sources(source), tmp_path / "job", TOKENIZER, TrainingSpec(), "supervised", 0)
        task = asyncio.create_task(work)
        while not (tmp_path / "job" / "data.tmp").exists():
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(begin_and_leave())
    assert not any((tmp_path / "job").iterdir())
