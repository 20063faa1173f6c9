"""Checks the golden vectors of a small log: its events and ledger blocks, and what it shows outsiders.

    python tests/vectors/check_shown.py [FOLDER]

As ``check_vectors.py``, from which it has the encoding, the hashes and what a case is.
"""

import base64
import hashlib
import struct
import sys

from check_vectors import (
    HEADER,
    PAYLOADS,
    VOTING_ROLES,
    Refused,
    check,
    check_all,
    decoded,
    expect,
    fields,
    included_root,
    leaf,
    member_id,
    message,
    name,
    natural,
    octets,
    pack,
    proved_key,
    proved_prefix,
    refuse_if,
    tagged,
    text,
    tree,
    unpack,
    verify_consistency,
    verify_ed25519,
    verify_identity,
)
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PublicKey

HEADER_BYTES, CERTIFICATE_BYTES, LINKS = octets(0, 1_024), octets(0, 849_184), 256
EPOCH_HEAD = b"\x0a" + bytes(32)
AUTHORS = {"source": VOTING_ROLES[:1], "policy": VOTING_ROLES[1:2], "membership": VOTING_ROLES}
PORTIONS = {"source": "d", "policy": "g", "membership": "g"}
MAGIC = b"countersign-bundle\x00\x01\x0d\x0a\x1a\x0a"


def listed(fit: object, most: int) -> object:
    return lambda value: isinstance(value, list) and len(value) <= most and all(fit(item) for item in value)


def is_path(value: object) -> bool:
    return listed(octets(32), 64)(value)


def shaped(value: object, *fits: object) -> list:
    """A structure without a tag."""
    refuse_if(not isinstance(value, list), "malformed")
    return fields(["", *value], "", *fits)


def anything(value: object) -> bool:
    return True


class Trust:
    """A pinned genesis, and the epochs that links lead to: members, quorums, and how far the log went in each."""

    def __init__(self, genesis: bytes) -> None:
        self.genesis, self.chain_id = unpack(genesis), tagged(name("genesis"), genesis)
        self.epochs = [{"members": self.genesis[6:9], "first": (0, tree([])), "end": None}]

    def header(self, encoded: bytes, certificate: bytes) -> list:
        """A certified header, by the members of its epoch and within its epoch."""
        header = fields(decoded(encoded), "block", *HEADER)
        refuse_if(header[1] != self.chain_id, "wrong-chain")
        shape = (text(1, 32), natural(1), octets(32), natural(), octets(1, 848_928))
        scheme, view, block, epoch, payload = fields(decoded(certificate), "certificate", *shape)
        refuse_if((block, view, epoch) != (tagged(name("block"), encoded), header[4], header[2]), "bad-certificate")
        refuse_if(epoch >= len(self.epochs), "wrong-epoch")
        refuse_if(scheme != self.genesis[5], "bad-certificate")
        held = self.epochs[epoch]
        signed = message(name("certificate"), self.chain_id, struct.pack(">Q", epoch), struct.pack(">Q", view), block)
        PAYLOADS[scheme]([*self.genesis[:6], *held["members"]], signed, payload)
        size, root = header[11], header[12]
        ends = [end for end in (held["first"], held["end"]) if end is not None]
        refuse_if(size < held["first"][0] or (held["end"] is not None and size > held["end"][0]), "wrong-epoch")
        refuse_if(any(size == at and root != known for at, known in ends), "bad-certificate")
        return header

    def follow(self, links: list) -> "Trust":
        for link in links:
            membership, encoded, certificate, proof = fields(
                link, "epoch-link", octets(0, 1 << 20), HEADER_BYTES, CERTIFICATE_BYTES, anything
            )
            header = self.header(encoded, certificate)
            value = state_value(header, EPOCH_HEAD, proof)
            refuse_if(value is None, "wrong-epoch")
            epoch, digest, _, _ = shaped(decoded(value), natural(), octets(32), octets(32), natural())
            ending = len(self.epochs) - 1
            refuse_if((header[2], epoch) != (ending, ending + 1), "wrong-epoch")
            of_epoch, members, *rest = fields(decoded(membership), "membership", natural(), *[anything] * 3)
            refuse_if(of_epoch != epoch, "bad-membership")
            refuse_if(tagged(name("membership"), self.chain_id, membership) != digest, "bad-membership")
            before = {member_id(member): member[1] for member in self.epochs[-1]["members"][0]}
            refuse_if(any(before.get(member_id(new), new[1]) != new[1] for new in members), "bad-membership")
            self.epochs[-1]["end"] = (header[11], header[12])
            self.epochs.append({"members": [members, *rest], "first": (header[11], header[12]), "end": None})
        return self

    def members_at(self, index: int) -> list:
        return next(held["members"] for held in reversed(self.epochs) if index >= held["first"][0])

    def entry(self, encoded: bytes, index: int) -> list:
        """An entry that is well formed for its kind, by a member of the right role and signed by all who must."""
        digest, commitment, number = octets(32), lambda value: octets(32)(value) or value == b"", natural()
        shape = (
            natural(1, 1),
            digest,
            text(1, 32),
            digest,
            digest,
            number,
            number,
            *[commitment] * 3,
            listed(anything, 64),
        )
        entry = fields(decoded(encoded), "event", *shape)
        _, chain, kind, author, campaign, _, _, _, _, _, signatures = entry
        members, thresholds, _ = self.members_at(index)
        roles = {member_id(member): member for member in members}
        refuse_if(chain != self.chain_id, "wrong-chain")
        refuse_if(author not in roles, "unknown-member")
        refuse_if(roles[author][1] not in AUTHORS[kind], "wrong-role")
        refuse_if(campaign != bytes(32), "bad-field")
        signers = [signer for signer, _ in signatures]
        refuse_if(signers != sorted(set(signers)), "bad-field")
        refuse_if(author not in signers, "missing-signature")
        refuse_if(any(signer not in roles for signer in signers), "unknown-member")
        refuse_if(any(roles[signer][1] not in AUTHORS[kind] for signer in signers), "surplus-signature")
        if kind == "source":
            refuse_if(len(signers) > 1, "surplus-signature")
        for role, needed in thresholds if kind != "source" else ():
            signed_by = sum(roles[signer][1] == role for signer in signers)
            refuse_if(role in AUTHORS[kind] and signed_by < needed, "missing-signature")
        identifier = tagged(name("event"), pack(["event", *entry[:-1], []]))
        for signer, signature in signatures:
            _, role, scheme, key, *_ = roles[signer]
            parts = (chain, kind.encode(), struct.pack(">I", 1), role.encode(), identifier)
            verify_identity(scheme, key, message(name("event-signature"), *parts), signature, "bad-signature")
        return [identifier, *entry]


