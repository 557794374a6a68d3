"""``dse-ext probe``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dse_ext.commands.common import fail, pairs
from dse_ext.commands.evaluate import SKIPPED

if TYPE_CHECKING:
    from rich.console import Console

    from dse_ext.evaluation.probing import ProbeSweepResult

_WHAT = "What is measured"
_DATA = "Data set"
_HOW = "Probes"
_MACHINE = "Run and machine"


def probe(
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME|MODULE:FUNCTION",
            help="Method whose checkpoint layout is read (see [bold]dse-ext evaluate --list[/]), "
            "or a function of your own that returns a CheckpointReader.",
            rich_help_panel=_WHAT,
        ),
    ],
    checkpoints: Annotated[
        str,
        typer.Option(
            metavar="'GLOB'",
            help="Checkpoint files: a pattern in quotes, or their folder. Those of several runs "
            "are told apart by their folders.",
            rich_help_panel=_WHAT,
        ),
    ],
    dataset: Annotated[
        str,
        typer.Option(
            metavar="DATASET",
            help="[bold]voc[/], [bold]ade20k[/], [bold]cityscapes[/] or [bold]coco-stuff[/] in its "
            "published layout (docs/probes.md); [bold]folder[/], any folder with images/ and "
            "annotations/ (PNG label maps); or [bold]texture-scenes[/], which needs no download.",
            rich_help_panel=_WHAT,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for miou.csv and probe.json; a sweep that was interrupted goes on in it, "
            "one over another data set adds columns, one over another run adds rows.",
            rich_help_panel=_WHAT,
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the data set; not needed for texture-scenes.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    probe: Annotated[
        str,
        typer.Option(
            metavar="linear|knn|both",
            help="Linear probe (multinomial logistic regression, solved to its optimum), k-NN "
            "segmentation, or both.",
            rich_help_panel=_WHAT,
        ),
    ] = "both",
    name: Annotated[
        str | None,
        typer.Option(
            help="What the columns begin with, as in NAME_linear.  "
            "[dim]\\[default: the data set's name][/]",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(
            help="Name of the run in the results.  [dim]\\[default: the checkpoints' folder][/]",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="TIMM-NAME",
            help="timm model of another size, such as vit_base_patch16_224.  "
            "[dim]\\[default: the method's][/]",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    model_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Keyword argument for timm.create_model; may be given several times.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    layer: Annotated[
        str,
        typer.Option(
            metavar="NUMBER|MODULE",
            help="Whose dense features: -1 the last layer after the final norm, another number a "
            "block's or stage's output, or a module's name.",
            rich_help_panel=_WHAT,
        ),
    ] = "-1",
    image_size: Annotated[
        str | None,
        typer.Option(
            metavar="N|HxW",
            help="Pixels that every image is resized to as a whole, such as 448 or 512x1024.  "
            "[dim]\\[default: 224, or as the checkpoint tells][/]",
            rich_help_panel=_DATA,
        ),
    ] = None,
    train_images: Annotated[
        int,
        typer.Option(
            help="Training images at most: a random choice, the same for every checkpoint.",
            rich_help_panel=_DATA,
        ),
    ] = 20_480,
    val_images: Annotated[
        int | None,
        typer.Option(
            help="Validation images at most.  [dim]\\[default: all][/]", rich_help_panel=_DATA
        ),
    ] = None,
    train_split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Split that probes are fitted to; for voc also [bold]trainaug[/] (SBD) or a list "
            "of names.  [dim]\\[default: the data set's training split][/]",
            rich_help_panel=_DATA,
        ),
    ] = None,
    val_split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Split that they are measured on.  "
            "[dim]\\[default: the data set's validation split][/]",
            rich_help_panel=_DATA,
        ),
    ] = None,
    num_classes: Annotated[
        int | None,
        typer.Option(
            help="folder: number of classes.  [dim]\\[default: as classes.txt or the label maps "
            "tell][/]",
            rich_help_panel=_DATA,
        ),
    ] = None,
    ignore_index: Annotated[
        int,
        typer.Option(help="folder: value of pixels that count nowhere.", rich_help_panel=_DATA),
    ] = 255,
    reduce_zero_label: Annotated[
        bool,
        typer.Option(
            "--reduce-zero-label",
            help="folder: 0 counts nowhere, and classes start at 1.",
            rich_help_panel=_DATA,
        ),
    ] = False,
    val_share: Annotated[
        float,
        typer.Option(
            help="folder: share of the images that is measured on, where it has no split.",
            rich_help_panel=_DATA,
        ),
    ] = 0.2,
    train_scenes: Annotated[
        int,
        typer.Option(help="texture-scenes: scenes to fit to.", rich_help_panel=_DATA),
    ] = 512,
    val_scenes: Annotated[
        int,
        typer.Option(help="texture-scenes: scenes to measure on.", rich_help_panel=_DATA),
    ] = 256,
    l2: Annotated[
        float,
        typer.Option(help="linear: penalty on the squared weights.", rich_help_panel=_HOW),
    ] = 1e-4,
    max_iter: Annotated[
        int, typer.Option(help="linear: L-BFGS iterations at most.", rich_help_panel=_HOW)
    ] = 200,
    k: Annotated[int, typer.Option(help="knn: number of neighbours.", rich_help_panel=_HOW)] = 30,
    temperature: Annotated[
        float,
        typer.Option(help="knn: temperature of the neighbours' votes.", rich_help_panel=_HOW),
    ] = 0.02,
    bank: Annotated[
        int,
        typer.Option(
            help="knn: patches in the bank, spread evenly over the training images.",
            rich_help_panel=_HOW,
        ),
    ] = 65_536,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of every random choice of images and patches, and of the scenes.",
            rich_help_panel=_HOW,
        ),
    ] = 0,
    precision: Annotated[
        str,
        typer.Option(
            metavar="float32|bfloat16|float16",
            help="Arithmetic of the network; probes compute in float32.",
            rich_help_panel=_MACHINE,
        ),
    ] = "float32",
    batch_size: Annotated[
        int, typer.Option(help="Images per forward pass.", rich_help_panel=_MACHINE)
    ] = 32,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=_MACHINE)
    ] = "auto",
    workers: Annotated[
        int,
        typer.Option(
            help="Processes that read images; -1 chooses, 0 reads them in this one.",
            rich_help_panel=_MACHINE,
        ),
    ] = -1,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle",
            help="Run code that checkpoint files contain. Only for files that come from someone "
            "you trust.",
            rich_help_panel=_MACHINE,
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Measure the columns of this sweep again; other columns and runs are kept.",
            rich_help_panel=_MACHINE,
        ),
    ] = False,
) -> None:
    """Measure the true dense quality of checkpoints with labels, by probes on frozen features.

    Fits segmentation probes to the dense features of each checkpoint and writes the mIoU on other
    images into [bold]miou.csv[/], one checkpoint at a time: what [bold]dse-ext select --against[/]
    compares DSE with. probe.json has the settings and the IoU of every class.

    Exit status: 0 when every checkpoint was measured, 3 when some were skipped, 2 when the options
    cannot be used, 130 when interrupted.
    """
    _run(
        {
            "method": method,
            "checkpoints": checkpoints,
            "dataset": dataset,
            "data": data,
            "name": name,
            "run": run,
            "layer": int(layer) if layer.removeprefix("-").isdigit() else layer,
            "model": model,
            "model_args": pairs("--model-arg", model_arg) or {},
            "precision": precision,
            "batch_size": batch_size,
            "device": device,
            "workers": workers,
            "allow_pickle": allow_pickle,
        },
        {
            "train_split": train_split,
            "val_split": val_split,
            "num_classes": num_classes,
            "ignore_index": ignore_index,
            "reduce_zero_label": reduce_zero_label,
            "val_share": val_share,
            "seed": seed,
            "train_scenes": train_scenes,
            "val_scenes": val_scenes,
        },
        {
            "train_images": train_images,
            "val_images": val_images,
            "l2": l2,
            "max_iter": max_iter,
            "k": k,
            "temperature": temperature,
            "bank": bank,
            "seed": seed,
        },
        probe,
        image_size,
        out,
        overwrite,
    )


def _run(
    options: dict[str, Any],
    data_options: dict[str, Any],
    settings: dict[str, Any],
    probes: str,
    image_size: str | None,
    out: Path,
    overwrite: bool,
) -> None:
    """Runs the sweep and turns its errors into messages and exit codes."""
    from rich.console import Console
    from rich.markup import escape

    errors = Console(stderr=True)
    try:
        from dse_ext.evaluation.probing import ProbeConfig, probe_checkpoints
        from dse_ext.probes import PROBES, ProbeSettings
        from dse_ext.probes.datasets import DatasetOptions

        if probes not in (*PROBES, "both"):
            raise ValueError(f"--probe must be {', '.join(PROBES)} or both, got {probes!r}.")
        config = ProbeConfig(
            **options,
            options=DatasetOptions(**data_options),
            probe=ProbeSettings(probes=PROBES if probes == "both" else (probes,), **settings),
            image_size=_size(image_size),
        )
        console = Console()
        result = probe_checkpoints(config, out, overwrite=overwrite, console=console)
    except ModuleNotFoundError as error:
        fail(
            errors,
            f"probe needs the package {error.name}, which is not installed: "
            "pip install 'dse-ext\\[ssl]'",
        )
    except KeyboardInterrupt:
        errors.print(
            "[yellow]stopped; what was measured is kept.[/] The same command goes on from there.",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(130) from None
    except (ValueError, OSError) as error:
        fail(errors, escape(str(error)))
    _report(console, result)
    if result.skipped:
        raise typer.Exit(SKIPPED)


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if not all(part.isdigit() for part in parts) or len(parts) > 2 or "0" in parts:
        raise ValueError(
            f"--image-size must be a number of pixels or HEIGHTxWIDTH, such as 448 or 512x1024, "
            f"got {text!r}."
        )
    return int(parts[0]), int(parts[-1])


def _report(console: Console, result: ProbeSweepResult) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from dse_ext.report.selection_table import print_table

    table = Table(
        box=SIMPLE_HEAD,
        title="[bold]mIoU in %[/]",
        title_justify="left",
        pad_edge=False,
        title_style="",
    )
    for title in ("run", "checkpoint"):
        table.add_column(title)
    for title in ("epoch", *result.columns):
        table.add_column(escape(title), justify="right")
    for file in result.files:
        mious = [result.results.miou(c, file.run, file.path.name) for c in result.columns]
        table.add_row(
            escape(file.run),
            escape(file.path.name),
            "-" if file.epoch is None else str(file.epoch),
            *("-" if miou is None else f"{100 * miou:.2f}" for miou in mious),
        )
    print_table(console, table)
    for file, reason in result.skipped:
        console.print(
            f"[yellow]skipped:[/] {escape(file.run)}/{escape(file.path.name)}: {escape(reason)}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"results: {result.table}, {result.details}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
