"""What `store: true` makes of a completion: the engine also tells its tokens, the client sees no difference.

The engine is asked for token ids and log-probabilities. Here they are taken out of its answer, unless the client has
asked for them too, and gathered with the whole answer, streamed or not, for `CompletionStore`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, cast

import msgspec

from river_gateway.errors import InvalidFieldError, UnsupportedFieldError
from river_gateway.inference.sse import DONE, payload_of
from river_gateway.limits import METADATA_ENTRIES_MAX, METADATA_KEY_MAX_CHARS, METADATA_MAX_CHARS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from river_billing.events import UsageKind
    from river_gateway.inference.dialects import StreamReader

Json = dict[str, Any]

_END = b"\n\n"
_metadata_decoder: msgspec.json.Decoder[dict[str, str] | None] = msgspec.json.Decoder(
    dict[str, str] | None
)
_TRUE = b"true"
_NULL = b"null"
_FALSE = (b"false", _NULL)
_TOKEN_IDS = {"return_token_ids": msgspec.Raw(b"true")}
# Of a stream's deltas: texts that grow; what else there is comes whole.
_GROWING = ("content", "refusal", "reasoning", "reasoning_content")


class ChoiceTokens(msgspec.Struct, frozen=True):
    """`logprobs[i]` is the log-probability of `tokens[i]` under the distribution it was drawn from."""

    index: int
    tokens: list[int]
    logprobs: list[float]


class Tokens(msgspec.Struct, frozen=True):
    """What a completion was made of, as it is stored: MessagePack."""

    prompt: list[int]
    choices: list[ChoiceTokens]


def wants_keeping(fields: Mapping[str, msgspec.Raw]) -> bool:
    """Whether a request says `store: true`."""
    store = fields.get("store")
    return store is not None and bytes(store) == _TRUE


class Keeper(ABC):
    """Gathers one completion. What chats and texts differ in is for the classes below."""

    kind: str
    object: str

    def __init__(self, fields: Mapping[str, msgspec.Raw]) -> None:
        """Of a request's fields.

        Raises:
            InvalidFieldError: the metadata are not what can be stored, or the request asks for what cannot be.
        """
        self.asked = b"null"
        self.metadata = read_metadata(fields.get("metadata", msgspec.Raw(_NULL)))
        self._show_logprobs = bytes(fields.get("logprobs", _NULL)) not in _FALSE
        self._show_tokens = bytes(fields.get("return_token_ids", _NULL)) == _TRUE
        self._prompt: list[int] | None = None
        self._tokens: dict[int, tuple[list[int], list[float]]] = {}
        self.answer: Json | None = None

    @abstractmethod
    def engine_fields(self, fields: dict[str, msgspec.Raw]) -> dict[str, msgspec.Raw]:
        """The fields of the request to the engine."""

    @abstractmethod
    def _logprobs(self, told: Json) -> Iterable[float]:
        """The log-probabilities in what a choice tells of them."""

    @abstractmethod
    def _new_choice(self) -> Json:
        """A choice of which nothing is there yet."""

    @abstractmethod
    def _grow(self, choice: Json, part: Json) -> None:
        """Adds a part of a stream to its choice."""

    @property
    def tokens(self) -> Tokens | None:
        """The tokens, or None when the engine has not told all of them, so that nothing can be learnt from them."""
        if self._prompt is None or not self._tokens:
            return None
        if any(len(tokens) != len(logprobs) for tokens, logprobs in self._tokens.values()):
            return None
        choices = [ChoiceTokens(index, *both) for index, both in sorted(self._tokens.items())]
        return Tokens(self._prompt, choices)

    def whole(self, body: bytes) -> bytes:
        """Takes a whole answer; returns it as the client is to see it."""
        answer = cast("Json", msgspec.json.decode(body))
        self._take(answer)
        self.answer = answer
        return msgspec.json.encode(answer)

    def event(self, event: bytes) -> bytes:
        """Takes an event of a stream; returns it as the client is to see it."""
        payload = payload_of(event)
        if payload is None or payload == DONE:
            return event
        try:
            chunk = msgspec.json.decode(payload)
        except msgspec.DecodeError:
            return event
        if not isinstance(chunk, dict) or "choices" not in chunk:
            return event
        chunk = cast("Json", chunk)
        self._take(chunk)
        self._gather(chunk)
        return b"data: " + msgspec.json.encode(chunk)

    def _take(self, answer: Json) -> None:
        """Takes tokens and log-probabilities out of an answer or a part of one."""
        self._take_prompt(answer)
        for choice in cast("list[Json]", answer["choices"]):
            self._take_prompt(choice)
            tokens, logprobs = self._tokens.setdefault(choice.get("index", 0), ([], []))
            tokens += choice.get("token_ids") or ()
            logprobs += self._logprobs(choice.get("logprobs") or {})
            if not self._show_tokens and "token_ids" in choice:
                choice["token_ids"] = None
            if not self._show_logprobs:
                choice["logprobs"] = None

    def _take_prompt(self, told: Json) -> None:
        """Of a chat the answer tells the prompt's tokens, of a text each choice does."""
        if told.get("prompt_token_ids") is not None:
            self._prompt = told["prompt_token_ids"]
            if not self._show_tokens:
                told["prompt_token_ids"] = None

    def _gather(self, chunk: Json) -> None:
        """Adds a part of a stream to the whole answer."""
        if self.answer is None:
            whole: Json = {"object": self.object, "choices": [], "usage": None}
            self.answer = {name: chunk[name] for name in ("id", "created", "model")} | whole
        if chunk.get("usage"):
            self.answer["usage"] = chunk["usage"]
        choices = cast("list[Json]", self.answer["choices"])
        for part in cast("list[Json]", chunk["choices"]):
            index = part.get("index", 0)
            choice = next((one for one in choices if one["index"] == index), None)
            if choice is None:
                choice = {"index": index, "finish_reason": None, "logprobs": None}
                choice |= self._new_choice()
                choices.append(choice)
                choices.sort(key=lambda one: one["index"])
            self._grow(choice, part)
            if part.get("finish_reason"):
                choice["finish_reason"] = part["finish_reason"]


