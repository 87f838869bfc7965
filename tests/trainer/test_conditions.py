"""Operations that are meant for one policy version, and those that begin with no gradients."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from support.training import ADAM, RunScript, forward_backward, random_sequences, shape
from support.workbench import Workbench

from river_trainer.protocol import AnyTask, CreateRun, Forward, OptimStep, SaveWeights, TrainStep

from .test_executor import assert_same, state_of

Maker = Callable[..., Workbench]

DATA = random_sequences(4, [9, 6])
TASKS: dict[str, AnyTask] = {
    "forward": Forward(data=DATA, loss_fn="cross_entropy", loss_config={}),
    "forward_backward": forward_backward(3, [8]),
    "zeroing": msgspec.structs.replace(forward_backward(3, [8]), zero_gradients=True),
    "optim_step": OptimStep(adam=ADAM),
    "train_step": TrainStep(data=DATA, loss_fn="cross_entropy", loss_config={}, adam=ADAM),
    "save_weights": SaveWeights(checkpoint_id="ckpt_1", name="x", mode="training"),
}


def started(make_executor: Maker) -> tuple[Workbench, RunScript]:
    """A run at step one with a gradient pending."""
    executor, script = make_executor(), RunScript("run_a")
    for task in (
        CreateRun(shape=shape()),
        forward_backward(1, [10]),
        OptimStep(adam=ADAM),
        forward_backward(2, [7]),
    ):
        assert executor.execute(script.do(task)).error is None
    return executor, script


@pytest.mark.parametrize("kind", TASKS)
def test_an_operation_for_another_version_changes_nothing(make_executor: Maker, kind: str) -> None:
    """It fails as a conflict that says where the run is; for the right version it is done as ever."""
    executor, script = started(make_executor)
    before = state_of(executor, "run_a")
    for wrong in ("run_a@0", "run_a@2", "run_b@1"):
        result = executor.execute(
            script.do(msgspec.structs.replace(TASKS[kind], expected_policy=wrong))
        )
        assert result.error is not None
        assert (result.error.type, result.error.param) == ("conflict", "expected_policy")
        assert "run_a@1" in result.error.message
        assert (result.step, result.training_tokens, result.checkpoint) == (1, 0, None)
        assert_same(before, state_of(executor, "run_a"))
    right = msgspec.structs.replace(TASKS[kind], expected_policy="run_a@1")
    assert executor.execute(script.do(right)).error is None
    plain, other = started(make_executor)
    assert plain.execute(other.do(TASKS[kind])).error is None
    assert_same(state_of(executor, "run_a"), state_of(plain, "run_a"))


def test_of_two_steps_for_one_version_one_is_taken(make_executor: Maker) -> None:
    """Also when both are in one batch: the second finds the version that the first has made."""
    executor, script = started(make_executor)
    step = TrainStep(
        data=DATA, loss_fn="cross_entropy", loss_config={}, adam=ADAM, expected_policy="run_a@1"
    )
    first, second = executor.execute_together([script.do(step), script.do(step)])
    assert (first.error, first.step) == (None, 2)
    assert second.error is not None
    assert (second.error.type, second.step) == ("conflict", 2)


def test_zeroing_drops_what_was_gathered(make_executor: Maker) -> None:
    """A step after it is one on its own gradient, whether it is separate or atomic, alone or in one batch."""
    data = random_sequences(3, [8])
    separate: list[AnyTask] = [
        msgspec.structs.replace(forward_backward(3, [8]), zero_gradients=True),
        OptimStep(adam=ADAM),
    ]
    atomic: list[AnyTask] = [
        TrainStep(
            data=data, loss_fn="cross_entropy", loss_config={}, adam=ADAM, zero_gradients=True
        )
    ]
    plain: list[AnyTask] = [forward_backward(3, [8]), OptimStep(adam=ADAM)]

    def end(tasks: list[AnyTask], *, stale: bool, together: bool) -> Workbench:
        executor, script = make_executor(), RunScript("run_a")
        executor.execute(script.do(CreateRun(shape=shape())))
        messages = [
            script.do(task) for task in ([forward_backward(2, [7])] if stale else []) + tasks
        ]
        batches = [messages] if together else [[message] for message in messages]
        results = [result for batch in batches for result in executor.execute_together(batch)]
        assert [result.error for result in results] == [None] * len(results)
        return executor

    expected = state_of(end(plain, stale=False, together=False), "run_a")
    ways: list[list[AnyTask]] = [separate, atomic]
    for tasks in ways:
        for together in (False, True):
            assert_same(expected, state_of(end(tasks, stale=True, together=together), "run_a"))
    with pytest.raises(AssertionError):
        assert_same(expected, state_of(end(plain, stale=True, together=False), "run_a"))


def test_a_failure_drops_no_gradients(make_executor: Maker) -> None:
    """An operation that would have dropped them and fails leaves them to be stepped on."""
    executor, script = started(make_executor)
    before = state_of(executor, "run_a")
    wrong = msgspec.structs.replace(forward_backward(3, [8], "nonsense"), zero_gradients=True)
    assert executor.execute(script.do(wrong)).error is not None
    assert_same(before, state_of(executor, "run_a"))
