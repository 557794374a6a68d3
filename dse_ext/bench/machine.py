"""Facts about the machine: what results are kept with, and what fits into it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

from dse_ext._version import __version__

__all__ = ["available_bytes", "cpu_name", "facts", "set_threads"]

PEERS = ("lightly", "scikit-learn", "faiss-cpu", "scipy", "timm")
"""Distributions whose versions decide the figures."""


def cpu_name() -> str:
    """The model name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def version(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def facts(device: str, threads: int) -> dict[str, Any]:
    """What decides the figures.

    Args:
        device: Where everything runs.
        threads: Threads of every implementation.

    Returns:
        Plain values: CPU, instruction set, cores, GPU where it is used, threads, versions.
    """
    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "device": device,
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dse_ext": __version__,
    }
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found | {name: version(name) for name in PEERS}


def set_threads(threads: int) -> None:
    """Gives every library that was imported the same number of threads.

    PyTorch and faiss have calls of their own; the OpenMP and BLAS libraries that scikit-learn and
    scipy bring along are found by threadpoolctl, which scikit-learn depends on.
    """
    if importlib.util.find_spec("threadpoolctl") is not None:
        from threadpoolctl import threadpool_limits

        threadpool_limits(limits=threads)
    if "faiss" in sys.modules:
        sys.modules["faiss"].omp_set_num_threads(threads)
    torch.set_num_threads(threads)  # last: threadpool_limits sees torch's OpenMP too


def available_bytes(device: str) -> int | None:
    """Memory that a measurement may use now: of the GPU, or of this process and its containers.

    Returns:
        Bytes, None where the system does not tell.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [value for value in (_of_the_system(), _of_the_control_group()) if value is not None]
    return min(found) if found else None


def _of_the_system() -> int | None:
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", _text("/proc/meminfo"), re.MULTILINE)
        if match is not None:
            return 1024 * int(match.group(1))
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def _of_the_control_group() -> int | None:
    """What a container's limit leaves; None where there is no limit."""
    for folder, limit, usage in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        allowed, used = _text(f"{folder}/{limit}").strip(), _text(f"{folder}/{usage}").strip()
        if allowed.isdigit() and used.isdigit():
            return max(int(allowed) - int(used), 0)
    return None


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
