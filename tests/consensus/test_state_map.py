"""The authenticated map against a plain dict, a recursive reference root and lying provers."""

from collections.abc import Mapping

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from consensus import state_map
from consensus.codec import decode, encode
from consensus.identifiers import Digest, Tag, tagged_hash
from consensus.rejection import InvariantBroken, Reason, Rejected
from consensus.state_map import (
    EMPTY_STATE_ROOT,
    KEY_BITS,
    KEY_BYTES,
    MAX_VALUE_BYTES,
    MapProof,
    PrefixProof,
    StateMap,
    verify_map_proof,
    verify_prefix_proof,
)

fast = settings(deadline=None, max_examples=120)


def table_key(table: int, name: object) -> bytes:
    return bytes([table]) + tagged_hash(Tag.CONTENT, repr(name).encode())


def bit_of(key: bytes, bit: int) -> int:
    return int.from_bytes(key, "big") >> (KEY_BITS - 1 - bit) & 1


def reference_root(entries: Mapping[bytes, bytes]) -> bytes:
    """The definition, read off the sorted entries: split at the first bit in which they differ."""
    if not entries:
        return tagged_hash(Tag.STATE_EMPTY)

    def root(keys: list[bytes]) -> bytes:
        if len(keys) == 1:
            return tagged_hash(Tag.STATE_LEAF, keys[0], entries[keys[0]])
        bit = next(bit for bit in range(KEY_BITS) if bit_of(keys[0], bit) != bit_of(keys[-1], bit))
        left = [key for key in keys if not bit_of(key, bit)]
        right = [key for key in keys if bit_of(key, bit)]
        return tagged_hash(Tag.STATE_NODE, bit.to_bytes(2, "big"), root(left), root(right))

    return root(sorted(entries))


# Keys close together (one bit apart, deep branches) and far apart, few enough to meet again.
close_keys = st.integers(0, KEY_BITS - 1).map(lambda bit: (1 << bit).to_bytes(KEY_BYTES, "big"))
far_keys = st.builds(table_key, st.integers(0, 3), st.integers(0, 8))
short_keys = st.binary(min_size=2, max_size=2).map(lambda start: start.ljust(KEY_BYTES, b"\x00"))
keys = st.one_of(close_keys, far_keys, short_keys)
values = st.binary(max_size=6)
maps = st.dictionaries(keys, values, max_size=25)


def rejected_map_proof(root: bytes, key: bytes, proof: MapProof) -> None:
    with pytest.raises(Rejected) as caught:
        verify_map_proof(root, key, proof)
    assert caught.value.reason is Reason.BAD_PROOF


def rejected_prefix_proof(root: bytes, prefix: bytes, proof: PrefixProof) -> None:
    with pytest.raises(Rejected) as caught:
        verify_prefix_proof(root, prefix, proof)
    assert caught.value.reason is Reason.BAD_PROOF


def flipped(encoded: bytes, bit: int) -> bytes:
    return (int.from_bytes(encoded, "big") ^ (1 << bit)).to_bytes(len(encoded), "big")


# Against a dict


