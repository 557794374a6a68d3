"""Extra peak memory of one step: on a CPU measured from outside PyTorch.

`extra_peak_bytes` is what the benchmarks call; for a CPU it runs this module as a program.

The step runs in a process of its own. There, the input is made and a tiny step has loaded every
library and started every thread; then the kernel's high-water mark of the resident set is reset
(by writing 5 to /proc/self/clear_refs), one step runs, and the difference between the new
high-water mark (VmHWM) and the resident set before the step (VmRSS) is the extra peak memory. It
includes the gradient, which is as large as the input, and everything that native code allocates.
glibc is told to hand freed blocks back at once (it would otherwise keep some, depending on the
history of the process), so that the mark is that of memory in use. The kernel's counters are
exact to some hundred KiB.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dse_ext.bench.case import Case

__all__ = ["extra_peak_bytes"]


def extra_peak_bytes(
    implementation: str, cases: Sequence[Case], timeout: float | None = None
) -> dict[Case, int | None]:
    """Extra peak memory of a step of every case, all on one device.

    Args:
        implementation: A key of the cases' operations.
        cases: The cases.
        timeout: Seconds for all of them.

    Returns:
        Bytes per case, None where the kernel does not let a process reset its high-water mark.

    Raises:
        RuntimeError: If a step fails.
        subprocess.TimeoutExpired: If it takes longer.
    """
    if not cases:
        return {}
    if cases[0].device.startswith("cuda"):
        return {case: _on_gpu(implementation, case) for case in cases}
    command = [sys.executable, "-m", "dse_ext.bench.memory", "--implementation", implementation]
    for case in cases:
        command += ["--case", json.dumps(case.to_dict())]
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise RuntimeError(f"measuring the memory of {implementation} failed: {last}")
    return dict(zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True))


def _on_gpu(implementation: str, case: Case) -> int:
    """What PyTorch's allocator hands out beyond what was there before the step."""
    import torch

    from dse_ext.bench.registry import OPERATIONS

    operation = OPERATIONS[case.operation]
    contestant = operation.implementations[implementation].prepare(case, operation.inputs(case))
    for seed in range(2):  # the first one loads libraries, which have workspaces of their own
        contestant.reset(seed)
        torch.cuda.synchronize(case.device)
        torch.cuda.reset_peak_memory_stats(case.device)
        before = torch.cuda.memory_allocated(case.device)
        contestant.step()
        torch.cuda.synchronize(case.device)
    return torch.cuda.max_memory_allocated(case.device) - before


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    if match is None:
        raise OSError(f"/proc/self/status has no {field}.")
    return 1024 * int(match.group(1))


def _hand_back_freed_blocks() -> None:
    """Makes glibc map every large block by itself and unmap it when it is freed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # Other C libraries have no such call.
        trim_threshold, mmap_threshold = -1, -3  # From malloc.h.
        mallopt(mmap_threshold, 128 * 1024)
        mallopt(trim_threshold, 0)


def _measure_here(implementation: str, case: Case) -> int | None:
    """The measurement itself, in a process that has done nothing but import."""
    _hand_back_freed_blocks()
    from dse_ext.bench.machine import set_threads
    from dse_ext.bench.registry import OPERATIONS

    operation = OPERATIONS[case.operation]
    prepare = operation.implementations[implementation].prepare
    tiny = case.tiny()
    small = prepare(tiny, operation.inputs(tiny))
    set_threads(case.threads)
    small.reset(0)
    small.step()
    contestant = prepare(case, operation.inputs(case))
    contestant.reset(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        contestant.step()
        return _resident("VmHWM") - before
    except OSError:
        return None


def _in_a_fork(implementation: str, case: Case) -> int | None:
    """Runs the measurement in a child, so that no case inherits the memory of another one.

    Importing takes seconds, a fork milliseconds. It is safe here because the parent has imported
    modules only: it has started no thread.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with os.fdopen(write_end, "w") as pipe:
                json.dump(_measure_here(implementation, case), pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        answer = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != 0:
        raise RuntimeError(f"measuring {implementation} at {case} ended with status {status}.")
    extra: int | None = json.loads(answer)
    return extra


def _case(text: str) -> Case:
    return Case.from_dict(json.loads(text))


def main() -> None:
    """Prints a JSON list of bytes, one per case."""
    from dse_ext.bench.registry import OPERATIONS

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--implementation", required=True)
    parser.add_argument("--case", required=True, action="append", type=_case, metavar="JSON")
    options = parser.parse_args()
    for case in options.case:
        implementation = OPERATIONS[case.operation].implementations[options.implementation]
        if implementation.needs is not None:
            importlib.import_module(implementation.needs[0])
    print(json.dumps([_in_a_fork(options.implementation, case) for case in options.case]))


if __name__ == "__main__":
    main()
