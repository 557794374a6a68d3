"""The compiler's report of registers and memory, of every kernel in the library as it was built.

A spill or a stack frame in one of the main kernels costs more than any tuning gains, and is silent.
The build compiles everything for sm_80, sm_90 and sm_100; cuobjdump, which comes with the toolkit
and with triton, reads the figures from the library.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dse_ext import _C, ops

# Shared memory that a block may have, in bytes, by architecture.
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}


@dataclass(frozen=True)
class Resources:
    kernel: str
    registers: int
    shared: int
    stack: int
    local: int


def cuobjdump() -> str:
    packaged = Path(sysconfig.get_path("platlib")) / "triton/backends/nvidia/bin"
    for path in (None, "/usr/local/cuda/bin", str(packaged)):
        if found := shutil.which("cuobjdump", path=path):
            return found
    pytest.skip("cuobjdump is not here")


def demangled(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if not tool:
        return names
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True)
    prefix = r"^void |dse::cuda::|\(anonymous namespace\)::|\(.*"
    return [re.sub(prefix, "", line) for line in done.stdout.splitlines()]


def parse(report: str) -> dict[str, list[Resources]]:
    """Kernels by architecture."""
    found: dict[str, list[Resources]] = {}
    for part in re.split(r"^arch = ", report, flags=re.MULTILINE)[1:]:
        rows = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", part)
        names = demangled([row[0] for row in rows])
        found.setdefault(part.split()[0], []).extend(
            Resources(name, int(registers), int(shared), int(stack), int(local))
            for name, (_, registers, stack, shared, local) in zip(names, rows, strict=True)
        )
    return found


@pytest.fixture(scope="module")
def kernels() -> dict[str, list[Resources]]:
    if "_cuda" not in ops.LIBRARIES:
        pytest.skip("built without CUDA")
    command = [cuobjdump(), "-res-usage", str(ops.LIBRARIES["_cuda"])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return parse(done.stdout)


def test_the_library_has_code_for_every_architecture(kernels: dict[str, list[Resources]]) -> None:
    built = [arch.removesuffix("+PTX") for arch in _C.build_info()["cuda_archs"]]
    assert {f"sm_{arch.replace('.', '')}" for arch in built} == set(kernels)


@pytest.mark.parametrize("arch", list(SHARED_LIMIT))
def test_no_kernel_spills(
    arch: str, kernels: dict[str, list[Resources]], summary: Callable[[str], None]
) -> None:
    if arch not in kernels:
        pytest.skip(f"built without {arch}")
    assert len(kernels[arch]) > 60
    most: dict[str, Resources] = {}
    for k in kernels[arch]:
        family = k.kernel.split("<")[0]
        if family not in most or k.registers > most[family].registers:
            most[family] = k
    summary(f"{arch}: {len(kernels[arch])} kernels, none spills; the widest of each family:")
    for name, k in sorted(most.items()):
        summary(f"  {name:<40} {k.registers:>4} registers {k.shared:>6} bytes of shared memory")
    for k in kernels[arch]:
        assert k.stack == 0, f"{k.kernel} keeps {k.stack} bytes in local memory"
        assert k.local == 0, f"{k.kernel} keeps {k.local} bytes in local memory"
        assert k.shared <= SHARED_LIMIT[arch], f"{k.kernel} wants {k.shared} bytes of shared memory"
