"""What can go wrong in the trainer.

    TrainerError
    ├── LeaseLostError             another trainer follows this base model now
    ├── RestartAskedError          an admin has told the trainer to start again, and nothing is left to be done
    ├── ModelFormatError           the base model's checkpoint is stored in a way that the trainer does not know
    ├── DeviceError                there is no such device
    ├── ShardingError              the model cannot be divided among so many processes
    ├── GroupBrokenError           the processes that share the model are out of step, or one is gone
    ├── PassFailedError            a process of the group could not compute its share
    └── TaskFailedError            an operation cannot be done; becomes the error of its result
        ├── InvalidTaskError       what was asked is wrong
        ├── NonFiniteError         the numbers left the range of floats
        ├── NoGradientsError       an optimizer step without a backward before it
        ├── PolicyConflictError    the run is not at the policy version that was expected
        ├── RunUnavailableError    the run was never created
        ├── RunLostError           the run's state is gone, or could not be rebuilt
        ├── GapError               an earlier operation of the run never came
        └── StoreError             the checkpoint store did not take or give the files
            ├── FullError          there is no room
            ├── MissingError       the checkpoint is not there
            └── CorruptError       it is there, but not as it was written

Whatever fails leaves its run as it was before.
"""

from __future__ import annotations

from river_trainer.protocol import TaskError


class TrainerError(Exception):
    """Root of all errors of this package."""


class LeaseLostError(TrainerError):
    """Somebody else holds the lease: this trainer has to stop."""


class RestartAskedError(TrainerError):
    """The process is to end and to be started again."""


class ModelFormatError(TrainerError):
    """The weights of the base model are not stored as they should be, or in a way that is not supported."""


class DeviceError(TrainerError):
    """The device that the settings ask for is not there."""


class ShardingError(TrainerError):
    """The model cannot be divided among the processes of the group."""


class GroupBrokenError(TrainerError):
    """Nothing can be computed together any more: every process of the group has to end and be started again."""


class PassFailedError(TrainerError):
    """A share of a batch failed in a way that left the processes in step; nothing of the batch counts."""


class TaskFailedError(TrainerError):
    """An operation that cannot be done; `param` names the field at fault."""

    type = "internal"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def as_task_error(self) -> TaskError:
        return TaskError(type=self.type, message=str(self), param=self.param)


class InvalidTaskError(TaskFailedError):
    """A field of the operation has a value that the trainer cannot work with."""

    type = "invalid_request"


class NonFiniteError(TaskFailedError):
    """A loss or a gradient is infinite or not a number."""

    type = "non_finite"


class NoGradientsError(TaskFailedError):
    """There is nothing to step on."""

    type = "no_gradients"


class PolicyConflictError(TaskFailedError):
    """The operation is meant for another policy version than the run is at."""

    type = "conflict"


class RunUnavailableError(TaskFailedError):
    """The run could not be created or rebuilt, so there is nothing to train."""

    type = "run_unavailable"


class RunLostError(TaskFailedError):
    """What the run had learned is gone: it never goes on from an older state without saying so."""

    type = "run_lost"


class GapError(TaskFailedError):
    """The operation waited for one before it that did not come in time."""

    type = "operation_missing"


class StoreError(TaskFailedError):
    """Files could not be written or read."""

    type = "storage_failed"


class FullError(StoreError):
    """The disk is full or a quota used up."""

    type = "storage_full"


class MissingError(StoreError):
    """The store answers, and has no such files."""

    type = "checkpoint_missing"


class CorruptError(StoreError):
    """The store answers, and what it has is not what was written; the message says which file."""

    type = "checkpoint_corrupt"