class ChatKeeper(Keeper):
    """Of `/v1/chat/completions`."""

    kind = "chat"
    object = "chat.completion"

    def __init__(self, fields: Mapping[str, msgspec.Raw]) -> None:
        super().__init__(fields)
        self.asked = bytes(fields.get("messages", _NULL))

    def engine_fields(self, fields: dict[str, msgspec.Raw]) -> dict[str, msgspec.Raw]:
        return {**fields, **_TOKEN_IDS, "logprobs": msgspec.Raw(_TRUE)}

    def _logprobs(self, told: Json) -> Iterable[float]:
        return [entry["logprob"] for entry in told.get("content") or ()]

    def _new_choice(self) -> Json:
        return {"message": {"role": "assistant", "content": None}}

    def _grow(self, choice: Json, part: Json) -> None:
        message, delta = cast("Json", choice["message"]), cast("Json", part.get("delta") or {})
        for name in _GROWING:
            if delta.get(name):
                message[name] = (message.get(name) or "") + delta[name]
        for call in cast("list[Json]", delta.get("tool_calls") or []):
            _grow_call(message.setdefault("tool_calls", []), call)
        told = part.get("logprobs")
        if told and told.get("content"):
            if choice["logprobs"] is None:
                choice["logprobs"] = {"content": [], "refusal": None}
            choice["logprobs"]["content"] += told["content"]


