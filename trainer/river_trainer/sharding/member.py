"""The processes of a group that do not lead: they take part in every batch until they are sent home."""

from __future__ import annotations

import logging
import signal
import sys

from river_trainer.assembly import home_of
from river_trainer.base_model import BaseModel
from river_trainer.errors import DeviceError, GroupBrokenError, ShardingError
from river_trainer.gradients import GradientPool
from river_trainer.lanes import Lanes, settle
from river_trainer.settings import TrainerSettings
from river_trainer.sharding.base_model import ShardedBaseModel
from river_trainer.sharding.group import Group
from river_trainer.sharding.messages import Batch, Stop
from river_trainer.sharding.passes import ShardedPasses
from river_trainer.sharding.place import find_place

logger = logging.getLogger("river.trainer")


def follow(settings: TrainerSettings) -> None:
    """Serves rank 0 until it says that all is over; exits with 1 if the group breaks."""
    for number in (signal.SIGTERM, signal.SIGINT):
        # torchrun sends it to all; rank 0 finishes its batch first, and then sends us home.
        signal.signal(number, signal.SIG_IGN)
    try:
        home = home_of(settings, find_place())
        group = Group(home.device)
        base = ShardedBaseModel(settings.model_path, group, home.dtype)
        settle()
        take_part(group, base, settings)
        group.leave()
    except (DeviceError, GroupBrokenError, ShardingError) as error:
        sys.exit(str(error))


def take_part(group: Group, base: BaseModel, settings: TrainerSettings) -> None:
    """Computes shares of batches until rank 0 says that all is over.

    Raises:
        GroupBrokenError: it will not say anything any more.
    """
    sizes = settings.sizes(base.home.device.type)
    passes = ShardedPasses(
        base,
        Lanes(1, base.home.device),
        GradientPool(base.home.device),
        group=group,
        tokens_max=sizes.pass_tokens,
        piece_tokens=sizes.piece_tokens,
    )
    context_length = settings.context_length or base.context_length
    while not isinstance(message := group.hear(), Stop):
        if isinstance(message, Batch):
            passes.take_part(message, context_length=context_length)
    logger.info("rank %d is sent home", group.rank)
