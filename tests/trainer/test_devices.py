"""What differs on an accelerator as far as it can be seen without one: settings, passes, moves, memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest
import torch
from support.training import ADAM, VOCAB_SIZE, RunScript, forward_backward, random_sequences, shape
from support.workbench import Workbench

from river_trainer import limits
from river_trainer.adapter import new_adapter
from river_trainer.base_model import BaseModel
from river_trainer.devices import HOST, Home, _together, fetched, find_device, moved
from river_trainer.errors import DeviceError
from river_trainer.lanes import Lanes
from river_trainer.losses import LOSSES
from river_trainer.packing import TrainingSequence, decode_sequence, pack
from river_trainer.protocol import AdapterShape, CreateRun, OptimStep
from river_trainer.residency import Residency
from river_trainer.runs import Run
from river_trainer.settings import Sizes, TrainerSettings
from river_trainer.sharding.group import backend_of
from river_trainer.sharding.place import find_place
from river_trainer.store import FileSets
from river_trainer.strands import Job, Strand, by_expert_layout, cut, side_by_side

CUDA, META = torch.device("cuda", 0), torch.device("meta")


# ---- Settings ----------------------------------------------------------------------------------------


def settings(**options: int | str) -> TrainerSettings:
    return TrainerSettings(nats_url="", base_model="b", model_path="", data_dir="d", **options)  # pyright: ignore[reportArgumentType]


def test_sizes_and_precision_are_as_the_device_likes_them() -> None:
    """What is not set depends on the device; what is set does not, and a piece fits into a pass."""
    host = Sizes(limits.BATCH_TOKENS, limits.MICRO_BATCH_TOKENS, limits.PIECE_TOKENS)
    assert settings().sizes("cpu") == host
    large = settings().sizes("cuda")
    assert large.piece_tokens >= 16 * host.piece_tokens
    assert large.piece_tokens <= large.pass_tokens <= large.batch_tokens
    chosen = settings(micro_batch_tokens=300, piece_tokens=400, batch_tokens=500)
    assert chosen.sizes("cpu") == chosen.sizes("cuda") == Sizes(500, 300, 300)
    assert [settings().dtype_name(kind) for kind in ("cpu", "cuda")] == ["float32", "bfloat16"]
    assert settings(trainer_dtype="bfloat16").dtype_name("cpu") == "bfloat16"
    assert settings(trainer_dtype="float32").dtype_name("cuda") == "float32"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_asked_for_by_mistake() -> None:
    """Without a GPU `auto` is the CPU, and `cuda` says what is missing."""
    assert find_device("auto") == find_device("cpu") == HOST
    with pytest.raises(DeviceError, match="RIVER_DEVICE=cuda: there are 0 devices, this needs 2"):
        find_device("cuda", local_rank=1)


def test_every_process_of_a_machine_has_a_device_of_its_own() -> None:
    """Torchrun's LOCAL_RANK is kept, and what carries tensors depends on where they lie."""
    place = find_place({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert (place.rank, place.local_rank) == (5, 1)
    assert (backend_of(HOST), backend_of(CUDA)) == ("gloo", "nccl")


# ---- Moves -------------------------------------------------------------------------------------------


def test_all_tensors_of_a_pass_move_together() -> None:
    """Whatever their types and shapes, they come out of one buffer as they went in, and nothing else is touched."""
    tensors = [
        torch.arange(5),
        torch.tensor(True),  # a number of another size
        torch.randn(3, 7),
        torch.empty(0),
        torch.randn(9, dtype=torch.float64),
    ]
    for there, here in zip(_together(tensors, HOST), tensors, strict=True):
        assert there.dtype is here.dtype
        assert torch.equal(there, here)
    assert all(torch.equal(*pair) for pair in zip(fetched(tensors), tensors, strict=True))
    batch = pack([sequences(1, [3, 9]), sequences(2, [4])])
    planned = moved(batch, META)
    assert planned.input_ids.device == planned.packing.padded.device == META
    assert planned.segments == batch.segments
    assert planned.packing.buckets == batch.packing.buckets
    assert planned.targets.shape == batch.targets.shape
    assert moved(batch, HOST) is batch


# ---- Passes ------------------------------------------------------------------------------------------


def sequences(seed: int, lengths: list[int]) -> list[TrainingSequence]:
    return [
        decode_sequence(sequence, index=index, vocab_size=VOCAB_SIZE, context_length=256)
        for index, sequence in enumerate(random_sequences(seed, lengths))
    ]


def strand(base: BaseModel, lengths: list[int], adapter: AdapterShape | None = None) -> Strand:
    """A job in pieces of at most 64 tokens, all in one strand."""
    job = Job(
        new_adapter(base.sites, adapter or shape(rank=1)),
        sequences(1, lengths),
        LOSSES["cross_entropy"],
        backward=True,
    )
    return Strand(job, list(cut(job, 64)))


def test_a_pass_has_one_piece_of_a_strand(base: BaseModel) -> None:
    """Each gradient has one writer; pieces keep their order, none is left out, and passes are filled."""
    strands = [strand(base, lengths) for lengths in ([64] * 5, [40] * 3, [64], [10])]
    passes = list(side_by_side(strands, 128))
    for parts in passes:
        ids = [id(one) for one, _ in parts]
        assert len(set(ids)) == len(ids)
        assert sum(piece.tokens for _, piece in parts) <= 128
    for one in strands:
        seen = [piece for parts in passes for other, piece in parts if other is one]
        assert [id(piece) for piece in seen] == [id(piece) for piece in one.pieces]
    # As many as the longest strand has pieces: the others ride along.
    assert len(passes) == 5
    assert [len(parts) for parts in passes] == [3, 2, 2, 2, 1]


def test_a_piece_longer_than_a_pass_goes_alone(base: BaseModel) -> None:
    """Nobody waits for ever."""
    passes = list(side_by_side([strand(base, [200]), strand(base, [30])], 128))
    assert [[piece.tokens for _, piece in parts] for parts in passes] == [[200], [30]]


def test_a_pass_has_one_expert_layout(base: BaseModel) -> None:
    """Runs of the two layouts never meet; those that leave the experts alone go with the first."""
    kinds = {
        name: strand(base, [4], adapter)
        for name, adapter in {
            "shared": shape(rank=1, expert_layout="shared_outer"),
            "each": shape(rank=1, expert_layout="per_expert"),
            "none": AdapterShape(
                rank=1,
                alpha=1.0,
                seed=1,
                train_attn=True,
                train_mlp=False,
                train_unembed=True,
                expert_layout="shared_outer",
            ),
        }.items()
    }
    groups = by_expert_layout([kinds["shared"], kinds["none"], kinds["each"]])
    assert groups == [[kinds["none"], kinds["each"]], [kinds["shared"]]]
    assert by_expert_layout([kinds["none"]]) == [[kinds["none"]]]
    assert by_expert_layout([]) == []


# ---- Memory ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rounded(tiny_moe: Path) -> BaseModel:
    """Computes in bfloat16, so that runs at home have a copy that they lack elsewhere; the device is the host."""
    return BaseModel(tiny_moe, torch.bfloat16)


def buffers(run: Run) -> Sequence[torch.Tensor]:
    return [run.adapter.weights.flat, run.optimizer.first.flat, run.optimizer.second.flat]


def test_copies_follow_their_weights(
    rounded: BaseModel, lanes: Lanes, tmp_path: Path, make_executor: Callable[..., Workbench]
) -> None:
    """What passes read is what the weights round to: after creation, a step, a step out of the usual, and a load."""
    bench = Workbench(rounded, lanes, FileSets((tmp_path / "s").as_uri()), base_model="b")
    script = RunScript("run_a")
    wild = msgspec.structs.replace(ADAM, eps=1e-20)
    for task in (
        CreateRun(shape=shape()),
        forward_backward(1, [9]),
        OptimStep(adam=ADAM),
        forward_backward(2, [9]),
        OptimStep(adam=wild),
    ):
        assert bench.execute(script.do(task)).error is None
        adapter = bench.run("run_a").adapter
        assert adapter.copy is not None
        assert torch.equal(adapter.copy.flat, adapter.weights.flat.bfloat16())
    pairs = bench.run("run_a").adapter.pairs(None)
    assert {pair.a.dtype for name, pair in pairs.items() if name != "lm_head"} == {torch.bfloat16}
    assert pairs["lm_head"].a.dtype is torch.float32, "the head is in float32 on CPUs"
    assert make_executor().base.home.has_copies is False


def test_runs_move_between_device_host_and_disk(
    rounded: BaseModel, lanes: Lanes, tmp_path: Path
) -> None:
    """Five runs with room for two on the device and one on the host train as five that are always there."""
    store = FileSets((tmp_path / "s").as_uri())
    tight, roomy = (Workbench(rounded, lanes, store, base_model="b") for _ in range(2))
    size = new_adapter(rounded.sites, shape()).layout.size
    at_home, away = rounded.home.run_bytes(size), Home().run_bytes(size)
    assert at_home == away + 2 * size
    residency = Residency(
        tight.runs,
        tmp_path / "spill",
        budget_bytes=3 * away // 2,
        home=rounded.home,
        device_budget_bytes=5 * at_home // 2,
    )
    assert residency.fits(2 * at_home)
    assert not residency.fits(3 * at_home)
    scripts = [RunScript(f"run_{number}") for number in range(5)]
    for step, task in enumerate(
        (
            CreateRun(shape=shape()),
            forward_backward(1, [9]),
            OptimStep(adam=ADAM),
            forward_backward(2, [5]),
        )
    ):
        for script in scripts:
            message = script.do(task)
            residency.bring({script.run_id})
            results = [bench.execute(message) for bench in (tight, roomy)]
            assert [result.error for result in results] == [None, None]
            assert tight.run(script.run_id).adapter.copy is not None
            # A new run is measured once it is there.
            assert residency.device_runs <= (3 if step == 0 else 2)
            assert len(tight.runs) - residency.device_runs <= 1
    assert residency.spilled == 2
    for script in scripts:
        residency.reach({script.run_id})
        ours, theirs = tight.run(script.run_id), roomy.run(script.run_id)
        assert ours.gradient is not None
        assert theirs.gradient is not None
        assert torch.equal(ours.gradient.flat, theirs.gradient.flat)
        assert all(torch.equal(*pair) for pair in zip(buffers(ours), buffers(theirs), strict=True))
        assert residency.device_runs <= 2


def test_reading_a_run_does_not_bring_it_to_the_device(
    rounded: BaseModel, lanes: Lanes, tmp_path: Path
) -> None:
    """A run that comes from a snapshot, or that is to be snapshotted, stays on the host until it is trained."""
    bench = Workbench(rounded, lanes, FileSets((tmp_path / "s").as_uri()), base_model="b")
    residency = Residency(
        bench.runs,
        tmp_path / "spill",
        budget_bytes=1 << 30,
        home=rounded.home,
        device_budget_bytes=1 << 30,
    )
    bench.execute(RunScript("run_a").do(CreateRun(shape=shape())))
    run = bench.run("run_a").frozen()
    assert run.adapter.copy is None
    del bench.runs["run_a"]
    residency.admit(run)
    residency.reach({"run_a"})
    assert (residency.device_runs, run.adapter.copy) == (0, None)
    residency.bring({"run_a"})
    assert residency.device_runs == 1
    assert residency.device_bytes == rounded.home.run_bytes(run.adapter.layout.size)
