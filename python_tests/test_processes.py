"""The operators in forked processes, DataLoader workers, Python threads and torch's modes."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable

import pytest
import torch
from features import clustered, generator, random_labels
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import dse_ext


def everything(z: Tensor) -> list[Tensor]:
    """What each operator makes of z, gradients included, from fixed seeds."""
    z = z.detach().clone().requires_grad_()
    results = []
    for variant in ("regularizer", "evaluation", "paper"):
        c = dse_ext.dse_components(z, variant=variant, generator=generator(3))
        results += [*c, *torch.autograd.grad(c.score(), z)]
    labels = random_labels(z.shape[0], z.shape[1], 3)
    norms = dse_ext.cluster_nuclear_norms(z, labels, 3)
    ranks = dse_ext.effective_rank(z)
    results += [norms, ranks, *torch.autograd.grad(norms.sum() + ranks.sum(), z)]
    results += dse_ext.kmeans(z, 4, generator=generator(4))
    return [result.detach() for result in results]


def assert_same_bits(ours: list[Tensor], expected: list[Tensor]) -> None:
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


def images(count: int = 6) -> Tensor:
    """(count, 8, 48, 32): enough work for several threads."""
    return clustered(count * 8, 48, 32).float().reshape(count, 8, 48, 32)


class Scores(Dataset[Tensor]):
    """Every item is the result of operators that run in the worker."""

    def __init__(self, features: Tensor) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, item: int) -> Tensor:
        return torch.cat([r.double().flatten() for r in everything(self.features[item])])


def in_a_new_process(target: Callable[..., None], *args: object) -> None:
    """Runs target, whose child inherits nothing: torch refuses a backward pass in the fork of a
    process in which another test has started threads of autograd's engine."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=args)
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
    assert process.exitcode == 0


def load_scores(start: str) -> None:
    torch.set_num_threads(2)
    scores = Scores(images(4))
    expected = [scores[i] for i in range(len(scores))]  # the parent's threads have been used
    loader = DataLoader(
        scores, batch_size=None, num_workers=2, multiprocessing_context=start, timeout=120
    )
    assert_same_bits(list(loader), expected)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_dataloader_workers(start: str) -> None:
    in_a_new_process(load_scores, start)


def fork_with_one_thread() -> None:
    torch.set_num_threads(2)
    z = clustered(16, 196, 64).float()  # several threads have work
    expected = everything(z)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            # As DataLoader's workers do: OpenMP's threads did not come along, and torch waits for
            # them.
            torch.set_num_threads(1)
            assert_same_bits(everything(z), expected)
            status = 0
        finally:
            os._exit(status)
    watchdog = threading.Timer(120, os.kill, (child, 9))
    watchdog.start()
    _, status = os.waitpid(child, 0)
    watchdog.cancel()
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_with_one_thread() -> None:
    in_a_new_process(fork_with_one_thread)


@pytest.mark.parametrize("torch_threads", [1, 2])
def test_python_threads_call_at_once(torch_threads: int, restore_threads: None) -> None:
    torch.set_num_threads(torch_threads)
    inputs = list(images())
    expected = [everything(z) for z in inputs]
    found: dict[tuple[int, int], list[Tensor]] = {}
    failures: list[BaseException] = []
    start = threading.Barrier(3)

    def work(worker: int) -> None:
        try:
            start.wait()
            for i, z in enumerate(inputs):
                found[worker, i] = everything(z)
        except BaseException as error:  # shown by the test, which a thread cannot fail
            failures.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    for (_, i), results in found.items():
        assert_same_bits(results, expected[i])
    assert len(found) == 3 * len(inputs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], torch.no_grad]) -> None:
    z = clustered(9, 16, 6).float().requires_grad_()
    expected = dse_ext.dse_components(z, generator=generator(0))
    with mode():
        c = dse_ext.dse_components(z, generator=generator(0))
        norms = dse_ext.cluster_nuclear_norms(z, c.local_labels, 3)
        results = [*c, norms, dse_ext.effective_rank(z), *dse_ext.kmeans(z, 3)]
        results.append(dse_ext.DSERegularizer()(z))
    assert not any(result.requires_grad for result in results)
    assert_same_bits(list(c), [value.detach() for value in expected])


def test_inference_tensors_as_input() -> None:
    with torch.inference_mode():
        z = clustered(9, 16, 6).float()
        inside = dse_ext.dse_components(z, generator=generator(0))
    assert z.is_inference()
    outside = dse_ext.dse_components(z, generator=generator(0))
    assert_same_bits(list(outside), list(inside))


def test_deterministic_algorithms_change_nothing() -> None:
    z = images(1)[0]
    expected = everything(z)
    torch.use_deterministic_algorithms(True)
    try:
        # Fills fresh memory with NaN: nothing is read before it is written.
        assert torch.utils.deterministic.fill_uninitialized_memory
        ours = everything(z)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(ours, expected)
