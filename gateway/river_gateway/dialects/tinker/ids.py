"""How the Tinker protocol names things, and what River calls them.

* A training run, there also called a model, is `<session>:train:<n>`, the n-th of its session, counted by the client,
  which makes such names up itself. The id of River's run is made of that name, so that nothing has to be looked up for
  a tenant's own. Runs that another protocol has opened go by River's id.
* A sampling session is `<session>:sample:<n>`.
* A checkpoint is `tinker://<run>/<kind>/<name>`, with River's own kinds and names.
* What an operation's result is asked for by holds all that its answer needs, so nothing is stored for it either.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast, get_args

from river_gateway.checkpoints import catalog
from river_gateway.errors import InvalidFieldError, NotFoundError
from river_gateway.ids import idempotent_id
from river_gateway.limits import SEQ_MAX

if TYPE_CHECKING:
    from river_gateway.checkpoints.catalog import RunRow

SCHEME = "tinker://"
EPHEMERAL_PREFIX = "ephemeral-"
"""Begins the names of checkpoints that a sampling session has to itself, which no list shows."""

_SESSION = r"[A-Za-z0-9_-]{1,64}"
_NUMBER = r"0|[1-9][0-9]{0,17}"
_MODEL_ID = re.compile(
    rf"(?P<session>{_SESSION}):train:(?P<number>{_NUMBER})|run_[A-Za-z0-9]{{1,64}}"
)
_SAMPLER_ID = re.compile(rf"(?P<session>{_SESSION}):sample:(?P<number>{_NUMBER})")
_REQUEST_ID = re.compile(
    rf"op/(?P<model>[^/]+)/(?P<seq>{_NUMBER})/(?P<kind>[a-z_]+)(?:/(?P<rest>.+))?", re.DOTALL
)

OperationKind = Literal[
    "create_model",
    "forward_backward",
    "optim_step",
    "save_weights",
    "save_weights_for_sampler",
    "save_weights_external",
    "load_weights",
]
_KINDS = frozenset(get_args(OperationKind))


# ---- Runs ------------------------------------------------------------------------------------------------------------


def model_id(session_id: str, number: int) -> str:
    """The name of the `number`-th run of a session."""
    return f"{session_id}:train:{number}"


def run_id_of(model: str, tenant_id: str) -> str:
    """River's id of a tenant's own run.

    Raises:
        NotFoundError: this is no name of a run.
    """
    match = _MODEL_ID.fullmatch(model)
    if match is None:
        raise NotFoundError(f"there is no training run {model!r}", param="model_id")
    return model if match["session"] is None else idempotent_id("run", tenant_id, model)


def model_parts(model: str) -> tuple[str, int] | None:
    """The session of a run's name and its number in it; None when it goes by River's id."""
    match = _MODEL_ID.fullmatch(model)
    return (
        None
        if match is None or match["session"] is None
        else (match["session"], int(match["number"]))
    )


def name_of(run: RunRow) -> str:
    """What clients call a run."""
    return run_name(run.run_id, run.session_id, run.model_seq_id)


def run_name(run_id: str, session_id: str, model_seq_id: int | None) -> str:
    """The same: River's own name of it, unless it has a number in its session."""
    return run_id if model_seq_id is None else model_id(session_id, model_seq_id)


# ---- Sampling sessions -----------------------------------------------------------------------------------------------


def sampler_id(session_id: str, number: int) -> str:
    """The name of the `number`-th sampling session of a session."""
    return f"{session_id}:sample:{number}"


def check_sampler_id(sampler: str) -> str:
    """Raises NotFoundError unless this is the name of a sampling session."""
    if _SAMPLER_ID.fullmatch(sampler) is None:
        raise NotFoundError(
            f"there is no sampling session {sampler!r}", param="sampling_session_id"
        )
    return sampler


def ephemeral_name(number: int) -> str:
    """The name of the checkpoint that the `number`-th sampling session of a session has to itself."""
    return f"{EPHEMERAL_PREFIX}{number}"


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TinkerPath:
    """`tinker://<model>/<kind>/<name>`, taken apart."""

    model: str
    kind: str
    name: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.model}/{self.kind}/{self.name}"

    @property
    def checkpoint_id(self) -> str:
        """What a checkpoint is called within its run."""
        return f"{self.kind}/{self.name}"

    def river(self, run_id: str) -> str:
        """The same as River calls it, `run_id` being what it calls the run."""
        return f"{catalog.SCHEME}{run_id}/{self.kind}/{self.name}"


def parse_path(text: str, *, field: str = "path") -> TinkerPath:
    """The parts of a checkpoint's path.

    Raises:
        InvalidFieldError: it is none.
    """
    parts = text.removeprefix(SCHEME).split("/")
    if not text.startswith(SCHEME) or len(parts) != 3 or not all(parts):  # noqa: PLR2004 - as the message says
        raise InvalidFieldError(
            f"{field}: {text[:200]!r} is no path of a checkpoint; that is {SCHEME}<run>/<kind>/<name>",
            param=field,
        )
    return TinkerPath(*parts)


def of_river(path: str, model: str) -> str:
    """What clients call the checkpoint of one of River's paths, `model` being the name of its run."""
    _, _, inner = path.removeprefix(catalog.SCHEME).partition("/")
    return f"{SCHEME}{model}/{inner}"


# ---- Requests --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OperationRequest:
    """An operation that was accepted: `detail` is what its answer has to repeat."""

    model: str
    seq: int
    kind: OperationKind
    detail: str | None = None

    def __str__(self) -> str:
        request = f"op/{self.model}/{self.seq}/{self.kind}"
        return request if self.detail is None else f"{request}/{self.detail}"


def parse_request(request_id: str) -> OperationRequest | None:
    """The operation that a request id is of; None when it is not of one."""
    match = _REQUEST_ID.fullmatch(request_id)
    if match is None or match["kind"] not in _KINDS or int(match["seq"]) > SEQ_MAX:
        return None
    kind = cast("OperationKind", match["kind"])
    return OperationRequest(match["model"], int(match["seq"]), kind, match["rest"])
