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

    A tenant may always have its equal part, were there one tenant more. Beyond that it may have `OWN_OVER_LEFT` times
    what is left: alone it leaves an eighth of the bound, beside another as greedy they leave a fifteenth.
    """

    def __init__(self, bound: int) -> None:
        assert bound >= 1
        self.bound = bound
        self.used = 0
        self._own: dict[str, int] = {}

    def clamp(self, amount: int) -> int:
        """What one request counts at most: it must fit beside its tenant's others."""
        return min(amount, max(1, self.bound // 2))

    def fit(self, tenant: str, amount: int, tenants: int) -> Fit:
        """Whether `tenant`, one of so many, can have `amount` more."""
        own = self._own.get(tenant, 0) + amount
        left = self.bound - self.used - amount
        is_due = own == amount or own <= self.bound // (tenants + 1)
        if left >= 0 and (is_due or own <= OWN_OVER_LEFT * left):
            return Fit.FITS
        return Fit.WAITS if is_due else Fit.OVER

    def take(self, tenant: str, amount: int) -> None:
        self.used += amount
        self._own[tenant] = self._own.get(tenant, 0) + amount

    def give_back(self, tenant: str, amount: int) -> None:
        self.used -= amount
        self._own[tenant] -= amount
        assert self.used >= 0
        assert self._own[tenant] >= 0
        if not self._own[tenant]:
            del self._own[tenant]
