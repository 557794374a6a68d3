"""What each stage of a step on the CPU costs, beside its floor: `python -m benchmarks.stages`.

Builds the kernels once more with timers (`csrc/cpu/stage.h`), runs a step many times on one thread,
and prints a Markdown table for every shape. A stage's floor is its arithmetic at the rate at which
PyTorch multiplies matrices on this machine in the same run, or the bytes that it cannot help
reading and writing at the rate of a copy, whichever takes longer. Arithmetic is counted for the
clusters that k-means found.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dse_ext"
SHAPES = ((64, 196, 384), (32, 196, 768), (8, 196, 1024), (16, 1024, 384))


@dataclass(frozen=True)
class Rates:
    """What one thread of this machine reaches.

    Attributes:
        single: float32 matrix products, multiply-adds per second.
        double: float64 matrix products, multiply-adds per second.
        copy: Bytes read plus bytes written per second.
    """

    single: float
    double: float
    copy: float


@dataclass(frozen=True)
class Work:
    """The least that a stage has to do: multiply-adds in either precision, and bytes."""

    single: float = 0.0
    double: float = 0.0
    bytes: float = 0.0

    def seconds(self, rates: Rates) -> float:
        """Time at the given rates, arithmetic and memory overlapping."""
        arithmetic = self.single / rates.single + self.double / rates.double
        return max(arithmetic, self.bytes / rates.copy)


def best_time(call: Callable[[], object], repeats: int = 5) -> float:
    """Least wall time of a call in seconds, after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def measure_rates(side: int = 2048, elements: int = 1 << 25) -> Rates:
    """Rates of one thread, by PyTorch's matrix product and copy."""
    products = {}
    for dtype in (torch.float32, torch.float64):
        a, b = torch.randn(2, side, side, dtype=dtype)
        products[dtype] = side**3 / best_time(lambda a=a, b=b: a @ b)  # type: ignore[misc]
    source = torch.randn(elements)
    target = torch.empty_like(source)
    copied = 8 * elements / best_time(lambda: target.copy_(source))
    return Rates(products[torch.float32], products[torch.float64], copied)


def stage_work(
    shape: tuple[int, int, int], sizes: list[int], k: int, local: int
) -> dict[str, Work]:
    """The least work of every stage of a training step on float32 features.

    Args:
        shape: (B, N, d).
        sizes: Rows of every local and global cluster.
        k: Clusters of a group.
        local: Clusters of an image.
    """
    rows, d = shape[0] * shape[1], shape[2]
    pass_ = 4.0 * rows * d  # bytes of the features
    sides = [min(n, d) for n in sizes]
    cubes = sum(2 / 3 * m**3 for m in sides)
    m = min(rows, d)
    return {
        "row norms": Work(bytes=pass_),
        "local k-means": Work(single=rows * d * local, bytes=2 * pass_),
        "global k-means": Work(single=rows * d * k, bytes=2 * pass_),
        # Float32 is enough for these clusters, or nearly all of them.
        "clusters: Gram matrices": Work(
            single=sum(n * d * m / 2 for n, m in zip(sizes, sides, strict=True)), bytes=2 * pass_
        ),
        "clusters: tridiagonal form, eigenvalues": Work(single=cubes),
        "clusters: gradient matrices": Work(single=cubes),
        # Of hardly more rows than features in float64; of more in float32, as these spectra allow.
        "rank: second moment": Work(
            single=rows * d * m / 2 if 4 * rows >= 5 * m else 0.0,
            double=rows * d * m / 2 if 4 * rows < 5 * m else 0.0,
            bytes=pass_,
        ),
        "rank: tridiagonal form, eigenvalues": Work(single=2 / 3 * m**3),
        "rank: gradient matrix": Work(single=2 / 3 * m**3),
        "spread": Work(bytes=pass_),
        "nearest other centroid": Work(single=rows * d * k, bytes=pass_),
        "backward: rank": Work(single=float(rows) * d * m, bytes=2 * pass_),
        "backward: clusters": Work(
            single=sum(n * d * m for n, m in zip(sizes, sides, strict=True)), bytes=4 * pass_
        ),
        "backward: distances, normalization": Work(bytes=3 * pass_),
    }


