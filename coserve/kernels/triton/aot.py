"""Compiling kernels for an architecture without a device, and what they take: shared memory, registers."""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import coserve.kernels.triton as package
from coserve.kernels.triton.tuning import Tuned

# Shared memory that a block may use, in KiB, by architecture.
SHARED_KIB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}


@dataclass(frozen=True)
class AotCase:
    """One compiled form of a kernel. `signature` gives the type of each argument that isn't a constant
    ("*fp32", "i32", "fp32"; ":16" behind it: a multiple of 16, as whole tensors' addresses are),
    `constexprs` the constants but for those of `tuned`. A `hot` one must not spill registers."""

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    tuned: Tuned
    hot: bool = True

    @property
    def name(self) -> str:
        """Kernel and constants, for people."""
        return "-".join([self.kernel.__name__, *self.signature.values(), *map(str, self.constexprs.values())])


@dataclass(frozen=True)
class Footprint:
    """Bytes of shared memory a block, registers a thread, bytes spilled a thread."""

    shared: int
    registers: int
    spills: int


def all_cases() -> list[AotCase]:
    """The `AOT_CASES` of every kernel file."""
    found: list[AotCase] = []
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        found += getattr(module, "AOT_CASES", [])
    return found


def compile_case(case: AotCase, architecture: str) -> Footprint:
    """Compile for "sm_90" and the like. Results are kept in triton's cache by the sources' hash."""
    number = int(architecture[3:])
    settings = dict(case.tuned.for_architecture(architecture))
    options = {name: settings.pop(name) for name in ("num_warps", "num_stages")}
    constants = {**case.constexprs, **settings}
    signature, attributes = {}, {}
    for index, name in enumerate(case.kernel.arg_names):
        kind, _, multiple = case.signature.get(name, "constexpr").partition(":")
        signature[name] = kind
        if multiple:
            attributes[(index,)] = [["tt.divisibility", int(multiple)]]
    source = ASTSource(case.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", number, 32), options=options)
    registers, spills = _registers(compiled.asm["ptx"], number)
    return Footprint(compiled.metadata.shared, registers, spills)


def _registers(ptx: str, number: int) -> tuple[int, int]:
    nvidia = triton.knobs.nvidia
    ptxas = nvidia.ptxas_blackwell if number >= 100 else nvidia.ptxas
    key = hashlib.sha256(f"{ptxas.version}\n{ptx}".encode()).hexdigest()
    kept = Path(triton.knobs.cache.dir) / "coserve-ptxas" / f"{key}.txt"
    if not kept.exists():
        target = re.search(r"^\.target (\S+)", ptx, re.MULTILINE)
        assert target is not None
        kept.parent.mkdir(parents=True, exist_ok=True)
        source = kept.with_suffix(".ptx")
        source.write_text(ptx, encoding="utf-8")
        command = [ptxas.path, "-v", f"--gpu-name={target[1].rstrip(',')}", str(source), "-o", "/dev/null"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        source.unlink()
        kept.write_text(told, encoding="utf-8")
    told = kept.read_text(encoding="utf-8")
    used = re.search(r"Used (\d+) registers", told)
    spilled = re.findall(r"(\d+) bytes spill", told)
    assert used is not None and spilled, f"ptxas said {told!r}"
    return int(used[1]), sum(map(int, spilled))
