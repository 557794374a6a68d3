"""Starts the tests of several ranks under torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

DIES_BEFORE_THE_CALL = """
import torch, torch.distributed as dist, dse_ext
dist.init_process_group("gloo")
if dist.get_rank() == 1:
    raise SystemExit("the data loader of rank 1 gave up")
dse_ext.DSERegularizer(process_group="world")(torch.randn(2, 4, 8))
"""


def torchrun(*arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         *arguments],
        cwd=HERE.parent, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=timeout, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip


def test_two_ranks() -> None:
    ran = torchrun("-m", "pytest", str(HERE / "distributed"), "-x", "-p", "no:cacheprovider",
                   timeout=180)  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    # Both ranks report, and both have run something.
    passed = [int(count) for count in re.findall(r"(\d+) passed", ran.stdout)]
    assert len(passed) == 2, ran.stdout
    assert passed[0] == passed[1] > 0, ran.stdout


def test_a_rank_that_dies_ends_the_others(tmp_path: Path) -> None:
    script = tmp_path / "dies.py"
    script.write_text(DIES_BEFORE_THE_CALL)
    ran = torchrun(str(script), timeout=60)
    assert ran.returncode != 0
    assert "the data loader of rank 1 gave up" in ran.stdout
