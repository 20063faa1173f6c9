"""Writes the golden vectors: inputs and the bytes this implementation makes of them.

    PYTHONPATH=tests python tests/vectors/generate.py FOLDER

The files are committed; a test regenerates them under two hash seeds and compares byte by byte, and has
``check_vectors.py`` and ``check_transitions.py``, which share no code with this implementation, check them.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import agreement
import ceremonies
import contradictions
import judged
import msgspec
import notes
import proofs
import said
import shown
import signatures
import transitions

from consensus import portions as p
from consensus.accumulators import AccumulatorWindow, WindowEntry, WindowTerms, window_root
from consensus.beacon import beacon_message, picked_steps
from consensus.block import Header
from consensus.certificate import Certificate, certificate_message
from consensus.certificate_schemes import scheme_for
from consensus.codec import encode
from consensus.epochs import EpochLink
from consensus.event import (
    JOB_SIGNER_ROLE,
    SHAPES,
    VERSION,
    Entry,
    Kind,
    check_event,
    event_id,
    make_entry,
    pack,
    sign_entry,
    signature_message,
)
from consensus.genesis import MemberPlan, generate_genesis
from consensus.identifiers import ChainId, Role, Tag, View, tagged_hash, tagged_message
from consensus.keys import Ed25519SigningKey, SignatureScheme
from consensus.membership import ED25519_LIST, Membership, committee, member_id
from consensus.membership_change import MembershipChange, membership_digest
from consensus.merkle import leaf_hash, root_of
from consensus.reserve import bound_of, lot
from consensus.sampler import presented_examples, presented_indexes
from consensus.state import EPOCH_HEAD_KEY
from consensus.state_map import MapProof, PrefixProof, StateMap, verify_map_proof, verify_prefix_proof
from consensus.transition import build, genesis_state
from consensus.vote import Vote, VoteKind, vote_message

Case = dict[str, object]


def octets(*parts: object) -> bytes:
    """32 bytes that stand for something."""
    return hashlib.sha256("/".join(map(str, parts)).encode()).digest()


def hashes() -> list[Case]:
    """Tagged hashes and tagged messages."""
    lists: list[tuple[bytes, ...]] = [(), (b"",), (b"", b""), (b"ab", b"c"), (b"a", b"bc"), (bytes(300),)]
    return [
        {
            "tag": tag.value,
            "parts": [part.hex() for part in parts],
            "hash": tagged_hash(tag, *parts).hex(),
            "message": tagged_message(tag, *parts).hex(),
        }
        for tag in Tag
        for parts in lists
    ]


def portions() -> list[Case]:
    """Commitments, salts and example roots of a step's portions."""
    cases: list[Case] = []
    for count in (1, 2, 3, 5):
        salt = octets("portion salt", count)
        items = tuple(
            p.use_item(
                salt, n, octets("source", n), "text", (p.Count("source-revoked", n + 1),), tuple(range(n, 10 * n))
            )
            for n in range(count)
        )
        held = p.Portions(
            p.DataPortion(salt, items),
            p.SaltedPortion(octets("governance salt", count), b"governance content"),
            p.SaltedPortion(octets("operation salt", count), b"operation content"),
        )
        data, governance, operation = p.commitments("step", held)
        cases.append(
            {
                "kind": "step",
                "portions": encode(held).hex(),
                "item_salts": [p.item_salt(salt, n).hex() for n in range(count)],
                "example_salts": [
                    [each.hex() for each in p.example_salts(p.examples_key(salt, n), len(item.examples))]
                    for n, item in enumerate(items)
                ],
                "examples_roots": [
                    p.examples_root(p.examples_key(salt, n), item.examples).hex() for n, item in enumerate(items)
                ],
                "data": data.hex(),
                "governance": governance.hex(),
                "operation": operation.hex(),
            }
        )
    return cases


