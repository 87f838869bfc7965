"""Sets of files, in a directory and on S3: whole or not there, and what is not as it was written says so."""

from __future__ import annotations

import itertools
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import obstore
import pytest
from support.s3 import S3, use_s3

from river_engine.stores import OPTIONS_VARIABLE, check_store, open_store
from river_trainer import limits
from river_trainer.errors import CorruptError, FullError, StoreError
from river_trainer.store import MANIFEST_FILE, FileSets, Manifest, read_location

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 100}
FACTS = {"step": 3, "base_model": "river/tiny-moe", "seed": None}


@pytest.fixture(params=["directory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store of either kind."""
    if request.param == "directory":
        return (tmp_path / "store").as_uri()
    s3: S3 = request.getfixturevalue("s3")
    return use_s3(s3, monkeypatch)


@pytest.fixture
def store(url: str) -> FileSets:
    return FileSets(url)


def test_what_is_written_is_read(store: FileSets) -> None:
    """Files and facts come back, by folder and by location, with their sizes and checksums."""
    size_bytes = store.write("checkpoints/a", FILES, FACTS)
    assert size_bytes == 2 + 25_600
    for found in (store.read("checkpoints/a"), read_location(store.location("checkpoints/a"))):
        assert found is not None
        manifest, files = found
        assert files == FILES
        assert manifest.facts == FACTS
        assert manifest.size_bytes == size_bytes
    assert store.manifest("checkpoints/a") == manifest
    assert store.exists("checkpoints/a")


def test_buffers_and_paths_are_written_as_they_are(store: FileSets, tmp_path: Path) -> None:
    """A view of memory and a file on disk are stored like bytes, also those of several parts."""
    big = os.urandom(12 * 1024 * 1024)
    path = tmp_path / "big"
    path.write_bytes(big)
    store.write("a", {"view": memoryview(bytearray(big)), "path": path, "empty": b""}, {})
    found = store.read("a")
    assert found is not None
    assert found[1] == {"view": big, "path": big, "empty": b""}


def test_what_is_not_there_is_none(store: FileSets, url: str) -> None:
    """Neither a store without anything nor one with other sets has it."""
    for folder in ("a", "checkpoints/a"):
        assert store.read(folder) is None
        assert store.manifest(folder) is None
        assert not store.exists(folder)
        store.remove(folder)
        store.write("checkpoints/b", FILES, {})
    assert read_location(f"{url}/elsewhere/a") is None


def test_an_interrupted_write_is_not_there(store: FileSets, url: str) -> None:
    """Files without their manifest do not exist, are listed as a folder, and can be written over."""
    raw = open_store(url)
    obstore.put(raw, "runs/1/adapter_model.safetensors", b"half")
    assert store.read("runs/1") is None
    assert not store.exists("runs/1")
    assert store.folders("runs") == ["1"]
    store.write("runs/1", FILES, {})
    found = store.read("runs/1")
    assert found is not None
    assert found[1] == FILES


def test_folders_are_listed_and_removed_one_by_one(store: FileSets, url: str) -> None:
    """Removing 1 leaves 10, and nothing of 1."""
    for name in ("1", "10", "2"):
        store.write(f"runs/{name}", FILES, {})
    assert sorted(store.folders("runs")) == ["1", "10", "2"]
    assert sorted(store.folders("")) == ["runs"]
    store.remove("runs/1")
    store.remove("runs/1")
    assert sorted(store.folders("runs")) == ["10", "2"]
    assert store.read("runs/1") is None
    assert store.read("runs/10") is not None
    listed = [item["path"] for page in obstore.list(open_store(url)) for item in page]
    assert len(listed) == 2 * (len(FILES) + 1)


Damage = Callable[[str, bytes], bytes | None]
DAMAGES: dict[str, tuple[str, Damage, str]] = {
    "a flipped bit": (
        "adapter_model.safetensors",
        lambda _, data: bytes([data[0] ^ 1]) + data[1:],
        "has other bytes than were written",
    ),
    "cut off": (
        "adapter_model.safetensors",
        lambda _, data: data[:-1],
        "has 25599 bytes instead of 25600",
    ),
    "gone": ("adapter_config.json", lambda *_: None, "is missing from its set"),
    "manifest": (MANIFEST_FILE, lambda _, data: data[:-2], "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_by_file(store: FileSets, url: str, damage: str) -> None:
    """A set that is not as it was written is corrupt, which is neither missing nor an absent store."""
    name, change, message = DAMAGES[damage]
    store.write("checkpoints/a", FILES, FACTS)
    raw = open_store(url)
    changed = change(name, bytes(obstore.get(raw, f"checkpoints/a/{name}").bytes()))
    if changed is None:
        obstore.delete(raw, f"checkpoints/a/{name}")
    else:
        obstore.put(raw, f"checkpoints/a/{name}", changed)
    with pytest.raises(CorruptError, match=f"checkpoints/a/{name} {message}"):
        store.read("checkpoints/a")
    # Writing it again mends it, though the manifest may be what it was.
    store.write("checkpoints/a", FILES, FACTS)
    found = store.read("checkpoints/a")
    assert found is not None
    assert found[1] == FILES


def test_other_files_take_the_place_of_a_set(store: FileSets, url: str) -> None:
    """After a set was replaced nothing of the old one is read."""
    store.write("a", FILES, {"step": 1})
    store.write("a", {"adapter_config.json": b"[]"}, {"step": 2})
    found = store.read("a")
    assert found is not None
    assert found[1] == {"adapter_config.json": b"[]"}
    assert found[0].facts == {"step": 2}


def test_sets_are_written_by_many_threads(store: FileSets) -> None:
    """Threads that write and read, some of them the same set, do not disturb each other."""

    def work(number: int) -> None:
        folder = f"checkpoints/{number % 5}"
        files = {"weights": bytes([number % 5]) * 100_000}
        store.write(folder, files, {})
        found = store.read(folder)
        assert found is not None
        assert found[1] == files

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(5)))
        list(threads.map(work, range(40)))
    assert sorted(store.folders("checkpoints")) == ["0", "1", "2", "3", "4"]


def test_a_reader_meets_the_old_set_or_the_new_one(tmp_path: Path) -> None:
    """While a set in a directory is replaced over and over, every read gives one of the two, whole."""
    store = FileSets(tmp_path.as_uri())
    sets = [{"one": bytes([kind]) * 50_000, "two": bytes([kind]) * 10} for kind in (1, 2)]
    store.write("a", sets[0], {})
    done = threading.Event()

    def replace() -> None:
        for files in itertools.islice(itertools.cycle(reversed(sets)), 40):
            store.write("a", files, {})
            time.sleep(0.005)
        done.set()

    writer = threading.Thread(target=replace)
    writer.start()
    seen: set[bytes] = set()
    while not done.is_set():
        found = store.read("a")
        assert found is not None
        assert found[1] in sets
        seen.add(found[1]["two"])
    writer.join()
    assert len(seen) == 2


@contextmanager
def files_no_larger_than(size_bytes: int) -> Iterator[None]:
    """A disk that takes no more of a file, as one that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_no_more_leaves_what_was_there(tmp_path: Path) -> None:
    """A write that fails in the middle says why, keeps the old set, and leaves nothing half-written."""
    store = FileSets(tmp_path.as_uri())
    store.write("a", FILES, {"step": 1})
    with (
        files_no_larger_than(10_000),
        pytest.raises(FullError, match="cannot store a: File too large"),
    ):
        store.write("a", {**FILES, "optimizer.safetensors": bytes(20_000)}, {"step": 2})
    found = store.read("a")
    assert found is not None
    assert found[0].facts == {"step": 1}
    assert not list((tmp_path / ".unfinished").iterdir())


def test_a_directory_that_is_gone_is_not_an_empty_store(tmp_path: Path) -> None:
    """A disk that is no longer mounted must not make every snapshot look lost."""
    root = tmp_path / "store"
    store = FileSets(root.as_uri())
    root.rmdir()
    for look in (store.read, store.exists, store.folders, store.manifest, store.remove):
        with pytest.raises(StoreError):
            look("a")


def test_leftovers_of_killed_processes_are_cleared(tmp_path: Path) -> None:
    """Old half-written sets go when a store is opened; young ones may be in the making."""
    for name, age_s in (("old", limits.STORE_UNFINISHED_MAX_AGE_S + 60), ("young", 0.0)):
        path = tmp_path / ".unfinished" / name
        path.mkdir(parents=True)
        os.utime(path, times=(time.time() - age_s, time.time() - age_s))
    FileSets(tmp_path.as_uri())
    assert [path.name for path in (tmp_path / ".unfinished").iterdir()] == ["young"]


def test_a_bucket_that_is_gone_is_not_an_empty_store(
    s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No bucket is a store that does not answer, not a set that does not exist."""
    bucket = urlsplit(use_s3(s3, monkeypatch)).netloc
    store = FileSets(f"s3://{bucket}-gone/river")
    for look in (store.read, store.exists, store.folders, store.manifest, store.remove):
        with pytest.raises(StoreError) as problem:
            look("a")
        assert not isinstance(problem.value, CorruptError)
    with pytest.raises(StoreError, match="cannot store a"):
        store.write("a", FILES, {})


def test_a_server_that_is_gone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that does not answer is an error within its limits, in one line."""
    options = {"endpoint": "http://127.0.0.1:9", "allow_http": "true", "region": "x"}
    keys = {"access_key_id": "a", "secret_access_key": "b"}
    monkeypatch.setenv(OPTIONS_VARIABLE, msgspec.json.encode(options | keys).decode())
    with pytest.raises(StoreError, match="cannot read a: ") as problem:
        FileSets("s3://bucket/river").read("a")
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ('{"endpoint": 5}', f"{OPTIONS_VARIABLE} is not a JSON object of texts"),
        ('{"nonsense": "5"}', "'nonsense' is not valid"),
    ],
    ids=["type", "key"],
)
def test_wrong_options_are_told(
    monkeypatch: pytest.MonkeyPatch, options: str, message: str
) -> None:
    """A store with options that mean nothing cannot be opened."""
    monkeypatch.setenv(OPTIONS_VARIABLE, options)
    with pytest.raises(StoreError, match=message):
        FileSets("s3://bucket/river")
    problem = check_store("s3://bucket/river")
    assert problem is not None
    assert message in problem
    assert "\n" not in problem


def test_the_usual_variables_of_aws_are_enough(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials and endpoint come from the standard environment where there is no `RIVER_STORE_OPTIONS`."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3.endpoint,
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    store = FileSets(f"s3://{s3.new_bucket()}/deep/down")
    store.write("a", FILES, FACTS)
    assert isinstance(store.manifest("a"), Manifest)
