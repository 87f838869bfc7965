"""A local S3 server, moto's, on a port of its own."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import msgspec
import pytest
from moto.server import ThreadedMotoServer

from river_engine.stores import OPTIONS_VARIABLE

KEYS = {"access_key_id": "test", "secret_access_key": "test", "region": "us-east-1"}


class S3:
    """The server; `url` is a bucket of whoever asks."""

    def __init__(self, server: ThreadedMotoServer) -> None:
        self._server = server
        host, port = server.get_host_and_port()
        self.endpoint = f"http://{host}:{port}"
        self.client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=KEYS["access_key_id"],
            aws_secret_access_key=KEYS["secret_access_key"],
            region_name=KEYS["region"],
        )

    def options(self) -> str:
        """What `RIVER_STORE_OPTIONS` says to reach it."""
        options = {**KEYS, "endpoint": self.endpoint, "allow_http": "true"}
        return msgspec.json.encode(options).decode()

    def new_bucket(self) -> str:
        """The name of a fresh bucket."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=name)
        return name


@contextmanager
def running_s3() -> Iterator[S3]:
    """The server while the block runs."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    s3 = S3(server)
    try:
        yield s3
    finally:
        s3.client.close()
        server.stop()


def use_s3(s3: S3, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a store in a fresh bucket, which every part in this process can open."""
    monkeypatch.setenv(OPTIONS_VARIABLE, s3.options())
    return f"s3://{s3.new_bucket()}/river"
