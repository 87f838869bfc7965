"""A trainer whose checkpoints and snapshots lie on S3."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from urllib.parse import urlsplit

import msgspec
import pytest
from support.s3 import S3, use_s3
from support.trainer_world import World
from support.training import ADAM, RunScript, forward_backward, shape, training_script

from river_trainer.protocol import CreateRun, LoadWeights, OptimStep, SaveWeights
from river_trainer.settings import TrainerSettings


@dataclass(slots=True)
class StoredWorld(World):
    """A world whose trainers keep their files in a store of its own."""

    store_url: str = ""

    def settings(self, nats_url: str = "", model_path: str = "") -> TrainerSettings:
        settings = World.settings(self, nats_url, model_path)
        return msgspec.structs.replace(settings, store_url=self.store_url)


async def test_runs_are_kept_on_s3(world: World, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run saved there goes on in another one as it would have; snapshots there outlive a trainer."""
    url = use_s3(s3, monkeypatch)
    facts = {field.name: getattr(world, field.name) for field in dataclasses.fields(world)}
    stored = StoredWorld(**facts, store_url=url)
    source = training_script("run_s3_source", steps=2, base_model=world.base_name)
    source.do(SaveWeights(checkpoint_id="ckpt_1", name="x", mode="training"))
    further = [forward_backward(9, [12]), OptimStep(adam=ADAM), forward_backward(9, [12])]
    for task in further:
        source.do(task)
    copy = RunScript("run_s3_copy", world.base_name)
    async with stored.trainer():
        await stored.submit(*source.messages)
        results = await stored.results(source)
        saved = results[-4].checkpoint
        assert saved is not None
        assert saved.location == f"{url}/checkpoints/ckpt_1"
        copy.do(CreateRun(shape=shape(), checkpoint=saved.location))
        for task in further:
            copy.do(task)
        await stored.submit(*copy.messages)
        copied = await stored.results(copy)
        assert [result.error for result in copied] == [None] * 4
        assert copied[-1].logprobs == results[-1].logprobs
        missing = copy.do(LoadWeights(location=f"{url}/checkpoints/ckpt_2", optimizer=True))
        await stored.submit(missing, copy.do(OptimStep(adam=ADAM)))
        error = (await stored.result(missing)).error
        assert error is not None
        assert error.type == "checkpoint_missing"
        await stored.until_trimmed("run_s3_copy")
    parts = urlsplit(url)
    listed = s3.client.list_objects_v2(Bucket=parts.netloc, Prefix="river/snapshots/")
    assert any(item["Key"].endswith("manifest.json") for item in listed["Contents"])
    async with stored.trainer():
        last = copy.do(forward_backward(9, [12]))
        await stored.submit(last)
        assert (await stored.result(last)).error is None
