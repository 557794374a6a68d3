"""``dse-ext info``."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Print versions, build, what was loaded, and whether CUDA kernels are there."""
    from dse_ext import info as installation

    facts = installation.collect()
    typer.echo(json.dumps(facts, indent=2) if as_json else installation.render(facts), nl=as_json)
