"""Install a wheel beside several versions of torch and run the operators' tests on it.

    python tools/check_wheel.py [--wheel WHEEL] PYTHON [PYTHON ...]

Each PYTHON is that of an environment with a torch of its own; it is not changed. Without
``--wheel`` a source distribution is made first, and the wheel from that alone, without CUDA. The
wheel is then looked into, and for each environment installed, with its dependencies, into a fresh
one that sees the other's packages. ``python_tests/abi`` runs there, in a folder that has nothing of
the project's sources. Exits with 1 if anything fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from repair_wheel import repair

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("abi", "oracle.py", "parity.py")

# What an sdist has to hold for somebody to build from it, test it and read it.
SOURCES = (
    "setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile", "csrc/ops.cpp",
    "csrc/common/problem.h", "csrc/cuda/registration.cu", "csrc/cuda/image_kernel.cuh",
    "dse_ext/_C.pyi", "dse_ext/py.typed", "python_tests/oracle.py", "docs/definitions.md",
    "tools/check_toolchain.py", "constraints.txt",
)  # fmt: skip

FACTS = """
import json, torch, dse_ext
from dse_ext import info
libraries = info.collect()["libraries"]
print(json.dumps([torch.__version__, dse_ext.__file__, *(x["path"] for x in libraries)]))
"""


class Failure(Exception):
    """Something that the wheel or its build gets wrong."""


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> str:
    """Run a command without the sources on its path, and return what it prints.

    Raises:
        Failure: If it fails, with its output.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    # ninja is a program that pip installs beside Python.
    environment["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), environment.get("PATH", "")]
    )
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**environment, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise Failure(f"{' '.join(map(str, command))}\n{result.stdout[-6000:]}")
    return result.stdout


def build(folder: Path) -> Path:
    """Make a source distribution, from it the wheel, and give that its tag."""
    # `build` makes the wheel from the unpacked sdist, in a folder of its own.
    run(
        sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "built", ROOT,
        DSE_EXT_CUDA="0",
    )  # fmt: skip
    (sdist,) = (folder / "built").glob("*.tar.gz")
    (wheel,) = (folder / "built").glob("*.whl")
    check_sdist(sdist)
    return repair(wheel, folder / "wheels")


def check_sdist(sdist: Path) -> None:
    """Check that nothing is missing from a source distribution, and nothing built is in it."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    if missing := [name for name in SOURCES if name not in names]:
        raise Failure(f"{sdist.name} lacks {', '.join(missing)}")
    if built := [name for name in names if name.endswith((".so", ".o", ".pyc"))]:
        raise Failure(f"{sdist.name} has what was built: {', '.join(sorted(built)[:5])}")
    print(f"{sdist.name}: {len(names)} files, {sdist.stat().st_size / 2**20:.1f} MiB")


def check_contents(wheel: Path) -> None:
    """Check what a wheel holds, and that its tag is a manylinux one that its libraries keep."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    libraries = sorted(name for name in names if ".so" in Path(name).suffixes)
    known = re.compile(r"dse_ext/(_ops\.so|_cuda\.so|_C\.cpython-\d+\w*-[\w-]+\.so)")
    if copied := [name for name in libraries if not known.fullmatch(name)]:
        raise Failure(f"{wheel.name} has libraries that are not ours: {', '.join(copied)}")
    for needed in ("dse_ext/_ops.so", "dse_ext/py.typed", "dse_ext/_C.pyi", "dse_ext/cli.py"):
        if needed not in names:
            raise Failure(f"{wheel.name} lacks {needed}")
    if not any(re.fullmatch(r"dse_ext/_C\..*\.so", name) for name in libraries):
        raise Failure(f"{wheel.name} lacks the Python module dse_ext/_C")
    if foreign := {name.split("/")[0] for name in names if not name.startswith("dse_ext")}:
        raise Failure(f"{wheel.name} would install {', '.join(sorted(foreign))} beside dse_ext")
    promised = re.findall(r"manylinux_(\d+)_(\d+)_", wheel.name)
    if not promised:
        raise Failure(f"{wheel.name} has no manylinux tag")
    oldest = min((int(major), int(minor)) for major, minor in promised)
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        newest = max(glibc(Path(archive.extract(name, scratch))) for name in libraries)
    if newest > oldest:
        raise Failure(f"{wheel.name} promises glibc {oldest}, its libraries ask for {newest}")
    size = wheel.stat().st_size / 2**20
    print(f"{wheel.name}: {size:.1f} MiB, {', '.join(Path(name).name for name in libraries)}")
    print(f"  newest symbol asked of the system: glibc {newest[0]}.{newest[1]}")


