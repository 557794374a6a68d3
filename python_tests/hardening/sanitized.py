"""Builds the fuzz program of the CPU kernels under g++'s sanitizers, and runs it.

By hand: ``python python_tests/hardening/sanitized.py address --seconds 600 --seed 1``.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OPTIONS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    # The code of 64-byte vectors, on whatever processor: split into what it has.
    # 16-bit products are in tiles here, and in vectors in "thread".
    "wide": [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-DDSE_EMULATE_AVX512",
        "-DDSE_EMULATE_TILES",
    ],
    "thread": ["-fsanitize=thread", "-DDSE_THREADS_ALWAYS", "-DDSE_EMULATE_AVX512"],
}
# Memory is filled with bytes that are NaN as numbers and absurd as indices: what is read before it
# is written does not stay unseen. torch keeps some memory until the end of the process.
ADDRESS = {
    "ASAN_OPTIONS": "detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
ENVIRONMENT = {
    "address": ADDRESS,
    "wide": ADDRESS,
    # torch and its MKL are not instrumented: what they do among themselves cannot be judged.
    "thread": {"TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1"},
}


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++")


def build(kind: str, folder: Path) -> Path:
    """Compile what is older than its sources; return the program.

    Index arithmetic is int64 throughout: a conversion that could narrow it is an error.
    """
    libraries = Path(torch.__file__).parent
    common = [
        compiler() or "g++",
        "-std=c++20",
        "-O1",
        "-g1",
        "-fvisibility=hidden",
        *OPTIONS[kind],
    ]
    common += ["-Wall", "-Wextra", "-Wconversion", "-Werror", "-Wno-psabi", "-Wno-tsan"]
    common += [
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-DDSE_LANES_MAX_SIDE=24",  # matrices of these programs' sizes go both ways
        "-I",
        str(ROOT / "csrc"),
        "-I",
        str(HERE),
    ]
    common += ["-isystem", str(libraries / "include")]
    units = [p for p in sorted((ROOT / "csrc/cpu").glob("*.cpp")) if p.name != "registration.cpp"]
    units += sorted(HERE.glob("*.cpp"))
    headers = [*(ROOT / "csrc").rglob("*.h"), *HERE.glob("*.h"), Path(__file__)]
    newest = max(path.stat().st_mtime for path in headers)
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(unit: Path) -> str:
        target = folder / f"{unit.stem}.o"
        if not target.exists() or target.stat().st_mtime < max(newest, unit.stat().st_mtime):
            command = [*common, "-c", str(unit), "-o", str(target)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                target.unlink(missing_ok=True)
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        return str(target)

    # The longest first.
    units.sort(key=lambda path: -path.stat().st_size)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(compiled, units))
    program = folder / "fuzz"
    link = [*common[:5], *OPTIONS[kind], *objects, "-o", str(program)]
    link += [
        "-L",
        str(libraries / "lib"),
        f"-Wl,-rpath,{libraries / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
    ]
    done = subprocess.run(link, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(link)}\n{done.stderr}")
    return program


def command(program: Path, *arguments: object) -> list[str]:
    """How to start the program: the sanitizers' shadow needs its addresses free."""
    still = shutil.which("setarch")
    prefix = [still, platform.machine(), "-R"] if still else []
    return [*prefix, str(program), *map(str, arguments)]


def environment(kind: str) -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT[kind], "OMP_NUM_THREADS": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=sorted(OPTIONS))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, default=-1, help="run this one case of the seed only")
    given = parser.parse_args()
    program = build(given.kind, ROOT / "build" / "hardening" / given.kind)
    arguments = ["--seconds", given.seconds, "--seed", given.seed, "--case", given.case]
    return subprocess.run(command(program, *arguments), env=environment(given.kind)).returncode


if __name__ == "__main__":
    sys.exit(main())
