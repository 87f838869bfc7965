"""AdamW (Loshchilov and Hutter, 2019) with hyper-parameters of its own every step, and gradient clipping."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from river_trainer.errors import InvalidTaskError, NonFiniteError
from river_trainer.protocol import Adam

STATE_FILE = "optimizer.safetensors"
_STEPS_NAME = "steps"
CLIP_EPSILON = 1e-6
EPS_MIN = torch.finfo(torch.float32).tiny
"""A smaller eps would be rounded to zero, and a weight that never had a gradient divided by it."""


class AdamState:
    """The moments of every tensor of an adapter, and how often they were updated."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.steps = 0
        self.first = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        self.second = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}

    def to_bytes(self) -> bytes:
        """The state as a safetensors file."""
        tensors = {f"first.{name}": tensor for name, tensor in self.first.items()}
        tensors |= {f"second.{name}": tensor for name, tensor in self.second.items()}
        tensors[_STEPS_NAME] = torch.tensor(self.steps)
        return save(tensors)

    def restore(self, data: bytes) -> None:
        """Takes over a stored state.

        Raises:
            InvalidTaskError: it is broken or belongs to another adapter.
        """
        try:
            stored = load(data)
        except SafetensorError as error:
            raise InvalidTaskError(f"the optimizer state cannot be read: {error}") from error
        for prefix, moments in (("first.", self.first), ("second.", self.second)):
            for name, tensor in moments.items():
                value = stored.get(prefix + name)
                if value is None or value.shape != tensor.shape:
                    raise InvalidTaskError(f"the optimizer state does not fit at {name}")
                tensor.copy_(value)
        if _STEPS_NAME not in stored:
            raise InvalidTaskError("the optimizer state has no step count")
        self.steps = int(stored[_STEPS_NAME])


@torch.no_grad()
def adam_step(
    tensors: Mapping[str, torch.Tensor],
    gradients: Mapping[str, torch.Tensor],
    state: AdamState,
    adam: Adam,
) -> float:
    """Changes `tensors` and `state` in place; returns the norm of all gradients before clipping.

    A tensor without a gradient has a gradient of zero.

    Raises:
        NonFiniteError: the norm, a moment or a new weight is; nothing has been changed.
    """
    names = list(tensors)
    grads = [gradients.get(name, state.first[name].new_zeros(())) for name in names]
    grads = [grad.expand_as(tensors[name]) for name, grad in zip(names, grads, strict=True)]
    norm = float(torch.stack([grad.double().norm() for grad in gradients.values()]).norm())
    if norm == float("inf") or norm != norm:  # noqa: PLR0124  # the test for NaN
        raise NonFiniteError("the norm of the gradients is not finite")
    clip = 1.0
    if adam.grad_clip_norm is not None:
        clip = min(1.0, adam.grad_clip_norm / (norm + CLIP_EPSILON))

    steps = state.steps + 1
    rate = adam.lr / (1.0 - adam.beta1**steps)
    second_correction = 1.0 - adam.beta2**steps
    if rate > torch.finfo(torch.float32).max:
        raise NonFiniteError("the learning rate leaves the range of floats")
    changes: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, grad in zip(names, grads, strict=True):
        scaled = grad * clip
        first = state.first[name].lerp(scaled, 1.0 - adam.beta1)
        second = state.second[name] * adam.beta2
        second.addcmul_(scaled, scaled, value=1.0 - adam.beta2)
        denominator = second.div(second_correction).sqrt_().add_(max(adam.eps, EPS_MIN))
        tensor = tensors[name] * (1.0 - adam.lr * adam.weight_decay)
        tensor.addcdiv_(first, denominator, value=-rate)
        # The square of a finite gradient may be infinite; it would make every later step zero.
        if not (denominator.isfinite().all() and tensor.isfinite().all()):
            raise NonFiniteError("the optimizer step leaves the range of floats")
        changes += (
            (state.first[name], first),
            (state.second[name], second),
            (tensors[name], tensor),
        )
    for target, value in changes:
        target.copy_(value)
    state.steps = steps
    return norm
