"""Receipts: what an outsider believes of an event or a record, and every way to fool him that must fail."""

from functools import cache

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_fixtures import MemoryLedger, Story, story

from consensus.codec import decode, encode
from consensus.epochs import Anchor, anchor
from consensus.event import Kind
from consensus.identifiers import ChainId, Digest
from consensus.membership import ED25519_LIST
from consensus.merkle import inclusion_proof, leaf_hash
from consensus.receipt import MAX_RECEIPT_BYTES, Receipt, StateReceipt, verify_receipt, verify_state_receipt
from consensus.rejection import Reason, Rejected
from consensus.state import CAMPAIGN_HEAD_TABLE, CampaignHead, read_record


@cache
def told() -> Story:
    return story()


@cache
def trusted() -> Anchor:
    return anchor(told().ledger.genesis, told().ledger.chain_id)


def receipt_of(ledger: MemoryLedger, index: int) -> Receipt:
    proof = inclusion_proof(index, len(ledger.events), ledger.node)
    return Receipt(1, ledger.entry(index), index, proof, ledger.header, ledger.certificate)


def state_receipt_of(ledger: MemoryLedger, key: bytes) -> StateReceipt:
    return StateReceipt(1, key, ledger.state.prove(key), ledger.header, ledger.certificate)


def refused(reason: Reason, receipt: Receipt | StateReceipt) -> None:
    encoded = encode(receipt)
    with pytest.raises(Rejected) as caught:
        _ = (
            verify_receipt(trusted(), encoded)
            if isinstance(receipt, Receipt)
            else verify_state_receipt(trusted(), encoded, receipt.key)
        )
    assert caught.value.reason is reason


def test_every_event_of_the_log_has_a_receipt_that_verifies() -> None:
    ledger = told().ledger
    for index, event in enumerate(ledger.events):
        verified = verify_receipt(trusted(), encode(receipt_of(ledger, index)))
        assert (verified.id, verified.index, verified.entry) == (event.id, index, event.entry)
        assert verified.header.log_size == len(ledger.events)


def test_receipt_under_an_ed25519_certificate_verifies() -> None:
    ledger = MemoryLedger(certificate_scheme=ED25519_LIST)
    ledger.seal(ledger.policy())
    pinned = anchor(ledger.genesis, ledger.chain_id)
    assert verify_receipt(pinned, encode(receipt_of(ledger, 0))).entry.kind is Kind.POLICY


def test_genesis_of_another_chain_is_refused_and_both_chains_are_named() -> None:
    pinned = ChainId(bytes(32))
    with pytest.raises(Rejected) as caught:
        anchor(told().ledger.genesis, pinned)
    assert caught.value.reason is Reason.WRONG_CHAIN
    assert pinned.hex() in caught.value.detail
    assert told().ledger.chain_id.hex() in caught.value.detail


def test_receipt_of_a_chain_with_the_same_name_is_refused() -> None:
    other = MemoryLedger(seed=1)
    assert other.genesis.name == told().ledger.genesis.name
    other.seal(other.policy())
    refused(Reason.WRONG_CHAIN, receipt_of(other, 0))


def test_entry_of_another_chain_under_our_header_is_refused() -> None:
    ledger, other = told().ledger, MemoryLedger(seed=1)
    stray = other.policy()
    ours = story(released=False).ledger
    ours.collude([stray], {})
    assert ours.chain_id == ledger.chain_id
    refused(Reason.WRONG_CHAIN, receipt_of(ours, len(ours.events) - 1))


def test_certificate_of_another_ledger_block_is_refused() -> None:
    receipt = receipt_of(told().ledger, 3)
    _, certificate = told().ledger.certified[-2]
    refused(Reason.BAD_CERTIFICATE, msgspec.structs.replace(receipt, certificate=certificate))


