"""Compiles every kernel and configuration, prints what became of each, and fails if one must not go out."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict

from triton import knobs

from river_kernels.aot.compiling import SHARED_BYTES_MAX, Compiled, compile_program
from river_kernels.aot.programs import Program, programs_of, sample_of
from river_kernels.aot.workloads import all_launches

HEAD = (
    "arch",
    "kernel",
    "programs",
    "registers",
    "spilled",
    "shared",
    "instructions",
    "configuration",
)
ARCHITECTURES = {f"sm_{number}": number for number in SHARED_BYTES_MAX}


def main() -> int:
    """Runs the command; what the process should exit with."""
    options = _options()
    if knobs.runtime.interpret:
        sys.stderr.write("aot: TRITON_INTERPRET is set, and what is interpreted is not compiled\n")
        return 2
    programs = [
        program for program in programs_of(all_launches()) if options.kernel in program.kernel
    ]
    work = [(program, ARCHITECTURES[name]) for name in options.arch for program in programs]
    sample = sample_of(programs)
    work += [(program, ARCHITECTURES[name]) for name in options.sample for program in sample]
    results = _compile_all(work, options.processes)
    failed = [result for result in results if result.faults]
    if options.json:
        print(json.dumps([asdict(result) for result in results]))  # noqa: T201  # a command's answer
    else:
        print(table(results))  # noqa: T201  # a command's answer
        print(f"{len(results)} programs, {len(failed)} with faults")  # noqa: T201
    return 1 if failed or not results else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("river_kernels.aot", description=__doc__)
    names = sorted(ARCHITECTURES)
    parser.add_argument(
        "--arch", nargs="*", choices=names, default=["sm_90"], help="compile all programs for these"
    )
    parser.add_argument(
        "--sample", nargs="*", choices=names, default=[], help="and one of each kernel for these"
    )
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="JSON in the place of a table")
    return parser.parse_args()


def _compile_all(work: Sequence[tuple[Program, int]], processes: int) -> list[Compiled]:
    # A fresh process: what the compiler's threads hold when this one is copied stays locked in the copy.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        return list(pool.map(compile_program, *zip(*work, strict=True)) if work else [])


def table(results: Sequence[Compiled]) -> str:
    """One line for each configuration, with the most that one of its programs takes, and their faults below it."""
    grouped: dict[tuple[int, str, str], list[Compiled]] = defaultdict(list)
    for result in results:
        grouped[result.architecture, result.kernel, result.configuration].append(result)
    rows = [HEAD, *(_row(key, programs) for key, programs in grouped.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    faults = [
        "".join(f"\n    FAULT: {fault}" for program in programs for fault in program.faults)
        for programs in grouped.values()
    ]
    return "\n".join(map("".join, zip(lines, ["", *faults], strict=True)))


def _row(key: tuple[int, str, str], programs: Sequence[Compiled]) -> tuple[str, ...]:
    architecture, kernel, configuration = key
    instructions = dict.fromkeys(name for program in programs for name in program.instructions)
    return (
        f"sm_{architecture}",
        kernel,
        str(len(programs)),
        str(max(program.registers for program in programs)),
        str(max(program.spilled_bytes for program in programs)),
        str(max(program.shared_bytes for program in programs)),
        "+".join(instructions) or "-",
        configuration,
    )


if __name__ == "__main__":
    sys.exit(main())
