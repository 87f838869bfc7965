"""What came of operations and samples, as the Tinker protocol tells it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from river_gateway.dialects.tinker import messages_pb2 as pb
from river_gateway.training.arrays import unpacked

if TYPE_CHECKING:
    import numpy.typing as npt

    from river_client import wire

PROTOBUF = "application/x-protobuf"
_RECORD = "ArrayRecord"

# ---- Metrics ---------------------------------------------------------------------------------------------------------

_SUMS = frozenset(
    {
        "loss",
        "num_tokens",
        "weight_sum",
        "num_pairs",
        "echo_loss_sum",
        "echo_num_tokens",
        "tokens",
    }
)
_GREATEST = frozenset({"milliseconds"})
_SAID_ALREADY = frozenset({"loss_sum"})


def reducible(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics under names that say how those of several chunks become one, as the client does it."""
    return {
        f"{name}:{_reduction(name)}": value
        for name, value in metrics.items()
        if name not in _SAID_ALREADY
    }


def _reduction(name: str) -> str:
    if name in _SUMS:
        return "sum"
    return "max" if name in _GREATEST else "mean"


# ---- Forward and backward --------------------------------------------------------------------------------------------


def forward_backward_output(result: wire.OperationResult) -> bytes:
    """The message of a forward or forward_backward that was done."""
    logprobs = [_own_places(tensor) for tensor in result.logprobs or ()]
    output = pb.ForwardBackwardOutput(
        loss_fn_output_type=_RECORD,
        loss_fn_outputs=_records(logprobs),
        metrics=reducible(result.metrics),
    )
    return output.SerializeToString()


def forward_backward_json(result: wire.OperationResult) -> dict[str, object]:
    """The same for clients that do not read protobuf."""
    logprobs = [_own_places(tensor) for tensor in result.logprobs or ()]
    return {
        "loss_fn_output_type": _RECORD,
        "loss_fn_outputs": [
            {
                "logprobs": {
                    "data": values.reshape(-1).tolist(),
                    "dtype": "float32",
                    "shape": list(values.shape),
                }
            }
            for values in logprobs
        ],
        "metrics": reducible(result.metrics),
    }


def _own_places(tensor: wire.Tensor) -> npt.NDArray[np.float32]:
    """Log-probabilities [N] or [N, K] of a datum, without the place that it was lengthened by."""
    return unpacked(tensor, "logprobs")[:-1]


def _records(arrays: Sequence[npt.NDArray[np.float32]]) -> Iterator[pb.ArrayRecord]:
    """Arrays one after another; those that stand together in a record have one trailing shape."""
    for trailing, run in groupby(arrays, key=lambda array: array.shape[1:]):
        together = list(run)
        sizes = [array.nbytes for array in together]
        tensor = pb.BatchedTensor(
            data=b"".join(array.tobytes() for array in together),
            offsets=np.cumsum([0, *sizes], dtype="<i8").tobytes(),
            dtype=pb.DTYPE_FLOAT32,
            trailing_shape=trailing,
        )
        yield pb.ArrayRecord(
            type_tag=_RECORD, fields={"logprobs": tensor}, num_datums=len(together)
        )


# ---- Failures --------------------------------------------------------------------------------------------------------

_OURS = frozenset({"internal", "storage_failed", "lost"})
"""Types of a trainer's errors that no client is at fault for."""


def is_ours(error: wire.OperationError) -> bool:
    """Whether it was not the client's request that was wrong."""
    return error.type in _OURS
