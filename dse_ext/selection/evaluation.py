"""How well DSE and its baselines rank the checkpoints of runs, and what choosing by DSE gains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dse_ext.selection.miou import MiouTable
from dse_ext.selection.run import RunSelection

#: Metrics that are compared with mIoU, with the names they are shown by. None has its sign turned.
METRICS: Mapping[str, str] = {
    "dse": "DSE",
    "rankme_dense": "RankMe†",
    "alpha_req": "α-ReQ",
    "rankme": "RankMe",
    "lidar": "LiDAR",
    "class_relevance": "M_inter−M_intra",
    "m_dim": "M_dim",
}


@dataclass(frozen=True)
class KendallTau:
    """Kendall's τ-b of one metric with the mIoU on one data set, over the checkpoints of a run.

    Attributes:
        run: Name of the run.
        dataset: Name of the data set.
        metric: Key of :data:`METRICS`.
        tau: τ-b in [−1, 1]; positive where higher values of the metric go with a higher mIoU.
            None where it is not defined: fewer than two checkpoints, or values that do not vary.
        p_value: Two-sided p-value of no association; None where τ is.
        checkpoints: Number of checkpoints that have both values.
    """

    run: str
    dataset: str
    metric: str
    tau: float | None
    p_value: float | None
    checkpoints: int


@dataclass(frozen=True)
class Gain:
    """The mIoU of a run on one data set: of the last checkpoint, of DSE's choice, of the best.

    Attributes:
        run: Name of the run.
        dataset: Name of the data set.
        last: mIoU of the run's last checkpoint in [0, 1].
        first_choice: mIoU of the checkpoint with the largest DSE among the chosen ones.
        selected: The largest mIoU among the chosen checkpoints: the paper's "best of the selected".
        oracle: The largest mIoU of the run.
        selected_epoch: Epoch of the best of the selected.
        oracle_epoch: Epoch of the best of the run.
    """

    run: str
    dataset: str
    last: float
    first_choice: float
    selected: float
    oracle: float
    selected_epoch: float
    oracle_epoch: float

    @property
    def selected_gain(self) -> float:
        """Gain in mIoU over the last checkpoint by the best of the selected ones."""
        return self.selected - self.last

    @property
    def first_choice_gain(self) -> float:
        """Gain in mIoU over the last checkpoint by DSE's first choice."""
        return self.first_choice - self.last

    @property
    def oracle_gain(self) -> float:
        """Gain in mIoU over the last checkpoint by the best of the run: what labels would give."""
        return self.oracle - self.last


@dataclass(frozen=True)
class SelectionEvaluation:
    """How the choice by DSE compares with the truth, over runs and data sets.

    Attributes:
        datasets: Names of the data sets.
        runs: Names of the runs.
        metrics: Keys of :data:`METRICS` that the results have.
        taus: One entry for each run, data set and metric.
        gains: One entry for each run and data set where last and chosen checkpoints have an mIoU.
        notes: What a reader of the figures has to know, in sentences.
    """

    datasets: tuple[str, ...]
    runs: tuple[str, ...]
    metrics: tuple[str, ...]
    taus: tuple[KendallTau, ...]
    gains: tuple[Gain, ...]
    notes: tuple[str, ...] = field(default=())

    def tau(self, run: str, dataset: str, metric: str) -> float | None:
        """τ of one metric on one data set of one run; None where it is not defined."""
        for entry in self.taus:
            if (entry.run, entry.dataset, entry.metric) == (run, dataset, metric):
                return entry.tau
        return None

    def mean_tau(
        self, metric: str, *, run: str | None = None, dataset: str | None = None
    ) -> float | None:
        """Mean τ of a metric over the runs and data sets where it is defined.

        Args:
            metric: Key of :data:`METRICS`.
            run: Only this run.
            dataset: Only this data set.

        Returns:
            The mean, or None where no τ is defined.
        """
        return _mean(
            entry.tau
            for entry in self.taus
            if entry.metric == metric
            and run in (None, entry.run)
            and dataset in (None, entry.dataset)
        )

    def mean_gain(self, what: str = "selected_gain", *, dataset: str | None = None) -> float | None:
        """Mean gain, or mean mIoU, over runs and data sets.

        Args:
            what: Name of a number of :class:`Gain`.
            dataset: Only this data set.

        Returns:
            The mean, or None where there is no gain at all.
        """
        return _mean(
            float(getattr(gain, what)) for gain in self.gains if dataset in (None, gain.dataset)
        )