def test_proof_for_another_index_is_refused() -> None:
    receipt = receipt_of(told().ledger, 3)
    refused(Reason.BAD_PROOF, msgspec.structs.replace(receipt, index=4))
    refused(Reason.BAD_PROOF, msgspec.structs.replace(receipt, proof=receipt.proof[:-1]))


def test_another_event_in_the_place_of_a_proved_one_is_refused() -> None:
    receipt = receipt_of(told().ledger, 3)
    refused(Reason.BAD_PROOF, msgspec.structs.replace(receipt, entry=told().ledger.entry(4)))


def test_unsigned_policy_on_a_log_of_traitors_has_no_receipt() -> None:
    ledger = story(released=False).ledger
    event = ledger.events[0]
    unsigned = encode(msgspec.structs.replace(event.entry, signatures=()))
    ledger.collude([event._replace(entry_bytes=unsigned, leaf_hash=Digest(leaf_hash(unsigned)))], {})
    refused(Reason.MISSING_SIGNATURE, receipt_of(ledger, len(ledger.events) - 1))


def test_state_receipt_proves_a_record_and_an_absence() -> None:
    ledger = told().ledger
    key = CAMPAIGN_HEAD_TABLE + told().run.id
    verified = verify_state_receipt(trusted(), encode(state_receipt_of(ledger, key)), key)
    assert verified.value is not None
    assert read_record(verified.value, CampaignHead).closed == "released"
    absent = CAMPAIGN_HEAD_TABLE + bytes(32)
    assert verify_state_receipt(trusted(), encode(state_receipt_of(ledger, absent)), absent).value is None


def test_stale_state_under_a_newer_header_is_refused() -> None:
    ledger = told().ledger
    key = CAMPAIGN_HEAD_TABLE + told().run.id
    receipt = state_receipt_of(ledger, key)
    refused(Reason.BAD_PROOF, msgspec.structs.replace(receipt, proof=ledger.states[5].prove(key)))


def test_absence_proof_of_another_key_is_refused() -> None:
    ledger = told().ledger
    absent = ledger.state.prove(bytes(33))
    receipt = state_receipt_of(ledger, CAMPAIGN_HEAD_TABLE + told().run.id)
    refused(Reason.BAD_PROOF, msgspec.structs.replace(receipt, proof=absent))


def test_state_receipt_is_no_receipt() -> None:
    with pytest.raises(Rejected) as caught:
        verify_receipt(trusted(), encode(state_receipt_of(told().ledger, CAMPAIGN_HEAD_TABLE + bytes(32))))
    assert caught.value.reason is Reason.MALFORMED


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_receipt_with_any_byte_changed_or_cut_is_refused(draw: st.DataObject) -> None:
    encoded = encode(receipt_of(told().ledger, 8))
    with pytest.raises(Rejected):
        verify_receipt(trusted(), mutated(draw, encoded))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_state_receipt_with_any_byte_changed_or_cut_is_refused(draw: st.DataObject) -> None:
    key = CAMPAIGN_HEAD_TABLE + told().run.id
    encoded = encode(state_receipt_of(told().ledger, key))
    with pytest.raises(Rejected):
        verify_state_receipt(trusted(), mutated(draw, encoded), key)


def test_oversized_receipt_is_refused() -> None:
    with pytest.raises(Rejected) as caught:
        verify_receipt(trusted(), bytes(MAX_RECEIPT_BYTES + 1))
    assert caught.value.reason is Reason.OVERSIZED


def test_receipt_round_trips() -> None:
    receipt = receipt_of(told().ledger, 0)
    assert decode(encode(receipt), Receipt, MAX_RECEIPT_BYTES) == receipt


def mutated(draw: st.DataObject, encoded: bytes) -> bytes:
    """The bytes with one changed, or cut short."""
    position = draw.draw(st.integers(0, len(encoded) - 1))
    if draw.draw(st.booleans()):
        return encoded[:position]
    change = draw.draw(st.integers(1, 255))
    return encoded[:position] + bytes([encoded[position] ^ change]) + encoded[position + 1 :]
