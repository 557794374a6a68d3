"""Tables of the self-supervised methods."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from dse_ext.ssl.config import TrainConfig
from dse_ext.ssl.methods import METHODS, Method, find_method

if TYPE_CHECKING:
    from rich.table import Table


def recipe_text(method: type[Method]) -> str:
    """Default backbone, optimizer and learning rate of a method.

    Args:
        method: The method.
    """
    config = TrainConfig.for_method(method.name)
    return f"{config.backbone}, {config.optimizer}, lr {config.lr:g}"


def methods_table() -> Table:
    """Every method with paper, backbones, recipe and what is regularized."""
    table = _table("Methods")
    for name in ("method", "name, paper", "backbones", "recipe", "what is regularized"):
        table.add_column(name, overflow="fold", no_wrap=name == "method")
    for method in METHODS.values():
        table.add_row(
            method.name,
            f"{method.title}: {method.paper}, {method.url.removeprefix('https://')}",
            method.backbones(),
            recipe_text(method),
            method.regularizes,
        )
    return table


def options_table(name: str) -> Table:
    """The options of a method (``--method-arg``) and of its recipe, with their values.

    Args:
        name: Name of the method.

    Raises:
        ConfigError: If there is no such method.
    """
    method = find_method(name)
    table = _table(f"{method.title}: options")
    table.add_column("option", no_wrap=True)
    table.add_column("default", overflow="fold")
    recipe: dict[str, Any] = dict(method.recipe)
    own = recipe.pop("method_args", {})
    for field in dataclasses.fields(method.Options):
        table.add_row(f"--method-arg {field.name}=", str(own.get(field.name, field.default)))
    for key, value in recipe.items():
        if isinstance(value, dict):
            for argument, item in value.items():
                option = f"--{key.replace('_args', '-arg')} {argument}="
                table.add_row(option, json.dumps(item))
        else:
            table.add_row(f"--{key.replace('_', '-')}", str(value))
    return table


def _table(title: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(box=SIMPLE_HEAD, title=title, title_justify="left")
