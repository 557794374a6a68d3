"""Shared fixtures: the device under test, threads, seeds, and hypothesis settings."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

import dse_ext  # noqa: F401  (registers the operators)

# Derandomized: a failure in CI is a failure at everyone's desk. No deadline: machines differ.
hypothesis.settings.register_profile(
    "dse_ext",
    deadline=None,
    derandomize=True,
    max_examples=12,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("dse_ext")

if "PYTEST_XDIST_WORKER" in os.environ:
    # One process per core already: more threads would only wait for each other.
    torch.set_num_threads(1)


GPU = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


@pytest.fixture(scope="session", params=["cpu", *GPU])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the library's kernels run: on the CPU and, where there is one, on the GPU too."""
    kind: str = request.param
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


if os.environ.get("DSE_EXT_TEST_KERNELS") == "emulated":
    # Every test of the operators on the CPU runs the CUDA kernels' sources instead: slow, and the
    # most that can be shown without a GPU.
    sys.path.insert(0, str(Path(__file__).parent / "cuda"))
    import emulated

    _FOLDER = tempfile.TemporaryDirectory(prefix="dse-ext-emulated-")
    _REPLACED = emulated.replace_cpu_kernels(Path(_FOLDER.name))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


_SECTIONS = ("CUDA kernels", "Hardening")


class _Summary:
    """Lines that tests have for the end of the output, also where other processes run them."""

    def __init__(self) -> None:
        self.lines: dict[str, list[str]] = {name: [] for name in _SECTIONS}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        for name, line in report.user_properties:
            if name in self.lines:
                self.lines[name].append(str(line))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for name, lines in self.lines.items():
            if lines:
                terminalreporter.section(name)
            for line in lines:
                terminalreporter.write_line(line)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the process that prints
        config.pluginmanager.register(_Summary())