def kendall_tau(
    values: Sequence[float] | npt.NDArray[np.float64],
    miou: Sequence[float | None] | npt.NDArray[np.float64],
) -> tuple[float | None, float | None]:
    """Kendall's τ-b of a metric with mIoU over checkpoints.

    Args:
        values: The metric at each checkpoint.
        miou: The mIoU at each checkpoint; None or NaN where it is not known.

    Returns:
        τ-b and its two-sided p-value over the checkpoints where both are finite; None twice where
        τ is not defined (fewer than two such checkpoints, or values that do not vary).

    Raises:
        ValueError: If the lengths differ.

    Examples:
        >>> from dse_ext.selection import kendall_tau
        >>> kendall_tau([1.0, 2.0, 3.0], [0.2, 0.3, 0.4])[0]
        1.0
    """
    from scipy.stats import kendalltau

    x = np.asarray(values, dtype=np.float64)
    y = np.asarray([math.nan if v is None else v for v in miou], dtype=np.float64)
    if x.shape != y.shape:
        raise ValueError(
            f"values and miou must have one value per checkpoint each, got {x.size} and {y.size}."
        )
    both = np.isfinite(x) & np.isfinite(y)
    if both.sum() < 2:
        return None, None
    result = kendalltau(x[both], y[both])
    if not math.isfinite(result.statistic):
        return None, None
    return float(result.statistic), float(result.pvalue)


def evaluate_selection(runs: Sequence[RunSelection], miou: MiouTable) -> SelectionEvaluation:
    """Compares DSE, its baselines and the chosen checkpoints with the true quality.

    Args:
        runs: The runs with their choice.
        miou: The mIoU of their checkpoints.

    Returns:
        Kendall's τ for each run, data set and metric, and the mIoU gained over the last
        checkpoint.

    Raises:
        ResultsError: If the table has no row of a run, none of its checkpoints, or another epoch
            for one of them.
    """
    metrics = tuple(
        name
        for name in METRICS
        if name == "dse"
        or any(np.isfinite(run.run.metrics.get(name, [math.nan])).any() for run in runs)
    )
    taus: list[KendallTau] = []
    gains: list[Gain] = []
    notes: list[str] = []
    if miou.ignored:
        notes.append(f"columns of {miou.source} without numbers: {', '.join(miou.ignored)}")
    for selection in runs:
        run = selection.run
        for dataset, truth in miou.of(run).items():
            missing = int(np.isnan(truth).sum())
            if missing:
                notes.append(
                    f"{run.run}: {missing} of {truth.size} checkpoints have no mIoU on {dataset}"
                )
            for metric in metrics:
                values = (
                    np.array(selection.result.scores)
                    if metric == "dse"
                    else run.metrics.get(metric, np.full(truth.size, math.nan))
                )
                tau, p_value = kendall_tau(values, truth)
                count = int((np.isfinite(values) & np.isfinite(truth)).sum())
                taus.append(KendallTau(run.run, dataset, metric, tau, p_value, count))
            gain = _gain(selection, dataset, truth)
            if gain is None:
                notes.append(
                    f"{run.run}: no gain on {dataset}, because the last or a chosen checkpoint has "
                    "no mIoU"
                )
            else:
                gains.append(gain)
    return SelectionEvaluation(
        miou.datasets,
        tuple(selection.run.run for selection in runs),
        metrics,
        tuple(taus),
        tuple(gains),
        tuple(notes),
    )


def _gain(selection: RunSelection, dataset: str, truth: npt.NDArray[np.float64]) -> Gain | None:
    chosen = list(selection.result.chosen)
    if not np.isfinite(truth[[*chosen, -1]]).all():
        return None
    best = chosen[int(np.argmax(truth[chosen]))]
    oracle = int(np.nanargmax(truth))
    return Gain(
        selection.run.run,
        dataset,
        last=float(truth[-1]),
        first_choice=float(truth[chosen[0]]),
        selected=float(truth[best]),
        oracle=float(truth[oracle]),
        selected_epoch=selection.run.epochs[best],
        oracle_epoch=selection.run.epochs[oracle],
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
