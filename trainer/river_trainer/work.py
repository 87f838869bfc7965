"""What goes into the executor and what comes out of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field

from river_trainer.adapter import Adapter
from river_trainer.errors import TaskFailedError
from river_trainer.protocol import (
    AnyTask,
    CreateRun,
    Forward,
    LoadWeights,
    Refused,
    SaveWeights,
    TaskError,
    TrainMessage,
    TrainResult,
    Unload,
)
from river_trainer.runs import Run

PURE = (Forward, SaveWeights, Unload, Refused)
"""Tasks that leave no trace in the run: replaying the journal may skip them."""
LOADING = (CreateRun, LoadWeights)
"""Tasks that may read a checkpoint, which may be gone when the journal is replayed."""


@dataclass(frozen=True, slots=True)
class Work:
    """An operation to do; `files` are those of the checkpoint it reads, or why they cannot be had.

    `told` is the result that an earlier process has published for it. `gone` says why nobody knows any more what was
    asked for; the message is an empty one then.
    """

    message: TrainMessage
    files: dict[str, bytes] | TaskFailedError | None = None
    told: TrainResult | None = None
    gone: TaskError | None = None

    @property
    def is_over(self) -> bool:
        """Whether it was done or refused and left nothing in the run that has to be done again."""
        if self.told is None:
            return False
        if self.gone is not None:
            # Nobody knows what it was; only a save leaves nothing in the run and tells by its result that it was one.
            return self.told.error is not None or self.told.checkpoint is not None
        return self.told.error is not None or isinstance(self.message.task, PURE)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an operation did. `version` is the adapter of the policy version it made.

    `frozen` is the run right after it, where somebody has to write it down: with a save the result lacks its checkpoint
    until then, and a run that has read a checkpoint is snapshotted before the result is told. Both are copies that
    nobody changes.
    """

    work: Work
    result: TrainResult
    version: Adapter | None = None
    frozen: Run | None = None

    @property
    def message(self) -> TrainMessage:
        return self.work.message

    @property
    def size_bytes(self) -> int:
        """Memory of the copies."""
        version = 0 if self.version is None else self.version.weights.flat.nbytes
        return version + (0 if self.frozen is None else self.frozen.size_bytes)


@dataclass(slots=True)
class Report:
    """What a batch took: tokens that went through the model, and seconds by phase."""

    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


class Batch:
    """The works of a batch that are not done, by run, and the outcomes of those that are."""

    def __init__(self, works: Sequence[Work]) -> None:
        self._works = works
        self._outcomes: dict[tuple[str, int], Outcome] = {}
        self._queues: dict[str, deque[Work]] = {}
        for work in works:
            self._queues.setdefault(work.message.run_id, deque()).append(work)

    def __bool__(self) -> bool:
        return bool(self._queues)

    def first_messages(self) -> list[TrainMessage]:
        """The next message of every run."""
        return [queue[0].message for queue in self._queues.values()]

    def take(
        self, *kinds: type[AnyTask], waiting: Container[str] = (), over: bool = False
    ) -> Iterator[Work]:
        """Takes the next works of every run, as long as they are of these kinds and the run is none of `waiting`.

        What is over already, or gone, is taken with `over` and only then.
        """
        for run_id, queue in list(self._queues.items()):
            while queue and run_id not in waiting:
                work = queue[0]
                is_over = work.is_over or work.gone is not None
                if not (over if is_over else isinstance(work.message.task, kinds)):
                    break
                yield queue.popleft()
            if not queue:
                del self._queues[run_id]

    def finish(self, outcome: Outcome) -> None:
        message = outcome.message
        self._outcomes[message.run_id, message.seq] = outcome

    def outcomes(self) -> list[Outcome]:
        """One for each work, in the order given."""
        return [self._outcomes[work.message.run_id, work.message.seq] for work in self._works]
