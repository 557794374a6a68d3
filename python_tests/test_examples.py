"""Every script in examples/ runs on a CPU in under a minute, and says what it promises to say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

# script -> (modules that it needs, a line of its output)
SCRIPTS = {
    "plain_loop.py": ((), r"best step: \d+; history and checkpoints in"),
    "lightly_dino.py": ((), r"step  11  DINO loss \d+\.\d+  DSE -?\d+\.\d+"),
    "lightning_simsiam.py": (("lightning",), r"dse_monitor/score +-?\d+\.\d+"),
    "huggingface_mae.py": (("transformers", "accelerate"), r"step  20  DSE of the probe images \d"),
    "dinov2_recipe.py": ((), r"step  11  dino \d+\.\d+  ibot \d+\.\d+ .* \(DSE \d+\.\d+"),
    "score_checkpoints.py": ((), r"M_dim \d\.\d+  DSE -?\d+\.\d+  <- choice 1"),
    "ddp.py": ((), r"step   4  loss -?\d+\.\d+  global DSE \d+\.\d+"),
}


def test_no_example_is_forgotten() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == SCRIPTS.keys()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The scripts share the byte code of what they import, wherever the machine keeps none."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    env["PYTHONPYCACHEPREFIX"] = str(tmp_path_factory.mktemp("pycache"))
    root = str(EXAMPLES.parent)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
    return env


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_example(script: str, environment: dict[str, str], tmp_path: Path) -> None:
    needed, line = SCRIPTS[script]
    for module in needed:
        pytest.importorskip(module)
    launcher = TORCHRUN if script == "ddp.py" else []
    ran = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / script)], cwd=tmp_path, env=environment,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    assert re.search(line, ran.stdout), ran.stdout
    assert "nan" not in ran.stdout.lower().split(), ran.stdout
