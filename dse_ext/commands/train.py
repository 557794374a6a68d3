"""``dse-ext train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dse_ext.commands.common import fail, pairs

_WHAT = "What is trained"
_HOW = "How it is trained"
_DSE = "DSE"
_SCORES = "Scores"
_MACHINE = "Run and machine"


def train(
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder for checkpoints, log, report and results. Where the method is named it "
            "may be left out: then it is runs/METHOD.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    list_methods: Annotated[
        bool,
        typer.Option(
            "--list",
            help="List the methods with paper, backbones, recipe and what is regularized; where a "
            "method is named, its options.",
            rich_help_panel=_WHAT,
        ),
    ] = False,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Named set of options; options given besides take precedence. "
            "[bold]demo[/]: a small ViT on texture scenes, sized for two CPU cores and four "
            "minutes.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="texture-scenes|DIR",
            help="Scenes composed of photographs, with true labels; or any folder of images "
            "(searched with its sub-folders).  [dim]\\[default: texture-scenes][/]",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Self-supervised method; --list shows all of them. Where its recipe names an "
            "option that is not given, the recipe takes the place of the default below.  "
            "[dim]\\[default: dino][/]",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    method_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Option of the method, such as momentum=0.99; may be given several times.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="Any timm model of a family that the method trains.  "
            "[dim]\\[default: vit_tiny_patch16_224][/]",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    backbone_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Keyword argument for timm.create_model, such as depth=4; may be given several "
            "times.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            help="Width and height of a global view in pixels.  [dim]\\[default: 96][/]",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    patch_size: Annotated[
        int | None,
        typer.Option(
            help="Patch size of a ViT in pixels.  [dim]\\[default: the model's own][/]",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Optimizer steps.  [dim]\\[default: 1000][/]", rich_help_panel=_HOW),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            help="Passes over the images, in the place of --steps; 0 leaves --steps.  "
            "[dim]\\[default: 0][/]",
            rich_help_panel=_HOW,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Images per step.  [dim]\\[default: 64][/]", rich_help_panel=_HOW),
    ] = None,
    accumulate: Annotated[
        int | None,
        typer.Option(
            help="Parts that a batch is worked on in, one after the other, to save memory.  "
            "[dim]\\[default: 1][/]",
            rich_help_panel=_HOW,
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            help="adamw, sgd or lars.  [dim]\\[default: adamw][/]",
            rich_help_panel=_HOW,
        ),
    ] = None,
    sgd_momentum: Annotated[
        float | None,
        typer.Option(
            help="Momentum of SGD and LARS.  [dim]\\[default: 0.9][/]",
            rich_help_panel=_HOW,
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate.  [dim]\\[default: 5e-4][/]", rich_help_panel=_HOW),
    ] = None,
    min_lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate at the end.  [dim]\\[default: 1e-6][/]", rich_help_panel=_HOW
        ),
    ] = None,
    warmup: Annotated[
        float | None,
        typer.Option(
            help="Share of the steps over which the learning rate rises.  [dim]\\[default: 0.1][/]",
            rich_help_panel=_HOW,
        ),
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(
            help="Weight decay at the start.  [dim]\\[default: 0.04][/]", rich_help_panel=_HOW
        ),
    ] = None,
    weight_decay_end: Annotated[
        float | None,
        typer.Option(
            help="Weight decay at the end.  [dim]\\[default: 0.4][/]", rich_help_panel=_HOW
        ),
    ] = None,
    clip_grad: Annotated[
        float | None,
        typer.Option(
            help="Bound on the gradient's norm; 0 for none.  [dim]\\[default: 3][/]",
            rich_help_panel=_HOW,
        ),
    ] = None,
    train_images: Annotated[
        int | None,
        typer.Option(
            help="Number of training scenes (texture-scenes only).  [dim]\\[default: 2048][/]",
            rich_help_panel=_HOW,
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Checkpoint to start from: of another run (a network, or its resume.pt with all "
            "heads), or of any method that dse-ext evaluate reads.  "
            "[dim]\\[default: random weights][/]",
            rich_help_panel=_HOW,
        ),
    ] = None,
    init_format: Annotated[
        str | None,
        typer.Option(
            help="What wrote it, such as dse-ext or dino; auto tells by the file name and "
            "--method.  "
            "[dim]\\[default: auto][/]",
            rich_help_panel=_HOW,
        ),
    ] = None,
    allow_pickle: Annotated[
        bool | None,
        typer.Option(
            help="Let code in the checkpoint run: only for files of someone you trust.  "
            "[dim]\\[default: False][/]",
            rich_help_panel=_HOW,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of everything.  [dim]\\[default: 0][/]", rich_help_panel=_HOW),
    ] = None,
    dse_weight: Annotated[
        float | None,
        typer.Option(
            help="β of L = L_ssl − β · DSE; 0 trains without it.  [dim]\\[default: 0.001][/]",
            rich_help_panel=_DSE,
        ),
    ] = None,
    dse_every: Annotated[
        int | None,
        typer.Option(
            help="DSE takes part in every n-th step.  [dim]\\[default: 1][/]",
            rich_help_panel=_DSE,
        ),
    ] = None,
    dse_warmup: Annotated[
        float | None,
        typer.Option(
            help="Share of the steps over which β rises from 0.  [dim]\\[default: 0][/]",
            rich_help_panel=_DSE,
        ),
    ] = None,
    dim_weight: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER|auto",
            help="λ of DSE = M_inter − M_intra + λ · M_dim; auto takes the ratio of the standard "
            "deviations of both parts over the run so far.  "
            "[dim]\\[default: 1.0][/]",
            rich_help_panel=_DSE,
        ),
    ] = None,
    dse_layer: Annotated[
        str | None,
        typer.Option(
            help="Layer that is regularized: last, the number of a block or stage (negative: "
            "from the end), or the name of a module.  "
            "[dim]\\[default: last][/]",
            rich_help_panel=_DSE,
        ),
    ] = None,
    dse_views: Annotated[
        int | None,
        typer.Option(
            help="Global views that are regularized; 0 for all.  [dim]\\[default: 0][/]",
            rich_help_panel=_DSE,
        ),
    ] = None,
    local_clusters: Annotated[
        int | None,
        typer.Option(help="Clusters per image.  [dim]\\[default: 3][/]", rich_help_panel=_DSE),
    ] = None,
    global_clusters: Annotated[
        int | None,
        typer.Option(
            help="Clusters per group of images.  [dim]\\[default: 24][/]", rich_help_panel=_DSE
        ),
    ] = None,
    checkpoints: Annotated[
        int | None,
        typer.Option(
            help="Checkpoints that are kept and scored, besides the untrained network; 0 chooses: "
            "one for every 20 steps, 1 to 10.  [dim]\\[default: 0][/]",
            rich_help_panel=_SCORES,
        ),
    ] = None,
    score_images: Annotated[
        int | None,
        typer.Option(
            help="Images that DSE is computed on.  [dim]\\[default: 2048][/]",
            rich_help_panel=_SCORES,
        ),
    ] = None,
    probe_images: Annotated[
        int | None,
        typer.Option(
            help="Labelled scenes that the probe is fitted to.  [dim]\\[default: 512][/]",
            rich_help_panel=_SCORES,
        ),
    ] = None,
    heldout_images: Annotated[
        int | None,
        typer.Option(
            help="Held-out scenes that mIoU is measured on.  [dim]\\[default: 256][/]",
            rich_help_panel=_SCORES,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in --out to the same result; start it if there is none.",
            rich_help_panel=_MACHINE,
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Delete the run in --out and start again.",
            rich_help_panel=_MACHINE,
        ),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            help="auto, cpu, cuda or cuda:N.  [dim]\\[default: auto][/]", rich_help_panel=_MACHINE
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 (autocast) or float16 (autocast, scaled loss; steps whose "
            "gradient is not finite are skipped).  [dim]\\[default: float32][/]",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    grad_checkpointing: Annotated[
        bool | None,
        typer.Option(
            help="Compute activations again in the backward pass, to save memory.  "
            "[dim]\\[default: False][/]",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option(
            help="Compile the method's forward and backward pass (torch.compile).  "
            "[dim]\\[default: False][/]",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            help="CPU threads for training; 0 chooses.  [dim]\\[default: 0][/]",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that prepare images; -1 chooses.  [dim]\\[default: -1][/]",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between two writes of the state for --resume.  [dim]\\[default: 100][/]",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
) -> None:
    """Train a network with the DSE regularizer, score its checkpoints and write a report.

    Trains with a self-supervised method, from scratch or from a checkpoint (--init), keeps a series
    of checkpoints, scores each with DSE, measures the true dense quality where there are labels,
    chooses checkpoints by DSE, prints one table and writes [bold]report.html[/] and
    [bold]results.json[/] into --out.
    """
    given: dict[str, Any] = {
        "data": data,
        "method": method,
        "method_args": pairs("--method-arg", method_arg),
        "backbone": backbone,
        "backbone_args": pairs("--backbone-arg", backbone_arg),
        "image_size": image_size,
        "patch_size": patch_size,
        "steps": steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "optimizer": optimizer,
        "sgd_momentum": sgd_momentum,
        "lr": lr,
        "min_lr": min_lr,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "weight_decay_end": weight_decay_end,
        "clip_grad": clip_grad,
        "train_images": train_images,
        "seed": seed,
        "init": init,
        "init_format": init_format,
        "allow_pickle": allow_pickle,
        "dse_weight": dse_weight,
        "dse_every": dse_every,
        "dse_warmup": dse_warmup,
        "dim_weight": _number_or_word(dim_weight),
        "dse_layer": dse_layer,
        "dse_views": dse_views,
        "local_clusters": local_clusters,
        "global_clusters": global_clusters,
        "checkpoints": checkpoints,
        "score_images": score_images,
        "probe_images": probe_images,
        "heldout_images": heldout_images,
        "device": device,
        "precision": precision,
        "grad_checkpointing": grad_checkpointing,
        "compile": compile,
        "threads": threads,
        "workers": workers,
        "save_every": save_every,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if list_methods:
        _list(method)
        return
    if out is None:
        if method is None:
            raise typer.BadParameter(
                "is needed (or --method, whose run is then in runs/METHOD).", param_hint="--out"
            )
        out = Path("runs") / method
    _run(given, preset, out, resume, overwrite)


def _number_or_word(text: str | None) -> float | str | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _list(method: str | None) -> None:
    """Prints the methods, or the options of one."""
    from rich.console import Console

    errors = Console(stderr=True)
    try:
        from dse_ext.report.methods import methods_table, options_table
        from dse_ext.ssl import ConfigError

        try:
            table = methods_table() if method is None else options_table(method)
        except ConfigError as error:
            fail(errors, str(error))
    except ModuleNotFoundError as error:
        _needs(error, errors)
    Console().print(table)


def _needs(error: ModuleNotFoundError, errors: Any) -> None:
    fail(
        errors,
        f"training needs the package {error.name}, which is not installed: "
        "pip install 'dse-ext\\[ssl]'",
    )


def _run(
    given: dict[str, Any], preset: str | None, out: Path, resume: bool, overwrite: bool
) -> None:
    """Runs ``train`` and turns its errors into messages and exit codes."""
    from rich.console import Console

    errors = Console(stderr=True)
    try:
        from dse_ext import ssl
        from dse_ext.ssl.config import merge_options
    except ModuleNotFoundError as error:
        _needs(error, errors)
    try:
        config = merge_options(given, preset, out if resume and not overwrite else None)
        ssl.train(config, out, resume=resume, overwrite=overwrite, console=Console())
    except ssl.Interrupted as stop:
        errors.print(
            f"[yellow]{stop}; everything is saved.[/] Continue with:\n"
            f"  dse-ext train --out {out} --resume",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(130) from None
    except ModuleNotFoundError as error:
        _needs(error, errors)
    except (ValueError, OSError, ssl.TrainingDiverged) as error:
        from rich.markup import escape

        fail(errors, escape(str(error)))