def state_value(header: list, key: bytes, proof: object) -> bytes | None:
    """What a header's state has under a key."""
    leaf_key, leaf_value, path = shaped(proof, octets(0, 33), octets(0, 1 << 24), anything)
    branches = [[bit, sibling.hex()] for bit, sibling in path]
    return proved_key(header[13].hex(), key, leaf_key, leaf_value, branches)


def trust(case: dict) -> Trust:
    made = Trust(bytes.fromhex(case["genesis"]))
    check(made.chain_id.hex(), case["chain_id"], "chain id")
    return made


def check_receipts(case: dict) -> None:
    """What an outsider believes of an event or a record who has the genesis and nothing else."""

    def judge_receipt(trial: dict) -> None:
        held = decoded(bytes.fromhex(trial["receipt"]))
        shape = (natural(1, 1), octets(0, 65_535), natural(), is_path, HEADER_BYTES, CERTIFICATE_BYTES)
        _, entry, index, proof, encoded, certificate, links = fields(held, "receipt", *shape, listed(anything, LINKS))
        trusted = trust(case).follow(links)
        header = trusted.header(encoded, certificate)
        refuse_if(index >= header[11], "bad-proof")
        refuse_if(included_root(leaf(entry), index, header[11], proof) != header[12], "bad-proof")
        identifier = trusted.entry(entry, index)[0]
        check((index, identifier.hex()), (trial.get("index", index), trial.get("event_id", identifier.hex())), "event")

    def judge_state(trial: dict) -> None:
        held = decoded(bytes.fromhex(trial["state_receipt"]))
        shape = (natural(1, 1), octets(33), anything, HEADER_BYTES, CERTIFICATE_BYTES, listed(anything, LINKS))
        _, key, proof, encoded, certificate, links = fields(held, "state-receipt", *shape)
        refuse_if(key.hex() != trial["key"], "bad-proof")
        value = state_value(trust(case).follow(links).header(encoded, certificate), key, proof)
        told = None if value is None else value.hex()
        check(told, trial.get("value", told), "record")

    for trial in (*case["accepted"], *case["refused"]):
        expect(judge_receipt if "receipt" in trial else judge_state, trial)


