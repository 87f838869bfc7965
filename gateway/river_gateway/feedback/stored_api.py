"""OpenAI's stored completions: `/v1/chat/completions` and what is below it, but for making them.

Text completions, which OpenAI does not store, are below `/v1/completions` in the same way.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

import msgspec
from litestar import Request, Response, delete, get, post

from river_gateway.errors import InvalidFieldError, MalformedBodyError
from river_gateway.feedback import store
from river_gateway.feedback.keeping import read_metadata
from river_gateway.inference.operations_schema import (
    CHAT_DELETED,
    STORED_CHATS,
    STORED_TEXTS,
    TEXT_DELETED,
    StoredMessagesOperation,
    StoredOperations,
)
from river_gateway.limits import STORED_PAGE_DEFAULT, STORED_PAGE_MAX
from river_gateway.services import services_of
from river_gateway.tenancy.auth import principal_of, requires

if TYPE_CHECKING:
    from river_gateway.database import Row

AnyRequest = Request[Any, Any, Any]

_JSON = "application/json"
_INFER = [requires("infer")]
_METADATA_PARAMETER = re.compile(r"metadata\[(?P<key>.*)\]")


class _Update(msgspec.Struct, frozen=True):
    metadata: msgspec.Raw


def _handlers(path: str, kind: str, deleted: str, described: StoredOperations) -> list[Any]:
    """The routes of one kind of completion; `deleted` is what its objects are called once they are gone."""

    @get(path, guards=_INFER, operation_class=described.list_all)
    async def list_stored(request: AnyRequest) -> Response[bytes]:
        """The tenant's stored completions, filtered by model and metadata."""
        query = request.query_params
        limit, order = _page(request)
        metadata: dict[str, str] = {}
        for name, value in query.items():
            match = _METADATA_PARAMETER.fullmatch(name)
            if match is not None:
                metadata[match["key"]] = value
        rows = await store.page(
            services_of(request).pool,
            tenant_id=principal_of(request).tenant_id,
            kind=kind,
            model=query.get("model"),
            metadata=metadata,
            after=query.get("after"),
            order=order,
            limit=limit + 1,
        )
        return _list([store.answer_of(row) for row in rows], limit)

    @get(f"{path}/{{completion_id:str}}", guards=_INFER, operation_class=described.get)
    async def get_stored(request: AnyRequest, completion_id: str) -> Response[bytes]:
        """One stored completion."""
        return _json(store.answer_of(await _find(request, completion_id, kind)))

    @post(
        f"{path}/{{completion_id:str}}",
        guards=_INFER,
        status_code=HTTPStatus.OK,
        operation_class=described.get,
    )
    async def update_stored(request: AnyRequest, completion_id: str) -> Response[bytes]:
        """Replaces the metadata of a stored completion."""
        try:
            update = msgspec.json.decode(await request.body(), type=_Update)
        except msgspec.ValidationError as error:
            raise InvalidFieldError(str(error), param="metadata") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise MalformedBodyError(f"the body is not valid JSON: {error}") from None
        row = await store.set_metadata(
            services_of(request).pool,
            completion_id=completion_id,
            tenant_id=principal_of(request).tenant_id,
            kind=kind,
            metadata=read_metadata(update.metadata),
        )
        return _json(store.answer_of(row))

    @delete(
        f"{path}/{{completion_id:str}}",
        guards=_INFER,
        status_code=HTTPStatus.OK,
        operation_class=described.delete,
    )
    async def delete_stored(request: AnyRequest, completion_id: str) -> Response[bytes]:
        """Deletes a stored completion and what was thought of it."""
        await store.delete(
            services_of(request).pool,
            completion_id=completion_id,
            tenant_id=principal_of(request).tenant_id,
            kind=kind,
        )
        return _json({"object": deleted, "id": completion_id, "deleted": True})

    return [list_stored, get_stored, update_stored, delete_stored]


@get(
    "/chat/completions/{completion_id:str}/messages",
    guards=_INFER,
    operation_class=StoredMessagesOperation,
)
async def list_stored_messages(request: AnyRequest, completion_id: str) -> Response[bytes]:
    """The messages that a stored chat completion answers."""
    row = await _find(request, completion_id, "chat")
    limit, order = _page(request)
    messages = [
        _message(f"{completion_id}-{index}", message)
        for index, message in enumerate(msgspec.json.decode(row["asked"]))
    ]
    if order == "desc":
        messages.reverse()
    after = request.query_params.get("after")
    places = [index for index, message in enumerate(messages) if message["id"] == after]
    if after is not None:
        messages = messages[places[0] + 1 :] if places else []
    return _list(messages, limit)


async def _find(request: AnyRequest, completion_id: str, kind: str) -> Row:
    return await store.find(
        services_of(request).pool,
        completion_id=completion_id,
        tenant_id=principal_of(request).tenant_id,
        kind=kind,
    )


def _message(message_id: str, message: dict[str, Any]) -> dict[str, Any]:
    """A message as OpenAI shows a stored one: parts of its content by themselves."""
    content = message.get("content")
    parts = cast("list[Any]", content) if isinstance(content, list) else None
    text = content if isinstance(content, str) else None
    return message | {"id": message_id, "content": text, "content_parts": parts}


def _page(request: AnyRequest) -> tuple[int, str]:
    """How many, and in which order.

    Raises:
        InvalidFieldError: that is not possible.
    """
    limit, order = request.query_params.get("limit"), request.query_params.get("order", "asc")
    if limit is not None and not (limit.isdecimal() and 1 <= int(limit[:9]) <= STORED_PAGE_MAX):
        raise InvalidFieldError(f"limit: {limit}, must be 1 to {STORED_PAGE_MAX}", param="limit")
    if order not in ("asc", "desc"):
        raise InvalidFieldError(f"order: {order!r}, must be `asc` or `desc`", param="order")
    return int(limit) if limit else STORED_PAGE_DEFAULT, order


def _list(found: list[dict[str, Any]], limit: int) -> Response[bytes]:
    data = found[:limit]
    return _json(
        {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": len(found) > limit,
        }
    )


def _json(value: Any) -> Response[bytes]:
    return Response(msgspec.json.encode(value), media_type=_JSON)


STORED_HANDLERS: list[Any] = [
    *_handlers("/chat/completions", "chat", CHAT_DELETED, STORED_CHATS),
    *_handlers("/completions", "text", TEXT_DELETED, STORED_TEXTS),
    list_stored_messages,
]
