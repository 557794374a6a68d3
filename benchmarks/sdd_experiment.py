"""Does DSE follow the dense quality, and does the regularizer raise it? On the embedded scenes.

    python -m benchmarks.sdd_experiment [--preset full|small|smoke]

Trains every method of a fixed list from several seeds, with and without the regularizer, measures
the mIoU of every checkpoint with a linear probe, scores it without labels, and reports how DSE and
the baselines rank the checkpoints and what choosing by DSE gains. The list, the seeds and the sizes
are those of the preset: nothing is left out of the report.

One JSON a run is written, as soon as the run is there. An experiment that was interrupted, or
killed, goes on when the command is given again, and ends in the same result file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import dse_ext
from dse_ext.bench.machine import cpu_name
from dse_ext.evaluation import EvaluateConfig, evaluate
from dse_ext.evaluation.scores import FIGURES
from dse_ext.files import save_text
from dse_ext.selection import (
    METRICS,
    MiouTable,
    RunSelection,
    evaluate_selection,
    read_results,
    select_run,
)
from dse_ext.ssl import Interrupted, RunResult, TrainConfig, TrainingDiverged, train
from dse_ext.ssl.config import PRESETS, TEXTURE_SCENES, available_cores
from dse_ext.ssl.progress import each
from dse_ext.ssl.storage import RunFolder
from dse_ext.ssl.trainer import use_threads

RESULTS = Path(__file__).parent / "results"
NAME = "sdd-experiment"
DATASET = "texture_scenes_linear"


@dataclass(frozen=True)
class Run:
    """One training run of the experiment.

    Attributes:
        method: Name of the method.
        seed: Seed of scenes, weights, augmentations and k-means.
        dse_weight: β; 0 trains without the regularizer.
    """

    method: str
    seed: int
    dse_weight: float

    @property
    def name(self) -> str:
        """Name of the run's folder and file."""
        return f"{self.method}-seed{self.seed}-weight{self.dse_weight:g}"


