"""Another tenant's things do not exist in the Tinker dialect either: tested on every route there is."""

from __future__ import annotations

import re
from typing import Any

from litestar.routes import HTTPRoute
from support.gateway import Rig
from support.stand_ins import BASE
from support.tinker import LORA, PROTOBUF, TinkerUser, forward_backward

from river_gateway.app import create_litestar

_TENSOR = {"data": [2, 3], "dtype": "int64", "shape": [2]}
_DATUM = {
    "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
    "loss_fn_inputs": {"target_tokens": _TENSOR},
}
_GIVEN = {"data": [_DATUM], "loss_fn": "cross_entropy"}
_PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [7]}]}

_CHECKPOINT = "/training_runs/{model:str}/checkpoints/{kind:str}/{name:str}"

# Route -> bodies that name the owner's things; a stranger's attempts at them must all be 404.
ATTEMPTS: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("POST", "/create_model"): [
        {"session_id": "<session>", "model_seq_id": 5, "base_model": BASE, "lora_config": LORA}
    ],
    ("POST", "/get_info"): [{"model_id": "<model>"}],
    ("POST", "/forward_backward"): [
        {"model_id": "<model>", "seq_id": 2, "forward_backward_input": _GIVEN}
    ],
    ("POST", "/forward"): [{"model_id": "<model>", "seq_id": 3, "forward_input": _GIVEN}],
    ("POST", "/optim_step"): [{"model_id": "<model>", "seq_id": 4, "adam_params": {}}],
    ("POST", "/save_weights"): [{"model_id": "<model>", "seq_id": 5, "path": "b"}],
    ("POST", "/save_weights_for_sampler"): [
        {"model_id": "<model>", "seq_id": 6, "path": "b"},
        {"model_id": "<model>", "seq_id": 7, "sampling_session_seq_id": 7},
    ],
    ("POST", "/save_weights_external"): [{"model_id": "<model>", "seq_id": 10, "path": "b"}],
    ("POST", "/weights_info"): [{"tinker_path": "<path>"}],
    ("POST", "/copy_weights"): [
        {"source_path": "<path>", "destination_project_id": "mine"},
        {"source_path": "<path>", "session_id": "<session>", "model_seq_id": 20},
    ],
    ("GET", "/training_runs/{model:str}"): [{}],
    ("GET", "/training_runs/{model:str}/checkpoints"): [{}],
    ("PUT", f"{_CHECKPOINT}/ttl"): [{"ttl_seconds": 3600}],
    ("POST", f"{_CHECKPOINT}/publish"): [{}],
    ("DELETE", f"{_CHECKPOINT}/publish"): [{}],
    ("GET", f"{_CHECKPOINT}/external_weights_urls"): [{}],
    ("GET", "/sessions/{session_id:str}"): [{}],
    ("GET", "/sessions/{session_id:str}/trace_export"): [{}],
    ("PUT", "/sessions/{session_id:str}/project"): [{"project_id": "theirs"}],
    ("POST", "/load_weights"): [
        {"model_id": "<model>", "seq_id": 8, "path": "<path>", "optimizer": False},
        {"session_id": "<session>", "model_seq_id": 8, "path": "<path>", "optimizer": False},
    ],
    ("POST", "/create_sampling_session"): [
        {"session_id": "<session>", "sampling_session_seq_id": 8, "base_model": BASE},
        {"session_id": "<session>", "sampling_session_seq_id": 9, "model_path": "<path>"},
    ],
    ("POST", "/join_sampling_session"): [{"sampling_session_id": "<sampler>"}],
    ("GET", "/samplers/{sampler:str}"): [{}],
    ("POST", "/asample"): [
        {"sampling_session_id": "<sampler>", "seq_id": 8, "prompt": _PROMPT},
        {"model_path": "<path>", "prompt": _PROMPT},
    ],
    ("POST", "/retrieve_future"): [{"request_id": "<operation>"}, {"request_id": "<sample>"}],
    ("POST", "/cancel_future"): [{"request_id": "<sample>"}],
}

# What ends a thing, tried last.
ENDING: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("POST", "/sessions/{session_id:str}/finish"): [{"reason": {"type": "success"}}],
    ("DELETE", _CHECKPOINT): [{}],
}

# A session's end is told by 410, another tenant's and nobody's alike.
GONE = {("POST", "/session_heartbeat"): [{"session_id": "<session>"}]}

