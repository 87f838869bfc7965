"""What all gateways together saw in the same ten seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from river_gateway.health.slots import Series

if TYPE_CHECKING:
    from collections.abc import Iterable

    from river_gateway.health.slots import Slot


@dataclass(slots=True)
class Moment:
    """`series` are the sums over `gateways`; `failing` counts how many of those leave an engine alone."""

    gateways: set[str] = field(default_factory=set[str])
    series: dict[str, Series] = field(default_factory=dict[str, Series])
    failing: dict[str, int] = field(default_factory=dict[str, int])

    def add(self, slot: Slot) -> bool:
        """Takes in a gateway's word, the first time it comes."""
        if slot.gateway_id in self.gateways:
            return False
        self.gateways.add(slot.gateway_id)
        for name, series in slot.series.items():
            self.series[name] = total_of((self.series.get(name, Series()), series))
        for engine_id in slot.failing:
            self.failing[engine_id] = self.failing.get(engine_id, 0) + 1
        return True


def total_of(found: Iterable[Series]) -> Series:
    """The sum of all."""
    total = Series()
    for series in found:
        for sums, counts in (
            (total.statuses, series.statuses),
            (total.first, series.first),
            (total.whole, series.whole),
        ):
            for key, count in counts.items():
                sums[key] = sums.get(key, 0) + count
    return total
