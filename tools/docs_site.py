"""What ``mkdocs`` does for this project besides: a hook module, named in mkdocs.yml.

* Pages that live elsewhere in the project (README, CONTRIBUTING, the CUDA kernels' README) and the
  reference of the command line become pages of the site, without a copy in docs/.
* Links are written for whoever reads the files in the repository; here they are turned to the
  site's pages. A link to a file that is no page of the site loses its link and keeps its text.
* Formulas become MathML, which browsers render by themselves: no script, no font, no network. One
  that cannot be converted fails the build.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "csrc/cuda/README.md": "cuda-kernels.md",
}
"""Files outside docs/ that are pages of the site."""

ATTACHED = ("examples/*.py", "LICENSE")
"""Files outside docs/ that the site carries along as they are."""

_LINK = re.compile(r"\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^()\s]+)\)")
_FENCED = re.compile(r"^(?P<fence>```+|~~~+).*?^(?P=fence)[ \t]*$", re.MULTILINE | re.DOTALL)
_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\s*\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]\s*</(?P=tag)>',
    re.DOTALL,
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and files that are not in docs/."""
    for source, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    for path in attached():
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, "command-line.md", content=command_reference()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between the project's files into links between the site's pages."""
    uri = page.file.src_uri
    source = {page: source for source, page in PAGES.items()}.get(uri, f"docs/{uri}")
    # Code is left alone: something like f[i](x) is no link there.
    pieces, end = [], 0
    for code in _FENCED.finditer(markdown):
        pieces += [turn_links(markdown[end : code.start()], source, uri), code[0]]
        end = code.end()
    return "".join([*pieces, turn_links(markdown[end:], source, uri)])


def on_page_content(html_text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Render the page's formulas."""
    try:
        return _FORMULA.sub(_mathml, html_text)
    except ValueError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error


def attached() -> list[str]:
    """Return the files that the site carries along, relative to the project's root."""
    return sorted(
        str(path.relative_to(ROOT)) for pattern in ATTACHED for path in ROOT.glob(pattern)
    )


def turn_links(markdown: str, source: str, uri: str) -> str:
    """Rewrite the links of a file for the place that it has in the site.

    Args:
        markdown: The text.
        source: Its file, relative to the project's root.
        uri: Its page, relative to docs/.

    Returns:
        The text with the site's links.
    """
    carried = set(attached())

    def turned(match: re.Match[str]) -> str:
        text, target = match["text"], match["target"]
        path, hash_sign, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if file in PAGES:
            file = PAGES[file]
        elif file.startswith("docs/"):
            file = file.removeprefix("docs/")
        elif file not in carried:
            return text
        relative = posixpath.relpath(file, posixpath.dirname(uri) or ".")
        return f"[{text}]({relative}{hash_sign}{anchor})"

    return _LINK.sub(turned, markdown)


def _mathml(match: re.Match[str]) -> str:
    display = match["open"] == "["
    formula = mathml(html.unescape(match["tex"]), display=display)
    return f'<div class="formula">{formula}</div>' if display else formula


def mathml(tex: str, *, display: bool) -> str:
    """Convert LaTeX to MathML.

    Args:
        tex: The formula without its delimiters.
        display: Whether it stands on lines of its own.

    Returns:
        A ``<math>`` element.

    Raises:
        ValueError: If a command of the formula is not known.
    """
    from latex2mathml.converter import convert

    # Two things that the converter does not know: limits below an operator's name, and an
    # underscore in text.
    known = tex.replace(r"\operatorname*", r"\operatorname").replace(r"\_", "_")
    try:
        result: str = convert(" ".join(known.split()), display="block" if display else "inline")
    except Exception as error:
        raise ValueError(f"the formula {tex!r} is not understood: {error!r}") from error
    # An unknown command is passed through as text.
    if unknown := re.search(r"\\[A-Za-z]+", result):
        raise ValueError(f"the formula {tex!r} has the unknown command {unknown[0]}")
    return result


def command_reference() -> str:
    """Write the reference of ``dse-ext`` from the command itself."""
    import typer
    from typer.cli import get_docs_for_click

    from dse_ext.cli import app

    command: Any = typer.main.get_command(app)
    context = typer.Context(command, info_name="dse-ext")
    text = get_docs_for_click(obj=command, ctx=context, name="dse-ext", title="Command line")
    text = re.sub(r"\[/?(?:bold|dim|italic|green|yellow|red|cyan)?\]", "", text)  # rich's markup
    return text.replace(r"\[", "[")
