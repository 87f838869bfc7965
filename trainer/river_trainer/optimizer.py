"""AdamW (Loshchilov and Hutter, 2019) for many runs at once, each with hyper-parameters of its own; and clipping."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

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

    def clone(self) -> AdamState:
        return AdamState(self.first.clone(), self.second.clone(), self.steps)

    def to_bytes(self) -> bytes:
        """The state as a safetensors file."""
        tensors = {f"first.{name}": tensor for name, tensor in self.first.tensors.items()}
        tensors |= {f"second.{name}": tensor for name, tensor in self.second.tensors.items()}
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
    """One run's step. `weights` and `state` are changed in place; `gradient` is used up unless the step fails."""

    weights: FlatTensors
    gradient: FlatTensors
    state: AdamState
    adam: Adam


@torch.no_grad()
def adam_steps(steps: Sequence[AdamStep]) -> list[float | NonFiniteError]:
    """Does all `steps`, those of equal hyper-parameters in one fused call.

    Returns each one's norm before clipping, or its error; a step that fails has changed nothing.
    """
    norms: list[float | NonFiniteError] = [_norm(step.gradient.flat) for step in steps]
    harmless: dict[tuple[float, ...], list[AdamStep]] = defaultdict(list)
    for index, (step, norm) in enumerate(zip(steps, norms, strict=True)):
        if isinstance(norm, NonFiniteError):
            continue
        if _is_harmless(step.adam, norm):
            _clip(step, norm)
            adam = step.adam
            key = (adam.lr, adam.beta1, adam.beta2, adam.eps, adam.weight_decay)
            harmless[key].append(step)
            continue
        try:
            _step_with_a_way_back(step, norm)
        except NonFiniteError as error:
            norms[index] = error
    for group in harmless.values():
        _fused(group)
    return norms


def _norm(flat: torch.Tensor) -> float | NonFiniteError:
    norm = float(torch.linalg.vector_norm(flat))
    if not math.isfinite(norm):
        norm = float(torch.linalg.vector_norm(flat, dtype=torch.float64))
    if not math.isfinite(norm):
        return NonFiniteError("the norm of the gradients is not finite")
    return norm


def _is_harmless(adam: Adam, norm: float) -> bool:
    return (
        norm <= _HARMLESS_GRADIENT
        and adam.eps >= _HARMLESS_EPS
        and adam.lr <= _HARMLESS_LR
        and adam.lr * adam.weight_decay <= 1.0
        and adam.beta1 <= _HARMLESS_BETA1_MAX
        and adam.beta2 >= _HARMLESS_BETA2_MIN
    )


def _clip(step: AdamStep, norm: float) -> None:
    limit = step.adam.grad_clip_norm
    if limit is not None and norm + CLIP_EPSILON > limit:
        step.gradient.flat.mul_(limit / (norm + CLIP_EPSILON))


def _fused(steps: Sequence[AdamStep]) -> None:
    """One multi-tensor update; all have the same hyper-parameters, but for their step count."""
    adam = steps[0].adam
    counts = [torch.tensor(float(step.state.steps + 1)) for step in steps]
    torch.ops.aten._fused_adamw_(  # what torch.optim.AdamW(fused=True) calls
        [step.weights.flat for step in steps],
        [step.gradient.flat for step in steps],
        [step.state.first.flat for step in steps],
        [step.state.second.flat for step in steps],
        [],
        counts,
        lr=adam.lr,
        beta1=adam.beta1,
        beta2=adam.beta2,
        weight_decay=adam.weight_decay,
        eps=max(adam.eps, EPS_MIN),
        amsgrad=False,
        maximize=False,
    )
    for step in steps:
        step.state.steps += 1


def _step_with_a_way_back(step: AdamStep, norm: float) -> None:
    """A step whose numbers may leave the range of floats: done on copies.

    Raises:
        NonFiniteError: they do; nothing has been changed.
    """
    attempt = AdamStep(step.weights.clone(), step.gradient.clone(), step.state.clone(), step.adam)
    _clip(attempt, norm)
    rate = step.adam.lr / (1.0 - step.adam.beta1 ** (step.state.steps + 1))
    if rate > torch.finfo(torch.float32).max:
        raise NonFiniteError("the learning rate leaves the range of floats")
    _fused([attempt])
    # The square of a finite gradient may be infinite; it would make every later step zero.
    for flat in (attempt.weights.flat, attempt.state.first.flat, attempt.state.second.flat):
        if not bool(flat.isfinite().all()):
            raise NonFiniteError("the optimizer step leaves the range of floats")
    step.weights.flat.copy_(attempt.weights.flat)
    step.state.first.flat.copy_(attempt.state.first.flat)
    step.state.second.flat.copy_(attempt.state.second.flat)
    step.state.steps = attempt.state.steps
