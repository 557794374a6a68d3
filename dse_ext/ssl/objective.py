"""Loss plus regularizer: one backward pass, with the regularizer's share of the time known."""

from __future__ import annotations

import time
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


def backward(output: MethodOutput, regularizer: DSERegularizer | None) -> Regularized:
    """Backpropagates L = L_ssl − β · DSE.

    The regularizer runs forward and backward on a detached copy of the patch tokens, and its
    gradient enters the network's backward pass where the tokens are. By the chain rule this is
    the gradient of the sum, with no work done twice, and both passes of the regularizer are
    timed alone. What is not counted is the network's own backward pass from the tokens down,
    which the method's loss needs as well.

    Args:
        output: Loss and patch tokens of a forward pass.
        regularizer: A :class:`dse_ext.DSERegularizer`; None leaves the loss as it is.

    Returns:
        Values for the log.
    """
    tokens = output.patch_tokens
    if regularizer is None:
        output.loss.backward()
        return Regularized(float(output.loss.detach()), 0.0, {}, 0.0)
    start = _now(tokens.device)
    leaf = tokens.detach().requires_grad_()
    penalty = regularizer(leaf)
    penalty.backward()
    seconds = _now(tokens.device) - start
    torch.autograd.backward([output.loss, tokens], [None, leaf.grad])
    last = regularizer.last
    assert last is not None  # set by the call above
    components = {
        "m_inter": float(last.m_inter),
        "m_intra_image": float(last.m_intra_image),
        "m_intra_batch": float(last.m_intra_batch),
        "m_dim": float(last.m_dim),
        "dse": float(last.score()),
    }
    return Regularized(float(output.loss.detach()), float(penalty.detach()), components, seconds)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
