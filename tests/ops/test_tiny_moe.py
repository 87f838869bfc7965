"""The tiny model that ships: its problems, its reward, and the committed files."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import river_ops
from river_ops.tiny_moe.problems import (
    Split,
    make_prompt,
    problem_stream,
    problems,
    reward,
    split_of,
)
from river_ops.tiny_moe.train import TURN_END, corpus, measure

MODEL_FOLDER = Path(str(river_ops.__file__)).parent / "models" / "tiny-moe"
MODEL_SIZE_BYTES_MAX = 15_000_000


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Load the committed tokenizer."""
    return AutoTokenizer.from_pretrained(MODEL_FOLDER)


def test_the_two_sides_share_no_question() -> None:
    """No held-out question is ever among the training ones, whatever the seeds."""
    train = {problem.question for problem in problems("train", 5_000, seed=1)}
    held_out = {problem.question for problem in problems("held_out", 1_000, seed=2)}
    assert train.isdisjoint(held_out)
    assert {split_of(question) for question in train} == {"train"}
    assert {split_of(question) for question in held_out} == {"held_out"}


def test_pre_training_reads_the_training_side_only() -> None:
    """What the corpus asks is a training question, with and without a system turn."""
    for prompt, _ in itertools.islice(corpus("train", 3), 500):
        question = prompt.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
        assert split_of(question) == "train"


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_problems_are_repeatable(split: Split) -> None:
    """The same arguments give the same list, a longer one begins with it, a seed changes it."""
    assert problems(split, 50, seed=4) == problems(split, 80, seed=4)[:50]
    assert problems(split, 50, seed=4) != problems(split, 50, seed=5)
    assert problems(split, 0) == []


def test_problems_do_not_hang_on_the_process() -> None:
    """Another process with another hash seed draws the same questions, and loads no torch."""
    program = (
        "import sys; from river_ops.tiny_moe.problems import problems; "
        "assert 'torch' not in sys.modules; "
        "print([problem.question for problem in problems('held_out', 20, seed=6)])"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(MODEL_FOLDER.parents[2])},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert printed == {f"{[problem.question for problem in problems('held_out', 20, seed=6)]}\n"}


def test_every_equation_is_right() -> None:
    """The worked equation evaluates to the answer, which is a positive whole number."""
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    for problem in problems("train", 2_000, seed=7):
        left, sign, right, _, answer = problem.equation.split()
        assert operations[sign](int(left), int(right)) == int(answer) == problem.answer > 0
        assert f" {left} " in problem.question
        assert f" {right}" in problem.question


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7 + 5 = 12. The answer is \\boxed{12}<|im_end|>", 1.0),
        ("\\boxed{ 12 }", 1.0),
        ("\\boxed{3} no, \\boxed{12}", 1.0),
        ("\\boxed{12} no, \\boxed{3}", 0.0),
        ("\\boxed{12} no, \\boxed{}", 0.0),
        ("\\boxed{12.0}", 0.0),
        ("\\boxed{-12}", 0.0),
        ("\\boxed{1", 0.0),
        ("The answer is 12", 0.0),
        ("", 0.0),
        ("\\boxed{" + "9" * 10_000 + "}", 0.0),
    ],
    ids=[
        "right", "spaces", "last-right", "last-wrong", "last-empty", "not-whole",
        "negative", "cut-off", "no-box", "empty", "endless-digits",
    ],
)  # fmt: skip
def test_reward_reads_the_last_box(text: str, expected: float) -> None:
    """Only a last box that holds the answer and nothing else earns the reward."""
    assert reward(text, 12) == expected


def test_prompts_survive_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Every prompt comes back from its tokens unchanged and is what the chat template writes."""
    for problem in itertools.islice(problem_stream("held_out", seed=8), 500):
        prompt = make_prompt(problem.question)
        ids = tokenizer.encode(prompt)
        assert tokenizer.decode(ids) == prompt
        assert len(ids) < 64
        messages = [{"role": "user", "content": problem.question}]
        assert prompt == tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )


def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Bytes outside the corpus are still tokens, and each digit is one of its own."""
    text = "Größe 漢字 🙂\n\t 2026 \\boxed{}"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    digits = [token for token in tokenizer.tokenize("had 1234 eggs") if token.strip("Ġ").isdigit()]
    assert digits == ["1", "2", "3", "4"]


def test_the_chat_template_writes_every_role(tokenizer: PreTrainedTokenizerFast) -> None:
    """System, user and assistant turns come in order, and nothing is opened unasked."""
    roles = ("system", "user", "assistant")
    messages = [{"role": role, "content": f"I am {role}"} for role in roles]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "".join(
        f"<|im_start|>{role}\nI am {role}<|im_end|>\n" for role in roles
    )


def test_special_tokens_agree_between_the_files(tokenizer: PreTrainedTokenizerFast) -> None:
    """A turn ends at the same token in the tokenizer, the model and the generation settings."""
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((MODEL_FOLDER / name).read_text())
        assert settings["eos_token_id"] == tokenizer.eos_token_id
        assert settings["pad_token_id"] == tokenizer.pad_token_id
    assert tokenizer.eos_token == TURN_END
    assert tokenizer.pad_token == "<|endoftext|>"


def test_the_committed_model_is_small() -> None:
    """Two to six million bfloat16 parameters, and a folder that a repository can carry."""
    with safe_open(MODEL_FOLDER / "model.safetensors", framework="pt") as tensors:
        shapes = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        assert {shape.get_dtype() for shape in shapes.values()} == {"BF16"}
        count = sum(torch.Size(shape.get_shape()).numel() for shape in shapes.values())
        vocabulary_size = shapes["lm_head.weight"].get_shape()[0]
    assert 2_000_000 <= count <= 6_000_000
    assert vocabulary_size % 64 == 0
    assert sum(path.stat().st_size for path in MODEL_FOLDER.iterdir()) <= MODEL_SIZE_BYTES_MAX


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_model_knows_its_arithmetic(
    tokenizer: PreTrainedTokenizerFast, precision: torch.dtype
) -> None:
    """Greedy answers to unseen questions are right in both precisions, given room to ramble."""
    asked = problems("held_out", 12, seed=9)
    model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=precision).eval()
    score = measure(model, tokenizer, asked, limit=120, temperature=0.0)
    assert score.share_right >= 0.8
    assert score.share_finished == 1.0


def test_some_answers_fit_the_limit(tokenizer: PreTrainedTokenizerFast) -> None:
    """Sampled within 32 tokens some answers are right and many are not: there is room for RL."""
    asked = problems("held_out", 48, seed=10)
    model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        score = measure(model, tokenizer, asked, limit=32, temperature=1.0)
    assert 0.1 <= score.share_right <= 0.7
    assert score.tokens_mean <= 32
