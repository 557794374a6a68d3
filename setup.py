"""Build of the native libraries; everything else about the package is in pyproject.toml.

Three libraries, each next to the Python files that use it:

* ``dse_ext/_ops.so``: the operators and their CPU kernels. It knows neither Python nor a particular
  torch: it uses the LibTorch stable ABI alone, so one build serves every torch from 2.11 on.
* ``dse_ext/_cuda.so``: the CUDA kernels of the same operators, where they can be built.
* ``dse_ext/_C.*.so``: a pybind11 module with the build's facts and the NumPy entry points.

Environment variables:

* ``DSE_EXT_CUDA``: ``auto`` (the default: CUDA is built where torch has it and an nvcc is found),
  ``0`` (never) or ``1`` (a build without it is an error).
* ``TORCH_CUDA_ARCH_LIST``: GPU architectures, as for any torch extension; ``8.0;9.0;10.0+PTX`` by
  default, less what the nvcc found does not know.
* ``MAX_JOBS``: how many compilers run at once. ``CXX``, ``CXXFLAGS``: as usual.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
GENERATED = ROOT / "build" / "generated"

# The oldest LibTorch ABI that the libraries load on. In the header's form: major, minor, patch.
TORCH_ABI = (2, 11)
TORCH_TARGET_VERSION = f"0x{TORCH_ABI[0]:02x}{TORCH_ABI[1]:02x}{0:012x}"

CXX_STANDARD = "-std=c++20"
# -g0 takes back the -g that most Python builds bring along; no -march: one binary for all machines.
# Square roots that need not set errno become vector instructions.
OPTIMIZATION = ["-O3", "-fno-math-errno", "-g0"]
CXX_FLAGS = [CXX_STANDARD, *OPTIMIZATION, "-fvisibility=hidden", "-Wall", "-Wextra"]
NVCC_FLAGS = [CXX_STANDARD, "-O3", "-Xcompiler=-fvisibility=hidden", "-Xcompiler=-Wall"]
DEFAULT_CUDA_ARCHS = ("8.0", "9.0", "10.0")

# Libraries that are no Python modules: their names carry no Python version.
PLAIN_LIBRARIES = ("_ops", "_cuda")


def package_version() -> str:
    text = (ROOT / "dse_ext" / "_version.py").read_text()
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('dse_ext/_version.py has no line __version__ = "..."')
    return match.group(1)


def find_cuda_home() -> Path | None:
    """Return the CUDA toolkit's folder: one that has both nvcc and the runtime's headers.

    torch takes the parent of whatever ``nvcc`` is on the PATH, which is wrong where that is a
    wrapper script or a link; hence a search of our own, before torch makes its guess.
    """
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if on_path := shutil.which("nvcc"):
        candidates += [str(Path(on_path).parents[1]), str(Path(on_path).resolve().parents[1])]
    candidates.append("/usr/local/cuda")
    for candidate in filter(None, candidates):
        home = Path(candidate)
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return home
    return None


CUDA_HOME = find_cuda_home()
if CUDA_HOME is not None:
    os.environ["CUDA_HOME"] = str(CUDA_HOME)  # read once, by the import below

import pybind11  # noqa: E402
import torch  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths  # noqa: E402


@dataclass(frozen=True)
class CudaPlan:
    """Whether the CUDA library is built and, if so, with what; else why not."""

    reason: str = ""
    compiler: str = ""
    archs: str = ""

    @property
    def enabled(self) -> bool:
        return not self.reason


def sources(*patterns: str) -> list[str]:
    """Return the sources that match, relative to the project's root as setuptools wants them."""
    found = {path for pattern in patterns for path in CSRC.glob(pattern)}
    return sorted(str(path.relative_to(ROOT)) for path in found)


def cuda_archs(nvcc: Path) -> str:
    """Return the GPU architectures to build for, as TORCH_CUDA_ARCH_LIST has them."""
    if given := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return given
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = set(re.findall(r"compute_(\d+)", listing.stdout))
    archs = [arch for arch in DEFAULT_CUDA_ARCHS if arch.replace(".", "") in known]
    if not archs:
        raise RuntimeError(
            f"{nvcc} knows none of the architectures {', '.join(DEFAULT_CUDA_ARCHS)}: "
            "set TORCH_CUDA_ARCH_LIST"
        )
    return ";".join(archs) + "+PTX"


def plan_cuda() -> CudaPlan:
    """Decide from DSE_EXT_CUDA and from what is there whether the CUDA library is built."""
    wish = os.environ.get("DSE_EXT_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        raise ValueError(f"DSE_EXT_CUDA is {wish!r}; accepted are 0, 1 and auto")
    if wish == "0":
        return CudaPlan(reason="switched off by DSE_EXT_CUDA=0")
    plan = _plan_cuda_from_machine()
    if wish == "1" and not plan.enabled:
        raise RuntimeError(f"DSE_EXT_CUDA=1 asks for the CUDA kernels, but {plan.reason}")
    return plan


def _plan_cuda_from_machine() -> CudaPlan:
    if not sources("cuda/*.cu"):
        return CudaPlan(reason="this version has no CUDA kernels (csrc/cuda holds no .cu files)")
    if torch.version.cuda is None:
        return CudaPlan(reason=f"torch {torch.__version__} at build time had no CUDA")
    if CUDA_HOME is None:
        return CudaPlan(reason="no nvcc was found (set CUDA_HOME)")
    nvcc = CUDA_HOME / "bin" / "nvcc"
    banner = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+), V([\d.]+)", banner)
    if release is None:
        return CudaPlan(reason=f"{nvcc} --version names no release")
    if release.group(1) != torch.version.cuda.split(".")[0]:
        return CudaPlan(
            reason=f"nvcc {release.group(3)} and torch's CUDA {torch.version.cuda} differ in the "
            "major version"
        )
    return CudaPlan(compiler=f"nvcc {release.group(3)}", archs=cuda_archs(nvcc))


