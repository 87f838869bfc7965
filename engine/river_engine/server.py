"""The process that serves: vLLM's engine and OpenAI application, behind our door. Started by `river_engine.main`.

vLLM runs its core in one child process of this one. Nothing is served before the self-test has passed and the
adapters of an earlier life are back.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import sys
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import uvicorn
import uvloop
from prometheus_client import REGISTRY
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

from river_client.service import SettingsError
from river_engine import limits
from river_engine.adapter_files import model_targets
from river_engine.adapters import AdapterStore
from river_engine.admission import Bounds
from river_engine.counting import counted, share_cached_count
from river_engine.health import Health
from river_engine.http import EngineDoor, show_own_adapter
from river_engine.lifeline import die_with_parent
from river_engine.logs import log_to_stderr
from river_engine.main import (
    ENDS_VARIABLE,
    EXIT_AGAIN,
    EXIT_DEAD,
    EXIT_UNFIT,
    PARENT_VARIABLE,
)
from river_engine.parsers import UnfitParserError, check_parsers, tool_parser_of
from river_engine.problems import RecentProblems, listening
from river_engine.protocol import SHARED_OUTER, EngineRecord
from river_engine.registration import registered
from river_engine.routing import RoutingShape, routing_shape
from river_engine.sampling import Sampler
from river_engine.selftest import SelfTestError, self_test
from river_engine.settings import EngineSettings, read_engine_settings
from river_engine.stopping import Controls, Stopping
from river_engine.turns import AdmissionMetrics, Turnstile

_log = logging.getLogger("river.engine")


class NoRoutingError(RuntimeError):
    """vLLM cannot record expert routing here; the message is its reason."""


def main() -> None:
    """Serves until SIGTERM or SIGINT (exit 0), an admin's restart, the death of vLLM's core, or a failed self-test."""
    try:
        settings = read_engine_settings()
    except SettingsError as error:
        sys.exit(f"{error}")
    log_to_stderr()
    parent = os.environ.get(PARENT_VARIABLE)
    if parent:
        die_with_parent(int(parent))
    started = time.monotonic()
    try:
        check_parsers(
            settings.model_path,
            tool_parser=settings.tool_parser,
            reasoning_parser=settings.reasoning_parser,
        )
    except UnfitParserError as error:
        _log.critical("%s", error)
        sys.exit(EXIT_UNFIT)
    arguments = vllm_arguments(settings)
    with _listener(settings) as listener:
        try:
            engine = start_engine(arguments, settings)
        except NoRoutingError as error:
            _log.critical("RIVER_EXPERT_ROUTING is not possible here: %s", error)
            sys.exit(EXIT_UNFIT)
        try:
            code = uvloop.run(_serve(settings, arguments, engine, listener, started))
        except SelfTestError as error:
            _log.critical("self-test failed: %s", error)
            code = EXIT_UNFIT
        finally:
            engine.shutdown()
    sys.exit(code)


def vllm_arguments(settings: EngineSettings) -> Namespace:
    """The command line `vllm serve` would get."""
    options = [
        f"--model={settings.model_path}",
        f"--served-model-name={settings.base_model}",
        f"--host={settings.host}",
        f"--port={settings.port}",
        # vLLM's own default is zero: what is drawn without a seed would repeat after every start.
        f"--seed={secrets.randbelow(2**31)}",
        "--enable-lora",
        f"--max-loras={settings.max_loras}",
        f"--max-cpu-loras={settings.max_cpu_loras}",
        f"--max-lora-rank={settings.max_lora_rank}",
        # Else adapters with fused expert tensors, as PEFT writes them.
        "--enable-moe-shared-loras"
        if settings.expert_layout == SHARED_OUTER
        else "--enable-mixed-moe-lora-format",
        # The log-probability of what was drawn under the distribution it was drawn from.
        "--logprobs-mode=processed_logprobs",
        f"--max-logprobs={limits.TOP_LOGPROBS_MAX}",
        "--enable-prefix-caching",
        "--enable-prompt-tokens-details",
        "--disable-fastapi-docs",
        "--enable-auto-tool-choice",
        # Arguments of a tool that a client names or demands follow its schema, whether it says `strict` or not.
        "--tool-strict-level=parameter",
        f"--tool-call-parser={settings.tool_parser or tool_parser_of(settings.model_path)}",
        # Else a small model may fill what is left of its answer with blanks.
        '--structured-outputs-config={"backend": "xgrammar", "disable_any_whitespace": true}',
    ]
    if settings.reasoning_parser:
        options.append(f"--reasoning-parser={settings.reasoning_parser}")
    if settings.max_num_seqs:
        options.append(f"--max-num-seqs={settings.max_num_seqs}")
    if settings.max_model_len:
        options.append(f"--max-model-len={settings.max_model_len}")
    if settings.on_cpu:
        options += [
            "--enforce-eager",
            # Only whole blocks of a prompt are found in the prefix cache, and the samples of one prompt share it there.
            "--block-size=32",
            f"--dtype={settings.dtype or 'float32'}",
            f"--kv-cache-memory-bytes={settings.kv_cache_mb * 1024 * 1024}",
        ]
    else:
        if settings.dtype:
            options.append(f"--dtype={settings.dtype}")
        if settings.expert_routing:
            options.append("--enable-return-routed-experts")
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(options)
    assert arguments is not None
    validate_parsed_serve_args(arguments)
    return arguments


def start_engine(arguments: Namespace, settings: EngineSettings) -> AsyncLLM:
    """The engine of vLLM with its core process running and the model loaded.

    Before there is an event loop, so that a signal meanwhile just ends this process.

    Raises:
        NoRoutingError: vLLM was told to record expert routing and cannot with this model or machine.
    """
    context = UsageContext.OPENAI_API_SERVER
    try:
        config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config(
            usage_context=context
        )
    except ValueError as error:
        if "AuxOutput" in str(error) or "routed-experts" in str(error):
            raise NoRoutingError(str(error)) from error
        raise
    if settings.on_cpu:
        # vLLM spawns here, which imports everything a second time. Nothing has run in parallel in this process yet, so
        # forking is safe, and halves both the time to start and the memory.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        os.register_at_fork(after_in_child=die_with_parent)
    return AsyncLLM.from_vllm_config(config, usage_context=context)


async def _serve(
    settings: EngineSettings,
    arguments: Namespace,
    engine: AsyncLLM,
    listener: socket.socket,
    started: float,
) -> int:
    """The exit code."""
    stopping = Stopping(settings.drain_s)
    stopping.listen()
    problems = listening("river.engine")
    async with AsyncExitStack() as stack:
        routing = await routing_shape(engine)
        door, store, turnstile = await _build(settings, arguments, engine, routing)
        await stack.enter_async_context(_listening(door, listener))
        # Last in and first out: nobody is sent here before it answers, nor when it is about to stop.
        changed = asyncio.Event()
        if settings.nats_url:
            health = _health(engine, store, turnstile, problems)
            record = _record_maker(settings, engine, store, turnstile, routing, health)
            controls = Controls(turnstile, stopping, changed)
            await stack.enter_async_context(
                registered(settings.nats_url, record, store, changed, controls.do)
            )
        _log.info(
            "ready",
            extra={"url": settings.public_url, "took_s": round(time.monotonic() - started, 1)},
        )
        code = await _until_stopped(engine, stopping.asked)
        if code == 0:
            # Says at once that new requests had better go elsewhere, and lets those that are here end.
            turnstile.close()
            changed.set()
            await stopping.drained(turnstile)
            code = EXIT_AGAIN if stopping.again else 0
        return code


async def _build(
    settings: EngineSettings,
    arguments: Namespace,
    engine: AsyncLLM,
    routing: RoutingShape | None,
) -> tuple[EngineDoor, AdapterStore, Turnstile]:
    """The application, tested, with the adapters of an earlier life."""
    config = engine.model_config
    targets = model_targets(config.hf_text_config)
    await self_test(
        engine,
        engine.generate,
        targets,
        vocab_size=config.get_vocab_size(),
        exact=str(config.dtype) == "torch.float32",
        rank_max=settings.max_lora_rank,
        shared_experts=settings.expert_layout == SHARED_OUTER,
    )
    store = AdapterStore(
        engine,
        settings.versions_dir,
        targets,
        max_loras=settings.max_loras,
        resident_max=settings.max_cpu_loras,
        rank_max=settings.max_lora_rank,
        wait_s=settings.adapter_wait_s,
        shared_experts=settings.expert_layout == SHARED_OUTER,
    )
    await store.restore()
    share_cached_count()
    # From here on every token is counted, whichever route asks for it.
    engine.generate = counted(engine.generate)
    tasks = await engine.get_supported_tasks()
    inner = build_app(arguments, tasks, config)
    await init_app_state(engine, inner.state, arguments, tasks)
    show_own_adapter(inner.state.openai_serving_models, settings.base_model)
    turnstile = Turnstile(_bounds(settings, engine), store)
    AdmissionMetrics(turnstile, settings.max_loras, REGISTRY)
    sampler = Sampler(
        engine.generate,
        store,
        turnstile,
        engine.get_tokenizer(),
        context_length=config.max_model_len,
        vocab_size=config.get_vocab_size(),
        routing=routing,
    )
    door = EngineDoor(
        inner,
        store,
        turnstile,
        sampler,
        token=settings.engine_token,
        base_model=settings.base_model,
        context_length=config.max_model_len,
        alive=lambda: not engine.errored,
    )
    return door, store, turnstile


def _bounds(settings: EngineSettings, engine: AsyncLLM) -> Bounds:
    """What vLLM can work on at once, and who may wait for it."""
    config = engine.vllm_config
    cache = config.cache_config
    cache_tokens = (cache.num_gpu_blocks or 0) * (cache.block_size or 0)
    return Bounds(
        sequences=config.scheduler_config.max_num_seqs,
        tokens=limits.CACHE_OVERCOMMIT * max(cache_tokens, config.model_config.max_model_len),
        slots=settings.max_loras,
        slice_s=limits.SLOT_SLICE_S,
        waiting=settings.queue_max,
        waiting_per_tenant=settings.queue_tenant_max,
        waiting_bytes=limits.WAITING_BYTES_MAX,
    )


def _listener(settings: EngineSettings) -> socket.socket:
    """Bound at once, so that a port in use shows before minutes of loading; nothing is accepted yet."""
    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((settings.host, settings.port))
    return listener


@asynccontextmanager
async def _listening(door: EngineDoor, listener: socket.socket) -> AsyncIterator[None]:
    """Answers HTTP while the block runs, and leaves the last bytes of answers a moment at its end."""
    server = uvicorn.Server(
        uvicorn.Config(
            door,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=limits.STOP_GRACE_S,
        )
    )
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(server._serve([listener]))  # noqa: SLF001 - `serve` would take our signals
        try:
            yield
        finally:
            server.should_exit = True
            await serving


def _record_maker(
    settings: EngineSettings,
    engine: AsyncLLM,
    store: AdapterStore,
    turnstile: Turnstile,
    routing: RoutingShape | None,
    health: Health,
) -> Callable[[], EngineRecord]:
    config = engine.model_config
    admission = turnstile.admission

    def record() -> EngineRecord:
        return EngineRecord(
            engine_id=settings.engine_id,
            base_model=settings.base_model,
            url=settings.public_url,
            context_length=config.max_model_len,
            vocab_size=config.get_vocab_size(),
            max_loras=settings.max_loras,
            max_lora_rank=settings.max_lora_rank,
            heartbeat_at=time.time(),
            resident=store.resident(),
            loading=store.loading(),
            running=admission.turns_inside() + sum(admission.waiting().values()),
            outstanding_tokens=admission.outstanding_tokens(),
            draining=turnstile.draining,
            expert_routing=routing is not None,
            health=health.now(),
        )

    return record


def _health(
    engine: AsyncLLM, store: AdapterStore, turnstile: Turnstile, problems: RecentProblems
) -> Health:
    """Told by the supervisor what became of the server process before this one, if there was one."""
    ends, *last = os.environ.get(ENDS_VARIABLE, "0").split()
    if last:
        code, ended_at = last
        problems.note(f"the server process before this one ended with code {code}", float(ended_at))
    return Health(
        REGISTRY,
        turnstile.admission,
        store,
        problems,
        batch_max=engine.vllm_config.scheduler_config.max_num_seqs,
        ends=int(ends),
    )


async def _until_stopped(engine: AsyncLLM, stop: asyncio.Event) -> int:
    while not engine.errored:
        try:
            async with asyncio.timeout(limits.ENGINE_CHECK_INTERVAL_S):
                await stop.wait()
        except TimeoutError:
            continue
        return 0
    _log.critical("vLLM's core has died")
    return EXIT_DEAD


if __name__ == "__main__":
    main()
