"""One launch over all runs that step: 34 bytes of traffic a weight, whatever the runs' sizes and hyper-parameters.

A program takes one chunk of one run; which, says a table that the host makes once for a set of sizes. Norms are summed
in float64 in two stages of fixed order, so that squares of finite gradients never leave the range of the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
import triton
import triton.language as tl

from river_kernels.adam import AdamUpdate
from river_kernels.gpu.launch import launch
from river_kernels.gpu.tables import to_device, uploaded

CHUNK = 32768
"""Elements a program steps."""

BLOCK = 1024
"""Elements it has in registers at a time."""

ALIGNMENT_BYTES = 16
"""Of every buffer, so that a thread moves four elements at once."""

# Rows of the table of addresses; `size` stands in elements.
_GRADIENT: tl.constexpr = tl.constexpr(0)
_SIZE: tl.constexpr = tl.constexpr(1)
_WEIGHTS: tl.constexpr = tl.constexpr(2)
_FIRST: tl.constexpr = tl.constexpr(3)
_SECOND: tl.constexpr = tl.constexpr(4)
_COPY: tl.constexpr = tl.constexpr(5)

# Rows of the table of numbers.
_BETA1: tl.constexpr = tl.constexpr(0)
_BETA2: tl.constexpr = tl.constexpr(1)
_EPS: tl.constexpr = tl.constexpr(2)
_DECAY: tl.constexpr = tl.constexpr(3)
_RATE: tl.constexpr = tl.constexpr(4)
_ROOT_CORRECTION: tl.constexpr = tl.constexpr(5)
_MULTIPLIER: tl.constexpr = tl.constexpr(6)


def norms(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm of each flat float32 gradient, float64 [runs] on their device."""
    device = gradients[0].device
    sizes = tuple(gradient.numel() for gradient in gradients)
    chunks, bounds = _chunks(sizes, device)
    addresses = uploaded([[_address(g) for g in gradients], list(sizes)], torch.int64, device)
    partials = torch.empty(chunks.shape[1], dtype=torch.float64, device=device)
    totals = torch.empty(len(sizes), dtype=torch.float64, device=device)
    count = chunks.shape[1]
    runs = len(sizes)
    launch(
        square_sums, (count,), partials, addresses, chunks, runs, count, CHUNK=CHUNK, BLOCK=BLOCK
    )
    launch(total_norms, (runs,), totals, partials, bounds, BLOCK=BLOCK)
    return totals


def step_all(updates: Sequence[AdamUpdate]) -> None:
    """Does all `updates`; their tensors lie on one device."""
    device = updates[0].weights.device
    chunks, _ = _chunks(tuple(update.weights.numel() for update in updates), device)
    addresses = uploaded(_addresses(updates), torch.int64, device)
    numbers = uploaded(_numbers(updates), torch.float32, device)
    copies = [update.copy for update in updates if update.copy is not None]
    like = copies[0] if copies else updates[0].weights
    assert all(copy.dtype is like.dtype for copy in copies), "copies are of one precision"
    count = chunks.shape[1]
    launch(
        adam_chunks,
        (count,),
        like,
        addresses,
        numbers,
        chunks,
        len(updates),
        count,
        CHUNK=CHUNK,
        BLOCK=BLOCK,
    )


