"""Tests of several ranks: ``torchrun --nproc-per-node 2 -m pytest python_tests/distributed``.

Without torchrun nothing is collected here; ``test_torchrun.py`` starts it.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator

import pytest
import torch

collect_ignore_glob = [] if "TORCHELASTIC_RUN_ID" in os.environ else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def process_group() -> Iterator[None]:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    yield
    dist.destroy_process_group()


@pytest.fixture
def rank() -> int:
    return torch.distributed.get_rank()


@pytest.fixture
def world() -> int:
    return torch.distributed.get_world_size()
