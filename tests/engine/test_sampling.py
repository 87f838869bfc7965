"""What a sampler does with text before vLLM sees any of it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from river_engine import limits
from river_engine.adapters import AdapterStore
from river_engine.admission import Bounds
from river_engine.errors import InvalidField
from river_engine.protocol import EngineSample
from river_engine.sampling import Sampler
from river_engine.turns import Turnstile

CONTEXT_LENGTH = 1000
BOUNDS = Bounds(
    sequences=1,
    tokens=1000,
    slots=1,
    slice_s=1.0,
    waiting=1,
    waiting_per_tenant=1,
    waiting_bytes=1000,
)
CHARACTERS_MAX = CONTEXT_LENGTH * limits.PROMPT_CHARACTERS_PER_TOKEN_MAX
EVENT_LOOP, OTHER_THREAD = 70, 71


class Tokenizer:
    """Every text is one token outside the vocabulary, which says where it was made."""

    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012  # as transformers has it

    def encode(self, _text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        here = threading.current_thread() is threading.main_thread()
        return [EVENT_LOOP if here else OTHER_THREAD]


class Vllm:
    """Nothing here gets as far as to it."""

    async def add_lora(self, lora_request: Any) -> bool:
        raise NotImplementedError

    async def remove_lora(self, lora_id: int) -> bool:
        raise NotImplementedError


async def refusal(tmp_path: Path, prompts: list[str]) -> InvalidField:
    def generate(*_args: Any, **_fields: Any) -> Any:
        raise NotImplementedError

    store = AdapterStore(Vllm(), tmp_path, {}, max_loras=1, resident_max=1, rank_max=8)
    sampler = Sampler(
        generate,
        store,
        Turnstile(BOUNDS, store),
        Tokenizer(),
        context_length=CONTEXT_LENGTH,
        vocab_size=50,
    )
    with pytest.raises(InvalidField) as caught:
        await sampler.sample(EngineSample(request_id="r", prompts=prompts, max_tokens=1))
    return caught.value


async def test_text_that_cannot_fit_is_not_tokenised(tmp_path: Path) -> None:
    """The refusal names the prompt and counts characters."""
    error = await refusal(tmp_path, ["a", "a" * (CHARACTERS_MAX + 1)])
    assert error.param == "prompts[1]"
    assert f"at most {CHARACTERS_MAX}" in error.message


@pytest.mark.parametrize(
    ("length", "token"),
    [(limits.TOKENIZE_INLINE_CHARACTERS_MAX, EVENT_LOOP), (CHARACTERS_MAX, OTHER_THREAD)],
    ids=["short", "long"],
)
async def test_long_text_is_tokenised_in_a_thread(tmp_path: Path, length: int, token: int) -> None:
    """Only short text is tokenised on the event loop."""
    assert f"token {token} " in (await refusal(tmp_path, ["a" * length])).message
