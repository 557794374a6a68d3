"""Shared fixtures: the device under test, threads, seeds, and hypothesis settings."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

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


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the library's kernels run; ``DSE_EXT_TEST_DEVICE=cuda`` runs the same tests there."""
    return torch.device(os.environ.get("DSE_EXT_TEST_DEVICE", "cpu"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
