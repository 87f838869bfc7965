"""Two models side by side in a chat: one prompt goes to both, and both answers stream."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from litestar import Request, Response, get, post
from litestar.types import ASGIApp

from river_gateway.checkpoints import aliases, catalog
from river_gateway.dashboard import checkpoints, runs
from river_gateway.dashboard.pages import Page, redirect, show
from river_gateway.dashboard.viewer import PATH, checked_script, viewer_of
from river_gateway.inference.completions import Completions
from river_gateway.inference.openai_api import CHAT
from river_gateway.services import services_of

if TYPE_CHECKING:
    from litestar.types import Receive, Scope, Send

    from river_gateway.services import Services

_PAGE = Page("chat.html")
_PATH = f"{PATH}/chat"
_CREDENTIALS = (b"authorization", b"x-api-key")

Offered = dict[str, dict[str, str]]
"""Names of models with what they are called on the page, by what kind they are."""


@get("/chat", include_in_schema=False)
async def chat_page(request: Request[Any, Any, Any]) -> Response[Any]:
    """The page; the address says who answers on the left and who on the right."""
    viewer = await viewer_of(request)
    # A key is answered by its own tenant's models only, an admin's too.
    offered = await _offered(services_of(request), viewer.principal.tenant_id)
    names = [name for models in offered.values() for name in models]
    left, right = (request.query_params.get(side, "") for side in ("left", "right"))
    if names and not (left and right):
        left = left or next((name for name in names if name != right), names[0])
        right = right or next((name for name in names if name != left), names[0])
        return redirect(f"{_PATH}?{urlencode({'left': left, 'right': right})}")
    others = {name: name for name in (left, right) if name and name not in names}
    shown = offered | {"Asked for": others} if others else offered
    return show(
        _PAGE, request, viewer, {"offered": shown, "chosen": {"left": left, "right": right}}
    )


@post("/chat", include_in_schema=False, status_code=HTTPStatus.OK)
async def chat(request: Request[Any, Any, Any]) -> ASGIApp:
    """A chat completion with the viewer's key, as `/v1/chat/completions` answers it: limited, metered and billed."""
    _, secret = await checked_script(request)
    answer = Completions(services_of(request), CHAT)
    authorization = (b"authorization", f"Bearer {secret}".encode())

    async def with_key(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [header for header in scope["headers"] if header[0] not in _CREDENTIALS]
        signed: Any = {**scope, "headers": [*headers, authorization]}
        await answer(signed, receive, send)

    return with_key


async def _offered(services: Services, tenant_id: str) -> Offered:
    """What a tenant can chat with: of checkpoints and runs the newest."""
    named = await aliases.list_all(services.pool, tenant_id)
    saved = await checkpoints.list_checkpoints(services.pool, tenant_id)
    opened = [run for run in await runs.list_runs(services.pool, tenant_id) if run.lost is None]
    bases = {engine.base_model for engine in services.engines.alive()}
    offered: Offered = {
        "Aliases": {alias.name: alias.name for alias in named},
        "Base models": {base: base for base in sorted(bases)},
        "Checkpoints": {
            one.path: f"{one.name} · step {one.step} · {one.run_id} ({one.mode})" for one in saved
        },
        "Live versions of runs": {
            f"{catalog.SCHEME}{run.run_id}": f"{run.run_id} · step {run.step}" for run in opened
        },
    }
    return {kind: models for kind, models in offered.items() if models}


CHAT_HANDLERS: list[Any] = [chat_page, chat]
