"""The command ``dse-ext``.

Commands import what they need when they run, so that ``--help`` and ``info`` answer at once and
also where the packages for training are not installed.
"""

from __future__ import annotations

import typer

from dse_ext.commands import bench, evaluate, info, probe, select, train

app = typer.Typer(
    name="dse-ext",
    help="Dense representation Structure Estimator (DSE): score, select and regularize dense "
    "features of self-supervised networks.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Keeps commands apart from options even where there is one command only."""


app.command()(info.info)
app.command()(train.train)
app.command()(evaluate.evaluate)
app.command()(probe.probe)
app.command()(select.select)
app.command()(bench.bench)


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
