"""What operations do to runs, without NATS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pyrage
import pytest
import torch
from support.training import (
    ADAM,
    BASE_NAME,
    RunScript,
    floats,
    forward_backward,
    integers,
    random_sequences,
    shape,
    training_script,
)
from support.workbench import Workbench

from river_trainer.protocol import (
    AdapterShape,
    AnyTask,
    CreateRun,
    Forward,
    ForwardBackward,
    LoadWeights,
    OptimStep,
    Refused,
    SaveWeights,
    Sequence,
    TaskError,
    TrainStep,
)
from river_trainer.runs import Run
from river_trainer.snapshots import Snapshots
from river_trainer.store import FileSets, read_location
from river_trainer.versions import Versions

Maker = Callable[..., Workbench]
AGE: Any = cast("Any", pyrage)  # It has no types.


def state_of(executor: Workbench, run_id: str) -> dict[str, torch.Tensor]:
    """Everything of a run that training changes."""
    run = executor.run(run_id)
    buffers = {"weights": run.adapter.weights, "first": run.optimizer.first}
    buffers |= {"second": run.optimizer.second}
    if run.gradient is not None:
        buffers["gradient"] = run.gradient
    state = {name: buffer.flat.clone() for name, buffer in buffers.items()}
    return state | {"steps": torch.tensor([run.step, run.optimizer.steps])}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_training_lowers_the_loss(make_executor: Maker) -> None:
    """A few steps on the same data do what training is for; every result counts what it should."""
    executor = make_executor()
    script = training_script("run_a", steps=6)
    results = [executor.execute(message) for message in script.messages]
    assert [result.error for result in results] == [None] * len(results)
    assert [result.seq for result in results] == list(range(len(results)))
    losses = [result.metrics["loss_mean"] for result in results[1::3]]
    assert losses[-1] < losses[0] - 0.5
    assert [result.step for result in results[3::3]] == [1, 2, 3, 4, 5, 6]
    assert results[1].training_tokens == 32
    assert results[3].training_tokens == 0
    assert results[3].metrics["grad_norm"] > 0
    logprobs = results[1].logprobs
    assert logprobs is not None
    assert [len(data) for data in logprobs] == [4 * 12, 4 * 20]


def test_train_step_is_forward_backward_and_optim_step(make_executor: Maker) -> None:
    """One atomic operation ends where the two separate ones end."""
    executor = make_executor()
    separate, atomic = RunScript("run_separate"), RunScript("run_atomic")
    data = forward_backward(1, [10, 14])
    for script in (separate, atomic):
        executor.execute(script.do(CreateRun(shape=shape())))
    executor.execute(separate.do(data))
    executor.execute(separate.do(OptimStep(adam=ADAM)))
    step = TrainStep(data=data.data, loss_fn=data.loss_fn, loss_config={}, adam=ADAM)
    result = executor.execute(atomic.do(step))
    assert result.step == 1
    assert {"grad_norm", "loss_sum"} <= result.metrics.keys()
    assert_same(state_of(executor, "run_separate"), state_of(executor, "run_atomic"))


def test_importance_sampling_on_the_policy_itself(make_executor: Maker) -> None:
    """With the old log-probabilities of the same policy the ratio is one and the loss is -sum A."""
    executor = make_executor()
    script = RunScript("run_a")
    executor.execute(script.do(CreateRun(shape=shape())))
    plain = random_sequences(2, [15, 8])
    forward = executor.execute(
        script.do(Forward(data=plain, loss_fn="cross_entropy", loss_config={}))
    )
    assert forward.logprobs is not None
    data = [
        msgspec.structs.replace(sequence, old_logprobs=old, weights=None)
        for sequence, old in zip(plain, forward.logprobs, strict=True)
    ]
    task = ForwardBackward(data=data, loss_fn="importance_sampling", loss_config={})
    result = executor.execute(script.do(task))
    advantages = [np.frombuffer(sequence.advantages or b"", "<f4")[:-1] for sequence in data]
    assert result.metrics["mean_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert result.metrics["kl"] == pytest.approx(0.0, abs=1e-6)
    assert result.metrics["loss_sum"] == pytest.approx(-np.concatenate(advantages).sum(), abs=1e-4)


def bad_tasks() -> dict[str, tuple[AnyTask, str]]:
    good = random_sequences(1, [6])[0]
    huge = msgspec.structs.replace(good, old_logprobs=floats([-1e30] * 6))
    nan = msgspec.structs.replace(good, weights=floats([float("nan")] * 6))
    short = msgspec.structs.replace(good, weights=floats([1.0] * 5))
    outside = Sequence(input_ids=integers([1, 2, 512]))
    soft = msgspec.structs.replace(good, targets_per_token=2)

    def step(sequence: Sequence, loss_fn: str = "cross_entropy") -> TrainStep:
        return TrainStep(data=[sequence], loss_fn=loss_fn, loss_config={}, adam=ADAM)

    return {
        "unknown loss": (step(good, "nonsense"), "invalid_request"),
        "infinite loss": (step(huge, "importance_sampling"), "non_finite"),
        "nan weights": (step(nan), "non_finite"),
        "misaligned": (step(short), "invalid_request"),
        "outside the vocabulary": (step(outside), "invalid_request"),
        "soft targets": (step(soft), "invalid_request"),
        "no advantages": (
            step(Sequence(input_ids=good.input_ids), "importance_sampling"),
            "invalid_request",
        ),
        "too long": (step(random_sequences(1, [257])[0]), "invalid_request"),
        "no data": (
            TrainStep(data=[], loss_fn="cross_entropy", loss_config={}, adam=ADAM),
            "invalid_request",
        ),
        "no such checkpoint": (
            LoadWeights(location="file:///nonexistent-river/x", optimizer=True),
            "checkpoint_missing",
        ),
        "refused at the door": (
            Refused(error=TaskError(type="not_found", message="there is no checkpoint")),
            "not_found",
        ),
    }


@pytest.mark.parametrize("name", bad_tasks())
def test_a_failure_leaves_the_run_as_it_was(make_executor: Maker, name: str) -> None:
    """A failed operation, atomic step included, changes neither weights nor pending gradients."""
    task, error_type = bad_tasks()[name]
    executor = make_executor()
    script = RunScript("run_a")
    executor.execute(script.do(CreateRun(shape=shape())))
    executor.execute(script.do(forward_backward(1, [9])))
    before = state_of(executor, "run_a")
    result = executor.execute(script.do(task))
    assert result.error is not None
    assert result.error.type == error_type
    assert result.training_tokens == 0
    assert_same(before, state_of(executor, "run_a"))
    assert executor.execute(script.do(OptimStep(adam=ADAM))).error is None


def test_optim_step_needs_gradients(make_executor: Maker) -> None:
    """Stepping on nothing is an error that leaves the run usable, and a forward leaves nothing to step on."""
    executor = make_executor()
    script = RunScript("run_a")
    executor.execute(script.do(CreateRun(shape=shape())))
    data = random_sequences(1, [6])
    executor.execute(script.do(Forward(data=data, loss_fn="cross_entropy", loss_config={})))
    result = executor.execute(script.do(OptimStep(adam=ADAM)))
    assert result.error is not None
    assert result.error.type == "no_gradients"
    assert executor.execute(script.do(forward_backward(1, [6]))).error is None
    assert executor.execute(script.do(OptimStep(adam=ADAM))).step == 1


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        (shape(rank=0), "lora.rank"),
        (shape(rank=33), "lora.rank"),
        (
            AdapterShape(
                rank=4,
                alpha=8,
                seed=0,
                train_attn=False,
                train_mlp=False,
                train_unembed=False,
                expert_layout="per_expert",
            ),
            "lora",
        ),
    ],
    ids=["rank 0", "rank too big", "nothing to train"],
)
def test_a_run_that_cannot_be_created_refuses_everything(
    make_executor: Maker, bad: AdapterShape, param: str
) -> None:
    """The creation's error names the field; later operations are refused, not lost."""
    executor = make_executor()
    script = RunScript("run_a")
    created = executor.execute(script.do(CreateRun(shape=bad)))
    assert created.error is not None
    assert created.error.param == param
    later = executor.execute(script.do(forward_backward(1, [6])))
    assert later.error is not None
    assert later.error.type == "run_unavailable"


