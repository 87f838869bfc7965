"""The gateway's process: settings, services, one web server, and a clean stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from typing import TYPE_CHECKING

import uvicorn
import uvloop
from nats.errors import NoServersError

from river_client.service import SettingsError, read_settings
from river_engine.stores import check_store
from river_gateway.app import create_app
from river_gateway.dialects.river_grpc.server import RiverServerError, river_server
from river_gateway.http_protocol import GatewayProtocol
from river_gateway.limits import GC_THRESHOLD, STOP_GRACE_S
from river_gateway.reload import reload_settings
from river_gateway.services import open_services
from river_gateway.settings import Settings

if TYPE_CHECKING:
    from socket import socket
    from types import FrameType

    from river_gateway.services import Services

logger = logging.getLogger("river.gateway")


def main() -> None:
    """Runs the gateway until SIGTERM or SIGINT."""
    try:
        settings = read_settings(Settings)
    except SettingsError as error:
        sys.exit(str(error))
    if settings.store_url and (problem := check_store(settings.store_url)):
        sys.exit(problem)
    if (settings.grpc_certificate is None) != (settings.grpc_key is None):
        sys.exit("RIVER_GRPC_CERTIFICATE and RIVER_GRPC_KEY: give both or neither")
    try:
        settings.usage_spool.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"RIVER_USAGE_SPOOL_DIR: {error}")
    # uvicorn raises the signal that stopped it once more when it is done; by then it has served its purpose.
    signal.signal(signal.SIGTERM, _ignore)
    signal.signal(signal.SIGINT, _ignore)
    # Requests leave no cycles behind: looking for some every 700 allocations would only cost time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
    try:
        uvloop.run(serve(settings))
    except NoServersError:
        sys.exit(f"no NATS server at {settings.nats_url}")
    except RiverServerError as error:
        sys.exit(f"RIVER_GRPC_PORT: {error}")


async def serve(settings: Settings) -> None:
    """Serves until told to stop, then lets answers in progress end within `STOP_GRACE_S`."""
    async with open_services(settings) as services:
        config = uvicorn.Config(
            create_app(services),
            host=settings.host,
            port=settings.port,
            http=GatewayProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # Nothing here asks for a client's address.
            timeout_graceful_shutdown=STOP_GRACE_S,
        )
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, reload_settings, services)
        logger.info("gateway on http://%s:%d", settings.host, settings.port)
        async with river_server(services, settings):
            await GatewayServer(config, services).serve()


class GatewayServer(uvicorn.Server):
    """Tells the services first, so that long polls end at once and do not use up the grace."""

    def __init__(self, config: uvicorn.Config, services: Services) -> None:
        super().__init__(config)
        self._services = services

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Called by uvicorn when it begins to stop."""
        self._services.stopping.set()
        await super().shutdown(sockets)


def _ignore(_signal: int, _frame: FrameType | None) -> None:
    pass


if __name__ == "__main__":
    main()
