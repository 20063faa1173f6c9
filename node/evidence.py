"""From two contradicting messages to an ``evidence`` event on the log.

What the engine finds is kept in a file of its own, DATA/evidence/NAME.OFFENCE.EPOCH, before anything else: it is
handed in again after a restart, and stays the proof if the log itself has forked and takes nothing more. One file
for each member, epoch and offence, as the log takes one: whoever contradicts itself without end fills no disk.
Every voter that saw the contradiction hands it in; the log takes the first and refuses the rest as duplicates.
What is not on the log when its epoch ends is handed in again in the next, under the identity this member has there.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from consensus.codec import decode, encode
from consensus.event import CheckedEvent, Kind, make_entry, pack, sign_entry
from consensus.evidence import Conviction, EvidenceReport, check_evidence
from consensus.identifiers import VOTING_ROLES
from consensus.keys import Signer
from consensus.membership import Member
from consensus.portions import Portions, SaltedPortion
from consensus.rejection import Reason, Rejected
from consensus.state import EVIDENCE_TABLE
from consensus.vote import Evidence
from node.files import make_durable_directory, replace_private
from node.ledger import Ledger

log = logging.getLogger("countersign.evidence")

MAX_REPORT_BYTES = 65_536


class EvidenceDesk:
    """Keeps evidence, and hands it in as this member."""

    def __init__(
        self,
        directory: Path,
        ledger: Ledger,
        member: Member,
        signer: Signer,
        submit: Callable[[bytes], CheckedEvent],
    ) -> None:
        """``directory`` is made when there is something to keep."""
        self._directory = directory
        self._ledger = ledger
        self._member = member
        self._signer = signer
        self._submit = submit

    def take(self, evidence: Evidence) -> None:
        """Keep what the engine found and hand it in, unless its like is kept or on the log already."""
        report = EvidenceReport(evidence)
        found = check_evidence(report, self._ledger.committee)
        path = self._path(found)
        if path.exists() or self._is_recorded(found):
            return
        name = self._name(found)
        log.warning("%s contradicts itself in view %d: %s; kept in %s", name, found.view, found.offence.value, path)
        make_durable_directory(self._directory, 0o700)
        replace_private(path, encode(report))
        self._hand_in(report, found)

    def hand_in_kept(self) -> None:
        """After a restart, or when an epoch begins: hand in what is kept and not on the log."""
        if not self._directory.is_dir():
            return
        for path in sorted(self._directory.iterdir()):
            try:
                report = decode(path.read_bytes(), EvidenceReport, MAX_REPORT_BYTES)
                found = check_evidence(report, self._ledger.committee)
            except Rejected as error:
                log.warning("%s is no evidence: %s", path, error)
                continue
            if not self._is_recorded(found):
                self._hand_in(report, found)

    def _path(self, found: Conviction) -> Path:
        return self._directory / f"{self._name(found)}.{found.offence.value}.{found.epoch}"

    def _name(self, found: Conviction) -> str:
        """The name that whom it convicts had in the epoch of the offence."""
        return self._ledger.epochs.of(found.epoch).committee.member(found.member).name

    def _is_recorded(self, found: Conviction) -> bool:
        return self._ledger.final.state.get(EVIDENCE_TABLE + found.digest) is not None

    def _hand_in(self, report: EvidenceReport, found: Conviction) -> None:
        if self._member.role not in VOTING_ROLES:
            return
        portions = Portions(None, SaltedPortion(os.urandom(32), encode(report)), None)
        entry = make_entry(self._ledger.genesis.chain_id, Kind.EVIDENCE, self._member.id, portions)
        signed = sign_entry(entry, self._member.id, self._member.role.value, self._signer)
        try:
            self._submit(pack(signed, portions))
        except Rejected as error:
            level = logging.INFO if error.reason is Reason.DUPLICATE else logging.WARNING
            log.log(level, "evidence of %s is not taken: %s", found.offence.value, error)
