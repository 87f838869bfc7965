"""Requests for samples and samples themselves, between the Tinker protocol and River."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from river_client import wire
from river_gateway.dialects.tinker import messages_pb2 as pb
from river_gateway.dialects.tinker.datums import input_of_body
from river_gateway.dialects.tinker.tensors import Tensors
from river_gateway.errors import InvalidFieldError, UnavailableError, UnsupportedFieldError
from river_gateway.limits import SAMPLES_MAX
from river_gateway.training import validation
from river_gateway.training.arrays import unpacked

if TYPE_CHECKING:
    import numpy.typing as npt

    from river_gateway.dialects.tinker import bodies

_ABSENT_LOGPROB = -99999.0
"""Stands with the token 0 where there are fewer than K candidates, or none."""
_BYTES_PER_TOKEN = 16
_REASONS: dict[str, pb.StopReason] = {
    "stop": pb.STOP_REASON_STOP,
    "length": pb.STOP_REASON_LENGTH,
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of River, and what its answer is to be shaped like.

    `target_cells` are the rows and columns of those that a sparse array of targets names.
    """

    request: wire.SampleRequest
    top_sampled: int
    target_cells: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None


# ---- In --------------------------------------------------------------------------------------------------------------


def request_of(asked: bodies.Sample, model: str) -> Wanted:
    """A request in River's words.

    Raises:
        UnsupportedFieldError: it asks for something that is not offered.
        InvalidFieldError: a field is wrong. What is wrong in River's words too is found out by whoever does it.
    """
    if asked.prompt_alt_tokens_k:
        raise UnsupportedFieldError(
            "prompt_alt_tokens_k: alternatives to a prompt's tokens are not offered; topk_prompt_logprobs gives the "
            "likeliest",
            param="prompt_alt_tokens_k",
        )
    if asked.record_stability_info:
        raise UnsupportedFieldError(
            "record_stability_info: not offered, since the loss it serves, stable_reinforce, is not",
            param="record_stability_info",
        )
    validation.in_range(asked.num_samples, "num_samples", 1, SAMPLES_MAX)
    tokens = input_of_body(asked.prompt, "prompt").tolist()
    _check_last(asked, len(tokens))
    params = asked.sampling_params
    stop, stop_token_ids = _stops(params.stop)
    targets, cells = _targets(asked.target_prompt_logprobs, len(tokens))
    request = wire.SampleRequest(
        model=model,
        prompt_token_ids=[tokens],
        num_samples=asked.num_samples,
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        stop=stop,
        stop_token_ids=stop_token_ids,
        ignore_eos=params.stop == [],
        seed=params.seed,
        logprobs=asked.topk_sample_logprobs or None,
        return_prompt_logprobs=bool(asked.prompt_logprobs),
        prompt_top_logprobs=asked.topk_prompt_logprobs or None,
        prompt_logprobs_last=asked.prompt_logprobs_last_n,
        prompt_targets=targets,
    )
    return Wanted(request, asked.topk_sample_logprobs, cells)


def _check_last(asked: bodies.Sample, tokens: int) -> None:
    field = "prompt_logprobs_last_n"
    if asked.prompt_logprobs_last_n is None:
        return
    if not asked.prompt_logprobs:
        raise InvalidFieldError(
            f"{field}: is of prompt_logprobs, which are not asked for", param=field
        )
    validation.in_range(asked.prompt_logprobs_last_n, field, 1, max(tokens - 1, 1))


def _stops(stop: str | list[str | int] | None) -> tuple[list[str], list[int]]:
    """Texts and tokens that end a sample."""
    if isinstance(stop, str):
        return [stop], []
    given = stop or []
    return (
        [item for item in given if isinstance(item, str)],
        [item for item in given if isinstance(item, int)],
    )


def _targets(
    given: bodies.TensorData | None, tokens: int
) -> tuple[list[wire.Numbers] | None, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None]:
    """The ids to be scored [T - 1, K] and, if they are sparse, the cells that are named."""
    field = "target_prompt_logprobs"
    if given is None:
        return None, None
    array = Tensors().of_json(given, field, padding=-1)
    if array.ndim != 2 or len(array) != tokens - 1:  # noqa: PLR2004 - as the message says
        raise InvalidFieldError(
            f"{field}: shape {list(array.shape)}, must be [{tokens - 1}, K]", param=field
        )
    cells = None
    if given.sparse_crow_indices is not None:
        counts = np.diff(np.asarray(given.sparse_crow_indices))
        columns = np.asarray(given.sparse_col_indices or [], dtype=np.int64)
        cells = (np.repeat(np.arange(len(array)), counts), columns)
    ids = array.astype("<i8")
    return [wire.Tensor(dtype="int64", shape=ids.shape, data=ids.tobytes())], cells


