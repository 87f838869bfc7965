"""A clock of its own for `Admission`: a machine that takes a step for every token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from river_engine.admission import Admission, Bounds, Turn

SLICE_S = 0.25
STEP_S = 0.01


def bounds(**changes: float) -> Bounds:
    fields: dict[str, float] = {
        "sequences": 16,
        "tokens": 100_000,
        "slots": 2,
        "slice_s": SLICE_S,
        "waiting": 1000,
        "waiting_per_tenant": 500,
        "waiting_bytes": 1_000_000,
    }
    return Bounds(**(fields | changes))  # type: ignore[arg-type]


def turn(tenant: str, version: str | None = None, **fields: int) -> Turn:
    plain = {"prompt_tokens": 10, "completion_tokens_max": 50} | fields
    return Turn(tenant=tenant, version=version, **plain)  # type: ignore[arg-type]


@dataclass(eq=False)
class Asked:
    turn: Turn
    length: int
    asked_at: int
    done_at: int | None = None

    @property
    def steps(self) -> int:
        assert self.done_at is not None
        return self.done_at - self.asked_at


@dataclass
class Machine:
    """All that is inside gets one token a step, and takes `STEP_S` for it; `whenever_done` hears of every answer."""

    admission: Admission
    now: int = 0
    running: list[Asked] = field(default_factory=list[Asked])
    waiting: dict[Turn, Asked] = field(default_factory=dict[Turn, Asked])
    served: Counter[str] = field(default_factory=Counter[str])
    whenever_done: list[Callable[[Asked], None]] = field(
        default_factory=list[Callable[[Asked], None]]
    )

    def ask(
        self, tenant: str, version: str | None = None, *, length: int = 20, **fields: int
    ) -> Asked:
        plain = {"completion_tokens_max": length} | fields
        asked = Asked(turn(tenant, version, **plain), length, self.now)
        self.admission.arrive([asked.turn], self.now * STEP_S)
        self.waiting[asked.turn] = asked
        self._let_in()
        return asked

    def flood(self, tenant: str, version: str | None, count: int, **fields: int) -> None:
        """Keeps so many requests asked for: whenever one is done, another comes."""
        asked = {self.ask(tenant, version, **fields) for _ in range(count)}

        def again(done: Asked) -> None:
            if done in asked:
                asked.remove(done)
                asked.add(self.ask(tenant, version, **fields))

        self.whenever_done.append(again)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._step()

    def answer(self, asked: Asked, within: int) -> int:
        """Runs until `asked` is done; the steps it took since it was asked."""
        while asked.done_at is None:
            assert self.now - asked.asked_at < within, "starved"
            self._step()
        return asked.steps

    def _step(self) -> None:
        self.now += 1
        done: list[Asked] = []
        for asked in self.running:
            asked.turn.produced += asked.turn.sequences
            self.served[asked.turn.tenant] += asked.turn.sequences
            if asked.turn.produced >= asked.length * asked.turn.sequences:
                done.append(asked)
        for asked in done:
            asked.done_at = self.now
            self.running.remove(asked)
            self.admission.leave(asked.turn)
            self._let_in()
        for asked in done:
            for hear in self.whenever_done:
                hear(asked)

    def _let_in(self) -> None:
        for admitted in self.admission.advance(self.now * STEP_S):
            self.running.append(self.waiting.pop(admitted))
            self.served[admitted.tenant] += admitted.prompt_tokens
