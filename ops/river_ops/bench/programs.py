"""Parts of a benchmark that need a process of their own: for its settings, or so as not to slow down the rest.

Such a program is a module with a struct of settings as its only argument and a struct as the last line it prints.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from typing import TypeVar

import msgspec

from river_ops.children import dying_with_parent

OUTPUT_SHOWN_CHARS = 2000

Settings = TypeVar("Settings", bound=msgspec.Struct)
Answer = TypeVar("Answer", bound=msgspec.Struct)


class ProgramError(RuntimeError):
    """A program failed; the message ends with what it said."""


def start_program(
    module: str, settings: msgspec.Struct, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Starts `module` with pipes for both directions; what it says beside its answer goes to our stderr."""
    argument = msgspec.json.encode(settings).decode()
    return subprocess.Popen(
        dying_with_parent([sys.executable, "-m", module, argument]),
        env={**os.environ, **(environment or {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def run_program(
    module: str,
    settings: msgspec.Struct,
    answer: type[Answer],
    *,
    environment: Mapping[str, str] | None = None,
    timeout_s: float,
) -> Answer:
    """What `module` answers.

    Raises:
        ProgramError: it failed or took longer than `timeout_s`.
    """
    return finish_program(start_program(module, settings, environment), answer, timeout_s=timeout_s)


def finish_program(
    program: subprocess.Popen[bytes], answer: type[Answer], *, timeout_s: float
) -> Answer:
    """The answer of a started program; raises as `run_program` does."""
    try:
        output, _ = program.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        program.kill()
        program.communicate()
        raise ProgramError(f"{program.args} took longer than {timeout_s:.0f} s") from None
    if program.returncode != 0 or not output.strip():
        shown = output[-OUTPUT_SHOWN_CHARS:].decode(errors="replace")
        raise ProgramError(f"{program.args} ended with code {program.returncode}\n{shown}")
    return msgspec.json.decode(output.strip().splitlines()[-1], type=answer)


def program_settings(kind: type[Settings]) -> Settings:
    """Inside a program: what it was started with."""
    return msgspec.json.decode(sys.argv[1], type=kind)


def answer_with(answer: msgspec.Struct) -> None:
    """Inside a program: its last line."""
    sys.stdout.write(msgspec.json.encode(answer).decode() + "\n")
    sys.stdout.flush()
