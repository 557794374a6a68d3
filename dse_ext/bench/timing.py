"""Times a case: the implementations take turns, so that a slow phase of the machine meets all.

Before anything is timed every implementation runs once, which loads libraries and starts threads:
ours by itself, a peer when its result is compared with ours. A round is one step of each; rounds
run in one order and in the opposite one by turns. Between steps there is a short pause: the threads
of an OpenMP library spin for a while after their work, and each package may bring a library of its
own.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dse_ext.bench.case import Case
from dse_ext.bench.compiled import TimeLimitReached, time_limit
from dse_ext.bench.machine import set_threads
from dse_ext.bench.operation import OURS, Agreement, Contestant
from dse_ext.bench.registry import OPERATIONS

__all__ = [
    "Measurement",
    "Predictor",
    "compile_now",
    "describe",
    "get_ready",
    "measure",
    "one_step",
    "synchronize",
]

_PAUSE = 0.005
_COMPILED_DRAWS = 3


@dataclass
class Measurement:
    """What was found out about a case.

    Attributes:
        case: The case.
        seconds: Seconds of every round, by implementation.
        agreements: How far the peers' results are from ours, by implementation.
        left_out: Why an implementation has no times, by implementation.
        extra_peak_bytes: Extra peak memory of a step, by implementation, where it was measured.
    """

    case: Case
    seconds: dict[str, list[float]] = field(default_factory=dict)
    agreements: dict[str, list[Agreement]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    extra_peak_bytes: dict[str, int] = field(default_factory=dict)

    def disagreement(self, key: str) -> str | None:
        """What a peer computes differently, or None: then its time does not count."""
        wrong = [str(found) for found in self.agreements.get(key, []) if not found.holds]
        return "; ".join(wrong) or None


class Predictor:
    """Guesses how long a step takes from the steps that it was told of, by size of the input."""

    def __init__(self) -> None:
        self._rates: dict[tuple[str, str, str], float] = {}

    def learn(self, case: Case, key: str, seconds: float) -> None:
        """A step of this implementation took so long."""
        rate = seconds / torch.Size(case.shape).numel()
        self._rates[case.operation, case.mode, key] = rate

    def seconds(self, case: Case, key: str) -> float | None:
        """Seconds of a step, None where nothing like it was seen; forward is below training."""
        for mode in (case.mode, "training"):
            if (rate := self._rates.get((case.operation, mode, key))) is not None:
                return rate * torch.Size(case.shape).numel()
        return None


def describe(error: Exception) -> str:
    """An error as one short line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}"


def one_step(contestant: Contestant, case: Case, seed: int) -> float:
    """Seconds of one step."""
    contestant.reset(seed)
    synchronize(case)
    time.sleep(_PAUSE)
    start = time.perf_counter()
    contestant.step()
    synchronize(case)
    return time.perf_counter() - start


def get_ready(case: Case, key: str, x: Tensor) -> tuple[Contestant, list[Agreement]]:
    """An implementation with its inputs, and how far its result is from ours.

    Args:
        case: The case.
        key: The implementation.
        x: The input.

    Returns:
        The contestant and, for peers, what was compared.
    """
    implementation = OPERATIONS[case.operation].implementations[key]
    contestant = implementation.prepare(case, x)  # imports what it needs
    set_threads(case.threads)
    compare = implementation.compare
    return contestant, [] if compare is None else compare(case, x)


def compile_now(
    case: Case, key: str, x: Tensor, seconds: float
) -> tuple[Contestant | None, list[Agreement], str | None]:
    """An implementation that compiles, compiled.

    Args:
        case: The case.
        key: The implementation.
        x: The input.
        seconds: Limit of time.

    Returns:
        As `get_ready`, and why there is no contestant, or None.
    """
    try:
        with time_limit(seconds):
            contestant, agreements = get_ready(case, key, x)
            # Every draw has clusters of other sizes, for which parts are compiled anew.
            for seed in range(_COMPILED_DRAWS):
                contestant.reset(seed)
                contestant.step()
    except TimeLimitReached as reached:
        return None, [], f"the compiler was stopped: {reached}"
    except Exception as error:  # whatever a compiler may raise
        return None, [], f"the compiler failed: {describe(error)}"
    return contestant, agreements, None


def measure(
    case: Case,
    keys: Sequence[str],
    *,
    seconds: float,
    rounds: tuple[int, int] = (2, 7),
    left: Callable[[], float] = lambda: float("inf"),
    predictor: Predictor | None = None,
    found: Measurement | None = None,
    compile_seconds: float = 60.0,
) -> Measurement:
    """Times implementations of a case in turns.

    Args:
        case: The case.
        keys: Implementations, ours among them.
        seconds: No round begins after so many seconds of timing, once the fewest have been run.
        rounds: The fewest and the most rounds.
        left: Seconds until everything has to end. An implementation whose comparison and fewest
            rounds would take longer is left out.
        predictor: What is known of the time of steps; learns from these.
        found: Where results go as they come, so that an interrupted measurement has some.
        compile_seconds: Limit for each implementation that compiles.

    Returns:
        The measurement. An implementation that fails or disagrees is left out, with the reason.
    """
    result = Measurement(case) if found is None else found
    known = Predictor() if predictor is None else predictor
    operation = OPERATIONS[case.operation]
    x = operation.inputs(case)
    ready: dict[str, Contestant] = {}
    for key in keys:
        expected = known.seconds(case, key)
        if expected is not None and (1 + rounds[0]) * expected > left():
            result.left_out[key] = f"no time left: a step takes about {expected:.1f} s"
            continue
        if left() <= 0:
            result.left_out[key] = "no time left"
            continue
        reason: str | None = None
        contestant: Contestant | None = None
        agreements: list[Agreement] = []
        if operation.implementations[key].compiled:
            limit = min(compile_seconds, left())
            contestant, agreements, reason = compile_now(case, key, x, limit)
        else:
            try:
                contestant, agreements = get_ready(case, key, x)
            except (ImportError, RuntimeError, ValueError) as error:
                reason = describe(error)
        result.agreements[key] = agreements
        reason = reason or result.disagreement(key)
        if contestant is None or reason is not None:
            result.left_out[key] = reason or "it was not ready"
            continue
        if not agreements:
            one_step(contestant, case, seed=0)  # the comparison was the others' warm-up
        ready[key] = contestant
    _take_turns(case, ready, result, seconds, rounds, left)
    for key, values in result.seconds.items():
        known.learn(case, key, statistics.median(values))
    return result


def _take_turns(
    case: Case,
    ready: dict[str, Contestant],
    result: Measurement,
    seconds: float,
    rounds: tuple[int, int],
    left: Callable[[], float],
) -> None:
    if OURS not in ready:
        return
    order = list(ready)
    start = time.perf_counter()
    enabled = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds[1]):
            spent = time.perf_counter() - start
            if number >= rounds[0] and spent * (1 + 1 / number) > seconds:
                break
            if number > 0 and left() <= 0:
                break
            for key in order if number % 2 == 0 else order[::-1]:
                time_of_step = one_step(ready[key], case, seed=1000 + number)
                result.seconds.setdefault(key, []).append(time_of_step)
    finally:
        if enabled:
            gc.enable()


def synchronize(case: Case) -> None:
    """Waits for a case's device."""
    device = torch.device(case.device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