def nvidia_header_flags(home: Path) -> list[str]:
    """Return where to find the CUDA math libraries' headers if the toolkit does not have them.

    A toolkit may have been installed without cuBLAS and cuSOLVER; torch's own packages bring those
    headers. They are searched last, so that the compiler's own runtime headers win.
    """
    if (home / "include" / "cublas_v2.h").exists():
        return []
    site = Path(torch.__file__).parents[1] / "nvidia"
    folders = sorted({path.parent for path in site.glob("*/include/cublas_v2.h")})
    return [f"-Xcompiler=-idirafter,{folder}" for folder in folders]


def quoted(text: str) -> str:
    """Return a C string literal."""
    return json.dumps(text, ensure_ascii=True)


def write_build_config(cuda: CudaPlan, version: str) -> None:
    """Write the header that tells ``dse_ext._C.build_info()`` what only the build knows.

    A header rather than flags: a change recompiles one file, and an unchanged one nothing.
    """
    facts = {
        "DSE_EXT_VERSION": quoted(version),
        "DSE_EXT_CXX_FLAGS": quoted(" ".join(CXX_FLAGS)),
        "DSE_EXT_TORCH_BUILD_VERSION": quoted(str(torch.__version__)),
        "DSE_EXT_TORCH_TARGET_ABI": quoted(".".join(map(str, TORCH_ABI))),
        "DSE_EXT_WITH_CUDA": str(int(cuda.enabled)),
        "DSE_EXT_CUDA_COMPILER": quoted(cuda.compiler),
        "DSE_EXT_CUDA_ARCHS": quoted(cuda.archs),
        "DSE_EXT_CUDA_REASON": quoted(cuda.reason),
    }
    lines = ["// Written by setup.py.", "#pragma once"]
    lines += [f"#define {name} {value}" for name, value in facts.items()]
    text = "\n".join(lines) + "\n"
    path = GENERATED / "dse_build_config.h"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def native_library(
    name: str,
    files: list[str],
    *,
    libraries: Iterable[str] = (),
    include_dirs: Iterable[Path | str] = (),
    device: str = "cpu",
    nvcc_flags: Iterable[str] = (),
) -> Extension:
    """Describe one library that uses the stable ABI and links no libtorch_python."""
    torch_include = include_paths()[0]
    # Messages and the binary name files by their path in the project, wherever it was built.
    prefixes = [f"-ffile-prefix-map={ROOT}/=", f"-ffile-prefix-map={torch_include}/="]
    # As a system folder: warnings are ours alone.
    headers = ["-isystem", torch_include]
    return Extension(
        f"dse_ext.{name}",
        files,
        language="c++",
        include_dirs=[str(CSRC), *map(str, include_dirs)],
        libraries=["torch_cpu", *libraries],
        library_dirs=library_paths(device),
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args={
            "cxx": [*headers, *CXX_FLAGS, *prefixes],
            "nvcc": [*headers, *NVCC_FLAGS, *nvcc_flags],
        },
        depends=sources("**/*.h", "**/*.cuh"),
    )


def extensions(cuda: CudaPlan) -> list[Extension]:
    """Describe all libraries of this build."""
    libraries = [
        native_library("_ops", sources("ops.cpp", "common/*.cpp", "cpu/*.cpp")),
        native_library(
            "_C",
            sources("bindings.cpp"),
            include_dirs=[GENERATED, pybind11.get_include()],
        ),
    ]
    if cuda.enabled:
        assert CUDA_HOME is not None
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda.archs
        library = native_library(
            "_cuda",
            sources("cuda/*.cu", "cuda/*.cpp", "common/*.cpp"),
            libraries=["torch_cuda", "cudart"],
            include_dirs=[CUDA_HOME / "include"],
            device="cuda",
            nvcc_flags=nvidia_header_flags(CUDA_HOME),
        )
        library.define_macros.append(("USE_CUDA", None))  # opens the stable shim's CUDA part
        libraries.append(library)
    return libraries


class BuildNative(BuildExtension):
    """torch's ninja build, made incremental for every way to start it."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # An editable installation asks for a throw-away folder and would compile everything each
        # time. One folder for each torch, since its headers are no dependencies of the objects.
        platform = f"{sysconfig.get_platform()}-{sysconfig.get_config_var('SOABI')}"
        self.build_temp = str(ROOT / "build" / platform / f"torch-{torch.__version__}")

    def run(self) -> None:
        super().run()
        if self.inplace and not any(ext.name == "dse_ext._cuda" for ext in self.extensions):
            # Left by an earlier build with CUDA, it would be loaded next to newer operators.
            (ROOT / "dse_ext" / "_cuda.so").unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        # Of its own for each library: they would overwrite each other's build.ninja.
        shared, self.build_temp = self.build_temp, os.path.join(self.build_temp, ext.name)
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = shared

    def get_ext_filename(self, fullname: str) -> str:
        parts = fullname.split(".")
        if parts[-1] in PLAIN_LIBRARIES:
            return os.path.join(*parts) + ".so"
        return str(super().get_ext_filename(fullname))


def main() -> None:
    cuda = plan_cuda()
    print(
        f"dse-ext: CUDA library for {cuda.archs} with {cuda.compiler}"
        if cuda.enabled
        else f"dse-ext: no CUDA library: {cuda.reason}"
    )
    write_build_config(cuda, package_version())
    setup(ext_modules=extensions(cuda), cmdclass={"build_ext": BuildNative})


if __name__ == "__main__":
    main()