def events() -> list[Case]:
    """Entries with their id, leaf hash and one signature, by a member's role or by a job key."""
    cases: list[Case] = []
    for kind, role in (
        (Kind.SOURCE, "data-source"),
        (Kind.POLICY, "governance"),
        (Kind.STEP, JOB_SIGNER_ROLE),
        (Kind.CUSTODY, "verifier"),
    ):
        key, shape = Ed25519SigningKey(octets("seed", kind.value)), SHAPES[kind]
        member = member_id(key.scheme, key.public_key)
        author, signer = (octets("author"), key.public_key) if role == JOB_SIGNER_ROLE else (member, member)
        committed = [
            octets(part) if held else b""
            for part, held in (("data", shape.data), ("gov", shape.governance), ("op", shape.operation))
        ]
        place = (octets("campaign"), 7, 300) if shape.in_campaign else (bytes(32), 0, 0)
        entry = Entry(VERSION, octets("chain"), kind, author, *place, *committed, ())
        signed = sign_entry(entry, signer, role, key)
        cases.append(
            {
                "entry": encode(signed).hex(),
                "unsigned": encode(entry).hex(),
                "id": event_id(signed).hex(),
                "leaf_hash": leaf_hash(encode(signed)).hex(),
                "role": role,
                "message": signature_message(entry, event_id(entry), role).hex(),
                "public_key": key.public_key.hex(),
                "signature": signed.signatures[0].signature.hex(),
            }
        )
    return cases


def blocks() -> list[Case]:
    """Headers and their digests, body roots, and votes on them with the message each signs."""
    cases: list[Case] = []
    for number in (0, 1, 2**53 - 2):
        leaves = [octets("leaf", n) for n in range(number % 5)]
        header = Header(
            version=1,
            chain_id=octets("chain"),
            epoch=0,
            height=number,
            view=number,
            leader=octets("leader"),
            parent=octets("parent"),
            parent_view=max(0, number - 1),
            timestamp_ms=1_700_000_000_000,
            body_root=tagged_hash(Tag.BODY, *leaves),
            event_count=len(leaves),
            log_size=number,
            log_root=octets("log"),
            state_root=octets("state"),
        )
        votes = []
        for kind in VoteKind:
            key = Ed25519SigningKey(octets("voter", kind.value))
            share = bytes(96) if kind is VoteKind.FINALIZE else b""
            block = bytes(32) if kind is VoteKind.NULLIFY else header.digest
            vote = Vote(1, octets("chain"), 0, kind, number + 1, block, octets("id"), share, b"")
            message = vote_message(vote)
            votes.append(
                {
                    "unsigned": encode(vote).hex(),
                    "message": message.hex(),
                    "public_key": key.public_key.hex(),
                    "signature": key.sign(message).hex(),
                }
            )
        cases.append(
            {
                "header": encode(header).hex(),
                "digest": header.digest.hex(),
                "leaf_hashes": [leaf.hex() for leaf in leaves],
                "votes": votes,
            }
        )
    return cases


def trees() -> list[Case]:
    """RFC 9162 roots over log entries."""
    sizes = (0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 64, 100)
    listed = [[f"entry {number}".encode() for number in range(size)] for size in sizes]
    return [
        {"entries": [entry.hex() for entry in entries], "root": root_of([leaf_hash(entry) for entry in entries]).hex()}
        for entries in listed
    ]


def states() -> list[Case]:
    """State maps: entries, root, proofs of keys and prefixes, one of each absent, and proofs that must be refused."""
    cases: list[Case] = []
    for count in (0, 1, 2, 9, 40):
        entries = {bytes([1 + n % 3]) + octets("key", n): f"value {n}".encode() for n in range(count)}
        state = StateMap().set_many(dict(entries))
        proofs = []
        for key in [*sorted(entries)[:2], b"\x02" + octets("absent")]:
            proof = state.prove(key)
            proofs.append(
                {
                    "key": key.hex(),
                    "present": key in entries,
                    "leaf_key": proof.leaf_key.hex(),
                    "leaf_value": proof.leaf_value.hex(),
                    "path": [[bit, sibling.hex()] for bit, sibling in proof.path],
                }
            )
        prefixes = [b"", b"\x01", b"\x02" + octets("key", 1)[:1], b"\x07"]
        cases.append(
            {
                "refused": [_refused_proof(state, *bad) for bad in _bad_proofs(state)] if count == 40 else [],
                "entries": [[key.hex(), value.hex()] for key, value in sorted(entries.items())],
                "root": state.root.hex(),
                "prefixes": [_prefix_proof(prefix, state.prove_prefix(prefix)) for prefix in prefixes],
                "proofs": proofs,
            }
        )
    return cases


def _prefix_proof(prefix: bytes, proof: PrefixProof) -> Case:
    return {
        "prefix": prefix.hex(),
        "found": [[key.hex(), value.hex()] for key, value in proof.entries],
        "path": [[bit, sibling.hex()] for bit, sibling in proof.path],
    }


