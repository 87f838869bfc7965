"""Which adapters this engine holds, and who is using them.

An adapter version is immutable and so is everything about it here: a number of its own, a name of its own, a
directory of its own with its own hold on the bytes. That is what keeps vLLM honest: its prefix cache is keyed by
name and path, a second version under an old name kills it, and so does a request whose files are gone when its turn
comes. Nothing is ever loaded in place or pinned.

Whoever wants an adapter holds it first (`AdapterStore.hold`): it is fetched and checked once however many ask, and its
bytes stay while anybody holds it, and for a while after somebody could wait no longer. When a request's turn has come,
it is loaded (`AdapterStore.loaded`): vLLM has it from then on until the request is over. At most `resident_max` are
loaded, those in use among them, so that vLLM never drops one by itself; the least recently used makes room. What is
slow is done in threads, and what has begun is finished, whoever still wants it: neither a thread nor vLLM can be told
to forget a half of it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import shutil
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
from vllm.lora.request import LoRARequest
from vllm.v1.engine.exceptions import EngineDeadError

from river_engine.adapter_files import Target, check_adapter, fetch_adapter
from river_engine.errors import AdapterLoading, EngineBusy, EngineRefusal, InvalidAdapter
from river_engine.limits import (
    ADAPTER_KEPT_S,
    ADAPTER_RETRY_AFTER_S,
    ADAPTER_WAIT_S,
    PRELOAD_INTEREST_S,
    PRELOAD_RUNS_MAX,
)
from river_engine.load_times import RecentLoads
from river_engine.protocol import AdapterRef, HeldAdapter
from river_engine.shared_experts import shared_directory, write_shared

_log = logging.getLogger("river.engine")
_MANIFEST = "manifest.json"


class LoraEngine(Protocol):
    """The part of vLLM's AsyncLLM that the store needs."""

    async def add_lora(self, lora_request: LoRARequest) -> bool: ...

    async def remove_lora(self, lora_id: int) -> bool: ...


@dataclass(slots=True, eq=False)
class Version:
    """One adapter of this engine. `holders` need its bytes, `users` its weights in vLLM.

    `loaded_at` and `used_at` are Unix times in seconds.
    """

    ref: AdapterRef
    request: LoRARequest
    directory: Path
    holders: int = 0
    users: int = 0
    fetched: bool = False
    resident: bool = False
    loaded_at: float = 0.0
    used_at: float = 0.0
    failure: EngineRefusal | None = None
    work: asyncio.Task[None] | None = None
    keeping: asyncio.Task[None] | None = None


