"""What the programs of the official `river-client` share: where the stack is, the problems, a datum of a sample."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import river_client as river

BASE_MODEL = os.environ["RIVER_BASE_MODEL"]
TOKENIZER = AutoTokenizer.from_pretrained(os.environ["RIVER_TOKENIZER"])
PROBLEMS = json.loads(Path(os.environ["RIVER_PROBLEMS"]).read_text())
STOP = ["<|im_end|>"]
_BOX = re.compile(r"\\boxed\{([^{}]*)\}")


def connect(api_key: str | None = None) -> river.Client:
    """A client of the stack that is being tested."""
    host, _, port = os.environ["RIVER_ENDPOINT"].partition(":")
    key = os.environ["RIVER_API_KEY"] if api_key is None else api_key
    return river.Client(api_key=key, endpoint=host, port=int(port), use_ssl=False)


def new_model(session: river.Session, **options: Any) -> river.Model:
    """A model of the tiny base."""
    lora = river.LoraConfig(rank=8, seed=1, train_unembed=True)
    return session.create_model(base_model=BASE_MODEL, lora=lora, tokenizer=TOKENIZER, **options)


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def reward(text: str, answer: int) -> float:
    """1 when the last box holds the answer."""
    boxes = _BOX.findall(text)
    return float(bool(boxes) and boxes[-1].strip() == str(answer))


def answered(prompt: str, answer: str) -> dict[str, Any]:
    """A prompt with the answer it is to have, and the loss on that alone."""
    before, after = encode(prompt), encode(answer)
    weights = [0.0] * (len(before) - 1) + [1.0] * len(after) + [0.0]
    return {"input_ids": before + after, "weights": weights}


def datum_of(prompt_ids: list[int], sample: river.Sample, advantage: float) -> dict[str, Any]:
    """A sample as training data, with its routing if it was recorded."""
    before = [0.0] * (len(prompt_ids) - 1)
    return {
        "input_ids": prompt_ids + sample.tokens,
        "old_logprobs": [*before, *sample.logprobs, 0.0],
        "advantages": [*before, *[advantage] * len(sample.tokens), 0.0],
        **sample.routing_datum_keys(),
    }
