"""Facts about the machine, its memory and its threads."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from dse_ext.bench import machine
from dse_ext.bench.case import Case
from dse_ext.bench.memory import extra_peak_bytes
from dse_ext.bench.registry import OPERATIONS
from dse_ext.bench.share import BACKBONES


def test_facts_name_what_decides_the_figures():
    facts = machine.facts("cpu", 1)
    assert facts["cpu"]
    assert facts["torch"] == torch.__version__
    assert {"lightly", "scikit-learn", "faiss-cpu", "scipy", "timm"} <= facts.keys()
    assert "gpu" not in facts


def test_a_package_that_is_not_there_has_no_version():
    assert machine.version("no-such-distribution") is None
    assert machine.version("torch") is not None


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:     2048 kB\n"}, 2 << 20),
        ({
            "/proc/meminfo": "MemAvailable: 4096 kB\n",
            "/sys/fs/cgroup/memory.max": "3145728\n",
            "/sys/fs/cgroup/memory.current": "1048576\n",
        }, 2 << 20),
        ({
            "/proc/meminfo": "MemAvailable: 4096 kB\n",
            "/sys/fs/cgroup/memory.max": "max\n",
            "/sys/fs/cgroup/memory.current": "1048576\n",
        }, 4 << 20),
        ({
            "/proc/meminfo": "MemAvailable: 4096 kB\n",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": "1048576\n",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes": "1048577\n",
        }, 0),
    ],
)  # fmt: skip
def test_memory_is_what_the_system_and_the_container_leave(files, expected, monkeypatch):
    monkeypatch.setattr(machine, "_text", lambda path: files.get(path, ""))
    assert machine.available_bytes("cpu") == expected


def test_threads_reach_every_library():
    pytest.importorskip("sklearn")
    from threadpoolctl import threadpool_info

    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            machine.set_threads(threads)
            assert torch.get_num_threads() == threads
            assert {pool["num_threads"] for pool in threadpool_info()} == {threads}
    finally:
        machine.set_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("operation", "shape", "key"),
    [
        ("dse_components", (8, 256, 256), "batched"),
        ("dse_components", (2, 64, 1024), "dse_ext"),
        ("effective_rank", (2048, 512), "eigh"),
    ],
)
def test_the_estimate_of_memory_is_above_what_is_used(operation, shape, key):
    case = Case(operation, shape)
    used = extra_peak_bytes(key, [case])[case]
    if used is None:
        pytest.skip("this kernel does not let a process reset its high-water mark")
    values = torch.Size(shape).numel()
    # Without the constant part, which is for small inputs.
    assert used + 4 * values < OPERATIONS[operation].bytes_needed(case) - (64 << 20)


def test_backbones_are_of_the_sizes_that_are_known():
    timm = pytest.importorskip("timm")
    for backbone in BACKBONES.values():
        with torch.device("meta"):
            model = timm.create_model(backbone.name, num_classes=0)
        count = sum(parameter.numel() for parameter in model.parameters())
        assert backbone.parameters == pytest.approx(count, rel=0.1)
        assert (model.embed_dim, len(model.blocks)) == (backbone.dim, backbone.depth)
        assert model.blocks[0].attn.num_heads == backbone.heads
        assert backbone.bytes_needed(64) > 20 * count


def test_the_cpu_has_a_name_without_proc(monkeypatch):
    def fails(self):
        raise OSError

    monkeypatch.setattr(Path, "read_text", fails)
    assert machine.cpu_name()
