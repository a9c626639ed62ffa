"""A directory that holds an adapter's fp32 masters and, where it is wanted, its optimizer's state.

    adapter_model.safetensors, adapter_config.json   the masters, a PEFT directory
    optimizer.safetensors                            the optimizer's state, whichever it is
    state.json                                       a manifest, and the sha256 of the other files

It is put together under a name ending in .tmp, synced, renamed, and its parent synced: it is there whole or
not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from coserve.lora.peft_files import write_adapter
from coserve.lora.safetensors_file import write_tensors

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"


def write_state(
    target: Path,
    masters: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    state: Mapping[str, torch.Tensor] | None,
    manifest: Mapping[str, Any],
) -> None:
    """Make `target`, which must not be there. `state` None: without an optimizer's. OSError when the disk
    refuses; then nothing is left."""
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        sums = write_adapter(temporary, masters, config)
        if state is not None:
            arrays = {name: tensor.numpy() for name, tensor in state.items()}
            sums[OPTIMIZER_FILE] = write_tensors(temporary / OPTIMIZER_FILE, arrays)
        text = json.dumps({**manifest, "sha256": sums})
        (temporary / STATE_FILE).write_text(text, encoding="utf-8")
        for path in (temporary / STATE_FILE, temporary):
            _sync(path)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(target.parent)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a directory whose files match their sums; None for a broken one. Its "sha256" names
    them."""
    try:
        manifest = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        whole = all(_sha256(path / name) == digest for name, digest in manifest["sha256"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if whole else None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
