"""Random calls of the CPU kernels under Address-, UndefinedBehavior- and ThreadSanitizer.

The cases are those of a seed, so many of them as there is time for and no more than CASES: a faster
machine shall not meet cases in CI that nobody has seen. ``DSE_EXT_FUZZ_SECONDS`` and
``DSE_EXT_FUZZ_SEED`` ask for a longer run, without that bound, and for other cases.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
from pathlib import Path

import pytest
import sanitized

SECONDS = float(os.environ.get("DSE_EXT_FUZZ_SECONDS", "18"))
CASES = 3000 if "DSE_EXT_FUZZ_SECONDS" not in os.environ else 10**9
SEED = int(os.environ.get("DSE_EXT_FUZZ_SEED", "0"))
NAMES = {"address": "ASan + UBSan", "thread": "TSan"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sanitized.compiler() is None, reason="needs g++, which is not here"),
]


@functools.cache
def program(kind: str) -> Path:
    return sanitized.build(kind, sanitized.ROOT / "build" / "hardening" / kind)


def run(kind: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        sanitized.command(program(kind), *arguments),
        capture_output=True,
        text=True,
        env=sanitized.environment(kind),
        timeout=SECONDS + 300,
    )


@pytest.mark.parametrize(("kind", "share"), [("address", 1.0), ("thread", 0.4)])
def test_random_calls_are_right_and_clean(
    kind: str, share: float, request: pytest.FixtureRequest
) -> None:
    done = run(kind, "--seconds", SECONDS * share, "--seed", SEED, "--cases", CASES)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-6000:]
    counted = re.search(r"(\d+) cases in ([\d.]+) seconds, 0 failed", output)
    assert counted, output[-6000:]
    assert int(counted.group(1)) > 20
    line = f"{NAMES[kind]}: {counted.group(1)} random calls in {counted.group(2)} s, 0 failed"
    request.node.user_properties.append(("Hardening", f"{line}, no reports (seed {SEED})"))


@pytest.mark.parametrize(
    ("kind", "fault", "report"),
    [
        ("address", "overrun", "heap-buffer-overflow"),
        ("address", "overflow", "signed integer overflow"),
        ("thread", "race", "data race"),
    ],
)
def test_a_planted_fault_is_reported(kind: str, fault: str, report: str) -> None:
    # Two threads race by chance: on a busy machine one may have finished before the other starts.
    for _ in range(10):
        done = run(kind, "--plant", fault)
        if done.returncode != 0:
            break
    assert done.returncode != 0
    assert report in done.stdout + done.stderr