def build(folder: Path) -> None:
    """Puts a copy of the package with timed kernels into a folder."""
    package = folder / "dse_ext"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "_cuda.so"))
    (package / "_ops.so").unlink(missing_ok=True)
    sources = [ROOT / "csrc/ops.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
    include = include_paths()[0]
    flags = [
        "-std=c++20",
        "-O3",
        "-fno-math-errno",
        "-fPIC",
        "-Wno-psabi",
        "-DDSE_STAGE_TIMES",
        f"-I{ROOT / 'csrc'}",
    ]
    flags += ["-isystem", include, "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"]
    compiler = os.environ.get("CXX", "c++")

    def compile_one(source: Path) -> str:
        out = folder / f"{source.stem}.o"
        subprocess.run([compiler, *flags, "-c", str(source), "-o", str(out)], check=True)
        return str(out)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    paths = [f"-L{path}" for path in library_paths()]
    library = str(package / "_ops.so")
    link = [compiler, "-shared", *objects, *paths, "-ltorch_cpu", "-o", library]
    subprocess.run(link, check=True)


def run_steps(shape: tuple[int, int, int], steps: int) -> None:
    """Times steps in a process of its own; prints the wall time and the clusters' sizes as JSON."""
    import dse_ext
    from dse_ext.bench.inputs import make_features

    torch.set_num_threads(1)
    regularizer = dse_ext.DSERegularizer()
    z = make_features("mixture", shape).requires_grad_()
    sizes: list[int] = []
    start = time.perf_counter()
    for step in range(steps):
        torch.manual_seed(step)
        z.grad = None
        regularizer(z).backward()
        last = regularizer.last
        assert last is not None
        sizes = cluster_sizes(last.local_labels, last.global_labels)
    seconds = (time.perf_counter() - start) / steps
    print(json.dumps({"seconds": seconds, "sizes": sizes}))


def cluster_sizes(local_labels: Tensor, global_labels: Tensor, group_images: int = 8) -> list[int]:
    """Rows of every cluster of at least two."""
    counts: list[int] = []
    for labels in (*local_labels, *global_labels.split(group_images)):
        counts += torch.bincount(labels.reshape(-1)).tolist()
    return [n for n in counts if n > 1]


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    Attributes:
        name: Name of the stage.
        seconds: Time of a step.
        floor: The least that it could take, in seconds.
        share: Of the step.
    """

    name: str
    seconds: float
    floor: float
    share: float


def measure(
    folder: Path, shape: tuple[int, int, int], steps: int, rates: Rates
) -> tuple[float, list[Stage]]:
    """Seconds of a step and its stages, the most expensive ones first."""
    out = folder / "stages.tsv"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT))),
        "DSE_STAGE_FILE": str(out),
        "OMP_NUM_THREADS": "1",
    }
    text = "x".join(map(str, shape))
    command = [sys.executable, "-m", "benchmarks.stages", "--child", text, "--steps", str(steps)]
    done = subprocess.run(
        command, cwd=folder, env=environment, check=True, capture_output=True, text=True
    )
    result = json.loads(done.stdout)
    work = stage_work(shape, result["sizes"], k=24, local=3)
    stages = []
    for line in out.read_text().splitlines():
        name, seconds = line.split("\t")
        each = float(seconds) / steps
        floor = work[name].seconds(rates)
        stages.append(Stage(name, each, floor, each / result["seconds"]))
    return result["seconds"], sorted(stages, key=lambda stage: -stage.seconds)


def table(shape: tuple[int, int, int], seconds: float, stages: list[Stage]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield f"**{shape}**: {1e3 * seconds:.0f} ms on one thread"
    yield ""
    yield "| stage | time, ms | share | floor, ms | time / floor |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for s in stages:
        yield (
            f"| {s.name} | {1e3 * s.seconds:.1f} | {100 * s.share:.0f} % | {1e3 * s.floor:.1f} "
            f"| {s.seconds / s.floor:.1f} |"
        )
    total, floor = sum(s.seconds for s in stages), sum(s.floor for s in stages)
    yield (
        f"| all | {1e3 * total:.1f} | {100 * total / seconds:.0f} % | {1e3 * floor:.1f} "
        f"| {total / floor:.1f} |"
    )
    yield ""


def parse_shape(text: str) -> tuple[int, int, int]:
    """(B, N, d) from a text such as 64x196x384."""
    images, positions, dim = map(int, text.split("x"))
    return images, positions, dim


def main() -> None:
    """Prints the tables; `--json` also writes them to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", type=parse_shape, action="append", help="BxNxd; several times")
    parser.add_argument("--steps", type=int, default=10, help="steps that are averaged")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--child", type=parse_shape, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_steps(options.child, options.steps)
        return
    torch.set_num_threads(1)
    rates = measure_rates()
    print(
        f"One thread: {2e-9 * rates.single:.0f} GFLOP/s in float32, {2e-9 * rates.double:.0f} in "
        f"float64, copy {1e-9 * rates.copy:.0f} GB/s\n"
    )
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder)
        for shape in options.shape or SHAPES:
            seconds, stages = measure(folder, shape, options.steps, rates)
            print("\n".join(table(shape, seconds, stages)), flush=True)
            results.append(
                {"shape": shape, "seconds": seconds, "stages": list(map(asdict, stages))}
            )
    if options.json:
        options.json.write_text(
            json.dumps({"rates": asdict(rates), "shapes": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
