"""AdamW (Loshchilov and Hutter, 2019) for many runs at once, each with hyper-parameters of its own; and clipping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from river_kernels import AdamRule, AdamUpdate, gradient_norms, multi_adam
from river_trainer.adapter import FlatTensors, Layout
from river_trainer.errors import InvalidTaskError, NonFiniteError
from river_trainer.protocol import Adam

STATE_FILE = "optimizer.safetensors"
_STEPS_NAME = "steps"
CLIP_EPSILON = 1e-6
EPS_MIN = torch.finfo(torch.float32).tiny
"""A smaller eps would be rounded to zero, and a weight that never had a gradient divided by it."""

# A step within all of these cannot leave the range of floats, so that nothing has to be kept to take it back.
_HARMLESS_GRADIENT = 1e15
_HARMLESS_EPS = 1e-12
_HARMLESS_LR = 1e3
_HARMLESS_BETA1_MAX = 0.9999
_HARMLESS_BETA2_MIN = 0.5


class AdamState:
    """The moments of every tensor of an adapter, and how often they were updated."""

    def __init__(self, first: FlatTensors, second: FlatTensors, steps: int = 0) -> None:
        self.first = first
        self.second = second
        self.steps = steps

    @classmethod
    def new(cls, layout: Layout) -> AdamState:
        """The state before the first update."""
        return cls(FlatTensors.zeros(layout), FlatTensors.zeros(layout))

    def on(self, device: torch.device) -> AdamState:
        """The state there, see `FlatTensors.on`."""
        return AdamState(self.first.on(device), self.second.on(device), self.steps)

    def host_copy(self) -> AdamState:
        """The state as it is now, on the host."""
        return AdamState(self.first.host_copy(), self.second.host_copy(), self.steps)

    def to_bytes(self) -> bytes:
        """The state, on the host, as a safetensors file."""
        for moments in (self.first, self.second):
            moments.wait()
        tensors = {f"first.{name}": tensor for name, tensor in self.first.tensors.items()}
        tensors |= {f"second.{name}": tensor for name, tensor in self.second.tensors.items()}
        tensors[_STEPS_NAME] = torch.tensor(self.steps)
        return save(tensors)

    def restore(self, data: bytes) -> None:
        """Takes over a stored state, on the host.

        Raises:
            InvalidTaskError: it is broken or belongs to another adapter.
        """
        try:
            stored = load(data)
        except SafetensorError as error:
            raise InvalidTaskError(f"the optimizer state cannot be read: {error}") from error
        for prefix, moments in (("first.", self.first), ("second.", self.second)):
            for name, tensor in moments.tensors.items():
                value = stored.get(prefix + name)
                if value is None or value.shape != tensor.shape:
                    raise InvalidTaskError(f"the optimizer state does not fit at {name}")
                tensor.copy_(value)
        if _STEPS_NAME not in stored:
            raise InvalidTaskError("the optimizer state has no step count")
        self.steps = int(stored[_STEPS_NAME])


@dataclass(frozen=True, slots=True)
class AdamStep:
    """One run's step. `weights`, their `copy` and `state` change in place; `gradient` is used up unless it fails."""

    weights: FlatTensors
    gradient: FlatTensors
    state: AdamState
    adam: Adam
    copy: FlatTensors | None = None


@torch.no_grad()
def adam_steps(steps: Sequence[AdamStep]) -> list[float | NonFiniteError]:
    """Does all `steps` in one go.

    Returns the norm of each one's scaled gradient before clipping, or its error; a step that fails has changed nothing.
    """
    norms: list[float | NonFiniteError] = [
        _finite(norm * step.adam.gradient_scale)
        for norm, step in zip(
            gradient_norms([step.gradient.flat for step in steps]), steps, strict=True
        )
    ]
    harmless: list[AdamUpdate] = []
    for index, (step, norm) in enumerate(zip(steps, norms, strict=True)):
        if isinstance(norm, NonFiniteError):
            continue
        if _is_harmless(step.adam, norm):
            step.state.steps += 1
            harmless.append(update_of(step, norm))
            continue
        try:
            _step_with_a_way_back(step, norm)
        except NonFiniteError as error:
            norms[index] = error
    multi_adam(harmless)
    return norms


def _finite(norm: float) -> float | NonFiniteError:
    if math.isfinite(norm):
        return norm
    return NonFiniteError("the norm of the gradients is not finite")


def _is_harmless(adam: Adam, norm: float) -> bool:
    return (
        norm <= _HARMLESS_GRADIENT
        and adam.eps >= _HARMLESS_EPS
        and adam.lr <= _HARMLESS_LR
        and adam.lr * adam.weight_decay <= 1.0
        and adam.beta1 <= _HARMLESS_BETA1_MAX
        and adam.beta2 >= _HARMLESS_BETA2_MIN
    )


def update_of(step: AdamStep, norm: float) -> AdamUpdate:
    """The update that `step.state.steps` counts already; `norm` is that of the scaled gradient."""
    adam, limit, multiplier = step.adam, step.adam.grad_clip_norm, step.adam.gradient_scale
    if limit is not None and norm + CLIP_EPSILON > limit:
        multiplier *= limit / (norm + CLIP_EPSILON)
    return AdamUpdate(
        step.weights.flat,
        step.gradient.flat,
        step.state.first.flat,
        step.state.second.flat,
        step.state.steps,
        AdamRule(adam.lr, adam.beta1, adam.beta2, max(adam.eps, EPS_MIN), adam.weight_decay),
        multiplier,
        None if step.copy is None else step.copy.flat,
    )


def _step_with_a_way_back(step: AdamStep, norm: float) -> None:
    """A step whose numbers may leave the range of floats: done on copies.

    Raises:
        NonFiniteError: they do; nothing has been changed.
    """
    state = step.state
    weights, first, second = (
        buffer.clone() for buffer in (step.weights, state.first, state.second)
    )
    attempted = AdamState(first, second, state.steps + 1)
    attempt = AdamStep(weights, step.gradient.clone(), attempted, step.adam)
    rate = step.adam.lr / (1.0 - step.adam.beta1**attempted.steps)
    if rate > torch.finfo(torch.float32).max:
        raise NonFiniteError("the learning rate leaves the range of floats")
    multi_adam([update_of(attempt, norm)])
    # The square of a finite gradient may be infinite; it would make every later step zero.
    for buffer in (weights, first, second):
        if not bool(buffer.flat.isfinite().all()):
            raise NonFiniteError("the optimizer step leaves the range of floats")
    step.weights.flat.copy_(weights.flat)
    if step.copy is not None:
        step.copy.flat.copy_(weights.flat)
    state.first.flat.copy_(first.flat)
    state.second.flat.copy_(second.flat)
    state.steps = attempted.steps
