"""Builds the CUDA operators for the CPU (emulation.h), as torch.ops.dse_ext_emulated.*."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OPERATORS = (
    "dse_components",
    "dse_components_backward",
    "kmeans",
    "cluster_nuclear_norms",
    "cluster_nuclear_norms_backward",
    "effective_rank",
    "effective_rank_backward",
)


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++")
    if not found:
        pytest.skip("the kernels are run on the CPU with g++, which is not here")
    return found


def build_operators(folder: Path) -> Any:
    """Compile the operators' sources, load them and return their namespace."""
    headers = Path(torch.__file__).parent
    common = [compiler(), "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden"]
    common += ["-DDSE_CUDA_EMULATION", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    common += ["-Wno-unknown-pragmas", "-Wno-attributes"]
    common += ["-I", str(ROOT / "csrc"), "-I", str(HERE), "-isystem", str(headers / "include")]
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    # The registration names the real backend; the plan is not part of the emulated operators.
    units = [path for path in sources if path.name not in ("registration.cu", "plan.cu")]
    units.append(HERE / "emulated_registration.cpp")

    def compiled(unit: Path) -> str:
        target = str(folder / f"{unit.name}.o")
        command = [*common, "-x", "c++", "-c", str(unit), "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(compiled, units))
    library = folder / "libdse_ext_emulated.so"
    link = [compiler(), "-shared", *objects, "-o", str(library), "-L", str(headers / "lib")]
    done = subprocess.run([*link, "-ltorch_cpu", "-lc10"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.ops.load_library(library)
    return torch.ops.dse_ext_emulated


def replace_cpu_kernels(folder: Path) -> torch.library.Library:
    """Let torch.ops.dse_ext.* on CPU tensors run the emulated kernels while the result lives."""
    emulated = build_operators(folder)
    library = torch.library.Library("dse_ext", "IMPL")
    for name in OPERATORS:
        library.impl(name, getattr(emulated, name).default, "CPU", allow_override=True)
    return library
