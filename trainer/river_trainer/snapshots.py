"""Snapshots of runs in the checkpoint store, so that the journal need not be kept for ever.

`snapshots/<base>/<run>/<seq>` holds a run as it was after operation `seq`, a pending gradient included. The newest
complete one counts; older ones are removed once it is there.
"""

from __future__ import annotations

import msgspec
from safetensors.torch import load, save

from river_engine.protocol import subject_token
from river_trainer.adapter import FlatTensors, adapter_from
from river_trainer.errors import CorruptError, InvalidTaskError, RunLostError, StoreError
from river_trainer.optimizer import STATE_FILE, AdamState
from river_trainer.peft_files import import_adapter
from river_trainer.protocol import TaskError
from river_trainer.runs import FailedRun, Run
from river_trainer.sites import Site
from river_trainer.store import FileSets

_GRADIENT_FILE = "gradient.safetensors"
_GRADIENT_NAME = "gradient"


class _Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a snapshot's manifest says; `failure` is the error of a `FailedRun`, as JSON."""

    last_seq: int
    step: int = 0
    seed: int = 0
    failure: str | None = None


class Snapshots:
    """The snapshots of one base model's runs. Blocking; for the worker thread."""

    def __init__(self, store: FileSets, base_model: str) -> None:
        self._store = store
        self._root = f"snapshots/{subject_token(base_model)}"
        self._base_model = base_model

    def newest(self) -> dict[str, int]:
        """Every run that has a snapshot, and the newest operation in it.

        Raises:
            StoreError: the store does not say.
        """
        found: dict[str, int] = {}
        for run_id in self._store.folders(self._root):
            for seq in sorted(self._sequences(run_id), reverse=True):
                if self._store.exists(f"{self._root}/{run_id}/{seq}"):
                    found[run_id] = seq
                    break
        return found

    def write(self, run: Run | FailedRun) -> None:
        """Stores a run and then removes its older snapshots.

        Raises:
            StoreError: the store refuses; the older ones still count.
        """
        if isinstance(run, FailedRun):
            failure = msgspec.json.encode(run.error).decode()
            files, facts = {}, _Facts(last_seq=run.last_seq, failure=failure)
        else:
            files = run.files(base_model=self._base_model, optimizer=True)
            if run.gradient is not None:
                run.gradient.wait()
                files[_GRADIENT_FILE] = save({_GRADIENT_NAME: run.gradient.flat})
            seed = run.adapter.shape.seed
            facts = _Facts(last_seq=run.last_seq, step=run.step, seed=seed)
        folder = f"{self._root}/{run.run_id}/{run.last_seq}"
        self._store.write(folder, files, msgspec.to_builtins(facts))
        if isinstance(run, FailedRun):
            # Whatever is left of it may still help people who look for it.
            return
        for seq in self._sequences(run.run_id):
            if seq < run.last_seq:
                self._store.remove(f"{self._root}/{run.run_id}/{seq}")

    def load(self, run_id: str, sites: tuple[Site, ...]) -> Run | FailedRun | None:
        """The run as its newest complete snapshot has it, None if there is none.

        Raises:
            StoreError: the store does not give it.
            InvalidTaskError: it was made with another base model.
        """
        for seq in sorted(self._sequences(run_id), reverse=True):
            found = self._store.read(f"{self._root}/{run_id}/{seq}")
            if found is None:
                continue
            manifest, files = found
            facts = msgspec.convert(manifest.facts, _Facts)
            if facts.failure is not None:
                error = msgspec.json.decode(facts.failure, type=TaskError)
                return FailedRun(run_id, error, facts.last_seq)
            return _restore(run_id, sites, files, facts)
        return None

    def load_at(self, run_id: str, sites: tuple[Site, ...], newest_seq: int) -> Run | FailedRun:
        """The run as the snapshot after operation `newest_seq` has it, which was there.

        Raises:
            StoreError: the store does not answer.
            RunLostError: the snapshot is gone, damaged, or of another base model.
        """
        try:
            run = self.load(run_id, sites)
        except (CorruptError, InvalidTaskError) as error:
            raise RunLostError(f"its snapshot cannot be used: {error}") from error
        if run is None:
            raise RunLostError("its snapshot is gone")
        if run.last_seq < newest_seq:
            # The journal was trimmed up to the newest one.
            raise RunLostError(f"its snapshot after operation {newest_seq} is gone")
        assert run.last_seq == newest_seq, "another trainer has gone on writing"
        return run

    def _sequences(self, run_id: str) -> list[int]:
        return [int(name) for name in self._store.folders(f"{self._root}/{run_id}")]


def _restore(run_id: str, sites: tuple[Site, ...], files: dict[str, bytes], facts: _Facts) -> Run:
    shape, tensors = import_adapter(files, sites, seed=facts.seed)
    adapter = adapter_from(sites, shape, tensors)
    optimizer = AdamState.new(adapter.layout)
    if STATE_FILE not in files:
        raise StoreError(f"the snapshot of {run_id} has no optimizer state")
    optimizer.restore(files[STATE_FILE])
    gradient = None
    if _GRADIENT_FILE in files:
        gradient = FlatTensors(adapter.layout, load(files[_GRADIENT_FILE])[_GRADIENT_NAME])
    return Run(run_id, adapter, optimizer, facts.step, facts.last_seq, gradient)
