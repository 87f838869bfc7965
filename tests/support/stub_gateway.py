"""A small HTTP server that keeps to the wire contract of the gateway and fails on demand."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

import msgspec
import numpy as np

from river_client import wire
from river_client.arrays import unpack
from river_client.samples_wire import LogSamples, SamplesLogged

KEY = "rv-good"
RUN_ID = "run_1"
CHECKPOINT_PATH = f"river://{RUN_ID}/weights/final"
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 4000}
OPTIMIZER_FILE = "optimizer.safetensors"
REFUSED_LOSS = "ppo"  # refused at the door
FAILING_LOSS = "dro"  # accepted, and then fails in the trainer


@dataclass
class Fault:
    """What happens to the next requests that match `route`, a pattern of method and path.

    `status` is answered instead of working; without one the connection is cut, `after_work` or before it.
    """

    route: str
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict[str, str])
    after_work: bool = False


class RefusalError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, param: str | None = None, **headers: str) -> None:
        super().__init__(status)
        self.status = status
        self.param = param
        self.headers = headers


class StubGateway:
    """The server and everything that it was told; `base_url` is where it listens.

    `cut_file_after_bytes` breaks off the next download of a file larger than that; `garbled_downloads` is how many
    arrive with a wrong byte. `waits` says what becomes of the body of a submission whose client prefers to wait: it
    comes at once and without the result, with the result when that is due, or never.
    """

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.requests: Counter[str] = Counter()
        self.operations: dict[int, wire.AnyOperation] = {}
        self.repeated: list[int] = []
        self.polls_until_done = 0
        self.queue_state: wire.QueueState | None = None
        self.waits: Literal["never", "for result", "in vain"] = "never"
        self.result_due = threading.Event()
        self.sampled: list[wire.SampleRequest] = []
        self.logged: list[wire.LogMetrics] = []
        self.logged_samples: list[LogSamples] = []
        self.ttls: list[int | None] = []
        self.files = {**FILES, OPTIMIZER_FILE: b"moments"}
        self.cut_file_after_bytes: int | None = None
        self.garbled_downloads = 0
        self.ranges: list[str] = []
        self.aliases: list[wire.PutAlias] = []
        self.uploads: list[tuple[dict[str, str], bytes]] = []
        self.sessions_ended: list[str] = []
        self._lock = threading.Lock()
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_any(self) -> None:
                gateway.answer(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_any  # noqa: N815 - names of http.server

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as in http.server
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.02])
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def start(self) -> None:
        """Serves in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stops serving."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, http: BaseHTTPRequestHandler) -> None:
        """One request, with its fault if there is one."""
        split = urlsplit(http.path)
        path = split.path.removeprefix(wire.API_PREFIX)
        body = http.rfile.read(int(http.headers.get("content-length") or 0))
        query = {name: values[0] for name, values in parse_qs(split.query).items()}
        route = f"{http.command} {path}"
        with self._lock:
            self.requests[route] += 1
            fault = next((f for f in self.faults if f.times and re.fullmatch(f.route, route)), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None and fault.status is None and not fault.after_work:
            _cut(http)
            return
        try:
            _check(http, fault)
            if path == "/checkpoints/file":
                self._send_file(http, query["name"])
                return
            if path == "/v1/chat/completions":
                self._chat(http, msgspec.json.decode(body))
                return
            with self._lock:
                answer = self._work(http.command, path, query, body)
        except RefusalError as refusal:
            error = wire.ErrorBody(
                type="refused",
                message=f"{refusal.param}: wrong",
                param=refusal.param,
                request_id="req_1",
            )
            content = msgspec.msgpack.encode(wire.ErrorEnvelope(error=error))
            _reply(http, refusal.status, content, **refusal.headers)
            return
        if fault is not None:
            _cut(http)
            return
        if self.waits != "never" and isinstance(answer, wire.OperationAccepted):
            self._accept(http, answer.operation_id)
            return
        content = b"" if answer is None else msgspec.msgpack.encode(answer)
        _reply(http, 204 if answer is None else 200, content)

    def _work(  # noqa: C901, PLR0911, PLR0912 - a line or two per route
        self, method: str, path: str, query: dict[str, str], body: bytes
    ) -> Any:
        """What the gateway would do."""
        match method, path.strip("/").split("/"):
            case "POST", ["sessions"]:
                return wire.Session(session_id="ses_1", heartbeat_interval_s=0.1)
            case "POST", ["sessions", _, "heartbeat"]:
                return None
            case "DELETE", ["sessions", session_id]:
                self.sessions_ended.append(session_id)
                return None
            case "POST", ["runs"]:
                asked = msgspec.msgpack.decode(body, type=wire.CreateRun)
                return _run(asked.base_model, asked.lora or wire.LoraConfig())
            case "GET", ["runs"]:
                return wire.Page(runs=[_run("base", wire.LoraConfig())])
            case "POST", ["runs", _, "operations"]:
                return self._submit(msgspec.msgpack.decode(body, type=wire.SubmitOperation))
            case "POST", ["runs", _, "metrics"]:
                self.logged.append(msgspec.msgpack.decode(body, type=wire.LogMetrics))
                return None
            case "POST", ["runs", _, "samples"]:
                self.logged_samples.append(msgspec.msgpack.decode(body, type=LogSamples))
                return SamplesLogged(kept=len(self.logged_samples[-1].groups))
            case "GET", ["operations", operation_id]:
                return self._result(operation_id)
            case "POST", ["sample"]:
                request = msgspec.msgpack.decode(body, type=wire.SampleRequest)
                self.sampled.append(request)
                return _samples(request)
            case "GET", ["checkpoints"]:
                if query.get("path", CHECKPOINT_PATH) != CHECKPOINT_PATH:
                    raise RefusalError(404, "path")
                return wire.Page(checkpoints=[_checkpoint()])
            case "PATCH", ["checkpoints"]:
                change = msgspec.msgpack.decode(body, type=wire.ChangeTtl)
                self.ttls.append(change.ttl_s)
                expires_at = None if change.ttl_s is None else "2030-01-02T00:00:00+00:00"
                return msgspec.structs.replace(_checkpoint(), expires_at=expires_at)
            case "GET", ["checkpoints", "files"]:
                files = [
                    wire.CheckpointFile(
                        name=name,
                        size_bytes=len(content),
                        sha256=hashlib.sha256(content).hexdigest(),
                    )
                    for name, content in self.files.items()
                ]
                return wire.Page(files=files)
            case "POST", ["checkpoints", "import"]:
                self.uploads.append((query, body))
                return _checkpoint()
            case "PUT", ["aliases", name]:
                asked = msgspec.msgpack.decode(body, type=wire.PutAlias)
                self.aliases.append(asked)
                return _alias(name, asked)
            case "POST", ["aliases", name, "rollback"]:
                return _alias(name, self.aliases[-2])
            case "GET", ["aliases", name]:
                return _alias(name, self.aliases[-1])
            case "GET", ["aliases", name, "history"]:
                return wire.Page(aliases=[_alias(name, asked) for asked in self.aliases])
            case "GET", ["models"]:
                return wire.Page(models=[])
            case "GET", ["usage"]:
                return wire.Page(usage=[_usage_line("prompt", 1234), _usage_line("training", 5)])
            case _:
                raise RefusalError(404)

    def _submit(self, submitted: wire.SubmitOperation) -> wire.OperationAccepted:
        operation = submitted.operation
        if getattr(operation, "loss_fn", None) == REFUSED_LOSS:
            raise RefusalError(422, "data[1].input_ids[2]")
        if submitted.seq in self.operations:
            self.repeated.append(submitted.seq)
        self.operations.setdefault(submitted.seq, operation)
        return wire.OperationAccepted(operation_id=f"{RUN_ID}-{submitted.seq}")

    def _result(self, operation_id: str) -> wire.OperationResult:
        if self.polls_until_done > 0:
            self.polls_until_done -= 1
            return wire.OperationResult(
                operation_id=operation_id, status="pending", queue=self.queue_state
            )
        seq = int(operation_id.rpartition("-")[2])
        operation = self.operations.get(seq)
        if getattr(operation, "loss_fn", None) == FAILING_LOSS:
            error = wire.OperationError(type="out_of_memory", message="no room")
            return wire.OperationResult(operation_id=operation_id, status="failed", error=error)
        steps = sum(
            isinstance(done, wire.OptimStep | wire.TrainStep)
            for number, done in self.operations.items()
            if number <= seq
        )
        data = getattr(operation, "data", None) or []
        return wire.OperationResult(
            operation_id=operation_id,
            status="done",
            policy_version=f"{RUN_ID}@{steps}",
            metrics={"loss": 0.5},
            logprobs=[_logprobs(datum) for datum in data],
            training_tokens=sum(_logprobs(datum).shape[0] for datum in data),
            checkpoint=_checkpoint() if isinstance(operation, wire.SaveWeights) else None,
        )

    def _accept(self, http: BaseHTTPRequestHandler, operation_id: str) -> None:
        """Status and headers at once, the body when the result is due."""
        if "prefer" not in http.headers:
            _reply(
                http, 202, msgspec.msgpack.encode(wire.OperationAccepted(operation_id=operation_id))
            )
            return
        http.send_response(202)
        http.send_header("location", f"{wire.API_PREFIX}/operations/{operation_id}")
        http.send_header("transfer-encoding", "chunked")
        http.end_headers()
        http.wfile.flush()
        if self.waits == "in vain":
            _cut(http)
            return
        self.result_due.wait(30)
        with self._lock:
            accepted = wire.OperationAccepted(
                operation_id=operation_id, result=self._result(operation_id)
            )
        content = msgspec.msgpack.encode(accepted)
        http.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content))

    def _send_file(self, http: BaseHTTPRequestHandler, name: str) -> None:
        content = self.files[name]
        asked = http.headers.get("range") or "bytes=0-"
        start = int(asked.removeprefix("bytes=").rstrip("-"))
        cut = None
        with self._lock:
            self.ranges.append(f"{name} {start}")
            if self.garbled_downloads:
                self.garbled_downloads -= 1
                content = bytes([content[0] ^ 1]) + content[1:]
            if len(content) > (self.cut_file_after_bytes or len(content)):
                cut, self.cut_file_after_bytes = self.cut_file_after_bytes, None
        http.send_response(206)
        http.send_header("content-range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        http.send_header("content-length", str(len(content) - start))
        http.end_headers()
        if cut is None:
            http.wfile.write(content[start:])
        else:
            http.wfile.write(content[start : start + cut])
            http.wfile.flush()
            _cut(http)

    def _chat(self, http: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        if not asked.get("stream"):
            choice = {
                "message": {"content": f"to {len(asked['messages'])}"},
                "finish_reason": "stop",
            }
            usage = {"prompt_tokens": 3, "completion_tokens": 2}
            answer = {"model": asked["model"], "choices": [choice], "usage": usage}
            headers = {"x-river-policy-version": f"{RUN_ID}@4"}
            _reply(http, 200, msgspec.json.encode(answer), **headers)
            return
        events = [msgspec.json.encode({"choices": [{"delta": {"content": c}}]}) for c in "abc"]
        content = b"".join(b"data: %b\n\n" % event for event in [*events, b"[DONE]"])
        _reply(http, 200, content)


def _check(http: BaseHTTPRequestHandler, fault: Fault | None) -> None:
    if fault is not None and fault.status is not None:
        raise RefusalError(fault.status, **fault.headers)
    if http.headers.get("authorization") != f"Bearer {KEY}":
        raise RefusalError(401)


def _cut(http: BaseHTTPRequestHandler) -> None:
    http.close_connection = True
    http.connection.close()


def _reply(http: BaseHTTPRequestHandler, status: int, content: bytes, **headers: str) -> None:
    http.send_response(status)
    for name, value in headers.items():
        http.send_header(name.replace("_", "-"), value)
    http.send_header("content-type", "application/msgpack")
    if status != 204:
        http.send_header("content-length", str(len(content)))
    http.end_headers()
    http.wfile.write(content)


def _run(base_model: str, lora: wire.LoraConfig) -> wire.Run:
    return wire.Run(
        run_id=RUN_ID,
        session_id="ses_1",
        base_model=base_model,
        lora=lora,
        step=0,
        created_at="2026-11-23T12:00:00Z",
    )


def _alias(name: str, asked: wire.PutAlias) -> wire.Alias:
    targets = asked.targets or [wire.AliasTarget(target=asked.target or "")]
    return wire.Alias(
        name=name,
        target=targets[0].target,
        targets=targets,
        version=1,
        updated_at="2026-11-23T12:00:00Z",
    )


def _checkpoint() -> wire.Checkpoint:
    return wire.Checkpoint(
        checkpoint_id="ckpt_1",
        path=CHECKPOINT_PATH,
        run_id=RUN_ID,
        mode="training",
        name="final",
        base_model="base",
        policy_version=f"{RUN_ID}@1",
        size_bytes=10,
        created_at="2026-11-23T12:00:00Z",
    )


def _logprobs(datum: wire.Datum) -> wire.Tensor:
    """-1, -2, -3… in the shape of the targets, less what the attention mask cuts."""
    targets = unpack(_tensor(datum.target_tokens or datum.input_ids))
    kept = (
        len(targets)
        if datum.attention_mask is None
        else unpack(_tensor(datum.attention_mask)).sum()
    )
    numbers = -np.arange(1, targets.size + 1, dtype="<f4").reshape(targets.shape)[:kept]
    return wire.Tensor(dtype="float32", shape=numbers.shape, data=numbers.tobytes())


def _tensor(value: wire.Numbers | None) -> wire.Tensor:
    assert isinstance(value, wire.Tensor), "the SDK packs what it sends"
    return value


def _usage_line(kind: str, quantity: int) -> wire.UsageLine:
    return wire.UsageLine(
        tenant="ten_a",
        model="base",
        kind=kind,
        context_length=1024,
        quantity=quantity,
        amount_nano_usd=quantity * 10,
        events=1,
    )


def _samples(request: wire.SampleRequest) -> wire.SampleResponse:
    prompts: list[Any] = request.prompts or request.prompt_token_ids or []
    routing = wire.Tensor(dtype="uint8", shape=(3, 1, 2), data=bytes([4, 0, 3, 1, 0, 0]))
    sample = wire.SampleSequence(
        text="x",
        tokens=[7],
        logprobs=[-0.5],
        stop_reason="stop",
        expert_routing=routing if request.return_expert_routing else None,
    )
    group = wire.SampleGroup(prompt_token_ids=[1, 2], samples=[sample] * request.num_samples)
    return wire.SampleResponse(
        groups=[group] * len(prompts), policy_version=f"{RUN_ID}@3", usage=wire.TokenUsage()
    )
