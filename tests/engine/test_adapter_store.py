"""The store of adapters, with real files and a stand-in for the one thing it needs of vLLM."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.s3 import S3, use_s3
from support.slow_store import OPTIONS, slow_store
from vllm.lora.request import LoRARequest

from river_engine.adapter_files import CONFIG_FILE, WEIGHTS_FILE, Target, write_random_adapter
from river_engine.adapters import AdapterStore
from river_engine.errors import (
    AdapterLoading,
    AdapterNotFound,
    EngineRefusal,
    InvalidAdapter,
)
from river_engine.protocol import AdapterRef
from river_engine.stores import OPTIONS_VARIABLE
from river_trainer.store import FileSets

TARGETS = {
    "lm_head": Target(8, 16),
    "model.layers.0.mlp.experts.base_layer": Target(8, 12, 2),
    "model.layers.0.mlp.experts": Target(6, 8, 2),
}


class Vllm:
    """Loads what it is told to, from the files it is pointed at."""

    def __init__(self) -> None:
        self.loaded: dict[int, LoRARequest] = {}
        self.loads = 0
        self.loading = asyncio.Event()
        self.may_load = asyncio.Event()
        self.may_load.set()

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        self.loads += 1
        self.loading.set()
        await self.may_load.wait()
        await asyncio.sleep(0.01)
        load_file(Path(lora_request.lora_path) / WEIGHTS_FILE)
        self.loaded[lora_request.lora_int_id] = lora_request
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        return self.loaded.pop(lora_id, None) is not None


@pytest.fixture
def vllm() -> Vllm:
    return Vllm()


@pytest.fixture
def store(vllm: Vllm, tmp_path: Path) -> AdapterStore:
    return make_store(vllm, tmp_path)


def make_store(
    vllm: Vllm, tmp_path: Path, max_loras: int = 1, wait_s: float = 30.0
) -> AdapterStore:
    return AdapterStore(
        vllm,
        tmp_path / "versions",
        TARGETS,
        max_loras=max_loras,
        resident_max=2,
        rank_max=8,
        wait_s=wait_s,
    )


def written(tmp_path: Path, name: str, seed: int = 0, rank: int = 4) -> AdapterRef:
    write_random_adapter(tmp_path / "source" / name, TARGETS, rank=rank, seed=seed, std=0.1)
    return AdapterRef(name=name, location=(tmp_path / "source" / name).as_uri())


@asynccontextmanager
async def in_use(store: AdapterStore, ref: AdapterRef) -> AsyncIterator[LoRARequest]:
    """As a request uses it."""
    async with store.hold(ref) as version, store.loaded(version) as lora:
        yield lora


def source(ref: AdapterRef) -> Path:
    return Path(unquote(ref.location.removeprefix("file://")))


async def test_many_askers_cause_one_load(vllm: Vllm, store: AdapterStore, tmp_path: Path) -> None:
    """Ten requests for an adapter at once share one load and one LoRARequest."""
    ref = written(tmp_path, "run_a@1")

    async def ask() -> LoRARequest:
        async with in_use(store, ref) as lora:
            return lora

    requests = await asyncio.gather(*(ask() for _ in range(10)))

    assert vllm.loads == 1
    assert {request.lora_int_id for request in requests} == {1}
    assert requests[0].is_3d_lora_weight
    assert store.resident() == ["run_a@1"]


async def test_bytes_outlive_their_source(vllm: Vllm, store: AdapterStore, tmp_path: Path) -> None:
    """The trainer may remove its directory while requests still use the version."""
    ref = written(tmp_path, "run_a@1")
    async with in_use(store, ref) as lora:
        shutil.rmtree(source(ref))
        assert load_file(Path(lora.lora_path) / WEIGHTS_FILE)
        async with in_use(store, ref):
            assert vllm.loads == 1


async def test_bytes_stay_for_those_who_wait(
    vllm: Vllm, store: AdapterStore, tmp_path: Path
) -> None:
    """A version that others have pushed out of vLLM comes back from the files its waiting requests hold."""
    first, *others = (written(tmp_path, f"run_a@{step}") for step in range(1, 5))
    async with store.hold(first) as waiting:
        await store.preload(first)
        shutil.rmtree(source(first))
        for ref in others:
            await store.preload(ref)
        assert store.resident() == ["run_a@3", "run_a@4"]
        assert len(vllm.loaded) == 2
        async with store.loaded(waiting) as lora:
            assert vllm.loaded[lora.lora_int_id] == lora
            assert store.resident() == ["run_a@4", "run_a@1"]
    assert len(vllm.loaded) == 2


async def test_what_is_used_is_not_pushed_out(
    vllm: Vllm, store: AdapterStore, tmp_path: Path
) -> None:
    """While every slot is in use nothing is loaded ahead: vLLM would take a running adapter out for it."""
    first, second = (written(tmp_path, f"run_a@{step}") for step in (1, 2))
    async with in_use(store, first):
        await store.preload(second)
        assert store.resident() == ["run_a@1"]
    await store.preload(second)
    assert store.resident() == ["run_a@1", "run_a@2"]


async def test_what_vllm_refuses_is_refused(
    vllm: Vllm, store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To all who hold it, without the engine's own paths; it is not remembered for those who come later."""

    async def refuse(request: LoRARequest) -> bool:
        raise ValueError(f"cannot read {request.lora_path}")

    ref = written(tmp_path, "run_a@1")
    with monkeypatch.context() as patch:
        patch.setattr(vllm, "add_lora", refuse)
        async with store.hold(ref) as version, store.hold(ref) as same:
            for held in (version, same):
                with pytest.raises(InvalidAdapter, match="vLLM refuses it: cannot read") as refusal:
                    async with store.loaded(held):
                        pass
                assert str(tmp_path) not in refusal.value.message
    assert not any(path.is_dir() for path in (tmp_path / "versions").iterdir())
    async with in_use(store, ref) as lora:
        assert lora.lora_int_id == 2


