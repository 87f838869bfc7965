"""Speaking the Tinker protocol by hand, where a test wants more than its SDK shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from support.gateway import Tenant
from support.stand_ins import BASE, PATIENCE_S

from river_gateway.dialects.tinker import messages_pb2 as pb

PROTOBUF = "application/x-protobuf"
LORA = {"rank": 4, "train_unembed": True, "train_mlp": True, "train_attn": True}


def tensor(values: Any, dtype: str = "float32") -> pb.Tensor:
    """A dense array as clients send it."""
    array = np.asarray(values, dtype=dtype)
    kind = pb.DTYPE_INT64 if dtype == "int64" else pb.DTYPE_FLOAT32
    return pb.Tensor(dense=array.tobytes(), dtype=kind, shape=array.shape)


def chunk(*tokens: int) -> pb.Chunk:
    """A piece of text."""
    data = np.asarray(tokens, dtype="<i4").tobytes()
    return pb.Chunk(encoded_text=pb.EncodedTextChunk(tokens=data))


def datum(*chunks: pb.Chunk, **inputs: pb.Tensor) -> pb.Datum:
    return pb.Datum(model_input=chunks, loss_fn_inputs=inputs)


def plain_datum(tokens: int = 4) -> pb.Datum:
    """Of `tokens` tokens, each to be followed by the next one."""
    return datum(
        chunk(*range(1, tokens + 1)),
        target_tokens=tensor(range(2, tokens + 2), "int64"),
        weights=tensor(np.ones(tokens)),
    )


def forward_backward(model: str, seq: int, *data: pb.Datum, **changes: Any) -> bytes:
    """The body of a forward_backward."""
    fields = {"loss_fn": "cross_entropy", "data": data or [plain_datum()]} | changes
    return pb.ForwardBackwardRequest(model_id=model, seq_id=seq, **fields).SerializeToString()


@dataclass
class TinkerUser:
    """A tenant who speaks the Tinker protocol."""

    tenant: Tenant

    async def get(self, route: str) -> httpx.Response:
        return await self.tenant.http.get(f"/api/v1{route}")

    async def request(self, method: str, route: str, body: Any = None) -> httpx.Response:
        return await self.tenant.http.request(
            method, f"/api/v1{route}", json=body or None, timeout=PATIENCE_S + 30
        )

    async def post(
        self, route: str, body: Any = None, *, content: bytes = b"", **headers: str
    ) -> httpx.Response:
        options: dict[str, Any] = {"content": content} if body is None else {"json": body}
        # Clients claim to send JSON even where they send nothing.
        sent = {"content-type": "application/json"}
        sent |= {name.replace("_", "-"): text for name, text in headers.items()}
        return await self.tenant.http.post(
            f"/api/v1{route}", headers=sent, timeout=PATIENCE_S + 30, **options
        )

    async def new_session(self) -> str:
        answer = await self.post("/create_session", {"tags": [], "sdk_version": "0"})
        assert answer.status_code == 200, answer.text
        return answer.json()["session_id"]

    async def new_model(self, session: str | None = None, number: int = 0, **changes: Any) -> str:
        """A model that is there."""
        body = {
            "session_id": session or await self.new_session(),
            "model_seq_id": number,
            "base_model": BASE,
            "lora_config": LORA,
        }
        accepted = await self.accepted("/create_model", body | changes)
        result = await self.result(accepted["request_id"])
        assert result.json() == {"type": "create_model", "model_id": accepted["model_id"]}
        return accepted["model_id"]

    async def accepted(self, route: str, body: Any = None, **options: Any) -> dict[str, Any]:
        answer = await self.post(route, body, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def result(self, request_id: str, *, accept: str = PROTOBUF) -> httpx.Response:
        """What a request has come to."""
        body = {"request_id": request_id, "allow_metadata_only": False}
        return await self.post("/retrieve_future", body, accept=accept)

    async def trained(self, body: bytes, **headers: str) -> httpx.Response:
        """The result of a forward_backward."""
        options = {"content_type": PROTOBUF} | headers
        accepted = await self.accepted("/forward_backward", content=body, **options)
        return await self.result(accepted["request_id"])
