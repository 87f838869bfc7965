"""What can go wrong in billing.

BillingError
├── RejectedEventError    a message that can never be recorded, whoever tries
└── PriceError            a price that may not be set
"""

from __future__ import annotations


class BillingError(Exception):
    """Base of all errors of billing."""


class RejectedEventError(BillingError):
    """The message is no event, or an event with impossible values; retrying cannot help."""


class PriceError(BillingError):
    """The price is negative, too high, unknown, or would change the past."""
