"""The documentation is true: its code runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import ast
import builtins
import doctest
import importlib
import io
import re
import symtable
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import dse_ext
from dse_ext.cli import app

sys.path.insert(0, str(Path(__file__).parent / "documentation"))

import doc_examples
import doc_pages
import doc_preamble

ROOT = doc_pages.ROOT
FILES = doc_pages.files()
PYTHON = [
    block
    for path in FILES
    for block in doc_pages.blocks(path)
    if block.language in ("python", "py", "pycon")
]
COMMANDS = [command for path in FILES for command in doc_pages.commands(path)]


# --- Python ---------------------------------------------------------------------------------------


def free_names(code: str) -> set[str]:
    """Names that a program uses and does not define."""

    def walk(table: symtable.SymbolTable) -> set[str]:
        found = {s.get_name() for s in table.get_symbols() if s.is_global() and s.is_referenced()}
        for child in table.get_children():
            found |= walk(child)
        return found

    table = symtable.symtable(code, "block", "exec")
    top = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    top |= {s.get_name() for s in table.get_symbols() if s.is_namespace()}
    used = {s.get_name() for s in table.get_symbols() if s.is_referenced()}
    for child in table.get_children():
        used |= walk(child)
    return used - top - set(dir(builtins))


def test_there_is_something_to_run() -> None:
    run = [block for block in PYTHON if block.not_run is None]
    assert len(run) >= 8
    assert {block.path.name for block in run} >= {"README.md", "scoring.md", "operators.md"}


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_a_python_block_runs(
    block: doc_pages.Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = ast.parse(block.code)
    if block.not_run is not None:
        # What it imports from the project has to be there all the same.
        assert len(block.not_run) > 10, f"{block}: say why it cannot be run"
        imports_exist(tree)
        return
    context = doc_preamble.CONTEXTS[block.run_with or "default"]
    free = free_names(block.code)
    assert free <= set(context), (
        f"{block} uses {sorted(free - set(context))}, which neither it nor "
        "python_tests/documentation/doc_preamble.py defines"
    )
    monkeypatch.chdir(tmp_path)
    # Names that begin a program of the reader's own.
    scope: dict[str, Any] = {"__name__": "block", **{name: context[name]() for name in free}}
    exec(compile(tree, str(block), "exec"), scope)


def imports_exist(tree: ast.AST) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dse_ext"):
            module = importlib.import_module(str(node.module))
            for name in node.names:
                assert hasattr(module, name.name), f"{node.module} has no {name.name}"
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.startswith("dse_ext"):
                    importlib.import_module(name.name)


# --- docstrings -----------------------------------------------------------------------------------


def modules_with_examples() -> list[str]:
    found = []
    for path in sorted((ROOT / "dse_ext").rglob("*.py")):
        if ">>>" in path.read_text():
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


@pytest.mark.parametrize("module", modules_with_examples())
def test_the_examples_of_docstrings_run(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module))
    assert any(test.examples for test in found)
    for test in found:
        torch.manual_seed(0)
        if test.name in doc_examples.NOT_RUN:
            for example in test.examples:
                imports_exist(ast.parse(example.source))
            continue
        skipped = [e.source for e in test.examples if e.options.get(doctest.SKIP)]
        assert not skipped, f"{test.name}: say in doc_examples.NOT_RUN why {skipped} is not run"
        output = io.StringIO()
        if test.name in doc_examples.STAND_INS:
            # With other data the values are others: that the code runs is what is tested.
            test.globs |= doc_examples.STAND_INS[test.name](tmp_path)
            runner = doctest.DocTestRunner(checker=AnyOutput(), verbose=False)
        else:
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
        runner.run(test, out=output.write)
        assert runner.failures == 0, output.getvalue()


class AnyOutput(doctest.OutputChecker):
    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return True


def test_what_is_said_of_examples_is_about_examples_that_exist() -> None:
    named = {
        test.name
        for module in modules_with_examples()
        for test in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module))
        if test.examples
    }
    assert set(doc_examples.NOT_RUN) <= named
    assert set(doc_examples.STAND_INS) <= named
    assert not set(doc_examples.NOT_RUN) & set(doc_examples.STAND_INS)


@pytest.mark.parametrize("name", sorted(set(dse_ext.__all__) - {"__version__"}))
def test_a_public_name_has_an_example(name: str) -> None:
    public = getattr(dse_ext, name)
    if issubclass(public, tuple) if isinstance(public, type) else False:
        assert public.__doc__  # what a function returns; the function has the example
        return
    text = public.__doc__ or ""
    assert "Examples:" in text, f"{name} has no Examples"
    assert ">>> " in text


# --- commands -------------------------------------------------------------------------------------

PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*|.*\$.*|.*(\.\.\.|…).*|module:function")


def dse_ext_arguments(words: tuple[str, ...]) -> list[str] | None:
    """What follows ``dse-ext``, however it is started; None where it is not."""
    for position, word in enumerate(words):
        if Path(word).name == "dse-ext" and "=" not in word:
            return list(words[position + 1 :])
        if word == "dse_ext.cli" and words[position - 1] == "-m":
            return list(words[position + 1 :])
    return None


OURS = [
    (command, arguments)
    for command in COMMANDS
    if (arguments := dse_ext_arguments(command.words)) is not None
]


def test_there_are_commands_to_check() -> None:
    assert sum(command.whole for command, _ in OURS) >= 1
    assert {command.where.partition(":")[0] for command, _ in OURS} >= {"README.md"}


@pytest.mark.parametrize(
    ("command", "arguments"), OURS, ids=[str(command)[:90] for command, _ in OURS]
)
def test_a_command_is_one_that_dse_ext_takes(
    command: doc_pages.Command, arguments: list[str]
) -> None:
    group: Any = typer.main.get_command(app)
    arguments = [word for word in arguments if not re.fullmatch(r"\.\.\.|…", word)]
    if not arguments or arguments[0].startswith("-"):
        return  # `dse-ext`, `dse-ext --help`
    assert arguments[0] in group.commands, f"{command}: there is no dse-ext {arguments[0]}"
    sub = group.commands[arguments[0]]
    if not command.whole:
        context = typer.Context(sub, info_name=arguments[0])
        known = {name for parameter in sub.get_params(context) for name in parameter.opts}
        given = {word.partition("=")[0] for word in arguments[1:] if word.startswith("--")}
        assert given <= known, f"{command}: unknown {sorted(given - known)}"
        return
    # Everything up to the call of the function behind it: names, arity, types, what is required.
    called = []
    sub.callback = lambda **values: called.append(values)
    words = ["1" if PLACEHOLDER.fullmatch(word) else word for word in arguments]
    group.main(args=words, prog_name="dse-ext", standalone_mode=False)
    assert len(called) == 1


def test_make_has_the_targets_that_are_named() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    named = {
        command.words[1]: command
        for command in COMMANDS
        if len(command.words) > 1
        and command.words[0] == "make"
        and re.fullmatch(r"[a-z][a-z-]*", command.words[1])
    }
    assert {"test", "demo", "docs", "wheel"} <= set(named)
    for target, command in named.items():
        assert target in targets, f"{command}: there is no such target"


# --- links and signatures -------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_to_a_file_and_a_heading(path: Path) -> None:
    for target in doc_pages.links(path):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if file == ROOT / "docs/command-line.md":
            continue  # written by `make docs` from the command itself
        assert file.exists(), f"{target}: there is no {file}"
        assert ROOT in file.parents, f"{target} leads out of the project"
        if anchor and file.suffix == ".md":
            assert anchor in doc_pages.headings(file), f"{target}: there is no such heading"


def test_the_operators_signatures_are_those_of_the_library() -> None:
    text = (ROOT / "docs/api/operators.md").read_text()
    written = set(re.findall(r"^dse_ext::.*$", text, re.MULTILINE))
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("dse_ext::")}
    schemas = {
        str(getattr(torch.ops.dse_ext, name.partition("::")[2]).default._schema).replace('\\"', '"')
        for name in names
        if not name.endswith("cuda_plan")
    }
    assert written == schemas
