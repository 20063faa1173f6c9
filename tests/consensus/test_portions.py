"""Salted commitments: every byte, its place and its salt are bound; nothing of a neighbour is revealed."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_fixtures import digest

from consensus import portions as p
from consensus.codec import encode
from consensus.identifiers import Role, Tag, tagged_hash
from consensus.keys import SignatureScheme
from consensus.merkle import inclusion_proof_of, leaf_hash, root_of, verify_inclusion
from consensus.rejection import Reason, Rejected
from consensus.state import merge_counts

SALT = digest("salt")
PORTION = p.DataPortion(SALT, (p.DataItem(b"one"), p.DataItem(b"two"), p.DataItem(b"three")))
GOVERNANCE = p.SaltedPortion(SALT, b"governance")
OPERATION = p.SaltedPortion(SALT, b"operation")
PORTIONS = p.Portions(PORTION, GOVERNANCE, OPERATION)


def pages_of(key: bytes, examples: tuple[int, ...]) -> list[bytes]:
    salts = p.example_salts(key, len(examples))
    committed = [p.example_commitment(salt, example) for salt, example in zip(salts, examples, strict=True)]
    return [b"".join(committed[first : first + 16]) for first in range(0, len(committed), 16)]


@pytest.mark.parametrize("examples", [(), (7,), (0, 1, 5), (2**53 - 1,), *(tuple(range(n)) for n in (15, 16, 17, 600))])
def test_examples_root_is_an_rfc_9162_tree_over_pages_of_sixteen_commitments(examples: tuple[int, ...]) -> None:
    key = p.examples_key(SALT, 3)
    assert p.examples_root(key, examples) == root_of([leaf_hash(page) for page in pages_of(key, examples)])


def test_one_example_is_proved_by_its_salt_its_page_and_the_page_s_place() -> None:
    examples, key = tuple(range(0, 3 * 600, 3)), p.examples_key(SALT, 3)
    pages = pages_of(key, examples)
    leaves = [leaf_hash(page) for page in pages]
    for position in (0, 15, 16, 599):
        salt = list(p.example_salts(key, position + 1))[position]
        page, within = divmod(position, p.PAGE_EXAMPLES)
        opened = p.example_commitment(salt, examples[position])
        assert pages[page][32 * within : 32 * within + 32] == opened
        proof = inclusion_proof_of(leaves, page)
        verify_inclusion(leaf_hash(pages[page]), page, len(leaves), proof, p.examples_root(key, examples))


def test_commitments_are_empty_where_there_is_no_portion() -> None:
    assert p.commitments("step", p.Portions(None, None, None)) == (b"", b"", b"")
    assert all(len(commitment) == 32 for commitment in p.commitments("step", PORTIONS))


def test_commitment_binds_kind_role_salt_and_content() -> None:
    data, governance, operation = p.commitments("step", PORTIONS)
    assert set(p.commitments("refusal", PORTIONS)).isdisjoint({data, governance, operation})
    assert p.portion_commitment("step", Role.GOVERNANCE, SALT, b"x") != p.portion_commitment(
        "step", Role.OPERATOR, SALT, b"x"
    )
    changed = [
        p.DataPortion(digest("other"), PORTION.items),
        p.DataPortion(SALT, PORTION.items[::-1]),
        p.DataPortion(SALT, PORTION.items[:2]),
        p.DataPortion(SALT, (*PORTION.items, PORTION.items[0])),
    ]
    for other in changed:
        assert p.commitments("step", p.Portions(other, GOVERNANCE, OPERATION))[0] != data
    for other in (p.SaltedPortion(digest("other"), b"governance"), p.SaltedPortion(SALT, b"Governance")):
        assert p.commitments("step", p.Portions(PORTION, other, OPERATION))[1] != governance


def test_inner_node_of_the_item_tree_is_not_taken_for_an_item() -> None:
    """A shorter list whose root is the same must have another commitment: the count is bound."""
    root = p.data_items_root(PORTION)
    assert p.data_commitment("step", root, 3) != p.data_commitment("step", root, 2)


def test_salts_of_items_examples_and_positions_all_differ() -> None:
    salts = [p.item_salt(SALT, n) for n in range(20)]
    salts += [salt for item in range(20) for salt in p.example_salts(p.examples_key(SALT, item), 20)]
    salts += [p.examples_key(SALT, item) for item in range(20)]
    salts += [p.content_salt(SALT, n) for n in range(20)]
    salts += [p.item_salt(digest("other"), 0), *p.example_salts(p.examples_key(digest("other"), 0), 1)]
    assert len(set(salts)) == len(salts)


def test_same_example_has_another_commitment_at_every_place() -> None:
    keys = [p.examples_key(SALT, item) for item in range(5)]
    assert len({p.example_commitment(salt, 7) for key in keys for salt in p.example_salts(key, 5)}) == 25
    assert p.content_leaf(SALT, b"text") != p.item_leaf(SALT, b"text")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**53 - 1), unique=True, max_size=20).map(sorted), st.integers(0, 3))
def test_examples_that_hash_to_their_root_pass_and_any_other_list_is_refused(examples: list[int], number: int) -> None:
    listed = tuple(examples)
    item = p.use_item(SALT, number, digest("s"), "text", (p.Count("r", 2),), listed)
    use = msgspec.msgpack.decode(item.content, type=p.SourceUse)
    assert (use.presented, use.admitted) == (len(listed) + 2, len(listed))
    filler = (p.DataItem(b""),) * number
    p.check_examples(p.DataPortion(SALT, (*filler, item)), number, use.examples_root)
    for wrong in ((*listed, 2**53), listed[1:], tuple(example + 1 for example in listed)):
        if wrong == listed:
            continue
        with pytest.raises(Rejected) as caught:
            p.check_examples(p.DataPortion(SALT, (*filler, p.DataItem(b"", wrong))), number, use.examples_root)
        assert caught.value.reason == Reason.PORTION_MISMATCH


def test_examples_out_of_order_are_refused() -> None:
    for wrong in ((2, 1), (1, 1)):
        root = p.examples_root(p.examples_key(SALT, 0), wrong)
        with pytest.raises(Rejected, match="bad-field"):
            p.check_examples(p.DataPortion(SALT, (p.DataItem(b"", wrong),)), 0, root)


def test_refusal_item_counts_what_it_lists() -> None:
    item = p.refusal_item(SALT, 0, digest("s"), "reason", (1, 5))
    refusal = msgspec.msgpack.decode(item.content, type=p.SourceRefusal)
    assert (refusal.count, item.examples) == (2, (1, 5))


def test_portions_come_back_from_their_wire_form() -> None:
    assert p.decode_portions(encode(PORTIONS)) == PORTIONS
    with pytest.raises(Rejected, match="oversized"):
        p.decode_portions(bytes(p.MAX_PORTIONS_BYTES + 1))


COUNTS = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 9)).map(
    lambda held: tuple(p.Count(reason, count) for reason, count in sorted(held.items()))
)


@settings(max_examples=60, deadline=None)
@given(COUNTS, COUNTS)
def test_counts_added_and_taken_back_are_as_before(first: tuple[p.Count, ...], second: tuple[p.Count, ...]) -> None:
    both = merge_counts(first, second)
    assert merge_counts(both, second, sign=-1) == first
    assert both == merge_counts(second, first)
    assert [count.reason for count in both] == sorted({count.reason for count in both})


def test_optional_digests_are_whole_or_absent() -> None:
    for length in (0, 32):
        p.Delegation(SALT, SALT, SignatureScheme.ED25519, 0, 1, bytes(length), bytes(length))
    with pytest.raises(ValueError, match="expected 32 or none"):
        p.Delegation(SALT, SALT, SignatureScheme.ED25519, 0, 1, bytes(5), b"")


def test_hashes_of_parts_joined_beforehand_are_tagged_hashes() -> None:
    number = (3).to_bytes(8, "big")
    assert p.item_salt(SALT, 3) == tagged_hash(Tag.SALT, SALT, b"item", number)
    for content in (b"", b"x" * 300):
        assert p.item_leaf(SALT, content) == tagged_hash(Tag.SOURCE_ENTRY, SALT, content)
        assert p.portion_commitment("grant", Role.OPERATOR, SALT, content) == tagged_hash(
            Tag.PORTION, b"grant", b"operator", SALT, content
        )
    assert p.data_commitment("step", SALT, 3) == tagged_hash(Tag.PORTION, b"step", b"data-source", SALT, number)