class TextKeeper(Keeper):
    """Of `/v1/completions`: one prompt, without its echo, since a stored completion is learnt from as one sequence."""

    kind = "text"
    object = "text_completion"

    def __init__(self, fields: Mapping[str, msgspec.Raw]) -> None:
        super().__init__(fields)
        self.asked = bytes(fields.get("prompt", _NULL))
        if bytes(fields.get("echo", _NULL)) not in _FALSE:
            raise UnsupportedFieldError(
                "echo: a completion that repeats its prompt cannot be stored; leave `echo` or `store` out",
                param="echo",
            )
        prompts = msgspec.json.decode(self.asked)
        if isinstance(prompts, list):
            count = len(cast("list[Any]", prompts))
            if count > 1 and not isinstance(prompts[0], int):
                raise UnsupportedFieldError(
                    f"prompt: {count} of them, a stored completion is of 1; ask for each by itself",
                    param="prompt",
                )

    def engine_fields(self, fields: dict[str, msgspec.Raw]) -> dict[str, msgspec.Raw]:
        # 0 is the sampled token's own, which comes with any number of others too.
        logprobs = fields["logprobs"] if self._show_logprobs else msgspec.Raw(b"0")
        return {**fields, **_TOKEN_IDS, "logprobs": logprobs}

    def _logprobs(self, told: Json) -> Iterable[float]:
        return told.get("token_logprobs") or ()

    def _new_choice(self) -> Json:
        return {"text": ""}

    def _grow(self, choice: Json, part: Json) -> None:
        choice["text"] += part.get("text") or ""
        told = cast("dict[str, list[Any]] | None", part.get("logprobs"))
        if told:
            grown = cast("dict[str, list[Any]]", choice["logprobs"] or {})
            choice["logprobs"] = grown
            for name, values in told.items():
                grown.setdefault(name, []).extend(values)


def keeper_of(path: str, fields: Mapping[str, msgspec.Raw]) -> Keeper:
    """What keeps a completion of a route.

    Raises:
        InvalidFieldError: the metadata are not what can be stored, or the request asks for what cannot be.
    """
    return ChatKeeper(fields) if path.endswith("/chat/completions") else TextKeeper(fields)


class KeptStream:
    """A stream's reader that lets a keeper see every event first."""

    def __init__(self, inner: StreamReader, keeper: Keeper) -> None:
        self._inner = inner
        self._keeper = keeper

    @property
    def done(self) -> bool:
        """Whether the stream has said its last word."""
        return self._inner.done

    def show(self, events: bytes) -> bytes:
        """Whole events as the client is to see them; empty when none are for it."""
        kept = [self._keeper.event(event) for event in events.removesuffix(_END).split(_END)]
        return self._inner.show(_END.join(kept) + _END)

    def quantities(self) -> dict[UsageKind, int]:
        """Tokens by kind so far."""
        return self._inner.quantities()


def read_metadata(raw: msgspec.Raw) -> dict[str, str]:
    """A request's metadata, checked as OpenAI does.

    Raises:
        InvalidFieldError: they are no texts by name, or too many or too long.
    """
    try:
        metadata = _metadata_decoder.decode(raw) or {}
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidFieldError(
            "metadata: must be an object whose values are strings", param="metadata"
        ) from None
    if len(metadata) > METADATA_ENTRIES_MAX:
        raise InvalidFieldError(
            f"metadata: {len(metadata)} entries, at most {METADATA_ENTRIES_MAX}", param="metadata"
        )
    for key, value in metadata.items():
        for text, longest in ((key, METADATA_KEY_MAX_CHARS), (value, METADATA_MAX_CHARS)):
            if len(text) > longest or "\0" in text:
                raise InvalidFieldError(
                    f"metadata.{key[:METADATA_KEY_MAX_CHARS]}: {len(text)} characters, at most {longest}, none NUL",
                    param="metadata",
                )
    return metadata


def _grow_call(calls: list[Json], part: Json) -> None:
    index = int(part.get("index", 0))
    while len(calls) <= index:
        calls.append({"id": None, "type": "function", "function": {"name": "", "arguments": ""}})
    call = calls[index]
    function = cast("Json", part.get("function") or {})
    call["id"] = part.get("id") or call["id"]
    call["function"]["name"] += function.get("name") or ""
    call["function"]["arguments"] += function.get("arguments") or ""