class MapMachine(RuleBasedStateMachine):
    """Sets, removals and batches on the map and on a dict stay equal; an older version never changes."""

    def __init__(self) -> None:
        super().__init__()
        self.map = StateMap()
        self.model: dict[bytes, bytes] = {}
        self.older = self.map
        self.older_model: dict[bytes, bytes] = {}

    @rule(key=keys, value=values)
    def set_one(self, key: bytes, value: bytes) -> None:
        self.map = self.map.set(key, value)
        self.model[key] = value

    @rule(key=keys)
    def remove_one(self, key: bytes) -> None:
        self.map = self.map.remove(key)
        self.model.pop(key, None)

    @rule(changes=st.dictionaries(keys, st.none() | values, max_size=12))
    def set_many(self, changes: dict[bytes, bytes | None]) -> None:
        self.map = self.map.set_many(changes)
        for key, value in changes.items():
            if value is None:
                self.model.pop(key, None)
            else:
                self.model[key] = value

    @precondition(lambda self: bool(self.model))
    @rule(choice=st.integers(0, 1_000))
    def remove_present(self, choice: int) -> None:
        key = sorted(self.model)[choice % len(self.model)]
        self.map = self.map.remove(key)
        del self.model[key]

    @rule()
    def keep_this_version(self) -> None:
        self.older, self.older_model = self.map, dict(self.model)

    @rule()
    def return_to_the_kept_version(self) -> None:
        self.map, self.model = self.older, dict(self.older_model)

    @rule(key=keys)
    def prove_one(self, key: bytes) -> None:
        assert verify_map_proof(self.map.root, key, self.map.prove(key)) == self.model.get(key)

    @rule(key=keys, length=st.integers(0, KEY_BYTES))
    def prove_prefix(self, key: bytes, length: int) -> None:
        prefix = key[:length]
        expected = tuple(sorted(entry for entry in self.model.items() if entry[0].startswith(prefix)))
        assert tuple(self.map.items_with_prefix(prefix)) == expected
        assert verify_prefix_proof(self.map.root, prefix, self.map.prove_prefix(prefix)) == expected

    @invariant()
    def map_equals_model(self) -> None:
        assert list(self.map.items()) == sorted(self.model.items())
        assert len(self.map) == len(self.model)
        assert self.map.root == reference_root(self.model)
        for key in self.model:
            assert self.map.get(key) == self.model[key]

    @invariant()
    def older_version_is_unchanged(self) -> None:
        assert list(self.older.items()) == sorted(self.older_model.items())
        assert self.older.root == reference_root(self.older_model)


TestMapMachine = MapMachine.TestCase
TestMapMachine.settings = settings(deadline=None, max_examples=40, stateful_step_count=25)


@fast
@given(maps, st.randoms(use_true_random=False), st.dictionaries(keys, values, max_size=8))
def test_the_root_does_not_depend_on_the_order_or_on_what_was_removed(
    entries: dict[bytes, bytes], random: object, passing: dict[bytes, bytes]
) -> None:
    order = list(entries)
    random.shuffle(order)  # type: ignore[attr-defined]
    built = StateMap()
    for key in order:
        built = built.set(key, b"an earlier value").set(key, entries[key])
    detour = StateMap().set_many(passing).set_many(entries)
    detour = detour.set_many({key: None for key in passing if key not in entries})
    assert built.root == detour.root == StateMap().set_many(entries).root == reference_root(entries)


@fast
@given(maps, st.dictionaries(keys, st.none() | values, max_size=12), st.dictionaries(keys, values, max_size=12))
def test_versions_whose_root_nobody_asked_for_do_not_change_either(
    first: dict[bytes, bytes], second: dict[bytes, bytes | None], third: dict[bytes, bytes]
) -> None:
    built = StateMap().set_many(first)
    changed = built.set_many(second)
    forked = built.set_many(third)
    both = {key: value for key, value in {**first, **second}.items() if value is not None}
    for version, model in ((built, first), (changed, both), (forked, {**first, **third})):
        assert dict(version.items()) == model
        assert version.root == reference_root(model)


def test_golden_roots() -> None:
    small = StateMap().set(table_key(1, "a"), b"value")
    large = StateMap().set_many({table_key(index % 5, index): b"v%d" % index for index in range(1_000)})
    assert EMPTY_STATE_ROOT.hex() == "9efb0fa6854fdb192ac11fe406e912d729e257aa2af86ea5f2e6539cb9d498b2"
    assert StateMap().root == EMPTY_STATE_ROOT
    assert small.root.hex() == "132a873110f572e08877d7750082f51a0a2ed29c7bdac116e8ce125547610dfc"
    assert large.root.hex() == "d1f1adced443975ff0ad1c834c699c4337e2fb9404132387ae03b1ea8cdec230"


def test_the_deepest_possible_tree_needs_no_recursion() -> None:
    entries = {(1 << bit).to_bytes(KEY_BYTES, "big"): b"%d" % bit for bit in range(KEY_BITS)}
    entries[bytes(KEY_BYTES)] = b"zero"
    deep = StateMap().set_many(entries)
    assert deep.root == reference_root(entries)
    proof = deep.prove(bytes(KEY_BYTES))
    assert [bit for bit, _ in proof.path] == list(range(KEY_BITS))
    assert verify_map_proof(deep.root, bytes(KEY_BYTES), decode(encode(proof), MapProof, 100_000)) == b"zero"