def test_runs_do_not_affect_each_other(make_executor: Maker) -> None:
    """Two runs of different ranks, interleaved, end where each ends alone."""
    together, alone = make_executor(), make_executor()
    scripts = [training_script("run_a", steps=3), training_script("run_b", steps=3, rank=16)]
    for pair in zip(*(script.messages for script in scripts), strict=True):
        for message in pair:
            together.execute(message)
    for script in scripts:
        for message in script.messages:
            alone.execute(message)
        assert_same(state_of(together, script.run_id), state_of(alone, script.run_id))


def test_checkpoints_bring_a_run_back(make_executor: Maker) -> None:
    """Loading a training checkpoint goes on as if nothing had happened since; each load is a new version."""
    executor = make_executor()
    script = training_script("run_a", steps=2)
    for message in script.messages:
        executor.execute(message)
    saved = executor.execute(
        script.do(SaveWeights(checkpoint_id="ckpt_1", name="x", mode="training", ttl_s=60))
    )
    assert saved.checkpoint is not None
    assert saved.checkpoint.step == 2
    assert saved.checkpoint.size_bytes > 100_000
    assert saved.checkpoint.expires_at == saved.checkpoint.created_at + 60
    before = state_of(executor, "run_a")

    executor.execute(script.do(forward_backward(7, [11])))
    executor.execute(script.do(OptimStep(adam=ADAM)))
    location = saved.checkpoint.location
    loaded = executor.execute(script.do(LoadWeights(location=location, optimizer=True)))
    assert loaded.error is None
    assert loaded.step == 4
    after = state_of(executor, "run_a")
    assert after.pop("steps").tolist() == [4, 2]
    before.pop("steps")
    assert_same(before, after)

    other = RunScript("run_b")
    created = executor.execute(other.do(CreateRun(shape=shape(), checkpoint=location)))
    assert created.error is None
    copy = state_of(executor, "run_b")
    assert copy.pop("steps").tolist() == [0, 2]
    assert_same(before, copy)


