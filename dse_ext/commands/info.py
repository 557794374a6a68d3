"""``dse-ext info``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from dse_ext.commands.common import fail


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    plan: Annotated[
        tuple[int, int, int, str] | None,
        typer.Option(
            metavar="B N d DTYPE",
            help="Print instead what a training step on such features would do on a GPU: the "
            "path, launches, shared memory and workspace. Needs the CUDA library, but no GPU.",
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="GPU to plan for: a100, h100, h200 or b200.  [dim]\\[default: the one that is "
            "there, else h200][/]"
        ),
    ] = None,
    variant: Annotated[
        str, typer.Option(help="Variant of DSE to plan: regularizer, evaluation or paper.")
    ] = "regularizer",
) -> None:
    """Print versions, build, what was loaded, and whether CUDA kernels are there."""
    if plan is not None:
        _print_plan(plan, gpu, variant, as_json)
        return
    from dse_ext import info as installation

    facts = installation.collect()
    typer.echo(json.dumps(facts, indent=2) if as_json else installation.render(facts), nl=as_json)


def _print_plan(
    wanted: tuple[int, int, int, str], gpu: str | None, variant: str, as_json: bool
) -> None:
    from rich.console import Console
    from rich.markup import escape

    from dse_ext import plan

    try:
        facts = plan.collect(wanted[:3], wanted[3], gpu=gpu, variant=variant)
    except (RuntimeError, ValueError) as error:
        fail(Console(stderr=True), escape(str(error)))
    typer.echo(json.dumps(facts, indent=2) if as_json else plan.render(facts), nl=as_json)
