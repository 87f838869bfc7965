"""Which adapters this engine holds, and who is using them.

An adapter version is immutable and so is everything about it here: a number of its own, a name of its own, a
directory of its own with its own hold on the bytes. That is what keeps vLLM honest: its prefix cache is keyed by
name and path, a second version under an old name kills it, and so does a request whose files are gone when its turn
comes. Nothing is ever loaded in place or pinned.

`AdapterStore.hold` is the one door: it fetches, checks and loads an adapter once however many ask for it, keeps its
bytes while anybody uses it, lets at most `max_loras` different ones into vLLM's batches at a time, and forgets the
least recently used when there are too many.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import shutil
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec
from vllm.lora.request import LoRARequest
from vllm.v1.engine.exceptions import EngineDeadError

from river_engine.adapter_files import Target, check_adapter, fetch_adapter
from river_engine.errors import EngineBusy, EngineRefusal, InvalidAdapter
from river_engine.limits import ADAPTER_WAITERS_MAX, PRELOAD_INTEREST_S, PRELOAD_RUNS_MAX
from river_engine.protocol import AdapterRef
from river_engine.shared_experts import shared_directory, write_shared

_log = logging.getLogger("river.engine")
_MANIFEST = "manifest.json"


class LoraEngine(Protocol):
    """The part of vLLM's AsyncLLM that the store needs."""

    async def add_lora(self, lora_request: LoRARequest) -> bool: ...

    async def remove_lora(self, lora_id: int) -> bool: ...


@dataclass(slots=True)
class _Version:
    ref: AdapterRef
    request: LoRARequest
    directory: Path
    holders: int = 0
    resident: bool = False
    failure: EngineRefusal | None = None
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)


