"""The other gateways, as far as this one hears of them. Pure: time comes in, in seconds of a steady clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from river_gateway.limits import (
    QUOTA_ASK_GAP_S,
    QUOTA_ECHO_LOST_S,
    QUOTA_JOIN_S,
    QUOTA_PEER_LOST_S,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from river_gateway.tenancy.messages import Announcement
    from river_gateway.tenancy.shares import Share


@dataclass(slots=True)
class _Peer:
    heard_at: float
    sequence: int


class Replicas:
    """How many gateways there are, and which of our shares have news for them.

    A gateway knows that it is heard by hearing itself. While it does not, it is cut off: it counts on all others going
    on, as many as there were, and none of them is forgotten meanwhile. Whom it does not hear while it hears itself is
    gone after `QUOTA_PEER_LOST_S`.
    """

    def __init__(self, gateway_id: str, now: float) -> None:
        self.gateway_id = gateway_id
        self.count = 1
        self.cut_off = False
        self.shared = False
        """Whether others draw from the same pools."""
        self.news: dict[Share, None] = {}
        self.wake: Callable[[], None] = lambda: None
        self.asking: dict[str, None] = {}
        """Who waits for our levels."""
        self._peers: dict[str, _Peer] = {}
        self._echoed_at = now
        self._back_at: float | None = None
        self._looked_at = now
        self._must_ask = True
        self._asked_at = float("-inf")

    def changed(self, share: Share) -> None:
        """The others have to hear of a share, if there are any who can."""
        if self.shared:
            self.news[share] = None
            self.wake()

    def hear(self, message: Announcement, now: float) -> bool:
        """Takes in who sent an announcement. False when it is our own."""
        sender = message.gateway
        if sender == self.gateway_id:
            self._echoed_at = now
            return False
        if message.leaves:
            self._peers.pop(sender, None)
            self.asking.pop(sender, None)
            self._recount()
            return True
        peer = self._peers.get(sender)
        if peer is None:
            self._peers[sender] = _Peer(now, message.sequence)
            self._recount()
            self._must_ask = self._must_ask or not message.asks
        else:
            self._must_ask = self._must_ask or message.sequence != peer.sequence + 1
            peer.heard_at, peer.sequence = now, message.sequence
        if message.asks:
            self.asking[sender] = None
            self.wake()
        return True

    def look(self, now: float, *, connected: bool) -> tuple[list[str], bool]:
        """Who has gone since the last look, and whether being cut off has begun or ended."""
        stalled_s = now - self._looked_at
        self._looked_at = now
        if stalled_s > QUOTA_ECHO_LOST_S:
            # It was this process that stood still: what the others said in that time is yet to be read.
            self._echoed_at = now
            for peer in self._peers.values():
                peer.heard_at = now
        if self._turn(now, heard=connected and now - self._echoed_at < QUOTA_ECHO_LOST_S):
            return [], True
        if self.cut_off:
            return [], False
        gone = [
            name for name, peer in self._peers.items() if now - peer.heard_at >= QUOTA_PEER_LOST_S
        ]
        for name in gone:
            del self._peers[name]
        if gone:
            self._recount()
        return gone, False

    def asks(self, now: float) -> bool:
        """Whether the announcement about to be sent is to ask for levels."""
        asks = self._must_ask and now - self._asked_at >= QUOTA_ASK_GAP_S
        if asks:
            self._must_ask = False
            self._asked_at = now
        return asks

    def _turn(self, now: float, *, heard: bool) -> bool:
        """Whether being cut off begins or ends; it ends when there was time for answers."""
        if not heard:
            self._back_at = None
            if self.cut_off:
                return False
            self.cut_off = True
            self._recount()
            return True
        if not self.cut_off:
            return False
        if self._back_at is None:
            self._back_at = now
            self._must_ask = True
            self._asked_at = float("-inf")
        if now - self._back_at < QUOTA_JOIN_S:
            return False
        self.cut_off = False
        for peer in self._peers.values():
            peer.heard_at = now
        self._recount()
        return True

    def _recount(self) -> None:
        self.count = len(self._peers) + 1
        self.shared = self.count > 1 and not self.cut_off
        if not self.shared:
            self.news.clear()
