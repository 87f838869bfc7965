"""The synchronous client: the asynchronous one, run on an event loop in a thread of its own.

Every method here is one of `async_client` that blocks; what it does is written there.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack

from river_client import limits, wire
from river_client.async_aliases import AsyncAliases
from river_client.async_audit import AsyncAudit
from river_client.async_client import AsyncClient, AsyncSession
from river_client.async_credit import AsyncBudgets, AsyncCredit
from river_client.async_invoices import AsyncInvoices
from river_client.async_machines import AsyncEngines, AsyncTrainers
from river_client.async_model import AsyncModel
from river_client.async_resources import AsyncAdmin, AsyncCheckpoints, AsyncRuns
from river_client.async_usage import UsageOptions
from river_client.chat import ChatMessages
from river_client.learning import Learning, LocalLearning, RunsLearning
from river_client.pending import AsyncPendingOp
from river_client.portal import Blocking, Portal, blocking, handing, next_or_none
from river_client.results import TrainingResult
from river_client.usage_wire import UsageRow

Result = TypeVar("Result")


class PendingOp(Blocking, Generic[Result]):
    """An accepted operation. It is durable: it will be carried out whether anybody waits for it or not."""

    def __init__(self, portal: Portal, twin: AsyncPendingOp[Result]) -> None:
        self._portal = portal
        self._twin: AsyncPendingOp[Result] = twin
        self.operation_id = twin.operation_id

    @property
    def queue_state(self) -> wire.QueueState | None:
        """What the operation was waiting for when the server was last asked; None when done, or not known yet."""
        return self._twin.queue_state

    def result(self, timeout: float | None = None) -> Result:
        """Waits for the operation and returns what it did; again and again if you like.

        Raises:
            TimeoutError: `timeout` seconds passed; the operation goes on, and this may be called again.
            OperationFailedError: the trainer could not do it.
        """
        return self._portal.run(self._twin.result(timeout))

    def done(self) -> bool:
        """Whether the operation has been carried out or has failed."""
        return self._portal.run(self._twin.done())


class Model(Blocking):
    """One adapter in training. Calls may come from many threads; they are carried out in the order made."""

    def __init__(self, portal: Portal, twin: AsyncModel) -> None:
        self._portal = portal
        self._twin: AsyncModel = twin
        self.run_id = twin.run_id
        self.base_model = twin.base_model
        self.lora = twin.lora
        self.path = twin.path

    @property
    def policy_version(self) -> str:
        """The newest version that an answered operation has made."""
        return self._twin.policy_version

    forward = blocking(AsyncModel.forward)
    forward_backward = blocking(AsyncModel.forward_backward)
    forward_backward_custom = blocking(AsyncModel.forward_backward_custom)
    optim_step = blocking(AsyncModel.optim_step)
    train_step = blocking(AsyncModel.train_step)
    save_weights = blocking(AsyncModel.save_weights)
    load_weights = blocking(AsyncModel.load_weights)
    unload = blocking(AsyncModel.unload)
    log = blocking(AsyncModel.log)
    log_samples = blocking(AsyncModel.log_samples)
    sample = blocking(AsyncModel.sample)

    learn_from = handing(AsyncModel.learn_from, Learning)
    learn_locally = handing(AsyncModel.learn_locally, LocalLearning)

    submit_forward = handing(AsyncModel.submit_forward, PendingOp)
    submit_forward_backward = handing(AsyncModel.submit_forward_backward, PendingOp)
    submit_optim_step = handing(AsyncModel.submit_optim_step, PendingOp)
    submit_train_step = handing(AsyncModel.submit_train_step, PendingOp)
    submit_batch = handing(AsyncModel.submit_batch, PendingOp)
    submit_save_weights = handing(AsyncModel.submit_save_weights, PendingOp)
    submit_load_weights = handing(AsyncModel.submit_load_weights, PendingOp)
    submit_unload = handing(AsyncModel.submit_unload, PendingOp)


class Session(Blocking):
    """A piece of work, alive while its heartbeats come. What was trained in it stays when it ends."""

    def __init__(self, portal: Portal, twin: AsyncSession) -> None:
        self._portal = portal
        self._twin: AsyncSession = twin

    @property
    def session_id(self) -> str:
        """The id that the server has given it, once it is open."""
        return self._twin.session_id

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    open = blocking(AsyncSession.open)
    close = blocking(AsyncSession.close)

    def create_model(
        self,
        base_model: str,
        *,
        lora: wire.LoraConfig | None = None,
        checkpoint: str | None = None,
        optimizer: bool = True,
        user_metadata: dict[str, str] | None = None,
    ) -> Model:
        """A new adapter on a base model, fresh or from a checkpoint; returns when it can be trained.

        Without `lora` it has the checkpoint's shape. `optimizer=False` leaves the checkpoint's optimizer out: those
        saved for inference and imported ones have none. `user_metadata` is kept with the run.

        Raises:
            NotFoundError: there is no such base model or checkpoint.
            InvalidRequestError: the shape is not possible here, or not the checkpoint's.
        """
        twin = self._twin.create_model(
            base_model,
            lora=lora,
            checkpoint=checkpoint,
            optimizer=optimizer,
            user_metadata=user_metadata,
        )
        return Model(self._portal, self._portal.run(twin))


class Runs(Blocking):
    """`client.runs`."""

    def __init__(self, portal: Portal, twin: AsyncRuns) -> None:
        self._portal = portal
        self._twin = twin

    list = blocking(AsyncRuns.list)
    get = blocking(AsyncRuns.get)
    samples = blocking(AsyncRuns.samples)


class Aliases(Blocking):
    """`client.aliases`: model names of your own."""

    def __init__(self, portal: Portal, twin: AsyncAliases) -> None:
        self._portal = portal
        self._twin = twin

    list = blocking(AsyncAliases.list)
    get = blocking(AsyncAliases.get)
    set = blocking(AsyncAliases.set)
    promote = blocking(AsyncAliases.promote)
    split = blocking(AsyncAliases.split)
    rollback = blocking(AsyncAliases.rollback)
    history = blocking(AsyncAliases.history)
    delete = blocking(AsyncAliases.delete)


class Checkpoints(Blocking):
    """`client.checkpoints`."""

    def __init__(self, portal: Portal, twin: AsyncCheckpoints) -> None:
        self._portal = portal
        self._twin = twin

    list = blocking(AsyncCheckpoints.list)
    get = blocking(AsyncCheckpoints.get)
    files = blocking(AsyncCheckpoints.files)
    delete = blocking(AsyncCheckpoints.delete)
    publish = blocking(AsyncCheckpoints.publish)
    unpublish = blocking(AsyncCheckpoints.unpublish)
    copy = blocking(AsyncCheckpoints.copy)
    signed_urls = blocking(AsyncCheckpoints.signed_urls)
    promote = blocking(AsyncCheckpoints.promote)
    set_ttl = blocking(AsyncCheckpoints.set_ttl)
    download = blocking(AsyncCheckpoints.download)
    export = blocking(AsyncCheckpoints.export)
    import_adapter = blocking(AsyncCheckpoints.import_adapter)


class Admin(Blocking):
    """`client.admin`, for keys with the scope `admin`."""

    def __init__(self, portal: Portal, twin: AsyncAdmin) -> None:
        self._portal = portal
        self._twin = twin

    tenants = blocking(AsyncAdmin.tenants)
    create_tenant = blocking(AsyncAdmin.create_tenant)
    change_tenant_limits = blocking(AsyncAdmin.change_tenant_limits)
    change_retention = blocking(AsyncAdmin.change_retention)
    keys = blocking(AsyncAdmin.keys)
    create_key = blocking(AsyncAdmin.create_key)
    change_key_limits = blocking(AsyncAdmin.change_key_limits)
    change_key = blocking(AsyncAdmin.change_key)
    rotate_key = blocking(AsyncAdmin.rotate_key)
    revoke_key = blocking(AsyncAdmin.revoke_key)


class Credit(Blocking):
    """`client.credit`: what a tenant has and owes."""

    def __init__(self, portal: Portal, twin: AsyncCredit) -> None:
        self._portal = portal
        self._twin = twin

    show = blocking(AsyncCredit.show)
    entries = blocking(AsyncCredit.entries)
    add = blocking(AsyncCredit.add)
    set_billing = blocking(AsyncCredit.set_billing)


class Budgets(Blocking):
    """`client.budgets`: of tenants and keys, for a calendar month."""

    def __init__(self, portal: Portal, twin: AsyncBudgets) -> None:
        self._portal = portal
        self._twin = twin

    show = blocking(AsyncBudgets.show)
    set = blocking(AsyncBudgets.set)


class Invoices(Blocking):
    """`client.invoices`: of each month."""

    def __init__(self, portal: Portal, twin: AsyncInvoices) -> None:
        self._portal = portal
        self._twin = twin

    list = blocking(AsyncInvoices.list)
    open = blocking(AsyncInvoices.open)
    get = blocking(AsyncInvoices.get)
    page = blocking(AsyncInvoices.page)
    close = blocking(AsyncInvoices.close)


class Audit(Blocking):
    """`client.audit`: who changed what."""

    def __init__(self, portal: Portal, twin: AsyncAudit) -> None:
        self._portal = portal
        self._twin = twin

    list = blocking(AsyncAudit.list)


class Engines(Blocking):
    """`client.engines`: what serves, for admins."""

    def __init__(self, portal: Portal, twin: AsyncEngines) -> None:
        self._portal = portal
        self._twin = twin

    list = blocking(AsyncEngines.list)
    drain = blocking(AsyncEngines.drain)
    undrain = blocking(AsyncEngines.undrain)
    restart = blocking(AsyncEngines.restart)


class Trainers(Blocking):
    """`client.trainers`: what trains, for admins."""

    def __init__(self, portal: Portal, twin: AsyncTrainers) -> None:
        self._portal = portal
        self._twin = twin

    list = blocking(AsyncTrainers.list)
    drain = blocking(AsyncTrainers.drain)
    undrain = blocking(AsyncTrainers.undrain)
    restart = blocking(AsyncTrainers.restart)


class Client(Blocking):
    """A River server, as seen with one API key.

    `api_key` and `base_url` default to RIVER_API_KEY and RIVER_BASE_URL, then to what `river login` stored. What fails
    in passing is retried for `retry_for_s` seconds, as the same operation, so that nothing happens twice.

    Raises:
        AuthenticationError: there is no key.
    """

    def __init__(
        self,
        api_key: str | None = None,
        base_url: str | None = None,
        *,
        retry_for_s: float = limits.RETRY_PERIOD_S,
    ) -> None:
        self._portal = Portal()
        self._twin: AsyncClient = AsyncClient(api_key, base_url, retry_for_s=retry_for_s)
        self.api_key = self._twin.api_key
        self.base_url = self._twin.base_url
        self._retry_for_s = retry_for_s
        self.runs = Runs(self._portal, self._twin.runs)
        self.checkpoints = Checkpoints(self._portal, self._twin.checkpoints)
        self.aliases = Aliases(self._portal, self._twin.aliases)
        self.learning = RunsLearning(self._portal, self._twin.learning)
        self.admin = Admin(self._portal, self._twin.admin)
        self.credit = Credit(self._portal, self._twin.credit)
        self.budgets = Budgets(self._portal, self._twin.budgets)
        self.invoices = Invoices(self._portal, self._twin.invoices)
        self.audit = Audit(self._portal, self._twin.audit)
        self.engines = Engines(self._portal, self._twin.engines)
        self.trainers = Trainers(self._portal, self._twin.trainers)

    def __reduce__(self) -> tuple[Callable[[str, float], Client], tuple[str, float]]:
        return _reopened, (self.base_url, self._retry_for_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections and ends the thread behind them."""
        self._portal.run(self._twin.close())
        self._portal.close()

    def session(self, **tags: str) -> Session:
        """A session to train in: `with client.session(project="x") as session`."""
        return Session(self._portal, self._twin.session(**tags))

    def operation(self, operation_id: str) -> PendingOp[TrainingResult]:
        """An operation submitted before, such as that of a `TimeoutError`."""
        return PendingOp(self._portal, self._twin.operation(operation_id))

    def chat_stream(
        self,
        messages: ChatMessages,
        *,
        model: str,
        max_tokens: int | None = None,
        temperature: float | None = None,
        **options: Any,
    ) -> Generator[str]:
        """`chat`, in pieces of text as they come."""
        pieces = self._twin.chat_stream(
            messages, model=model, max_tokens=max_tokens, temperature=temperature, **options
        )
        yield from self._iterate(pieces)

    def usage_rows(self, **asked: Unpack[UsageOptions]) -> Generator[UsageRow]:
        """What was used by hour or day, as the asynchronous client's `usage_rows` says."""
        yield from self._iterate(self._twin.usage_rows(**asked))

    def usage_csv(self, **asked: Unpack[UsageOptions]) -> Generator[str]:
        """The same as CSV, in pieces of text as they come."""
        yield from self._iterate(self._twin.usage_csv(**asked))

    def _iterate(self, pieces: AsyncGenerator[Result]) -> Generator[Result]:
        try:
            while (piece := self._portal.run(next_or_none(pieces))) is not None:
                yield piece
        finally:
            self._portal.run(pieces.aclose())

    sample = blocking(AsyncClient.sample)
    chat = blocking(AsyncClient.chat)
    models = blocking(AsyncClient.models)
    feedback = blocking(AsyncClient.feedback)
    feedback_many = blocking(AsyncClient.feedback_many)
    feedback_batch = blocking(AsyncClient.feedback_batch)
    acknowledge = blocking(AsyncClient.acknowledge)
    usage = blocking(AsyncClient.usage)
    prices = blocking(AsyncClient.prices)
    set_price = blocking(AsyncClient.set_price)
    discounts = blocking(AsyncClient.discounts)
    set_discount = blocking(AsyncClient.set_discount)


def _reopened(base_url: str, retry_for_s: float) -> Client:
    """A client that was pickled: its key is the one that this process has for the server."""
    return Client(base_url=base_url, retry_for_s=retry_for_s)