def test_a_loaded_checkpoint_brings_its_step(make_executor: Maker) -> None:
    """A fresh run goes on at the checkpoint's step; one that has come further itself never takes a step again."""
    executor = make_executor()
    first = RunScript("run_0")
    executor.execute(first.do(CreateRun(shape=shape(seed=9))))
    new = executor.execute(first.do(SaveWeights(checkpoint_id="ckpt_0", name="x", mode="training")))
    assert new.checkpoint is not None
    as_new = LoadWeights(location=new.checkpoint.location, optimizer=True)
    script = training_script("run_a", steps=3)
    for message in script.messages:
        executor.execute(message)
    saved = executor.execute(
        script.do(SaveWeights(checkpoint_id="ckpt_1", name="x", mode="training"))
    )
    assert saved.checkpoint is not None
    load = LoadWeights(
        location=saved.checkpoint.location, optimizer=True, step=saved.checkpoint.step
    )
    fresh = RunScript("run_b")
    executor.execute(fresh.do(CreateRun(shape=shape())))
    assert executor.execute(fresh.do(as_new)).step == 0
    assert executor.execute(fresh.do(load)).step == 3
    assert executor.execute(fresh.do(as_new)).step == 4
    assert executor.execute(script.do(load)).step == 4


def test_a_save_after_a_load_in_one_batch_is_of_what_was_loaded(make_executor: Maker) -> None:
    """Also where both are of step 0: the factors differ, and training goes on differently from them."""
    executor = make_executor()
    other = RunScript("run_0")
    executor.execute(other.do(CreateRun(shape=shape(seed=9))))

    def save(name: str) -> SaveWeights:
        return SaveWeights(checkpoint_id=f"ckpt_{name}", name=name, mode="training")

    source = executor.execute(other.do(save("source")))
    assert source.checkpoint is not None
    load = LoadWeights(location=source.checkpoint.location, optimizer=True)
    script = RunScript("run_a")
    executor.execute(script.do(CreateRun(shape=shape(seed=1))))
    batch = [script.do(task) for task in (save("before"), load, save("after"))]
    results = executor.execute_together(batch)
    assert [result.step for result in results] == [0, 0, 0]
    files: list[dict[str, bytes]] = []
    for result in (source, results[0], results[2]):
        assert result.checkpoint is not None
        found = read_location(result.checkpoint.location)
        assert found is not None
        files.append(found[1])
    loaded, before, after = (found["adapter_model.safetensors"] for found in files)
    assert after == loaded
    assert before != loaded