def _bad_proofs(state: StateMap) -> Iterator[tuple[str, bytes, MapProof | PrefixProof]]:
    """What a proof says, of a key or of a prefix, and why it must be refused."""
    (key, value), (other, other_value) = list(state.items())[:2]
    proof, elsewhere = state.prove(key), state.prove(other)
    turned = ((proof.path[0][0], octets("sibling")), *proof.path[1:])
    change = msgspec.structs.replace
    yield "another value", key, change(proof, leaf_value=other_value)
    yield "another sibling", key, change(proof, path=turned)
    yield "a branch left out", key, change(proof, path=proof.path[1:])
    yield "branches in another order", key, change(proof, path=proof.path[::-1])
    yield "the leaf of another key, said to be absent", other, change(proof, leaf_key=key, leaf_value=value)
    yield "the proof of the empty map", key, MapProof(b"", b"", ())
    yield (
        "an absent key said to be present",
        b"\x02" + octets("absent"),
        change(state.prove(b"\x02" + octets("absent")), leaf_key=b"\x02" + octets("absent")),
    )
    prefix = b"\x01"
    whole = state.prove_prefix(prefix)
    yield "an entry under the prefix left out", prefix, change(whole, entries=whole.entries[:-1])
    yield "entries in another order", prefix, change(whole, entries=whole.entries[::-1])
    yield "an entry twice", prefix, change(whole, entries=(whole.entries[0], *whole.entries))
    yield "an entry of another prefix", prefix, change(whole, entries=(*whole.entries, (b"\x02" + bytes(32), b"value")))
    yield "no entry where there are some", prefix, change(whole, entries=())
    yield "one of its entries as a foreign leaf", b"\x01\x00", PrefixProof(((other, other_value),), elsewhere.path)
    yield "a branch inside what it proves", prefix, PrefixProof(((key, value),), proof.path)


def _refused_proof(state: StateMap, what: str, asked: bytes, proof: MapProof | PrefixProof) -> Case:
    path = [[bit, sibling.hex()] for bit, sibling in proof.path]
    if isinstance(proof, PrefixProof):
        judged = partial(verify_prefix_proof, state.root, asked, proof)
        return agreement.refusal(what, judged, **_prefix_proof(asked, proof))
    judged_key = partial(verify_map_proof, state.root, asked, proof)
    leaf = {"leaf_key": proof.leaf_key.hex(), "leaf_value": proof.leaf_value.hex()}
    return agreement.refusal(what, judged_key, key=asked.hex(), **leaf, path=path)


def samples() -> list[Case]:
    """What the sampler presents: manifest indexes, and examples of a manifest of ranges."""
    cases: list[Case] = []
    for size, batch, step in ((1, 1, 1), (10, 5, 2), (24, 12, 1), (24, 7, 4), (1_000, 16, 100), (2**40, 4, 2**30)):
        seed = octets("sampler", size)
        first = size // 3
        ranges = [(octets("a"), 5, first)] if first else []
        ranges.append((octets("b"), 0, size - first))
        manifest = tuple(p.ManifestRange(source, start, count) for source, start, count in ranges)
        cases.append(
            {
                "seed": seed.hex(),
                "manifest": [[source.hex(), start, count] for source, start, count in ranges],
                "batch_size": batch,
                "step": step,
                "indexes": list(presented_indexes(seed, size, batch, step)),
                "examples": [[source.hex(), at] for source, at in presented_examples(manifest, seed, batch, step)],
            }
        )
    return cases


def reserves() -> list[Case]:
    """Lots of a source's examples, and the reserve of so many of them."""
    cases: list[Case] = []
    for count, reserve in ((1, 0), (8, 1), (100, 32)):
        root = octets("content", count)
        bound = bound_of(root, count, reserve)
        lots = [lot(root, example) for example in range(count)]
        cases.append(
            {
                "content_root": root.hex(),
                "lots": lots,
                "reserve_below": bound,
                "reserve": [example for example in range(count) if lots[example] < bound],
            }
        )
    return cases


def windows() -> list[Case]:
    """Accumulator windows and their roots."""
    cases: list[Case] = []
    for count in (0, 1, 2, 5):
        places = [(b"", b""), *sorted((octets("policy", n % 2), octets("source", n)) for n in range(count))]
        entries = tuple(
            WindowEntry(*place, octets("blob", n), 1_000 * n, octets("sketches", n) if n % 2 else b"", 500 * (n % 2))
            for n, place in enumerate(places)
        )
        window = AccumulatorWindow(1, WindowTerms(octets("campaign"), 10 * count + 1, 10 * count + 10), entries)
        cases.append(
            {
                "window": encode(window).hex(),
                "terms": encode(window.terms).hex(),
                "entries": [encode(entry).hex() for entry in entries],
                "root": window_root(window).hex(),
            }
        )
    return cases


