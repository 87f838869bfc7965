"""Policy versions as the client knows them: each with its lineage, its step and the version before it."""

from __future__ import annotations

from river_gateway.dialects.river_grpc import river_pb2 as pb
from river_gateway.errors import InvalidFieldError
from river_trainer.protocol import policy_version


def version_of(name: str) -> pb.PolicyVersion:
    """`run_…@17`, or the name of a base model, which has one version for ever."""
    run_id, _, step_text = name.rpartition("@")
    if not run_id or not step_text.isdecimal():
        return pb.PolicyVersion(id=name, lineage_id=name)
    step = int(step_text)
    parent = policy_version(run_id, step - 1) if step else ""
    return pb.PolicyVersion(id=name, lineage_id=run_id, step=step, parent_id=parent)


def expected_of(run_id: str, policy_id: str) -> str | None:
    """The version that a run must be at for an operation to be done; None when any will do.

    Raises:
        InvalidFieldError: it is none of that run's.
    """
    if not policy_id:
        return None
    of_run, _, step = policy_id.rpartition("@")
    if of_run != run_id or not step.isdecimal():
        raise InvalidFieldError(
            f"expected_policy_id: {policy_id!r} is no version of {run_id}, such as {run_id}@3",
            param="expected_policy_id",
        )
    return policy_id
