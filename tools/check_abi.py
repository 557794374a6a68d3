"""Run the operators' tests with the same built libraries under several torch versions.

    python tools/check_abi.py PYTHON [PYTHON ...]

Each argument is the Python of an environment with a torch of its own. The libraries are those in
``dse_ext/``: nothing is built here. Prints which binary each environment loaded, runs
``python_tests/abi`` in each, and exits with 1 if a test fails or the binaries differ.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Asked of each environment: which libraries does `import dse_ext` load there?
PROBE = """
import json
import torch
from dse_ext import info
facts = info.collect()
print(json.dumps({"torch": torch.__version__, "libraries": facts["libraries"]}))
"""


def run(python: str, arguments: list[str], *, capture: bool) -> subprocess.CompletedProcess[str]:
    """Run an environment's Python in the project's root, with the sources there first."""
    return subprocess.run(
        [python, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE if capture else None,
        text=True,
        check=False,
    )


def loaded(python: str) -> dict[str, str] | None:
    """Print and return the libraries that this environment loads, name -> path and hash."""
    probe = run(python, ["-c", PROBE], capture=True)
    if probe.returncode != 0:
        print(f"FAILED: {python} cannot load the libraries")
        return None
    facts = json.loads(probe.stdout.strip().splitlines()[-1])
    libraries = {}
    for library in facts["libraries"]:
        path = Path(library["path"]).relative_to(ROOT)
        libraries[library["name"]] = f"{path} {library['sha256']}"
        print(f"torch {facts['torch']:<14} {path}  sha256 {library['sha256']}")
    return libraries


def test(python: str) -> bool:
    """Run the tests; the conftest of the full suite wants more packages than are there."""
    suite = "python_tests/abi"
    options = [f"--confcutdir={suite}", "-p", "no:cacheprovider"]
    return run(python, ["-m", "pytest", suite, *options], capture=False).returncode == 0


def main(pythons: list[str]) -> int:
    """Return the exit status."""
    if not pythons:
        print(__doc__)
        return 2
    binaries = [loaded(python) for python in pythons]
    sys.stdout.flush()
    if None in binaries:
        return 1
    # A torch without CUDA loads all but the CUDA library.
    shared = [
        {name: library for name, library in (found or {}).items() if name != "_cuda"}
        for found in binaries
    ]
    if any(other != shared[0] for other in shared):
        print("FAILED: the environments loaded different binaries")
        return 1
    passed = [test(python) for python in pythons]
    if not all(passed):
        failed = ", ".join(python for python, ok in zip(pythons, passed, strict=True) if not ok)
        print(f"FAILED: the binary does not pass its tests under {failed}")
        return 1
    print(f"the same binary passes under {len(pythons)} versions of torch")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
