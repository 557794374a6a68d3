"""Features at the ends of each dtype's range, against the oracle on the same rounded values."""

from __future__ import annotations

import oracle
import pytest
import torch
from features import clustered, random_labels
from parity import SCORE, assert_components, assert_gradient, library, reference, tolerance
from torch import Tensor

import dse_ext

SHAPE = (4, 9, 6)
SCALES = {
    torch.float64: (1e-150, 1e-30, 1e30, 1e120),
    # 1e-40: subnormal; 3e37: the largest feature is near 2e38 of 3.4e38.
    torch.float32: (1e-40, 1e-30, 1e30, 3e37),
    torch.bfloat16: (1e-40, 1e-30, 1e30, 3e37),
    # 1e-6: subnormal, below 6.1e-5; 8e3: the largest feature is near 5e4 of 65504.
    torch.float16: (1e-6, 1e-3, 1e3, 8e3),
}
CASES = [(dtype, scale) for dtype, scales in SCALES.items() for scale in scales]


def features(dtype: torch.dtype, scale: float) -> Tensor:
    z = (clustered(*SHAPE) * scale).to(dtype)
    assert bool(z.isfinite().all())
    assert float(z.double().abs().max()) > 0
    return z


@pytest.mark.parametrize("variant", oracle.VARIANTS)
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
@pytest.mark.parametrize(("dtype", "scale"), CASES, ids=lambda v: str(v).removeprefix("torch."))
def test_ends_of_the_range(
    dtype: torch.dtype, scale: float, normalize: bool, variant: str, device: torch.device
) -> None:
    z = features(dtype, scale)
    local, wide = random_labels(4, 9, 3), random_labels(4, 9, 5, seed=1)
    clusters = {"local_labels": local.to(device), "global_labels": wide.to(device)}
    options = {"variant": variant, "normalize": normalize}
    # Without the permuted positions of the evaluation variant, which the oracle would have to draw.
    skip = ("m_dim",) if variant == "evaluation" else ()
    coefficients = tuple(
        0.0 if name in skip else c for name, c in zip(oracle.COMPONENTS, SCORE, strict=True)
    )
    ours, _ = library(
        z.to(device), coefficients, local_clusters=3, global_clusters=5, group_images=8, **clusters,
        **options,
    )  # fmt: skip
    expected = reference(z, coefficients, local, wide, group_images=8, **options)
    limit = tolerance(dtype)
    result = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    # A component that leaves the range of its float32 result is infinite or loses digits there.
    beyond = [
        name
        for name, value in zip(oracle.COMPONENTS, expected.components, strict=True)
        if value != 0 and not result.tiny * 1e3 <= float(value) <= result.max
    ]
    short = normalize and scale < 1e-12  # rows below F.normalize's floor
    assert not beyond or not normalize or short
    assert_components(ours, expected, limit.component, (*skip, *beyond))
    if short:
        # Rows without a direction have no gradient, rather than 1e12 times the upstream one.
        assert not bool(ours.gradient.any())
        return
    largest = float(expected.gradient.abs().max())
    span = torch.finfo(dtype)
    if "m_inter" in beyond:
        return  # the upstream weight meets an infinite value
    gradient = ours.gradient.cpu().double()
    if largest < span.tiny * 1e4:
        # Too small for the dtype: no more than its last digits may be off.
        assert bool(((gradient - expected.gradient).abs() <= span.tiny).all())
    elif largest <= min(span.max, result.max / 256):
        assert_gradient(ours.gradient, expected.gradient, limit.gradient)
    else:
        # At the end of the range, where sums overflow, a gradient is right or not finite: never
        # a plausible number that is wrong.
        right = (gradient - expected.gradient).abs() <= limit.gradient * largest
        assert bool((right | ~gradient.isfinite()).all())
        assert bool((~gradient.isfinite())[expected.gradient.abs() > span.max * 1.01].all())


def test_subnormals_are_as_before_a_call() -> None:
    """Large matrices are reduced without them; the caller's threads are not left so."""
    small = torch.full((1 << 16,), 1e-40)
    x = clustered(1, 300, 200).float().requires_grad_()
    dse_ext.effective_rank(x).sum().backward()
    assert bool((small * 1.0 > 0).all())