@dataclass(frozen=True)
class Plan:
    """Everything that the results depend on, besides the machine.

    Attributes:
        preset: Its name.
        methods: The methods with their options.
        seeds: The seeds.
        dse_weights: The values of β, 0 first.
        training: Options of every run.
        scoring: Options of the label-free scores of every checkpoint.
    """

    preset: str
    methods: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    dse_weights: tuple[float, ...]
    training: Mapping[str, Any]
    scoring: Mapping[str, Any] = field(default_factory=dict)

    def runs(self) -> list[Run]:
        """All runs in the order in which they are carried out."""
        return [
            Run(method, seed, weight)
            for seed in self.seeds
            for method in self.methods
            for weight in self.dse_weights
        ]

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON gives it back."""
        plan: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plan


_TWO_VIEWS = {"hidden_dim": 512, "output_dim": 512}

# One method of each family: self-distillation, siamese prediction, decorrelation, masked
# reconstruction, dense contrast. The same network for all, so that they differ by the method alone.
_METHODS: dict[str, dict[str, Any]] = {
    "dino": PRESETS["demo"]["method_args"],
    "simsiam": {**_TWO_VIEWS, "predictor_dim": 128},
    "barlowtwins": _TWO_VIEWS,
    "mae": {"decoder_dim": 96, "decoder_depth": 1, "decoder_heads": 3},
    "densecl": {"hidden_dim": 512, "momentum": 0.99, "queue": 1024},
}

_PAPER = 0.001
"""The weight of the regularizer in the paper."""

PRESETS: dict[str, Plan] = {
    # 30 runs of the size of `make demo`: under two hours on two idle cores.
    "full": Plan(
        "full",
        _METHODS,
        (0, 1, 2),
        (0.0, _PAPER),
        {
            "backbone": "vit_tiny_patch16_224",
            "backbone_args": {"embed_dim": 128, "depth": 4, "num_heads": 4},
            "image_size": 64,
            "patch_size": 8,
            "steps": 200,
            "batch_size": 32,
            "lr": 1e-3,
            "checkpoints": 10,
            "train_images": 1024,
            "score_images": 64,
            "probe_images": 256,
            "heldout_images": 192,
        },
        {"images": 512, "lidar_images": 128, "lidar_views": 4},
    ),
    "small": Plan(
        "small",
        {name: _METHODS[name] for name in ("dino", "simsiam", "barlowtwins", "mae")},
        (0, 1),
        (0.0, _PAPER),
        {
            "backbone": "vit_tiny_patch16_224",
            "backbone_args": {"embed_dim": 96, "depth": 3, "num_heads": 3},
            "image_size": 64,
            "patch_size": 8,
            "steps": 60,
            "batch_size": 32,
            "lr": 1e-3,
            "checkpoints": 6,
            "train_images": 512,
            "score_images": 16,
            "probe_images": 128,
            "heldout_images": 128,
        },
        {"images": 128, "lidar_images": 48, "lidar_views": 4},
    ),
    "smoke": Plan(
        "smoke",
        {"simsiam": {"hidden_dim": 16, "output_dim": 16, "predictor_dim": 8}},
        (0, 1),
        (0.0, _PAPER),
        {
            "backbone": "vit_tiny_patch16_224",
            "backbone_args": {"embed_dim": 32, "depth": 1, "num_heads": 2},
            "image_size": 32,
            "patch_size": 8,
            "steps": 4,
            "batch_size": 4,
            "lr": 1e-3,
            "checkpoints": 4,
            "train_images": 8,
            "score_images": 4,
            "probe_images": 8,
            "heldout_images": 8,
        },
        {"images": 16, "lidar_images": 8, "lidar_views": 2},
    ),
}


def run_all(
    plan: Plan, work: Path, console: Console, *, threads: int = 0, workers: int = -1
) -> list[dict[str, Any]]:
    """Carries out what is missing of a plan.

    Args:
        plan: The plan.
        work: Folder of what is kept between calls.
        console: Where progress is shown.
        threads: CPU threads; 0 takes all cores.
        workers: Processes that prepare images; -1 chooses.

    Returns:
        What was measured of each run, in the plan's order.

    Raises:
        ValueError: If the folder holds another plan's runs.
        Interrupted: If SIGINT or SIGTERM arrived during a training; nothing is lost.
    """
    _keep_plan(plan, work)
    runs = plan.runs()
    missing = [run for run in runs if not _file(work, run).is_file()]
    if len(missing) < len(runs):
        console.print(f"{len(runs) - len(missing)} of {len(runs)} runs are done already")
    for run in each(console, missing, "runs") if missing else ():
        started = time.perf_counter()
        record = _measure(plan, run, work, threads, workers)
        save_text(_file(work, run), _json(record))
        # Networks are large, and everything that is reported of them is written.
        shutil.rmtree(work / run.name, ignore_errors=True)
        seconds = time.perf_counter() - started
        console.print(f"  {run.name}: {_outcome(record)}  {seconds:.0f} s", highlight=False)
    return [json.loads(_file(work, run).read_text(encoding="utf-8")) for run in runs]


def _file(work: Path, run: Run) -> Path:
    return work / f"{run.name}.json"


def _json(content: Any) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _outcome(record: Mapping[str, Any]) -> str:
    if record["diverged"] is not None:
        return f"diverged: {record['diverged']}"
    tau = record["tau"]["dse"]
    return (
        f"mIoU {100 * record['miou']['last']:.2f} % (best {100 * record['miou']['best']:.2f} %), "
        f"τ of DSE {'undefined' if tau is None else f'{tau:.2f}'}"
    )


def _keep_plan(plan: Plan, work: Path) -> None:
    """Runs of different plans, or versions of the package, are never mixed."""
    path = work / "plan.json"
    text = _json({**plan.to_dict(), "dse_ext": dse_ext.__version__})
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{work} holds runs of another plan or version: give another folder with --work, or "
            "delete it."
        )
    save_text(path, text)


def train_config(plan: Plan, run: Run, *, threads: int = 0, workers: int = -1) -> TrainConfig:
    """The configuration of a run."""
    return TrainConfig.for_method(
        run.method,
        **plan.training,
        data=TEXTURE_SCENES,
        method_args=dict(plan.methods[run.method]),
        dse_weight=run.dse_weight,
        seed=run.seed,
        threads=threads,
        workers=workers,
        device="cpu",
    )


def _measure(plan: Plan, run: Run, work: Path, threads: int, workers: int) -> dict[str, Any]:
    """Trains, probes and scores a run; what was there of it already is not done again."""
    config = train_config(plan, run, threads=threads, workers=workers)
    folder = RunFolder(work / run.name)
    record: dict[str, Any] = {**dataclasses.asdict(run), "diverged": None}
    try:
        trained = train(config, folder.root, resume=True, report=False)
    except TrainingDiverged as error:
        return {**record, "diverged": str(error)}
    scoring = EvaluateConfig(
        "dse-ext",
        str(folder.checkpoints),
        TEXTURE_SCENES,
        **plan.scoring,
        run=run.name,
        seed=run.seed,
        device="cpu",
        workers=workers,
    )
    with use_threads(config):
        evaluate(scoring, folder.root / "scores")
    (measured,) = read_results(folder.root / "scores")
    # The untrained network is reported but takes no part in λ, the choice and τ.
    selection = select_run(measured, first_epoch=1)
    return {**record, **_figures(selection, trained, folder)}


def _figures(selection: RunSelection, trained: RunResult, folder: RunFolder) -> dict[str, Any]:
    """What is reported of a run."""
    result, run = selection.result, selection.run
    miou = {score.step: score.miou for score in trained.scores}
    table = MiouTable(
        (DATASET,),
        {
            (run.run, folder.checkpoint(step).name): {DATASET: math.nan if v is None else v}
            for step, v in miou.items()
        },
        {},
        source="the run's linear probe",
    )
    evaluation = evaluate_selection([selection], table)
    (gain,) = evaluation.gains
    (all_measured,) = read_results(folder.root / "scores")
    return {
        "lambda": result.dim_weight,
        "lambda_computed": result.dim_weight_computed,
        "chosen": [int(epoch) for epoch in selection.chosen_epochs],
        "miou": {
            "untrained": miou[0],
            "last": gain.last,
            "best": gain.oracle,
            "first_choice": gain.first_choice,
            "selected": gain.selected,
        },
        "tau": {name: evaluation.tau(run.run, DATASET, name) for name in METRICS},
        "checkpoints": [
            {
                "step": int(step),
                "miou": miou[int(step)],
                **{name: _finite(all_measured.metrics[name][i]) for name in FIGURES},
            }
            for i, step in enumerate(all_measured.epochs)
        ],
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def machine(threads: int) -> dict[str, Any]:
    """What decides the last digits and the time."""
    import lightly
    import timm

    return {
        "cpu": cpu_name(),
        "cores": available_cores(),
        "threads": threads or available_cores(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "lightly": lightly.__version__,
        "dse_ext": dse_ext.__version__,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Carries out an experiment and reports it; 130 where it was interrupted."""
    from benchmarks.sdd_report import figure, markdown, print_tables, summarize

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="full", help="how large (full)")
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help=f"what is kept between calls (runs/{NAME}-PRESET)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=RESULTS,
        help="folder of the report (%(default)s)",
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 takes all cores")
    parser.add_argument(
        "--workers", type=int, default=-1, help="processes that prepare images; -1 chooses"
    )
    options = parser.parse_args(arguments)
    plan = PRESETS[options.preset]
    work = options.work or Path("runs") / f"{NAME}-{plan.preset}"
    # A file has room for the tables.
    console = Console() if sys.stdout.isatty() else Console(width=140)
    try:
        runs = run_all(plan, work, console, threads=options.threads, workers=options.workers)
    except Interrupted as stop:
        console.print(f"{stop}; everything is saved. Give the same command again to go on.")
        return 130
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    summary = summarize(runs)
    report = {
        "format": 1,
        "plan": plan.to_dict(),
        "machine": machine(options.threads),
        "summary": summary,
        "runs": runs,
    }
    save_text(options.out / f"{NAME}.json", _json(report))
    save_text(options.out / f"{NAME}.md", markdown(report))
    figure(report).savefig(
        options.out / f"{NAME}.png", dpi=110, bbox_inches="tight", metadata={"Software": None}
    )
    print_tables(report, console)
    console.print(f"report: {options.out / NAME}.json, .md, .png", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
