"""The asynchronous client: everything that the SDK does is done here, once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from types import TracebackType
from typing import Any, Literal, Self, Unpack

import msgspec

from river_client import exceptions, feedback_wire, limits, wire
from river_client.async_aliases import AsyncAliases
from river_client.async_audit import AsyncAudit
from river_client.async_credit import AsyncBudgets, AsyncCredit
from river_client.async_feedback import (
    acknowledge_feedback,
    claim_feedback,
    give_feedback,
)
from river_client.async_invoices import AsyncInvoices
from river_client.async_learning import AsyncRunsLearning
from river_client.async_machines import AsyncEngines, AsyncTrainers
from river_client.async_model import AsyncModel, draw_samples
from river_client.async_resources import AsyncAdmin, AsyncCheckpoints, AsyncRuns
from river_client.async_usage import UsageOptions, usage_csv, usage_rows, usage_sums
from river_client.chat import ChatMessages, chat_body, chat_reply, stream_texts
from river_client.learning_wire import Baseline
from river_client.pending import AsyncPendingOp
from river_client.price_wire import Discount, Discounts, PricedKind, SetDiscount, SetPrice
from river_client.progress import waiting
from river_client.results import (
    ChatReply,
    Sample,
    SampleOptions,
    TrainingResult,
    training_result,
)
from river_client.settings import resolve_login
from river_client.transport import JSON, Transport
from river_client.usage_wire import UsageRow

logger = logging.getLogger("river.client")

SDK_VERSION = "0.1.0"
CHAT_PATH = "/v1/chat/completions"


class AsyncClient:
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
        login = resolve_login(api_key, base_url)
        self.api_key = login.api_key
        self.base_url = login.base_url
        self._retry_for_s = retry_for_s
        self._transport = Transport(login, retry_for_s=retry_for_s)
        self.runs = AsyncRuns(self._transport)
        self.checkpoints = AsyncCheckpoints(self._transport)
        self.aliases = AsyncAliases(self._transport)
        self.learning = AsyncRunsLearning(self._transport)
        self.admin = AsyncAdmin(self._transport)
        self.credit = AsyncCredit(self._transport)
        self.budgets = AsyncBudgets(self._transport)
        self.invoices = AsyncInvoices(self._transport)
        self.audit = AsyncAudit(self._transport)
        self.engines = AsyncEngines(self._transport)
        self.trainers = AsyncTrainers(self._transport)

    def __reduce__(self) -> tuple[Callable[[str, float], AsyncClient], tuple[str, float]]:
        return _reopened, (self.base_url, self._retry_for_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        await self._transport.close()

    def session(self, **tags: str) -> AsyncSession:
        """A session to train in: `async with client.session(project="x") as session`."""
        return AsyncSession(self._transport, tags)

    async def sample(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        model: str | None = None,
        base_model: str | None = None,
        **options: Unpack[SampleOptions],
    ) -> list[list[Sample]]:
        """Samples of any model: a list per prompt.

        `model` is a base model, a checkpoint's path, `river://<run>` or an alias; `base_model` says the same of a base
        model. The options are those of `SampleOptions`.
        """
        name = model or base_model
        if name is None:
            raise exceptions.InvalidRequestError("model: missing", param="model")
        return await draw_samples(self._transport, name, prompts, options)

    async def chat(
        self,
        messages: ChatMessages,
        *,
        model: str,
        max_tokens: int | None = None,
        temperature: float | None = None,
        **options: Any,
    ) -> ChatReply:
        """One answer to a text or a list of messages; `options` are further fields of OpenAI's chat completions."""
        body = chat_body(messages, model, max_tokens, temperature, options)
        async with waiting("waiting for the answer"):
            response = await self._transport.send(
                "POST",
                CHAT_PATH,
                headers={"content-type": JSON},
                content=msgspec.json.encode(body),
                timeout_s=limits.GENERATION_TIMEOUT_S,
            )
        return chat_reply(response)

    async def chat_stream(
        self,
        messages: ChatMessages,
        *,
        model: str,
        max_tokens: int | None = None,
        temperature: float | None = None,
        **options: Any,
    ) -> AsyncGenerator[str]:
        """The same, in pieces of text as they come."""
        body = chat_body(messages, model, max_tokens, temperature, options) | {"stream": True}
        async with self._transport.stream(
            "POST",
            CHAT_PATH,
            headers={"content-type": JSON},
            content=msgspec.json.encode(body),
            timeout_s=limits.GENERATION_TIMEOUT_S,
        ) as response:
            async for text in stream_texts(response):
                yield text

    async def feedback(
        self,
        completion_id: str,
        *,
        reward: float,
        choice: int = 0,
        note: str | None = None,
        user: str | None = None,
    ) -> None:
        """Says what a choice of a stored completion was worth; the newest reward of a choice counts.

        Raises:
            NotFoundError: there is no such completion; one is stored when it is asked for with `store=True`.
        """
        given = feedback_wire.Feedback(
            completion_id=completion_id, reward=reward, choice=choice, note=note, user=user
        )
        await give_feedback(self._transport, [given])

    async def feedback_many(self, given: Sequence[feedback_wire.Feedback]) -> None:
        """Says what many choices were worth, in one request: all of it is kept, or none.

        Raises:
            NotFoundError: a completion is unknown; `param` names it, as `feedback[3].completion_id`.
            InvalidRequestError: a reward is no finite number, or there is no such choice; `param` names it.
        """
        await give_feedback(self._transport, given)

    async def feedback_batch(
        self,
        alias: str,
        *,
        min_batch: int = 1,
        max: int = 256,  # noqa: A002 - its name in the documentation
        consumer: str = "default",
        baseline: Baseline = "prompt",
    ) -> feedback_wire.FeedbackBatch | None:
        """Training data of the feedback on a model name that `consumer` has not had yet; None while it is too little.

        Its `data` can be trained on as they are. They are handed out again unless `acknowledge(batch)` says in time
        that they have been learnt from.
        """
        asked = feedback_wire.ClaimFeedback(
            model=alias,
            min_batch=min_batch,
            max_batch=max,
            consumer=consumer,
            baseline=baseline,
        )
        batch = await claim_feedback(self._transport, asked)
        return batch if batch.batch_id is not None else None

    async def acknowledge(self, batch: feedback_wire.FeedbackBatch) -> None:
        """Says that a batch has been learnt from; again is a no-op."""
        assert batch.batch_id is not None
        await acknowledge_feedback(self._transport, batch.batch_id)

    def operation(self, operation_id: str) -> AsyncPendingOp[TrainingResult]:
        """An operation submitted before, such as that of a `TimeoutError`."""
        return AsyncPendingOp(self._transport, operation_id, training_result)

    async def models(self) -> list[wire.BaseModel]:
        """The base models, with what they can take and do at the moment."""
        page = await self._transport.call("GET", "/models", wire.Page)
        return page.models or []

    async def usage(
        self,
        since: datetime | None = None,
        until: datetime | None = None,
        *,
        tenant: str | None = None,
    ) -> list[wire.UsageLine]:
        """What was used and what it cost, in whole hours; times without a zone are local.

        `tenant` is for admins: a tenant, by id or name, or `*` for all.
        """
        return await usage_sums(self._transport, since, until, tenant)

    def usage_rows(self, **asked: Unpack[UsageOptions]) -> AsyncGenerator[UsageRow]:
        """What was used by hour or day (UTC), in the order of time; however many rows, a page at a time is in memory.

        `group` is what rows are told apart by: some of model, tier, key, user, run. `since` and `until` are the start
        of an hour, or of a day (UTC); without them it is this month so far.
        """
        return usage_rows(self._transport, **asked)

    def usage_csv(self, **asked: Unpack[UsageOptions]) -> AsyncGenerator[str]:
        """The same as CSV, in pieces of text as they come."""
        return usage_csv(self._transport, **asked)

    async def prices(self) -> list[wire.Price]:
        """Every price that is or was in force."""
        page = await self._transport.call("GET", "/prices", wire.Page)
        return page.prices or []

    async def set_price(
        self,
        model: str,
        context_length: int,
        kind: PricedKind,
        usd_per_million: str,
        *,
        valid_from: str | None = None,
    ) -> list[wire.Price]:
        """Puts a price in force (for admins); returns all of the model's. `valid_from` is ISO 8601, None is now."""
        body = SetPrice(
            model=model,
            context_length=context_length,
            kind=kind,
            usd_per_million=usd_per_million,
            valid_from=valid_from,
        )
        page = await self._transport.call("PUT", "/prices", wire.Page, body=body)
        return page.prices or []

    async def discounts(self, tenant: str | None = None) -> list[Discount]:
        """Every discount that a tenant has or had; for admins also another's, or with `*` everybody's."""
        params = {} if tenant is None else {"tenant": tenant}
        return (await self._transport.call("GET", "/discounts", Discounts, params=params)).discounts

    async def set_discount(
        self,
        tenant: str,
        percent: str,
        *,
        model: str = "*",
        kind: PricedKind | Literal["*"] = "*",
        valid_from: str | None = None,
    ) -> list[Discount]:
        """Takes a part off a tenant's prices (for admins); returns all of the tenant's discounts. 0 ends one."""
        body = SetDiscount(
            tenant=tenant, percent=percent, model=model, kind=kind, valid_from=valid_from
        )
        return (await self._transport.call("PUT", "/discounts", Discounts, body=body)).discounts