def test_a_change_that_changes_nothing_gives_the_same_map() -> None:
    held = StateMap().set(table_key(1, 1), b"one")
    assert held.set(table_key(1, 1), b"one") is held
    assert held.remove(table_key(1, 2)) is held
    assert StateMap().remove(table_key(1, 2)).root == EMPTY_STATE_ROOT
    assert StateMap().get(table_key(1, 2)) is None


@pytest.mark.parametrize("length", [0, 1, 32, 34])
def test_a_key_of_another_length_stops(length: int) -> None:
    held = StateMap().set(table_key(1, 1), b"one")
    for use in (held.get, held.remove, held.prove, lambda key: held.set(key, b"")):
        with pytest.raises(InvariantBroken):
            use(bytes(length))


def test_a_value_or_prefix_too_long_stops() -> None:
    with pytest.raises(InvariantBroken):
        StateMap().set(table_key(1, 1), bytes(MAX_VALUE_BYTES + 1))
    assert len(StateMap().set(table_key(1, 1), bytes(MAX_VALUE_BYTES))) == 1
    with pytest.raises(InvariantBroken):
        list(StateMap().items_with_prefix(bytes(KEY_BYTES + 1)))
    with pytest.raises(InvariantBroken):
        StateMap().prove_prefix(bytes(KEY_BYTES + 1))


# Attacks on one key's proof


def map_proof_mutations(proof: MapProof, bit: int) -> list[MapProof]:
    replace = msgspec.structs.replace
    mutated = [
        replace(proof, leaf_value=proof.leaf_value + b"\x00"),
        replace(proof, leaf_value=b"another"),
        replace(proof, leaf_key=b""),
        replace(proof, leaf_key=b"", leaf_value=b"", path=()),
        replace(proof, leaf_key=b"", leaf_value=b""),
        replace(proof, leaf_key=proof.leaf_key[:-1]),
        replace(proof, leaf_key=proof.leaf_key + b"\x00"),
        replace(proof, leaf_key=flipped(proof.leaf_key or bytes(KEY_BYTES), bit)),
        replace(proof, leaf_value=bytes(MAX_VALUE_BYTES + 1)),
        replace(proof, path=(*proof.path, (KEY_BITS - 1, bytes(32)))),
        replace(proof, path=(*proof.path, (KEY_BITS, bytes(32)))),
        replace(proof, path=((-1, bytes(32)), *proof.path)),
        replace(proof, path=((0, bytes(32)), *proof.path)),
        replace(proof, path=proof.path[::-1]),
    ]
    for place, (branch_bit, sibling) in enumerate(proof.path):
        before, after = proof.path[:place], proof.path[place + 1 :]
        mutated += [
            replace(proof, path=(*before, *after)),
            replace(proof, path=(*before, (branch_bit, flipped(sibling, bit % 256)), *after)),
            replace(proof, path=(*before, (branch_bit, sibling[:-1]), *after)),
            replace(proof, path=(*before, (branch_bit, sibling + b"\x00"), *after)),
            replace(proof, path=(*before, (branch_bit + 1, sibling), *after)),
            replace(proof, path=(*before, (branch_bit - 1, sibling), *after)),
            replace(proof, path=(*before, (branch_bit, sibling), (branch_bit, sibling), *after)),
        ]
    return [candidate for candidate in mutated if candidate != proof]


@fast
@given(maps, keys, st.integers(0, KEY_BITS - 1))
def test_any_mutation_of_a_map_proof_is_rejected(entries: dict[bytes, bytes], key: bytes, bit: int) -> None:
    held = StateMap().set_many(entries)
    for asked in {key, *list(entries)[:3]}:
        proof = held.prove(asked)
        assert verify_map_proof(held.root, asked, proof) == entries.get(asked)
        for mutated in map_proof_mutations(proof, bit):
            rejected_map_proof(held.root, asked, mutated)
        rejected_map_proof(flipped(held.root, bit % 256), asked, proof)
        rejected_map_proof(held.root[:-1], asked, proof)
        rejected_map_proof(held.root, asked[:-1], proof)
        rejected_map_proof(held.root, asked + b"\x00", proof)


