"""Who looks at the dashboard: an API key in a cookie, checked as every other key is.

The cookie is HttpOnly and SameSite=Strict, and only sent to `/admin`. What changes something is a form with a token
that nobody can know who cannot read the page, and is refused when the browser says that another site sent it.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from litestar.datastructures import Cookie

from river_gateway.context import context_of
from river_gateway.errors import PermissionDeniedError, UnauthenticatedError
from river_gateway.services import services_of
from river_gateway.tenancy.audit import READERS, actor
from river_gateway.tenancy.auth import check_scopes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from litestar import Request

    from river_gateway.tenancy.audit import Actor
    from river_gateway.tenancy.auth import Principal

COOKIE = "river_key"
PATH = "/admin"
TOKEN_FIELD = "csrf_token"  # noqa: S105 - a field's name
TOKEN_HEADER = "x-csrf-token"  # noqa: S105 - a header's name
_OWN_SITE = ("same-origin", "none")


@dataclass(frozen=True, slots=True)
class Viewer:
    """A signed-in key. `tenant_id` is whose things it sees; None, for admins only, is everybody's."""

    principal: Principal
    tenant_id: str | None
    csrf_token: str

    @property
    def is_admin(self) -> bool:
        """Whether the key may see and change what belongs to others."""
        return "admin" in self.principal.scopes

    @property
    def reads_audit(self) -> bool:
        """Whether the key may see the audit log, of its tenant or of all."""
        return not self.principal.scopes.isdisjoint(READERS)


def actor_of(request: Request[Any, Any, Any], viewer: Viewer) -> Actor:
    """The viewer, as the audit log names it."""
    return actor(viewer.principal, context_of(request.scope).request_id, "dashboard")


async def viewer_of(request: Request[Any, Any, Any]) -> Viewer:
    """The viewer of a request to a page.

    Raises:
        UnauthenticatedError: nobody is signed in, or the key is no longer valid.
        UnavailableError: keys cannot be checked at the moment.
    """
    secret = request.cookies.get(COOKIE)
    if not secret:
        raise UnauthenticatedError("nobody is signed in")
    principal = await services_of(request).keys.authenticate(f"Bearer {secret}")
    context_of(request.scope).tenant_id = principal.tenant_id
    admin = "admin" in principal.scopes
    asked = request.query_params.get("tenant") or None
    return Viewer(
        principal=principal,
        tenant_id=asked if admin else principal.tenant_id,
        csrf_token=_csrf_token(secret),
    )


async def checked_form(request: Request[Any, Any, Any]) -> tuple[Viewer, dict[str, str]]:
    """The viewer and the fields of a form that changes something.

    Raises:
        UnauthenticatedError: nobody is signed in.
        PermissionDeniedError: the form is none of ours.
    """
    viewer = await viewer_of(request)
    form = {name: str(value) for name, value in (await request.form()).items()}
    check_form(request, viewer, form)
    return viewer, form


async def admin_of(request: Request[Any, Any, Any]) -> Viewer:
    """The viewer of a page for admins; raises as `viewer_of`, and PermissionDeniedError for anybody else."""
    viewer = await viewer_of(request)
    check_scopes(viewer.principal, ("admin",))
    return viewer


async def admin_form(request: Request[Any, Any, Any]) -> tuple[Viewer, dict[str, str]]:
    """The viewer and the fields of a form for admins; raises as `checked_form`, and PermissionDeniedError."""
    viewer, form = await checked_form(request)
    check_scopes(viewer.principal, ("admin",))
    return viewer, form


def check_form(request: Request[Any, Any, Any], viewer: Viewer, form: Mapping[str, str]) -> None:
    """Raises PermissionDeniedError unless a form comes from a page of ours that this viewer was shown."""
    check_origin(request)
    _check_token(viewer, form.get(TOKEN_FIELD, ""))


async def checked_script(request: Request[Any, Any, Any]) -> tuple[Viewer, str]:
    """The viewer, and its key, of a request that a script of ours makes, with the page's token in a header.

    Raises:
        UnauthenticatedError: nobody is signed in.
        PermissionDeniedError: the script is none of ours.
    """
    viewer = await viewer_of(request)
    check_origin(request)
    _check_token(viewer, request.headers.get(TOKEN_HEADER, ""))
    return viewer, request.cookies[COOKIE]


def _check_token(viewer: Viewer, token: str) -> None:
    if not hmac.compare_digest(token.encode(), viewer.csrf_token.encode()):
        raise PermissionDeniedError("the form is out of date: reload the page and try again")


def check_origin(request: Request[Any, Any, Any]) -> None:
    """Raises PermissionDeniedError if the browser says that another site sent the request."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        own = site in _OWN_SITE
    else:
        origin = request.headers.get("origin")
        own = origin is None or urlsplit(origin).netloc == request.headers.get("host")
    if not own:
        raise PermissionDeniedError("the form was sent by another site")


def sign_in_cookie(request: Request[Any, Any, Any], secret: str) -> Cookie:
    """Keeps a key for as long as the browser runs."""
    return Cookie(
        key=COOKIE,
        value=secret,
        path=PATH,
        httponly=True,
        samesite="strict",
        secure=_is_https(request),
    )


def sign_out_cookie() -> Cookie:
    """Makes the browser forget the key."""
    return Cookie(key=COOKIE, value="", path=PATH, max_age=0, httponly=True, samesite="strict")


def _is_https(request: Request[Any, Any, Any]) -> bool:
    """Whether the browser's own connection is, be it to a proxy in front of us."""
    return request.headers.get("x-forwarded-proto", request.url.scheme) == "https"


def _csrf_token(secret: str) -> str:
    return hmac.new(secret.encode(), b"river dashboard form", hashlib.sha256).hexdigest()
