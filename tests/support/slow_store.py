"""An object store over plain HTTP that gives nothing before it is told to."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

OPTIONS = '{"allow_http": "true"}'
"""`RIVER_STORE_OPTIONS` of those who read from it."""


class SlowStore:
    """Serves the files below `directory` once it `may_answer`; `asked` counts requests by path."""

    def __init__(self, directory: Path) -> None:
        self.may_answer = threading.Event()
        self.asked: Counter[str] = Counter()
        store = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                store.asked[self.path] += 1
                store.may_answer.wait()
                path = directory / self.path.removeprefix("/")
                content = path.read_bytes() if path.is_file() else None
                self.send_response(404 if content is None else 200)
                self.send_header("Content-Length", str(len(content or b"")))
                self.send_header("Last-Modified", self.date_time_string())
                self.end_headers()
                self.wfile.write(content or b"")

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as it is called
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@contextmanager
def slow_store(directory: Path) -> Iterator[SlowStore]:
    """The store while the block runs."""
    store = SlowStore(directory)
    serving = threading.Thread(target=store.server.serve_forever)
    serving.start()
    try:
        yield store
    finally:
        store.may_answer.set()
        store.server.shutdown()
        serving.join()
        store.server.server_close()