def check_links(case: dict) -> None:
    """Headers under the epochs that links lead to."""

    def judge(trial: dict) -> None:
        trusted = trust(case).follow([decoded(bytes.fromhex(link)) for link in trial["links"]])
        trusted.header(bytes.fromhex(trial["header"]), bytes.fromhex(trial["certificate"]))

    for trial in (*case["accepted"], *case["refused"]):
        expect(judge, trial)


def require_rising(places: list) -> None:
    refuse_if(places != sorted(places) or len(set(places)) != len(places), "duplicate")


def check_disclosed(entry: list, data: object, items: object, salted: list) -> None:
    """Each disclosed portion is the one the entry commits to."""
    kind, commitments = entry[3], entry[8:11]
    for role, portion, commitment in zip(VOTING_ROLES[1:], salted, commitments[1:], strict=True):
        if portion is not None:
            salt, content = shaped(portion, octets(32), octets(0, 1 << 22))
            committed = tagged(name("portion"), kind.encode(), role.encode(), salt, content)
            refuse_if(role[0] not in PORTIONS[kind] or committed != commitment, "portion-mismatch")
            decoded(content)
    if data is None and items is None:
        return
    refuse_if("d" not in PORTIONS[kind] or (data is not None and items is not None), "portion-mismatch")
    if data is not None:
        salt, whole = shaped(data, octets(32), listed(anything, 4_096))
        salts = [tagged(name("salt"), salt, b"item", struct.pack(">Q", number)) for number in range(len(whole))]
        leaves = [tagged(name("source-entry"), of, content) for of, (content, _) in zip(salts, whole, strict=True)]
        root, count = tree(leaves), len(whole)
    else:
        root, count, some = shaped(items, octets(32), natural(1, 4_096), listed(anything, 4_096))
    parts = (kind.encode(), b"data-source", root, struct.pack(">Q", count))
    refuse_if(tagged(name("portion"), *parts) != commitments[0], "portion-mismatch")
    if items is not None:
        require_rising([item[0] for item in some])
        for item in some:
            number, salt, content, proof, _ = shaped(
                item, natural(0, 4_095), octets(32), octets(0, 1 << 22), is_path, anything
            )
            refuse_if(number >= count, "bad-proof")
            found = included_root(tagged(name("source-entry"), salt, content), number, count, proof)
            refuse_if(found != root, "bad-proof")


def check_bundles(case: dict) -> None:
    """All that is checked of a bundle before a predicate looks."""

    def judge(trial: dict) -> None:
        encoded = bytes.fromhex(trial["bundle"])
        refuse_if(not encoded.startswith(MAGIC), "malformed")
        optional = lambda value: value == b"" or octets(32)(value)  # noqa: E731
        held = fields(
            decoded(encoded[len(MAGIC) :]), "bundle", natural(1, 1), octets(32), text(1, 64), *[optional] * 3,
            HEADER_BYTES, CERTIFICATE_BYTES, listed(anything, LINKS), anything, anything,
            *[listed(anything, 262_144)] * 3,
        )  # fmt: skip
        _, chain, _, _, _, _, newest, certificate, links, pinned, earlier, events, records, ranges = held
        refuse_if(chain.hex() != case["chain_id"], "wrong-chain")
        trusted = trust(case).follow(links)
        header = trusted.header(newest, certificate)
        if earlier is not None:
            older_bytes, older_certificate, proof = shaped(earlier, HEADER_BYTES, CERTIFICATE_BYTES, is_path)
            older = trusted.header(older_bytes, older_certificate)
            verify_consistency(older[11], header[11], proof, older[12], header[12])
        if trial["pin"] is not None:
            check_pin(trial["pin"], pinned, header)
        for places in ([event[1] for event in events], [one[0] for one in records], [one[0] for one in ranges]):
            require_rising(places)
        identifiers = []
        for event in events:
            entry, index, proof, data, items, *salted = shaped(
                event, octets(0, 65_535), natural(), is_path, *[anything] * 4
            )
            refuse_if(index >= header[11], "bad-proof")
            refuse_if(included_root(leaf(entry), index, header[11], proof) != header[12], "bad-proof")
            opened = trusted.entry(entry, index)
            check_disclosed(opened, data, items, salted)
            identifiers.append(opened[0].hex())
        for key, proof in records:
            state_value(header, key, proof)
        for prefix, (found, path) in ranges:
            branches = [[bit, sibling.hex()] for bit, sibling in path]
            proved_prefix(header[13].hex(), prefix, [tuple(entry) for entry in found], branches)
        digest = tagged(name("block"), newest).hex()
        check((identifiers, digest), (trial.get("events", identifiers), trial.get("header", digest)), "bundle")

    for trial in (*case["accepted"], *case["refused"]):
        expect(judge, trial)


