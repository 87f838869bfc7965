"""What the OpenAPI document says of errors and encodings; `tests/conformance` holds it against real answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from support.gateway import Rig

from river_gateway.described import ERRORS
from river_gateway.errors import ClientGoneError, GatewayError


def _errors(kind: type[GatewayError] = GatewayError) -> Iterator[type[GatewayError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _errors(below)


def test_every_error_is_described() -> None:
    """A status that is new in the tree of errors is new in the document; nobody reads the answer of a client gone."""
    assert {int(kind.status) for kind in _errors()} - {ClientGoneError.status} <= ERRORS.keys()


async def test_each_dialect_has_its_own_errors(rig: Rig) -> None:
    """In the shape that its clients parse; on River's routes msgpack is described beside JSON."""
    document: Any = (await rig.tenant.http.get("/schema/openapi.json")).json()
    names = {"/v1/chat/completions": "OpenAIError", "/v1/messages": "AnthropicError"}
    names["/river/v1/runs"] = "RiverError"
    for path, name in names.items():
        answers = document["paths"][path]["post"]["responses"]
        assert ERRORS.keys() <= {int(status) for status in answers}
        schema = answers["401"]["content"]["application/json"]["schema"]
        assert schema == {"$ref": f"#/components/schemas/{name}"}
        assert name in document["components"]["schemas"]
        both = "application/msgpack" in answers["401"]["content"]
        assert both == path.startswith("/river/")
    assert set(document["paths"]["/v1/embeddings"]["post"]["responses"]) == set(map(str, ERRORS))
    streamed = document["paths"]["/v1/responses"]["post"]["responses"]["200"]["content"]
    assert set(streamed) == {"application/json", "text/event-stream"}


async def test_what_else_format_gives_is_described(rig: Rig) -> None:
    """Where an address may ask for CSV or a page to print, the document has that media type, for answers alone."""
    document: Any = (await rig.tenant.http.get("/schema/openapi.json")).json()
    for path, media_type in (
        ("/river/v1/audit", "text/csv"),
        ("/river/v1/usage/series", "text/csv"),
        ("/river/v1/invoices/{number}", "text/html"),
    ):
        answers = document["paths"][path]["get"]["responses"]
        assert media_type in answers["200"]["content"]
        assert media_type not in answers["404"]["content"]
