"""What `/schema` says of the inference routes, whose bodies no struct decodes: fields by name, and answers."""

from __future__ import annotations

from dataclasses import dataclass

from litestar.openapi.spec import (
    OpenAPIMediaType,
    OpenAPIResponse,
    Operation,
    Reference,
    RequestBody,
    Schema,
)
from litestar.openapi.spec.enums import OpenAPIType

from river_gateway.inference.fields import (
    CHAT_COMPLETIONS,
    COMPLETIONS,
    COUNT_TOKENS,
    MESSAGES,
    RESPONSES,
    Fields,
)

# ---- Bodies ----------------------------------------------------------------------------------------------------------

_STRING = Schema(type=OpenAPIType.STRING)
_BOOLEAN = Schema(type=OpenAPIType.BOOLEAN)
_COUNT = Schema(type=OpenAPIType.INTEGER, minimum=1)
_NUMBER = Schema(type=OpenAPIType.NUMBER)
_MESSAGE = Schema(
    type=OpenAPIType.OBJECT,
    properties={"role": Schema(enum=["user", "assistant"]), "content": _STRING},
    required=["role", "content"],
)
_MESSAGES = Schema(type=OpenAPIType.ARRAY, items=_MESSAGE, min_items=1)
_TYPES = {
    "model": _STRING,
    "user": _STRING,
    "instructions": _STRING,
    "stream": _BOOLEAN,
    "store": _BOOLEAN,
    "messages": _MESSAGES,
    "n": Schema(type=OpenAPIType.INTEGER, minimum=1, maximum=128),
    "seed": Schema(type=OpenAPIType.INTEGER),
    "max_tokens": _COUNT,
    "max_completion_tokens": _COUNT,
    "max_output_tokens": _COUNT,
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "presence_penalty": _NUMBER,
    "frequency_penalty": _NUMBER,
}


def _body(fields: Fields, *required: str) -> RequestBody:
    properties: dict[str, Reference | Schema] = {
        name: _TYPES.get(name, Schema()) for name in sorted(fields.passed)
    }
    schema = Schema(
        type=OpenAPIType.OBJECT,
        properties=properties,
        required=list(required),
        additional_properties=False,
    )
    return RequestBody(content={"application/json": OpenAPIMediaType(schema)}, required=True)


# ---- Answers ---------------------------------------------------------------------------------------------------------

_INTEGER = Schema(type=OpenAPIType.INTEGER)
_ANY = Schema()
_TEXT_OR_NULL = Schema(type=[OpenAPIType.STRING, OpenAPIType.NULL])


def _object(name: str | None = None, /, **properties: Reference | Schema) -> Schema:
    """An object with all of the properties and maybe more; `name` is what it says it is, if it does."""
    if name is not None:
        properties["object"] = Schema(const=name)
    return Schema(type=OpenAPIType.OBJECT, properties=properties, required=sorted(properties))


def _list(items: Schema, **properties: Reference | Schema) -> Schema:
    return _object("list", data=_array(items), **properties)


def _array(items: Schema) -> Schema:
    return Schema(type=OpenAPIType.ARRAY, items=items)


def _answers(
    schema: Schema, *, streams: bool = False
) -> dict[str, OpenAPIResponse | Reference] | None:
    content = {"application/json": OpenAPIMediaType(schema)}
    if streams:
        content["text/event-stream"] = OpenAPIMediaType(_STRING)
    return {"200": OpenAPIResponse(description="Answered.", content=content)}