def epochs() -> list[Case]:
    """A genesis, a change of its members, and the link that a certified state makes between the two epochs."""
    plans = [
        MemberPlan(name, Role(name), octets("seed", name), SignatureScheme.ED25519)
        for name in ("data-source", "governance", "operator")
    ]
    genesis, secrets = generate_genesis(
        name="vectors.example/log",
        nonce=octets("nonce"),
        created_ms=1_700_000_000_000,
        plans=plans,
        certificate_scheme=ED25519_LIST,
    )
    rotated = msgspec.structs.replace(
        genesis.members[2], identity_key=Ed25519SigningKey(octets("next seed")).public_key
    )
    membership = Membership(1, (*genesis.members[:2], rotated), genesis.thresholds, ())
    old = committee(genesis)
    portions = p.Portions(None, p.SaltedPortion(octets("salt"), encode(MembershipChange(membership, ""))), None)
    entry = make_entry(genesis.chain_id, Kind.MEMBERSHIP, genesis.members[0].id, portions)
    for member in genesis.members:
        entry = sign_entry(entry, member.id, member.role.value, secrets[member.name].identity)
    built = build(
        genesis_state(genesis.chain_id, genesis.created_ms),
        [check_event(pack(entry, portions), old)],
        view=1,
        leader=old.leader(View(1)).id,
        timestamp_ms=genesis.created_ms + 1,
        committee=old,
        max_events=1,
        max_bytes=1 << 20,
    )
    scheme, header = scheme_for(genesis), built.state.header
    message = certificate_message(genesis.chain_id, 0, View(1), header.digest)
    shares = {member.id: scheme.share(secrets[member.name].identity, message) for member in genesis.members}
    certificate = Certificate(scheme.name, 1, header.digest, 0, scheme.combine(message, shares))
    proof = built.state.state.prove(EPOCH_HEAD_KEY)
    link = EpochLink(encode(membership), encode(header), encode(certificate), proof)
    return [
        {
            "genesis": encode(genesis).hex(),
            "event": encode(entry).hex(),
            "state": [[key.hex(), value.hex()] for key, value in built.state.state.items()],
            "link": encode(link).hex(),
            "certificate_message": message.hex(),
            "membership_digest": membership_digest(genesis.chain_id, membership).hex(),
        }
    ]


def audits() -> list[Case]:
    """The message of a beacon, and the steps that 96 bytes pick."""
    chain, campaign = ChainId(octets("chain")), octets("campaign")
    cases: list[Case] = []
    for number, (epoch, first, last, picks) in enumerate(
        ((0, 1, 1, 1), (0, 1, 10, 3), (1, 5, 1_000, 16), (7, 1, 2**53 - 1, 5), (7, 3, 9, 7)), start=1
    ):
        beacon = octets("beacon", number) * 3
        cases.append(
            {
                "chain_id": chain.hex(),
                "epoch": epoch,
                "campaign": campaign.hex(),
                "number": number,
                "message": beacon_message(chain, epoch, campaign, number).hex(),
                "beacon": beacon.hex(),
                "first_step": first,
                "last_step": last,
                "picks": picks,
                "picked": list(picked_steps(beacon, first, last, picks)),
            }
        )
    return cases


FILES = {
    "ed25519": signatures.ed25519,
    "tagged_hash": hashes,
    "portions": portions,
    "events": events,
    "job_keys": signatures.job_keys,
    "batch_signatures": signatures.batch_signatures,
    "blocks": blocks,
    "log_tree": trees,
    "log_proofs": proofs.log_proofs,
    "state_map": states,
    "sampler": samples,
    "reserve": reserves,
    "accumulators": windows,
    "epochs": epochs,
    "audits": audits,
    "certificates": agreement.certificates,
    "possession": agreement.possession,
    "evidence": contradictions.evidence,
    "ceremony": ceremonies.ceremony,
    "checkpoints": notes.checkpoints,
    "signed_events": judged.signed_events,
    "ledger_blocks": judged.ledger_blocks,
    "receipts": shown.receipts,
    "round_messages": said.round_messages,
    "node_messages": said.node_messages,
    "epoch_links": shown.epoch_links,
    "bundles": shown.bundles,
    "transitions": transitions.transitions,
}


def main(folder: str) -> None:
    """Write every file of vectors into ``folder``."""
    for name, cases in FILES.items():
        Path(folder, f"{name}.json").write_text(json.dumps(cases(), indent=1) + "\n", encoding="ascii")


if __name__ == "__main__":
    main(sys.argv[1])