class _ManifestEntry(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    location: str
    directory: str


class AdapterGate:
    """Lets at most `distinct_max` different adapters in at a time, strictly in the order of asking.

    vLLM's scheduler passes over requests whose adapter does not fit, for as long as those inside keep coming;
    waiting in line here instead means that nobody starves.
    """

    def __init__(self, distinct_max: int) -> None:
        self._distinct_max = distinct_max
        self._inside: dict[str, int] = {}
        self._line: deque[tuple[str, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def enter(self, name: str) -> AsyncIterator[None]:
        """Inside while the block runs.

        Raises:
            EngineBusy: too many are waiting.
        """
        if not self._line and self._fits(name):
            self._inside[name] = self._inside.get(name, 0) + 1
        else:
            await self._wait(name)
        try:
            yield
        finally:
            self._leave(name)

    def _fits(self, name: str) -> bool:
        return name in self._inside or len(self._inside) < self._distinct_max

    async def _wait(self, name: str) -> None:
        if len(self._line) >= ADAPTER_WAITERS_MAX:
            raise EngineBusy(f"{ADAPTER_WAITERS_MAX} requests wait for an adapter slot")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (name, turn)
        self._line.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # Let in at the very moment of giving up.
                self._leave(name)
            else:
                self._line.remove(entry)
                self._admit()
            raise

    def _leave(self, name: str) -> None:
        self._inside[name] -= 1
        if self._inside[name] == 0:
            del self._inside[name]
        self._admit()

    def _admit(self) -> None:
        while self._line and self._fits(self._line[0][0]):
            name, turn = self._line.popleft()
            if turn.cancelled():  # Its owner is about to clean up, and is no longer in line.
                continue
            self._inside[name] = self._inside.get(name, 0) + 1
            turn.set_result(None)


class AdapterStore:
    """The adapters of one engine process; `directory` outlives the process, see `restore`."""

    def __init__(
        self,
        engine: LoraEngine,
        directory: Path,
        targets: dict[str, Target],
        *,
        max_loras: int,
        resident_max: int,
        rank_max: int,
        shared_experts: bool = False,
    ) -> None:
        assert resident_max >= max_loras >= 1
        self._engine = engine
        self._directory = directory
        self._targets = targets
        self._resident_max = resident_max
        self._rank_max = rank_max
        self._shared_experts = shared_experts
        self._gate = AdapterGate(max_loras)
        self._numbers = itertools.count(1)
        # Least recently used first.
        self._versions: dict[str, _Version] = {}
        # Until when (monotonic time) new versions of a run are wanted; the oldest entry first.
        self._wanted_until: OrderedDict[str, float] = OrderedDict()

    def resident(self) -> list[str]:
        """Names of the adapters that are loaded, least recently used first."""
        return [name for name, version in self._versions.items() if version.resident]

    @asynccontextmanager
    async def hold(self, ref: AdapterRef) -> AsyncIterator[LoRARequest]:
        """What to give vLLM for requests to `ref`; valid, and its turn come, while the block runs.

        Raises:
            EngineRefusal: the adapter is missing or unfit, or too many wait.
        """
        self._want(ref, PRELOAD_INTEREST_S)
        async with self._held(ref) as version, self._gate.enter(ref.name):
            yield version.request

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
        """Loads `ref` before anybody asks.

        Raises:
            EngineRefusal: as `hold`.
        """
        async with self._held(ref):
            pass

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
            version = self._new_version(ref, self._directory / entry.directory)
            try:
                await self._load_or_drop(version)
            except EngineRefusal as error:
                _log.warning(
                    "adapter not restored", extra={"adapter": ref.name, "reason": error.message}
                )
        self._write_manifest()

    @asynccontextmanager
    async def _held(self, ref: AdapterRef) -> AsyncIterator[_Version]:
        version = self._versions.get(ref.name) or self._new_version(ref)
        version.holders += 1
        try:
            # Whoever comes first loads; if it is cancelled, the next in line does.
            async with version.loading:
                if version.failure is not None:
                    raise version.failure
                if not version.resident:
                    await self._load_or_drop(version)
            self._touch(version)
            yield version
        finally:
            version.holders -= 1
            await self._evict()

    async def _load_or_drop(self, version: _Version) -> None:
        try:
            if not version.directory.exists():
                await fetch_adapter(version.ref.location, version.directory)
            await self._load(version)
        except EngineRefusal as error:
            _log.warning(
                "adapter refused",
                extra={
                    "adapter": version.ref.name,
                    "location": version.ref.location,
                    "reason": f"{error.message}; {error.__cause__!r}",
                },
            )
            version.failure = type(error)(f"adapter {version.ref.name}: {error.message}")
            await self._drop(version)
            raise version.failure from error
        except asyncio.CancelledError:
            # A half-fetched directory must not look like a whole one to whoever is next.
            shutil.rmtree(version.directory, ignore_errors=True)
            raise
        self._write_manifest()
        _log.info("adapter loaded", extra={"adapter": version.ref.name})

    def _new_version(self, ref: AdapterRef, directory: Path | None = None) -> _Version:
        number = next(self._numbers)
        directory = directory or self._directory / str(number)
        shared = self._shared_experts
        request = LoRARequest(
            lora_name=ref.name,
            lora_int_id=number,
            lora_path=str(shared_directory(directory) if shared else directory),
            is_3d_lora_weight=not shared,
        )
        version = _Version(ref, request, directory)
        self._versions[ref.name] = version
        return version

    async def _load(self, version: _Version) -> None:
        check_adapter(version.directory, self._targets, rank_max=self._rank_max)
        if self._shared_experts:
            await asyncio.to_thread(write_shared, version.directory, self._targets)
        try:
            await self._engine.add_lora(version.request)
        except EngineDeadError as error:
            raise EngineBusy("the engine is going down") from error
        except Exception as error:  # vLLM hands the errors of its core over as these.
            reason = str(error).replace(str(version.directory), "its directory")
            raise InvalidAdapter(f"vLLM refuses it: {reason[:500]}") from error
        version.resident = True

    async def _evict(self) -> None:
        """Forgets least recently used versions that nobody holds, down to the bound."""
        idle = [
            version
            for version in self._versions.values()
            if version.resident and not version.holders
        ]
        excess = len(self.resident()) - self._resident_max
        if excess <= 0 or not idle:
            return
        for version in idle[:excess]:
            await self._drop(version)
        self._write_manifest()

    async def _drop(self, version: _Version) -> None:
        """Forgets a version, so that whoever asks next gets a new one, then lets go of its weights and files."""
        version.resident = False
        if self._versions.get(version.ref.name) is version:
            del self._versions[version.ref.name]
        try:
            await self._engine.remove_lora(version.request.lora_int_id)
        except EngineDeadError as error:
            _log.warning(
                "adapter not removed", extra={"adapter": version.ref.name, "reason": str(error)}
            )
        shutil.rmtree(version.directory, ignore_errors=True)

    def _touch(self, version: _Version) -> None:
        if self._versions.pop(version.ref.name, None) is not None:
            self._versions[version.ref.name] = version

    def _write_manifest(self) -> None:
        entries = [
            _ManifestEntry(
                name=name, location=version.ref.location, directory=version.directory.name
            )
            for name, version in self._versions.items()
            if version.resident
        ]
        temporary = self._directory / f"{_MANIFEST}.new"
        temporary.write_bytes(msgspec.json.encode(entries))
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
