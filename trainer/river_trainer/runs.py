"""A run in the trainer's memory: its adapter, its optimizer, the gradient collected so far; and as files."""

from __future__ import annotations

from dataclasses import dataclass

from river_trainer.adapter import Adapter, FlatTensors, adapter_from, new_adapter
from river_trainer.devices import Home
from river_trainer.errors import InvalidTaskError, NonFiniteError
from river_trainer.optimizer import STATE_FILE, AdamState
from river_trainer.passes import is_finite
from river_trainer.peft_files import export_adapter, import_adapter
from river_trainer.protocol import AdapterShape, TaskError
from river_trainer.sites import Site


@dataclass(slots=True)
class Run:
    """`step` counts policy versions, `last_seq` is the newest operation done, `gradient` None means none pending."""

    run_id: str
    adapter: Adapter
    optimizer: AdamState
    step: int = 0
    last_seq: int = 0
    gradient: FlatTensors | None = None

    @property
    def size_bytes(self) -> int:
        """Memory of weights, moments and a gradient, which may be pending or come with the next operation."""
        copy = 0 if self.adapter.copy is None else self.adapter.copy.flat.nbytes
        return 4 * self.adapter.weights.flat.nbytes + copy

    def move(self, home: Home) -> None:
        """Brings everything of the run to `home`."""
        self.adapter = self.adapter.at(home)
        self.optimizer = self.optimizer.on(home.device)
        if self.gradient is not None:
            self.gradient = self.gradient.on(home.device)

    def frozen(self) -> Run:
        """The run as it is now, on the host, for a thread that writes it down while training goes on."""
        gradient = None if self.gradient is None else self.gradient.host_copy()
        adapter, optimizer = self.adapter.host_copy(), self.optimizer.host_copy()
        return Run(self.run_id, adapter, optimizer, self.step, self.last_seq, gradient)

    def files(self, *, base_model: str, optimizer: bool) -> dict[str, bytes]:
        """The adapter as PEFT files, and the optimizer's state beside it if asked for."""
        files = export_adapter(self.adapter, base_model=base_model)
        if optimizer:
            files[STATE_FILE] = self.optimizer.to_bytes()
        return files


@dataclass(frozen=True, slots=True)
class FailedRun:
    """A run that could not be created or rebuilt; it answers every later operation with the same refusal.

    One that is not `durable` may be had by the next process: nothing of it is written down.
    """

    run_id: str
    error: TaskError
    last_seq: int
    durable: bool = True


def new_run(run_id: str, sites: tuple[Site, ...], shape: AdapterShape) -> Run:
    """A run that has not learned anything yet, on the host."""
    adapter = new_adapter(sites, shape)
    return Run(run_id, adapter, AdamState.new(adapter.layout))


def together(pending: FlatTensors | None, gradient: FlatTensors) -> FlatTensors:
    """The sum of both, in `gradient`'s memory; `pending` stays as it is.

    Raises:
        NonFiniteError: the sum overflows.
    """
    if pending is not None:
        gradient.flat.add_(pending.flat)
        if not is_finite(gradient.flat):
            raise NonFiniteError("the sum of the gradients is not finite")
    return gradient


def load_files(
    run: Run, sites: tuple[Site, ...], files: dict[str, bytes], home: Home, *, optimizer: bool
) -> None:
    """Puts stored weights, and the stored optimizer if asked for, in place of the run's; drops pending gradients.

    Then the run is at `home`. Without the stored optimizer its own starts anew: moments of other weights mean nothing.

    Raises:
        InvalidTaskError: the files do not fit the run, which stays as it was.
    """
    shape = run.adapter.shape
    stored, tensors = import_adapter(files, sites, seed=shape.seed, complete=False)
    check_same_shape(stored, shape)
    state = AdamState.new(run.adapter.layout)
    if optimizer:
        if STATE_FILE not in files:
            raise InvalidTaskError(
                "the checkpoint has no optimizer state: it was saved for inference",
                param="optimizer",
            )
        state.restore(files[STATE_FILE])
    run.adapter = adapter_from(sites, shape, tensors)
    run.optimizer = state
    run.gradient = None
    run.move(home)


def check_same_shape(stored: AdapterShape, shape: AdapterShape) -> None:
    """Makes sure that stored weights are of a run's shape; the seed need not be the same.

    Raises:
        InvalidTaskError: they are not; names everything that differs, with both values.
    """
    different = [
        f"{name} {getattr(stored, name)} instead of {getattr(shape, name)}"
        for name in AdapterShape.__struct_fields__
        if name != "seed" and getattr(stored, name) != getattr(shape, name)
    ]
    if different:
        raise InvalidTaskError(f"the checkpoint has {' and '.join(different)}", param="checkpoint")
