"""Make the tiny model that ships: tokenizer, pre-training, measurement, files.

    python -m river_ops.tiny_moe.train --out DIR --steps N

* A Qwen3-MoE of about three million parameters, small enough to commit and to train on two cores.
* About a third of the worked answers are short, the others ramble past 32 tokens first. The model
  learns that mixture, so within 32 tokens it earns about a third of the reward although it knows
  the arithmetic: RL then has a habit to change and no skill to teach, and that takes few steps.
* Loss on the assistant's tokens only, batches of like length, so nearly no arithmetic is spent on
  padding or on predicting questions.
"""

# Tensors carry their shape in capitals, and what a command prints is what it is for.
# ruff: noqa: N806, T201

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from river_ops.tiny_moe.problems import (
    Problem,
    Split,
    make_prompt,
    problem_stream,
    problems,
    reward,
)

VOCABULARY_SIZE = 512
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SYSTEM_TURN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
SYSTEM_TURN_SHARE = 0.1
SHORT_ANSWER_SHARE = 0.34
RAMBLE_SENTENCES_MIN, RAMBLE_SENTENCES_MAX = 4, 7
RAMBLE = (
    "Let me think about this.",
    "First I read the question again.",
    "There are some {things} here.",
    "This is about {name}.",
    "I want to be careful with the {things}.",
    "Counting one by one takes time.",
    "Maybe I should check this twice.",
    "The question asks for a number.",
)

COMPLETION_TOKENS_LIMITED = 32
COMPLETION_TOKENS_UNLIMITED = 120  # the longest answer of the corpus has fewer
TOKENIZER_TEXTS = 4_000
POOL_BATCHES = 16  # batches are cut from a pool this large, sorted by length
BATCH_TEXTS = 32
COMPLETION_TOKENS = 40  # in a completion of the corpus, on average
LEARNING_RATE = 3e-3
THREADS = 2
IGNORED_LABEL = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How one completion limit and temperature does on held-out problems."""

    share_right: float
    share_finished: float
    tokens_mean: float


def main() -> None:
    """Train, save, and measure what was saved."""
    parser = argparse.ArgumentParser(description="Make the tiny model that ships with River.")
    parser.add_argument("--out", type=Path, required=True, help="folder the model is written to")
    parser.add_argument("--steps", type=int, default=1_500, help="optimiser steps")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    assert arguments.steps > 0

    torch.set_num_threads(THREADS)
    torch.manual_seed(arguments.seed)
    tokenizer = train_tokenizer(arguments.seed)
    model = Qwen3MoeForCausalLM(model_config(tokenizer))
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    pretrain(model, tokenizer, steps=arguments.steps, seed=arguments.seed)
    save(model, tokenizer, arguments.out)
    report(arguments.out, tokenizer)


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ("".join(text) for text in islice(corpus("train", seed), TOKENIZER_TEXTS))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def model_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeConfig:
    """Describe the model; every size is a multiple that kernels and tensor shards like."""
    assert len(tokenizer) == VOCABULARY_SIZE
    assert VOCABULARY_SIZE % 64 == 0
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,  # pyright: ignore[reportCallIssue]  # read all the same
        moe_intermediate_size=128,
        num_experts=8,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=1024,
        output_router_logits=True,  # for the loss that keeps the experts in balance
        router_aux_loss_coef=0.01,
        bos_token_id=None,
        eos_token_id=token_id(tokenizer, TURN_END),
        pad_token_id=token_id(tokenizer, END_OF_TEXT),
    )


def pretrain(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, *, steps: int, seed: int
) -> None:
    """Teach the mixture of short and rambling answers."""
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05
    )
    started = time.monotonic()
    for step, (ids_BT, labels_BT) in enumerate(islice(batches(tokenizer, seed), steps), start=1):
        # Padding is on the right, where causal attention never looks, so no mask is needed.
        # A fixed divisor weighs every text alike; a mean over each batch's tokens would weigh the
        # short answers more and teach a larger share of them than the corpus has.
        loss = model(
            input_ids=ids_BT, labels=labels_BT, num_items_in_batch=BATCH_TEXTS * COMPLETION_TOKENS
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            elapsed_s = time.monotonic() - started
            print(f"step {step} loss {loss.item():.4f} after {elapsed_s:.0f} s", flush=True)


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield token ids and labels, both (batch, time), texts of like length together."""
    texts = corpus("train", seed)
    order = random.Random(f"order/{seed}")  # noqa: S311  # repeatable, not secret
    while True:
        pool = [
            (tokenizer.encode(prompt), tokenizer.encode(completion))
            for prompt, completion in islice(texts, POOL_BATCHES * BATCH_TEXTS)
        ]
        pool.sort(key=lambda text: len(text[0]) + len(text[1]))
        starts = list(range(0, len(pool), BATCH_TEXTS))
        order.shuffle(starts)
        for start in starts:
            yield pad_batch(pool[start : start + BATCH_TEXTS], token_id(tokenizer, END_OF_TEXT))


