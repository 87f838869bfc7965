"""Every RPC of the River dialect, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from river_gateway.dialects.river_grpc.refused import REFUSED_METHODS
from river_gateway.dialects.river_grpc.sessions import SESSION_METHODS

if TYPE_CHECKING:
    from river_gateway.dialects.river_grpc.call import Methods

METHODS: Methods = {**SESSION_METHODS, **REFUSED_METHODS}
