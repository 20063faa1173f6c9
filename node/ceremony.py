"""A ceremony as files in a folder that members pass around: by mail, on a stick, in a shared directory.

``invitation.ceremony`` and one file for each message, ``ROUND-NAME.ceremony``, with a part of its digest where a member
may have several in a round: answers. Names of files mean nothing: what counts is what is in them, and two files with
different messages of one member and round, other than answers, convict it. Every file is read once, in bounded memory,
and only if it is a regular file; nothing that is there is ever overwritten.

What must not leave the member's machine is in its keystore: the seed of all its keys until the ceremony is over, and
over which commitments it has dealt, which is on disk before the deal is.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

import msgspec

from consensus import bls
from consensus.ceremony import (
    MAX_INVITATION_BYTES,
    MAX_MESSAGE_BYTES,
    Invitation,
    Join,
    SignedMessage,
    Transcript,
    decode_invitation,
)
from consensus.codec import decode, encode
from consensus.genesis import genesis_to_json
from consensus.keys import SignatureScheme, signer_for
from consensus.membership import GENESIS_EPOCH, MAX_GENESIS_BYTES, MAX_MEMBERS, Genesis, Membership
from consensus.participant import MemberSeeds, Participant, member_seeds
from consensus.rejection import ConfigError, Rejected
from node.files import open_regular, write_new
from node.keystore import KeyCost, Keystore, Secrets

SUFFIX = ".ceremony"
INVITATION_FILE = "invitation.ceremony"
GENESIS_FILE = "genesis.json"
MAX_FILES = 8 * MAX_MEMBERS
MAX_MEMBERSHIP_BYTES = MAX_GENESIS_BYTES
ANSWER = "answer"
NOT_A_MESSAGE = frozenset({INVITATION_FILE})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Folder:
    """What a ceremony's folder holds."""

    path: Path
    invitation: Invitation
    messages: tuple[bytes, ...]

    def transcript(self) -> Transcript:
        """Everything said, checked. Raises as ``Transcript``."""
        return Transcript(self.invitation, self.messages)


def read_folder(path: Path) -> Folder:
    """A ceremony's folder; its messages are not checked yet.

    Raises:
        ConfigError: there is no invitation, or far too many files.
        Rejected: the invitation leads to no genesis; a file is too large or no regular file.
    """
    invitation = path / INVITATION_FILE
    if not invitation.exists():
        raise ConfigError(f"{invitation}: expected a ceremony's invitation, found none")
    files = sorted(held for held in path.iterdir() if held.suffix == SUFFIX and held.name not in NOT_A_MESSAGE)
    if len(files) > MAX_FILES:
        raise ConfigError(f"{path}: expected at most {MAX_FILES} messages, found {len(files)}")
    return Folder(path, _told(invitation, decode_invitation), tuple(_told(held, _message) for held in files))


def write_invitation(path: Path, invitation: Invitation) -> None:
    """Begin a ceremony in an empty or missing folder.

    Raises:
        ConfigError: the folder holds something.
        Rejected: nobody could make a genesis of it.
    """
    encoded = encode(invitation)
    decode_invitation(encoded)
    if path.exists() and any(path.iterdir()):
        raise ConfigError(f"{path}: expected an empty or missing folder, found files in it")
    path.mkdir(parents=True, exist_ok=True)
    write_new(path / INVITATION_FILE, encoded)


