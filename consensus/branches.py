"""Ledger blocks that are proposed but not final, as branches of the last finalized one.

Keeps what the host found out about each: a branch is verified from its root, since every ledger block is
checked on the overlay of its parent. Which branch to follow and whom to ask is left to ``engine``, overlays
to the host.
"""

from dataclasses import dataclass
from enum import Enum, auto

from consensus.block import Header
from consensus.identifiers import Digest
from consensus.rejection import InvariantBroken
from consensus.vote import Proposal


class Verdict(Enum):
    """A host's answer to ``VerifyBlock``."""

    VALID = auto()
    REFUSED = auto()
    """Valid under ``apply``, but a vote-time rule of this voter (censorship, clock skew) forbids its vote."""
    MISSING = auto()
    """Events it names are not here yet; another answer follows once they are."""
    INVALID = auto()


class Status(Enum):
    """What is known of a ledger block."""

    UNVERIFIED = auto()
    VERIFYING = auto()
    MISSING = auto()
    VALID = auto()
    REFUSED = auto()
    INVALID = auto()


@dataclass(slots=True)
class Branch:
    """A ledger block above the last finalized one."""

    digest: Digest
    header: Header
    proposal: Proposal
    status: Status = Status.UNVERIFIED


class Branches:
    """The tree of ledger blocks above the last finalized one. Mutable, owned by the engine."""

    def __init__(self, finalized: Header) -> None:
        self.finalized = finalized
        self.finalized_digest = finalized.digest
        self._blocks: dict[Digest, Branch] = {}

    def add(self, proposal: Proposal, header: Header) -> Branch:
        """The ledger block of a checked proposal, known from now on."""
        digest = proposal.digest
        return self._blocks.setdefault(digest, Branch(digest, header, proposal))

    def get(self, digest: Digest) -> Branch | None:
        """The ledger block of that digest, if it is known and not final."""
        return self._blocks.get(digest)

    def header(self, digest: Digest) -> Header | None:
        """Header of a ledger block whose overlay exists: final, or found valid on its branch."""
        if digest == self.finalized_digest:
            return self.finalized
        block = self._blocks.get(digest)
        if block is None or block.status not in (Status.VALID, Status.REFUSED):
            return None
        return block.header

    def next_needed(self, digest: Digest) -> Branch | Digest | None:
        """What is to be done next so that the branch ending in ``digest`` is verified.

        Returns: the digest of a ledger block to fetch, or the lowest one not found valid, or None when
        all are.

        Raises:
            InvariantBroken: the branch does not descend from the last finalized ledger block.
        """
        lowest: Branch | None = None
        while self.header(digest) is None:
            block = self._blocks.get(digest)
            if block is None:
                if lowest is not None and lowest.header.height <= self.finalized.height + 1:
                    raise InvariantBroken(
                        f"branch with parent {digest.hex()} at height {lowest.header.height - 1} forks from"
                        f" finalized {self.finalized_digest.hex()} at height {self.finalized.height}"
                    )
                return digest
            lowest = block
            digest = Digest(block.header.parent)
        return lowest

    def retry_missing(self) -> None:
        """Verify again those whose events were missing."""
        for block in self._blocks.values():
            if block.status == Status.MISSING:
                block.status = Status.UNVERIFIED

    def chain(self, digest: Digest) -> tuple[Header, ...]:
        """Headers of a verified branch from above the last finalized ledger block to ``digest``.

        Raises:
            InvariantBroken: the branch does not descend from the last finalized ledger block.
        """
        headers: list[Header] = []
        while digest != self.finalized_digest:
            block = self._blocks.get(digest)
            if block is None:
                raise InvariantBroken(
                    f"a certified branch forks from finalized {self.finalized_digest.hex()}"
                    f" at height {self.finalized.height}"
                )
            headers.append(block.header)
            digest = Digest(block.header.parent)
        return tuple(reversed(headers))

    def finalize(self, header: Header) -> None:
        """``header`` is the last finalized one now; forget ledger blocks of its view and earlier."""
        self.finalized = header
        self.finalized_digest = header.digest
        self._blocks = {digest: block for digest, block in self._blocks.items() if block.header.view > header.view}
