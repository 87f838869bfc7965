"""Which experts every token went to, on the way out of vLLM.

On a GPU vLLM's second model runner records them, if the engine is started for it. The runner of a CPU cannot, so our
plugin adds it there, through the places vLLM made for the other one:

* every router of the model calls `RoutingRecorder.capture`, which writes the chosen experts beside the KV cache: a
  row for each of its slots, found by the slot the token's keys go to;
* the scheduler asks `RoutingConnector.take_output` with every answered token and passes on what it gets.

A row lives and dies with the keys of its token: memory is bounded by the cache, chunked prefill and preemption need no
thought, and a request that ends or is aborted leaves nothing behind. Prefix caching stays on: requests that ask carry
`ROUTING_SALT`, so the blocks they share were all computed for requests that asked. That is the cost of asking: what was
computed for those who did not ask is computed once more. While nobody asks, nothing is written.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import numpy as np
import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
    bind_routed_experts_capturer,
)
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.worker_base import WorkerBase

from river_engine.protocol import ExpertRouting, routing_dtype

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

_log = logging.getLogger("river.engine")

ROUTING_SALT = "river-expert-routing"
"""The cache salt of requests that want to know; it is also how the recorder knows that they do."""
_SHAPE_METHOD = "river_routing_shape"
_bound: dict[str, RoutingRecorder] = {}
"""Under "recorder", that of the model in this process."""


class RoutingShape(msgspec.Struct, frozen=True, kw_only=True):
    """The MoE layers of a model by number, how many experts each has, and how many of them a token goes to."""

    layers: tuple[int, ...]
    experts: int
    experts_per_token: int

    def of_sample(self, rows_TLK: np.ndarray | None, tokens: int) -> ExpertRouting:  # noqa: N803
        """What vLLM says of a sequence of `tokens` tokens, the last of which the model never ran over.

        vLLM's own recorder has a row for every layer, ours one for every MoE layer.
        """
        assert rows_TLK is not None, "vLLM has returned no routing"
        if rows_TLK.shape[1] != len(self.layers):
            rows_TLK = rows_TLK[:, self.layers]  # noqa: N806
        dtype = routing_dtype(self.experts)
        shape = (tokens, len(self.layers), self.experts_per_token)
        filled = np.zeros(shape, dtype=f"<u{np.dtype(dtype).itemsize}")
        assert rows_TLK.shape == (tokens - 1, *shape[1:]), (rows_TLK.shape, shape)
        filled[:-1] = rows_TLK
        return ExpertRouting(dtype=dtype, shape=shape, data=filled.tobytes())


class _Engine(Protocol):
    async def collective_rpc(self, method: str) -> list[Any]: ...


async def routing_shape(engine: _Engine) -> RoutingShape | None:
    """The routing this engine can report; None if it cannot, or if the model has no routed experts."""
    (found, *_) = await engine.collective_rpc(_SHAPE_METHOD)
    return None if found is None else msgspec.convert(found, RoutingShape)


class RoutingRecorder:
    """The experts of every token in the KV cache: [slots, MoE layers, experts per token]."""

    def __init__(
        self, shape: RoutingShape, *, slots: int, block_size: int, layer_name: str
    ) -> None:
        self.shape = shape
        self.block_size = block_size
        self.recording = False
        self._layer_name = layer_name
        self._places = {layer: place for place, layer in enumerate(shape.layers)}
        # torch has few operations on uint16; the bits are the same.
        dtype = torch.uint8 if routing_dtype(shape.experts) == "uint8" else torch.int16
        size = (slots, len(shape.layers), shape.experts_per_token)
        self._experts_SLK = torch.zeros(size, dtype=dtype)

    def capture(self, layer_id: int, topk_ids: torch.Tensor) -> None:
        """Called by the router of a layer with the experts of this step's tokens, [M, K]."""
        if not self.recording:
            return
        mappings = get_forward_context().slot_mapping
        assert isinstance(mappings, dict)
        slots = mappings[self._layer_name]
        rows = min(slots.numel(), topk_ids.shape[0])
        kept = slots[:rows] >= 0  # Rows that only pad the batch have no slot.
        chosen = topk_ids[:rows][kept].to(self._experts_SLK.dtype)
        self._experts_SLK[slots[:rows][kept], self._places[layer_id]] = chosen

    def rows(self, block_ids: list[int], start: int, end: int) -> np.ndarray:
        """Of the positions `start` to `end` of a request with these KV blocks; [end - start, layers, K]."""
        positions = np.arange(start, end)
        blocks = np.asarray(block_ids)[positions // self.block_size]
        slots = blocks * self.block_size + positions % self.block_size
        rows = self._experts_SLK.numpy()[slots]
        return rows if rows.dtype == np.uint8 else rows.view(np.uint16)


class RoutingConnector:
    """Stands where vLLM's `AuxOutputSchedulerConnector` would; stateless, since the rows are with the KV blocks.

    Every step computes one token of a request, so what an answered token adds is the row before it, and the first one
    brings the whole prompt's. A position computed again after a preemption keeps the experts that drew its token.
    """

    def __init__(self, scheduler: Scheduler, recorder: RoutingRecorder, group: int) -> None:
        assert scheduler.vllm_config.speculative_config is None
        self._scheduler = scheduler
        self._recorder = recorder
        self._group = group

    def build_connector_meta(
        self, scheduler_output: SchedulerOutput, requests: dict[str, Request]
    ) -> bool:
        """Whether the step is to be recorded; the runner finds it with the rest of the step."""
        return any(
            (requests[request_id].cache_salt or "").startswith(ROUTING_SALT)
            for request_id in scheduler_output.num_scheduled_tokens
        )

    def take_output(self, request: Request, _output: None) -> np.ndarray | None:
        if not (request.cache_salt or "").startswith(ROUTING_SALT):
            return None
        end = request.num_tokens - 1
        start = 0 if request.num_output_tokens <= 1 else end - 1
        blocks = self._scheduler.kv_cache_manager.get_block_ids(request.request_id)[self._group]
        return self._recorder.rows(blocks, start, end)

    def request_finished(self, request: Request) -> None:
        """Nothing is kept."""

    def reset(self) -> None:
        """Nothing is kept."""


def record_on_cpu() -> None:
    """Gives the runner and the scheduler of a CPU what vLLM's second runner has."""
    initialize = GPUModelRunner.initialize_kv_cache

    def initialize_kv_cache(
        self: GPUModelRunner, kv_cache_config: KVCacheConfig, *args: Any, **options: Any
    ) -> None:
        initialize(self, kv_cache_config, *args, **options)
        _bind(self)

    execute = GPUModelRunner.execute_model

    def execute_model(
        self: GPUModelRunner, scheduler_output: SchedulerOutput, *args: Any, **options: Any
    ) -> Any:
        recorder = _bound.get("recorder")
        if recorder is None:
            return execute(self, scheduler_output, *args, **options)
        recorder.recording = bool(scheduler_output.aux_output_connector_metadata)
        try:
            return execute(self, scheduler_output, *args, **options)
        finally:
            recorder.recording = False

    begin = Scheduler.__init__

    def begin_with_connector(self: Scheduler, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        recorder = _bound.get("recorder")
        if recorder is not None:
            group = _attention_group(self.kv_cache_config)
            assert group is not None
            self.aux_output_connector = RoutingConnector(self, recorder, group)  # pyright: ignore[reportAttributeAccessIssue]

    GPUModelRunner.initialize_kv_cache = initialize_kv_cache
    GPUModelRunner.execute_model = execute_model
    Scheduler.__init__ = begin_with_connector


def tell_shape() -> None:
    """Lets `routing_shape` ask the workers, on every platform."""

    def river_routing_shape(self: WorkerBase) -> dict[str, Any] | None:
        if self.vllm_config.aux_output_config.enabled:
            runner: Any = self.model_runner
            shape = _shape_of(runner.get_model())
        else:
            recorder = _bound.get("recorder")
            shape = None if recorder is None else recorder.shape
        return None if shape is None else msgspec.to_builtins(shape)

    setattr(WorkerBase, _SHAPE_METHOD, river_routing_shape)


def _bind(runner: GPUModelRunner) -> None:
    """Makes the recorder of the runner's model, if it can have one."""
    model, config = runner.get_model(), runner.kv_cache_config
    shape, group = _shape_of(model), _attention_group(config)
    if shape is None:
        return
    if group is None or runner.vllm_config.parallel_config.world_size > 1:
        # The scheduler reads what the runner writes, so both must be in one process.
        _log.warning("expert routing is not recorded: several processes, or no full attention")
        return
    spec = config.kv_cache_groups[group].kv_cache_spec
    recorder = RoutingRecorder(
        shape,
        slots=config.num_blocks * spec.block_size,
        block_size=spec.block_size,
        layer_name=config.kv_cache_groups[group].layer_names[0],
    )
    bind_routed_experts_capturer(model, recorder)  # pyright: ignore[reportArgumentType]
    _bound["recorder"] = recorder


def _shape_of(model: torch.nn.Module) -> RoutingShape | None:
    layers = [module for module in model.modules() if isinstance(module, MoERunner)]
    if not layers:
        return None
    config = layers[0].moe_config
    return RoutingShape(
        layers=tuple(sorted(layer.layer_id for layer in layers)),
        experts=config.num_experts,
        experts_per_token=config.experts_per_token,
    )


def _attention_group(config: KVCacheConfig) -> int | None:
    """The group of layers whose KV cache keeps every token."""
    for index, group in enumerate(config.kv_cache_groups):
        if isinstance(group.kv_cache_spec, FullAttentionSpec):
            return index
    return None