def join(
    path: Path,
    name: str,
    invitation_digest: str,
    keystore: Path,
    passphrase: bytes,
    scheme: SignatureScheme | None,
    cost: KeyCost,
    keep: Secrets | None = None,
) -> Path:
    """Make a member's keys, keep them in a new keystore, and say so in the folder; the file written.

    ``keep`` is what a member of the epoch before has, which keeps its identity, transport and log key; in a refresh
    also its share, to which is added what the others deal.

    Raises:
        ConfigError: the digest is not this invitation's; the keystore exists; somebody has joined under the name; a
            refresh without ``keep``.
        Rejected: as ``Participant``.
    """
    folder = read_folder(path)
    if folder.invitation.digest.hex() != invitation_digest:
        raise ConfigError(
            f"{path}: expected the invitation {invitation_digest}, found {folder.invitation.digest.hex()}: "
            "ask who sent it, by another channel"
        )
    if name in folder.transcript().said(Join):
        raise ConfigError(f"{path}: somebody has joined as {name} already")
    seed = os.urandom(32)
    first = _first_secrets(seed, keep)
    if folder.invitation.refreshes is not None:
        if keep is None:
            raise ConfigError(f"{path}: expected the keystore that {name} has now (--keep), this refreshes its keys")
        first = msgspec.structs.replace(first, bls_share=keep.bls_share)
    participant = Participant(folder.invitation, name, seed, scheme, kept=_seeds(first), share=_share(first))
    message = participant.join()
    Transcript(folder.invitation, [*folder.messages, message])
    Keystore.create(keystore, first, passphrase, cost)
    try:
        return _write(folder.path, message)
    except (ConfigError, OSError):
        # Nobody has heard of these keys.
        keystore.unlink()
        raise


def contribute(path: Path, keystore: Keystore, told: Callable[[str], None]) -> Transcript:
    """Say everything that is due from the keystore's member; ``told`` gets each file's name. The transcript after it.

    Raises:
        ConfigError: the keystore takes no part in this ceremony.
        Rejected: what somebody has done wrong.
    """
    while True:
        folder = read_folder(path)
        transcript = folder.transcript()
        participant = _participant(folder, transcript, keystore)
        message = participant.next_message(transcript)
        if message is None:
            return transcript
        if participant.dealt_over != keystore.secrets.ceremony_dealt_over:
            keystore.save(msgspec.structs.replace(keystore.secrets, ceremony_dealt_over=participant.dealt_over))
        told(_write(path, message).name)


def finish(path: Path, keystore: Keystore) -> tuple[Genesis | Membership, str]:
    """What the ceremony ends in, and this member's name; writes it, and into the keystore what a node needs, no more.

    A founding ceremony ends in ``genesis.json``, one of a later epoch in ``epoch-N.membership``. May be repeated: a
    keystore that has finished finds the same again.

    Raises:
        ConfigError: the keystore takes no part in this ceremony; another result is there already.
        Rejected: ``CEREMONY_INCOMPLETE``, or what somebody has done wrong.
    """
    folder = read_folder(path)
    transcript = folder.transcript()
    made = result_of(transcript)
    name = _name_of(transcript, keystore)
    if keystore.secrets.ceremony_seed is not None:
        secret = _participant(folder, transcript, keystore).secret(transcript)
        keystore.save(
            msgspec.structs.replace(
                keystore.secrets,
                bls_share=None if secret is None else secret.to_bytes(),
                ceremony_seed=None,
                ceremony_dealt_over=b"",
            )
        )
    write_result(path, made)
    return made, name


def has_finished(transcript: Transcript, keystore: Keystore) -> bool:
    """Whether the keystore has all that this ceremony gives its member: there is nothing more to contribute.

    A member that stays has its identity in several keystores: where it has BLS keys, its share tells them apart.
    """
    secrets = keystore.secrets
    joined = {member.identity_key: member for member in (said.member for said in transcript.said(Join).values())}
    held = [
        key for scheme in SignatureScheme if (key := signer_for(scheme, secrets.identity_seed).public_key) in joined
    ]
    if secrets.ceremony_seed is not None or not held or transcript.awaited():
        return False
    made, member = result_of(transcript), joined[held[0]]
    shares = {
        share_key
        for group in made.groups
        for peer, share_key in zip(
            (peer for peer in made.members if peer.role == group.role), group.share_keys, strict=True
        )
        if peer.name == member.name
    } or {member.bls_key}
    share = _share(secrets)
    return shares == {b"" if share is None else bls.public_key(share)}


def result_of(transcript: Transcript) -> Genesis | Membership:
    """What a ceremony ends in. Raises as ``Transcript.membership``."""
    return transcript.genesis() if transcript.invitation.epoch == GENESIS_EPOCH else transcript.membership()


