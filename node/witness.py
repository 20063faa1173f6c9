"""Witnessing a log: sign its newest checkpoint once it is shown to continue the last one, or have others sign it.

A witness vouches for one history. What ``next_checkpoint`` lets it sign was

1. signed by a member's log key, under the log's own name, unless the node is a verifier's, which has none;
2. certified: a ledger block of the newest epoch, followed from the genesis by certificates, continues it;
3. consistent with the checkpoint that this witness signed last (RFC 9162 §2.1.4). Both hold of the same root, so that a
   node cannot show one history for the past and another, by retired keys, for the present.

``ask_witness`` is the other side, C2SP tlog-witness: ``POST add-checkpoint`` to a witness that knows the log by name
and key, with a proof from the size it signed last.
"""

import re
import time
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence

import httpx

from consensus.bundle import open_bundle
from consensus.checkpoint import (
    Checkpoint,
    assemble_note,
    checkpoint_text,
    note_text,
    parse_checkpoint,
    verify_note_by,
)
from consensus.cosignature import WitnessKey, verify_cosignatures
from consensus.epochs import Anchor, Pin
from consensus.merkle import verify_consistency
from consensus.predicates import Predicate
from consensus.rejection import ConfigError, Reason, Rejected, Unavailable
from node.client import NodeClient

MAX_ANSWER_BYTES = 65_536
TIMEOUT_SECONDS = 30.0
LONGEST_ANSWER_SECONDS = 120.0
"""Of an answer as a whole, however steadily it comes."""
FIRST_HEIGHT = 1
_SIZE = re.compile(rb"(0|[1-9][0-9]{0,18})\n?")
_REFUSALS: Mapping[int, str] = {
    403: "it knows none of the keys that signed the checkpoint: give its operator those of countersign log keys",
    404: "it does not know this log: give its operator the log's name and keys, as countersign log keys prints them",
    422: "the proof from the checkpoint it signed last does not verify: it has seen another history of this log",
}


def next_checkpoint(client: NodeClient, trusted: Anchor, last: Checkpoint | None) -> tuple[bytes, list[bytes]]:
    """The node's newest checkpoint once it is shown to continue ``last``: a note's text, and a member's signature line.

    A verifying node signs none: its checkpoint is that of the newest certified ledger block, without a line.

    Raises:
        Rejected: ``BAD_CHECKPOINT`` for another log's, an older one than ``last``, or one by no member; ``BAD_PROOF``
            where it does not continue ``last``; as ``open_bundle``.
        Unavailable: the node does not answer.
    """
    text, lines = _certified(client, trusted)
    stated = parse_checkpoint(text)
    if last is not None:
        if last.size > stated.size:
            raise Rejected(
                Reason.BAD_CHECKPOINT, f"the node is at {stated.size} entries, the last checkpoint was of {last.size}"
            )
        proof = client.consistency(last.size, stated.size)
        verify_consistency(last.size, stated.size, proof, last.root, stated.root)
    return text, lines


def _certified(client: NodeClient, trusted: Anchor) -> tuple[bytes, list[bytes]]:
    origin, asked = trusted.genesis.name, {"earlier": str(FIRST_HEIGHT)}
    try:
        note = client.checkpoint()
    except Rejected as error:
        if error.reason is not Reason.NOT_FOUND:
            raise
        header = open_bundle(trusted, client.bundle(Predicate.CONSISTENT.value, asked)).header
        text = checkpoint_text(origin, header.log_size, header.log_root)
        stated_by(text, origin)
        return text, []
    text = note_text(note)
    stated = stated_by(text, origin)
    asked["size"] = str(stated.size)
    shown = open_bundle(trusted, client.bundle(Predicate.CONSISTENT.value, asked), Pin(stated.size, stated.root))
    members = {member.name: member.log_key for member in shown.trusted.newest.committee.members if member.log_key}
    verify_note_by(note, origin, members)
    return text, note[len(text) + 1 :].splitlines(keepends=True)