def _reopened(base_url: str, retry_for_s: float) -> AsyncClient:
    """A client that was pickled: its key is the one that this process has for the server."""
    return AsyncClient(base_url=base_url, retry_for_s=retry_for_s)


class AsyncSession:
    """A piece of work, alive while its heartbeats come. What was trained in it stays when it ends."""

    def __init__(self, transport: Transport, tags: Mapping[str, str]) -> None:
        self.tags = dict(tags)
        self._transport = transport
        self._opened: wire.Session | None = None
        self._heartbeats: asyncio.Task[None] | None = None

    @property
    def session_id(self) -> str:
        """The id that the server has given it, once it is open."""
        assert self._opened is not None, "a session is opened by `with`"
        return self._opened.session_id

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Opens the session and keeps it alive."""
        assert self._opened is None, "a session is opened once"
        body = wire.CreateSession(tags=self.tags, sdk_version=SDK_VERSION)
        self._opened = await self._transport.call("POST", "/sessions", wire.Session, body=body)
        self._heartbeats = asyncio.create_task(self._beat(self._opened))

    async def close(self) -> None:
        """Ends the session. It would end by itself, so a server that cannot be told is no error."""
        if self._heartbeats is None:
            return
        self._heartbeats.cancel()
        with suppress(asyncio.CancelledError):
            await self._heartbeats
        self._heartbeats = None
        try:
            async with asyncio.timeout(limits.CLOSE_TIMEOUT_S):
                await self._transport.tell("DELETE", f"/sessions/{self.session_id}")
        except (exceptions.RiverError, TimeoutError) as error:
            logger.warning("could not end session %s: %s", self.session_id, error)

    async def create_model(
        self,
        base_model: str,
        *,
        lora: wire.LoraConfig | None = None,
        checkpoint: str | None = None,
        optimizer: bool = True,
        user_metadata: dict[str, str] | None = None,
    ) -> AsyncModel:
        """A new adapter on a base model, fresh or from a checkpoint; returns when it can be trained.

        Without `lora` it has the checkpoint's shape. `optimizer=False` leaves the checkpoint's optimizer out: those
        saved for inference and imported ones have none. `user_metadata` is kept with the run.

        Raises:
            NotFoundError: there is no such base model or checkpoint.
            InvalidRequestError: the shape is not possible here, or not the checkpoint's.
        """
        body = wire.CreateRun(
            session_id=self.session_id,
            base_model=base_model,
            lora=lora,
            checkpoint=checkpoint,
            optimizer=optimizer,
            user_metadata=user_metadata or {},
        )
        run = await self._transport.call("POST", "/runs", wire.Run, body=body)
        created = AsyncPendingOp(self._transport, f"{run.run_id}-0", training_result)
        await created.result()
        return AsyncModel(self._transport, run)

    async def _beat(self, session: wire.Session) -> None:
        interval_s = max(session.heartbeat_interval_s, limits.HEARTBEAT_INTERVAL_MIN_S)
        while True:
            await asyncio.sleep(interval_s)
            try:
                await self._transport.tell("POST", f"/sessions/{session.session_id}/heartbeat")
            except exceptions.RiverError as error:
                logger.warning("heartbeat of %s failed: %s", session.session_id, error)
