"""How the Tinker protocol names runs, checkpoints and requests, and what River calls them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from river_gateway.dialects.tinker import ids
from river_gateway.dialects.tinker.ids import OperationRequest
from river_gateway.errors import InvalidFieldError, NotFoundError
from river_gateway.ids import idempotent_id

SESSION = "ses_0123456789abcdef0123"


def test_a_run_s_id_is_made_of_its_name() -> None:
    """What `open_run` makes of the name as an identity is found again without looking anything up, by tenant."""
    name = ids.model_id(SESSION, 3)
    assert name == f"{SESSION}:train:3"
    assert ids.run_id_of(name, "ten_a") == idempotent_id("run", "ten_a", name)
    assert ids.run_id_of(name, "ten_a") != ids.run_id_of(name, "ten_b")
    assert ids.run_id_of("run_00ff", "ten_a") == "run_00ff"


@pytest.mark.parametrize("name", ["", "x", f"{SESSION}:train:", f"{SESSION}:train:01", "run_/x"])
def test_what_is_no_run_is_not_found(name: str) -> None:
    """A name that no run can have is as one that none has."""
    with pytest.raises(NotFoundError, match="no training run"):
        ids.run_id_of(name, "ten_a")


def test_paths_go_to_river_and_back() -> None:
    """A checkpoint's path names the run as its client does, and the rest as River."""
    path = ids.parse_path(f"tinker://{SESSION}:train:0/weights/step-5")
    assert path.checkpoint_id == "weights/step-5"
    assert path.river("run_1") == "river://run_1/weights/step-5"
    assert ids.of_river(path.river("run_1"), path.model) == str(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "river://run_1/weights/x",
        "tinker://a/weights",
        "tinker://a/b/c/d",
        "tinker:///weights/x",
    ],
)
def test_what_is_no_path_is_refused(text: str) -> None:
    """A path of other parts is refused by the name of its field."""
    with pytest.raises(InvalidFieldError, match=r"^model_path: .* is no path"):
        ids.parse_path(text, field="model_path")


@given(
    number=st.integers(0, 10**9),
    seq=st.integers(0, 2**53),
    detail=st.none() | st.text(min_size=1),
    kind=st.sampled_from(sorted(ids._KINDS)),
)
def test_request_ids_hold_what_their_answer_needs(
    number: int, seq: int, detail: str | None, kind: ids.OperationKind
) -> None:
    """An operation's request id says which operation it is of, whatever its detail looks like."""
    request = OperationRequest(ids.model_id(SESSION, number), seq, kind, detail)
    assert ids.parse_request(str(request)) == request


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fut_0_1",
        "op/x/1",
        "op/x/1/stop_world",
        f"op/x/{2**53 + 1}/optim_step",
        "op/x/-1/optim_step",
    ],
)
def test_other_request_ids_are_none_of_operations(text: str) -> None:
    """What is no operation's is left to those who keep samples."""
    assert ids.parse_request(text) is None
