"""The unmodified `tinker` SDK against the whole stack: every public method, and what it raises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.tinker_programs import run_tinker
from transformers import PreTrainedTokenizerBase

from river_ops.models import TINY_MOE_NAME
from river_ops.settings import StackInfo


@pytest.fixture(scope="module")
def found(stack: StackInfo, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a program that uses all of the SDK has seen."""
    return run_tinker(stack, "tinker_sdk.py", tmp_path_factory.mktemp("tinker"))


def test_every_public_method_was_called(found: Any) -> None:
    """Nothing that the three clients offer is left out."""
    assert found["missed"] == {"ServiceClient": [], "TrainingClient": [], "SamplingClient": []}
    assert found["info"]["model_name"] == TINY_MOE_NAME
    assert found["model_id"] == f"{found['session']}:train:0"


def test_supervised_steps_lower_the_loss(found: Any) -> None:
    """Each datum gets a log-probability for each token of its input, and their sum is the loss; steps lower it."""
    trained = found["trained"]
    assert trained["losses"][-1] < 0.7 * trained["losses"][0]
    assert trained["losses"][0] == pytest.approx(trained["forward_loss"], rel=1e-4)
    assert trained["logprob_lengths"] == trained["input_lengths"]
    total = sum(sum(row) for row in trained["forward_logprobs"])
    assert trained["forward_loss"] == pytest.approx(-total, rel=1e-4)


def test_samples_are_of_what_was_just_trained(found: Any) -> None:
    """A name, a snapshot and the run itself give the same greedy sample, another than the base model's."""
    sampled = found["sampled"]
    named, snapshot, inflight = sampled["tokens"]
    assert named == snapshot == inflight == sampled["copied"]
    assert sampled["base"] == sampled["clone"] != named
    assert sampled["path"] == f"tinker://{found['model_id']}/sampler_weights/served"
    assert (sampled["base_model"], sampled["vocabulary"]) == (TINY_MOE_NAME, 512)


def test_a_prompt_s_log_probabilities_are_the_model_s_own(found: Any) -> None:
    """Sampler and trainer agree on them, whatever the temperature of the request, and targets are scored alike."""
    sampled = found["sampled"]
    first, *rest = sampled["prompt_logprobs"]
    assert first is None
    assert rest == pytest.approx(sampled["forward_logprobs"], abs=2e-2)
    assert sampled["again"][1:] == pytest.approx(rest, abs=1e-4)
    assert [row[0] for row in sampled["targets"]] == pytest.approx(rest, abs=1e-4)
    assert all(row[1] != row[1] for row in sampled["targets"])
    assert sampled["last"][:-2] == [None] * (len(rest) - 1)
    assert sampled["last"][-2:] == pytest.approx(rest[-2:], abs=1e-4)
    top = sampled["top_of_prompt"]
    assert top[0] is None
    assert all(len(row) == 3 for row in top[1:])
    assert all(row[0][1] >= row[1][1] >= row[2][1] for row in top[1:])


def test_a_sample_s_log_probabilities_are_those_it_was_drawn_with(found: Any) -> None:
    """The token drawn is among its position's likeliest, under the same log-probability; ids are distinct."""
    sampled = found["sampled"]
    assert len(set(sampled["ids"])) == len(sampled["sequences"]) == 2
    for sequence in sampled["sequences"]:
        assert sequence["stop_reason"] in ("stop", "length")
        for token, logprob, top in zip(
            sequence["tokens"], sequence["logprobs"], sequence["top"], strict=True
        ):
            known = dict(map(tuple, top))
            if token in known:
                assert logprob == pytest.approx(known[token], abs=1e-4)
            assert logprob <= 1e-6


