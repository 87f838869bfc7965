"""Signing in with an API key, and out."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from litestar import Request, Response, get, post

from river_gateway.dashboard.pages import Page, redirect, show
from river_gateway.dashboard.viewer import (
    PATH,
    check_origin,
    checked_form,
    sign_in_cookie,
    sign_out_cookie,
)
from river_gateway.errors import UnauthenticatedError
from river_gateway.services import services_of

SIGN_IN = f"{PATH}/sign-in"
_PAGE = Page("sign_in.html")


@get("/sign-in", include_in_schema=False)
async def sign_in_page(request: Request[Any, Any, Any]) -> Response[str]:
    """Asks for a key."""
    onward = own_path(request.query_params.get("next", ""))
    return show(_PAGE, request, None, {"problem": None, "next": onward})


@post("/sign-in", include_in_schema=False, status_code=HTTPStatus.OK)
async def sign_in(request: Request[Any, Any, Any]) -> Response[Any]:
    """Keeps a valid key in a cookie."""
    check_origin(request)
    form = await request.form()
    secret, onward = str(form.get("key", "")).strip(), own_path(str(form.get("next", "")))
    try:
        await services_of(request).keys.authenticate(f"Bearer {secret}")
    except UnauthenticatedError as error:
        values = {"problem": f"{error.message[:1].upper()}{error.message[1:]}.", "next": onward}
        return show(_PAGE, request, None, values, status=HTTPStatus.UNAUTHORIZED)
    return redirect(onward, cookies=[sign_in_cookie(request, secret)])


@post("/sign-out", include_in_schema=False, status_code=HTTPStatus.OK)
async def sign_out(request: Request[Any, Any, Any]) -> Response[Any]:
    """Makes the browser forget the key."""
    await checked_form(request)
    return redirect(SIGN_IN, cookies=[sign_out_cookie()])


def own_path(path: str) -> str:
    """Where to go after signing in: `path` if it is a page of ours, never another site."""
    own = path == PATH or path.startswith((f"{PATH}/", f"{PATH}?"))
    return path if own and "\\" not in path and "//" not in path else PATH
