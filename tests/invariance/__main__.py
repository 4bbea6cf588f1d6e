"""Compares what this code makes with hashes.json, by name; or writes hashes.json anew.

    python -m tests.invariance [--write]

Exit status 0: equal, or written. 1: what differs is listed. See `measure.py` for what is compared, and how on
another machine than the one that wrote the file.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.invariance.measure import KEPT, differences, machine, measure, write


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {KEPT.name} anew (default: compare)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = measure(Path(folder))
    if args.write:
        write(made)
        return 0
    kept = json.loads(KEPT.read_text())
    found = differences(kept, made, machine())
    if kept["machine"] != machine():
        sys.stdout.write(f"another machine: {machine()}, not {kept['machine']}\n")
    sys.stdout.write("".join(f"{name}: {said}\n" for name, said in found.items()) or f"{len(made)} names: equal\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
