"""From launches to the programs that Triton would compile for them."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from river_kernels.gpu.launch import Launch

DIVISOR = 16
"""Triton compiles another program where it can rely on an address or a number being a multiple of this."""

_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@dataclass(frozen=True, slots=True)
class Program:
    """A kernel with everything that its machine code depends on; can be sent to another process.

    `signature` has the type of every parameter, `constants` the values of those whose type is "constexpr", and
    `divisible` names those that are multiples of `DIVISOR`.
    """

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    warps: int
    stages: int

    def function(self) -> Any:
        """The kernel itself."""
        return getattr(importlib.import_module(self.module), self.kernel)

    @property
    def configuration(self) -> str:
        """What was chosen for it, for people."""
        chosen = [
            f"{name}={value}"
            for name, value in self.constants
            if name.isupper() and name != "UPCAST"
        ]
        types = {kind.removeprefix("*") for _, kind in self.signature if kind.startswith("*")}
        floats = sorted(types & {"bf16", "fp32", "fp16"})
        return " ".join([*chosen, f"warps={self.warps}", f"stages={self.stages}", "+".join(floats)])


def program_of(launch: Launch) -> Program:
    """What Triton compiles for a launch."""
    kernel = launch.kernel
    values = dict(zip(kernel.arg_names, launch.arguments, strict=False)) | launch.constants
    signature: list[tuple[str, str]] = []
    constants: list[tuple[str, Any]] = []
    divisible: list[str] = []
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        kind = "constexpr"
        if not parameter.is_constexpr:
            kind, is_divisible = _specialised(value, free=parameter.do_not_specialize)
            if is_divisible:
                divisible.append(name)
        if kind == "constexpr":
            constants.append((name, value))
        signature.append((name, kind))
    return Program(
        kernel.__module__,
        kernel.__name__,
        tuple(signature),
        tuple(constants),
        tuple(divisible),
        launch.warps,
        launch.stages,
    )


def programs_of(launches: Iterable[Launch]) -> list[Program]:
    """The programs of all launches, each once, in the order of their first launch."""
    return list(dict.fromkeys(program_of(launch) for launch in launches))


def sample_of(programs: Iterable[Program]) -> list[Program]:
    """The first of the programs of every kernel."""
    first: dict[tuple[str, str], Program] = {}
    for program in programs:
        first.setdefault((program.module, program.kernel), program)
    return list(first.values())


def _specialised(value: Any, *, free: bool) -> tuple[str, bool]:
    """The type of an argument, and whether it is known to be a multiple of `DIVISOR`; as Triton's launcher does it."""
    if isinstance(value, torch.Tensor):
        offset_bytes = value.storage_offset() * value.element_size()
        return _POINTERS[value.dtype], offset_bytes % DIVISOR == 0
    if value is None or (value == 1 and type(value) is int and not free):
        return "constexpr", False
    if isinstance(value, bool):
        return "u1", False
    if isinstance(value, float):
        return "fp32", False
    assert isinstance(value, int), f"a kernel takes no {type(value).__name__}"
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    return kind, not free and value % DIVISOR == 0
