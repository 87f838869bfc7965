"""Losses of your own: the server runs the model, you compute the loss, and no code of yours leaves your process.

`forward_backward_custom` asks for the log-probabilities of the data, gives them to your function, and sends its
gradients back as the weights of a cross-entropy: the derivative of -sum w lp by lp is -w, so with w = -dloss/dlp the
model's gradient is that of your loss. It costs a second forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, SupportsFloat

import msgspec

from river_client import wire
from river_client.arrays import DatumLike, pack, pack_data
from river_client.exceptions import InvalidRequestError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class CustomLoss(Protocol):
    """A loss, its gradients by the log-probabilities, and metrics to come back with the result.

    `logprobs` and the gradients hold an array [T] per sequence, [T, K] with soft targets; at the ignored last index the
    one is zero and the other is ignored. `data` is what the caller passed. It is called in a thread.
    """

    def __call__(
        self, logprobs: list[Any], data: Sequence[Any], /
    ) -> tuple[SupportsFloat, Sequence[Any], Mapping[str, SupportsFloat]]: ...


class TorchLoss(Protocol):
    """A loss, a scalar tensor, of tensors like the arrays of `CustomLoss`, and metrics."""

    def __call__(
        self, logprobs: list[Any], data: Sequence[Any], /
    ) -> tuple[Any, Mapping[str, SupportsFloat]]: ...


_OF_A_LOSS = frozenset(
    {
        "weights",
        "old_logprobs",
        "advantages",
        "echo_weights",
        "clip_low",
        "clip_high",
        "sequence_mask",
    }
)
_OF_THE_SURROGATE = frozenset({"loss", "loss_sum", "loss_mean", "weight_sum"})


def torch_loss(fn: TorchLoss) -> CustomLoss:
    """A custom loss whose gradients torch works out; usable as a decorator. Needs torch where it is called.

    @river.torch_loss
    def contrast(logprobs, data):
        good, bad = logprobs[0].sum(), logprobs[1].sum()
        return -torch.nn.functional.logsigmoid(good - bad), {"margin": float(good - bad)}

    model.forward_backward_custom(data, contrast)
    """

    def with_gradients(
        logprobs: list[npt.NDArray[np.float32]], data: Sequence[Any]
    ) -> tuple[float, list[npt.NDArray[np.float32]], Mapping[str, SupportsFloat]]:
        import torch  # noqa: PLC0415 - only who asks for torch needs it

        leaves = [torch.tensor(array, requires_grad=True) for array in logprobs]
        loss, metrics = fn(leaves, data)
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        return float(loss.detach()), [gradient.numpy() for gradient in gradients], metrics

    return with_gradients


def bare_data(data: Sequence[DatumLike]) -> list[wire.Datum]:
    """The data as the model sees them: without what a loss needs, and without fields that only the caller knows.

    Raises:
        InvalidRequestError: a field is missing or no array of numbers.
    """
    known = frozenset(wire.Datum.__struct_fields__) - _OF_A_LOSS
    fields = [
        msgspec.structs.asdict(datum) if isinstance(datum, wire.Datum) else datum for datum in data
    ]
    bare = pack_data(
        [{name: value for name, value in item.items() if name in known} for item in fields]
    )
    return [_with_weights_if_soft(datum) for datum in bare]


def _with_weights_if_soft(datum: wire.Datum) -> wire.Datum:
    """Soft targets need weights; for the log-probabilities alone it does not matter which."""
    import numpy as np  # noqa: PLC0415 - importing the SDK stays cheap

    shape = _targets_shape(datum)
    if len(shape) == 1:
        return datum
    return msgspec.structs.replace(datum, weights=pack(np.zeros(shape), "weights"))


def _targets_shape(datum: wire.Datum) -> tuple[int, ...]:
    targets = datum.input_ids if datum.target_tokens is None else datum.target_tokens
    assert isinstance(targets, wire.Tensor), "the data have been packed"
    return targets.shape


def weighted_data(
    bare: Sequence[wire.Datum],
    logprobs: Sequence[npt.NDArray[np.float32]],
    gradients: Sequence[Any],
) -> list[wire.Datum]:
    """`bare` for a cross-entropy that has `gradients` by the log-probabilities.

    Raises:
        InvalidRequestError: the gradients are not finite, or not one for each log-probability.
    """
    import numpy as np  # noqa: PLC0415 - importing the SDK stays cheap

    if len(gradients) != len(bare):
        raise InvalidRequestError(
            f"gradients: {len(gradients)} for {len(bare)} sequences", param="gradients"
        )
    weighted: list[wire.Datum] = []
    for index, (datum, known, given) in enumerate(zip(bare, logprobs, gradients, strict=True)):
        where = f"gradients[{index}]"
        gradient = np.asarray(given, dtype=np.float32)
        if gradient.shape != known.shape:
            raise InvalidRequestError(
                f"{where}: shape {list(gradient.shape)}, must be {list(known.shape)}", param=where
            )
        if not np.isfinite(gradient).all():
            place = "".join(f"[{at}]" for at in np.argwhere(~np.isfinite(gradient))[0])
            raise InvalidRequestError(f"{where}{place}: not finite", param=f"{where}{place}")
        weights = np.zeros(_targets_shape(datum), np.float32)
        weights[: len(gradient)] = -gradient  # behind them is what the attention mask cuts
        weighted.append(msgspec.structs.replace(datum, weights=pack(weights, where)))
    return weighted


def custom_metrics(
    of_server: Mapping[str, float], loss: SupportsFloat, own: Mapping[str, SupportsFloat]
) -> dict[str, float]:
    """The server's metrics less those of the cross-entropy that stood in, and the custom loss with its own."""
    kept = {name: value for name, value in of_server.items() if name not in _OF_THE_SURROGATE}
    return kept | {name: float(value) for name, value in own.items()} | {"loss": float(loss)}
