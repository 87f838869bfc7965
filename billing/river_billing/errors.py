"""What can go wrong in billing.

BillingError
├── RejectedEventError    a message that can never be recorded, whoever tries
├── PriceError            a price that may not be set
├── AmountError           an amount that may not be booked or set
├── ReferenceTakenError   something else was booked under that reference
├── UnknownAccountError   there is no such tenant or key
├── ExportError           an export that cannot be made as it was asked for
└── ClosingError          an invoice that may not be closed
"""

from __future__ import annotations


class BillingError(Exception):
    """Base of all errors of billing."""


class RejectedEventError(BillingError):
    """The message is no event, or an event with impossible values; retrying cannot help."""


class PriceError(BillingError):
    """The price is negative, too high, unknown, or would change the past."""


class AmountError(BillingError):
    """The amount of money is zero, negative or higher than can be meant."""


class ReferenceTakenError(BillingError):
    """The reference names a transaction that is not the same."""


class UnknownAccountError(BillingError):
    """There is no tenant or key of that name."""


class ExportError(BillingError):
    """A time, a range or a cursor of an export is not possible; begins with the field's name."""


class ClosingError(BillingError):
    """The month is none, is not over, or may not be recorded yet; begins with the field's name."""
