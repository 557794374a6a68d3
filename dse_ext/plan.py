"""What a training step would do on a GPU: kernels, launches and memory, without a GPU.

The figures come from the operators' own host code, run on a tensor without memory while it notes
what it would queue (``csrc/cuda/plan.cu``), so they cannot differ from what happens.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import torch

from dse_ext import ops

__all__ = ["GPUS", "collect", "render"]

GPUS: dict[str, tuple[int, int]] = {
    "a100": (108, 163 << 10),
    "h100": (132, 227 << 10),
    "h200": (132, 227 << 10),
    "b200": (148, 227 << 10),
}
"""Multiprocessors, and bytes of shared memory that a block may have, of GPUs known by name."""

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def collect(
    shape: tuple[int, int, int],
    dtype: str = "bfloat16",
    *,
    gpu: str | None = None,
    variant: str = "regularizer",
    local_clusters: int = 3,
    global_clusters: int = 24,
    group_images: int | None = None,
    normalize: bool = True,
    max_kmeans_iters: int = 20,
    backward: bool = True,
) -> dict[str, Any]:
    """Plan one call of ``dse_components`` and its backward pass.

    Args:
        shape: (B, N, d) of the features.
        dtype: One of float64, float32, bfloat16, float16.
        gpu: A name in :data:`GPUS`; None takes the current CUDA device, else h200.
        variant: As in :func:`dse_ext.dse_components`, like the arguments below.
        local_clusters: Clusters per image.
        global_clusters: Clusters per group of images.
        group_images: Images in a group.
        normalize: Whether rows are L2-normalized.
        max_kmeans_iters: Bound on Lloyd iterations; all of them are queued, and stop on the device.
        backward: Whether a gradient is wanted.

    Returns:
        A dict of plain values: ``gpu``, ``paths`` (how the host decided), ``saved_bytes`` (kept
        between the passes), and ``forward`` and ``backward``, each with ``steps`` (``name``,
        ``grid``, ``threads`` and dynamic ``shared_bytes`` in the order of the stream) and
        ``workspace_bytes``.

    Raises:
        ValueError: If an argument is not accepted.
        RuntimeError: If the package's CUDA library is not there, with the reason.

    Examples:
        >>> from dse_ext import plan
        >>> len(plan.collect((256, 196, 1024))["forward"]["steps"])  # doctest: +SKIP
        208
    """
    if "_cuda" not in ops.LIBRARIES:
        from dse_ext.info import cuda_library_reason

        raise RuntimeError(f"the plan needs the CUDA library, but {cuda_library_reason()}.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    name, (multiprocessors, shared) = _gpu(gpu)
    z = torch.empty(shape, dtype=DTYPES[dtype], device="meta")
    try:
        found: dict[str, Any] = json.loads(
            torch.ops.dse_ext.cuda_plan(
                z, variant, local_clusters, global_clusters, group_images, normalize,
                max_kmeans_iters, backward, multiprocessors, shared,
            )
        )  # fmt: skip
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[0]) from None
    return {"gpu": name, "shape": list(shape), "dtype": dtype, "variant": variant, **found}


def render(plan: dict[str, Any]) -> str:
    """Lay out what :func:`collect` returned as plain text, runs of the same kernel on one line.

    Args:
        plan: What :func:`collect` returned.

    Returns:
        Lines ending in a newline.
    """
    size = torch.Size(plan["shape"]).numel() * DTYPES[plan["dtype"]].itemsize
    lines = [
        f"{tuple(plan['shape'])} {plan['dtype']}, {plan['variant']}, on {plan['gpu']}: "
        f"z takes {_bytes(size)}"
    ]
    lines += [f"  {what}: {path}" for what, path in plan["paths"].items()]
    for name in ("forward", "backward"):
        if name not in plan:
            continue
        steps, workspace = plan[name]["steps"], plan[name]["workspace_bytes"]
        lines.append(f"{name}: {len(steps)} launches, {_bytes(workspace)} of working memory")
        lines.append(f"  {'kernel':<44}{'calls':>6}{'blocks':>10}{'threads':>9}{'shared':>10}")
        for step, calls in _merged(steps):
            blocks = step["grid"][0] * step["grid"][1] * step["grid"][2]
            threads = step["threads"] or "-"
            shared = _bytes(step["shared_bytes"]) if step["threads"] else "-"
            lines.append(
                f"  {step['name']:<44}{calls:>6}{blocks if step['threads'] else '-':>10}"
                f"{threads:>9}{shared:>10}"
            )
    if "backward" in plan:
        lines.append(f"kept between the passes: {_bytes(plan['saved_bytes'])}")
    return "\n".join(lines) + "\n"


def _merged(steps: list[dict[str, Any]]) -> list[tuple[dict[str, Any], int]]:
    """Each kernel once, where it first stands, with its largest launch and the number of calls."""
    calls = Counter(step["name"] for step in steps)
    largest: dict[str, dict[str, Any]] = {}
    for step in steps:
        known = largest.setdefault(step["name"], step)
        if torch.Size(step["grid"]).numel() > torch.Size(known["grid"]).numel():
            largest[step["name"]] = step
    return [(step, calls[name]) for name, step in largest.items()]


def _gpu(name: str | None) -> tuple[str, tuple[int, int]]:
    if name is None and torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(torch.cuda.current_device())
        return facts.name, (facts.multi_processor_count, facts.shared_memory_per_block_optin)
    name = (name or "h200").lower()
    if name not in GPUS:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {name!r}.")
    return name, GPUS[name]


def _bytes(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024 or unit == "MiB":
            break
        count /= 1024  # type: ignore[assignment]
    return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
