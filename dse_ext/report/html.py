"""The page: text, table and embedded figures in one file that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from dse_ext.report.table import ordinal
from dse_ext.ssl.scoring import CheckpointScore, Selection

_STYLE = """
:root { --ink: #1f2430; --muted: #6b7280; --line: #e5e7eb; --accent: #2e8b6d; --soft: #f6f7f9; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--soft); color: var(--ink);
       font: 15px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 36px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 0 0 10px; }
p { margin: 6px 0; }
.lead, .note { color: var(--muted); }
.note { font-size: 13.5px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px;
          padding: 20px 22px; margin-top: 20px; overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px;
         margin-top: 20px; }
.tile { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.tile b { display: block; font-size: 23px; font-weight: 650; letter-spacing: -0.01em; }
.tile span { color: var(--muted); font-size: 13px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: right; font-size: 12.5px; color: var(--muted); font-weight: 600; }
td { text-align: right; }
th, td { padding: 5px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:last-child, td:last-child { text-align: left; }
tr.chosen td { background: #edf7f2; font-weight: 600; }
tr.untrained td { color: var(--muted); }
img { display: block; max-width: 100%; height: auto; margin: 8px auto 0; }
pre { margin: 0; font-size: 12.5px; line-height: 1.45; white-space: pre-wrap; }
summary { cursor: pointer; font-weight: 600; }
code { font-size: 0.92em; }
"""


def page(
    title: str,
    lead: str,
    tiles: Sequence[tuple[str, str]],
    sections: Sequence[str],
) -> str:
    """Puts a page together.

    Args:
        title: Heading, plain text.
        lead: One sentence below it, plain text.
        tiles: Figures at a glance: value and what it is, plain text.
        sections: HTML of the sections.

    Returns:
        The page.
    """
    cards = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for value, name in tiles
    )
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n'
        f'<div class="tiles">{cards}</div>\n{body}\n</main>\n</body>\n</html>\n'
    )


def figure_section(title: str, text: str, uri: str) -> str:
    """A section with a figure.

    Args:
        title: Heading, plain text.
        text: What is to be seen, plain text.
        uri: Data URI of the figure.
    """
    return (
        f"<section><h2>{escape(title)}</h2><p class='note'>{escape(text)}</p>"
        f'<img alt="{escape(title)}" src="{uri}"></section>'
    )


def table_section(
    scores: Sequence[CheckpointScore],
    selection: Selection,
    lines: Sequence[str],
    start: str = "untrained",
) -> str:
    """The checkpoint table.

    Args:
        scores: One score per checkpoint in the order of training.
        selection: λ and the chosen checkpoints.
        lines: Sentences below it, plain text.
        start: What the network at step 0 is.
    """
    labelled = all(score.miou is not None for score in scores)
    heads = ["step", "M inter", "M intra, image", "M intra, batch", "M dim", "DSE"]
    heads += ["mIoU, %"] if labelled else []
    rows = []
    for score in scores:
        cells = [
            str(score.step),
            f"{score.m_inter:.4f}",
            f"{score.m_intra_image:.4f}",
            f"{score.m_intra_batch:.4f}",
            f"{score.m_dim:.4f}",
            f"{score.dse(selection.dim_weight):.4f}",
        ]
        if score.miou is not None and labelled:
            cells.append(f"{100 * score.miou:.1f}")
        kind, choice = "", "no"
        if score.step == 0:
            kind, choice = "untrained", f"{start}, for comparison"
        elif score.step in selection.chosen:
            kind = "chosen"
            choice = f"yes, {ordinal(selection.chosen.index(score.step) + 1)}"
        cells.append(choice)
        rows.append(f'<tr class="{kind}">' + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in [*heads, "chosen"])
    notes = "".join(f'<p class="note">{escape(line)}</p>' for line in lines)
    return (
        f"<section><h2>Checkpoints</h2><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>{notes}</section>"
    )


def text_section(title: str, paragraphs: Sequence[str]) -> str:
    """A section of plain paragraphs."""
    body = "".join(f"<p>{escape(text)}</p>" for text in paragraphs)
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def json_section(title: str, content: Any) -> str:
    """A section that unfolds to JSON."""
    text = escape(json.dumps(content, indent=2, ensure_ascii=False))
    return (
        f"<section><details><summary>{escape(title)}</summary><pre>{text}</pre></details></section>"
    )
