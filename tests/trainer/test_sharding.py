"""One trainer in several processes against the same trainer in one."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from support.quantized_checkpoints import FORMS, write_twins
from support.sharded import (
    FRAGILE,
    RankReport,
    Trained,
    fragile_loss,
    frozen_bytes,
    run_rank,
    stored_weights,
    train,
    workbench,
)
from support.trainer_world import WAIT_S, World
from support.training import RunScript, forward_backward, shape, timeless
from support.workbench import Workbench
from torch.multiprocessing.spawn import spawn

from river_ops.children import free_port
from river_trainer.base_model import BaseModel
from river_trainer.lanes import Lanes
from river_trainer.losses import LOSSES
from river_trainer.protocol import Adam, CreateRun, OptimStep, SaveWeights
from river_trainer.sharding.place import Place, find_place
from river_trainer.store import FileSets

SIZE = 2
TOLERANCE = 1e-5
PIECE_TOKENS = 256
JOIN_S = 120.0
END_S = 60.0
GENTLE = Adam(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0, grad_clip_norm=1.0)


@dataclass(frozen=True, slots=True)
class Setting:
    """How many processes there are, and in what the frozen model computes and is stored."""

    size: int
    dtype: torch.dtype
    form: str | None = None


SETTINGS = {
    "two processes": pytest.param(Setting(2, torch.float32)),
    "two with stored experts": pytest.param(Setting(2, torch.float32, "modelopt nvfp4")),
    "four in bfloat16": pytest.param(Setting(4, torch.bfloat16), marks=pytest.mark.slow),
}


@pytest.fixture(scope="module", params=SETTINGS.values(), ids=list(SETTINGS))
def setting(request: pytest.FixtureRequest) -> Setting:
    return request.param


@pytest.fixture(scope="module")
def model_path(setting: Setting, tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, in the form in which it is stored."""
    if setting.form is None:
        return tiny_moe
    folder = tmp_path_factory.mktemp("stored")
    return write_twins(tiny_moe, folder, FORMS[setting.form], left_out=())[0]


