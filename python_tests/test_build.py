"""What was built: its facts, what it links to, what importing it costs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dse_ext
from dse_ext import _C, info, ops

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = {"_ops": ops.LIBRARIES["_ops"], "_C": Path(_C.__file__)}


def tool_output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def needed(path: Path) -> set[str]:
    """The shared libraries that the dynamic section names."""
    return set(re.findall(r"NEEDED.*\[(.+)\]", tool_output("readelf", "-d", str(path))))


def undefined(path: Path) -> set[str]:
    """Demangled names of the symbols that other libraries have to provide."""
    listing = tool_output("nm", "-D", "-C", "--undefined-only", str(path))
    return {line.split(maxsplit=1)[1] for line in listing.splitlines()}


def test_build_info_tells_what_was_built_with() -> None:
    build = _C.build_info()
    assert build["version"] == dse_ext.__version__
    assert build["torch_abi"] == "2.11"
    assert build["cxx_standard"] == "C++20"
    assert "-O3" in build["cxx_flags"].split()
    assert "-march=native" not in build["cxx_flags"]
    assert build["compiler"] in ("gcc", "clang")
    assert re.match(r"\d+\.\d+", build["compiler_version"])
    assert re.match(r"\d+\.\d+", build["torch_version"])
    assert build["cuda"] == bool(build["cuda_archs"]) == (build["cuda_compiler"] is not None)
    assert build["cuda"] == (build["cuda_reason"] is None)
    json.dumps(build)


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_links_the_stable_part_of_torch_alone(name: str) -> None:
    from_torch = {soname for soname in needed(LIBRARIES[name]) if "torch" in soname}
    assert from_torch == {"libtorch_cpu.so"}
    assert not any("c10" in soname or "python" in soname for soname in needed(LIBRARIES[name]))


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_uses_no_symbol_of_torch_s_cxx_interface(name: str) -> None:
    symbols = undefined(LIBRARIES[name])
    unstable = {s for s in symbols if re.search(r"\b(at|c10|torch)::", s)}
    assert not unstable
    shim = {s for s in symbols if s.startswith(("aoti_torch_", "torch_"))}
    assert "torch_call_dispatcher" in shim


def test_the_operators_know_nothing_of_python() -> None:
    path = LIBRARIES["_ops"]
    assert path.name == "_ops.so"  # no Python version in its name
    assert not {s for s in undefined(path) if s.startswith(("Py", "_Py"))}


def test_the_binary_names_no_folder_of_the_machine_that_built_it() -> None:
    for path in LIBRARIES.values():
        assert str(ROOT).encode() not in path.read_bytes()


def run_fresh(code: str) -> str:
    return tool_output(sys.executable, "-c", code)


@pytest.mark.parametrize("module", ["dse_ext", "dse_ext.info"])
def test_import_brings_torch_and_numpy_alone(module: str) -> None:
    code = f"""
import sys, torch
before = set(sys.modules)
import {module}
print(*sorted({{name.split('.')[0] for name in set(sys.modules) - before}}))
"""
    new = set(run_fresh(code).split())
    third_party = {name for name in new if name not in sys.stdlib_module_names}
    assert third_party <= {"dse_ext", "numpy", "torch"}
    assert not new & {"timm", "lightly", "torchvision", "torchmetrics", "matplotlib", "scipy"}


def test_optional_packages_are_not_even_needed() -> None:
    """An import hook refuses everything that the base installation does not have."""
    code = """
import sys

class Refuse:
    names = {"timm", "lightly", "torchvision", "torchmetrics", "matplotlib", "scipy", "sklearn",
             "skimage", "typer", "rich", "pytorch_lightning", "transformers"}

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ImportError(f"{name} is not part of the base installation")
        return None

sys.meta_path.insert(0, Refuse())
import torch
import dse_ext
z = torch.randn(2, 8, 4, requires_grad=True)
dse_ext.DSERegularizer(global_clusters=4)(z).backward()
print(bool(z.grad.isfinite().all()))
"""
    assert run_fresh(code).strip() == "True"


def run_setup(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a copy of setup.py where csrc holds no sources for a GPU."""
    (folder / "dse_ext").mkdir()
    (folder / "csrc").mkdir()
    for name in ("setup.py", "dse_ext/_version.py"):
        shutil.copy(ROOT / name, folder / name)
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_asking_for_cuda_without_kernels_is_an_error(tmp_path: Path) -> None:
    result = run_setup(tmp_path, "--version", DSE_EXT_CUDA="1")
    assert result.returncode != 0
    assert "DSE_EXT_CUDA=1 asks for the CUDA kernels, but" in result.stderr
    assert "csrc/cuda holds no .cu files" in result.stderr