# Routes that take nobody's thing.
NOTHING_TO_GUESS = {
    ("GET", "/healthz"),
    ("GET", "/get_server_capabilities"),
    ("POST", "/client/config"),
    ("POST", "/client/dynamic_config"),
    ("POST", "/auth/token"),
    ("POST", "/create_session"),
    ("POST", "/telemetry"),
    ("GET", "/training_runs"),
    ("GET", "/checkpoints"),
    ("GET", "/sessions"),
    ("POST", "/sessions/search"),
    ("GET", "/billing/usage/events"),
    ("GET", "/billing/usage/checkpoints/current"),
    ("GET", "/audit"),
    ("GET", "/auth/apikey/me"),
    ("DELETE", "/auth/apikey/me"),
}


async def _owned(rig: Rig) -> dict[str, str]:
    user = TinkerUser(rig.tenant)
    session = await user.new_session()
    model = await user.new_model(session)
    saved = await user.accepted(
        "/save_weights_for_sampler", {"model_id": model, "path": "a", "seq_id": 1}
    )
    path = (await user.result(saved["request_id"])).json()["path"]
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": BASE}
    sampler = (await user.accepted("/create_sampling_session", body))["sampling_session_id"]
    drawn = {"sampling_session_id": sampler, "seq_id": 0, "prompt": _PROMPT}
    sample = (await user.accepted("/asample", drawn))["request_id"]
    assert (await user.result(sample)).status_code == 200
    return {
        "session_id": session,
        "kind": "sampler_weights",
        "name": "a",
        "session": session,
        "model": model,
        "path": path,
        "sampler": sampler,
        "operation": saved["request_id"],
        "sample": sample,
    }


def _filled(value: Any, things: dict[str, str]) -> Any:
    match value:
        case str():
            return things[value[1:-1]] if value.startswith("<") else value
        case dict():
            return {name: _filled(item, things) for name, item in value.items()}
        case _:
            return value


async def _attempt(
    who: TinkerUser, method: str, route: str, body: dict[str, Any], things: dict[str, str]
) -> Any:
    url = re.sub(r"\{([a-z_]+):str\}", lambda match: things[match[1]], route)
    return await who.request(method, url, _filled(body, things))


async def test_every_route_is_tested_here(rig: Rig) -> None:
    """A new route of the dialect fails this test until its isolation is tested below."""
    prefix = "/api/v1"
    routes = {
        (method, route.path.removeprefix(prefix))
        for route in create_litestar(rig.services).routes
        if isinstance(route, HTTPRoute) and route.path.startswith(prefix)
        for method in route.methods
        if method != "OPTIONS"
    }
    assert routes == {*ATTEMPTS, *ENDING, *GONE, *NOTHING_TO_GUESS}


async def test_a_stranger_finds_nothing(rig: Rig) -> None:
    """Another tenant's session, model, checkpoint, sampler or request is answered as one that nobody has."""
    things = await _owned(rig)
    before = len(rig.trainer.messages), sum(len(engine.samples) for engine in rig.engines)
    stranger = TinkerUser(rig.stranger)
    for status, attempts in ((404, ATTEMPTS | ENDING), (410, GONE)):
        for (method, route), bodies in attempts.items():
            for body in bodies:
                answer = await _attempt(stranger, method, route, body, things)
                assert answer.status_code == status, (route, body, answer.text)
                assert list(answer.json()) == ["detail"]
    options = {"content_type": PROTOBUF}
    taken = await stranger.post(
        "/forward_backward", content=forward_backward(things["model"], 9), **options
    )
    assert taken.status_code == 404
    assert before == (
        len(rig.trainer.messages),
        sum(len(engine.samples) for engine in rig.engines),
    )


async def test_the_owner_is_not_refused(rig: Rig) -> None:
    """The same attempts succeed for the owner, so that what the stranger gets means something."""
    things = await _owned(rig)
    owner = TinkerUser(rig.tenant)
    for (method, route), bodies in (ATTEMPTS | GONE | ENDING).items():
        for body in bodies:
            answer = await _attempt(owner, method, route, body, things)
            is_for_use = "external_weights_urls" in route  # It is no checkpoint to download.
            expected = (422,) if is_for_use else (200, 204)
            assert answer.status_code in expected, (route, body, answer.text)
