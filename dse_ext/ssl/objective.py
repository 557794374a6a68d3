"""Loss plus regularizer: one backward pass, with the regularizer's share of the time known."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from dse_ext.regularizer import DSERegularizer
from dse_ext.ssl.methods.base import MethodOutput


class Regularized(NamedTuple):
    """What one backward pass left behind besides the gradients.

    Attributes:
        ssl_loss: The method's own loss.
        dse_loss: −β · DSE; 0 without a regularizer.
        components: Components of DSE by name; empty without a regularizer.
        seconds: Wall time of the regularizer's forward and backward pass.
    """

    ssl_loss: float
    dse_loss: float
    components: dict[str, float]
    seconds: float

    @property
    def loss(self) -> float:
        """The whole objective."""
        return self.ssl_loss + self.dse_loss


def backward(
    output: MethodOutput,
    regularizer: DSERegularizer | None,
    *,
    scale: float = 1.0,
    views: int = 0,
) -> Regularized:
    """Backpropagates L = L_ssl − β · DSE.

    The regularizer runs forward and backward on a detached copy of the patch tokens, and its
    gradient enters the network's backward pass where the tokens are. By the chain rule this is
    the gradient of the sum, with no work done twice, and both passes of the regularizer are
    timed alone. What is not counted is the network's own backward pass from the tokens down,
    which the method's loss needs as well.

    Args:
        output: Loss and patch tokens of a forward pass.
        regularizer: A :class:`dse_ext.DSERegularizer`; None leaves the loss as it is.
        scale: Factor of the gradients, for float16 and for parts of a batch.
        views: Number of views whose tokens are regularized; 0 for all.

    Returns:
        Values for the log, not scaled.
    """
    loss, tokens = output.loss, output.patch_tokens
    scaled = loss if scale == 1 else loss * scale
    if regularizer is None:
        scaled.backward()
        return Regularized(float(loss.detach()), 0.0, {}, 0.0)
    if 0 < views < output.views:
        tokens = tokens[: views * (len(tokens) // output.views)]
    start = _now(tokens.device)
    leaf = tokens.detach().requires_grad_()
    penalty = regularizer(leaf)
    # Scaled before the gradient is rounded to the tokens' precision.
    (penalty if scale == 1 else penalty * scale).backward()
    seconds = _now(tokens.device) - start
    torch.autograd.backward([scaled, tokens], [None, leaf.grad])
    last = regularizer.last
    assert last is not None  # set by the call above
    components = {
        "m_inter": float(last.m_inter),
        "m_intra_image": float(last.m_intra_image),
        "m_intra_batch": float(last.m_intra_batch),
        "m_dim": float(last.m_dim),
        "dse": float(last.score(regularizer.dim_weight)),
    }
    return Regularized(float(loss.detach()), float(penalty.detach()), components, seconds)


def mean(parts: Sequence[Regularized]) -> Regularized:
    """The values of a batch that was worked on in parts; their times are added.

    Args:
        parts: Values of equal parts.
    """
    if len(parts) == 1:
        return parts[0]
    names = parts[0].components
    return Regularized(
        sum(part.ssl_loss for part in parts) / len(parts),
        sum(part.dse_loss for part in parts) / len(parts),
        {name: sum(part.components[name] for part in parts) / len(parts) for name in names},
        sum(part.seconds for part in parts),
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