@pytest.fixture(scope="module")
def reports(
    setting: Setting, model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[RankReport]:
    """What the processes of a group saw, by rank."""
    size, directory = setting.size, tmp_path_factory.mktemp("sharded")
    arguments = (size, free_port(), model_path, directory, setting.dtype)
    context = spawn(run_rank, arguments, nprocs=size, join=False)
    assert context is not None
    while not context.join(JOIN_S):
        pass
    return [torch.load(directory / f"rank_{rank}.pt", weights_only=False) for rank in range(size)]


@pytest.fixture(scope="module")
def together(reports: list[RankReport]) -> Trained:
    """The training in a group of processes."""
    trained = reports[0].trained
    assert trained is not None
    return trained


@pytest.fixture(scope="module")
def whole(setting: Setting, model_path: Path) -> BaseModel:
    """The undivided model."""
    return BaseModel(model_path, setting.dtype)


@pytest.fixture(scope="module")
def alone(
    setting: Setting, whole: BaseModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trained]:
    """The same training in one process with as many lanes as there are processes in the group."""
    lanes = Lanes(setting.size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LOSSES, FRAGILE, fragile_loss())
        yield train(workbench(whole, lanes, tmp_path_factory.mktemp("alone")))
    lanes.close()


def test_losses_are_those_of_one_process(together: Trained, alone: Trained) -> None:
    """Every metric and log-probability, of all runs and steps, whoever computed it."""
    assert together.metrics.keys() == alone.metrics.keys()
    assert any("expert_flip" in metrics for metrics in alone.metrics.values())
    for operation, expected in alone.metrics.items():
        assert together.metrics[operation] == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
        pairs = zip(together.logprobs[operation], alone.logprobs[operation], strict=True)
        for mine, theirs in pairs:
            ours = np.frombuffer(mine, "<f4")
            np.testing.assert_allclose(ours, np.frombuffer(theirs, "<f4"), rtol=0, atol=TOLERANCE)


def test_gradients_and_weights_are_those_of_one_process(together: Trained, alone: Trained) -> None:
    """To the last bit, moments included: an adapter's gradient is one sum, whose order no process changes."""
    assert together.states.keys() == alone.states.keys()
    assert {"run_long gradient", "run_short gradient"} <= alone.states.keys()
    for name, expected in alone.states.items():
        mine = together.states[name]
        torch.testing.assert_close(mine, expected, atol=TOLERANCE, rtol=TOLERANCE, msg=name)
        assert torch.equal(mine, expected), name
        if name.endswith("gradient"):
            assert expected.norm() > 0.1


def test_what_fails_in_one_process_fails_alone(together: Trained, alone: Trained) -> None:
    """A loss with a bug fails its own operation, and the processes stay in step for all that come after it."""
    assert together.errors.keys() == alone.errors.keys()
    assert list(together.errors.values()) == ["PassFailedError in the trainer"]


def test_every_process_holds_its_part(
    reports: list[RankReport], whole: BaseModel, setting: Setting
) -> None:
    """Dense weights and experts are divided evenly; what is gathered for a pass is gone after it."""
    share = frozen_bytes(whole) / setting.size
    for report in reports:
        assert report.frozen_bytes == pytest.approx(share, rel=0.01)
    # Of stored weights one layer's numbers are there at a time.
    scratch = max([4 * weight.shape.numel() for weight in stored_weights(whole)], default=0)
    for report in reports[1:]:  # Rank 0 has the runs as well; the others have nothing else.
        assert report.tensor_bytes < 1.1 * share + scratch / setting.size


@pytest.mark.parametrize(
    ("environment", "place"),
    [({}, Place(0, 1)), ({"RANK": "1", "WORLD_SIZE": "2"}, Place(1, 2))],
    ids=["alone", "second of two"],
)
def test_a_process_knows_its_place(environment: dict[str, str], place: Place) -> None:
    """The environment says it, or nothing does."""
    assert find_place(environment) == place
    assert place.leads == (place.rank == 0)


def test_a_place_outside_the_group_is_refused() -> None:
    """A rank that is not below the size is no place."""
    with pytest.raises(ValueError, match="RANK 2 of WORLD_SIZE 2"):
        find_place({"RANK": "2", "WORLD_SIZE": "2"})


# ---- As processes --------------------------------------------------------------------------------


@asynccontextmanager
async def torchrun(world: World, nats_url: str, model: Path, size: int) -> AsyncIterator[Process]:
    """A trainer of `size` processes; killed in the end if it has not ended itself."""
    settings = world.settings(nats_url, str(model))
    names = ("nats_url", "base_model", "model_path", "data_dir", "context_length", "max_lora_rank")
    environment = os.environ | {
        f"RIVER_{name.upper()}": str(getattr(settings, name)) for name in names
    }
    environment |= {"RIVER_PORT": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"RIVER_PIECE_TOKENS": str(PIECE_TOKENS), "OMP_NUM_THREADS": "1"}
    address = ("--master-addr", "127.0.0.1", "--master-port", str(free_port()))
    program = ("-m", "torch.distributed.run", "--nproc-per-node", str(size), *address)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *program, "-m", "river_trainer.main"),
        env=environment,
        stdout=PIPE,
        stderr=STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def pid_of_rank(launcher: Process, rank: int) -> int:
    """The process of a rank among the children of torchrun."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    async with asyncio.timeout(WAIT_S):
        while True:
            for pid in map(int, children.read_text().split()):
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if f"RANK={rank}".encode() in variables:
                    return pid
            await asyncio.sleep(0.05)


async def end_of(process: Process) -> tuple[int, str]:
    """The exit code of a trainer that is about to end, and what it has said."""
    async with asyncio.timeout(END_S):
        assert process.stdout is not None
        output = await process.stdout.read()
        return await process.wait(), output.decode()


def script_of(world: World) -> RunScript:
    """A run whose operations are spread over both processes; it saves itself in the end."""
    script = RunScript("run_divided", world.base_name)
    script.do(CreateRun(shape=shape(rank=4)))
    for step in range(4):
        script.do(forward_backward(step, [120, 90, 100, 3], "importance_sampling"))
        script.do(OptimStep(adam=GENTLE))
    script.do(SaveWeights(checkpoint_id="ckpt_divided", name="end", mode="training"))
    return script


@pytest.mark.slow
async def test_a_group_serves_breaks_and_goes_on(
    world: World, nats_url: str, tiny_moe: Path, tmp_path: Path
) -> None:
    """It trains like one process; a killed member ends all of it; its successor replays the journal, and goes home."""
    script = script_of(world)
    first_half = script.messages[:4]  # A gradient is pending then, and only in memory.
    async with torchrun(world, nats_url, tiny_moe, SIZE) as group:
        await world.submit(*first_half)
        for message in first_half:
            assert (await world.result(message)).error is None
        os.kill(await pid_of_rank(group, 1), signal.SIGKILL)
        code, output = await end_of(group)
        assert code != 0, output
    async with torchrun(world, nats_url, tiny_moe, SIZE) as group:
        await world.submit(*script.messages[4:])
        results = await world.results(script)
        group.send_signal(signal.SIGTERM)
        await end_of(group)

    lanes = Lanes(SIZE)
    store = FileSets((tmp_path / "alone").as_uri())
    bench = Workbench(
        world.base, lanes, store, base_model=world.base_name, piece_tokens=PIECE_TOKENS
    )
    expected = [bench.execute(message) for message in script.messages]
    lanes.close()
    for mine, theirs in zip(results, expected, strict=True):
        assert mine.error is None
        assert timeless(mine.metrics) == pytest.approx(timeless(theirs.metrics), abs=TOLERANCE)
        assert (mine.step, mine.logprobs) == (theirs.step, theirs.logprobs)
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        folder = Path("checkpoints/ckpt_divided")
        saved = (tmp_path / "store" / folder / name).read_bytes()
        assert saved == (tmp_path / "alone" / folder / name).read_bytes(), name


@pytest.mark.slow
async def test_experts_have_to_be_divisible(world: World, nats_url: str, tiny_moe: Path) -> None:
    """Three processes cannot share eight experts: the group ends, and says why."""
    async with torchrun(world, nats_url, tiny_moe, 3) as group:
        code, output = await end_of(group)
    assert code != 0
    assert "the 8 experts of model.layers.0.mlp.experts cannot be divided evenly among 3" in output
