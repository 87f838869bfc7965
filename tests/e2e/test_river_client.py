"""The official `river-client`, unmodified, in a process of its own, on the whole running stack."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.client_environment import run_client

from river_ops.demo.run import new_tenant_key
from river_ops.models import TINY_MOE, TINY_MOE_NAME
from river_ops.settings import StackInfo
from river_ops.tiny_moe.problems import make_prompt, problems

PROGRAMS = Path(__file__).parents[1] / "clients" / "programs"
Run = Callable[..., Any]


@pytest.fixture
def run(stack: StackInfo, tmp_path: Path) -> Run:
    """Runs a program with a key of a fresh tenant; returns what it prints as JSON."""
    rows = [
        {"prompt": make_prompt(problem.question), "answer": problem.answer}
        for problem in problems("train", 400, seed=1)
    ]
    (tmp_path / "problems.json").write_text(json.dumps(rows))
    key = new_tenant_key(stack)

    def run_program(name: str, *arguments: str, **environment: str) -> Any:
        ended = run_client(
            PROGRAMS / name,
            *arguments,
            environment={
                "RIVER_API_KEY": key,
                "RIVER_ENDPOINT": f"127.0.0.1:{stack.grpc_port}",
                "RIVER_BASE_MODEL": TINY_MOE_NAME,
                "RIVER_TOKENIZER": str(TINY_MOE),
                "RIVER_PROBLEMS": str(tmp_path / "problems.json"),
                **environment,
            },
            folder=tmp_path,
        )
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout.splitlines()[-1])

    return run_program


# ---- Training --------------------------------------------------------------------------------------------------------


def test_supervised_learning(run: Run) -> None:
    """`train_step` learns; micro-batches add up to the whole; a step's version follows the one before it."""
    seen = run("river_loops.py", "supervised")
    assert seen["losses"][-1] < 0.7 * seen["losses"][0]
    assert seen["grad_norm"] > 0
    assert seen["loss"] == pytest.approx(seen["loss_sum"] / 4)
    assert seen["logprobs"] == seen["lengths"]
    before, whole, parts = seen["sums"]
    assert before == pytest.approx(whole, rel=1e-4)
    assert parts == pytest.approx(whole, rel=1e-4)
    assert seen["soft_shape"] == [seen["lengths"][0], 2]
    assert seen["steps"] == [7, 7, 7]
    assert seen["parent"] == f"{seen['run']}@6"
    assert seen["capacity"] == [["inference", "ready"], ["training", "ready"]]


def test_the_grpo_loop_learns(run: Run) -> None:
    """The guide's loop raises the reward; every sample names the newest version and carries exact tokens."""
    seen = run("river_loops.py", "grpo", "14")
    rewards = seen["rewards"]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15
    assert seen["ratio"] == pytest.approx(1.0, abs=0.05)
    assert seen["versions"] == [f"{seen['run']}@13"]
    assert seen["exact"]


def test_pipelined_steps(run: Run) -> None:
    """Steps go in before those before them are done; one that is refused holds nothing up; samples keep their turn."""
    seen = run("river_loops.py", "pipelined")
    assert seen["losses"] == sorted(seen["losses"], reverse=True)
    assert seen["steps"] == [1, 2, 3, 4, 5]
    assert seen["sampled_at"] == 4
    assert "[INVALID_ARGUMENT]" in seen["refusal"]
    assert "data[0].input_ids[1]: 1000000 is outside the vocabulary" in seen["refusal"]


def test_a_checkpoint_is_gone_on_from(run: Run) -> None:
    """A new model of a new session goes on with the same losses and steps; temporary and immutable saves have paths."""
    seen = run("river_loops.py", "resume")
    path, step, version_step = seen["saved"]
    assert path.endswith("/weights/step_3")
    assert step == version_step == seen["resumed_at"] == 3
    assert seen["resumed"] == pytest.approx(seen["went_on"], rel=1e-4)
    assert "/sampler_weights/short" in seen["temporary"]
    assert len(set(seen["distinct"])) == 2
    assert seen["sampled_of"].endswith("@3")


def test_bodies_in_parts(run: Run) -> None:
    """A client that divides its bodies gets the same loss as one that does not."""
    inline = run("river_loops.py", "uploaded")
    divided = run(
        "river_loops.py",
        "uploaded",
        RIVER_UPLOAD_THRESHOLD_BYTES="1000",
        RIVER_UPLOAD_CHUNK_BYTES="70000",
        RIVER_REQUIRE_CHUNKED_UPLOAD="1",
    )
    assert divided["loss_sum"] == pytest.approx(inline["loss_sum"], rel=1e-5)


def test_its_own_reinforcement_learning(run: Run, tmp_path: Path) -> None:
    """`rl.AsyncTrainer` trains on a small environment, is stopped, and goes on in a new session from what it kept."""
    folder = tmp_path / "kept"
    seen = run("river_rl.py", "3", str(folder))
    assert seen["steps"] == [1, 2, 3]
    assert seen["metrics"]["optimizer/grad_norm"] > 0
    assert "loss/loss" in seen["metrics"]
    more = run("river_rl.py", "5", str(folder))
    assert more["steps"] == [4, 5]


def test_its_own_reinforcement_learning_with_replayed_experts(run: Run) -> None:
    """The same with the sampler's experts in every step."""
    seen = run("river_rl.py", "2", "-", "routing")
    assert seen["steps"] == [1, 2]


