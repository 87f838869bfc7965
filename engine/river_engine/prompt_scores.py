"""What a request wants to know of its prompts' tokens: what to ask vLLM for, and its answers as they are sent.

vLLM scores a prompt with the model's own distribution, whatever the request's temperature, top-k and top-p. A prompt to
be scored is computed whole: what lies in the prefix cache has no log-probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.logprobs import FlatLogprobs

from river_engine import limits
from river_engine.errors import InvalidField
from river_engine.protocol import TopLogprobs

if TYPE_CHECKING:
    import numpy.typing as npt
    from vllm.outputs import RequestOutput

    from river_engine.protocol import EngineSample, TokenTable


@dataclass(frozen=True, slots=True)
class PromptWish:
    """What is wanted of one prompt; `targets` [T - 1, K] are token ids, or -1."""

    logprobs: bool
    top: int
    last: int | None
    targets: npt.NDArray[np.int32] | None

    @property
    def has_targets(self) -> bool:
        """Whether any token is named: of arrays of -1 vLLM has nothing to compute."""
        return self.targets is not None and bool((self.targets >= 0).any())

    def options(self) -> dict[str, Any]:
        """Of vLLM's `SamplingParams`."""
        options: dict[str, Any] = {}
        if self.logprobs or self.top:
            options["prompt_logprobs"] = self.top
        if self.has_targets:
            assert self.targets is not None
            # Rows before the first that names a token need no logits.
            start = int(np.argmax((self.targets >= 0).any(axis=1)))
            options["prompt_logprob_token_ids"] = np.ascontiguousarray(self.targets[start:])
            options["prompt_logprob_start"] = start
        return options

    def logprobs_of(self, output: RequestOutput) -> list[float | None] | None:
        """[T], of each prompt token given those before it; None for the first, and for those not wanted."""
        if not self.logprobs:
            return None
        flat, first = _flat(output), self._first(output)
        return [
            flat.logprobs[start] if end > start and position >= first else None
            for position, (start, end) in enumerate(
                zip(flat.start_indices, flat.end_indices, strict=True)
            )
        ]

    def top_of(self, output: RequestOutput) -> TopLogprobs | None:
        """Of each position the most likely tokens; vLLM puts the prompt's own before them."""
        if not self.top:
            return None
        flat, first = _flat(output), self._first(output)
        ids = np.full((len(flat), self.top), -1, dtype="<i4")
        logprobs = np.full((len(flat), self.top), -np.inf, dtype="<f4")
        for position in range(first, len(flat)):
            begin = flat.start_indices[position] + 1
            ids[position] = flat.token_ids[begin : begin + self.top]
            logprobs[position] = flat.logprobs[begin : begin + self.top]
        return TopLogprobs(width=self.top, token_ids=ids.tobytes(), logprobs=logprobs.tobytes())

    def targets_of(self, output: RequestOutput) -> bytes | None:
        """Float32 [T - 1, K], as `targets`."""
        if self.targets is None:
            return None
        filled = np.full(self.targets.shape, -np.inf, dtype="<f4")
        if self.has_targets:
            scores = output.prompt_token_id_logprobs
            assert scores is not None
            filled[len(filled) - len(scores) :] = scores
        return filled.tobytes()

    def _first(self, output: RequestOutput) -> int:
        """The first position to be told."""
        tokens = len(output.prompt_token_ids or ())
        return 1 if self.last is None else max(1, tokens - self.last)


def prompt_wishes(
    request: EngineSample, prompts: list[list[int]], vocab_size: int
) -> list[PromptWish]:
    """What is wanted of each prompt.

    Raises:
        InvalidField: the targets do not fit the prompts.
    """
    tables = request.prompt_targets
    if tables is not None and len(tables) != len(prompts):
        raise InvalidField(
            f"{len(tables)} arrays for {len(prompts)} prompts", param="prompt_targets"
        )
    targets: list[npt.NDArray[np.int32] | None] = [None] * len(prompts)
    for index, table in enumerate(tables or ()):
        targets[index] = _target_ids(table, f"prompt_targets[{index}]", prompts[index], vocab_size)
    return [
        PromptWish(
            request.return_prompt_logprobs,
            request.prompt_top_logprobs or 0,
            request.prompt_logprobs_last,
            ids,
        )
        for ids in targets
    ]


def _target_ids(
    table: TokenTable, param: str, prompt: list[int], vocab_size: int
) -> npt.NDArray[np.int32]:
    """[T - 1, K]."""
    if not 1 <= table.width <= limits.TOP_LOGPROBS_MAX:
        raise InvalidField(
            f"{table.width} tokens a position, must be 1 to {limits.TOP_LOGPROBS_MAX}", param=param
        )
    rows = len(prompt) - 1
    if len(table.token_ids) != 4 * rows * table.width:
        raise InvalidField(
            f"{len(table.token_ids)} bytes, must be {rows} rows of {table.width} int32", param=param
        )
    ids = np.frombuffer(table.token_ids, dtype="<i4").reshape(rows, table.width)
    outside = (ids < -1) | (ids >= vocab_size)
    if outside.any():
        row, column = np.unravel_index(int(np.argmax(outside)), ids.shape)
        raise InvalidField(
            f"token {ids[row, column]} is not in the vocabulary of {vocab_size}",
            param=f"{param}[{row}][{column}]",
        )
    return ids


def _flat(output: RequestOutput) -> FlatLogprobs:
    flat = output.prompt_logprobs
    assert isinstance(flat, FlatLogprobs)
    assert len(flat) == len(output.prompt_token_ids or [])
    return flat
