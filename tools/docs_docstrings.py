"""Docstrings for the site: a griffe extension, named in mkdocs.yml.

In the sources cross-references and formulas are written as Sphinx and IDEs know them
(``:func:`name```, ``.. math::``). The site is Markdown: they are turned into its links and ``$$``.
A role or directive that is left over is an error: it would be shown as it is.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

from griffe import Extension, Module, Object

_ROLE = re.compile(r":(?:func|class|meth|data|attr|mod|exc|obj):`~?(?P<name>[\w.]+)`")
_MATH = re.compile(
    r"^(?P<indent>[ ]*)\.\. math::[ ]*\n(?P<body>(?:[ ]*\n|(?P=indent)[ ]+\S.*\n?)+)", re.MULTILINE
)
_LEFT = re.compile(r":[a-z]+:`|^\s*\.\. [a-z]+::", re.MULTILINE)


class SiteDocstrings(Extension):
    """Rewrites the docstring of everything in a package once it is loaded."""

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        """Go through the package."""
        self._rewrite(pkg)

    def _rewrite(self, obj: Object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value, obj)
        for member in obj.members.values():
            if not member.is_alias:
                self._rewrite(member)  # type: ignore[arg-type]


def to_markdown(docstring: str, obj: Object) -> str:
    """Return a docstring with Markdown in place of roles and ``.. math::``.

    Args:
        docstring: The text.
        obj: What it documents; names in it are looked up from there.

    Returns:
        The text for mkdocstrings.

    Raises:
        ValueError: If a role or a directive is left that has no Markdown form here.
    """
    text = _MATH.sub(_formula, docstring)
    text = _ROLE.sub(lambda match: _reference(match["name"], obj), text)
    if left := _LEFT.search(text):
        raise ValueError(
            f"{obj.path}: the docstring has {left[0].strip()!r}, which has no form here"
        )
    return text


def _formula(match: re.Match[str]) -> str:
    body = textwrap.dedent(match["body"]).strip()
    lines = ["$$", *body.splitlines(), "$$"]
    return "\n".join(match["indent"] + line for line in lines) + "\n\n"


def _reference(name: str, obj: Object) -> str:
    path = _path(name, obj)
    if path is None:
        return f"`{name}`"
    # Optional: not everything that a docstring names has a place in the site.
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'


def _path(name: str, obj: Object) -> str | None:
    """Return the full name of what a docstring calls ``name``, or None if it is not of dse_ext."""
    candidates = [name] if name.startswith("dse_ext.") else []
    scope: Object | None = obj
    while scope is not None:
        candidates.append(f"{scope.path}.{name}")
        scope = scope.parent
    package = obj.package
    for candidate in candidates:
        inner = candidate.removeprefix("dse_ext.")
        try:
            found = package[inner]
        except KeyError:
            continue
        return str(found.canonical_path)
    return None
