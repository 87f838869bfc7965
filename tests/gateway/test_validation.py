"""What is refused of training data, field by field, and what comes out of data that is right."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from river_client import wire
from river_gateway.errors import InvalidFieldError
from river_gateway.inference.sample_checks import check_sample
from river_gateway.training import validation
from river_gateway.training.validation import Limits

LIMITS = Limits(context_length=8, vocab_size=512)
NAN = float("nan")
GOOD: dict[str, Any] = {
    "input_ids": [1, 2, 3],
    "old_logprobs": [-1.0, -2.0, 0.0],
    "advantages": [1.0, -1.0, 0.0],
}


def packed(
    values: Any, dtype: Any = "float32", shape: tuple[int, ...] | None = None
) -> wire.Tensor:
    array = np.asarray(values, dtype)
    return wire.Tensor(
        dtype=dtype, shape=array.shape if shape is None else shape, data=array.tobytes()
    )


def wrong() -> list[Any]:
    """(what is changed in the second datum, the field that the error names, words of its message)."""
    return [
        ({"input_ids": [1, 9999, 3]}, "input_ids[1]", "9999 is outside the vocabulary of 512"),
        ({"input_ids": [1, 512, 3]}, "input_ids[1]", "512 is outside"),
        ({"input_ids": [-1, 2, 3]}, "input_ids[0]", "-1 is outside"),
        ({"input_ids": [1, 2.5, 3]}, "input_ids[1]", "2.5 is not a whole number"),
        ({"input_ids": packed([1, NAN, 3])}, "input_ids[1]", "NaN is not a whole number"),
        ({"input_ids": [1, 1e300, 3]}, "input_ids[1]", "1e+300 is not a whole number"),
        ({"input_ids": []}, "input_ids", "0 tokens"),
        ({"input_ids": [1]}, "input_ids", "1 tokens, must be at least 2"),
        ({"input_ids": [1] * 9}, "input_ids", "9 tokens, the context length is 8"),
        ({"input_ids": [[1, 2, 3]]}, "input_ids", "shape [1, 3], must be [T]"),
        ({"input_ids": packed([1, 2, 3], "int64", (4,))}, "input_ids", "24 bytes"),
        ({"input_ids": packed([1, 2, 3], "int32", ())}, "input_ids", "shape []"),
        ({"input_ids": packed([1, 2], "int32", (-1, -2))}, "input_ids", "shape [-1, -2]"),
        ({"advantages": [1.0]}, "advantages", "1 values for 3 input_ids"),
        ({"advantages": [0.0, NAN, 0.0]}, "advantages[1]", "NaN is not a number"),
        ({"advantages": packed([0, 0, math.inf])}, "advantages[2]", "inf is too large"),
        ({"advantages": [0.0, 1e39, 0.0]}, "advantages[1]", "1e+39 is too large for float32"),
        ({"advantages": None}, "advantages", "missing, the loss importance_sampling needs it"),
        ({"old_logprobs": None}, "old_logprobs", "missing"),
        ({"old_logprobs": [0.0, 0.0, -math.inf]}, "old_logprobs[2]", "-inf"),
        ({"old_logprobs": [[0.0], [0.0], [0.0]]}, "old_logprobs", "shape [3, 1]"),
        ({"old_logprobs": [[0.0], 1.0, [0.0]]}, "old_logprobs[1]", "one number"),
        ({"weights": [1.0, 1.0]}, "weights", "2 values for 3 input_ids"),
        ({"weights": [1.0, NAN, 1.0]}, "weights[1]", "NaN"),
        ({"target_tokens": [1, 2]}, "target_tokens", "2 values for 3"),
        ({"target_tokens": [1, 600, 2]}, "target_tokens[1]", "600 is outside"),
        (
            {"target_tokens": [[1, 2]] * 3, "weights": [[0.5, 0.5]] * 3},
            "target_tokens",
            "the loss importance_sampling takes one target a token, [T]",
        ),
        ({"target_tokens": [[1, 2], [1, 2], [1]]}, "target_tokens[2]", "a row of 1"),
        ({"target_tokens": [[1, 2], [1, 777], [1, 3]]}, "target_tokens[1][1]", "777 is outside"),
        ({"weights": [[1.0, 0.0]] * 3}, "weights", "must be [3]"),
        ({"echo_weights": [1.0]}, "echo_weights", "1 values for 3 input_ids"),
        ({"echo_weights": [0.0, 0.0, NAN]}, "echo_weights[2]", "NaN is not a number"),
        ({"attention_mask": [1, 1]}, "attention_mask", "2 values for 3"),
        ({"attention_mask": [1, 2, 0]}, "attention_mask[1]", "2, must be 0 or 1"),
        ({"attention_mask": [0, 1, 1]}, "attention_mask[0]", "zeros may only form a tail"),
        ({"attention_mask": [1, 0, 1]}, "attention_mask[1]", "zeros may only form a tail"),
        ({"attention_mask": [1, 0, 0]}, "input_ids", "1 tokens"),
    ]


@pytest.mark.parametrize(("change", "field", "words"), wrong())
def test_wrong_data(change: dict[str, Any], field: str, words: str) -> None:
    """The error names the datum, the field, the index and the limit."""
    data = [wire.Datum(**GOOD), wire.Datum(**GOOD | change)]
    with pytest.raises(InvalidFieldError) as refused:
        validation.sequences(data, "importance_sampling", LIMITS)
    assert refused.value.param == f"data[1].{field}"
    assert refused.value.message.startswith(f"data[1].{field}: ")
    assert words in refused.value.message


SOFT: dict[str, Any] = {
    "input_ids": [1, 2, 3],
    "target_tokens": [[2, 7], [3, 8], [-1, 999]],
    "weights": [[0.75, 0.25], [1.0, 0.0], [0.0, 0.0]],
}


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"target_tokens": [[2, 7], [3, 512], [0, 0]]}, "target_tokens[1][1]", "512 is outside"),
        ({"target_tokens": [[2, 7]] * 2}, "target_tokens", "shape [2, 2], must be [3, 2]"),
        ({"target_tokens": [[1] * 257] * 3}, "target_tokens", "257 targets a token, must be 1 to"),
        ({"target_tokens": packed([], "int32", (3, 0))}, "target_tokens", "0 targets a token"),
        ({"weights": None}, "weights", "missing, soft targets [T, K] need them"),
        ({"weights": [0.5, 0.5, 0.0]}, "weights", "shape [3], must be [3, 2]"),
        ({"weights": [[0.5, 0.5, 0.0]] * 3}, "weights", "shape [3, 3], must be [3, 2]"),
        ({"weights": [[0.5, NAN], [1, 0], [0, 0]]}, "weights[0][1]", "NaN is not a number"),
    ],
)
def test_wrong_soft_targets(change: dict[str, Any], field: str, words: str) -> None:
    """Targets [T, K] want weights of the same shape, and the error names row and column."""
    data = [wire.Datum(**SOFT), wire.Datum(**SOFT | change)]
    with pytest.raises(InvalidFieldError) as refused:
        validation.sequences(data, "cross_entropy", LIMITS)
    assert refused.value.param == f"data[1].{field}"
    assert words in refused.value.message


@pytest.mark.parametrize("pack", [False, True], ids=["lists", "tensors"])
def test_right_soft_targets(pack: bool) -> None:
    """Rows come out one behind the other, with their number beside them; padding is cut, filler is zero."""
    values: dict[str, Any] = SOFT | {"echo_weights": [0.5, 0.0, 0.0]}
    if pack:
        dtypes = {"input_ids": "int64", "target_tokens": "int32"}
        values = {
            name: packed(value, dtypes.get(name, "float32")) for name, value in values.items()
        }
    values["attention_mask"] = [1, 1, 0]
    (sequence,) = validation.sequences([wire.Datum(**values)], "cross_entropy", LIMITS)
    assert sequence.targets_per_token == 2
    assert np.frombuffer(sequence.target_tokens or b"", "<i4").tolist() == [2, 7, 0, 0]
    assert np.frombuffer(sequence.weights or b"", "<f4").tolist() == [0.75, 0.25, 1.0, 0.0]
    assert np.frombuffer(sequence.echo_weights or b"", "<f4").tolist() == [0.5, 0.0]


def test_half_a_pair() -> None:
    """A preference needs a chosen and a rejected sequence."""
    datum = wire.Datum(input_ids=[1, 2], old_logprobs=[-1.0, 0.0])
    assert len(validation.sequences([datum] * 4, "dpo", LIMITS)) == 4
    with pytest.raises(InvalidFieldError, match="data: 3 sequences, the loss dpo takes a mult"):
        validation.sequences([datum] * 3, "dpo", LIMITS)


@pytest.mark.parametrize(
    ("loss_fn", "config", "param"),
    [
        ("nonsense", {}, "loss_fn"),
        ("ppo", {"clip": 0.2}, "loss_config.clip"),
        ("ppo", {"clip_low": 0.8, "clip_high": 0.2}, "loss_config.clip_high"),
        ("dpo", {"beta": NAN}, "loss_config.beta"),
    ],
)
def test_wrong_loss_settings(loss_fn: str, config: dict[str, float], param: str) -> None:
    """The error names the setting."""
    with pytest.raises(InvalidFieldError) as refused:
        validation.loss_config(loss_fn, config)
    assert refused.value.param == param
    assert refused.value.message.startswith(f"{param}: ")


def test_right_loss_settings() -> None:
    """The trainer is told every setting, so that a journal means the same when defaults change."""
    assert validation.loss_config("cross_entropy", {}) == {"logprob_temperature": 1.0}
    assert validation.loss_config("ppo", {"clip_high": 1.5}) == {
        "clip_low": 0.8,
        "clip_high": 1.5,
        "logprob_temperature": 1.0,
    }


def test_empty_data() -> None:
    """There must be something to train on."""
    with pytest.raises(InvalidFieldError, match="at least one"):
        validation.sequences([], "cross_entropy", LIMITS)


@pytest.mark.parametrize("pack", [False, True], ids=["lists", "tensors"])
def test_right_data(pack: bool) -> None:
    """Lists and packed tensors give the same little-endian bytes."""
    values = GOOD | {"weights": [0.5, 1.0, 0.0], "target_tokens": [2, 3, 0]}
    if pack:
        dtypes = {"input_ids": "int64", "target_tokens": "int32"}
        values = {
            name: packed(value, dtypes.get(name, "float32")) for name, value in values.items()
        }
    (sequence,) = validation.sequences([wire.Datum(**values)], "importance_sampling", LIMITS)
    assert np.frombuffer(sequence.input_ids, "<i4").tolist() == [1, 2, 3]
    assert np.frombuffer(sequence.target_tokens or b"", "<i4").tolist() == [2, 3, 0]
    assert np.frombuffer(sequence.weights or b"", "<f4").tolist() == [0.5, 1.0, 0.0]
    assert np.frombuffer(sequence.advantages or b"", "<f4").tolist() == [1.0, -1.0, 0.0]
    assert sequence.targets_per_token == 1


def test_padding_is_cut() -> None:
    """A tail of zeros in the attention mask takes the tail of every field with it, over the context length too."""
    padded = wire.Datum(
        input_ids=[5] * 12,
        attention_mask=[1] * 4 + [0] * 8,
        advantages=[1.0] * 12,
        old_logprobs=[0.0] * 12,
    )
    (sequence,) = validation.sequences([padded], "importance_sampling", LIMITS)
    assert len(sequence.input_ids) == len(sequence.advantages or b"") == 4 * 4


@pytest.mark.parametrize("pack", [False, True], ids=["lists", "tensors"])
def test_the_last_target_may_be_any_filler(pack: bool) -> None:
    """Nothing is predicted from the last position, so its target is not looked at, cut or not."""
    for length, mask in ((3, None), (4, [1, 1, 1, 0])):
        targets: Any = [2, 3, -100, -100][:length]
        datum = wire.Datum(
            input_ids=[1, 2, 3, 0][:length],
            attention_mask=mask,
            target_tokens=packed(targets, "int64") if pack else targets,
        )
        (sequence,) = validation.sequences([datum], "cross_entropy", LIMITS)
        assert np.frombuffer(sequence.target_tokens or b"", "<i4").tolist() == [2, 3, 0]


def test_long_texts() -> None:
    """A prompt of more characters than the context could hold is refused before anybody tokenizes it."""
    good = wire.SampleRequest(model="m", prompts=["x" * 512], max_tokens=1)
    check_sample(good, LIMITS)
    with pytest.raises(InvalidFieldError, match="513 characters, at most 512") as refused:
        check_sample(msgspec.structs.replace(good, prompts=["x", "x" * 513]), LIMITS)
    assert refused.value.param == "prompts[1]"


def test_the_length_of_prompts_is_looked_at_first() -> None:
    """Nothing is made of the ids of a prompt that is too long, whatever they are."""
    ids: Any = ["no number"] * 5000
    asked = wire.SampleRequest(model="m", prompt_token_ids=[[1], ids], max_tokens=1)
    with pytest.raises(InvalidFieldError, match="5000 tokens and 1 to be drawn") as refused:
        check_sample(asked, LIMITS)
    assert refused.value.param == "prompt_token_ids[1]"


@pytest.mark.parametrize(
    "change",
    [
        {"lr": NAN},
        {"lr": math.inf},
        {"lr": -1e-9},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"eps": 0.0},
        {"weight_decay": math.inf},
        {"grad_clip_norm": -0.5},
        {"gradient_scale": 0.0},
        {"gradient_scale": NAN},
        {"gradient_scale": 1e7},
        {"grad_clip_norm": math.inf},
    ],
)
def test_wrong_adam(change: dict[str, float]) -> None:
    """Each setting of the optimizer is finite and in range, or refused by name."""
    params = msgspec.structs.replace(wire.AdamParams(lr=1e-3), **change)
    with pytest.raises(InvalidFieldError) as refused:
        validation.adam(params)
    assert refused.value.param == f"adam.{next(iter(change))}"


def test_bounds_and_masks_of_tokens() -> None:
    """They arrive cut to the sequence, the mask without the ignored last position, and are refused by index."""
    good: dict[str, Any] = {
        "input_ids": [1, 2, 3, 0],
        "attention_mask": [1, 1, 1, 0],
        "old_logprobs": [-1.0] * 4,
        "advantages": [1.0] * 4,
        "clip_high": [1.5, 2.0, 2.5, 0.0],
        "sequence_mask": [1, 1, 1, 0],
    }
    (sequence,) = validation.sequences([wire.Datum(**good)], "gspo", LIMITS)
    assert np.frombuffer(sequence.clip_high or b"", "<f4").tolist() == [1.5, 2.0, 2.5]
    assert np.frombuffer(sequence.sequence_mask or b"", "<f4").tolist() == [1.0, 1.0, 0.0]
    assert sequence.clip_low is None
    for change, param in (
        ({"clip_low": [0.5, -0.1, 0.5, 0.5]}, "data[0].clip_low[1]"),
        ({"clip_low": [0.5, NAN, 0.5, 0.5]}, "data[0].clip_low[1]"),
        ({"sequence_mask": [1, 2, 1, 0]}, "data[0].sequence_mask[1]"),
        ({"sequence_mask": [1, 1, 1]}, "data[0].sequence_mask"),
    ):
        with pytest.raises(InvalidFieldError) as refused:
            validation.sequences([wire.Datum(**{**good, **change})], "gspo", LIMITS)
        assert refused.value.param == param
    with pytest.raises(InvalidFieldError) as refused:
        validation.sequences([wire.Datum(**good)], "dro", LIMITS)
    assert refused.value.param == "data[0].clip_high"


def test_clipping_to_nothing_is_no_clipping() -> None:
    """A norm of 0 is what some clients send for none, and the smallest eps of theirs is taken."""
    params = wire.AdamParams(lr=1e-3, grad_clip_norm=0.0, eps=1e-12, gradient_scale=0.25)
    adam = validation.adam(params)
    assert (adam.grad_clip_norm, adam.eps, adam.gradient_scale) == (None, 1e-12, 0.25)


@pytest.mark.parametrize(
    "version", ["run_a", "run_b@1", "run_a@", "run_a@01", "run_a@-1", "@1", ""]
)
def test_wrong_expected_policy(version: str) -> None:
    """An operation can only expect a version of its own run."""
    with pytest.raises(InvalidFieldError) as refused:
        validation.expected_policy(version, "run_a")
    assert refused.value.param == "expected_policy"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"rank": 0}, "lora.rank"),
        ({"rank": 33}, "lora.rank"),
        ({"alpha": 0.0}, "lora.alpha"),
        ({"alpha": NAN}, "lora.alpha"),
        ({"seed": -1}, "lora.seed"),
        ({"train_attn": False, "train_mlp": False}, "lora"),
    ],
)
def test_wrong_lora(change: dict[str, Any], param: str) -> None:
    """The shape of an adapter is in range, and trains something."""
    with pytest.raises(InvalidFieldError) as refused:
        validation.adapter_shape(wire.LoraConfig(**change), 32, default_seed=1)
    assert refused.value.param == param


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "ä", "x" * 129, "a\n"])
def test_wrong_names(name: str) -> None:
    """A name can stand in a path and a URL, or is refused."""
    with pytest.raises(InvalidFieldError):
        validation.name(name, "name")


@pytest.mark.parametrize("name", ["final", "step-10", "v1.2:best_0", "x" * 128])
def test_right_names(name: str) -> None:
    """Ordinary names pass."""
    assert validation.name(name, "name") == name
