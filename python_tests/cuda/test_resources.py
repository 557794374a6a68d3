"""Every kernel compiles for every architecture; the compiler's report of registers and memory.

A spill or a stack frame in one of the main kernels costs more than any tuning gains, and is silent.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# Shared memory that a block may have, in bytes, by architecture.
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}


@dataclass(frozen=True)
class Resources:
    kernel: str
    registers: int
    shared: int
    stack: int
    spills: int


def nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not found:
        pytest.skip("nvcc is not here")
    return found


def demangled(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if not tool:
        return names
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True)
    return [re.sub(r"^void |dse::cuda::|\(.*", "", line) for line in done.stdout.splitlines()]


def parse(report: str) -> list[Resources]:
    pattern = re.compile(
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    found = pattern.findall(report)
    names = demangled([match[0] for match in found])
    return [
        Resources(
            kernel=name,
            registers=int(registers),
            shared=int(smem.group(1)) if (smem := re.search(r"(\d+) bytes smem", rest)) else 0,
            stack=int(stack),
            spills=int(stores) + int(loads),
        )
        for name, (_, stack, stores, loads, registers, rest) in zip(names, found, strict=True)
    ]


@pytest.mark.parametrize("arch", list(SHARED_LIMIT))
def test_kernels_compile_without_spills(
    arch: str, tmp_path: Path, summary: Callable[[str], None]
) -> None:
    command = [nvcc(), "-std=c++20", "-O3", "-I", str(ROOT / "csrc"), f"-arch={arch}"]
    command += ["-Xptxas", "-v", "-cubin", "-o", str(tmp_path / "kernels.cubin")]
    done = subprocess.run([*command, str(HERE / "instantiate.cu")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = parse(done.stdout + done.stderr)
    assert len(kernels) > 60
    most: dict[str, Resources] = {}
    for k in kernels:
        family = k.kernel.split("<")[0]
        if family not in most or k.registers > most[family].registers:
            most[family] = k
    summary(f"{arch}: {len(kernels)} kernels, none spills; the widest of each family:")
    for name, k in sorted(most.items()):
        summary(
            f"  {name:<40} {k.registers:>4} registers {k.shared:>6} bytes of static shared memory"
        )
    for k in kernels:
        assert k.stack == 0, f"{k.kernel} keeps {k.stack} bytes in local memory"
        assert k.spills == 0, f"{k.kernel} spills {k.spills} bytes"
        assert k.shared <= SHARED_LIMIT[arch], f"{k.kernel} wants {k.shared} bytes of shared memory"
