"""Which of how many processes this one is, as `torchrun` says in the environment. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """Process `rank`, counted from 0, of `size`; `local_rank` of those on this machine, each of which has a device."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process is the one that serves; the others follow it."""
        return self.rank == 0

    @property
    def is_shared(self) -> bool:
        """Whether the model is divided among several processes."""
        return self.size > 1


def find_place(environment: Mapping[str, str] | None = None) -> Place:
    """The place of this process; alone if nothing else is said.

    Raises:
        ValueError: the environment contradicts itself.
    """
    environment = os.environ if environment is None else environment
    rank, size, local_rank = (
        int(environment.get(name, default))
        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    )
    place = Place(rank, size, local_rank)
    if not 0 <= place.rank < place.size:
        raise ValueError(f"RANK {place.rank} of WORLD_SIZE {place.size} processes")
    return place