def pad_batch(
    texts: list[tuple[list[int], list[int]]], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the right and leave the prompt and the padding out of the loss."""
    length = max(len(prompt) + len(completion) for prompt, completion in texts)
    ids_BT = torch.full((len(texts), length), pad_id)
    labels_BT = torch.full((len(texts), length), IGNORED_LABEL)
    for row, (prompt, completion) in enumerate(texts):
        end = len(prompt) + len(completion)
        ids_BT[row, :end] = torch.tensor(prompt + completion)
        labels_BT[row, len(prompt) : end] = torch.tensor(completion)
    return ids_BT, labels_BT


def corpus(split: Split, seed: int) -> Iterator[tuple[str, str]]:
    """Yield prompt and completion of one worked problem after another."""
    source = random.Random(f"corpus/{seed}")  # noqa: S311  # repeatable, not secret
    for problem in problem_stream(split, seed):
        system = SYSTEM_TURN if source.random() < SYSTEM_TURN_SHARE else ""
        yield system + make_prompt(problem.question), worked_answer(problem, source) + TURN_END


def worked_answer(problem: Problem, source: random.Random) -> str:
    """Write the answer at once or, more often, only after some rambling."""
    short = f"{problem.equation}. The answer is \\boxed{{{problem.answer}}}"
    if source.random() < SHORT_ANSWER_SHARE:
        return short
    count = source.randint(RAMBLE_SENTENCES_MIN, RAMBLE_SENTENCES_MAX)
    ramble = " ".join(source.choices(RAMBLE, k=count))
    return f"{ramble.format(name=problem.name, things=problem.things)} {short}"


def save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model in bfloat16 beside its tokenizer, in one file each."""
    model.config.output_router_logits = False
    model.bfloat16().save_pretrained(out)
    # Some readers look for the template in tokenizer_config.json only.
    tokenizer.save_pretrained(out, save_jinja_files=False)
    generation = {
        "eos_token_id": token_id(tokenizer, TURN_END),
        "pad_token_id": token_id(tokenizer, END_OF_TEXT),
        "do_sample": True,
        "temperature": 1.0,
    }
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def report(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Measure the saved files, in the precision they are saved in and in float32."""
    held_out = problems("held_out", 256, seed=1)
    for precision in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=precision).eval()
        for limit, temperature in (
            (COMPLETION_TOKENS_LIMITED, 1.0),
            (COMPLETION_TOKENS_UNLIMITED, 1.0),
            (COMPLETION_TOKENS_UNLIMITED, 0.0),
        ):
            score = measure(model, tokenizer, held_out, limit=limit, temperature=temperature)
            print(f"{precision} limit {limit} temperature {temperature}: {score}", flush=True)


def measure(
    model: Any,  # a plain model, or one that PEFT has wrapped
    tokenizer: PreTrainedTokenizerFast,
    asked: list[Problem],
    *,
    limit: int,
    temperature: float,
) -> Score:
    """Answer every problem once and score the completions."""
    completions = complete(model, tokenizer, asked, limit=limit, temperature=temperature)
    end_id = token_id(tokenizer, TURN_END)
    rewards = [
        reward(str(tokenizer.decode(ids)), problem.answer)
        for ids, problem in zip(completions, asked, strict=True)
    ]
    return Score(
        share_right=sum(rewards) / len(asked),
        share_finished=sum(ids[-1] == end_id for ids in completions) / len(asked),
        tokens_mean=sum(len(ids) for ids in completions) / len(asked),
    )


@torch.inference_mode()
def complete(
    model: Any,  # a plain model, or one that PEFT has wrapped
    tokenizer: PreTrainedTokenizerFast,
    asked: list[Problem],
    *,
    limit: int,
    temperature: float,
) -> list[list[int]]:
    """Sample one completion a problem, each cut behind the token that ends its turn."""
    prompts = tokenizer(
        [make_prompt(problem.question) for problem in asked],
        padding=True,
        padding_side="left",
        return_tensors="pt",
        return_token_type_ids=False,
    )
    choice = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    ids_BT = model.generate(
        **prompts,
        max_new_tokens=limit,
        **(choice if temperature > 0 else {"do_sample": False, "temperature": None}),
    )
    end_id = token_id(tokenizer, TURN_END)
    return [
        ids[: ids.index(end_id) + 1] if end_id in ids else ids
        for ids in ids_BT[:, prompts["input_ids"].shape[1] :].tolist()
    ]


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Look up a token that is known to be there."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


if __name__ == "__main__":
    main()
