"""What `torch.compile` makes of the batched PyTorch peers, within a limit of time."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ParamSpec, TypeVar

import torch

__all__ = ["TimeLimitReached", "compiled", "time_limit"]

P = ParamSpec("P")
R = TypeVar("R")


class TimeLimitReached(BaseException):
    """Raised within `time_limit`. No `Exception`: the compiler handles those itself."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `TimeLimitReached` in the body once the time is over.

    Works where signals reach Python: in the main thread, on POSIX systems. Elsewhere there is no
    limit. A call of native code is not interrupted before it returns.

    Args:
        seconds: The limit.
    """
    if not hasattr(signal, "setitimer") or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def reached(number: int, frame: FrameType | None) -> None:
        raise TimeLimitReached(f"it took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, reached)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """The function compiled with dynamic shapes: the sizes of clusters differ from draw to draw.

    Args:
        function: Any function of tensors.

    Returns:
        A function that compiles when it is first called.
    """
    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # no pool of processes beside what is timed
    # What cannot be compiled runs as it is; the compiler's advice is for those who can follow it.
    for name in ("torch._dynamo", "torch._inductor", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch._dynamo.reset()
    return torch.compile(function, dynamic=True)