def result_file(path: Path, made: Genesis | Membership) -> tuple[Path, bytes]:
    """Where what a ceremony ends in stands in its folder, and the bytes there."""
    if isinstance(made, Genesis):
        return path / GENESIS_FILE, genesis_to_json(made)
    return path / f"epoch-{made.epoch}.membership", encode(made)


def write_result(path: Path, made: Genesis | Membership) -> None:
    """What a ceremony ends in into its folder, or nothing if it is there.

    Raises:
        ConfigError: another one is there.
    """
    file, encoded = result_file(path, made)
    if not file.exists():
        write_new(file, encoded)
    elif not holds(file, encoded):
        raise ConfigError(f"{file}: expected what this ceremony ends in, found another file")


def holds(file: Path, encoded: bytes) -> bool:
    """Whether a regular file holds these bytes and no others."""
    with open_regular(file, sys.maxsize) as (opened, size_bytes):
        return size_bytes == len(encoded) and opened.read(size_bytes) == encoded


def _participant(folder: Folder, transcript: Transcript, keystore: Keystore) -> Participant:
    secrets = keystore.secrets
    if secrets.ceremony_seed is None:
        raise ConfigError(f"{keystore.path}: expected a keystore in a ceremony, found one that takes part in none")
    name = _name_of(transcript, keystore)
    scheme = SignatureScheme(transcript.member(name).scheme)
    return Participant(
        folder.invitation,
        name,
        secrets.ceremony_seed,
        scheme,
        secrets.ceremony_dealt_over,
        _seeds(secrets),
        _share(secrets),
    )


def _name_of(transcript: Transcript, keystore: Keystore) -> str:
    """Whose keystore it is: both identity keys its seed may have are compared with those that joined."""
    for name, joined in transcript.said(Join).items():
        scheme = SignatureScheme(joined.member.scheme)
        if signer_for(scheme, keystore.secrets.identity_seed).public_key == joined.member.identity_key:
            return name
    raise ConfigError(f"{keystore.path}: expected a keystore of a member that has joined, found another")


def _seeds(secrets: Secrets) -> MemberSeeds:
    return MemberSeeds(secrets.identity_seed, secrets.transport_seed, secrets.log_seed)


def _share(secrets: Secrets) -> bls.Secret | None:
    return None if secrets.bls_share is None else bls.Secret.from_bytes(secrets.bls_share)


def _first_secrets(seed: bytes, keep: Secrets | None) -> Secrets:
    seeds = member_seeds(seed) if keep is None else _seeds(keep)
    return Secrets(
        identity_seed=seeds.identity,
        transport_seed=seeds.transport,
        # A verifier signs no checkpoints; the file's form has the seed all the same, and nothing uses it.
        log_seed=seeds.log,
        ceremony_seed=seed,
    )


def _write(path: Path, message: bytes) -> Path:
    held = decode(message, SignedMessage, 2 * MAX_MESSAGE_BYTES)
    said = _round_of(held.body)
    # By what it says and not by a count: a dealer that lost its first answer would give a later one the first's name,
    # and whoever has the first would take the later one for a copy.
    apart = f"-{sha256(held.body).hexdigest()[:8]}" if said == ANSWER else ""
    file = path / f"{said}-{held.sender}{apart}{SUFFIX}"
    if file.exists():
        raise ConfigError(f"{file}: expected no such file, found one whose message is another's: move it away and look")
    write_new(file, message)
    return file


def _round_of(body: bytes) -> str:
    """The round's name, from a body of our own making."""
    tag: str = msgspec.msgpack.decode(body)[0]
    return tag.removeprefix("ceremony-")


def _told(file: Path, read: Callable[[bytes], T]) -> T:
    """What a file holds; what is wrong with it is told with its name."""
    with open_regular(file, MAX_INVITATION_BYTES) as (opened, size_bytes):
        content = opened.read(size_bytes)
    try:
        return read(content)
    except Rejected as error:
        raise Rejected(error.reason, f"{file}: {error.detail}") from error


def _message(content: bytes) -> bytes:
    """The file as it is, once it is a message, of whomever."""
    decode(content, SignedMessage, MAX_MESSAGE_BYTES)
    return content