@lru_cache(maxsize=64)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Run and number of every chunk, int32 [2, N], and where each run's chunks begin and the last one's end."""
    counts = torch.tensor([-(-size // CHUNK) for size in sizes])
    runs = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    begins = torch.tensor([0, *accumulate(counts.tolist())])
    numbers = torch.arange(len(runs)) - begins[runs]
    table = torch.stack([runs, numbers]).to(torch.int32)
    return to_device(table, device), to_device(begins.to(torch.int32), device)


def _addresses(updates: Sequence[AdamUpdate]) -> list[list[int]]:
    return [
        [_address(update.gradient) for update in updates],
        [update.weights.numel() for update in updates],
        [_address(update.weights) for update in updates],
        [_address(update.first) for update in updates],
        [_address(update.second) for update in updates],
        [0 if update.copy is None else _address(update.copy) for update in updates],
    ]


def _address(tensor: torch.Tensor) -> int:
    if tensor.is_meta:
        return 0
    assert tensor.data_ptr() % ALIGNMENT_BYTES == 0
    return tensor.data_ptr()


def _numbers(updates: Sequence[AdamUpdate]) -> list[list[float]]:
    """Seven numbers of each update, worked out in double precision as torch does."""
    columns = [
        (
            update.rule.beta1,
            update.rule.beta2,
            update.rule.eps,
            1.0 - update.rule.lr * update.rule.weight_decay,
            update.rule.lr / (1.0 - update.rule.beta1**update.step),
            (1.0 - update.rule.beta2**update.step) ** 0.5,
            update.multiplier,
        )
        for update in updates
    ]
    return [list(row) for row in zip(*columns, strict=True)]


@triton.jit
def adam_chunks(
    like,
    addresses,
    numbers,
    chunks,
    runs,
    count,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Steps one chunk of one run. `like` has the element type of the copies."""
    program = tl.program_id(0)
    run = tl.load(chunks + program)
    begin = tl.load(chunks + count + program).to(tl.int64) * CHUNK
    left = tl.load(addresses + _SIZE * runs + run) - begin
    gradient = _buffer(addresses, runs, run, _GRADIENT, tl.float32) + begin
    weights = _buffer(addresses, runs, run, _WEIGHTS, tl.float32) + begin
    first = _buffer(addresses, runs, run, _FIRST, tl.float32) + begin
    second = _buffer(addresses, runs, run, _SECOND, tl.float32) + begin
    copy_address = tl.load(addresses + _COPY * runs + run)
    copy = _buffer(addresses, runs, run, _COPY, like.dtype.element_ty) + begin
    beta1 = tl.load(numbers + _BETA1 * runs + run)
    beta2 = tl.load(numbers + _BETA2 * runs + run)
    eps = tl.load(numbers + _EPS * runs + run)
    decay = tl.load(numbers + _DECAY * runs + run)
    rate = tl.load(numbers + _RATE * runs + run)
    root_correction = tl.load(numbers + _ROOT_CORRECTION * runs + run)
    multiplier = tl.load(numbers + _MULTIPLIER * runs + run)
    for start in range(0, CHUNK, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        # Only the last block of a run needs a mask, which keeps threads from moving four elements at once.
        if start + BLOCK <= left:
            _step(
                gradient, weights, first, second, copy, copy_address, offsets, None,
                beta1, beta2, eps, decay, rate, root_correction, multiplier,
            )  # fmt: skip
        elif start < left:
            _step(
                gradient, weights, first, second, copy, copy_address, offsets, offsets < left,
                beta1, beta2, eps, decay, rate, root_correction, multiplier,
            )  # fmt: skip


@triton.jit
def _step(
    gradient, weights, first, second, copy, copy_address, offsets, mask,
    beta1, beta2, eps, decay, rate, root_correction, multiplier,
):  # fmt: skip
    g = tl.load(gradient + offsets, mask=mask) * multiplier
    m = tl.load(first + offsets, mask=mask)
    v = tl.load(second + offsets, mask=mask)
    w = tl.load(weights + offsets, mask=mask) * decay
    m += (1.0 - beta1) * (g - m)
    v = beta2 * v + (1.0 - beta2) * g * g
    w -= rate * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root_correction) + eps)
    tl.store(first + offsets, m, mask=mask)
    tl.store(second + offsets, v, mask=mask)
    tl.store(weights + offsets, w, mask=mask)
    tl.store(gradient + offsets, tl.zeros_like(g), mask=mask)
    if copy_address != 0:
        tl.store(copy + offsets, w.to(copy.dtype.element_ty), mask=mask)


@triton.jit
def square_sums(
    partials,
    addresses,
    chunks,
    runs,
    count,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The sum of squares of one chunk of one gradient, float64."""
    program = tl.program_id(0)
    run = tl.load(chunks + program)
    begin = tl.load(chunks + count + program).to(tl.int64) * CHUNK
    left = tl.load(addresses + _SIZE * runs + run) - begin
    gradient = _buffer(addresses, runs, run, _GRADIENT, tl.float32) + begin
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, CHUNK, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        if start + BLOCK <= left:
            g = tl.load(gradient + offsets).to(tl.float64)
            sums += g * g
        elif start < left:
            g = tl.load(gradient + offsets, mask=offsets < left, other=0.0).to(tl.float64)
            sums += g * g
    tl.store(partials + program, tl.sum(sums))


@triton.jit
def total_norms(norms, partials, bounds, BLOCK: tl.constexpr, UPCAST: tl.constexpr):
    """The root of the sum of one run's partial sums, in their order."""
    run = tl.program_id(0)
    begin, end = tl.load(bounds + run), tl.load(bounds + run + 1)
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, end, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        sums += tl.load(partials + offsets, mask=offsets < end, other=0.0)
    tl.store(norms + run, tl.sqrt(tl.sum(sums)))


@triton.jit
def _buffer(addresses, runs, run, ROW: tl.constexpr, TYPE):
    """A pointer from the table, of which the compiler learns that it is aligned."""
    address = tl.load(addresses + ROW * runs + run)
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)), 16)
