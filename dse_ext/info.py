"""What is installed, how it was built and what was loaded: the facts behind ``dse-ext info``.

A report of a problem should start with this text. Nothing here imports an optional dependency:
versions come from the installed packages' metadata.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from dse_ext import _C, ops
from dse_ext._version import __version__

OPERATORS = ("dse_components", "kmeans", "cluster_nuclear_norms", "effective_rank")
OPTIONAL_PACKAGES = (
    "timm",
    "lightly",
    "torchvision",
    "torchmetrics",
    "scikit-image",
    "scikit-learn",
    "scipy",
    "matplotlib",
    "typer",
    "rich",
)


def collect() -> dict[str, Any]:
    """Collect the facts as plain values that ``json.dumps`` accepts.

    Returns:
        A dict of five dicts or lists:

        * ``versions``: name -> version, None for an optional package that is not installed;
        * ``build``: :func:`dse_ext._C.build_info`;
        * ``libraries``: ``name``, ``path`` and ``sha256`` (its first 16 digits) of each native
          library that was loaded;
        * ``cpu``: ``capability`` (the instruction set that torch uses), ``kernels`` (what the
          kernels of this package use), ``threads``, ``cores``;
        * ``cuda``: ``operators`` (those with CUDA kernels), ``usable`` (whether a call would run
          on a GPU), ``reason`` (why not, or None) and ``devices``.

    Examples:
        >>> from dse_ext import info
        >>> info.collect()["build"]["torch_abi"]
        '2.11'
    """
    return {
        "versions": _versions(),
        "build": dict(_C.build_info()),
        "libraries": _libraries(),
        "cpu": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "kernels": _cpu_kernels(),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        },
        "cuda": _cuda(),
    }


def render(info: dict[str, Any]) -> str:
    """Lay out the facts of :func:`collect` as plain text, one fact a line.

    Args:
        info:
            What :func:`collect` returned.

    Returns:
        Lines of ``name  value`` under headings, ending in a newline.
    """
    build, cuda, cpu = info["build"], info["cuda"], info["cpu"]
    sections: dict[str, dict[str, str]] = {
        "versions": {name: found or "not installed" for name, found in info["versions"].items()},
        "build": {
            "compiler": f"{build['compiler']} {build['compiler_version']}, {build['cxx_standard']}",
            "flags": build["cxx_flags"],
            "torch ABI": f"{build['torch_abi']} and later (built on {build['torch_version']})",
            "CUDA library": (
                f"{build['cuda_compiler']} for {', '.join(build['cuda_archs'])}"
                if build["cuda"]
                else f"none: {build['cuda_reason']}"
            ),
        },
        "loaded": {
            library["name"]: f"{library['path']}  sha256 {library['sha256']}"
            for library in info["libraries"]
        },
        "CPU": {
            "instructions": cpu["capability"],
            "kernels": cpu["kernels"],
            "threads": f"{cpu['threads']} of {cpu['cores']} cores",
        },
        "CUDA": {
            "kernels": ", ".join(cuda["operators"]) or "none",
            "usable": "yes" if cuda["usable"] else f"no: {cuda['reason']}",
            "devices": ", ".join(cuda["devices"]) or "none",
        },
    }
    width = max(len(name) for facts in sections.values() for name in facts)
    lines = []
    for heading, facts in sections.items():
        lines.append(heading)
        lines += [f"  {name:<{width}}  {value}" for name, value in facts.items()]
    return "\n".join(lines) + "\n"


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "dse-ext": __version__,
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        "torch": str(torch.__version__),
        "numpy": importlib.metadata.version("numpy"),
    }
    for name in OPTIONAL_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _libraries() -> list[dict[str, str]]:
    paths = {**ops.LIBRARIES, "_C": Path(_C.__file__)}
    return [
        {
            "name": name,
            "path": str(path),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
        }
        for name, path in paths.items()
    ]


def _cpu_kernels() -> str:
    describe = ctypes.CDLL(str(ops.LIBRARIES["_ops"])).dse_ext_cpu_kernels
    describe.restype = ctypes.c_char_p
    return bytes(describe()).decode()


def _cuda() -> dict[str, Any]:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    operators = [name for name in OPERATORS if has_kernel(f"dse_ext::{name}", "CUDA")]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    reason = _why_no_cuda(count)
    return {
        "operators": operators,
        "usable": reason is None,
        "reason": reason,
        "devices": [torch.cuda.get_device_name(index) for index in range(count)],
    }


def cuda_library_reason() -> str | None:
    """Return why the package's CUDA library is not loaded; None where it is."""
    if "_cuda" in ops.LIBRARIES:
        return None
    build = _C.build_info()
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA"
    if not build["cuda"]:
        return f"the package was built without its CUDA library: {build['cuda_reason']}"
    reason = ops.FAILURES.get("_cuda", "it is not in the package's folder")
    return f"the package's CUDA library was not loaded: {reason}"


def _why_no_cuda(devices: int) -> str | None:
    """Return the first thing that keeps a call from running on a GPU, or None."""
    if (reason := cuda_library_reason()) is not None:
        return reason
    if devices == 0:
        return "torch sees no GPU"
    return None
