"""Every RPC of the River dialect, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from river_gateway.dialects.river_grpc.chat import CHAT_METHODS
from river_gateway.dialects.river_grpc.models import MODEL_METHODS
from river_gateway.dialects.river_grpc.refused import REFUSED_METHODS
from river_gateway.dialects.river_grpc.results import RESULT_METHODS
from river_gateway.dialects.river_grpc.sampling import SAMPLING_METHODS
from river_gateway.dialects.river_grpc.sessions import SESSION_METHODS
from river_gateway.dialects.river_grpc.training import TRAINING_METHODS
from river_gateway.dialects.river_grpc.uploads import UPLOAD_METHODS

if TYPE_CHECKING:
    from river_gateway.dialects.river_grpc.call import Methods

METHODS: Methods = {
    **SESSION_METHODS,
    **MODEL_METHODS,
    **TRAINING_METHODS,
    **UPLOAD_METHODS,
    **SAMPLING_METHODS,
    **CHAT_METHODS,
    **RESULT_METHODS,
    **REFUSED_METHODS,
}