def stated_by(text: bytes, origin: str) -> Checkpoint:
    """The checkpoint of a note's text, of a log of that name with entries.

    Raises:
        Rejected: ``BAD_CHECKPOINT``.
    """
    stated = parse_checkpoint(text)
    if stated.origin != origin:
        raise Rejected(Reason.BAD_CHECKPOINT, f"a checkpoint of {stated.origin!a}, the genesis is that of {origin!a}")
    if stated.size == 0:
        raise Rejected(Reason.BAD_CHECKPOINT, "a checkpoint of an empty log: there is nothing to witness yet")
    return stated


def ask_witness(
    url: str,
    witness: WitnessKey,
    note: bytes,
    old_size: int,
    proof_from: Callable[[int], Sequence[bytes]],
) -> bytes:
    """The witness's signature lines for the note.

    Args:
        url: the witness's submission prefix.
        old_size: of the checkpoint that it signed last, as far as is known; it says so if it was another.
        proof_from: RFC 9162 consistency proof from a size up to the note's.

    Raises:
        Rejected: ``BAD_CHECKPOINT`` where the witness does not sign, saw another history or a larger log, or what it
            answers is not its signature.
        ConfigError: no http or https address. Unavailable: it does not answer, or not as a witness does.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"expected a witness's address like https://witness.example/, found {url!a:.200}")
    size = parse_checkpoint(note_text(note)).size
    # Uncoded, or a small answer could unfold without end. A proxy of the environment's is used: witnesses are
    # elsewhere, and what they sign is verified.
    with httpx.Client(timeout=TIMEOUT_SECONDS, headers={"Accept-Encoding": "identity"}) as client:
        status, answer = _add_checkpoint(client, url, note, old_size, proof_from)
        if status == 409 and _size_in(answer) not in (None, old_size):
            old_size = _size_in(answer) or 0
            if old_size > size:
                raise Rejected(
                    Reason.BAD_CHECKPOINT, f"the witness signed {old_size} entries before, this checkpoint has {size}"
                )
            status, answer = _add_checkpoint(client, url, note, old_size, proof_from)
    if status != 200:
        raise _refusal(url, status, answer, old_size)
    verify_cosignatures(assemble_note(note_text(note), answer.splitlines(keepends=True)), [witness])
    return answer


def _add_checkpoint(
    client: httpx.Client, url: str, note: bytes, old_size: int, proof_from: Callable[[int], Sequence[bytes]]
) -> tuple[int, bytes]:
    proof = proof_from(old_size) if old_size else ()
    hashes = b"".join(b64encode(held) + b"\n" for held in proof)
    body = b"old %d\n" % old_size + hashes + b"\n" + note
    try:
        with client.stream("POST", url.rstrip("/") + "/add-checkpoint", content=body) as response:
            answer, ends = bytearray(), time.monotonic() + LONGEST_ANSWER_SECONDS
            for chunk in response.iter_raw():
                answer += chunk
                if time.monotonic() > ends:
                    raise Unavailable(f"the witness at {url} took more than {LONGEST_ANSWER_SECONDS:g} s to answer")
                if len(answer) > MAX_ANSWER_BYTES:
                    raise Unavailable(f"the witness at {url} sent more than {MAX_ANSWER_BYTES} bytes")
    except httpx.InvalidURL as error:
        raise ConfigError(f"expected a witness's address, found {url!a:.200}: {error}") from error
    except httpx.HTTPError as error:
        raise Unavailable(f"the witness at {url} does not answer: {error}") from error
    return response.status_code, bytes(answer)


def _size_in(answer: bytes) -> int | None:
    found = _SIZE.fullmatch(answer)
    return None if found is None else int(found[1])


def _refusal(url: str, status: int, answer: bytes, old_size: int) -> Rejected | Unavailable:
    if status == 409:
        return Rejected(
            Reason.BAD_CHECKPOINT,
            f"the witness signed another root at {old_size} entries, or signs for others just now",
        )
    if status in _REFUSALS:
        return Rejected(Reason.BAD_CHECKPOINT, f"the witness does not sign: {_REFUSALS[status]}")
    return Unavailable(f"the witness at {url} answered with status {status}: {answer[:200]!a}")
