"""``dse-ext evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dse_ext.commands.common import fail, pairs

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dse_ext.evaluation import SweepResult

#: Exit status where some checkpoint could not be scored.
SKIPPED = 3

_WHAT = "What is scored"
_HOW = "How it is scored"
_MACHINE = "Run and machine"


def evaluate(
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|MODULE:FUNCTION",
            help="Method whose checkpoint layout is read (see --list), or a function of your own "
            "that returns a CheckpointReader.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    checkpoints: Annotated[
        str | None,
        typer.Option(
            metavar="'GLOB'",
            help="Checkpoint files: a pattern in quotes, or their folder. Those of several runs "
            "are told apart by their folders.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|texture-scenes",
            help="Images, without labels: any folder (searched with its sub-folders), or scenes "
            "composed of photographs that need no download.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results.csv and results.json; a sweep that was interrupted goes on "
            "in it.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    list_methods: Annotated[
        bool,
        typer.Option("--list", help="List the methods and their layouts.", rich_help_panel=_WHAT),
    ] = False,
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
            help="Keyword argument for timm.create_model, such as depth=6; may be given several "
            "times.",
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
    run: Annotated[
        str | None,
        typer.Option(
            help="Name of the run in the results.  [dim]\\[default: the checkpoints' folder][/]",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    variant: Annotated[
        str,
        typer.Option(
            metavar="evaluation|paper|regularizer",
            help="Definition of DSE (docs/definitions.md).",
            rich_help_panel=_HOW,
        ),
    ] = "evaluation",
    images: Annotated[
        int,
        typer.Option(
            help="Images: a fixed choice, the same for every checkpoint.", rich_help_panel=_HOW
        ),
    ] = 2048,
    image_size: Annotated[
        int | None,
        typer.Option(
            help="Width and height of an image in pixels; position embeddings are resampled.  "
            "[dim]\\[default: 224, or as the checkpoint tells][/]",
            rich_help_panel=_HOW,
        ),
    ] = None,
    dse_batch: Annotated[
        int,
        typer.Option(
            help="Images whose DSE is computed together at most; batches are averaged.",
            rich_help_panel=_HOW,
        ),
    ] = 1024,
    lidar_images: Annotated[
        int,
        typer.Option(help="Images for LiDAR; 0 leaves it out.", rich_help_panel=_HOW),
    ] = 512,
    lidar_views: Annotated[
        int,
        typer.Option(help="Augmented views of each for LiDAR.", rich_help_panel=_HOW),
    ] = 4,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of the choice of images, of k-means and of LiDAR's views.",
            rich_help_panel=_HOW,
        ),
    ] = 0,
    precision: Annotated[
        str,
        typer.Option(
            metavar="float32|bfloat16|float16",
            help="Arithmetic of the network.",
            rich_help_panel=_HOW,
        ),
    ] = "float32",
    batch_size: Annotated[
        int, typer.Option(help="Images per forward pass.", rich_help_panel=_MACHINE)
    ] = 64,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=_MACHINE)
    ] = "auto",
    workers: Annotated[
        int,
        typer.Option(
            help="Processes that prepare images; -1 chooses, 0 prepares them in this one.",
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
            help="Delete the results in --out and start again.",
            rich_help_panel=_MACHINE,
        ),
    ] = False,
) -> None:
    """Score the checkpoints of a pretraining run without labels.

    Loads each checkpoint into a timm backbone, computes the components of DSE on its dense
    features and RankMe, dense RankMe, α-ReQ and LiDAR besides, and writes [bold]results.csv[/] and
    [bold]results.json[/], one checkpoint at a time. Under [bold]torchrun --nproc-per-node K -m
    dse_ext.cli evaluate[/] the checkpoints are shared among K processes.

    Exit status: 0 when every checkpoint was scored, 3 when some were skipped (results.json says
    why), 2 when the options cannot be used, 130 when interrupted.
    """
    if list_methods:
        _list()
        return
    required = {"--method": method, "--checkpoints": checkpoints, "--data": data, "--out": out}
    missing = [option for option, value in required.items() if value is None]
    if missing:
        raise typer.BadParameter(f"missing {', '.join(missing)} (or give --list)")
    _run(
        {
            "method": method,
            "checkpoints": checkpoints,
            "data": data,
            "variant": variant,
            "images": images,
            "image_size": image_size,
            "layer": int(layer) if layer.removeprefix("-").isdigit() else layer,
            "model": model,
            "model_args": pairs("--model-arg", model_arg) or {},
            "seed": seed,
            "precision": precision,
            "dse_batch": dse_batch,
            "lidar_images": lidar_images,
            "lidar_views": lidar_views,
            "run": run,
            "batch_size": batch_size,
            "device": device,
            "workers": workers,
            "allow_pickle": allow_pickle,
        },
        Path(str(out)),
        overwrite,
    )


def _run(options: dict[str, Any], out: Path, overwrite: bool) -> None:
    """Runs the sweep and turns its errors into messages and exit codes."""
    from rich.console import Console
    from rich.markup import escape

    errors = Console(stderr=True)
    try:
        from dse_ext.evaluation import EvaluateConfig, evaluate

        console = Console()
        result = evaluate(EvaluateConfig(**options), out, overwrite=overwrite, console=console)
    except ModuleNotFoundError as error:
        fail(
            errors,
            f"evaluate needs the package {error.name}, which is not installed: "
            "pip install 'dse-ext\\[ssl]'",
        )
    except KeyboardInterrupt:
        errors.print(
            "[yellow]stopped; what was scored is kept.[/] The same command goes on from there.",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(130) from None
    except (ValueError, OSError) as error:
        fail(errors, escape(str(error)))
    if not result.rows and not result.skipped:
        return  # a process other than the first of torchrun's
    _report(console, result)
    if result.skipped:
        raise typer.Exit(SKIPPED)


def _report(console: Console, result: SweepResult) -> None:
    from rich.markup import escape

    if result.rows:
        console.print(_table(result.rows))
    for skipped in result.skipped:
        console.print(
            f"[yellow]skipped:[/] {escape(skipped['run'])}/{escape(skipped['checkpoint'])}: "
            f"{escape(skipped['reason'])}",
            highlight=False,
            soft_wrap=True,
        )
    seconds = result.seconds
    if seconds.forward > 0:
        share = 100 * seconds.dse / seconds.forward
        console.print(
            f"forward passes {seconds.forward:.1f} s ({seconds.images / seconds.forward:.0f} "
            f"images/s), waiting for images {seconds.data:.1f} s, DSE {seconds.dse:.1f} s "
            f"({share:.1f} % of the forward passes), RankMe and α-ReQ {seconds.baselines:.1f} s, "
            f"LiDAR with its views {seconds.lidar:.1f} s",
            highlight=False,
        )
    folder = result.folder
    console.print(f"results: {folder.csv}, {folder.json}", highlight=False, soft_wrap=True)


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich import box
    from rich.table import Table

    columns = {
        "m_inter": "M inter",
        "m_intra": "M intra",
        "m_dim": "M dim",
        "rankme": "RankMe",
        "rankme_dense": "RankMe†",
        "alpha_req": "α-ReQ",
        "lidar": "LiDAR",
    }
    table = Table(box=box.SIMPLE_HEAD, caption="† of the dense features", caption_justify="left")
    several = len({row["run"] for row in rows}) > 1
    if several:
        table.add_column("run", overflow="fold")
    named = any(row["epoch"] is None for row in rows)
    table.add_column("checkpoint" if named else "epoch", justify="left" if named else "right")
    for title in columns.values():
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        digits = {"m_inter": 4, "m_intra": 4, "m_dim": 4, "alpha_req": 3}
        values = [
            "–" if row[name] is None else f"{row[name]:.{digits.get(name, 2)}f}" for name in columns
        ]
        name = row["checkpoint"] if named else str(row["epoch"])
        table.add_row(*([row["run"]] if several else []), name, *values)
    return table


def _list() -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from dse_ext.checkpoints import PAPER, readers

    table = Table(box=box.SIMPLE)
    for title in ("--method", "method", "files", "weights in", "network", "timm model"):
        table.add_column(title, overflow="fold")
    for number, reader in enumerate(readers(), start=1):
        found = "by the weights" if reader.describe else reader.model
        table.add_row(
            reader.name,
            reader.title,
            " ".join(reader.files),
            " or ".join(key or "the file" for key in reader.keys),
            reader.network,
            found,
            end_section=number == len(PAPER),
        )
    console = Console()
    console.print(table)
    console.print(
        f"The first {len(PAPER)} are the paper's. One of your own: --method module:function, where "
        "the function returns a dse_ext.checkpoints.CheckpointReader.",
        highlight=False,
    )
