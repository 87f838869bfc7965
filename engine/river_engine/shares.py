"""How tenants share what there is only so much of. Standard library only."""

from __future__ import annotations

import enum

from river_engine.limits import OWN_OVER_LEFT


class Fit(enum.Enum):
    FITS = enum.auto()
    WAITS = enum.auto()
    """As soon as there is room, which nobody else may take."""
    OVER = enum.auto()
    """Once its tenant has less inside: others may pass."""


class SharedBound:
    """A bound that tenants share, without setting any of it aside for anybody.

    A tenant that does not have more than its equal part, were there one tenant more, may always go on. Beyond that it
    may have `OWN_OVER_LEFT` times what is left: alone it leaves an eighth of the bound, two as greedy a fifteenth.
    """

    def __init__(self, bound: int) -> None:
        assert bound >= 1
        self.bound = bound
        self.used = 0
        self._own: dict[str, int] = {}

    @property
    def left(self) -> int:
        return self.bound - self.used

    def own(self, tenant: str) -> int:
        """What a tenant has of it."""
        return self._own.get(tenant, 0)

    def clamp(self, amount: int) -> int:
        """What one request counts at most: it must fit beside its tenant's others."""
        return min(amount, max(1, self.bound // 2))

    def fit(self, tenant: str, amount: int, tenants: int) -> Fit:
        """Whether `tenant`, one of so many, can have `amount` more."""
        own = self.own(tenant)
        left = self.left - amount
        is_due = own <= self.bound / (tenants + 1)
        if left >= 0 and (is_due or own + amount <= OWN_OVER_LEFT * left):
            return Fit.FITS
        return Fit.WAITS if is_due else Fit.OVER

    def take(self, tenant: str, amount: int) -> None:
        self.used += amount
        self._own[tenant] = self._own.get(tenant, 0) + amount

    def give_back(self, tenant: str, amount: int) -> None:
        self.used -= amount
        left = self._own.pop(tenant, 0) - amount
        assert self.used >= left >= 0
        if left:
            self._own[tenant] = left
