"""What ``make docs`` does to links, formulas and docstrings."""

from __future__ import annotations

import sys
from pathlib import Path

import griffe
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import docs_docstrings
import docs_site


@pytest.mark.parametrize(
    ("source", "uri", "link", "expected"),
    [
        ("README.md", "index.md", "docs/definitions.md", "definitions.md"),
        ("README.md", "index.md", "docs/definitions.md#input", "definitions.md#input"),
        ("README.md", "index.md", "LICENSE", "LICENSE"),
        ("docs/definitions.md", "definitions.md", "../README.md#measured", "index.md#measured"),
        ("docs/api/core.md", "api/core.md", "../definitions.md", "../definitions.md"),
        ("docs/api/core.md", "api/core.md", "../../CONTRIBUTING.md", "../contributing.md"),
        ("csrc/cuda/README.md", "cuda-kernels.md", "../../docs/performance.md", "performance.md"),
        ("docs/a.md", "a.md", "https://example.org/x.md", "https://example.org/x.md"),
        ("docs/a.md", "a.md", "#here", "#here"),
    ],
)
def test_links_lead_to_the_site_s_pages(source: str, uri: str, link: str, expected: str) -> None:
    assert docs_site.turn_links(f"see [this]({link}).", source, uri) == f"see [this]({expected})."


def test_a_link_to_what_is_no_page_keeps_its_text() -> None:
    assert docs_site.turn_links("[`ops.cpp`](../csrc/ops.cpp) is", "docs/a.md", "a.md") == (
        "`ops.cpp` is"
    )


def test_formulas_become_mathml() -> None:
    assert docs_site.mathml(r"\frac{1}{n}", display=True).startswith("<math")
    assert "<mfrac>" in docs_site.mathml(r"\frac{1}{n}", display=True)
    assert "avg_norm" in docs_site.mathml(r"\texttt{avg\_norm}", display=False)
    assert "*" not in docs_site.mathml(r"\operatorname*{min}_x", display=False)


def test_a_formula_that_is_not_understood_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"unknown command \\nonsense"):
        docs_site.mathml(r"\nonsense{x}", display=False)


def rewritten(docstring: str) -> str:
    code = f'def f():\n    r"""{docstring}"""\n\n\ndef g(): ...\n'
    with griffe.temporary_visited_module(code, module_name="dse_ext") as found:
        function = found["f"]
        return docs_docstrings.to_markdown(function.docstring.value, function)


def test_roles_become_references() -> None:
    text = rewritten("See :func:`g`, :func:`dse_ext.g` and :class:`torch.Tensor`.")
    reference = '<autoref identifier="dse_ext.g" optional><code>{}</code></autoref>'
    assert text == (
        f"See {reference.format('g')}, {reference.format('dse_ext.g')} and `torch.Tensor`."
    )


def test_math_directives_become_formulas() -> None:
    text = rewritten("A mean.\n\n    .. math::\n        a =\n        b\n\n    After it.\n    ")
    assert text.split() == ["A", "mean.", "$$", "a", "=", "b", "$$", "After", "it."]


def test_a_directive_without_a_form_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"dse_ext\.f: the docstring has '\.\. note::'"):
        rewritten("A mean.\n\n    .. note::\n        b\n    ")


def test_the_command_s_reference_has_every_command_and_no_markup() -> None:
    text = docs_site.command_reference()
    assert "## `dse-ext train`" in text
    assert "--dse-weight" in text
    assert "[/]" not in text
    assert "[bold]" not in text