# ---- Out -------------------------------------------------------------------------------------------------------------


def size_of(response: wire.SampleResponse) -> int:
    """About how many bytes its message has."""
    tokens = sum(
        len(group.prompt_token_ids) + sum(len(sample.tokens) for sample in group.samples)
        for group in response.groups
    )
    return tokens * _BYTES_PER_TOKEN


def message_of(response: wire.SampleResponse, wanted: Wanted) -> bytes:
    """The message of the samples of one prompt.

    Raises:
        UnavailableError: the engine broke one off.
    """
    (group,) = response.groups
    message = pb.SampleResponse(
        sequences=[_sequence(sample, wanted.top_sampled) for sample in group.samples],
        prompt_cache_hit_tokens=group.cached_prompt_tokens,
    )
    if group.prompt_logprobs is not None:
        listed = [float("nan") if value is None else value for value in group.prompt_logprobs]
        message.prompt_logprobs = np.asarray(listed, dtype="<f4").tobytes()
    if group.prompt_top_logprobs is not None:
        message.topk_prompt_logprobs.CopyFrom(_top_of_prompt(group.prompt_top_logprobs))
    if group.prompt_target_logprobs is not None:
        message.target_prompt_logprobs.CopyFrom(
            _scored(group.prompt_target_logprobs, wanted.target_cells)
        )
    return message.SerializeToString()


def _sequence(sample: wire.SampleSequence, top: int) -> pb.SampledSequence:
    reason = _REASONS.get(sample.stop_reason)
    if reason is None:
        raise UnavailableError("the engine broke off a sample; try again")
    message = pb.SampledSequence(
        stop_reason=reason,
        tokens=np.asarray(sample.tokens, dtype="<i4").tobytes(),
        logprobs=np.asarray(sample.logprobs, dtype="<f4").tobytes(),
    )
    if top and sample.top_logprobs is not None:
        message.topk_sampled_logprobs.CopyFrom(_top_of_sample(sample.top_logprobs, top))
    return message


def _top_of_sample(positions: Sequence[Sequence[wire.TopLogprob]], k: int) -> pb.TopkLogprobs:
    """The K likeliest tokens at each position, [positions, K]."""
    ids = np.zeros((len(positions), k), dtype="<i4")
    logprobs = np.full((len(positions), k), _ABSENT_LOGPROB, dtype="<f4")
    for row, candidates in enumerate(positions):
        for column, candidate in enumerate(candidates[:k]):
            ids[row, column] = candidate.token
            logprobs[row, column] = candidate.logprob
    return _top(ids, logprobs)


def _top_of_prompt(top: wire.TopLogprobs) -> pb.TopkLogprobs:
    ids = unpacked(top.token_ids, "token_ids").astype("<i4")
    logprobs = unpacked(top.logprobs, "logprobs").astype("<f4")
    absent = ids < 0
    return _top(np.where(absent, 0, ids), np.where(absent, _ABSENT_LOGPROB, logprobs))


def _top(ids: npt.NDArray[Any], logprobs: npt.NDArray[Any]) -> pb.TopkLogprobs:
    length, k = ids.shape
    return pb.TopkLogprobs(
        token_ids=ids.astype("<i4").tobytes(),
        logprobs=logprobs.astype("<f4").tobytes(),
        k=k,
        length=length,
    )


def _scored(
    tensor: wire.Tensor, cells: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None
) -> pb.Tensor:
    """Log-probabilities [T - 1, K], NaN where none was asked for; of a sparse request the cells that it named."""
    values = unpacked(tensor, "prompt_target_logprobs").astype("<f4")
    message = pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=values.shape)
    if cells is None:
        message.dense = np.where(np.isneginf(values), np.nan, values).astype("<f4").tobytes()
        return message
    rows, columns = cells
    crow = np.searchsorted(rows, np.arange(len(values) + 1)).astype("<i8")
    message.sparse_csr.values = values[rows, columns].tobytes()
    message.sparse_csr.crow_indices = crow.tobytes()
    message.sparse_csr.col_indices = columns.astype("<i8").tobytes()
    return message
