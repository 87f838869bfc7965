"""How the dashboard writes numbers."""

from __future__ import annotations

import pytest

from river_gateway.dashboard.words import usd


@pytest.mark.parametrize(
    ("nano_usd", "short"),
    [
        (0, "$0.00"),
        (1, "$0.000000001"),
        (48_193, "$0.00004819"),
        (123_456_789, "$0.1235"),
        (1_234_567_890_123, "$1,234.57"),
        (-5_000, "$-0.000005"),
    ],
)
def test_an_amount_is_short_and_no_power_of_ten(nano_usd: int, short: str) -> None:
    """To the cent, or four digits that count where it is less than a dollar."""
    assert usd(nano_usd).striptags() == short
