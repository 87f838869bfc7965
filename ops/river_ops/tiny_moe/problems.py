"""Arithmetic word problems for the tiny model: what it is pre-trained on, and what RL rewards.

* Standard library only, so that a demo or a test can import it without loading torch.
* The split is a property of the question itself, a stable hash of its text: the same question is
  on the same side whatever the seed or the order, and no held-out question is ever trained on.
* The reward reads the last box of a completion, so a completion cut off before it earns nothing.
"""

import hashlib
import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "held_out"]

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Ida", "Leo", "Mia", "Sam", "Zoe")
THINGS = (
    "apples", "books", "cards", "coins", "cups", "eggs",
    "hats", "keys", "pens", "plums", "stamps", "toys",
)  # fmt: skip

HELD_OUT_BUCKETS = 26  # out of 256, about one question in ten

_BOX = re.compile(r"\\boxed\{([^{}]*)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One question, its answer, and the parts a worked answer is written from."""

    question: str
    answer: int
    equation: str
    name: str
    things: str


def problems(split: Split, count: int, seed: int = 0) -> list[Problem]:
    """Return the first `count` problems of one side; the same arguments give the same list."""
    assert count >= 0
    return list(itertools.islice(problem_stream(split, seed), count))


def problem_stream(split: Split, seed: int = 0) -> Iterator[Problem]:
    """Yield problems of one side for ever; a question may come up more than once."""
    assert split in ("train", "held_out")
    # A text seed goes through SHA-512, so the stream does not hang on the hash of the process.
    source = random.Random(f"{split}/{seed}")  # noqa: S311  # repeatable, not secret
    while True:
        problem = _draw(source)
        if split_of(problem.question) == split:
            yield problem


def split_of(question: str) -> Split:
    """Say which side a question belongs to."""
    bucket = hashlib.sha256(question.encode()).digest()[0]
    return "held_out" if bucket < HELD_OUT_BUCKETS else "train"


def make_prompt(question: str) -> str:
    """Write the question as the chat template does, up to where the assistant begins."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def reward(text: str, answer: int) -> float:
    r"""Return 1.0 if the last \boxed{...} holds the answer and nothing else, 0.0 if not."""
    boxes = _BOX.findall(text)
    # Text is compared and not numbers: a sampled box may hold more digits than int() accepts.
    return float(bool(boxes) and boxes[-1].strip() == str(answer))


def _draw(source: random.Random) -> Problem:
    name, other = source.sample(NAMES, 2)
    things = source.choice(THINGS)
    match source.choice(("gets", "together", "gives", "bags")):
        case "gets":
            left, right, sign = source.randint(2, 20), source.randint(2, 20), "+"
            story = f"{name} has {left} {things} and gets {right} more."
            ask = f"How many {things} does {name} have now?"
        case "together":
            left, right, sign = source.randint(2, 20), source.randint(2, 20), "+"
            story = f"{name} has {left} {things} and {other} has {right}."
            ask = f"How many {things} do they have together?"
        case "gives":
            left, sign = source.randint(3, 20), "-"
            right = source.randint(1, left - 1)
            story = f"{name} has {left} {things} and gives {right} away."
            ask = f"How many {things} are left?"
        case _:
            left, right, sign = source.randint(2, 6), source.randint(2, 9), "*"
            story = f"{name} buys {left} bags with {right} {things} each."
            ask = f"How many {things} is that?"
    answer = {"+": left + right, "-": left - right, "*": left * right}[sign]
    assert answer > 0
    return Problem(
        question=f"{story} {ask}",
        answer=answer,
        equation=f"{left} {sign} {right} = {answer}",
        name=name,
        things=things,
    )