def glibc(library: Path) -> tuple[int, int]:
    """Return the newest version of glibc whose symbols a library asks for."""
    text = run("readelf", "--version-info", "--wide", library)
    return max((int(a), int(b)) for a, b in re.findall(r"GLIBC_(\d+)\.(\d+)", text))


def site_packages(python: str | Path) -> Path:
    """Return where an environment's packages are."""
    return Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())


def fresh_environment(base: str, folder: Path) -> Path:
    """Create an environment that sees the packages of another, and return its Python."""
    run(base, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    # A plain path: the other's own .pth files, an editable dse-ext among them, are not followed.
    (site_packages(python) / "base.pth").write_text(f"{site_packages(base)}\n")
    return python


def pins(base: str, folder: Path) -> Path:
    """Write constraints: what the environment has stays, the rest is as in constraints.txt."""
    code = (
        "from importlib.metadata import distributions as d\n"
        "for x in d(): print(x.metadata['Name'] + '==' + x.version.partition('+')[0])"
    )
    has = {}
    for line in run(base, "-c", code).splitlines():
        name = re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower()
        if name != "dse-ext":
            has[name] = line
    others = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.partition("==")[0] not in has
    ]
    path = folder / "constraints.txt"
    path.write_text("\n".join([*has.values(), *others]) + "\n")
    return path


def install(wheel: Path, base: str, folder: Path) -> Path:
    """Install a wheel with its dependencies beside an environment's torch; return the Python."""
    python = fresh_environment(base, folder)
    constraints = str(pins(base, folder))
    pip = [base, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile"]
    # Twice: first the wheel, whatever the other environment has, then what it lacks.
    run(*pip, "--no-deps", "--ignore-installed", wheel, PIP_CONSTRAINT=constraints)
    run(*pip, wheel, PIP_CONSTRAINT=constraints)
    return python


def test(python: Path, folder: Path) -> str:
    """Run the operators' tests on an installed wheel; return the closing line."""
    tests = folder / "tests"
    tests.mkdir()
    for name in TESTS:
        source = ROOT / "python_tests" / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tests / name)
    torch, *loaded = json.loads(run(python, "-c", FACTS, cwd=tests).strip().splitlines()[-1])
    installed = site_packages(python)
    for path in loaded:
        if installed not in Path(path).parents:
            raise Failure(f"{path} was loaded, which is not from the wheel")
    run(folder / "bin" / "dse-ext", "info", cwd=tests)
    options = ["-q", "-p", "no:cacheprovider", f"--rootdir={tests}", "--confcutdir=abi"]
    report = run(python, "-m", "pytest", "abi", *options, cwd=tests)
    return f"torch {torch}: {report.strip().splitlines()[-1]}"


def main() -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, help="a wheel that is there; default: build one")
    parser.add_argument("pythons", nargs="+", metavar="PYTHON")
    options = parser.parse_args()
    start = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="dse-ext-wheel-") as name:
            scratch = Path(name)
            wheel = options.wheel.resolve() if options.wheel else build(scratch)
            seconds = time.monotonic() - start
            check_contents(wheel)
            if options.wheel is None:
                print(f"  built in {seconds:.0f} s", flush=True)
            for number, base in enumerate(options.pythons):
                begin = time.monotonic()
                folder = scratch / f"environment-{number}"
                # Not resolved: the link .venv/bin/python is what makes it an environment.
                python = install(wheel, os.path.abspath(base), folder)
                print(f"{test(python, folder)} ({time.monotonic() - begin:.0f} s)", flush=True)
    except (Failure, RuntimeError) as failure:
        print(f"FAILED: {failure}")
        return 1
    print(f"the wheel passes beside {len(options.pythons)} versions of torch")
    return 0


if __name__ == "__main__":
    sys.exit(main())
