"""The CUDA kernels' own source, run on the CPU (emulation.h) against plain float64 references.

Each program holds its cases, repeats them under several schedules of threads, and exits non-zero if
a result is wrong or differs between schedules.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from emulated import compiler

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROGRAMS = ("image_kernel", "clusters_and_gradient", "matrix_functions", "steep")
SANITIZED = ("clusters_and_gradient", "steep")


def build(program: str, folder: Path, *options: str) -> Path:
    binary = folder / program
    command = [
        *(compiler(), "-std=c++20", *options, "-DDSE_CUDA_EMULATION", "-Wno-unknown-pragmas"),
        *("-I", str(ROOT / "csrc"), "-I", str(HERE)),
        *(str(HERE / f"check_{program}.cpp"), "-o", str(binary)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return binary


def run(binary: Path) -> str:
    done = subprocess.run([str(binary)], capture_output=True, text=True, timeout=900)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "FAILED" not in output, output
    return done.stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_kernels_on_the_cpu(program: str, tmp_path: Path, summary: Callable[[str], None]) -> None:
    output = run(build(program, tmp_path, "-O2"))
    counted = re.search(r"(\d+) checks, 0 failed", output)
    assert counted, output
    assert int(counted.group(1)) > 0
    summary(f"{program}: {counted.group(1)} checks of kernels run on the CPU, 0 failed")


@pytest.mark.parametrize("program", SANITIZED)
def test_kernels_under_sanitizers(program: str, tmp_path: Path) -> None:
    options = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    # Contexts jump out of frames whose shadow would stay poisoned: heap and globals are checked.
    options += ["--param", "asan-stack=0"]
    run(build(program, tmp_path, *options))
