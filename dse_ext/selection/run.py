"""λ, DSE and the chosen checkpoints of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dse_ext.selection.results import RunResults
from dse_ext.selection.rule import Scalars, dse_lambda, select_checkpoints, vector
from dse_ext.selection.tables import ResultsError


@dataclass(frozen=True)
class SelectionResult:
    """DSE over the checkpoints of a run, and the choice it makes.

    Attributes:
        dim_weight: λ, the weight of M_dim.
        dim_weight_computed: Whether λ was computed from the run; False where it was given, and
            where it is 1 because the run does not define it.
        note: Why λ is not defined by the run; empty otherwise.
        scores: DSE of each checkpoint, NaN where a component is not finite.
        candidates: Indices of all local maxima of DSE, best first.
        chosen: Indices of the chosen ones among them, best first.
    """

    dim_weight: float
    dim_weight_computed: bool
    note: str
    scores: tuple[float, ...]
    candidates: tuple[int, ...]
    chosen: tuple[int, ...]


@dataclass(frozen=True)
class RunSelection:
    """A run with its DSE and its chosen checkpoints.

    Attributes:
        run: What was measured.
        result: λ, DSE and the choice; indices are those of the run's checkpoints.
        notes: What a reader of the figures has to know, in sentences.
    """

    run: RunResults
    result: SelectionResult
    notes: tuple[str, ...] = ()

    @property
    def chosen_checkpoints(self) -> tuple[str, ...]:
        """File names of the chosen checkpoints, best first."""
        return tuple(self.run.checkpoints[i] for i in self.result.chosen)

    @property
    def chosen_epochs(self) -> tuple[float, ...]:
        """Epochs of the chosen checkpoints, best first."""
        return tuple(self.run.epochs[i] for i in self.result.chosen)


def select_by_dse(
    class_relevance: Scalars,
    m_dim: Scalars,
    *,
    top: int = 3,
    window: int = 2,
    dim_weight: float | None = None,
) -> SelectionResult:
    """Computes λ and DSE over the checkpoints of a run and chooses among them.

    λ is that of the finite checkpoints (`dse_ext.dse_lambda`). Where a run does not define it
    (fewer than two of them, or an M_dim that does not vary), it is 1 and the result's `note` says
    why.

    Args:
        class_relevance:
            M_inter − M_intra of each checkpoint in the order of training.
        m_dim:
            M_dim of the same checkpoints.
        top:
            The largest number of checkpoints to choose, see `dse_ext.select_checkpoints`.
        window:
            How many neighbours on each side a candidate must exceed.
        dim_weight:
            λ; None computes it.

    Returns:
        λ, DSE, candidates and choice.

    Raises:
        ValueError: If the lengths differ, no checkpoint has finite components, or `top`, `window`
            or `dim_weight` is out of range.

    Examples:
        >>> from dse_ext.selection import select_by_dse
        >>> result = select_by_dse([0.0, 0.5, 0.25], [0.5, 0.25, 0.375])
        >>> result.dim_weight, result.scores
        (2.0, (1.0, 1.0, 1.0))
    """
    relevance, dimensionality = vector("class_relevance", class_relevance), vector("m_dim", m_dim)
    if relevance.size != dimensionality.size:
        raise ValueError(
            "class_relevance and m_dim must have one value per checkpoint each, got "
            f"{relevance.size} and {dimensionality.size} values."
        )
    finite = np.isfinite(relevance) & np.isfinite(dimensionality)
    note = ""
    computed = False
    if dim_weight is not None:
        if not (np.isfinite(dim_weight) and dim_weight >= 0):
            raise ValueError(f"dim_weight must be a finite number >= 0, got {dim_weight}.")
        weight = float(dim_weight)
    elif finite.sum() < 2:
        weight = 1.0
        note = (
            f"λ = 1: the run has {int(finite.sum())} checkpoint with finite components, and a "
            "standard deviation over checkpoints needs two"
        )
    else:
        try:
            weight = dse_lambda(relevance[finite], dimensionality[finite])
            computed = True
        except ValueError:
            # Finite and long enough: M_dim does not vary.
            weight = 1.0
            note = "λ = 1: M_dim is the same at every checkpoint, so the run does not define λ"
    scores = np.where(finite, relevance + weight * dimensionality, np.nan)
    candidates = select_checkpoints(scores, top=max(scores.size, 1), window=window)
    chosen = select_checkpoints(scores, top=top, window=window)
    return SelectionResult(
        weight, computed, note, tuple(scores.tolist()), tuple(candidates), tuple(chosen)
    )


def select_run(
    run: RunResults,
    *,
    top: int = 3,
    window: int = 2,
    dim_weight: float | None = None,
    first_epoch: float | None = None,
) -> RunSelection:
    """Chooses the checkpoints of a run by DSE.

    Args:
        run: The measured checkpoints.
        top: The largest number of checkpoints to choose.
        window: How many neighbours on each side a candidate must exceed.
        dim_weight: λ; None computes it over the run.
        first_epoch: Checkpoints before this epoch take no part: they are neither chosen nor do
            they count in λ. An untrained network would dominate the deviations λ is made of.

    Returns:
        The run without the checkpoints left out, λ, DSE and choice.

    Raises:
        ResultsError: If no checkpoint is left, or none has finite components.
        ValueError: If `top`, `window` or `dim_weight` is out of range.
    """
    notes: list[str] = []
    if first_epoch is not None:
        keep = [i for i, epoch in enumerate(run.epochs) if epoch >= first_epoch]
        if not keep:
            raise ResultsError(
                f"run {run.run!r} has no checkpoint from epoch {first_epoch:g} on; its last is "
                f"{run.epochs[-1]}."
            )
        if len(keep) < len(run.epochs):
            notes.append(
                f"{len(run.epochs) - len(keep)} of {len(run.epochs)} checkpoints are left out: "
                f"they come before epoch {first_epoch:g}"
            )
            run = _part(run, keep)
    relevance, m_dim = run.metrics["class_relevance"], run.metrics["m_dim"]
    bad = [
        name
        for name, value in zip(run.checkpoints, relevance + m_dim, strict=True)
        if not np.isfinite(value)
    ]
    if len(bad) == len(run.checkpoints):
        raise ResultsError(
            f"run {run.run!r} of {run.source or 'these results'} has no checkpoint with a finite "
            "class_relevance and m_dim, so there is nothing to choose from."
        )
    if bad:
        notes.append(
            f"{len(bad)} of {len(run.checkpoints)} checkpoints have no finite components and are "
            f"never chosen: {', '.join(bad)}"
        )
    result = select_by_dse(relevance, m_dim, top=top, window=window, dim_weight=dim_weight)
    if result.note:
        notes.append(result.note)
    return RunSelection(run, result, tuple(notes))


def _part(run: RunResults, keep: Sequence[int]) -> RunResults:
    return replace(
        run,
        checkpoints=tuple(run.checkpoints[i] for i in keep),
        epochs=tuple(run.epochs[i] for i in keep),
        metrics={name: values[list(keep)] for name, values in run.metrics.items()},
    )
