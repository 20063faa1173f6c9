"""Leaving epochs that have ended: keep what they may still ask of this member's secrets, then erase these.

- **Keep, then erase.** Shares of beacons for challenges without an answer are on disk before a secret goes
  (``beacons``). Where one cannot be kept nothing is erased.
- **A crash at any instant costs nothing**: a node that starts does the same for all epochs before the one its log is
  in, from the keystores. Only when all of it is done it leaves a mark, so that not every start opens keystores.
- A share is old when it makes no signature of the newest epoch: replaced by a later keystore's, or that of a member
  that has left. It is of no use to anyone but a thief.

Call it once the end of the epoch before is durable. Derives keys: for a worker thread.
"""

import logging
import os
from pathlib import Path

import msgspec

from consensus import bls
from consensus.certificate import CertificateScheme
from consensus.membership import GENESIS_EPOCH
from consensus.rejection import ConfigError, Rejected
from node.beacons import BeaconDesk
from node.config import NodeConfig
from node.files import replace_private
from node.identity import LEFT_EPOCHS_FILE, Identity, identity_in, later_keystores
from node.keystore import Keystore, Secrets, read_passphrase
from node.ledger import Ledger
from node.voter import voting_keys

log = logging.getLogger("countersign")


def leave_ended_epochs(config: NodeConfig, ledger: Ledger, first: Identity, beacons: BeaconDesk) -> None:
    """Keep what is asked of the epochs before the ledger's newest, and erase their shares.

    ``first`` is as in ``identity_in``. What fails is said and done at the next start: the epoch that has begun goes on.
    """
    epoch = ledger.committee.epoch
    mark = config.node.data_directory / LEFT_EPOCHS_FILE
    content = f"{epoch}\n".encode()
    if epoch == GENESIS_EPOCH:
        return
    try:
        if mark.exists() and mark.read_bytes() == content:
            return
        _keep_beacon_shares(config, ledger, first, beacons)
        for path in _keystores_before(config, epoch):
            _erase_old_share(path, config, ledger.scheme)
        replace_private(mark, content)
    except (OSError, ConfigError) as error:
        log.critical("old shares of epochs before %d are not erased before the next start: %s", epoch, error)


def _keep_beacon_shares(config: NodeConfig, ledger: Ledger, first: Identity, beacons: BeaconDesk) -> None:
    for epoch, records in sorted(beacons.owed().items()):
        scheme = ledger.epochs.of(epoch).scheme
        identity = identity_in(config, scheme.committee, first)
        keys = identity if isinstance(identity, str) else voting_keys(identity, scheme)
        if isinstance(keys, str):
            log.info("no share of beacons of epoch %d: %s", epoch, keys)
            continue
        for record in records:
            beacons.keep(record, keys, scheme)


def _keystores_before(config: NodeConfig, epoch: int) -> list[Path]:
    base = config.node.keystore
    later = [path for of, path in later_keystores(base).items() if of < epoch]
    return [base, *later] if base.exists() else later


def _erase_old_share(path: Path, config: NodeConfig, scheme: CertificateScheme) -> None:
    held = Keystore.open(path, read_passphrase(config.node.passphrase_file, os.environ))
    if held.secrets.bls_share is not None and not _serves(held.secrets, config.node.name, scheme):
        held.save(msgspec.structs.replace(held.secrets, bls_share=None))


def _serves(secrets: Secrets, name: str, scheme: CertificateScheme) -> bool:
    """Whether a member's share makes signatures of the scheme's epoch."""
    member = next((held for held in scheme.committee.voters if held.name == name), None)
    if member is None or secrets.bls_share is None:
        return False
    try:
        scheme.check_secret(member.id, bls.Secret.from_bytes(secrets.bls_share))
    except Rejected:
        return False
    return True
