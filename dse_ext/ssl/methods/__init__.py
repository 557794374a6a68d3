"""Self-supervised methods by name."""

from dse_ext.ssl.config import ConfigError
from dse_ext.ssl.methods.base import Method, MethodOutput
from dse_ext.ssl.methods.dino import DINO

METHODS: dict[str, type[Method]] = {method.name: method for method in (DINO,)}
"""Every method that a run can be started with."""


def find_method(name: str) -> type[Method]:
    """Returns a method by its name.

    Raises:
        ConfigError: If there is no such method.
    """
    if name not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(sorted(METHODS))}, got {name!r}.")
    return METHODS[name]


__all__ = ["DINO", "METHODS", "Method", "MethodOutput", "find_method"]
