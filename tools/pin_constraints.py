"""Write constraints.txt from what pip resolves, once for each range of Python versions.

The newest versions of NumPy, torch and others have dropped Python 3.10, so one list of pins does
not serve every supported Python. To renew the pins::

    pip install --dry-run --ignore-installed --report new.json -e '.[ssl,test,bench,dev]'  # 3.11+
    pip install --dry-run --ignore-installed --report old.json -e '.[ssl,test,bench,dev]'  # 3.10
    python tools/pin_constraints.py new.json old.json > constraints.txt
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

HEADER = """\
# The development environment, pinned: `make` installs with these versions and CI runs with them.
# Made by tools/pin_constraints.py. The package itself asks for ranges (pyproject.toml).
"""
NEW, OLD = '; python_version >= "3.11"', '; python_version < "3.11"'


def read_report(path: Path) -> dict[str, str]:
    """Return the version of each package of a ``pip install --report`` file, by normalized name."""
    pins = {}
    for item in json.loads(path.read_text())["install"]:
        name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
        # A local version ("+cpu") is one index's build, not what the project asks for.
        pins[name] = item["metadata"]["version"].split("+")[0]
    pins.pop("dse-ext", None)
    return pins


def constraint_lines(new: dict[str, str], old: dict[str, str]) -> Iterator[str]:
    """Yield one line a package, or two where Python 3.10 needs another version."""
    for name in sorted(new.keys() | old.keys()):
        if new.get(name) == old.get(name):
            yield f"{name}=={new[name]}"
            continue
        if name in new:
            yield f"{name}=={new[name]} {NEW}"
        if name in old:
            yield f"{name}=={old[name]} {OLD}"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    pins = [read_report(Path(name)) for name in sys.argv[1:]]
    print(HEADER + "\n".join(constraint_lines(*pins)))