def check_pin(pin: list, pinned: object, header: list) -> None:
    """The log of the header is the pinned one, or is shown to continue it."""
    size, root = pin[0], bytes.fromhex(pin[1])
    if header[11] == size:
        refuse_if(header[12] != root, "bad-checkpoint")
        return
    refuse_if(header[11] < size or pinned is None or pinned[0] != size, "bad-checkpoint")
    try:
        verify_consistency(size, header[11], pinned[1], root, header[12])
    except Refused:
        raise Refused("bad-checkpoint") from None


# Events and ledger blocks, as a member judges them.

NAME = text(1, 128)
CLAIM = (
    NAME, octets(32), natural(1), natural(), NAME, NAME, lambda value: listed(NAME, 64)(value) and len(value) > 0, NAME,
    natural(), natural(), text(0, 8_192), lambda value: value == b"" or octets(32)(value), natural(),
)  # fmt: skip
"""Of a source, the only kind here whose content is looked into."""


def check_signed_events(case: dict) -> None:
    """Events as they are sent: entry, portions, and that one fits the other."""

    def judge(trial: dict) -> None:
        entry, portions = shaped(decoded(bytes.fromhex(trial["event"])), octets(0, 1 << 23), octets(0, 1 << 23))
        refuse_if(len(entry) > 65_535 or len(portions) > 1 << 22, "oversized")
        opened = trust(case).entry(entry, 0)
        identifier, kind = opened[0], opened[3]
        refuse_if(opened[6:8] != [0, 0], "bad-field")
        data, *salted = shaped(decoded(portions), *[anything] * 3)
        held = [portion is not None for portion in (data, *salted)]
        refuse_if(held != [letter in PORTIONS[kind] for letter in "dgo"], "portion-mismatch")
        if data is not None:
            items = data[1]
            refuse_if(len(items) != 1 or any(examples for _, examples in items), "portion-mismatch")
        check_disclosed(opened, data, None, salted)
        if data is not None:
            shaped(decoded(data[1][0][0]), *CLAIM)
        told = (identifier.hex(), leaf(entry).hex())
        check(told, (trial.get("id", told[0]), trial.get("leaf_hash", told[1])), "id and leaf hash")

    for trial in (*case["accepted"], *case["refused"]):
        expect(judge, trial)


def check_ledger_blocks(case: dict) -> None:
    """Ledger blocks on their parents; the state root that their events make is given."""

    def judge(trial: dict) -> None:
        trusted = trust(case).follow([decoded(bytes.fromhex(link)) for link in case["links"]])
        header, parent = (
            fields(decoded(bytes.fromhex(trial[each])), "block", *HEADER) for each in ("header", "parent")
        )
        (leaves,) = fields(decoded(bytes.fromhex(trial["body"])), "body", listed(octets(32), 4_096))
        refuse_if(header[10] != len(leaves) or header[9] != tagged(name("block-body"), *leaves), "bad-block")
        refuse_if(len(set(leaves)) != len(leaves), "duplicate")
        refuse_if(header[1] != parent[1], "wrong-chain")
        refuse_if(header[2] != trial["epoch"], "wrong-epoch")
        begins = header[2] == parent[2] + 1
        check(begins, trial["parent_is_terminal"], "an epoch that begins at a terminal ledger block")
        parent_view = 0 if begins else parent[4]
        place = (tagged(name("block"), bytes.fromhex(trial["parent"])), parent_view, parent[3] + 1)
        refuse_if((header[6], header[7], header[3]) != place or header[4] <= parent_view, "bad-block")
        voters = [member for member in trusted.epochs[header[2]]["members"][0] if member[1] in VOTING_ROLES]
        refuse_if(header[5] != member_id(voters[(header[4] - 1) % len(voters)]), "bad-block")
        refuse_if(header[8] < parent[8], "bad-timestamp")
        refuse_if([held.hex() for held in leaves] != trial["events"], "bad-block")
        log = [bytes.fromhex(held) for held in trial["log"]] + leaves
        refuse_if((header[11], header[12]) != (len(log), tree(log)), "log-root-mismatch")
        refuse_if(header[13].hex() != trial["state_root"], "state-root-mismatch")

    for trial in (*case["accepted"], *case["refused"]):
        expect(judge, trial)


# Notes: C2SP signed-note, tlog-checkpoint, tlog-cosignature.