@fast
@given(maps, keys, keys)
def test_a_proof_for_another_key_never_gives_a_wrong_answer(
    entries: dict[bytes, bytes], asked: bytes, proven: bytes
) -> None:
    held = StateMap().set_many(entries)
    try:
        answer = verify_map_proof(held.root, asked, held.prove(proven))
    except Rejected:
        return
    assert answer == entries.get(asked)


def test_a_present_key_cannot_be_shown_absent_by_its_neighbour_s_leaf() -> None:
    present, neighbour = bytes(KEY_BYTES), b"\x80" + bytes(KEY_BYTES - 1)
    held = StateMap().set_many({present: b"refused", neighbour: b"other"})
    honest = held.prove(neighbour)
    assert verify_map_proof(held.root, neighbour, honest) == b"other"
    # The neighbour's leaf with its own path: its bit at the branch is not the queried key's.
    rejected_map_proof(held.root, present, honest)
    # The sides swapped so that the leaf stands where the queried key leads: another root.
    leaf = tagged_hash(Tag.STATE_LEAF, present, b"refused")
    rejected_map_proof(held.root, present, MapProof(leaf_key=neighbour, leaf_value=b"other", path=((0, leaf),)))


def test_a_leaf_off_the_way_is_rejected_even_where_the_root_was_made_to_match() -> None:
    present, neighbour = bytes(KEY_BYTES), b"\x80" + bytes(KEY_BYTES - 1)
    leaf = tagged_hash(Tag.STATE_LEAF, neighbour, b"other")
    # A root no honest tree has: the leaf of a key with bit 0 set, on the left of a branch at bit 0.
    root = tagged_hash(Tag.STATE_NODE, (0).to_bytes(2, "big"), leaf, bytes(32))
    rejected_map_proof(root, present, MapProof(leaf_key=neighbour, leaf_value=b"other", path=((0, bytes(32)),)))


def test_a_branch_passed_off_as_a_leaf_is_rejected() -> None:
    left, right = bytes(KEY_BYTES), b"\x80" + bytes(KEY_BYTES - 1)
    held = StateMap().set_many({left: b"l", right: b"r"})
    branch_parts = tagged_hash(Tag.STATE_LEAF, left, b"l") + tagged_hash(Tag.STATE_LEAF, right, b"r")
    forged = MapProof(leaf_key=branch_parts[:KEY_BYTES], leaf_value=branch_parts[KEY_BYTES:], path=())
    rejected_map_proof(held.root, branch_parts[:KEY_BYTES], forged)


def test_an_empty_map_proof_fails_against_a_map_with_entries() -> None:
    held = StateMap().set(table_key(1, 1), b"one")
    empty = StateMap().prove(table_key(1, 1))
    assert verify_map_proof(EMPTY_STATE_ROOT, table_key(1, 1), empty) is None
    rejected_map_proof(held.root, table_key(1, 1), empty)


def test_a_path_longer_than_a_key_or_a_negative_bit_does_not_decode() -> None:
    step = (0, bytes(32))
    for path in ((step,) * (KEY_BITS + 1), ((-1, bytes(32)),), ((KEY_BITS, bytes(32)),), ((0, bytes(31)),)):
        encoded = encode(MapProof(leaf_key=bytes(KEY_BYTES), leaf_value=b"", path=path))
        with pytest.raises(Rejected) as caught:
            decode(encoded, MapProof, 100_000)
        assert caught.value.reason is Reason.MALFORMED


# Attacks on a prefix's proof