_USAGE = _object(prompt_tokens=_INTEGER, completion_tokens=_INTEGER, total_tokens=_INTEGER)
_SAID = _object(role=Schema(const="assistant"), content=_TEXT_OR_NULL)
_CHAT_CHOICE = _object(index=_INTEGER, message=_SAID, finish_reason=_TEXT_OR_NULL)
_CHAT = _object(
    "chat.completion",
    id=_STRING,
    created=_INTEGER,
    model=_STRING,
    choices=_array(_CHAT_CHOICE),
    usage=_USAGE,
)
_TEXT_CHOICE = _object(index=_INTEGER, text=_STRING, finish_reason=_TEXT_OR_NULL)
_TEXT = _object(
    "text_completion",
    id=_STRING,
    created=_INTEGER,
    model=_STRING,
    choices=_array(_TEXT_CHOICE),
    usage=_USAGE,
)
_RESPONSE = _object(
    "response",
    id=_STRING,
    model=_STRING,
    status=_STRING,
    output=_array(_object(type=_STRING)),
    usage=_object(input_tokens=_INTEGER, output_tokens=_INTEGER, total_tokens=_INTEGER),
)
_ANTHROPIC_MESSAGE = _object(
    id=_STRING,
    type=Schema(const="message"),
    role=Schema(const="assistant"),
    model=_STRING,
    content=_array(_object(type=_STRING)),
    stop_reason=_TEXT_OR_NULL,
    usage=_object(input_tokens=_INTEGER, output_tokens=_INTEGER),
)
_MODEL = _object("model", id=_STRING, created=_INTEGER, owned_by=_STRING)
_PAGE: dict[str, Schema] = {
    "first_id": _TEXT_OR_NULL,
    "last_id": _TEXT_OR_NULL,
    "has_more": _BOOLEAN,
}

# ---- Operations ------------------------------------------------------------------------------------------------------


@dataclass
class ChatCompletionsOperation(Operation):
    def __post_init__(self) -> None:
        self.request_body = _body(CHAT_COMPLETIONS, "model", "messages")
        self.responses = _answers(_CHAT, streams=True)


@dataclass
class CompletionsOperation(Operation):
    def __post_init__(self) -> None:
        self.request_body = _body(COMPLETIONS, "model", "prompt")
        self.responses = _answers(_TEXT, streams=True)


@dataclass
class ResponsesOperation(Operation):
    def __post_init__(self) -> None:
        self.request_body = _body(RESPONSES, "model", "input")
        self.responses = _answers(_RESPONSE, streams=True)


@dataclass
class MessagesOperation(Operation):
    def __post_init__(self) -> None:
        self.request_body = _body(MESSAGES, "model", "messages", "max_tokens")
        self.responses = _answers(_ANTHROPIC_MESSAGE, streams=True)


@dataclass
class CountTokensOperation(Operation):
    def __post_init__(self) -> None:
        self.request_body = _body(COUNT_TOKENS, "model", "messages")
        self.responses = _answers(_object(input_tokens=_INTEGER))


@dataclass
class EmbeddingsOperation(Operation):
    def __post_init__(self) -> None:
        self.responses = {}  # But for errors.


def _answering(schema: Schema) -> type[Operation]:
    """An operation that has nothing to say of itself but what it answers."""

    @dataclass
    class Answering(Operation):
        def __post_init__(self) -> None:
            self.responses = _answers(schema)

    return Answering


@dataclass(frozen=True)
class StoredOperations:
    """Those of one kind of stored completions."""

    list_all: type[Operation]
    get: type[Operation]
    delete: type[Operation]


def _stored(completion: Schema, deleted: str) -> StoredOperations:
    gone = _object(deleted, id=_STRING, deleted=Schema(const=True))
    return StoredOperations(
        list_all=_answering(_list(completion, **_PAGE)),
        get=_answering(completion),
        delete=_answering(gone),
    )


ModelsOperation = _answering(_list(_MODEL))
ModelOperation = _answering(_MODEL)
CHAT_DELETED, TEXT_DELETED = "chat.completion.deleted", "text_completion.deleted"
STORED_CHATS = _stored(_CHAT, CHAT_DELETED)
STORED_TEXTS = _stored(_TEXT, TEXT_DELETED)
StoredMessagesOperation = _answering(
    _list(_object(id=_STRING, role=_STRING, content=_TEXT_OR_NULL, content_parts=_ANY), **_PAGE)
)
