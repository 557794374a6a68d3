"""The effective rank on both sides of the limits between its float32 and float64 ways."""

from __future__ import annotations

import oracle
import pytest
import torch
from features import generator, orthogonal, random_labels
from parity import FLAT_GRADIENT, library, relative_error
from torch import Tensor

M_DIM = (0.0, 0.0, 0.0, 1.0, 0.0)

# (B, N, d): more rows than features, and a Gram matrix too large for the small eigensolver.
SHAPE = (5, 200, 192)


def power_law(exponent: float, offset: float) -> Tensor:
    """Rows whose covariance has eigenvalues k^-exponent, around a mean of length ``offset``."""
    b, n, d = SHAPE
    spectrum = torch.arange(1, d + 1, dtype=torch.float64).pow(-exponent / 2)
    rows = torch.randn(b, n, d, generator=generator(3), dtype=torch.float64) * spectrum
    rows[..., 0] += offset
    return (rows @ orthogonal(d, seed=4).double()).float()


# A flat spectrum takes float32 all the way; a dominant mean spoils the condition number, so that
# the eigenvectors are float64; the steep ones are float64 throughout.
@pytest.mark.parametrize("offset", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0])
def test_effective_rank_of_power_laws(exponent: float, offset: float) -> None:
    z = power_law(exponent, offset)
    local, groups = random_labels(5, 200, 3), random_labels(5, 200, 4)
    options = {"local_labels": local, "global_labels": groups, "global_clusters": 4}
    ours, _ = library(z, M_DIM, **options)
    wanted = z.double().requires_grad_()
    value = oracle.effective_rank(oracle.normalized(wanted).reshape(-1, 192)) / 192
    (gradient,) = torch.autograd.grad(value, wanted)
    assert relative_error(ours.components[3], value) <= 1e-6
    assert relative_error(ours.gradient, gradient) <= FLAT_GRADIENT
