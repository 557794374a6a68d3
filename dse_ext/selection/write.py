"""Writes choices and their evaluation as tables for people and programs."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from dse_ext.selection.evaluation import SelectionEvaluation
from dse_ext.selection.run import RunSelection


def selection_csv(selections: Sequence[RunSelection]) -> str:
    """One row a checkpoint: DSE and what it is made of, its rank among the candidates, the choice.

    Args:
        selections: The runs.

    Returns:
        CSV with a header. `candidate` numbers the local maxima of DSE from 1, best first, and
        `chosen` the chosen ones among them; both are empty elsewhere.
    """
    header = [
        "run",
        "checkpoint",
        "epoch",
        "class_relevance",
        "m_dim",
        "dim_weight",
        "dse",
        "candidate",
        "chosen",
    ]
    rows = []
    for selection in selections:
        run, result = selection.run, selection.result
        for i, name in enumerate(run.checkpoints):
            rows.append(
                [
                    run.run,
                    name,
                    run.epochs[i],
                    _number(run.metrics["class_relevance"][i]),
                    _number(run.metrics["m_dim"][i]),
                    _number(result.dim_weight),
                    _number(result.scores[i]),
                    _place(i, result.candidates),
                    _place(i, result.chosen),
                ]
            )
    return _csv(header, rows)


def kendall_csv(evaluation: SelectionEvaluation) -> str:
    """One row for each run, data set and metric: τ, its p-value and the number of checkpoints."""
    header = ["run", "dataset", "metric", "tau", "p_value", "checkpoints"]
    return _csv(
        header,
        (
            [t.run, t.dataset, t.metric, _number(t.tau), _number(t.p_value), t.checkpoints]
            for t in evaluation.taus
        ),
    )


def gain_csv(evaluation: SelectionEvaluation) -> str:
    """One row for each run and data set: mIoU of the last, chosen and best checkpoint, gains."""
    numbers = [
        "last",
        "first_choice",
        "selected",
        "oracle",
        "first_choice_gain",
        "selected_gain",
        "oracle_gain",
    ]
    return _csv(
        ["run", "dataset", *numbers, "selected_epoch", "oracle_epoch"],
        (
            [
                gain.run,
                gain.dataset,
                *(_number(getattr(gain, name)) for name in numbers),
                gain.selected_epoch,
                gain.oracle_epoch,
            ]
            for gain in evaluation.gains
        ),
    )


def selection_json(
    selections: Sequence[RunSelection],
    settings: dict[str, Any],
    evaluation: SelectionEvaluation | None = None,
) -> str:
    """Everything that is known about a choice, for programs.

    Args:
        selections: The runs.
        settings: How the choice was made.
        evaluation: The comparison with mIoU, where it is known.

    Returns:
        JSON of format 1; what is not defined is null.
    """
    content: dict[str, Any] = {
        "format": 1,
        "settings": settings,
        "runs": [
            {
                "run": selection.run.run,
                **selection.run.settings,
                "lambda": selection.result.dim_weight,
                "lambda_computed": selection.result.dim_weight_computed,
                "notes": list(selection.notes),
                "chosen": list(selection.chosen_checkpoints),
                "checkpoints": [
                    {
                        "checkpoint": name,
                        "epoch": selection.run.epochs[i],
                        "dse": _finite(selection.result.scores[i]),
                        "candidate": _place(i, selection.result.candidates) or None,
                        "chosen": _place(i, selection.result.chosen) or None,
                    }
                    for i, name in enumerate(selection.run.checkpoints)
                ],
            }
            for selection in selections
        ],
    }
    if evaluation is not None:
        content["against"] = {
            "notes": list(evaluation.notes),
            "kendall_tau": [
                {
                    "run": t.run,
                    "dataset": t.dataset,
                    "metric": t.metric,
                    "tau": t.tau,
                    "p_value": t.p_value,
                    "checkpoints": t.checkpoints,
                }
                for t in evaluation.taus
            ],
            "mean_kendall_tau": {name: evaluation.mean_tau(name) for name in evaluation.metrics},
            "gain": [
                {
                    "run": gain.run,
                    "dataset": gain.dataset,
                    "last": gain.last,
                    "first_choice": gain.first_choice,
                    "selected": gain.selected,
                    "oracle": gain.oracle,
                    "selected_epoch": gain.selected_epoch,
                    "oracle_epoch": gain.oracle_epoch,
                }
                for gain in evaluation.gains
            ],
            "mean_gain": {
                name: evaluation.mean_gain(name)
                for name in ("first_choice_gain", "selected_gain", "oracle_gain")
            },
        }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _place(index: int, ranking: Sequence[int]) -> int | str:
    return ranking.index(index) + 1 if index in ranking else ""


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> str:
    """As many digits as it takes to read the same number back; empty where there is none."""
    return "" if value is None or not math.isfinite(value) else repr(float(value))


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