def test_an_inference_checkpoint_has_no_optimizer(make_executor: Maker) -> None:
    """It is smaller, loads without the optimizer, and says what it lacks when asked for it."""
    executor = make_executor()
    script = training_script("run_a", steps=1)
    for message in script.messages:
        executor.execute(message)
    saved = executor.execute(
        script.do(SaveWeights(checkpoint_id="ckpt_1", name="x", mode="inference"))
    )
    assert saved.checkpoint is not None
    location = saved.checkpoint.location
    refused = executor.execute(script.do(LoadWeights(location=location, optimizer=True)))
    assert refused.error is not None
    assert "no optimizer" in refused.error.message
    assert executor.execute(script.do(LoadWeights(location=location, optimizer=False))).step == 2
    other = executor.execute(
        RunScript("run_b").do(CreateRun(shape=shape(rank=4), checkpoint=location))
    )
    assert other.error is not None


def test_an_external_checkpoint_is_encrypted_for_its_recipients(make_executor: Maker) -> None:
    """Each file is read with the key alone, and is the one that serving would read; metadata go along."""
    executor = make_executor()
    key = AGE.x25519.Identity.generate()
    script = training_script("run_a", steps=1)
    for message in script.messages:
        executor.execute(message)
    plain = executor.execute(
        script.do(SaveWeights(checkpoint_id="ckpt_1", name="x", mode="inference"))
    )
    asked = SaveWeights(
        checkpoint_id="ckpt_2",
        name="x",
        mode="external",
        user_metadata={"for": "you"},
        age_recipients=(str(key.to_public()),),
    )
    saved = executor.execute(script.do(asked))
    assert plain.checkpoint is not None
    assert saved.checkpoint is not None
    assert saved.checkpoint.user_metadata == {"for": "you"}
    expected = read_location(plain.checkpoint.location)
    stored = read_location(saved.checkpoint.location)
    assert expected is not None
    assert stored is not None
    assert {name: AGE.decrypt(data, [key]) for name, data in stored[1].items()} == {
        f"{name}.age": data for name, data in expected[1].items()
    }


def test_snapshots_bring_runs_back(make_executor: Maker, tmp_path: Path) -> None:
    """A run loaded from its newest snapshot is bit for bit the run that was snapshotted."""
    executor = make_executor()
    snapshots = Snapshots(FileSets((tmp_path / "store").as_uri()), BASE_NAME)
    for message in training_script("run_a", steps=2).messages:
        executor.execute(message)
        run = executor.runs["run_a"]
        assert isinstance(run, Run)
        if run.gradient is None:
            snapshots.write(run)
    assert snapshots.newest() == {"run_a": 6}
    loaded = snapshots.load("run_a", executor.base.sites)
    assert isinstance(loaded, Run)
    assert (loaded.step, loaded.last_seq) == (2, 6)
    fresh = make_executor()
    fresh.runs["run_a"] = loaded
    assert_same(state_of(executor, "run_a"), state_of(fresh, "run_a"))
    manifest = tmp_path / "store/snapshots/river_tiny-moe/run_a/6/manifest.json"
    manifest.unlink()
    assert snapshots.newest() == {}
    assert snapshots.load("run_a", executor.base.sites) is None


def test_versions_are_immutable_and_few(make_executor: Maker, tmp_path: Path) -> None:
    """Each version has a directory of its own; only the last few stay, and none is written twice."""
    executor = make_executor()
    executor.execute(RunScript("run_a").do(CreateRun(shape=shape(rank=1))))
    run = executor.runs["run_a"]
    assert isinstance(run, Run)
    versions = Versions(tmp_path / "adapters", base_model=BASE_NAME)
    for step in range(12):
        assert versions.write(run.run_id, step, run.adapter) == versions.live("run_a", step)
    live = versions.live("run_a", 11)
    assert live.adapter.name == "run_a@11"
    assert live.adapter.location == (tmp_path / "adapters/run_a/11").as_uri()
    folders = sorted(int(path.name) for path in (tmp_path / "adapters/run_a").iterdir())
    assert folders == list(range(4, 12))
    weights = tmp_path / "adapters/run_a/11/adapter_model.safetensors"
    # What a process left behind that died while removing a version is in nobody's way.
    stale = tmp_path / "adapters/run_a/.4.leaving"
    stale.mkdir()
    (stale / "rest").write_bytes(b"x")
    versions.write("run_a", 12, run.adapter)
    assert not stale.exists()
    before = weights.stat().st_mtime_ns
    versions.write("run_a", 11, run.adapter)
    assert weights.stat().st_mtime_ns == before
