"""Everything that needs a GPU, in one command: `make gpu-check OUT=dir`.

Builds the package in place for the GPU that is there, runs the tests on it, runs small calls under
compute-sanitizer, measures against the peers, and writes into OUT

* `gpu-check.json`: the steps with their outcome, and the measurements;
* `gpu-check.txt`: the short table that is printed last;
* a log of each step.

Takes less than ten minutes and no network: it uses the Python that runs it, with torch >= 2.11,
nvcc, pybind11, ninja, pytest and hypothesis (timm, lightly and flash-kmeans are measured where they
are installed). A step that fails or runs out of time does not keep the next ones from running; the
exit status is that of the worst. `--device cpu` goes through the same steps at tiny sizes without
the sanitizer, to see that the check itself works.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Step:
    """The outcome of one step."""

    name: str
    passed: bool
    seconds: float
    summary: str


class Check:
    """Runs steps one after the other, each with a log and a limit in seconds."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.steps: list[Step] = []
        out.mkdir(parents=True, exist_ok=True)

    def run(
        self, name: str, command: list[str], limit: float, summary: str, **variables: str
    ) -> bool:
        """Runs a command; `summary` is a pattern for the line of its output that says it all."""
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **variables}
        log = self.out / f"{name.replace(' ', '-')}.log"
        with log.open("w") as stream:
            try:
                status = subprocess.run(
                    command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT,
                    timeout=limit, check=False,
                ).returncode  # fmt: skip
                outcome = f"exit status {status}"
            except subprocess.TimeoutExpired:
                status, outcome = -1, f"stopped after {limit:.0f} s"
            except OSError as error:
                status, outcome = -1, str(error)
        found = re.findall(summary, log.read_text(errors="replace"), re.MULTILINE)
        line = found[-1].strip(" =") if found else outcome
        if status == -1 and found:
            line += f" ({outcome})"
        self.steps.append(Step(name, status == 0, round(time.monotonic() - start, 1), line))
        print(f"  {'passed' if status == 0 else 'FAILED'}: {line}", flush=True)
        return status == 0

    def skip(self, name: str, reason: str) -> None:
        """Notes a step that could not be made."""
        self.steps.append(Step(name, True, 0.0, f"left out: {reason}"))
        print(f"{name}: left out: {reason}", flush=True)


def local_architecture() -> str | None:
    """The compute capability of the GPU that is there, as TORCH_CUDA_ARCH_LIST has it."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def sanitizer() -> str | None:
    """compute-sanitizer, from the PATH or from the toolkit."""
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )


#: Tests of the ordinary suite whose `device` fixture also runs on the GPU.
TESTS = [
    f"python_tests/test_{part}.py"
    for part in (
        "strides",
        "components",
        "degenerate",
        "kmeans",
        "ops",
        "spectral_ops",
        "gradcheck",
    )
]


def sanitize(checks: Check, small: list[str], device: str, left: Callable[[float], float]) -> None:
    """compute-sanitizer's memcheck and racecheck on small calls."""
    tool = sanitizer()
    if device != "cuda" or tool is None:
        reason = "needs a GPU" if device != "cuda" else "compute-sanitizer is not here"
        checks.skip("memcheck", reason)
        checks.skip("racecheck", reason)
        return
    for name, shapes in (("memcheck", "4"), ("racecheck", "2")):
        checks.run(
            name,
            [tool, "--tool", name, "--error-exitcode", "9", *small, "--shapes", shapes],
            min(left(0.2), 90.0),
            r"^=+ (?:ERROR SUMMARY|RACECHECK SUMMARY).*$",
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )


def benchmark(checks: Check, device: str, limit: float) -> dict[str, Any]:
    """The measurements, as far as they came within the limit in seconds."""
    results = checks.out.resolve() / "measured.json"
    quick = [] if device == "cuda" else ["--device", "cpu", "--quick"]
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(results), *quick]
    checks.run(
        "benchmarks", [*command, "--budget", f"{limit - 15:.0f}"], limit + 30, r"^.*, torch .*$"
    )
    found: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    return found


def check(out: Path, device: str, budget: float) -> int:
    """Runs all steps; returns the exit status."""
    checks = Check(out)
    python = sys.executable
    start = time.monotonic()
    architecture = local_architecture() if device == "cuda" else None
    if device == "cuda" and architecture is None:
        print("torch sees no GPU: there is nothing to check", file=sys.stderr)
        return 2

    def left(share: float) -> float:
        return max(20.0, share * (budget - (time.monotonic() - start)))

    build = {"DSE_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture} if architecture else {}
    built = checks.run(
        "build",
        [python, "setup.py", "build_ext", "--inplace"],
        left(0.4),
        r"^dse-ext: .*CUDA library.*$",
        **build,
    )
    measured: dict[str, Any] = {}
    if built:
        # First a short look at memory, so that a kernel that corrupts it is known before all else.
        small = [python, "tools/gpu_small.py", "--device", device]
        checks.run("small calls", small, left(0.1), r"^\d+ calls.*$")
        sanitize(checks, small, device, left)
        measured = benchmark(checks, device, left(0.5))
        tests = ["python_tests/gpu", *TESTS, "-m", "gpu"] if device == "cuda" else TESTS[:1]
        checks.run(
            "tests",
            [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
            left(1.0),
            r"^.*(?:passed|failed|error|no tests ran).*$",
        )
    report = {
        "steps": [asdict(step) for step in checks.steps],
        "seconds": round(time.monotonic() - start, 1),
        "host": platform.processor() or platform.machine(),
        **measured,
    }
    (out / "gpu-check.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = []
    log = out / "benchmarks.log"
    if measured and log.exists():
        text = log.read_text()
        at = text.rfind("\n" + measured["machine"]["device"])
        lines.append(text[at + 1 :] if at >= 0 else text[-4000:])
    lines += [
        f"{'passed' if s.passed else 'FAILED':<7}{s.name:<12}{s.seconds:>7.1f} s  {s.summary}"
        for s in checks.steps
    ]
    text = "\n".join(lines) + "\n"
    (out / "gpu-check.txt").write_text(text)
    print("\n" + text)
    return 0 if all(step.passed for step in checks.steps) else 1


def main() -> None:
    """Runs the check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything")
    options = parser.parse_args()
    sys.exit(check(options.out, options.device, options.budget))


if __name__ == "__main__":
    main()