def refuse_note_if(broken: bool) -> None:
    refuse_if(broken, "bad-checkpoint")


def plain_base64(encoded: str) -> bytes:
    try:
        value = base64.b64decode(encoded, validate=True)
    except ValueError:
        raise Refused("bad-checkpoint") from None
    refuse_note_if(base64.b64encode(value).decode() != encoded)
    return value


def known_keys(keys: list[str]) -> dict[tuple[str, bytes], tuple[int, bytes]]:
    """Type and key by name and key id."""
    known = {}
    for key in keys:
        held, stated, encoded = key.split("+", 2)
        typed = plain_base64(encoded)
        identifier = hashlib.sha256(held.encode() + b"\n" + typed).digest()[:4]
        refuse_note_if(identifier.hex() != stated)
        known[held, identifier] = (typed[0], typed[1:])
    return known


def timed_message(kind: int, by: str, seconds: int, body: str) -> bytes:
    """What a witness signs of a checkpoint."""
    refuse_note_if(seconds >= 2**63)
    if kind == 4:
        return f"cosignature/v1\ntime {seconds}\n{body}".encode()
    origin, size, root, _ = body.split("\n")
    named = bytes([len(by.encode())]) + by.encode() + struct.pack(">Q", seconds)
    about = bytes([len(origin.encode())]) + origin.encode() + struct.pack(">QQ", 0, int(size))
    return b"subtree/v1\n\x00" + named + about + base64.b64decode(root)


def signed_at(kind: int, key: bytes, by: str, signed: bytes, body: str) -> int:
    """The time of a known key's signature, 0 where it has none; a bad one condemns the note."""
    refuse_note_if(len(signed) != {1: 64, 4: 72, 6: 2_428}[kind])
    try:
        if kind == 1:
            verify_ed25519(key, body.encode(), signed)
            return 0
        seconds = int.from_bytes(signed[:8], "big")
        told = timed_message(kind, by, seconds, body)
        if kind == 4:
            verify_ed25519(key, told, signed[8:])
        else:
            MLDSA44PublicKey.from_public_bytes(key).verify(signed[8:], told)
    except (Refused, InvalidSignature):
        raise Refused("bad-checkpoint") from None
    return seconds


def checkpoint_of(body: str) -> tuple[int, bytes]:
    """Size and root of exactly three lines."""
    lines = body.split("\n")
    refuse_note_if(len(lines) != 4 or lines[3] != "" or not lines[0])
    digits = set("0123456789")
    refuse_note_if(not lines[1] or not set(lines[1]) <= digits or (lines[1][0] == "0" and lines[1] != "0"))
    size, root = int(lines[1]), plain_base64(lines[2])
    refuse_note_if(size > 2**63 or len(root) != 32 or (size == 0 and root != tree([])))
    return size, root


def check_checkpoint(case: dict) -> None:
    """Who signed the checkpoint of a note, and when."""

    def judge(trial: dict) -> None:
        try:
            note = bytes.fromhex(trial["note"]).decode()
        except UnicodeDecodeError:
            raise Refused("bad-checkpoint") from None
        refuse_note_if(any(letter < " " and letter != "\n" for letter in note))
        body, gap, block = note.rpartition("\n\n")
        refuse_note_if(not gap or not block.endswith("\n"))
        body += "\n"
        lines, known = block[:-1].split("\n"), known_keys(trial["keys"])
        refuse_note_if(len(lines) > 100)
        size, root = checkpoint_of(body)
        found: dict[str, int] = {}
        for line in lines:
            dash, _, rest = line.partition(" ")
            by, _, encoded = rest.partition(" ")
            refuse_note_if(dash != "—" or not by or "+" in by)
            stamped = plain_base64(encoded)
            refuse_note_if(len(stamped) < 5)
            if (by, stamped[:4]) in known:
                seconds = signed_at(*known[by, stamped[:4]], by, stamped[4:], body)
                found[by] = max(seconds, found.get(by, 0))
        refuse_note_if(not found)
        signed = {by: seconds or None for by, seconds in found.items()}
        check((signed, size, root.hex()), (trial["signed"], trial["size"], trial["root"]), "checkpoint")

    expect(judge, case)


CHECKS = {
    "signed_events": check_signed_events,
    "ledger_blocks": check_ledger_blocks,
    "receipts": check_receipts,
    "epoch_links": check_links,
    "bundles": check_bundles,
    "checkpoints": check_checkpoint,
}


if __name__ == "__main__":
    check_all(CHECKS, *sys.argv[1:])
