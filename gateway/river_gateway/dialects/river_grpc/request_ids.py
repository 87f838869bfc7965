"""What the client polls: an operation of a run, with what kind of answer it will get, or a piece of kept work.

An operation's id says all that is needed to find its result, on every gateway and after any restart, so nothing is kept
for it: `optim_step.run_…-7`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

Kind = Literal[
    "create_model",
    "forward_backward",
    "load_weights",
    "optim_step",
    "save_weights",
    "unload_model",
]
_KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class OperationRequest:
    """An operation, and the kind of answer that its client awaits; of an unloading it is the one waited for."""

    kind: Kind
    operation_id: str

    @property
    def request_id(self) -> str:
        return f"{self.kind}.{self.operation_id}"


def parse(request_id: str) -> OperationRequest | None:
    """The operation of a request id, None when it is the id of something else."""
    kind, dot, operation_id = request_id.partition(".")
    if not dot or kind not in _KINDS:
        return None
    return OperationRequest(cast("Kind", kind), operation_id)
