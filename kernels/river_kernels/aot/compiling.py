"""Compiles a program for an architecture, and says what became of it. No GPU and no driver is needed."""

from __future__ import annotations

import io
import re
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.errors import PTXASError

from river_kernels.aot.programs import DIVISOR, Program
from river_kernels.gpu.launch import FUSES_MULTIPLY_ADD

_KIB = 1024
SHARED_BYTES_MAX = {80: 163 * _KIB, 86: 99 * _KIB, 89: 99 * _KIB, 90: 227 * _KIB, 100: 227 * _KIB}
"""What one block may have of an architecture's shared memory."""

_GROUP_INSTRUCTIONS = {9: "wgmma", 10: "tcgen05"}
"""By generation, the first digits of an architecture's number."""

_WARPS_OF_GROUP = 4
_GROUP_ROWS, _GROUP_COLUMNS = 64, 8

_INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma.sync": "mma.sync"}
_HALVES = {"bf16", "f16"}


@dataclass(frozen=True, slots=True)
class Product:
    """A `tl.dot` in a program: [rows, …] of `element` times […, columns]."""

    rows: int
    columns: int
    element: str


@dataclass(frozen=True, slots=True)
class Compiled:
    """What became of a program; `faults` are the reasons why it must not go out like this."""

    architecture: int
    kernel: str
    configuration: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: tuple[str, ...]
    seconds: float
    faults: tuple[str, ...]


def compile_program(program: Program, architecture: int) -> Compiled:
    """Compiles `program` for `architecture`, such as 90 for sm_90; a failure is one of its faults."""
    started = time.monotonic()
    log = io.StringIO()
    knobs.nvidia.dump_ptxas_log = True
    knobs.compilation.always_compile = True  # What comes from the cache has no log.
    try:
        with redirect_stdout(log):
            built: Any = triton.compile(
                _source(program),
                target=GPUTarget("cuda", architecture, 32),
                options={
                    "num_warps": program.warps,
                    "num_stages": program.stages,
                    "enable_fp_fusion": FUSES_MULTIPLY_ADD,
                },
            )
    except (
        triton.CompilationError,
        PTXASError,
        RuntimeError,
    ) as error:  # The last is of MLIR's passes.
        reason = f"does not compile: {error}"
        return _compiled(program, architecture, started, faults=(reason,))
    products = products_of(built.asm["ttir"])
    instructions = tuple(
        name for name, opcode in _INSTRUCTIONS.items() if opcode in built.asm["ptx"]
    )
    registers, spilled_bytes = _used(log.getvalue())
    faults = [
        f"its bf16 products should use {name}"
        for name in expected_instructions(products, architecture, program.warps)
        if name not in instructions
    ]
    if spilled_bytes and all(product.element in _HALVES for product in products):
        faults.append(f"spills {spilled_bytes} bytes of registers")
    shared_max = SHARED_BYTES_MAX[architecture]
    if built.metadata.shared > shared_max:
        faults.append(f"takes {built.metadata.shared} bytes of shared memory of {shared_max}")
    return _compiled(
        program,
        architecture,
        started,
        registers=registers,
        spilled_bytes=spilled_bytes,
        shared_bytes=built.metadata.shared,
        instructions=instructions,
        faults=tuple(faults),
    )


def expected_instructions(
    products: list[Product], architecture: int, warps: int
) -> tuple[str, ...]:
    """The matrix instructions that products of 16-bit numbers have to become.

    A generation may have an instruction for a whole group of warps. A product takes it if its rows fill the 64 of the
    instruction, its columns come in eights, and there are whole groups of warps. A smaller product takes `mma.sync`,
    which is right for it: in 64 rows with 16 useful ones, three quarters of what is read and multiplied is for nothing.
    """
    halves = [product for product in products if product.element in _HALVES]
    group_instruction = _GROUP_INSTRUCTIONS.get(architecture // 10)
    is_large = [
        group_instruction is not None
        and product.rows % _GROUP_ROWS == 0
        and product.columns % _GROUP_COLUMNS == 0
        and warps % _WARPS_OF_GROUP == 0
        for product in halves
    ]
    large = (group_instruction,) if group_instruction is not None and any(is_large) else ()
    return large if all(is_large) else (*large, "mma.sync")


def products_of(ttir: str) -> list[Product]:
    """The products in a program's Triton IR."""
    pattern = r"tt\.dot .*: tensor<(\d+)x\d+x(\w+)[^>]*> \* tensor<\d+x(\d+)x"
    return [
        Product(int(rows), int(columns), element)
        for rows, element, columns in re.findall(pattern, ttir)
    ]


def _source(program: Program) -> ASTSource:
    kernel = program.function()
    position = {name: index for index, name in enumerate(kernel.arg_names)}
    return ASTSource(
        fn=kernel,
        signature=dict(program.signature),
        constexprs={(position[name],): value for name, value in program.constants},
        attrs={(position[name],): [["tt.divisibility", DIVISOR]] for name in program.divisible},
    )


def _used(ptxas_log: str) -> tuple[int, int]:
    """Registers of a thread, and bytes of them that it spills, as the assembler says."""
    registers = re.findall(r"Used (\d+) registers", ptxas_log)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", ptxas_log)
    assert registers, f"the assembler does not say how many registers it used: {ptxas_log!r}"
    assert spills, f"the assembler does not say how much it spilled: {ptxas_log!r}"
    return max(map(int, registers)), max(int(size) for pair in spills for size in pair)


def _compiled(
    program: Program,
    architecture: int,
    started: float,
    *,
    registers: int = 0,
    spilled_bytes: int = 0,
    shared_bytes: int = 0,
    instructions: tuple[str, ...] = (),
    faults: tuple[str, ...] = (),
) -> Compiled:
    return Compiled(
        architecture,
        program.kernel,
        program.configuration,
        registers,
        spilled_bytes,
        shared_bytes,
        instructions,
        time.monotonic() - started,
        faults,
    )
