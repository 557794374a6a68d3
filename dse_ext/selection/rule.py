"""The weight of the dimensionality term over a run, and the choice of checkpoints.

Both functions work on the few scalars that each checkpoint of a run leaves behind, so they need
no features and no GPU: NumPy in double precision, whatever container the values come in.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import TypeAlias, Union

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["dse_lambda", "select_checkpoints"]

Scalars: TypeAlias = Union[
    Sequence[float], Sequence[Tensor], "npt.NDArray[np.floating]", "npt.NDArray[np.integer]", Tensor
]


def dse_lambda(class_relevance: Scalars, m_dim: Scalars) -> float:
    r"""The weight λ that puts class relevance and dimensionality on the same scale.

    .. math::
        \lambda = \frac{\operatorname{Std}(M_{inter} - M_{intra})}{\operatorname{Std}(M_{dim})}

    The standard deviations are taken over the checkpoints of one run. Both use the same number
    of degrees of freedom, which cancels in the ratio, so the population and the sample standard
    deviation give the same λ. With it, DSE = class_relevance + λ · m_dim.

    Source: "Exploring Structural Degradation in Dense Representations for Self-supervised
    Learning", 2025, https://arxiv.org/abs/2510.17299.

    Args:
        class_relevance:
            M_inter − M_intra of each checkpoint, where M_intra is the mean of `m_intra_image` and
            `m_intra_batch`. A sequence of numbers or 0-dim tensors, a one-dimensional NumPy array
            or a one-dimensional tensor, with one value for each of at least two checkpoints.
        m_dim:
            M_dim of the same checkpoints, in the same order.

    Returns:
        λ ≥ 0. It is 0 where the class relevance is the same at every checkpoint.

    Raises:
        ValueError: If an argument is not one-dimensional, has fewer than two values or a
            non-finite one, if the lengths differ, or if `m_dim` does not vary.
        TypeError: If an argument does not hold real numbers.

    Examples:
        >>> import dse_ext
        >>> dse_ext.dse_lambda(class_relevance=[0.0, 0.5, 0.25], m_dim=[0.5, 0.25, 0.375])
        2.0
    """
    relevance = vector("class_relevance", class_relevance)
    dimensionality = vector("m_dim", m_dim)
    if relevance.size != dimensionality.size:
        raise ValueError(
            "class_relevance and m_dim must have one value per checkpoint each, got "
            f"{relevance.size} and {dimensionality.size} values."
        )
    for name, values in (("class_relevance", relevance), ("m_dim", dimensionality)):
        if values.size < 2:
            raise ValueError(
                f"{name} must have values of at least 2 checkpoints, got {values.size}: a standard "
                "deviation over checkpoints needs them."
            )
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise ValueError(
                f"{name} must be finite, got {values[bad[0]]} at checkpoint {bad[0]} "
                f"({bad.size} of {values.size} values are not finite)."
            )
    # Values that differ by rounding alone would make λ a ratio of noise.
    if np.ptp(dimensionality) <= 8 * np.finfo(np.float64).eps * np.abs(dimensionality).max():
        raise ValueError(
            "m_dim must vary over the checkpoints, got the same value "
            f"{dimensionality[0]} at all {dimensionality.size} of them: "
            "λ = Std(class_relevance) / Std(m_dim) is not defined."
        )
    # Both are scaled by their largest magnitude, so that squares neither overflow nor vanish.
    return _scaled_std(relevance) / _scaled_std(dimensionality)


def select_checkpoints(scores: Scalars, top: int = 3, window: int = 2) -> list[int]:
    """Chooses the most promising checkpoints of a run by their DSE.

    A checkpoint is a candidate where its DSE is the maximum over the checkpoints at most `window`
    places before and after it (fewer at both ends of the run). The `top` candidates with the
    largest DSE are chosen. A local maximum is asked for because neighbouring checkpoints are
    nearly the same model: without it the choice would be one peak several times.

    Ties are broken towards the earlier checkpoint, twice: of equal values within one window only
    the earliest can be a candidate (a plateau gives one candidate), and of candidates with equal
    values the earlier one comes first. Scores that are NaN or infinite stand for checkpoints that
    could not be scored: they are never chosen and hide no neighbour.

    Source: "Exploring Structural Degradation in Dense Representations for Self-supervised
    Learning", 2025, https://arxiv.org/abs/2510.17299.

    Args:
        scores:
            The DSE of each checkpoint in the order of training. A sequence of numbers or 0-dim
            tensors, a one-dimensional NumPy array or a one-dimensional tensor.
        top:
            The largest number of checkpoints to choose. Must be >= 1.
        window:
            How many checkpoints before and after are compared. Must be >= 0; with 0 every
            checkpoint is a candidate.

    Returns:
        Indices into `scores`, best first. Fewer than `top` where there are fewer candidates,
        never none.

    Raises:
        ValueError: If `scores` is empty, not one-dimensional or has no finite value, or if
            `top` or `window` is too small.
        TypeError: If `scores` does not hold real numbers, or `top` or `window` is no integer.

    Examples:
        >>> import dse_ext
        >>> dse_ext.select_checkpoints([0.1, 0.4, 0.3, 0.2, 0.0, 0.5, 0.1], top=2)
        [5, 1]
    """
    values = vector("scores", scores)
    top = _integer("top", top, at_least=1)
    window = _integer("window", window, at_least=0)
    if values.size == 0:
        raise ValueError("scores must have at least one checkpoint, got none.")
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError(f"scores must have at least one finite value, got none in {values.size}.")

    values = np.where(finite, values, -np.inf)
    candidates = [
        i
        for i in np.flatnonzero(finite).tolist()
        if np.argmax(values[max(i - window, 0) : i + window + 1]) == min(i, window)
    ]
    # sorted() is stable and the candidates ascend, so equal values keep the order of training.
    return sorted(candidates, key=lambda i: -values[i])[:top]


def vector(name: str, values: object) -> npt.NDArray[np.float64]:
    """The values as a one-dimensional double-precision array."""
    if isinstance(values, Tensor):
        array = _numpy(values)
    elif isinstance(values, np.ndarray):
        array = values
    elif isinstance(values, Sequence) and not isinstance(values, (str, bytes)):
        items = [_numpy(v) if isinstance(v, Tensor) else v for v in values]
        try:
            array = np.asarray(items) if items else np.empty(0)
        except ValueError:  # NumPy's message does not name the argument.
            raise ValueError(f"{name} must hold one number per checkpoint.") from None
    else:
        raise TypeError(
            f"{name} must be a sequence of numbers, a NumPy array or a tensor, "
            f"got {type(values).__name__}."
        )
    if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
        raise TypeError(f"{name} must hold real numbers, got {array.dtype}.")
    if array.ndim != 1:
        raise ValueError(
            f"{name} must be one-dimensional, one value per checkpoint, got shape {array.shape}."
        )
    return array.astype(np.float64)


def _numpy(values: Tensor) -> npt.NDArray[np.generic]:
    values = values.detach()
    if values.is_floating_point():  # NumPy has no bfloat16.
        values = values.to(torch.float64)
    array: npt.NDArray[np.generic] = values.cpu().numpy()
    return array


def _integer(name: str, value: int, at_least: int) -> int:
    try:
        value = index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}.") from None
    if value < at_least:
        raise ValueError(f"{name} must be >= {at_least}, got {value}.")
    return value


def _scaled_std(values: npt.NDArray[np.float64]) -> float:
    scale = np.abs(values).max()
    return float(scale * np.std(values / scale)) if scale > 0 else 0.0
