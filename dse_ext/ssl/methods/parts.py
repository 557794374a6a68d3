"""Small parts that several methods are composed of."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dse_ext.ssl.backbone import DenseBackbone, Encoded


def teacher_of(student: nn.Module, make: Callable[[], nn.Module] | None = None) -> nn.Module:
    """A copy of a network that is not trained but follows it, see :func:`follow`.

    Args:
        student: The network.
        make: Creates a network of the same architecture, for those that cannot be deep-copied
            (weight-normalized layers).

    Returns:
        The copy, without gradients, dropout and stochastic depth.
    """
    from lightly.models.utils import deactivate_requires_grad
    from timm.layers.drop import DropPath

    if make is None:
        teacher = copy.deepcopy(student)
    else:
        teacher = make()
        teacher.load_state_dict(student.state_dict())
    deactivate_requires_grad(teacher)
    for module in teacher.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, DropPath):
            module.drop_prob = 0.0
    return teacher


def follow(
    pairs: Iterable[tuple[nn.Module, nn.Module]], step: int, steps: int, momentum: float
) -> None:
    """Moves teachers towards their students: θ_t ← m θ_t + (1 − m) θ_s.

    Args:
        pairs: Students and their teachers.
        step: Number of optimizer steps done before this one.
        steps: Number of steps of the run.
        momentum: m at the first step; rises to 1 along a cosine.
    """
    from lightly.models.utils import update_momentum
    from lightly.utils.scheduler import cosine_schedule

    m = cosine_schedule(step, steps, momentum, 1.0)
    for student, teacher in pairs:
        update_momentum(student, teacher, m)


def full_precision(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Calls a loss in float32, whatever autocast the networks ran under.

    Losses exponentiate, sum over thousands of prototypes or subtract means, which half precision
    turns into infinities and zeros.

    Args:
        function: The loss.
        *args: Its arguments; tensors, also within lists and tuples, are converted.
        **kwargs: Keyword arguments, handed over as they are.

    Returns:
        Its result as a 0-dim tensor.
    """
    device = next(tensor.device for tensor in _tensors(args))
    with torch.autocast(device.type, enabled=False):
        return function(*(_float(argument) for argument in args), **kwargs).reshape(())


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _float(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        items = [_float(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def encode_crops(backbone: DenseBackbone, views: list[Tensor]) -> tuple[Encoded, Tensor]:
    """Encodes two global views and any number of small ones.

    Views of one size go through the network together.

    Args:
        backbone: The network.
        views: Global views first.

    Returns:
        The encoding of both global views, one after the other, and the image vectors of all
        views ``(views * B, d)``.
    """
    encoded = backbone.encode(torch.cat(views[:2]))
    if len(views) == 2:
        return encoded, encoded.pooled
    return encoded, torch.cat([encoded.pooled, backbone.encode(torch.cat(views[2:])).pooled])


def info_nce(queries: Tensor, keys: Tensor, negatives: Tensor | None, temperature: float) -> Tensor:
    """Cross-entropy of telling each query's own key from other images' keys.

    Eq. 1 of "Momentum Contrast for Unsupervised Visual Representation Learning", 2019,
    https://arxiv.org/abs/1911.05722.

    Args:
        queries: ``(B, d)``.
        keys: ``(B, d)``; the i-th is the positive of the i-th query.
        negatives: Further keys ``(K, d)``; None takes the keys of the other images of the batch.
        temperature: τ.

    Returns:
        The loss, 0-dim.
    """
    queries, keys = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    if negatives is None:
        logits = queries @ keys.T
        labels = torch.arange(len(queries), device=queries.device)
    else:
        positives = (queries * keys).sum(dim=1, keepdim=True)
        logits = torch.cat([positives, queries @ F.normalize(negatives, dim=1).T], dim=1)
        labels = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
    return F.cross_entropy(logits / temperature, labels)


def memory_bank(size: int, dim: int) -> Any:
    """A ring buffer of past features, as part of the state that a resumed run starts from.

    Args:
        size: Number of features.
        dim: Their length.

    Returns:
        lightly's memory bank; called with ``update=True`` it gives what it held before and keeps
        the given features.
    """
    from lightly.models.modules.memory_bank import MemoryBankModule

    return persistent(MemoryBankModule(size=(size, dim), feature_dim_first=False))


def persistent(bank: Any) -> Any:
    """Makes the buffers of a memory bank of lightly part of its ``state_dict``."""
    for name, buffer in list(bank.named_buffers(recurse=False)):
        bank.register_buffer(name, buffer)
    return bank
