"""Every kernel compiled ahead of time, without a GPU: no spills, no lost matrix instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.jit import JITFunction

from river_kernels.aot.__main__ import table
from river_kernels.aot.compiling import Compiled, Product, expected_instructions, products_of
from river_kernels.aot.programs import program_of, sample_of
from river_kernels.aot.workloads import all_launches
from river_kernels.gpu import dequantize
from river_kernels.gpu.launch import Launch

TESTS = Path(__file__).parents[2]
TIMEOUT_S = 900.0  # Two free cores take a tenth of it.


def run_python(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """A process in which Triton compiles, with a cache of its own."""
    paths = [str(TESTS), *sys.path]
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
def test_every_kernel_compiles_as_it_should(tmp_path: Path) -> None:
    """All configurations for sm_90 and one of every kernel for sm_80 and sm_100, none with a fault."""
    done = run_python(
        *("-m", "river_kernels.aot", "--arch", "sm_90", "--sample", "sm_80", "sm_100"),
        "--json",
        cache=tmp_path,
    )
    assert done.stdout, done.stderr
    results = [Compiled(**fields) for fields in json.loads(done.stdout)]
    sys.stdout.write(table(results))
    assert [result for result in results if result.faults] == []
    assert done.returncode == 0, done.stderr
    kernels = {launch.kernel.__name__ for launch in all_launches()}
    for architecture in (80, 90, 100):
        assert {
            result.kernel for result in results if result.architecture == architecture
        } == kernels


@pytest.mark.slow
def test_faults_are_found(tmp_path: Path) -> None:
    """Spills, too much shared memory and what does not compile are faults; good kernels of both sizes have none."""
    done = run_python("-m", "support.faulty_kernels", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    compiled: dict[str, dict[str, Any]] = json.loads(done.stdout)
    assert compiled["large"]["faults"] == compiled["small"]["faults"] == []
    assert compiled["large"]["instructions"] == ["wgmma"]
    assert compiled["small"]["instructions"] == ["mma.sync"]
    assert 0 < compiled["large"]["registers"] <= 255
    assert any("spills" in fault for fault in compiled["spills"]["faults"])
    assert compiled["spills"]["spilled_bytes"] > 0
    assert any("shared memory" in fault for fault in compiled["too much shared memory"]["faults"])
    assert any("does not compile" in fault for fault in compiled["does not compile"]["faults"])


def test_the_command_refuses_to_interpret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With TRITON_INTERPRET there is nothing to compile, and it says so."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = run_python("-m", "river_kernels.aot", cache=tmp_path)
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


@pytest.mark.parametrize(
    ("products", "architecture", "warps", "expected"),
    [
        ([Product(64, 32, "bf16")], 90, 4, ("wgmma",)),
        ([Product(64, 32, "bf16")], 90, 2, ("mma.sync",)),
        ([Product(16, 32, "bf16")], 90, 4, ("mma.sync",)),
        ([Product(64, 16, "bf16"), Product(16, 64, "bf16")], 90, 4, ("wgmma", "mma.sync")),
        ([Product(64, 32, "bf16")], 80, 4, ("mma.sync",)),
        ([Product(128, 32, "bf16")], 100, 4, ("tcgen05",)),
        ([Product(32, 32, "bf16"), Product(16, 64, "f32")], 100, 4, ("mma.sync",)),
        ([Product(64, 32, "f32")], 90, 4, ()),
        ([], 90, 4, ()),
    ],
)
def test_which_instructions_products_should_become(
    products: list[Product], architecture: int, warps: int, expected: tuple[str, ...]
) -> None:
    """Full groups of warps have `wgmma` or `tcgen05`, everything smaller or older `mma.sync`, float32 neither."""
    assert expected_instructions(products, architecture, warps) == expected


def test_the_table_has_a_line_for_each_configuration() -> None:
    """With the most of its programs, and every fault."""

    def compiled(kernel: str, registers: int, *faults: str) -> Compiled:
        return Compiled(90, kernel, "ROWS=64", registers, 0, 512, ("wgmma",), 1.0, faults)

    results = [compiled("one", 80), compiled("two", 90), compiled("one", 100, "spills", "slow")]
    assert [line.split() for line in table(results).splitlines()[1:]] == [
        ["sm_90", "one", "2", "100", "0", "512", "wgmma", "ROWS=64"],
        ["FAULT:", "spills"],
        ["FAULT:", "slow"],
        ["sm_90", "two", "1", "90", "0", "512", "wgmma", "ROWS=64"],
    ]


def test_products_are_read_from_the_ir() -> None:
    """Rows, columns and the type of the operands."""
    ttir = """
    %1 = tt.dot %a, %b, %c, inputPrecision = ieee : tensor<64x128xbf16> * tensor<128x32xbf16> -> tensor<64x32xf32>
    %2 = tt.dot %d, %e, %f, inputPrecision = ieee : tensor<16x16xf32> * tensor<16x64xf32> -> tensor<16x64xf32> loc(#l)
    """
    assert products_of(ttir) == [Product(64, 32, "bf16"), Product(16, 64, "f32")]


def test_programs_are_told_apart_as_triton_does() -> None:
    """By types, by what is 1, by what is a multiple of 16; an address counts with its offset."""
    kernel = JITFunction(dequantize._write_nvfp4.fn)  # here it is the interpreter's

    def program(offset: int, rows: int, matrix: int) -> Any:
        packed = torch.empty(4096, dtype=torch.uint8, device="meta")[offset:]
        scale = torch.empty(1, device="meta")
        arguments = (packed, packed, scale, scale, rows, 8, 1, matrix, 16)
        constants = {"ROWS": 16, "COLUMNS": 128, "UPCAST": False}
        return program_of(Launch(kernel, (1, 1, 1), arguments, constants, 4, 1))

    first = program(0, 32, 1000)
    assert first == program(16, 48, 1001)
    assert dict(first.signature)["scale_columns"] == "constexpr"
    assert dict(first.constants)["scale_columns"] == 1
    assert dict(first.signature)["out_matrix"] == "i32"
    assert {"packed", "rows", "out_row"} <= set(first.divisible)
    assert dict(program(0, 32, 2**31).signature)["out_matrix"] == "i64"
    assert program(1, 32, 1000) != first
    assert program(0, 33, 1000) != first
    assert len(sample_of([first, program(1, 32, 1000)])) == 1