async def test_least_recently_used_leaves(vllm: Vllm, tmp_path: Path) -> None:
    """Beyond the bound the version longest unused goes, with its weights and its directory; a held one stays."""
    store = make_store(vllm, tmp_path, max_loras=2)
    first, second, third = (written(tmp_path, f"run_a@{step}") for step in (1, 2, 3))
    async with in_use(store, first) as held:
        for ref in (second, third):
            await store.preload(ref)
        assert store.resident() == ["run_a@1", "run_a@3"]
        assert Path(held.lora_path).exists()
        assert sorted(request.lora_name for request in vllm.loaded.values()) == [
            "run_a@1",
            "run_a@3",
        ]
        assert len([path for path in (tmp_path / "versions").iterdir() if path.is_dir()]) == 2


async def test_versions_nobody_asks_for_are_not_wanted(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run's versions the first is loaded unasked, others only while requests for the run come."""
    first, second, third = (written(tmp_path, f"run_a@{step}") for step in (1, 2, 3))
    assert store.is_wanted(first)
    assert not store.is_wanted(second)
    async with store.hold(second):
        pass
    assert store.is_wanted(third)
    assert store.is_wanted(written(tmp_path, "run_b@1")), "each run for itself"
    monkeypatch.setattr("river_engine.adapters.PRELOAD_INTEREST_S", -1.0)
    async with store.hold(second):
        pass
    assert not store.is_wanted(third)


async def test_only_so_many_runs_are_remembered(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that was longest not heard of is forgotten, which makes it a new one."""
    monkeypatch.setattr("river_engine.adapters.PRELOAD_RUNS_MAX", 2)
    refs = [written(tmp_path, f"run_{name}@1") for name in "abc"]
    assert [store.is_wanted(ref) for ref in (*refs, refs[2], refs[0])] == [
        True,
        True,
        True,
        False,
        True,
    ]


async def test_an_evicted_version_comes_back_under_a_new_number(
    vllm: Vllm, store: AdapterStore, tmp_path: Path
) -> None:
    """Numbers and directories are never used for two loads."""
    refs = [written(tmp_path, f"run_a@{step}") for step in (1, 2, 3)]
    for ref in (*refs, refs[0]):
        await store.preload(ref)
    async with in_use(store, refs[0]) as lora:
        assert lora.lora_int_id == 4


async def test_a_missing_adapter_is_not_found(store: AdapterStore, tmp_path: Path) -> None:
    """And is found once it is there: the failure is not remembered."""
    ref = AdapterRef(name="run_a@1", location=(tmp_path / "source" / "run_a@1").as_uri())
    with pytest.raises(AdapterNotFound) as refusal:
        await store.preload(ref)
    assert refusal.value.message == "adapter run_a@1: adapter_config.json is not there"
    written(tmp_path, "run_a@1")
    await store.preload(ref)
    assert store.resident() == ["run_a@1"]


def junk_weights(directory: Path) -> None:
    (directory / WEIGHTS_FILE).unlink()
    (directory / WEIGHTS_FILE).write_bytes(b"junk")


def directory_for_config(directory: Path) -> None:
    (directory / CONFIG_FILE).unlink()
    (directory / CONFIG_FILE).mkdir()


def change_config(**fields: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / CONFIG_FILE
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS_FILE)
        change(tensors)
        save_file(tensors, directory / WEIGHTS_FILE)

    return apply


HEAD_A, HEAD_B = (f"base_model.model.lm_head.lora_{factor}.weight" for factor in "AB")
DOWN = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (junk_weights, "not a safetensors file"),
        (lambda directory: (directory / CONFIG_FILE).write_bytes(b"{"), CONFIG_FILE),
        (directory_for_config, "cannot be read"),
        (change_config(r=16), "rank 16 is not between 1 and 8"),
        (change_config(use_dora=True), "use_dora"),
        (change_config(modules_to_save=["lm_head"]), "modules_to_save"),
        (change_tensors(lambda tensors: tensors.pop(HEAD_B)), "has only lora_A"),
        (
            change_tensors(lambda tensors: tensors.update({HEAD_A: torch.zeros(4, 7)})),
            "expected (4, 8)",
        ),
        (
            change_tensors(
                lambda tensors: tensors.update({"base_model.model.x.lora_A.weight": torch.zeros(1)})
            ),
            "not something an adapter of this model can change",
        ),
        (
            change_tensors(lambda tensors: [tensors.pop(DOWN.format(factor)) for factor in "AB"]),
            "down is missing",
        ),
        (change_tensors(lambda tensors: tensors.clear()), "holds no tensors"),
    ],
    ids=[
        "junk",
        "config",
        "directory",
        "rank",
        "dora",
        "saved",
        "half",
        "shape",
        "unknown",
        "down",
        "empty",
    ],
)
async def test_an_unfit_adapter_is_refused(
    store: AdapterStore, vllm: Vllm, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    """Before vLLM sees it, with the reason, and without a trace left."""
    ref = written(tmp_path, "run_a@1")
    spoil(source(ref))
    with pytest.raises(InvalidAdapter) as refusal:
        await store.preload(ref)
    assert message in refusal.value.message
    assert "run_a@1" in refusal.value.message
    assert str(tmp_path) not in refusal.value.message
    assert vllm.loads == 0
    assert store.resident() == []
    assert not any(path.is_dir() for path in (tmp_path / "versions").iterdir())


async def test_all_askers_hear_of_a_failure(store: AdapterStore, tmp_path: Path) -> None:
    """Those who waited for the load get its refusal."""
    ref = written(tmp_path, "run_a@1")
    junk_weights(source(ref))
    results = await asyncio.gather(*(store.preload(ref) for _ in range(5)), return_exceptions=True)
    assert all(isinstance(result, EngineRefusal) for result in results)


async def test_a_cancelled_load_is_taken_over(
    vllm: Vllm, store: AdapterStore, tmp_path: Path
) -> None:
    """The client whose request started the load goes away; the next in line still gets the adapter."""
    ref = written(tmp_path, "run_a@1")
    first = asyncio.create_task(store.preload(ref))
    second = asyncio.create_task(store.preload(ref))
    await vllm.loading.wait()
    first.cancel()
    await second
    assert store.resident() == ["run_a@1"]


async def test_nobody_waits_for_ever_for_the_bytes(
    vllm: Vllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who ask while a store is slow are told to come back; it is asked once, and what it sends is kept."""
    monkeypatch.setenv(OPTIONS_VARIABLE, OPTIONS)
    monkeypatch.setattr("river_engine.adapters.ADAPTER_KEPT_S", 0.5)
    store = make_store(vllm, tmp_path, wait_s=0.2)
    written(tmp_path, "run_a@1")
    with slow_store(tmp_path / "source") as slow:
        ref = AdapterRef(name="run_a@1", location=f"{slow.url}/run_a@1")

        async def ask() -> None:
            async with in_use(store, ref):
                raise AssertionError("there are no bytes")

        refusals = await asyncio.gather(*(ask() for _ in range(5)), return_exceptions=True)
        assert [str(refusal) for refusal in refusals] == [
            "waited 0.2 s for adapter run_a@1 to be fetched, which goes on; try again"
        ] * 5
        assert isinstance(refusals[0], AdapterLoading)
        assert refusals[0].retry_after_s
        assert store.loading() == ["run_a@1"]
        slow.may_answer.set()
        for _ in range(500):
            if store.is_here(ref):
                break
            await asyncio.sleep(0.01)
        async with in_use(store, ref) as lora:
            assert lora.lora_int_id == 1
        assert store.loading() == []
        assert set(slow.asked.values()) == {1}


async def test_bytes_that_nobody_comes_back_for_go(
    vllm: Vllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a while; until then an engine says that it is loading them."""
    monkeypatch.setenv(OPTIONS_VARIABLE, OPTIONS)
    monkeypatch.setattr("river_engine.adapters.ADAPTER_KEPT_S", 0.2)
    store = make_store(vllm, tmp_path, wait_s=0.05)
    written(tmp_path, "run_a@1")
    with slow_store(tmp_path / "source") as slow:
        with pytest.raises(AdapterLoading):
            await store.preload(AdapterRef(name="run_a@1", location=f"{slow.url}/run_a@1"))
        slow.may_answer.set()
        for _ in range(500):
            if not store.loading():
                break
            await asyncio.sleep(0.01)
    assert store.resident() == store.loading() == []
    assert not any(path.is_dir() for path in (tmp_path / "versions").iterdir())


async def test_nobody_waits_for_ever_for_vllm(vllm: Vllm, tmp_path: Path) -> None:
    """Who cannot wait for the load is told so; it goes on, and is there for the next one."""
    store = make_store(vllm, tmp_path, wait_s=0.05)
    ref = written(tmp_path, "run_a@1")
    vllm.may_load.clear()
    with pytest.raises(AdapterLoading, match="to be loaded"):
        async with in_use(store, ref):
            pass
    vllm.may_load.set()
    async with in_use(store, ref):
        assert vllm.loads == 1


async def test_a_new_process_loads_what_the_old_one_had(vllm: Vllm, tmp_path: Path) -> None:
    """From its own directory, whose other contents it clears away."""
    old = make_store(vllm, tmp_path)
    refs = [written(tmp_path, f"run_a@{step}") for step in (1, 2)]
    for ref in refs:
        await old.preload(ref)
        shutil.rmtree(source(ref))
    (tmp_path / "versions" / "77").mkdir()
    manifest = tmp_path / "versions" / "manifest.json"
    for _ in range(500):  # It is written while requests go on.
        if manifest.exists() and b"run_a@2" in manifest.read_bytes():
            break
        await asyncio.sleep(0.01)

    successor = Vllm()
    new = make_store(successor, tmp_path)
    await new.restore()

    assert new.resident() == ["run_a@1", "run_a@2"]
    assert sorted(request.lora_name for request in successor.loaded.values()) == [
        "run_a@1",
        "run_a@2",
    ]
    assert min(successor.loaded) > 77
    assert not (tmp_path / "versions" / "77").exists()


async def test_an_adapter_comes_from_an_object_store(
    vllm: Vllm, store: AdapterStore, tmp_path: Path, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From S3 with the options of the environment; one that is not there is told, and leaves nothing."""
    url = use_s3(s3, monkeypatch)
    local = source(written(tmp_path, "run_a@1"))
    files = {name: local / name for name in (CONFIG_FILE, WEIGHTS_FILE)}
    FileSets(url).write("checkpoints/ckpt_1", files, {})
    ref = AdapterRef(name="ckpt_1", location=f"{url}/checkpoints/ckpt_1")
    async with in_use(store, ref) as lora:
        loaded = Path(lora.lora_path) / WEIGHTS_FILE
        assert loaded.read_bytes() == files[WEIGHTS_FILE].read_bytes()
    for location in (f"{url}/checkpoints/ckpt_2", "s3://no-such-bucket/x"):
        with pytest.raises(AdapterNotFound):
            await store.preload(AdapterRef(name="ckpt_2", location=location))
    monkeypatch.setenv(OPTIONS_VARIABLE, "{")
    with pytest.raises(InvalidAdapter) as refusal:
        await store.preload(AdapterRef(name="ckpt_3", location=ref.location))
    assert url not in refusal.value.message
    assert store.resident() == ["ckpt_1"]