def test_what_ends_a_sample(found: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """The model's own end, a token, a text over the borders of tokens, or nothing at all."""
    stops = found["stops"]
    end = tokenizer.eos_token_id
    assert end in stops["none"]["tokens"][-1:] or stops["none"]["reason"] == "length"
    assert len(stops["nothing"]["tokens"]) == 40
    assert stops["nothing"]["reason"] == "length"
    assert stops["token"]["tokens"] == stops["none"]["tokens"][: len(stops["token"]["tokens"])]
    assert stops["token"]["tokens"][-1] == stops["none"]["tokens"][3]
    assert stops["token"]["reason"] == "stop"
    assert stops["text"]["reason"] == "stop"
    assert found["stops"]["stop_text"] in stops["text"]["text"]
    assert len(stops["text"]["tokens"]) < len(stops["none"]["tokens"])


def test_losses_of_ones_own(found: Any) -> None:
    """A loss that the client differentiates gives the gradient that the server's own loss of that form does."""
    custom = found["custom"]
    assert custom["own_loss"] == custom["mine"] == pytest.approx(custom["loss"], rel=1e-4)
    assert custom["norms"][0] == pytest.approx(custom["norms"][1], rel=1e-3)
    assert custom["traced"][0] == pytest.approx(custom["traced"][1], rel=1e-4)
    soft = found["soft"]
    assert soft["sparse"]
    assert soft["loss"] == pytest.approx(soft["plain_loss"], rel=1e-4)
    assert soft["shape"][1] == 8


def test_policy_losses_on_the_policy_s_own_samples(found: Any) -> None:
    """Where every ratio is one, importance sampling, PPO and GSPO are minus the advantages, and no ratio is off."""
    rewarded = found["rewarded"]
    for loss in ("importance_sampling", "ppo", "gspo"):
        assert rewarded[loss]["loss"] == pytest.approx(-rewarded["advantages"], rel=2e-2)
    for loss in ("importance_sampling", "ppo", "cispo", "dro", "gspo"):
        assert rewarded[loss]["mean_ratio"] == pytest.approx(1.0, abs=2e-2)


def test_checkpoints_bring_models_back(found: Any) -> None:
    """Loaded into the same model or a new one, with the optimizer or without, it computes what was saved."""
    saved = found["saved"]
    assert saved["path"] == f"tinker://{saved['model_id']}/weights/half"
    assert saved["external"] == f"tinker://{saved['model_id']}/external_weights/out"
    assert saved["copied"] != saved["path"]
    assert saved["copied"].endswith("/weights/half")
    assert saved["later"] < saved["expected"]
    for name in ("loaded", "from_state", "with_optimizer"):
        assert saved[name] == pytest.approx(saved["expected"], rel=1e-5)
    assert saved["ranks"] == [8, 8]
    deprecated = found["deprecated"]
    assert deprecated["models"] == [TINY_MOE_NAME]
    assert deprecated["rank"] == 4
    assert deprecated["scored"] > 0


SENTENCES = {
    "base model": ("NotFoundError", "there is no base model 'no/model'"),
    "rank": ("UnprocessableEntityError", "lora_config.rank: 4096, must be 1 to"),
    "dimuon": ("UnprocessableEntityError", "optimizer: 'dimuon' is not offered"),
    "from nowhere": ("NotFoundError", "there is no checkpoint"),
    "no path": ("UnprocessableEntityError", "path: 'river://run_0/weights/x' is no path"),
    "sampler of nothing": ("NotFoundError", "there is no model 'no/model' to sample from"),
    "sampler of nowhere": ("NotFoundError", "there is no model 'tinker://"),
    "vocabulary": (
        "RequestFailedError",
        "data[1].loss_fn_inputs.target_tokens[2]: 1000000 is outside",
    ),
    "lengths": (
        "RequestFailedError",
        "data[0].loss_fn_inputs.target_tokens: 2 values for 3 tokens",
    ),
    "not finite": ("RequestFailedError", "data[0].loss_fn_inputs.weights[1]: NaN is not a number"),
    "too long": ("RequestFailedError", "data[0].model_input: 5001 tokens, the context length is"),
    "image": ("RequestFailedError", "data[0].model_input.chunks[1]: image: images are not offered"),
    "missing input": ("RequestFailedError", "data[0].loss_fn_inputs.logprobs: missing, the loss"),
    "stable_reinforce": ("RequestFailedError", "loss_fn: 'stable_reinforce' is not offered here"),
    "unknown loss": ("RequestFailedError", "loss_fn: 'nll' is no loss; there are cross_entropy"),
    "setting": (
        "RequestFailedError",
        "loss_fn_config.beta: unknown, the loss cross_entropy has no",
    ),
    "learning rate": ("RequestFailedError", "adam_params.learning_rate: 99.0, must be 0 to"),
    "dimuon step": ("RequestFailedError", "optimizer: 'dimuon' is not offered"),
    "nothing to step on": (
        "RequestFailedError",
        "no forward_backward since the last optimizer step",
    ),
    "name": ("RequestFailedError", "path: 'a name' must be 1 to 128 letters, digits"),
    "name taken": ("RequestFailedError", "path: there is a checkpoint 'x' already"),
    "load nowhere": ("RequestFailedError", "there is no checkpoint"),
    "token": ("RequestFailedError", "weights_access_token: "),
    "temperature": ("UnprocessableEntityError", "sampling_params.temperature: -1"),
    "prompt vocabulary": (
        "UnprocessableEntityError",
        "prompt[0]: 1000000 is outside the vocabulary",
    ),
    "no prompt": ("UnprocessableEntityError", "prompt: empty"),
    "image prompt": ("UnprocessableEntityError", "prompt.chunks[1]: image: images are not offered"),
    "alternatives": ("UnprocessableEntityError", "prompt_alt_tokens_k: "),
    "targets": ("UnprocessableEntityError", "target_prompt_logprobs: shape [1, 1], must be [2, K]"),
    "stability": ("UnprocessableEntityError", "record_stability_info: not offered"),
}


def test_what_cannot_be_raises_the_sdk_s_own_errors(stack: StackInfo, tmp_path: Path) -> None:
    """Each wrong request raises what the SDK has for it, with our sentence in it; the model goes on afterwards."""
    found = run_tinker(stack, "tinker_wrong.py", tmp_path)
    assert found["raised"].keys() == SENTENCES.keys()
    for name, (kind, sentence) in SENTENCES.items():
        raised, message = found["raised"][name]
        assert (raised, sentence in message) == (kind, True), (name, raised, message)
    assert found["after"] > 0


def test_a_wrong_key_is_an_authentication_error(stack: StackInfo, tmp_path: Path) -> None:
    """The SDK's first request tells."""
    found = run_tinker(stack, "tinker_wrong.py", tmp_path, "key", key="tml-" + "0" * 40)
    kind, message = found["key"]
    assert (kind, "the API key is not valid" in message) == ("AuthenticationError", True)
