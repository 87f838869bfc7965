"""`python -m river_ops.bench.kernels`, for machines that have torch and triton and not the rest of River."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from river_ops.bench.kernels import run, table


def main() -> int:
    """Prints the table, then the report as one line of JSON; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute, a few cells")
    parser.add_argument("--json", action="store_true", help="the JSON object alone")
    chosen = parser.parse_args()
    report = run(quick=chosen.quick, say=tell)
    lines = [] if chosen.json else table(report)
    sys.stdout.write("\n".join([*lines, json.dumps(dataclasses.asdict(report))]) + "\n")
    return 1 if report.errors else 0


def tell(text: str) -> None:
    """What goes on, beside the answer."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
