"""What the engine and the trainer have counted, read from their own `/metrics`: the other side of the bill."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import httpx
from prometheus_client.parser import text_string_to_metric_families

ENGINE_COUNTER = "river_engine_tokens_total"
TRAINER_COUNTER = "river_trainer_tokens_total"
TRAINING_KIND = "training"


def counted_tokens(engine_urls: Iterable[str], trainer_urls: Iterable[str]) -> Counter[str]:
    """Tokens by kind (`prompt`, `cached_prompt`, `completion`, `training`) over all engines and trainers.

    Raises:
        httpx.HTTPError: one of them does not answer.
    """
    tokens: Counter[str] = Counter()
    for url in engine_urls:
        for labels, value in samples(url, ENGINE_COUNTER):
            tokens[labels["kind"]] += int(value)
    for url in trainer_urls:
        for _, value in samples(url, TRAINER_COUNTER):
            tokens[TRAINING_KIND] += int(value)
    return tokens


def samples(url: str, name: str) -> Iterable[tuple[dict[str, str], float]]:
    text = httpx.get(url, timeout=10.0).raise_for_status().text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name:
                yield sample.labels, sample.value
