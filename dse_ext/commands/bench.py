"""``dse-ext bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dse_ext.commands.common import fail

if TYPE_CHECKING:
    from rich.console import Console

    from dse_ext.bench.plan import Settings
    from dse_ext.bench.results import Table


def bench(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for bench.json and bench.png.")
    ] = Path("runs/bench"),
    seconds: Annotated[
        float, typer.Option(help="Time for everything; what does not fit is named.")
    ] = 120.0,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="B,N,d",
            help="Images, positions and features; may be given several times, the most important "
            "first.  [dim]\\[default: 64,196,384, 32,196,768, 8,196,1024 and 16,1024,384][/]",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, float64, bfloat16 or float16. Peers without half precision convert to "
            "float32, as their users do."
        ),
    ] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    threads: Annotated[
        int | None,
        typer.Option(
            help="Threads of every implementation.  [dim]\\[default: the cores there are][/]",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes: does everything work?")
    ] = False,
) -> None:
    """Time dse-ext on this machine, beside what is installed of its peers.

    The DSE regularizer, k-means, nuclear norms and the effective rank take turns with lightly,
    batched PyTorch (eager and compiled), scikit-learn, faiss, torch.linalg and scipy; results are
    compared before times count. Then extra peak memory, growth with each axis, and the share of a
    training step of a ViT. Ctrl-C ends it; what was measured is kept.
    """
    from rich.console import Console
    from rich.markup import escape

    errors = Console(stderr=True)
    try:
        settings = _settings(seconds, shape, dtype, device, threads, quick)
    except ValueError as error:
        fail(errors, escape(str(error)))
    if not _measure(Console(), settings, out):
        raise typer.Exit(130)


def _settings(
    seconds: float,
    shapes: list[str] | None,
    dtype: str,
    device: str,
    threads: int | None,
    quick: bool,
) -> Settings:
    import torch

    from dse_ext.bench.case import DTYPES, default_threads
    from dse_ext.bench.plan import QUICK_SHAPES, SHAPES, Settings

    if not seconds > 0:
        raise ValueError(f"--seconds must be > 0, got {seconds}.")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if threads is not None and threads < 1:
        raise ValueError(f"--threads must be >= 1, got {threads}.")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {device!r}.")
    if kind == "cuda":
        from dse_ext import info

        if not (cuda := info.collect()["cuda"])["usable"]:
            raise ValueError(f"--device {device} cannot be used: {cuda['reason']}.")
    chosen = QUICK_SHAPES if quick else SHAPES
    return Settings(
        shapes=chosen if not shapes else tuple(_shape(text) for text in shapes),
        dtype=dtype,
        device=device,
        threads=threads or default_threads(),
        seconds=seconds,
        quick=quick,
    )


def _shape(text: str) -> tuple[int, int, int]:
    try:
        images, positions, dim = (int(part) for part in text.split(","))
        if min(images, positions, dim) < 1:
            raise ValueError
    except ValueError:
        raise ValueError(f"--shape must be B,N,d, three numbers >= 1, got {text!r}.") from None
    return images, positions, dim


def _measure(console: Console, settings: Settings, out: Path) -> bool:
    """Runs everything; False where the user interrupted it."""
    import json

    from dse_ext.bench.progress import bench_progress
    from dse_ext.bench.run import Run
    from dse_ext.files import save_text

    path = out / "bench.json"

    def save(results: dict[str, Any]) -> None:
        save_text(path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")

    finished = True
    with bench_progress(console, settings.seconds) as tell:
        run = Run(settings, tell, save)
        try:
            run.all()
        except KeyboardInterrupt:
            finished = False
    results = run.results()
    _print(console, results)
    written = [path.name]
    reason = _draw(results, out / "bench.png")
    if reason is None:
        written.append("bench.png")
    _say(console, f"no figure: {reason}" if reason else "", "yellow")
    _say(console, f"written to {out}: {', '.join(written)}")
    if not finished:
        _say(
            console, "interrupted: the results are those of what was measured until then", "yellow"
        )
    return finished


def _say(console: Console, text: str, style: str | None = None) -> None:
    if text:
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def _print(console: Console, results: dict[str, Any]) -> None:
    from dse_ext.bench.results import tables

    facts = results["machine"]
    _say(
        console,
        f"\n{facts.get('gpu') or facts['cpu']}, {facts['threads']} threads, "
        f"torch {facts['torch']}, dse-ext {facts['dse_ext']}, {results['elapsed_seconds']:.0f} s. "
        "× is a peer's time over that of dse-ext.",
    )
    for table in tables(results["rows"], results["shares"], long=True):
        _print_table(console, table)
    reasons: dict[str, list[str]] = {}
    for entry in results["skipped"]:
        reasons.setdefault(entry["reason"], []).append(entry["what"])
    for reason, what in reasons.items():
        _say(console, f"skipped, {reason}: {'; '.join(what)}", "yellow")


def _print_table(console: Console, table: Table) -> None:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(box=box.SIMPLE, title=table.title, title_justify="left", pad_edge=False)
    for number, name in enumerate(table.header):
        shown.add_column(
            Text(name), justify="left" if number < table.text_columns else "right", overflow="fold"
        )
    for line in table.lines:
        shown.add_row(*(Text(cell) for cell in line))
    console.print(shown)
    for note in table.notes:
        _say(console, f"  {note}", "dim")


def _draw(results: dict[str, Any], path: Path) -> str | None:
    """Draws the figure; why there is none, or None."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed (pip install 'dse-ext[ssl]')"
    from dse_ext.bench.figure import bench_figure
    from dse_ext.files import replacing

    try:
        figure = bench_figure(results)
    except ValueError as error:
        return str(error)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160, metadata={"Software": None})
    return None