@fast
@given(maps, keys, st.integers(0, KEY_BYTES), st.integers(0, 255))
def test_any_mutation_of_a_prefix_proof_is_rejected(
    entries: dict[bytes, bytes], key: bytes, length: int, bit: int
) -> None:
    held, replace = StateMap().set_many(entries), msgspec.structs.replace
    prefix = key[:length]
    proof = held.prove_prefix(prefix)
    root = held.root
    mutated = [
        replace(proof, path=(*proof.path, (KEY_BITS - 1, bytes(32)))),
        replace(proof, path=((0, bytes(32)), *proof.path)),
        replace(proof, entries=(*proof.entries, (bytes([255]) * KEY_BYTES, b"added"))),
        replace(proof, entries=((bytes(KEY_BYTES), b"added before"), *proof.entries)),
        replace(proof, entries=proof.entries[::-1]),
        replace(proof, entries=()),
        replace(proof, entries=(), path=()),
        replace(proof, entries=((b"", b""),), path=()),
    ]
    for place, (entry_key, value) in enumerate(proof.entries):
        before, after = proof.entries[:place], proof.entries[place + 1 :]
        mutated += [
            replace(proof, entries=(*before, *after)),
            replace(proof, entries=(*before, (entry_key, value + b"\x00"), *after)),
            replace(proof, entries=(*before, (entry_key, bytes(MAX_VALUE_BYTES + 1)), *after)),
            replace(proof, entries=(*before, (entry_key[:-1], value), *after)),
            replace(proof, entries=(*before, (flipped(entry_key, bit), value), *after)),
            replace(proof, entries=(*before, (entry_key, value), (entry_key, value), *after)),
        ]
    for place, (branch_bit, sibling) in enumerate(proof.path):
        before_path, after_path = proof.path[:place], proof.path[place + 1 :]
        mutated += [
            replace(proof, path=(*before_path, *after_path)),
            replace(proof, path=(*before_path, (branch_bit, flipped(sibling, bit)), *after_path)),
            replace(proof, path=(*before_path, (branch_bit, sibling[:-1]), *after_path)),
            replace(proof, path=(*before_path, (branch_bit + 1, sibling), *after_path)),
        ]
    for candidate in mutated:
        if candidate != proof:
            rejected_prefix_proof(root, prefix, candidate)
    rejected_prefix_proof(flipped(root, bit), prefix, proof)


@fast
@given(maps, keys, st.integers(0, KEY_BYTES), keys, st.integers(0, KEY_BYTES))
def test_a_prefix_proof_for_another_prefix_never_gives_a_wrong_answer(
    entries: dict[bytes, bytes], asked_key: bytes, asked_length: int, proven_key: bytes, proven_length: int
) -> None:
    held = StateMap().set_many(entries)
    asked, proven = asked_key[:asked_length], proven_key[:proven_length]
    try:
        answer = verify_prefix_proof(held.root, asked, held.prove_prefix(proven))
    except Rejected:
        return
    assert answer == tuple(entry for entry in sorted(entries.items()) if entry[0].startswith(asked))


def test_a_refusal_hidden_by_descending_one_branch_further_is_rejected() -> None:
    refusals = {table_key(7, index): b"%d" % index for index in range(6)}
    held = StateMap().set_many(refusals).set(table_key(8, 0), b"else")
    honest = held.prove_prefix(b"\x07")
    assert [key for key, _ in honest.entries] == sorted(refusals)
    # Only the part of the refusals under a longer path, with the hidden rest as one more sibling.
    inner = held.prove(honest.entries[0][0])
    hiding = PrefixProof(entries=(honest.entries[0],), path=inner.path)
    rejected_prefix_proof(held.root, b"\x07", hiding)
    # A foreign leaf to claim there is none.
    foreign = held.prove(table_key(8, 0))
    rejected_prefix_proof(
        held.root, b"\x07", PrefixProof(entries=((foreign.leaf_key, foreign.leaf_value),), path=foreign.path)
    )


def test_a_prefix_longer_than_a_key_and_too_many_entries_are_rejected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = StateMap().set_many({table_key(1, index): b"" for index in range(9)})
    rejected_prefix_proof(held.root, bytes(KEY_BYTES + 1), held.prove_prefix(b""))
    proof = held.prove_prefix(b"\x01")
    monkeypatch.setattr(state_map, "MAX_PREFIX_ENTRIES", 8)
    rejected_prefix_proof(held.root, b"\x01", proof)
    with pytest.raises(Rejected) as caught:
        held.prove_prefix(b"\x01")
    assert caught.value.reason is Reason.OVERSIZED


def test_a_prefix_proof_survives_the_wire() -> None:
    held = StateMap().set_many({table_key(index % 3, index): b"%d" % index for index in range(30)})
    proof = decode(encode(held.prove_prefix(b"\x02")), PrefixProof, 10_000)
    assert len(verify_prefix_proof(Digest(held.root), b"\x02", proof)) == 10
    assert verify_prefix_proof(held.root, b"\x03", held.prove_prefix(b"\x03")) == ()
