"""Policy versions as adapter directories that engines load: `<directory>/<run>/<step>/`.

A directory appears whole, by renaming, and never changes. The last few of a run are kept.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from river_engine.protocol import AdapterRef
from river_trainer.adapter import Adapter
from river_trainer.limits import VERSIONS_KEPT
from river_trainer.peft_files import export_adapter
from river_trainer.protocol import LiveVersion, policy_version


class Versions:
    """The adapter directories of one trainer. Blocking; for worker threads."""

    def __init__(self, directory: Path, *, base_model: str) -> None:
        self._directory = directory
        self._base_model = base_model
        directory.mkdir(parents=True, exist_ok=True)

    def live(self, run_id: str, step: int) -> LiveVersion:
        """What a version is called and where it lies (or would lie)."""
        location = self._path(run_id, step).as_uri()
        adapter = AdapterRef(name=policy_version(run_id, step), location=location)
        return LiveVersion(run_id=run_id, step=step, adapter=adapter)

    def exists(self, run_id: str, step: int) -> bool:
        return self._path(run_id, step).exists()

    def write(self, run_id: str, step: int, adapter: Adapter) -> LiveVersion:
        """Writes a version of a run, unless it is there already, and removes old ones.

        Other factors of the same version, which a new run can load at step 0, compute the same: nothing.

        Several threads may write versions of several runs; those of one run come one after another.

        Raises:
            OSError: the disk refuses; nothing half-written can be seen.
        """
        target = self._path(run_id, step)
        if not target.exists():
            unfinished = target.parent / f".{step}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            files = export_adapter(adapter, base_model=self._base_model)
            for name, data in files.items():
                (unfinished / name).write_bytes(data)
            unfinished.rename(target)
        self._remove_before(run_id, step - VERSIONS_KEPT + 1)
        return self.live(run_id, step)

    def _remove_before(self, run_id: str, step: int) -> None:
        for path in (self._directory / run_id).iterdir():
            if path.name.isdigit() and int(path.name) < step:
                # A directory that is being removed must not look like a whole one.
                leaving = path.parent / f".{path.name}.leaving"
                # A process that died while removing it has left some of it.
                shutil.rmtree(leaving, ignore_errors=True)
                with suppress(OSError):  # It is only room that it takes.
                    path.rename(leaving)
                    shutil.rmtree(leaving, ignore_errors=True)

    def _path(self, run_id: str, step: int) -> Path:
        return self._directory / run_id / str(step)
