"""What travels in operations and samples alike: the base of every wire struct, arrays, and training sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct


class Wire(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of every wire struct: immutable, built by keyword, defaults left out."""


# ---- Data ------------------------------------------------------------------------------------------------------------


class Tensor(Wire, frozen=True):
    """A C-contiguous little-endian array: `data` holds `prod(shape)` items of `dtype`."""

    dtype: Literal["int32", "int64", "float32", "uint8", "uint16"]
    shape: tuple[int, ...]
    data: bytes


Numbers = Sequence[float | Sequence[float]] | Tensor
"""A list of numbers, a list of rows of numbers, or the same packed. Integers are numbers."""


class Datum(Wire, frozen=True):
    """One training sequence of T tokens.

    `input_ids` int [T]; `target_tokens` int [T] (absent: `input_ids` shifted left by one; the last may be any filler);
    `weights` (absent: one everywhere), `old_logprobs`, `advantages` float [T]; `echo_weights` float [T], for
    `echo_cispo` alone; `attention_mask` [T] of ones and zeros, whose zeros may only form a tail (padding).

    Where the losses `ppo`, `gspo` and `cispo` have bounds of the ratio, `clip_low` and `clip_high` float [T] may give
    each token its own. `sequence_mask` [T] of ones and zeros says, for `gspo` alone, over which tokens the mean of a
    sequence's ratio is; absent, over those that count.

    Soft targets, for `cross_entropy` alone: `target_tokens` [T, K] with `weights` [T, K], such as a teacher's K most
    likely tokens and their probabilities.

    `expert_routing` int [T, MoE layers, experts per token]: the experts that `SampleSequence.expert_routing` names for
    these tokens. As for the other fields the last index is ignored; it may also be left out.
    """

    input_ids: Numbers
    target_tokens: Numbers | None = None
    weights: Numbers | None = None
    old_logprobs: Numbers | None = None
    advantages: Numbers | None = None
    attention_mask: Numbers | None = None
    echo_weights: Numbers | None = None
    clip_low: Numbers | None = None
    clip_high: Numbers | None = None
    sequence_mask: Numbers | None = None
    expert_routing: Tensor | None = None
