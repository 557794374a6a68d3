"""The regularizer on a GPU: times, memory, and how far from the machine's own ceilings they are.

`python -m benchmarks.gpu --out results.json` measures, in one process on one device,

* the ceilings: copy bandwidth, and matrix products in bfloat16, float32 and float64;
* forward and training step of dse-ext at the shapes of ViT-S, ViT-B and ViT-L and of large patch
  grids, eager and as a replayed CUDA graph, with extra peak memory and the time of each kernel;
* the peers on the same inputs: lightly, batched PyTorch eager and compiled, `torch.linalg` for the
  spectral parts, flash-kmeans for k-means where it is installed;
* a training step of ViT-L/16 and ViT-S/16 (timm, bfloat16 autocast), and the regularizer's share.

Times are medians between CUDA events; inputs rotate among several sets, so that the second-level
cache does not hold them. `--budget` bounds the whole in seconds: what comes too late is left out
and named. On a CPU (`--device cpu --quick`) the same code runs at tiny shapes: does it work?
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dse_ext
from benchmarks.cases import IMPLEMENTATIONS, make_features, run

Shape = tuple[int, int, int]

SHAPES: tuple[Shape, ...] = (
    (256, 196, 384),
    (256, 196, 768),
    (256, 196, 1024),
    (64, 1024, 1024),
    (32, 256, 4096),
)
QUICK_SHAPES: tuple[Shape, ...] = ((9, 16, 12), (4, 20, 16))
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
BACKBONES = (("vit_large_patch16_224", 1024), ("vit_small_patch16_224", 384))


class InFloat32(nn.Module):
    """A peer that takes no half precision, as its users call it then."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, z: Tensor) -> Tensor:
        """The peer's loss."""
        loss: Tensor = self.module(z.float())
        return loss


