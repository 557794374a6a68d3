"""Reads the project's Markdown: code blocks, shell commands, links, headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
SHELLS = ("console", "sh", "bash", "shell")
_REMARK = re.compile(r"<!--\s*(?P<kind>not run|run with):\s*(?P<text>.+?)\s*-->", re.DOTALL)


def files() -> list[Path]:
    """Everything that a reader of the project is sent to."""
    named = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [*named, ROOT / "csrc/cuda/README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def parse(path: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(path.read_text())


@dataclass(frozen=True)
class Block:
    """A code block, and what the HTML comment right above it says."""

    path: Path
    line: int
    language: str
    code: str
    not_run: str | None = None
    run_with: str | None = None

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def blocks(path: Path) -> Iterator[Block]:
    remark: dict[str, str] = {}
    for token in parse(path):
        if token.type == "html_block":
            remark = {
                m["kind"]: " ".join(m["text"].split()) for m in _REMARK.finditer(token.content)
            }
            continue
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            language = token.info.split()[0] if token.info.strip() else ""
            yield Block(
                path, token.map[0] + 1, language, token.content,
                remark.get("not run"), remark.get("run with"),
            )  # fmt: skip
        remark = {}


@dataclass(frozen=True)
class Command:
    """A shell command, split into words; ``whole`` unless it only stands in a sentence."""

    where: str
    words: tuple[str, ...]
    whole: bool

    def __str__(self) -> str:
        return f"{self.where}: {' '.join(self.words)}"


def commands(path: Path) -> Iterator[Command]:
    name = str(path.relative_to(ROOT))
    for block in blocks(path):
        if block.language in SHELLS or block.language == "":
            for words in _split(block.code):
                yield Command(str(block), words, whole=True)
    for token in parse(path):
        for child in token.children or []:
            if child.type == "code_inline":
                for words in _split(child.content):
                    line = token.map[0] + 1 if token.map else 0
                    yield Command(f"{name}:{line}", words, whole=False)


def _split(text: str) -> Iterator[tuple[str, ...]]:
    """Words of every simple command of a piece of shell."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        try:
            lexer = shlex.shlex(re.sub(r"^\s*\$ ", "", line), posix=True, punctuation_chars=";|&<>")
            lexer.whitespace_split = True
            words = list(lexer)
        except ValueError:
            continue  # no shell: a formula, a tree of files
        simple: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set(";|&<>"):
                if simple:
                    yield tuple(simple)
                simple = []
            else:
                simple.append(word)


def headings(path: Path) -> set[str]:
    """Anchors of a file's headings, as GitHub makes them."""
    anchors: set[str] = set()
    tokens = parse(path)
    for token, following in pairwise(tokens):
        if token.type == "heading_open":
            text = "".join(
                child.content
                for child in following.children or []
                if child.type in ("text", "code_inline")
            )
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            number, unique = 0, slug
            while unique in anchors:
                number += 1
                unique = f"{slug}-{number}"
            anchors.add(unique)
    return anchors


def links(path: Path) -> Iterator[str]:
    for token in parse(path):
        for child in token.children or []:
            for attribute in ("href", "src"):
                if (target := child.attrGet(attribute)) is not None:
                    yield str(target)
