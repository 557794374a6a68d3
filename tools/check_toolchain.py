"""Say clearly what this machine lacks for a build of dse-ext, before anything is installed.

Runs under any Python 3, however old, and uses the standard library alone. Prints one line for
everything that is missing and exits with 1; prints nothing where all is there.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile

MINIMUM_PYTHON = (3, 10)

# Uses what the sources use of C++20: a compiler that only knows the flag is not enough.
PROBE = """
#include <concepts>
#include <numbers>
#include <span>
template <std::floating_point T>
T circumference(std::span<const T> radii) {
  T sum{};
  for (T r : radii) sum += T{2} * std::numbers::pi_v<T> * r;
  return sum;
}
int main() {
  const double radii[] = {1.0, 2.0};
  return circumference<double>(radii) > 0 ? 0 : 1;
}
"""


def python_problems() -> "list[str]":
    """Return what is wrong with the running Python: its age, venv, or missing C headers."""
    if sys.version_info < MINIMUM_PYTHON:
        return [
            "Python {}.{} or newer is needed and {} is {}.{}: "
            "name a newer one with 'make PYTHON=/path/to/python3'".format(
                MINIMUM_PYTHON[0],
                MINIMUM_PYTHON[1],
                sys.executable,
                sys.version_info[0],
                sys.version_info[1],
            )
        ]
    problems = []
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        problems.append(
            "{} cannot make virtual environments ({}): "
            "on Debian and Ubuntu, install python3-venv".format(sys.executable, error)
        )
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    if not os.path.exists(header):
        problems.append(
            "{} has no C headers ({} is missing): on Debian and Ubuntu, install python3-dev".format(
                sys.executable, header
            )
        )
    return problems


def compiler_problems() -> "list[str]":
    """Return what is wrong with the C++ compiler that the build would use."""
    compiler = os.environ.get("CXX", "c++")
    command = compiler.split()
    if shutil.which(command[0]) is None:
        return [
            "no C++ compiler: '{}' is not found. Install g++ (12 or newer) or clang++ "
            "(14 or newer), or name one with 'make CXX=/path/to/c++'".format(compiler)
        ]
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "probe.cpp")
        with open(source, "w") as file:
            file.write(PROBE)
        build = subprocess.run(
            [*command, "-std=c++20", source, "-o", os.path.join(folder, "probe")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    if build.returncode == 0:
        return []
    output = build.stdout.decode(errors="replace").strip().splitlines()
    return [
        "'{}' cannot build C++20 programs: {}. Name a newer one (g++ 12, clang++ 14) with "
        "'make CXX=/path/to/c++'".format(compiler, output[0] if output else "it failed")
    ]


def main() -> int:
    """Print every problem; return the exit status."""
    problems = python_problems() + compiler_problems()
    for problem in problems:
        print("dse-ext cannot be built here: " + problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
