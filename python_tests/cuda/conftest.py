"""Puts what the kernel tests counted and measured at the end of pytest's output."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def summary(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Adds a line to the end of the output (python_tests/conftest.py prints it)."""

    def add(line: str) -> None:
        request.node.user_properties.append(("CUDA kernels", line))

    return add