class _ManifestEntry(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    location: str
    directory: str


class AdapterStore:
    """The adapters of one engine process; `directory` outlives the process, see `restore`.

    Nobody waits longer than `wait_s` for an adapter to be fetched, nor for it to be loaded.
    """

    def __init__(
        self,
        engine: LoraEngine,
        directory: Path,
        targets: dict[str, Target],
        *,
        max_loras: int,
        resident_max: int,
        rank_max: int,
        wait_s: float = ADAPTER_WAIT_S,
        shared_experts: bool = False,
    ) -> None:
        assert resident_max >= max_loras >= 1
        self._engine = engine
        self._directory = directory
        self._targets = targets
        self._max_loras = max_loras
        self._resident_max = resident_max
        self._rank_max = rank_max
        self._wait_s = wait_s
        self._shared_experts = shared_experts
        self.times = RecentLoads()
        self._numbers = itertools.count(1)
        # Least recently used first.
        self._versions: dict[str, Version] = {}
        # vLLM loads one after another anyway.
        self._loading = asyncio.Lock()
        self._manifest_old = False
        self._manifest_writing: asyncio.Task[None] | None = None
        # Until when (monotonic time) new versions of a run are wanted; the oldest entry first.
        self._wanted_until: OrderedDict[str, float] = OrderedDict()

    def resident(self) -> list[str]:
        """Names of the adapters that are loaded, least recently used first."""
        return [name for name, version in self._versions.items() if version.resident]

    def held(self) -> list[HeldAdapter]:
        """The adapters that are loaded, least recently used first, and since when."""
        return [
            HeldAdapter(name=name, loaded_at=version.loaded_at, used_at=version.used_at)
            for name, version in self._versions.items()
            if version.resident
        ]

    def loading(self) -> list[str]:
        """Names of those that somebody waits for, or has just stopped waiting for."""
        return [
            name
            for name, version in self._versions.items()
            if version.holders and not version.resident
        ]

    @asynccontextmanager
    async def hold(self, ref: AdapterRef) -> AsyncIterator[Version]:
        """The version of `ref`, found fit, whose bytes are here while the block runs.

        Raises:
            EngineRefusal: the adapter is missing or unfit.
            AdapterLoading: it takes too long to get it.
        """
        self._want(ref, PRELOAD_INTEREST_S)
        async with self._held(ref) as version:
            yield version

    @asynccontextmanager
    async def loaded(self, version: Version) -> AsyncIterator[LoRARequest]:
        """What to give vLLM for requests to a held version; valid while the block runs.

        At most `max_loras` versions at a time may be in such blocks: then vLLM has room for all of them.

        Raises:
            EngineRefusal: vLLM refuses the adapter, or is going down.
            AdapterLoading: vLLM takes too long to load it.
        """
        assert version.holders
        version.users += 1
        try:
            await self._done(version, lambda: version.resident, self._load, "loaded")
            self._touch(version)
            yield version.request
        finally:
            version.users -= 1

    def is_wanted(self, ref: AdapterRef) -> bool:
        """Whether a version that has just been announced is worth loading before anybody asks.

        It is while its run is asked for here, and once before that: loading every version of every run in training
        would cost the engine's time, and drive out what is used.
        """
        wanted_until = self._wanted_until.get(_run_of(ref))
        if wanted_until is None:
            self._want(ref, 0.0)
            return True
        return time.monotonic() < wanted_until

    def _want(self, ref: AdapterRef, for_s: float) -> None:
        run = _run_of(ref)
        self._wanted_until[run] = time.monotonic() + for_s
        self._wanted_until.move_to_end(run)
        while len(self._wanted_until) > PRELOAD_RUNS_MAX:
            self._wanted_until.popitem(last=False)

    async def preload(self, ref: AdapterRef) -> None:
        """Loads `ref` before anybody asks, unless that would push one in use out of vLLM's batches.

        Raises:
            EngineRefusal: as `hold` and `loaded`.
        """
        if self._slots_used() >= self._max_loras:
            return
        async with self._held(ref) as version:
            if not version.resident:
                await self._working(version, self._load)
            if version.failure is not None:
                raise version.failure
            self._touch(version)

    async def restore(self) -> None:
        """Loads again what an earlier process of this engine had loaded, and clears away the rest of its directory."""
        self._directory.mkdir(parents=True, exist_ok=True)
        entries = self._read_manifest()
        kept = {entry.directory for entry in entries}
        found = [child for child in self._directory.iterdir() if child.name.isdecimal()]
        # Numbers go on where the earlier process stopped: no directory is used for two versions.
        self._numbers = itertools.count(max((int(child.name) for child in found), default=0) + 1)
        for child in found:
            if child.name not in kept:
                shutil.rmtree(child)
        for entry in entries[-self._resident_max :]:
            ref = AdapterRef(name=entry.name, location=entry.location)
            directory = self._directory / entry.directory
            self._new_version(ref, directory if directory.exists() else None)
            try:
                await self.preload(ref)
            except EngineRefusal as error:
                _log.warning(
                    "adapter not restored", extra={"adapter": ref.name, "reason": error.message}
                )
        self._manifest_is_old()

    # ---- Bytes -------------------------------------------------------------------------------------------------------

    def is_here(self, ref: AdapterRef) -> bool:
        """Whether holding it takes no time."""
        version = self._versions.get(ref.name)
        return version is not None and version.fetched

    @asynccontextmanager
    async def _held(self, ref: AdapterRef) -> AsyncIterator[Version]:
        version = self._versions.get(ref.name) or self._new_version(ref)
        version.holders += 1
        try:
            await self._done(version, lambda: version.fetched, self._fetch, "fetched")
            yield version
        finally:
            version.holders -= 1
            await self._forget_unless_needed(version)

    async def _fetch(self, version: Version) -> None:
        started = time.monotonic()
        if not version.directory.exists():
            await fetch_adapter(version.ref.location, version.directory)
        await asyncio.to_thread(
            check_adapter, version.directory, self._targets, rank_max=self._rank_max
        )
        if self._shared_experts:
            await asyncio.to_thread(write_shared, version.directory, self._targets)
        version.fetched = True
        self.times.fetched(time.monotonic() - started)

    async def _done(
        self,
        version: Version,
        is_done: Callable[[], bool],
        work: Callable[[Version], Awaitable[None]],
        done: str,
    ) -> None:
        """Has `work` done on a held version, which is `done` then, once however many ask.

        Raises:
            EngineRefusal: it failed.
            AdapterLoading: it takes longer than anybody waits here; it goes on.
        """
        if is_done():
            return
        bound = asyncio.timeout(self._wait_s)
        try:
            async with bound:
                while not is_done():
                    if version.failure is not None:
                        raise version.failure
                    await self._working(version, work)
        except TimeoutError:
            if not bound.expired():
                raise
            self._keep(version)
            raise AdapterLoading(
                f"waited {self._wait_s:g} s for adapter {version.ref.name} to be {done}, which goes on; try again",
                retry_after_s=ADAPTER_RETRY_AFTER_S,
            ) from None

    async def _working(self, version: Version, work: Callable[[Version], Awaitable[None]]) -> None:
        """Starts `work` unless some is being done, and waits for its end."""
        if version.work is None:
            version.work = asyncio.create_task(self._work(version, work))
        await asyncio.shield(version.work)

    async def _work(self, version: Version, work: Callable[[Version], Awaitable[None]]) -> None:
        version.holders += 1
        try:
            await work(version)
        except EngineRefusal as error:
            self._fail(version, error)
        finally:
            version.work = None
            version.holders -= 1
            await self._forget_unless_needed(version)

    def _keep(self, version: Version) -> None:
        """Keeps a version that is still being worked on for those who come back for it."""
        if version.keeping is None:
            version.keeping = asyncio.create_task(self._kept(version))

    async def _kept(self, version: Version) -> None:
        version.holders += 1
        try:
            while version.work is not None:
                await asyncio.wait([version.work])
            if version.failure is None:
                await asyncio.sleep(ADAPTER_KEPT_S)
        finally:
            version.keeping = None
            version.holders -= 1
            await self._forget_unless_needed(version)

    def _fail(self, version: Version, error: EngineRefusal) -> None:
        """Remembers why a version cannot be used, for those who have it already; others get a new one."""
        _log.warning(
            "adapter refused",
            extra={
                "adapter": version.ref.name,
                "location": version.ref.location,
                "reason": f"{error.message}; {error.__cause__!r}",
            },
        )
        version.failure = type(error)(f"adapter {version.ref.name}: {error.message}")
        version.failure.__cause__ = error
        if self._versions.get(version.ref.name) is version:
            del self._versions[version.ref.name]

    def _new_version(self, ref: AdapterRef, directory: Path | None = None) -> Version:
        number = next(self._numbers)
        directory = directory or self._directory / str(number)
        shared = self._shared_experts
        request = LoRARequest(
            lora_name=ref.name,
            lora_int_id=number,
            lora_path=str(shared_directory(directory) if shared else directory),
            is_3d_lora_weight=not shared,
        )
        version = Version(ref, request, directory)
        self._versions[ref.name] = version
        return version

    async def _forget_unless_needed(self, version: Version) -> None:
        """Lets go of the bytes of a version that nobody holds and vLLM does not have."""
        if version.holders or version.resident:
            return
        if self._versions.get(version.ref.name) is version:
            del self._versions[version.ref.name]
        await asyncio.to_thread(shutil.rmtree, version.directory, ignore_errors=True)

    def _touch(self, version: Version) -> None:
        version.used_at = time.time()
        if self._versions.get(version.ref.name) is version:
            self._versions[version.ref.name] = self._versions.pop(version.ref.name)

    # ---- Weights in vLLM ---------------------------------------------------------------------------------------------

    async def _load(self, version: Version) -> None:
        async with self._loading:
            started = time.monotonic()
            if not await self._make_room(version):
                return
            await self._add(version)
            version.resident = True
            version.loaded_at = version.used_at = time.time()
            self.times.loaded(time.monotonic() - started)
            _log.info("adapter loaded", extra={"adapter": version.ref.name})
            self._manifest_is_old()

    async def _add(self, version: Version) -> None:
        try:
            await self._engine.add_lora(version.request)
        except EngineDeadError as error:
            raise EngineBusy("the engine is going down") from error
        except Exception as error:  # vLLM hands the errors of its core over as these.
            reason = str(error).replace(str(version.directory), "its directory")
            raise InvalidAdapter(f"vLLM refuses it: {reason[:500]}") from error

    async def _make_room(self, version: Version) -> bool:
        """Takes the least recently used out of vLLM; whether `version` can go in, which it can if it is to be used."""
        resident = [other for other in self._versions.values() if other.resident]
        excess = max(0, len(resident) + 1 - self._resident_max)
        idle = [other for other in resident if not other.users]
        if excess > len(idle):
            assert not version.users, "more versions in use than there are slots"
            return False
        for other in idle[:excess]:
            other.resident = False
            try:
                await self._engine.remove_lora(other.request.lora_int_id)
            except EngineDeadError as error:
                raise EngineBusy("the engine is going down") from error
            await self._forget_unless_needed(other)
        return True

    def _slots_used(self) -> int:
        return sum(version.users > 0 for version in self._versions.values())

    # ---- What a successor finds --------------------------------------------------------------------------------------

    def _manifest_is_old(self) -> None:
        """Has it written anew, without anybody waiting for the disk."""
        self._manifest_old = True
        if self._manifest_writing is None:
            self._manifest_writing = asyncio.create_task(self._write_manifest())

    async def _write_manifest(self) -> None:
        try:
            while self._manifest_old:
                self._manifest_old = False
                entries = [
                    _ManifestEntry(
                        name=name, location=version.ref.location, directory=version.directory.name
                    )
                    for name, version in self._versions.items()
                    if version.resident
                ]
                await asyncio.to_thread(self._replace_manifest, msgspec.json.encode(entries))
        except OSError as error:
            _log.warning("adapter manifest not written", extra={"reason": str(error)})
        finally:
            self._manifest_writing = None

    def _replace_manifest(self, content: bytes) -> None:
        temporary = self._directory / f"{_MANIFEST}.new"
        temporary.write_bytes(content)
        temporary.replace(self._directory / _MANIFEST)

    def _read_manifest(self) -> list[_ManifestEntry]:
        try:
            return msgspec.json.decode(
                (self._directory / _MANIFEST).read_bytes(), type=list[_ManifestEntry]
            )
        except FileNotFoundError:
            return []
        except msgspec.DecodeError as error:
            _log.warning("adapter manifest unreadable", extra={"reason": str(error)})
            return []


def _run_of(ref: AdapterRef) -> str:
    """What the versions `run@1`, `run@2`… have in common."""
    return ref.name.rpartition("@")[0] or ref.name
