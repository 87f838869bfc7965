"""The frozen model of which every process keeps a part: dense weights by FSDP2, experts by the group of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from river_kernels import FrozenWeight, matrices_of, moe_lora_parallel
from river_trainer.base_model import BaseModel
from river_trainer.errors import ShardingError
from river_trainer.loading import move_stored
from river_trainer.sharding.group import Group


class ShardedBaseModel(BaseModel):
    """A `BaseModel` divided among the processes of `group`, which call `token_logprobs` and backward in step.

    Slots and pairs are those of all processes, see `river_kernels.expert_parallel`; segments are of this one's tokens.
    One lane only. The whole model is in the host's memory while it is being loaded, and a part of it, on the group's
    device, from then on; of dense layers that are stored in 8 or 4 bits every process keeps all, as gathering them
    would take longer than they save.
    """

    def __init__(self, path: str | Path, group: Group, dtype: torch.dtype = torch.float32) -> None:
        """Loads the model and keeps a part.

        Raises:
            OSError: it cannot be read.
            ModelFormatError: its weights are stored in a way that the trainer does not know.
            ShardingError: a layer's experts cannot be divided evenly.
        """
        self._group = group
        super().__init__(path, dtype, group.device)

    def _settle(self) -> None:
        """Brings this process's part of the model, and no more, to where it computes."""
        experts = [module for module in self._model.modules() if hasattr(module, "river_experts")]
        for module in experts:
            _keep_experts(module, self._group)
        divided = {weight for module in experts for weight in module.parameters()}
        self._shard_dense(self._group, divided)

    def _shard_dense(self, group: Group, divided: set[nn.Parameter]) -> None:
        network = self._network
        parts: list[nn.Module] = list(network.body.layers)
        tied = network.head.weight is network.embedding.weight
        if not tied:  # Else both are gathered together, with what is outside of the layers.
            parts += [network.embedding, network.head]
        # The whole network comes last: it takes what is left, and its hooks see every pass begin and end.
        for part in [*parts, network]:
            fully_shard(part, mesh=group.mesh, reshard_after_forward=True, ignored_params=divided)
        move_stored(network, group.device)


@torch.no_grad()
def _keep_experts(module: Any, group: Group) -> None:
    """Leaves a layer with the experts of this process."""
    for name in ("gate_up_proj", "down_proj"):
        whole: FrozenWeight = getattr(module, name)
        experts = whole.shape[0]
        if experts % group.size:
            raise ShardingError(
                f"the {experts} experts of {module.river_name} cannot be divided evenly among {group.size} processes"
            )
        own = experts // group.size
        part = matrices_of(whole, group.rank * own, (group.rank + 1) * own).to(group.device)
        is_tensor = isinstance(part, torch.Tensor)
        setattr(module, name, nn.Parameter(part, requires_grad=False) if is_tensor else part)
    module.river_experts = partial(moe_lora_parallel, process_group=group.world)
