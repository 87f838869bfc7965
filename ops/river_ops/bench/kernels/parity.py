"""That a contender computes what it should, before anybody asks how fast."""

from __future__ import annotations

import torch

from river_ops.bench.kernels.contender import Contender
from river_ops.bench.kernels.loop import FrozenLoop, SortedLoop
from river_ops.bench.kernels.workload import Factors, Workload

ERROR_MAX = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Of the norm of a result: rounding, and nothing else. In bfloat16 every product is rounded once on its way."""

POISON_BYTES = 2 << 30


class ParityError(Exception):
    """A contender computes something else."""


def expected_results(workload: Workload, *, frozen: bool) -> list[torch.Tensor]:
    """Output and gradients in float64, by experts and adapters one after another."""
    contender = (FrozenLoop if frozen else SortedLoop)(workload.double())
    return results_of(contender)


def check_parity(contender: Contender, expected: list[torch.Tensor]) -> float:
    """The largest error of an output or a gradient, over the norm of what is expected.

    Raises:
        ParityError: it is more than rounding.
    """
    dtype = contender.workload.x_TH.dtype
    poison_free_memory(contender.workload.x_TH.device)
    found = results_of(contender)
    names = ["out", "dx", "dweights"]
    names += [
        f"d{kind} of adapter {i}" for i in range(len(found)) for kind in ("a1", "b1", "a2", "b2")
    ]
    worst = 0.0
    for name, actual, right in zip(names, found, expected, strict=False):
        error = float((actual.double() - right).norm() / right.norm().clamp_min(1e-30))
        if not error <= ERROR_MAX[dtype]:
            raise ParityError(f"{contender.name}: {name} is off by {error:.1e} of its norm")
        worst = max(worst, error)
    assert len(found) == len(expected)
    return worst


def results_of(contender: Contender) -> list[torch.Tensor]:
    """Output, gradients of the input and of the router's weights, and all of those of the adapters."""
    contender.clear_inputs()
    contender.clear_factors()
    outputs: list[torch.Tensor] = []
    for index, part in enumerate(contender.parts):
        out = contender.forward(index)
        out.backward(part.dout_TH)
        outputs.append(out.detach())
    inputs = [part.x_TH.grad for part in contender.parts]
    weights = [part.weights_TK.grad for part in contender.parts]
    found = [torch.cat(outputs)]
    found += [
        torch.cat([grad for grad in grads if grad is not None]) for grads in (inputs, weights)
    ]
    found += [factor for factors in contender.gradients() for factor in listed(factors)]
    contender.clear_inputs()
    contender.clear_factors()
    return found


def listed(factors: Factors) -> list[torch.Tensor]:
    return [factors.a1.clone(), factors.b1.clone(), factors.a2.clone(), factors.b2.clone()]


def poison_free_memory(device: torch.device) -> None:
    """Fills memory that is given out next with NaN: whoever reads what nobody wrote is found out."""
    if device.type == "cuda":
        torch.full((POISON_BYTES // 4,), float("nan"), device=device)