class Bench:
    """Measurements of one device, gathered in `results`.

    Args:
        device: Where everything runs.
        quick: Tiny shapes and few repeats.
        budget: Seconds for everything.
    """

    def __init__(self, device: torch.device, quick: bool, budget: float) -> None:
        self.device = device
        self.quick = quick
        self.deadline = time.monotonic() + budget
        self.results: dict[str, Any] = {"machine": self._machine(), "left_out": []}

    @property
    def cuda(self) -> bool:
        """Whether there are events, graphs and memory counters."""
        return self.device.type == "cuda"

    def _machine(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "device": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "dse_ext": dse_ext.__version__,
        }
        for package in ("lightly", "timm", "flash-kmeans"):
            try:
                facts[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                facts[package] = None
        if self.cuda:
            properties = torch.cuda.get_device_properties(self.device)
            facts.update(
                device=properties.name,
                capability=f"{properties.major}.{properties.minor}",
                multiprocessors=properties.multi_processor_count,
                memory_gib=round(properties.total_memory / 2**30, 1),
            )
        return facts

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Runs a part; what fails or comes too late is named in the results, the rest goes on."""
        if time.monotonic() > self.deadline:
            self.results["left_out"].append(f"{name}: no time left")
            raise _Skipped
        start = time.monotonic()
        try:
            yield
        except (RuntimeError, ImportError, torch.cuda.OutOfMemoryError) as error:
            first = str(error).strip().splitlines()[:1]
            self.results["left_out"].append(f"{name}: {type(error).__name__}: {' '.join(first)}")
            raise _Skipped from error
        finally:
            print(f"  {name}: {time.monotonic() - start:.1f} s", flush=True)
            if self.cuda:
                torch.cuda.empty_cache()

    def attempt(self, name: str, body: Callable[[], Any]) -> Any:
        """The result of `body`, or None where it was skipped."""
        try:
            with self.part(name):
                return body()
        except _Skipped:
            return None

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def milliseconds(self, body: Callable[[], Any], repeats: int, warmup: int = 2) -> float:
        """Median milliseconds of `body`."""
        if self.quick:
            repeats, warmup = min(repeats, 2), min(warmup, 1)
        for _ in range(warmup):
            body()
        self.synchronize()
        times = []
        for _ in range(repeats):
            if self.cuda:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                body()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
            else:
                start = time.perf_counter()
                body()
                times.append(1000 * (time.perf_counter() - start))
        return statistics.median(times)

    def extra_peak(self, body: Callable[[], Any]) -> int | None:
        """Bytes that `body` needs beside what is there before it."""
        if not self.cuda:
            return None
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        body()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    # --- parts ------------------------------------------------------------------------------------

    def ceilings(self) -> dict[str, float]:
        """Copy bandwidth in TB/s (bytes read and written), matrix products in TFLOP/s."""
        count, side = (1 << 12, 64) if self.quick else (1 << 32, 8192)
        source = torch.empty(count, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        copied = self.milliseconds(lambda s=source, t=target: t.copy_(s), 10)
        found = {"copy_tb_s": 2 * count / copied / 1e9}
        del source, target
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            n = side if dtype == torch.bfloat16 else side // 2
            a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
            name = f"{str(dtype).removeprefix('torch.')}_tflop_s"
            found[name] = 2 * n**3 / self.milliseconds(lambda a=a, b=b: a @ b, 10) / 1e9
        return found

    def inputs(self, shape: Shape, dtype: torch.dtype) -> list[Tensor]:
        """Several sets of features, so that none stays in the cache."""
        sets = []
        for seed in range(1 if self.quick else 3):
            z = make_features("mixture", (min(shape[0], 32), *shape[1:]), seed)
            z = z.repeat(-(-shape[0] // z.shape[0]), 1, 1)[: shape[0]].to(self.device)
            noise = torch.randn(z.shape, device=self.device)  # no image twice
            sets.append((z + 0.1 * noise).to(dtype).requires_grad_())
        return sets

    def step(self, module: nn.Module, sets: list[Tensor], mode: str) -> Callable[[], Tensor]:
        """One step after another on rotating inputs."""
        turn = iter(range(10**9))

        def body() -> Tensor:
            z = sets[next(turn) % len(sets)]
            z.grad = None
            return run(module, z, mode)

        return body

    def ours(self, shape: Shape, dtype: torch.dtype, sets: list[Tensor]) -> dict[str, Any]:
        """Times and memory of dse-ext, and its distance from the ceilings."""
        module = IMPLEMENTATIONS["dse_ext"].build()
        training = self.step(module, sets, "training")
        found: dict[str, Any] = {
            "forward_ms": self.milliseconds(self.step(module, sets, "forward"), 20),
            "training_ms": self.milliseconds(training, 20),
            "extra_peak_bytes": self.extra_peak(training),
            "z_bytes": sets[0].numel() * sets[0].element_size(),
        }
        if self.cuda:
            found["graph_ms"] = self.attempt(f"{shape} graph", lambda: self._graph(module, sets[0]))
            found["kernels"] = self._kernels(training)
        best = min(found["training_ms"], found.get("graph_ms") or found["training_ms"])
        images, positions, dim = shape
        rows = images * positions
        # z read twice and the gradient written once; the second moment, its product, local Grams.
        found["floor_bytes"] = 3 * found["z_bytes"]
        found["flop"] = 3 * rows * dim * dim + 2 * rows * positions * dim
        ceilings = self.results.get("ceilings") or {}
        if "copy_tb_s" in ceilings:
            found["of_copy"] = found["floor_bytes"] / best / 1e9 / ceilings["copy_tb_s"]
            found["of_float64"] = found["flop"] / best / 1e9 / ceilings["float64_tflop_s"]
        return found

    def _graph(self, module: nn.Module, z: Tensor) -> float:
        z.grad = None
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run(module, z, "training")
                z.grad = None
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(module, z, "training")
        found = self.milliseconds(graph.replay, 20)
        z.grad = None
        return found

    def _kernels(self, body: Callable[[], Any]) -> list[dict[str, Any]]:
        """Microseconds and calls of each kernel in one step, the largest first."""
        body()
        torch.cuda.synchronize(self.device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            body()
            torch.cuda.synchronize(self.device)
        rows = [
            {"kernel": e.key[:120], "us": round(e.self_device_time_total, 1), "calls": e.count}
            for e in profile.key_averages()
            if e.self_device_time_total > 0
        ]
        return sorted(rows, key=lambda row: -row["us"])

    def peer(self, name: str, key: str, sets: list[Tensor], compiled: bool = False) -> Any:
        """Training step of a peer on the same inputs."""

        def measure() -> dict[str, Any]:
            module: nn.Module = InFloat32(IMPLEMENTATIONS[key].build())
            small = sets[0][:2].detach().float().requires_grad_()
            run(module, small, "training")  # what is done once, without seconds at full size
            if compiled:
                module = torch.compile(module)
            body = self.step(module, sets, "training")
            repeats, warmup = (1, 0) if key == "lightly" else (5, 2)
            return {
                "training_ms": self.milliseconds(body, repeats, warmup),
                "extra_peak_bytes": self.extra_peak(body),
            }

        return self.attempt(f"{name} {key}{' compiled' if compiled else ''}", measure)

    def _has(self, package: str) -> bool:
        return self.results["machine"].get(package) is not None

    def spectra(self) -> dict[str, Any]:
        """The spectral parts alone, against torch.linalg on matrices that are ready."""
        groups, rows, dim, k = (2, 40, 16, 4) if self.quick else (32, 1568, 1024, 24)
        x = torch.randn(groups, rows, dim, device=self.device)
        labels = torch.randint(k, (groups, rows), device=self.device)
        side = max(rows // k, 2)
        grams = x[:, : k * side].reshape(groups * k, side, dim)
        grams = grams @ grams.mT
        flat = x.flatten(0, 1)
        second = flat.mT @ flat
        ops = dse_ext
        return {
            "shape": [groups, rows, dim, k],
            "cluster_nuclear_norms_ms": self.milliseconds(
                lambda: ops.cluster_nuclear_norms(x, labels, k), 5
            ),
            "eigh_of_clusters_ms": self.milliseconds(lambda: torch.linalg.eigh(grams), 3),
            "svdvals_of_clusters_ms": self.milliseconds(lambda: torch.linalg.svdvals(grams), 3),
            "effective_rank_ms": self.milliseconds(lambda: ops.effective_rank(flat), 5),
            "eigh_of_second_moment_ms": self.milliseconds(lambda: torch.linalg.eigh(second), 3),
            "svdvals_of_features_ms": self.milliseconds(lambda: torch.linalg.svdvals(flat), 1, 0),
        }

    def kmeans(self) -> dict[str, Any]:
        """k-means alone, against flash-kmeans where it is installed (same number of iterations)."""
        groups, rows, dim, k = (2, 40, 16, 4) if self.quick else (32, 1568, 1024, 24)
        iterations = 20
        x = torch.randn(groups, rows, dim, device=self.device, dtype=torch.bfloat16)
        found: dict[str, Any] = {
            "shape": [groups, rows, dim, k],
            "dse_ext_ms": self.milliseconds(
                lambda: dse_ext.kmeans(x, k, max_iters=iterations, tol=1e-30), 5
            ),
        }
        if self._has("flash-kmeans"):
            from flash_kmeans import batch_kmeans_Euclid

            found["flash_kmeans_ms"] = self.attempt(
                "flash-kmeans",
                lambda: self.milliseconds(
                    lambda: batch_kmeans_Euclid(x, n_clusters=k, max_iters=iterations, tol=-1.0), 5
                ),
            )
        return found

    def backbone_step(self, name: str, images: int) -> float:
        """Milliseconds of a bfloat16 training step of a timm backbone, without DSE."""
        import timm

        size = 32 if self.quick else 224
        options: dict[str, Any] = {"img_size": size, "depth": 1} if self.quick else {}
        model = timm.create_model(name, num_classes=0, **options).to(self.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        x = torch.randn(images, 3, size, size, device=self.device)

        def body() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                loss = model(x).float().square().mean()
            loss.backward()
            optimizer.step()

        return self.milliseconds(body, 5)

    def shares(self) -> dict[str, Any]:
        """The regularizer's share of a step of the backbone that has features of that shape."""
        found: dict[str, Any] = {}
        for name, dim in BACKBONES:
            for images in (2,) if self.quick else (256, 128, 64):
                ms = self.attempt(
                    f"{name} at batch {images}",
                    lambda name=name, images=images: self.backbone_step(name, images),
                )
                if ms is None:
                    continue
                sets = self.inputs((images, 4 if self.quick else 196, dim), torch.bfloat16)
                ours = self.milliseconds(
                    self.step(IMPLEMENTATIONS["dse_ext"].build(), sets, "training"), 10
                )
                found[name] = {
                    "images": images,
                    "backbone_ms": ms,
                    "dse_ms": ours,
                    "share": ours / (ours + ms),
                }
                break
        return found

    def all(self) -> dict[str, Any]:
        """Everything, the most important first."""
        self.results["ceilings"] = self.attempt("ceilings", self.ceilings)
        shapes = QUICK_SHAPES if self.quick else SHAPES
        cases = [(shape, name) for name in DTYPES for shape in shapes]
        cases.sort(key=lambda case: case[0] != (256, 196, 1024))
        rows: list[dict[str, Any]] = []
        self.results["cases"] = rows
        kept: list[tuple[dict[str, Any], str, Shape, str]] = []
        for shape, dtype in cases:
            name = f"{shape} {dtype}"
            sets = self.attempt(
                f"{name} inputs", lambda s=shape, t=dtype: self.inputs(s, DTYPES[t])
            )
            if sets is None:
                continue
            row: dict[str, Any] = {"shape": list(shape), "dtype": dtype}
            rows.append(row)
            row["dse_ext"] = self.attempt(
                f"{name} dse-ext", lambda s=shape, t=dtype, z=sets: self.ours(s, DTYPES[t], z)
            )
            row["peers"] = {}
            kept.append((row, name, shape, dtype))
            if len(kept) == 1:
                for key in ("batched", "lightly"):
                    row["peers"][key] = self.peer(name, key, sets)
        self.results["shares"] = self.shares()
        self.results["spectra"] = self.attempt("spectra", self.spectra)
        self.results["kmeans"] = self.attempt("kmeans", self.kmeans)
        for row, name, shape, dtype in kept[1:]:
            sets = self.inputs(shape, DTYPES[dtype])
            for key in ("batched", "lightly"):
                row["peers"][key] = self.peer(name, key, sets)
        # Compiling takes minutes, so it comes last.
        for row, name, shape, dtype in () if self.quick else kept:
            sets = self.inputs(shape, DTYPES[dtype])
            row["peers"]["batched_compiled"] = self.peer(name, "batched", sets, compiled=True)
        return self.results


class _Skipped(Exception):
    """A part that has no result."""


def table(results: dict[str, Any]) -> str:
    """The results as plain text, a line a shape."""
    machine, ceilings = results["machine"], results.get("ceilings") or {}
    lines = [f"{machine['device']}, torch {machine['torch']}"]
    lines.append(
        "ceilings: " + ", ".join(f"{name} {value:.3g}" for name, value in ceilings.items())
    )
    head = f"{'(B, N, d)':<18}{'dtype':<10}{'forward':>9}{'training':>10}{'graph':>9}{'memory':>9}"
    lines.append(head + f"{'batched':>10}{'compiled':>10}{'lightly':>10}{'x lightly':>11}")

    def cell(value: float | None, width: int) -> str:
        return f"{'-' if value is None else format(value, '.4g'):>{width}}"

    for row in results["cases"]:
        ours = row.get("dse_ext") or {}
        peers = row.get("peers") or {}
        times = [
            (peers.get(k) or {}).get("training_ms")
            for k in ("batched", "batched_compiled", "lightly")
        ]
        extra = ours.get("extra_peak_bytes")
        ratio = times[2] / ours["training_ms"] if times[2] and ours.get("training_ms") else None
        lines.append(
            f"{tuple(row['shape'])!s:<18}{row['dtype']:<10}"
            + cell(ours.get("forward_ms"), 9)
            + cell(ours.get("training_ms"), 10)
            + cell(ours.get("graph_ms"), 9)
            + cell(None if extra is None else extra / ours["z_bytes"], 9)
            + "".join(cell(value, 10) for value in times)
            + cell(ratio, 11)
        )
    lines.append("times in milliseconds; memory: extra peak over the size of z")
    for name, share in (results.get("shares") or {}).items():
        lines.append(
            f"{name}, batch {share['images']}: {share['dse_ms']:.3g} of "
            f"{share['dse_ms'] + share['backbone_ms']:.4g} ms, {100 * share['share']:.2f} %"
        )
    lines += [f"left out: {reason}" for reason in results["left_out"]]
    return "\n".join(lines)


def main() -> None:
    """Measures, writes JSON and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it work?")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds for everything")
    options = parser.parse_args()
    bench = Bench(torch.device(options.device), options.quick, options.budget)
    try:
        bench.all()
    finally:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(bench.results, indent=1) + "\n")
    print(table(bench.results))


if __name__ == "__main__":
    main()
