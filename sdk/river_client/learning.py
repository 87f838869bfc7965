"""Learning from feedback, for synchronous code; what it does is written in `async_learning`."""

from __future__ import annotations

from collections.abc import Generator

from river_client.async_learning import AsyncLearning, AsyncLocalLearning, AsyncRunsLearning
from river_client.exceptions import RiverError
from river_client.learning_wire import LearningState
from river_client.portal import Blocking, Portal, blocking, next_or_none


class Learning(Blocking):
    """A run that the server trains on feedback. It goes on whether anybody looks or not."""

    def __init__(self, portal: Portal, twin: AsyncLearning) -> None:
        self._portal = portal
        self._twin: AsyncLearning = twin
        self.run_id = twin.run_id

    @property
    def state(self) -> LearningState:
        """How far it had come when the server was last asked."""
        return self._twin.state

    refresh = blocking(AsyncLearning.refresh)
    stop = blocking(AsyncLearning.stop)
    wait = blocking(AsyncLearning.wait)

    def steps(self) -> Generator[LearningState]:
        """The state after each step, or after several if they come fast, until it ends.

        Raises:
            OperationFailedError: it failed; the message says why.
        """
        states = self._twin.steps()
        try:
            while (state := self._portal.run(next_or_none(states))) is not None:
                yield state
        finally:
            self._portal.run(states.aclose())


class LocalLearning(Blocking):
    """A loop in this process that learns from feedback."""

    def __init__(self, portal: Portal, twin: AsyncLocalLearning) -> None:
        self._portal = portal
        self._twin: AsyncLocalLearning = twin
        self.alias = twin.alias

    @property
    def steps(self) -> int:
        """How many batches it has trained on."""
        return self._twin.steps

    @property
    def completions(self) -> int:
        """How many completions were in them."""
        return self._twin.completions

    @property
    def error(self) -> RiverError | None:
        """What ended it, if something did."""
        return self._twin.error

    @property
    def active(self) -> bool:
        """Whether it goes on."""
        return self._twin.active

    stop = blocking(AsyncLocalLearning.stop)


class RunsLearning(Blocking):
    """`client.learning`: the runs that the server trains on feedback."""

    def __init__(self, portal: Portal, twin: AsyncRunsLearning) -> None:
        self._portal = portal
        self._twin = twin

    list = blocking(AsyncRunsLearning.list)
    get = blocking(AsyncRunsLearning.get)
    start = blocking(AsyncRunsLearning.start)
    stop = blocking(AsyncRunsLearning.stop)
