"""The primitives under every figure of the ledger: bytes, hashes, trees, signatures. CPU microseconds of one call."""

import argparse
import hashlib
import random
import sys

from harness import Report, run_benchmark

from consensus import bls, merkle
from consensus import portions as p
from consensus.bls_certificates import BlsThreshold
from consensus.certificate import certificate_message
from consensus.certificate_schemes import scheme_for
from consensus.codec import decode, encode
from consensus.event import Entry, Kind, check_event, make_entry, pack, sign_entry, unpack
from consensus.genesis import MemberPlan, generate_genesis
from consensus.identifiers import VOTING_ROLES, Digest, MemberId, Role, View
from consensus.membership import SCHEME_NEEDS, committee
from consensus.merkle import Frontier
from consensus.state_map import StateMap, verify_map_proof

COUNTS = {Role.DATA_SOURCE: 2, Role.GOVERNANCE: 1, Role.OPERATOR: 1}
BATCH = 1_000


def measure(report: Report, arguments: argparse.Namespace) -> None:
    """All primitives."""
    repeats = 20 if arguments.quick else 100
    plans = [
        MemberPlan(f"{role.value}-{number}", role, hashlib.sha256(f"{role} {number}".encode()).digest())
        for role in VOTING_ROLES
        for number in range(COUNTS[role])
    ]
    genesis, secrets = generate_genesis(name="bench.example/proofs", nonce=bytes(32), created_ms=0, plans=plans)
    members = committee(genesis)

    # Events.
    author = next(member for member in genesis.members if member.role == Role.DATA_SOURCE)
    claim = p.SourceClaim(
        name="source",
        content_root=bytes(32),
        example_count=10,
        size_bytes=1_000,
        licence="PSF-2.0",
        rights_basis="owner",
        purposes=("research",),
        content_class="documentation",
        valid_from_ms=0,
        valid_until_ms=4_000_000_000_000,
        statement="",
        overlap_sha256=b"",
        reserve_below=0,
    )
    portions = p.Portions(p.DataPortion(bytes(32), (p.DataItem(encode(claim)),)), None, None)
    unsigned = make_entry(genesis.chain_id, Kind.SOURCE, MemberId(author.id), portions)
    signer = secrets[author.name].identity
    event = pack(sign_entry(unsigned, author.id, author.role, signer), portions)
    entry_bytes = unpack(event).entry
    entry = decode(entry_bytes, Entry, 1 << 16)
    report.time_calls("codec: encode an entry", lambda: encode(entry), repeats, 1_000)
    report.time_calls(
        "codec: decode an entry, canonical or refused", lambda: decode(entry_bytes, Entry, 1 << 16), repeats, 1_000
    )
    report.time_calls("event: sign a source", lambda: sign_entry(unsigned, author.id, author.role, signer), repeats, 50)
    report.time_calls("event: all checks without state", lambda: check_event(event, members), repeats, 50)

    # The tree.
    size = 1 << (14 if arguments.quick else 20)
    leaves = [hashlib.sha256(number.to_bytes(8, "big")).digest() for number in range(size)]
    frontier, interior = Frontier().append_with_nodes(leaves)
    nodes = {(level, index): digest for level, index, digest in interior}
    nodes.update(((0, index), Digest(leaf)) for index, leaf in enumerate(leaves))
    block = leaves[:BATCH]
    report.time_calls(f"merkle: append {BATCH} leaves with nodes", lambda: frontier.append_with_nodes(block), repeats)
    draw = random.Random(1)
    indexes = [draw.randrange(size) for _ in range(100)]

    def read(level: int, index: int) -> bytes:
        return nodes[level, index]

    proofs = [merkle.inclusion_proof(index, size, read) for index in indexes]
    report.time_calls(
        f"merkle: 100 inclusion proofs at {size} leaves",
        lambda: [merkle.inclusion_proof(index, size, read) for index in indexes],
        repeats,
    )

    def verify_all() -> None:
        for index, proof in zip(indexes, proofs, strict=True):
            merkle.verify_inclusion(leaves[index], index, size, proof, frontier.root)

    report.time_calls(f"merkle: verify 100 inclusion proofs at {size} leaves", verify_all, repeats)

    # The state.
    held = 10_000 if arguments.quick else 100_000
    value = bytes(300)
    state = StateMap().set_many({b"s" + leaf: value for leaf in leaves[:held]})
    root = state.root
    added = {b"s" + hashlib.sha256(leaf).digest(): value for leaf in block}
    report.time_calls(
        f"state map: set {BATCH} of {held} and root", lambda: state.set_many(added).root, min(repeats, 20)
    )
    key = b"s" + leaves[held // 2]
    proven = state.prove(key)
    report.time_calls(f"state map: prove one of {held}", lambda: state.prove(key), repeats, 50)
    report.time_calls("state map: verify a proof", lambda: verify_map_proof(root, key, proven), repeats, 50)

    # Certificates.
    scheme = scheme_for(genesis)
    assert isinstance(scheme, BlsThreshold)
    message = certificate_message(genesis.chain_id, 0, View(1), Digest(bytes(32)))
    shares = {}
    for member in genesis.members:
        share = secrets[member.name].key_share
        assert share is not None
        shares[MemberId(member.id)] = scheme.share(share, message)
    payload = scheme.combine(message, shares)
    secret = bls.secret_from_seed(bytes(32))
    public, signature = bls.public_key(secret), bls.sign(secret, message)
    report.time_calls("bls: sign", lambda: bls.sign(secret, message), repeats, 3)
    report.time_calls("bls: verify", lambda: bls.verify(public, message, signature), repeats, 3)
    report.time_calls("certificate: combine four shares and check", lambda: scheme.combine(message, shares), repeats, 3)
    report.time_calls("certificate: verify", lambda: scheme.verify(message, payload), repeats, 3)

    for counts in (COUNTS, dict.fromkeys(VOTING_ROLES, 4)):
        for name in SCHEME_NEEDS:
            measure_scheme(report, name, counts, min(repeats, 30))


def measure_scheme(report: Report, name: str, counts: dict[Role, int], repeats: int) -> None:
    """Size of a certificate of one scheme, and what combining and verifying it takes."""
    plans = [
        MemberPlan(f"{role.value}-{number}", role, hashlib.sha256(f"{role} {number}".encode()).digest())
        for role in VOTING_ROLES
        for number in range(counts[role])
    ]
    genesis, secrets = generate_genesis(
        name="bench.example/proofs", nonce=bytes(32), created_ms=0, plans=plans, certificate_scheme=name
    )
    scheme = scheme_for(genesis)
    message = certificate_message(genesis.chain_id, 0, View(1), Digest(bytes(32)))
    shares = {}
    for member in genesis.members:
        held = secrets[member.name]
        shares[MemberId(member.id)] = scheme.share(held.key_share or held.identity, message)
    payload = scheme.combine(message, shares)
    of = f"{name}, {len(plans)} voters"
    report.time_calls(f"{of}: combine and check", lambda: scheme.combine(message, shares), repeats, 2)
    report.time_calls(f"{of}: verify", lambda: scheme.verify(message, payload), repeats, 2)
    report.rate(f"{of}: size", len(payload), "bytes")


def main() -> int:
    """The command line."""
    return run_benchmark("proofs", measure, argparse.ArgumentParser(description="Measure the primitives."))


if __name__ == "__main__":
    sys.exit(main())
