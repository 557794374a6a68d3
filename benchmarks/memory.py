"""Extra peak memory of one training step, measured from outside PyTorch.

`measure` is what the benchmarks call; it runs this module as a program.

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
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

Shape = tuple[int, int, int]


def measure(implementation: str, shapes: Sequence[Shape]) -> dict[Shape, int | None]:
    """Extra peak memory in bytes of a training step at every shape.

    Args:
        implementation: A key of `benchmarks.cases.IMPLEMENTATIONS`.
        shapes: Shapes (B, N, d) of the features.

    Returns:
        Bytes per shape, None where the kernel does not let a process reset its high-water mark.
    """
    command = [sys.executable, "-m", "benchmarks.memory", "--implementation", implementation]
    for shape in shapes:
        command += ["--shape", ",".join(map(str, shape))]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    return dict(zip(shapes, json.loads(done.stdout.splitlines()[-1]), strict=True))


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


def _measure_here(implementation: str, shape: Shape) -> int | None:
    """The measurement itself, in a process that has done nothing but import."""
    _hand_back_freed_blocks()
    import torch

    from benchmarks.cases import IMPLEMENTATIONS, THREADS, make_features, run

    torch.set_num_threads(THREADS)
    module = IMPLEMENTATIONS[implementation].build()
    run(module, make_features("mixture", (9, 16, 32)).requires_grad_(), "training")
    z = make_features("mixture", shape).requires_grad_()
    torch.manual_seed(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        run(module, z, "training")
        return _resident("VmHWM") - before
    except OSError:
        return None


def _in_a_fork(implementation: str, shape: Shape) -> int | None:
    """Runs the measurement in a child, so that no shape inherits the memory of another one.

    Importing takes seconds, a fork milliseconds. It is safe here because the parent has imported
    modules only: it has started no thread.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with os.fdopen(write_end, "w") as pipe:
                json.dump(_measure_here(implementation, shape), pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        answer = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != 0:
        raise RuntimeError(f"measuring {implementation} at {shape} ended with status {status}.")
    extra: int | None = json.loads(answer)
    return extra


def _shape(text: str) -> Shape:
    try:
        images, positions, dim = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be B,N,d, got {text!r}") from None
    return images, positions, dim


def main() -> None:
    """Prints a JSON list of bytes, one per shape."""
    from benchmarks.cases import IMPLEMENTATIONS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--implementation", required=True, choices=list(IMPLEMENTATIONS))
    parser.add_argument("--shape", required=True, action="append", type=_shape, metavar="B,N,d")
    options = parser.parse_args()
    IMPLEMENTATIONS[options.implementation].build()
    print(json.dumps([_in_a_fork(options.implementation, shape) for shape in options.shape]))


if __name__ == "__main__":
    main()
