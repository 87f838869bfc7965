"""The processes that share one model, and what they say to each other.

Messages are Python objects in the pickle format of `torch.distributed`: all processes are of one trainer and trust each
other, as they trust the network that `torchrun` was told to use.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from river_trainer import limits
from river_trainer.devices import HOST
from river_trainer.errors import GroupBrokenError


class Group:
    """One process among the others. A call is for all of them to make, in the same order.

    `world` carries tensors, on `device`; messages have gloo connections of their own. Every call raises
    `GroupBrokenError` when another process has died, or has not come for `limits.GROUP_TIMEOUT_S`. In rank 0, whoever
    begins to say something holds `turn` until the others listen again.
    """

    def __init__(self, device: torch.device = HOST) -> None:
        """Joins the group that the environment names, see `torch.distributed.init_process_group`."""
        self.device = device
        self.turn = threading.Lock()
        timeout = timedelta(seconds=limits.GROUP_TIMEOUT_S)
        with in_step():
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            dist.init_process_group(backend_of(self.device), timeout=timeout)
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self.mesh: DeviceMesh = init_device_mesh(self.device.type, (self.size,))
            self.world: dist.ProcessGroup = self.mesh.get_group()
            self._messages: Any = dist.new_group(backend="gloo", timeout=timeout)

    def say(self, message: object) -> None:
        """From rank 0 to all others, who `hear`."""
        assert self.rank == 0
        with in_step():
            dist.broadcast_object_list([message], src=0, group=self._messages)

    def hear(self) -> Any:
        """What rank 0 says next."""
        assert self.rank > 0
        heard: list[Any] = [None]
        with in_step():
            dist.broadcast_object_list(heard, src=0, group=self._messages)
        return heard[0]

    def collect(self, answer: object) -> list[Any]:
        """Everybody's answer, by rank, in rank 0; nothing in the others."""
        answers: list[Any] = [None] * self.size if self.rank == 0 else []
        with in_step():
            dist.gather_object(answer, answers or None, dst=0, group=self._messages)
        return answers

    def share(self, tensor: torch.Tensor) -> None:
        """Rank 0's values to everybody."""
        with in_step():
            dist.broadcast(tensor, src=0, group=self.world)

    def sum_up(self, tensor: torch.Tensor) -> None:
        """The sum over all processes, in rank 0; what the others have then means nothing."""
        with in_step():
            dist.reduce(tensor, dst=0, group=self.world)

    def leave(self) -> None:
        """Closes all connections; the others are told so, or notice."""
        with suppress(RuntimeError):
            dist.destroy_process_group()


def backend_of(device: torch.device) -> str:
    """What carries tensors that lie on `device` from process to process."""
    return "gloo" if device.type == "cpu" else "nccl"


@contextmanager
def in_step() -> Iterator[None]:
    """Where all processes have to do the same.

    Raises:
        GroupBrokenError: whatever fails here has failed in this process alone, or because another is gone.
    """
    try:
        yield
    except GroupBrokenError:
        raise
    except Exception as error:
        raise GroupBrokenError(f"the processes are out of step: {error}") from error