def test_an_unknown_value_of_dse_ext_cuda_is_named(tmp_path: Path) -> None:
    result = run_setup(tmp_path, "--version", DSE_EXT_CUDA="yes")
    assert result.returncode != 0
    assert "DSE_EXT_CUDA is 'yes'; accepted are 0, 1 and auto" in result.stderr


def test_switching_cuda_off_is_noted_in_the_build(tmp_path: Path) -> None:
    result = run_setup(tmp_path, "--version", DSE_EXT_CUDA="0")
    assert result.returncode == 0, result.stderr
    header = (tmp_path / "build" / "generated" / "dse_build_config.h").read_text()
    assert "#define DSE_EXT_WITH_CUDA 0\n" in header
    assert 'DSE_EXT_CUDA_REASON "switched off by DSE_EXT_CUDA=0"' in header


def test_version_stands_in_one_place() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = \{ attr = "dse_ext\._version\.__version__" \}$', text, re.M)
    assert not re.search(r'^version = "', text, re.M)


def test_info_collects_what_json_can_hold() -> None:
    facts = info.collect()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["dse-ext"] == dse_ext.__version__
    assert {library["name"] for library in facts["libraries"]} >= {"_ops", "_C"}
    assert all(re.fullmatch(r"[0-9a-f]{16}", lib["sha256"]) for lib in facts["libraries"])
    assert facts["cpu"]["threads"] == torch.get_num_threads()


def test_info_says_why_there_is_no_cuda() -> None:
    facts = info.collect()["cuda"]
    assert facts["usable"] == (facts["reason"] is None)
    if not torch.cuda.is_available():
        assert facts["reason"]
        assert facts["devices"] == []


@pytest.mark.parametrize(
    ("torch_cuda", "built", "loaded", "devices", "reason"),
    [
        (None, True, False, 1, "built without CUDA"),
        ("13.2", False, False, 1, "built without its CUDA library: no nvcc"),
        ("13.2", True, False, 1, "was not loaded"),
        ("13.2", True, True, 0, "torch sees no GPU"),
        ("13.2", True, True, 1, None),
    ],
)
def test_the_first_obstacle_to_cuda_is_named(
    torch_cuda: str | None,
    built: bool,
    loaded: bool,
    devices: int,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    build = {**_C.build_info(), "cuda": built, "cuda_reason": None if built else "no nvcc"}
    monkeypatch.setattr(_C, "build_info", lambda: build)
    here = ops.LIBRARIES["_ops"]
    monkeypatch.setattr(ops, "LIBRARIES", {"_ops": here, **({"_cuda": here} if loaded else {})})
    found = info._why_no_cuda(devices)
    assert found is None if reason is None else reason in str(found)


def test_info_renders_every_fact() -> None:
    facts = info.collect()
    text = info.render(facts)
    for version in filter(None, facts["versions"].values()):
        assert version in text
    for library in facts["libraries"]:
        assert library["path"] in text
        assert library["sha256"] in text
    assert facts["build"]["cxx_flags"] in text
    assert all(line == line.rstrip() for line in text.splitlines())
    widest = facts["cuda"]["reason"] or "yes"
    assert widest in text


BUILT_WITH_CUDA = {
    "cuda": True,
    "cuda_compiler": "nvcc 13.0.88",
    "cuda_archs": ["8.0", "9.0"],
    "cuda_reason": None,
}


def test_info_renders_a_cuda_build() -> None:
    facts = info.collect()
    facts["build"] |= BUILT_WITH_CUDA
    facts["cuda"] = {
        "operators": ["kmeans"], "usable": True, "reason": None, "devices": ["A GPU"],
    }  # fmt: skip
    text = info.render(facts)
    assert re.search(r"CUDA library +nvcc 13\.0\.88 for 8\.0, 9\.0\n", text)
    assert re.search(r"usable +yes\n", text)
    assert re.search(r"devices +A GPU\n", text)
