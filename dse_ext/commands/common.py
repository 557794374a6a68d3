"""What the sub-commands share."""

from __future__ import annotations

import json
from typing import Any, NoReturn

import typer


def fail(console: Any, message: str) -> NoReturn:
    """Print an error message, which is rich markup, and exit with status 2."""
    console.print(f"[red]error:[/] {message}", highlight=False, soft_wrap=True)
    raise typer.Exit(2)


def pairs(option: str, items: list[str] | None) -> dict[str, Any] | None:
    """Parse KEY=VALUE arguments; a value that is JSON is read as such."""
    if not items:
        return None
    pairs: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"expected KEY=VALUE, got {item!r}", param_hint=option)
        try:
            pairs[key] = json.loads(text)
        except ValueError:
            pairs[key] = text
    return pairs
