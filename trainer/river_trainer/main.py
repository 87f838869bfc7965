"""The trainer process: `river serve trainer`; or one of several, `torchrun -m river_trainer.main`."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from river_client.service import SettingsError, health_server, read_settings
from river_engine.stores import check_store
from river_trainer import limits
from river_trainer.settings import TrainerSettings
from river_trainer.sharding.place import find_place

if TYPE_CHECKING:
    from river_trainer.service import Service

logger = logging.getLogger("river.trainer")

EXIT_AGAIN = 75
"""The trainer was told to end and to be started again, as an engine's server may be."""


def main() -> None:
    """Runs a trainer until SIGTERM or SIGINT, or until an admin has it started again (exit `EXIT_AGAIN`).

    Its settings come from the environment.
    """
    try:
        settings = read_settings(TrainerSettings)
    except SettingsError as error:
        sys.exit(str(error))
    if problem := check_store(settings.checkpoint_store_url()):
        sys.exit(problem)
    # Threads of OpenMP that spin while they wait take the processor from the engine beside us, and
    # from each other: with both cores busy a step takes ten times as long. Torch reads it when loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if find_place().leads:
        sys.exit(asyncio.run(_serve(settings)))
    else:
        # Imported here because torch has to be loaded after the environment is set.
        from river_trainer.sharding.member import follow  # noqa: PLC0415

        follow(settings)


async def _serve(settings: TrainerSettings) -> int:
    """The exit code."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    process = _Process(settings)
    async with health_server(
        settings.port, host=settings.host, ready=process.ready, metrics=process.metrics
    ):
        working = asyncio.create_task(process.work())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
        failed = working.done() and working.exception() is not None
        code = (1 if failed else EXIT_AGAIN) if working.done() else 0
        _bound_the_end(exit_code=code)
        stopping.cancel()
        working.cancel()
        try:
            await working
        except asyncio.CancelledError:
            logger.info("stopped")
    return code


class _Process:
    """The service while it is being made, and after."""

    def __init__(self, settings: TrainerSettings) -> None:
        self._settings = settings
        self._service: Service | None = None

    def ready(self) -> bool:
        return self._service is not None and self._service.ready

    def metrics(self) -> bytes:
        return b"" if self._service is None else self._service.metrics.page()

    async def work(self) -> None:
        """Loads the model, connects, serves. Ends when it is to be started again; else by cancellation or an error."""
        # Imported here because torch has to be loaded after main has set its environment.
        from river_trainer import assembly, journal  # noqa: PLC0415
        from river_trainer.service import Service  # noqa: PLC0415

        worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="torch")
        disk = ThreadPoolExecutor(max_workers=limits.IO_THREADS, thread_name_prefix="disk")
        store = ThreadPoolExecutor(max_workers=limits.IO_THREADS, thread_name_prefix="store")
        loop = asyncio.get_running_loop()
        try:
            parts = await loop.run_in_executor(worker, assembly.load, self._settings)
            client = await journal.connect(self._settings.nats_url)
            try:
                self._service = Service(self._settings, parts, client, worker, disk, store)
                await self._service.run()
            finally:
                await client.close()
                if parts.leader is not None:
                    await loop.run_in_executor(worker, parts.leader.end)
        finally:
            # The batch in hand ends in its own time; the journal has it in any case.
            worker.shutdown(wait=False, cancel_futures=True)
            for pool in (disk, store):
                pool.shutdown(wait=False, cancel_futures=True)


def _bound_the_end(exit_code: int) -> None:
    """Ends the process even if the worker thread is deep in a long pass."""
    timer = threading.Timer(limits.STOP_GRACE_S, os._exit, args=(exit_code,))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    main()