# ---- Samples ---------------------------------------------------------------------------------------------------------


def test_samples_carry_all_that_was_asked_for(run: Run) -> None:
    """Top-K and prompt scores are those of the trainer; seeds repeat; each source answers with its version."""
    seen = run("river_samples.py", "samples")
    assert seen["counts"] == [2, 2, 2]
    assert seen["same"]
    assert seen["prompt_ids"]
    drawn, prompt_tokens = seen["tokens"]
    assert seen["shapes"] == [[drawn, 5], [prompt_tokens, 5]]
    assert seen["first_row"] == [-1, prompt_tokens]
    assert seen["sorted"]
    assert max(seen["off"]) < 1e-3
    assert seen["versions"] == [True, True, None, 1]
    assert seen["greedy"]
    assert seen["health"] == [True, True]


def test_independent_samples(run: Run) -> None:
    """A batch is collected sample by sample; snapshots and pins choose the policy."""
    seen = run("river_samples.py", "batches")
    assert seen["places"] == [[prompt, sample] for prompt in range(3) for sample in range(4)]
    assert seen["errors"] == []
    assert seen["steps"] == [[0], [1], [0]]


def test_experts_go_round(run: Run) -> None:
    """The routing of a sample comes back in its datum: nothing flips in float32, and replay changes nothing there."""
    seen = run("river_samples.py", "routing")
    assert seen["shape"] == [seen["tokens"] - 1, 4, 2]
    assert seen["flips"] < 1e-3
    assert seen["ratio"] == pytest.approx([1.0, 1.0], abs=1e-3)


def test_chats(run: Run) -> None:
    """A chat of each source is the OpenAI API's answer, and one that is wrong its error."""
    seen = run("river_samples.py", "chats")
    assert seen["statuses"] == [200, 200, 200, 400]
    assert seen["tokens"] == [4, 4, 4]
    assert seen["error"] == "invalid_request_error"


# ---- Mistakes --------------------------------------------------------------------------------------------------------

CONNECTION, FAILED = "RiverConnectionError", "RiverError"
MISTAKES = {
    "key": (CONNECTION, "[UNAUTHENTICATED] - the API key is not valid"),
    "base": (CONNECTION, "[NOT_FOUND] - there is no base model 'nobody/none'"),
    "rank": (CONNECTION, "[INVALID_ARGUMENT] - lora.rank: 4096, must be 1 to"),
    "full weight": (CONNECTION, "[UNIMPLEMENTED] - full_weight: only LoRA adapters"),
    "vocabulary": (CONNECTION, "data[0].input_ids[1]: 99999 is outside the vocabulary"),
    "nan": (CONNECTION, "data[0].weights[1]: NaN is not a number"),
    "length": (CONNECTION, "data[0].input_ids: 100000 tokens, the context length is"),
    "shape": (CONNECTION, "data[0].weights: 1 values for 3 input_ids"),
    "field": (CONNECTION, "data[0].labels: unknown, a datum has input_ids"),
    "missing": (CONNECTION, "data[0].old_logprobs: missing, the loss cispo needs it"),
    "loss": (CONNECTION, "loss_fn: 'hinge' is not offered, there are cross_entropy"),
    "setting": (CONNECTION, "loss_config.eps_max: unknown, the loss cross_entropy"),
    "temperature": (CONNECTION, "loss_config.logprob_temperature: 0, must be 0.01 to 100"),
    "replay": (CONNECTION, "data[0].expert_routing: missing, force_routing_replay needs it"),
    "image": (CONNECTION, "[UNIMPLEMENTED] - data[0].model_input[0]: images are not supported"),
    "policy": (FAILED, "conflict: "),
    "empty": (CONNECTION, "data: empty, must hold at least one sequence"),
    "nothing to apply": (FAILED, "no_gradients: no forward_backward since"),
    "rate": (CONNECTION, "adam.lr: -1.0, must be 0 to"),
    "name": (CONNECTION, "name: 'a b' must be 1 to 128 letters"),
    "publish": (CONNECTION, "[UNIMPLEMENTED] - mode: 'publish' is for training all weights"),
    "path": (CONNECTION, "[NOT_FOUND] - there is no checkpoint 'river://"),
    "max_tokens": (FAILED, "invalid_request: prompts[0]"),
    "top": (FAILED, "invalid_request: prompts[0].top_p: 2.0, must be"),
    "images": (CONNECTION, "[UNIMPLEMENTED] - prompts[0]: images are not supported"),
    "upload image": (CONNECTION, "[UNIMPLEMENTED] - images are not supported"),
    "checkpoint": (CONNECTION, "[NOT_FOUND] - "),
    "chat": (CONNECTION, "[NOT_FOUND] - there is no base model 'nobody/none'"),
    "afterwards": ("fine", ""),
}


def test_each_mistake_is_an_exception_of_its_own_with_our_sentence(run: Run) -> None:
    """The client raises its own exceptions, each with field, index and limit, and trains on as if nothing had been."""
    raised = run("river_mistakes.py")
    assert raised.keys() == MISTAKES.keys()
    for name, (exception, sentence) in MISTAKES.items():
        assert raised[name][0] == exception, (name, raised[name])
        assert sentence in raised[name][1], (name, raised[name])
