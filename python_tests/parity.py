"""Compare the library's components and gradients with the oracle's, at the stated tolerances."""

from __future__ import annotations

from dataclasses import dataclass

import oracle
import torch
from torch import Tensor

import dse_ext
from dse_ext import info

# Coefficients of (m_inter, m_intra_image, m_intra_batch, m_dim, avg_norm).
SCORE = (1.0, -0.5, -0.5, 1.0, 0.0)
MIXED = (0.7, -1.3, 0.9, 0.4, 1.1)
#: Whether the CPU's large products are 16-bit (csrc/cpu/short_products.h), and what gradients of
#: flat spectra are then accurate to, in float32.
SHORT_PRODUCTS = "16-bit" in info.collect()["cpu"]["kernels"]
FLAT_GRADIENT = 6e-4 if SHORT_PRODUCTS else 3e-4
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tolerance:
    component: float  # relative
    gradient: float  # norm of the difference over the norm of the gradient


def tolerance(dtype: torch.dtype, collapsed: bool = False) -> Tolerance:
    """The project's promise for an input dtype; ``collapsed``: spread 1e-3, or a lost rank."""
    if dtype == torch.float64:
        return Tolerance(1e-9, 1e-7)
    if dtype == torch.float32 and not collapsed:
        return Tolerance(1e-5, 1e-3)
    return Tolerance(1e-3, 1e-2)


@dataclass(frozen=True)
class Result:
    components: tuple[Tensor, ...]
    gradient: Tensor  # of the weighted sum of the components, (B, N, d)


def weighted(components: tuple[Tensor, ...], coefficients: tuple[float, ...]) -> Tensor:
    terms = zip(coefficients, components, strict=True)
    return torch.stack([c * m.double() for c, m in terms if c != 0]).sum()


def library(
    z: Tensor, coefficients: tuple[float, ...], **options: object
) -> tuple[Result, dse_ext.DSEComponents]:
    z = z.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    c = dse_ext.dse_components(z, **options)
    (gradient,) = torch.autograd.grad(weighted(tuple(c[:5]), coefficients), z)
    assert gradient.dtype == z.dtype
    return Result(tuple(m.detach() for m in c[:5]), gradient), c


def reference(
    z: Tensor, coefficients: tuple[float, ...], *args: object, **options: object
) -> Result:
    z = z.detach().cpu().double().requires_grad_()
    c = oracle.dse_components(z, *args, **options)
    (gradient,) = torch.autograd.grad(weighted(tuple(c), coefficients), z)
    return Result(tuple(m.detach() for m in c), gradient)


def relative_error(ours: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected; NaN if either is not finite."""
    ours, expected = ours.detach().cpu().double(), expected.detach().cpu().double()
    if not (ours.isfinite().all() and expected.isfinite().all()):
        return float("nan")
    scale = expected.norm().item()
    return (ours - expected).norm().item() / (scale if scale > 0 else 1.0)


def assert_components(
    ours: Result, expected: Result, limit: float, skip: tuple[str, ...] = ()
) -> None:
    errors = {
        name: relative_error(a, b)
        for name, a, b in zip(oracle.COMPONENTS, ours.components, expected.components, strict=True)
        if name not in skip
    }
    wrong = {name: error for name, error in errors.items() if not error <= limit}
    assert not wrong, f"relative errors above {limit}: {wrong}"


def assert_gradient(ours: Tensor, expected: Tensor, limit: float) -> None:
    error = relative_error(ours, expected)
    assert error <= limit, f"gradient error {error:.3g} above {limit}"
