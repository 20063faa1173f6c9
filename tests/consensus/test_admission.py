"""Attacks on what opens a campaign: policies, sources, delegations, campaigns, grants. And on the state's bounds."""

import msgspec
import pytest
from ledger_fixtures import (
    BLOCKS,
    GOVERNANCE,
    HOSPITAL,
    LIBRARIAN,
    OPERATOR,
    YEAR_MS,
    CampaignRun,
    Story,
    begin,
    digest,
)
from rules_fixtures import (
    SEVERAL,
    assert_admitted,
    assert_malformed,
    assert_refused,
    granted,
    head_of,
    listed,
    opened,
    remade,
    remake,
    tell,
)

from consensus import portions as p
from consensus.admission import MAX_BATCH_SIZE, MAX_MANIFEST_SOURCES, MAX_POLICY_BYTES, RETRYABLE, admit
from consensus.codec import encode
from consensus.event import CheckedEvent, Kind
from consensus.identifiers import ZERO_DIGEST
from consensus.job_key import job_key_id
from consensus.keys import Ed25519SigningKey, MlDsa65SigningKey, SignatureScheme, Signer
from consensus.membership import ED25519_LIST, ML_DSA_65_LIST
from consensus.rejection import InvariantBroken, Reason
from consensus.state import (
    CAMPAIGN_HEAD_TABLE,
    CAMPAIGN_TABLE,
    POLICY_HEAD_KEY,
    SOURCE_TABLE,
    CampaignHead,
    CampaignRecord,
    PendingRefusal,
    PolicyHead,
    SourceCounts,
    SourceRecord,
    StateView,
    read_record,
)
from consensus.state_map import MAX_VALUE_BYTES

WIDE = "\N{MATHEMATICAL BOLD SCRIPT CAPITAL A}"
"""A character of four bytes: bounds of names are in characters."""


# Policies


def test_policy_comes_into_force_and_replaces_the_one_before() -> None:
    told = opened()
    first = told.run.policy_id
    second = told.ledger.policy(name="second")
    told.ledger.seal(second)
    value = told.ledger.state.get(POLICY_HEAD_KEY)
    assert value is not None
    assert read_record(value, PolicyHead) == PolicyHead(second.id, told.ledger.ledger.header.timestamp_ms, 2)
    assert first != second.id


def test_policy_twice_is_refused() -> None:
    told = opened()
    policy = told.ledger.policy(name="again")
    assert_refused(told.ledger, policy, Reason.DUPLICATE, before=[policy])


def test_policy_with_another_set_of_signatures_is_the_same_policy() -> None:
    """An id does not cover signatures: three of four signers, then all four, is one policy and not two."""
    told = opened(SEVERAL)
    policy = told.ledger.policy(name="again")
    fewer = remake(told.run, policy, signers=[GOVERNANCE, "governance-2", "governance-3"])
    assert fewer.id == policy.id
    assert fewer.leaf_hash != policy.leaf_hash
    assert_refused(told.ledger, policy, Reason.DUPLICATE, before=[fewer])


def test_old_policy_cannot_be_put_back_into_force_by_replay() -> None:
    told = opened()
    lax = told.ledger.policy(name="lax")
    told.ledger.seal(lax)
    told.ledger.seal(told.ledger.policy(name="strict", licences=()))
    assert_refused(told.ledger, lax, Reason.DUPLICATE)


@pytest.mark.parametrize(
    "fields",
    [
        {"revocation": "sometimes"},
        {"momentum": "keep"},
        {"routing_granularities": ()},
        {"routing_granularities": ("block", "planet")},
        {"routing_granularities": ("block", "block")},
        {"author_schemes": ()},
        {"author_schemes": ("ed25519", "rsa")},
        {"author_schemes": ("ed25519", "ed25519")},
        {"required_metadata": ("code.commit", "code.commit")},
        {"event_granularities": ("batch", "batch")},
        {"event_granularities": ("era",)},
        {"licences": ("CC0-1.0", "CC0-1.0")},
        {"purposes": ("research", "research")},
        {"classes": (p.ClassRule("text", 1, ()), p.ClassRule("text", 2, ()))},
        {"classes": (p.ClassRule("text", 1, (p.BlockWeight("a", 0), p.BlockWeight("a", 1))),)},
    ],
)
def test_policy_that_is_none_is_refused(fields: dict[str, object]) -> None:
    told = opened()
    assert_refused(told.ledger, told.ledger.policy(**fields), Reason.BAD_FIELD)


def test_policy_above_its_size_is_refused() -> None:
    told = opened()
    licences = tuple(f"{number:03d}{WIDE * 100}" for number in range(100))
    assert_refused(told.ledger, told.ledger.policy(licences=licences), Reason.OVERSIZED)


def test_policy_of_the_largest_size_fits_the_state() -> None:
    told = opened()
    room = MAX_POLICY_BYTES - len(encode_policy(told.ledger.policy()))
    wide = tuple(f"{number:03d}{WIDE * 100}" for number in range(room // 406 - 1))
    policy = told.ledger.policy(licences=("CC-BY-4.0", "CC0-1.0", *wide))
    assert MAX_POLICY_BYTES - 1_000 < len(encode_policy(policy)) <= MAX_POLICY_BYTES
    assert_admitted(told.ledger, policy)


def encode_policy(event: CheckedEvent) -> bytes:
    assert event.portions.governance is not None
    return event.portions.governance.content


# Sources


def test_source_twice_is_refused() -> None:
    told = opened()
    source = told.ledger.source(LIBRARIAN, "again")
    assert_refused(told.ledger, source, Reason.DUPLICATE, before=[source])


@pytest.mark.parametrize("until", [0, -1])
def test_source_with_an_empty_window_is_refused(until: int) -> None:
    told = opened()
    start = told.ledger.genesis.created_ms
    source = told.ledger.source(LIBRARIAN, "never", valid_from_ms=start, valid_until_ms=start + until)
    assert_refused(told.ledger, source, Reason.BAD_FIELD)


def test_source_that_lists_a_purpose_twice_is_refused() -> None:
    told = opened()
    source = told.ledger.source(LIBRARIAN, "twice", purposes=("research", "research"))
    assert_refused(told.ledger, source, Reason.BAD_FIELD)


def test_source_claim_too_large_for_the_state_is_refused_by_name() -> None:
    """Every field within its bound, in characters; together more bytes than a state value may have."""
    told = opened()
    claim = {
        "purposes": tuple(f"{number:02d}{WIDE * 126}" for number in range(64)),
        "statement": WIDE * 8_192,
        "licence": WIDE * 128,
    }
    source = told.ledger.source(LIBRARIAN, WIDE * 128, **claim)
    assert "SourceRecord" in assert_refused(told.ledger, source, Reason.OVERSIZED)
    assert_admitted(told.ledger, told.ledger.source(LIBRARIAN, "fits", statement=WIDE * 8_192))


def test_revocation_by_another_data_source_is_refused() -> None:
    told = opened()
    assert_refused(told.ledger, told.ledger.revocation(LIBRARIAN, told.records), Reason.WRONG_AUTHOR)


def test_revocation_twice_is_refused() -> None:
    told = opened()
    told.ledger.seal(told.ledger.revocation(HOSPITAL, told.records))
    assert_refused(told.ledger, told.ledger.revocation(HOSPITAL, told.records), Reason.DUPLICATE)


def test_revocation_of_an_unknown_source_is_refused() -> None:
    told = opened()
    assert_refused(told.ledger, told.ledger.revocation(HOSPITAL, digest("unknown")), Reason.UNKNOWN_SOURCE)


def test_revocation_records_when_and_by_which_event() -> None:
    told = opened()
    revocation = told.ledger.revocation(HOSPITAL, told.records)
    told.ledger.seal(revocation)
    value = told.ledger.state.get(SOURCE_TABLE + told.records)
    assert value is not None
    record = read_record(value, SourceRecord)
    assert (record.revoked_at_ms, record.revocation) == (told.ledger.ledger.header.timestamp_ms, revocation.id)


# Delegations

SECOND_KEY = Ed25519SigningKey(digest("second key"))
THIRD_KEY = Ed25519SigningKey(digest("third key"))


def delegated(told: Story, key: Signer = SECOND_KEY, operator: str = OPERATOR, **fields: object) -> CheckedEvent:
    """A delegation that replaces the campaign's job key, by default rightly."""
    ledger, head = told.ledger, head_of(told.run)
    delegation = msgspec.structs.replace(
        p.Delegation(
            told.run.id,
            job_key_id(key),
            key.scheme,
            ledger.genesis.created_ms,
            ledger.genesis.created_ms + YEAR_MS,
            head.job_key,
            head.last_event,
        ),
        **fields,
    )
    return ledger.signed(
        Kind.DELEGATION, [operator], p.Portions(None, None, ledger.salted(delegation)), campaign=told.run.id
    )


def test_replaced_job_key_writes_no_more_and_its_grants_end_with_it() -> None:
    told = granted()
    stolen = told.run.job
    refusal, step = told.run.step()
    told.ledger.seal(delegated(told))
    assert_refused(told.ledger, refusal, Reason.UNKNOWN_JOB_KEY)
    assert_refused(told.ledger, told.run.release(), Reason.UNKNOWN_JOB_KEY)
    told.run.job = SECOND_KEY
    detail = assert_refused(told.ledger, remake(told.run, refusal), Reason.UNKNOWN_JOB_KEY)
    assert "the grant is for another job key" in detail
    told.ledger.seal(told.run.grant([told.books, told.records], 1, 4))
    again = remake(told.run, refusal, governance=tell(refusal.governance, grant=told.run.grant_id))
    assert_admitted(told.ledger, again)
    assert_refused(told.ledger, remake(told.run, again, job=stolen), Reason.UNKNOWN_JOB_KEY)
    assert step.entry.sequence == 2


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"head": digest("another head")}, Reason.STEP_CHAIN_BROKEN),
        ({"head": b""}, Reason.STEP_CHAIN_BROKEN),
        ({"replaces": digest("another key")}, Reason.STEP_CHAIN_BROKEN),
        ({"replaces": b"", "head": b""}, Reason.STEP_CHAIN_BROKEN),
        ({"campaign": digest("another campaign")}, Reason.BAD_FIELD),
        ({"expires_at_ms": 1_700_000_000_000}, Reason.JOB_KEY_EXPIRED),
        ({"expires_at_ms": 1_700_000_000_001}, Reason.JOB_KEY_EXPIRED),
        ({"not_before_ms": 2**52, "expires_at_ms": 2**52}, Reason.JOB_KEY_EXPIRED),
    ],
)
def test_false_replacement_of_a_job_key_is_refused(fields: dict[str, object], reason: Reason) -> None:
    told = granted()
    assert_admitted(told.ledger, delegated(told))
    assert_refused(told.ledger, delegated(told, **fields), reason)


def test_replacement_that_names_the_head_before_the_last_step_is_refused() -> None:
    told = granted()
    late = delegated(told)
    told.ledger.seal(*told.run.step())
    assert_refused(told.ledger, late, Reason.STEP_CHAIN_BROKEN)


def test_job_key_is_replaced_only_by_its_operator() -> None:
    told = granted(SEVERAL)
    assert_refused(told.ledger, delegated(told, operator="operator-2"), Reason.WRONG_AUTHOR)


def test_job_key_of_a_closed_campaign_is_not_replaced() -> None:
    told = granted()
    told.ledger.seal(*told.run.step())
    told.ledger.seal(told.run.release())
    assert_refused(told.ledger, delegated(told), Reason.CAMPAIGN_CLOSED)


def test_job_key_is_delegated_once_ever() -> None:
    told = granted()
    told.ledger.seal(delegated(told))
    assert_refused(told.ledger, delegated(told), Reason.DUPLICATE)
    back = delegated(told, key=told.run.job)
    assert_refused(told.ledger, back, Reason.DUPLICATE)
    assert_admitted(told.ledger, delegated(told, key=THIRD_KEY))


def test_job_key_of_one_campaign_is_not_delegated_for_another() -> None:
    told = granted()
    other = CampaignRun(told.ledger, told.run.manifest, name="other")
    other.job = told.run.job
    delegation, opening = other.open()
    assert_refused(told.ledger, delegation, Reason.DUPLICATE)
    assert_refused(told.ledger, opening, Reason.UNKNOWN_JOB_KEY)


@pytest.mark.parametrize("field", ["replaces", "head"])
def test_replacement_before_the_campaign_is_on_the_log_is_refused(field: str) -> None:
    told = opened()
    other = CampaignRun(told.ledger, told.run.manifest, name="other")
    delegation, _ = other.open()
    forged = remake(other, delegation, operation=tell(delegation.operation, **{field: digest("x")}))
    assert_refused(told.ledger, forged, Reason.UNKNOWN_CAMPAIGN)


@pytest.mark.parametrize("place", [{"sequence": 1}, {"attempt": 1}])
def test_numbered_delegation_is_refused(place: dict[str, object]) -> None:
    told = opened()
    assert_refused(told.ledger, remake(told.run, delegated(told), **place), Reason.BAD_FIELD)


# Signature schemes


ML_DSA = SignatureScheme.ML_DSA_65
ED25519_ALONE, ML_DSA_ALONE = ("ed25519",), ("ml-dsa-65",)


def test_campaign_of_an_ml_dsa_job_key_runs_from_delegation_to_release() -> None:
    told = begin(certificate_scheme=ED25519_LIST, job_scheme=ML_DSA)
    told.ledger.seal(told.run.grant([told.books, told.records], 1, 4))
    told.ledger.seal(*told.run.step())
    told.ledger.seal(told.run.release())
    assert head_of(told.run).closed == "released"


def test_members_and_job_of_ml_dsa_run_under_a_policy_of_ml_dsa_alone() -> None:
    told = begin(certificate_scheme=ML_DSA_65_LIST, job_scheme=ML_DSA)
    told.ledger.seal(told.ledger.policy(author_schemes=ML_DSA_ALONE))
    told.ledger.seal(told.run.grant([told.books, told.records], 1, 4))
    told.ledger.seal(*told.run.step())


def test_policy_signed_with_a_scheme_it_does_not_admit_is_refused() -> None:
    told = opened()
    detail = assert_refused(told.ledger, told.ledger.policy(author_schemes=ML_DSA_ALONE), Reason.SCHEME_NOT_ADMITTED)
    assert "governance-1 signs with ed25519, the policy admits ml-dsa-65" in detail
    assert_admitted(told.ledger, told.ledger.policy(author_schemes=ED25519_ALONE))


def test_campaign_whose_job_key_is_of_a_scheme_the_policy_does_not_admit_is_refused() -> None:
    told = opened()
    told.ledger.seal(told.ledger.policy(author_schemes=ED25519_ALONE))
    delegation, opening, _ = other_campaign(told, job_scheme=ML_DSA)
    told.ledger.seal(delegation)
    detail = assert_refused(told.ledger, opening, Reason.SCHEME_NOT_ADMITTED)
    assert "the job key signs with ml-dsa-65, the policy admits ed25519" in detail


def test_grant_for_a_job_key_that_a_newer_policy_does_not_admit_is_refused() -> None:
    told = begin(certificate_scheme=ED25519_LIST, job_scheme=ML_DSA)
    told.ledger.seal(told.ledger.policy(author_schemes=ED25519_ALONE))
    assert_refused(told.ledger, told.run.grant([told.books], 1, 4), Reason.SCHEME_NOT_ADMITTED)


def test_grant_signed_by_members_of_a_scheme_a_newer_policy_does_not_admit_is_refused() -> None:
    told = begin(schemes={"governance": ML_DSA, "operator": ML_DSA}, job_scheme=ML_DSA)
    told.ledger.seal(told.ledger.policy(author_schemes=ML_DSA_ALONE))
    detail = assert_refused(told.ledger, told.run.grant([told.books], 1, 4), Reason.SCHEME_NOT_ADMITTED)
    assert "data-source-1 signs with ed25519" in detail


def test_replacement_by_a_key_of_the_other_scheme_carries_the_campaign_on() -> None:
    told = granted()
    key = MlDsa65SigningKey(digest("post-quantum key"))
    told.ledger.seal(delegated(told, key=key))
    told.run.job = key
    told.ledger.seal(told.run.grant([told.books, told.records], 1, 4))
    told.ledger.seal(*told.run.step())


@pytest.mark.parametrize("key", [SECOND_KEY, MlDsa65SigningKey(digest("post-quantum key"))])
def test_key_delegated_under_the_name_of_the_other_scheme_writes_nothing(key: Signer) -> None:
    """An id is 32 bytes for either scheme: the one that a policy was held against must be the one that signs."""
    told = granted()
    other = next(scheme for scheme in SignatureScheme if scheme is not key.scheme)
    false_name = delegated(told, key=key, scheme=other)
    if other is SignatureScheme.ED25519:
        assert_refused(told.ledger, false_name, Reason.BAD_KEY)
        return
    told.ledger.seal(false_name)
    told.run.job = key
    detail = assert_refused(told.ledger, told.run.release(), Reason.UNKNOWN_JOB_KEY)
    assert "signed with ed25519, the job key was delegated for ml-dsa-65" in detail


# Campaigns


def other_campaign(told: Story, **changes: object) -> tuple[CheckedEvent, CheckedEvent, CampaignRun]:
    other = CampaignRun(told.ledger, told.run.manifest, name="other", **changes)  # type: ignore[arg-type]
    delegation, opening = other.open()
    return delegation, opening, other


def test_campaign_opens_with_its_delegated_key() -> None:
    told = opened()
    delegation, opening, _ = other_campaign(told)
    assert_admitted(told.ledger, opening, before=[delegation])
    assert_refused(told.ledger, opening, Reason.UNKNOWN_JOB_KEY)
    assert_refused(told.ledger, opening, Reason.DUPLICATE, before=[delegation, opening])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"policy": digest("no policy")}, Reason.UNKNOWN_POLICY),
        ({"purpose": "advertising"}, Reason.PURPOSE_NOT_ADMITTED),
        ({"routing_granularity": "head"}, Reason.GRANULARITY_NOT_ADMITTED),
        ({"event_granularity": "example"}, Reason.GRANULARITY_NOT_ADMITTED),
        ({"batch_size": 25}, Reason.COUNTS_NOT_CONSERVED),
        ({"batch_size": MAX_BATCH_SIZE + 1}, Reason.OVERSIZED),
        ({"job_key": SECOND_KEY.public_key}, Reason.UNKNOWN_JOB_KEY),
        ({"parameter_blocks": (p.ParameterBlock("a", (p.Tensor("t", "F32", ()),)),) * 2}, Reason.BAD_FIELD),
        (
            {
                "parameter_blocks": (
                    p.ParameterBlock("a", (p.Tensor("t", "F32", ()),)),
                    p.ParameterBlock("b", (p.Tensor("t", "F32", ()),)),
                )
            },
            Reason.BAD_FIELD,
        ),
        ({"parameter_blocks": (p.ParameterBlock("a", (p.Tensor("t[0:2]", "F32", (2,)),)),)}, Reason.BAD_FIELD),
    ],
)
def test_false_campaign_is_refused(fields: dict[str, object], reason: Reason) -> None:
    told = opened()
    delegation, opening, other = other_campaign(told)
    forged = remake(other, opening, operation=tell(opening.operation, **fields))
    assert_refused(told.ledger, forged, reason, before=[delegation])


HEADS = tuple(
    p.ParameterBlock(f"head.{number}", (p.Tensor(f"t[{2 * number}:{2 * number + 2}]", "F32", (2, 4)),))
    for number in (0, 1)
)


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({}, False),
        ({"parameter_blocks": HEADS[1:]}, True),
        ({"routing_granularity": "block"}, True),
        ({"accumulator_window_steps": 5}, False),
        ({"accumulator_window_steps": 5, "sketch_rank": 2}, False),
    ],
    ids=["whole", "gap", "other granularity", "accumulators", "sketches"],
)
def test_table_of_heads_is_admitted_if_its_pieces_make_up_tensors(fields: dict[str, object], refused: bool) -> None:
    told = opened()
    policy = told.ledger.policy(routing_granularities=("block", "head"))
    delegation, opening, other = other_campaign(told)
    terms = {"policy": policy.id, "routing_granularity": "head", "parameter_blocks": HEADS, **fields}
    by_head = remake(other, opening, operation=tell(opening.operation, **terms))
    if refused:
        assert_refused(told.ledger, by_head, Reason.BAD_FIELD, before=[policy, delegation])
    else:
        assert_admitted(told.ledger, by_head, before=[policy, delegation])


def test_campaign_under_a_policy_that_was_replaced_is_refused() -> None:
    told = opened()
    delegation, opening, _ = other_campaign(told)
    newer = told.ledger.policy(name="newer")
    assert_refused(told.ledger, opening, Reason.POLICY_NOT_IN_FORCE, before=[delegation, newer])


@pytest.mark.parametrize("place", [{"sequence": 1}, {"attempt": 1}])
def test_campaign_that_does_not_open_at_zero_is_refused(place: dict[str, object]) -> None:
    told = opened()
    delegation, opening, other = other_campaign(told)
    assert_refused(told.ledger, remake(other, opening, **place), Reason.SEQUENCE_GAP, before=[delegation])


def test_campaign_by_a_key_that_another_operator_delegated_is_refused() -> None:
    told = opened(SEVERAL)
    delegation, opening, other = other_campaign(told)
    forged = remake(other, opening, author=told.ledger.ids["operator-2"])
    assert_refused(told.ledger, forged, Reason.WRONG_AUTHOR, before=[delegation])


def test_campaign_before_its_key_is_valid_is_refused() -> None:
    told = opened()
    delegation, opening, other = other_campaign(told)
    later = remake(other, delegation, operation=tell(delegation.operation, not_before_ms=told.ledger.now_ms + 1))
    assert_refused(told.ledger, opening, Reason.JOB_KEY_EXPIRED, before=[later])


def test_campaign_of_another_id_than_the_delegations_is_refused() -> None:
    told = opened()
    delegation, opening, other = other_campaign(told)
    forged = remake(other, opening, campaign=digest("squatted"))
    assert_refused(told.ledger, forged, Reason.UNKNOWN_JOB_KEY, before=[delegation])


def test_manifest_over_an_unknown_source_is_refused() -> None:
    told = opened()
    delegation, opening, other = other_campaign(told)
    items = [*listed(opening), (p.ManifestRange(digest("unknown"), 0, 1), ())]
    assert_refused(told.ledger, remake(other, opening, items=items), Reason.UNKNOWN_SOURCE, before=[delegation])


def test_manifest_that_names_a_source_twice_is_refused() -> None:
    """Two ranges of one source may overlap: an example would be presented twice in one batch."""
    told = opened()
    delegation, opening, other = other_campaign(told)
    items = [*listed(opening), (p.ManifestRange(told.books, 4, 4), ())]
    assert_refused(told.ledger, remake(other, opening, items=items), Reason.DUPLICATE, before=[delegation])


@pytest.mark.parametrize(("first", "count"), [(0, 9), (8, 1), (2**53 - 1, 2**53 - 1)])
def test_manifest_beyond_the_end_of_a_source_is_refused(first: int, count: int) -> None:
    told = opened()
    delegation, opening, other = other_campaign(told)
    items = [(p.ManifestRange(told.books, first, count), ())]
    forged = remake(other, opening, items=items)
    assert_refused(told.ledger, forged, Reason.COUNTS_NOT_CONSERVED, before=[delegation])


def test_manifest_of_too_many_sources_is_refused() -> None:
    told = opened()
    delegation, opening, other = other_campaign(told)
    items = [(p.ManifestRange(digest("s", number), 0, 1), ()) for number in range(MAX_MANIFEST_SOURCES + 1)]
    assert_refused(told.ledger, remake(other, opening, items=items), Reason.OVERSIZED, before=[delegation])


@pytest.mark.parametrize(
    ("count", "name"), [(4_096, "{:04d}" + "x" * 20), (130, "{:03d}" + WIDE * 125)], ids=["many", "wide"]
)
def test_campaign_whose_block_names_are_too_large_for_the_state_is_refused_by_name(count: int, name: str) -> None:
    told = opened()
    delegation, opening, other = other_campaign(told)
    blocks = tuple(p.ParameterBlock(name.format(n), (p.Tensor(str(n), "F32", ()),)) for n in range(count))
    forged = remake(other, opening, operation=tell(opening.operation, parameter_blocks=blocks))
    assert "CampaignRecord" in assert_refused(told.ledger, forged, Reason.OVERSIZED, before=[delegation])


@pytest.mark.parametrize("field", ["base_provenance", "factors_digest"])
@pytest.mark.parametrize("length", [1, 31])
def test_campaign_with_half_a_digest_is_malformed(field: str, length: int) -> None:
    told = opened()
    _, opening, other = other_campaign(told)
    content = bytearray(encode(opening.operation))  # type: ignore[arg-type]
    number = type(opening.operation).__struct_fields__.index(field)
    fields = msgspec.msgpack.decode(content)
    fields[number] = bytes(length)
    with pytest.raises(ValueError, match="expected 32 or none"):
        tell(opening.operation, **{field: bytes(length)})
    assert_malformed(lambda: remake(other, opening, operation=fields), Reason.MALFORMED)


# Grants


def test_grant_signed_by_all_three_parties_is_admitted() -> None:
    told = opened(SEVERAL)
    told.ledger.seal(told.run.grant([told.books, told.records], 1, 4))
    assert head_of(told.run).next_grant == 2


@pytest.mark.parametrize("missing", [LIBRARIAN, HOSPITAL])
def test_grant_without_the_signature_of_an_owner_is_refused(missing: str) -> None:
    told = opened()
    signers = [name for name in (LIBRARIAN, HOSPITAL) if name != missing]
    grant = told.run.grant([told.books, told.records], 1, 4, signers=signers)
    assert_refused(told.ledger, grant, Reason.MISSING_SIGNATURE)


def test_grant_with_the_signature_of_another_owner_instead_is_refused() -> None:
    told = opened(SEVERAL)
    grant = told.run.grant([told.books], 1, 4, signers=[HOSPITAL])
    assert_refused(told.ledger, grant, Reason.MISSING_SIGNATURE)


def test_grant_with_the_signature_of_an_owner_it_does_not_name_is_refused() -> None:
    told = opened()
    grant = told.run.grant([told.books], 1, 4, signers=[LIBRARIAN, HOSPITAL])
    assert_refused(told.ledger, grant, Reason.SURPLUS_SIGNATURE)


def test_grant_with_the_signature_of_another_operator_is_refused() -> None:
    told = opened(SEVERAL)
    grant = told.run.grant([told.books], 1, 4, signers=[LIBRARIAN, "operator-2"])
    assert_refused(told.ledger, grant, Reason.SURPLUS_SIGNATURE)


def test_grant_needs_a_quorum_of_governance_and_takes_more() -> None:
    told = opened(SEVERAL)
    grant = told.run.grant([told.books], 1, 4)
    quorum = ["governance-1", "governance-2", "governance-3"]
    assert_admitted(told.ledger, grant)
    assert_admitted(told.ledger, remake(told.run, grant, signers=[OPERATOR, LIBRARIAN, *quorum]))
    assert_malformed(
        lambda: remake(told.run, grant, signers=[OPERATOR, LIBRARIAN, *quorum[:2]]), Reason.MISSING_SIGNATURE
    )


def test_same_grant_with_other_signatures_is_refused_as_duplicate() -> None:
    told = opened(SEVERAL)
    grant = told.run.grant([told.books], 1, 4)
    fewer = remake(told.run, grant, signers=[OPERATOR, LIBRARIAN, "governance-1", "governance-2", "governance-4"])
    assert_refused(told.ledger, grant, Reason.DUPLICATE, before=[fewer])


def test_grant_naming_a_revoked_source_is_refused() -> None:
    told = opened()
    told.ledger.seal(told.ledger.revocation(HOSPITAL, told.records))
    assert_refused(told.ledger, told.run.grant([told.books, told.records], 1, 4), Reason.SOURCE_REVOKED)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"licence": "LicenseRef-internal"}, Reason.LICENCE_NOT_ADMITTED),
        ({"purposes": ("advertising",)}, Reason.PURPOSE_NOT_ADMITTED),
        ({"content_class": "poison"}, Reason.CLASS_NOT_ADMITTED),
        ({"valid_from_ms": 1_700_000_000_000 + YEAR_MS // 2}, Reason.SOURCE_NOT_YET_VALID),
        ({"valid_until_ms": 1_700_000_060_000}, Reason.SOURCE_EXPIRED),
        ({"valid_from_ms": 1, "valid_until_ms": 2}, Reason.SOURCE_EXPIRED),
    ],
)
def test_grant_naming_a_source_that_the_policy_does_not_admit_is_refused(
    fields: dict[str, object], reason: Reason
) -> None:
    told = opened()
    source = told.ledger.source(LIBRARIAN, "doubtful", **fields)
    told.ledger.seal(source)
    run = CampaignRun(told.ledger, (p.ManifestRange(source.id, 0, 8), p.ManifestRange(told.books, 0, 8)), "doubt")
    told.ledger.seal(*run.open())
    assert_admitted(told.ledger, run.grant([told.books], 1, 4))
    run.grants = 0
    assert_refused(told.ledger, run.grant([source.id], 1, 4), reason)


def test_grant_open_at_the_very_end_of_a_sources_window_is_refused() -> None:
    """``valid_until_ms`` is exclusive and a step may be included at ``closes_at_ms`` itself."""
    told = opened()
    at_ms = told.ledger.now_ms + 1_000
    for offset, reason in ((0, Reason.SOURCE_EXPIRED), (1, None)):
        until_ms = at_ms + 1_000 + 3_600_000 + offset
        source = told.ledger.source(LIBRARIAN, f"short {offset}", valid_until_ms=until_ms)
        run = CampaignRun(told.ledger, (p.ManifestRange(source.id, 0, 8),), f"short {offset}", batch_size=4)
        before = [source, *run.open()]
        told.ledger.states.append(told.ledger.state)
        view = StateView(told.ledger.state)
        for event in before:
            admit(view, event, told.ledger.now_ms, told.ledger.committee)
        terms = p.GrantTerms(run.policy_id, 1, 4, at_ms + 1_000 + 3_600_000)
        grant = remake(
            run,
            told.run.grant([told.books], 1, 4),
            items=[(p.GrantedSource(source.id), ())],
            governance=terms,
            operation=p.GrantOperation(job_key_id(run.job)),
            campaign=run.id,
            sequence=1,
        )
        if reason is None:
            assert_admitted(told.ledger, grant, before=before, at_ms=at_ms)
        else:
            assert_refused(told.ledger, grant, reason, before=before, at_ms=at_ms)


def test_grant_naming_an_unknown_source_is_refused() -> None:
    told = opened()
    grant = told.run.grant([told.books], 1, 4)
    forged = remake(told.run, grant, items=[(p.GrantedSource(digest("unknown")), ())])
    assert_refused(told.ledger, forged, Reason.UNKNOWN_SOURCE)


def test_grant_naming_a_source_outside_the_manifest_is_refused() -> None:
    told = opened()
    extra = told.ledger.source(LIBRARIAN, "extra")
    told.ledger.seal(extra)
    assert_refused(told.ledger, told.run.grant([extra.id], 1, 4), Reason.SOURCE_NOT_GRANTED)


def test_grant_whose_sources_are_out_of_order_or_repeated_is_refused() -> None:
    told = opened()
    grant = told.run.grant([told.books, told.records], 1, 4)
    items = listed(grant)
    for wrong in (items[::-1], [items[0], items[0], items[1]]):
        assert_refused(told.ledger, remake(told.run, grant, items=wrong), Reason.BAD_FIELD)


@pytest.mark.parametrize(("first", "last"), [(1, 101), (5, 4), (2, 2**53 - 1)])
def test_grant_of_more_steps_than_the_policy_allows_or_none_is_refused(first: int, last: int) -> None:
    told = opened()
    assert_refused(told.ledger, told.run.grant([told.books], first, last), Reason.GRANT_EXCEEDS_POLICY)


def test_grant_of_as_many_steps_and_as_long_as_the_policy_allows_is_admitted() -> None:
    told = opened()
    assert_admitted(told.ledger, told.run.grant([told.books], 1, 100, minutes=24 * 60))


def test_grant_open_for_longer_than_the_policy_allows_is_refused() -> None:
    told = opened()
    assert_refused(told.ledger, told.run.grant([told.books], 1, 4, minutes=24 * 60 + 1), Reason.GRANT_EXCEEDS_POLICY)


def test_grant_that_is_already_closed_is_refused() -> None:
    told = opened()
    assert_refused(told.ledger, told.run.grant([told.books], 1, 4, minutes=0), Reason.GRANT_CLOSED)


def test_grant_under_a_policy_that_was_replaced_is_refused() -> None:
    told = opened()
    stale = told.run.policy_id
    told.ledger.seal(told.ledger.policy(name="newer"))
    assert_refused(told.ledger, told.run.grant([told.books], 1, 4, policy=stale), Reason.POLICY_NOT_IN_FORCE)


def test_grant_under_an_unknown_policy_is_refused() -> None:
    told = opened()
    grant = told.run.grant([told.books], 1, 4, policy=digest("no policy"))
    assert_refused(told.ledger, grant, Reason.UNKNOWN_POLICY)


@pytest.mark.parametrize(
    "fields", [{"routing_granularities": ("head",)}, {"event_granularities": ("example", "epoch")}]
)
def test_grant_under_a_policy_that_no_longer_admits_the_campaigns_granularity_is_refused(
    fields: dict[str, object],
) -> None:
    told = opened()
    told.ledger.seal(told.ledger.policy(**fields))
    assert_refused(told.ledger, told.run.grant([told.books], 1, 4), Reason.GRANULARITY_NOT_ADMITTED)


@pytest.mark.parametrize(("ordinal", "reason"), [(0, Reason.DUPLICATE), (2, Reason.SEQUENCE_GAP)])
def test_grant_of_the_wrong_number_is_refused(ordinal: int, reason: Reason) -> None:
    told = opened()
    grant = told.run.grant([told.books], 1, 4)
    assert_refused(told.ledger, remake(told.run, grant, sequence=ordinal), reason)


def test_two_grants_of_one_number_are_refused() -> None:
    told = opened()
    first = told.run.grant([told.books], 1, 4)
    told.run.grants = 0
    second = told.run.grant([told.books, told.records], 1, 4)
    assert_refused(told.ledger, second, Reason.DUPLICATE, before=[first])


def test_grant_with_an_attempt_is_refused() -> None:
    told = opened()
    grant = told.run.grant([told.books], 1, 4)
    assert_refused(told.ledger, remake(told.run, grant, attempt=1), Reason.BAD_FIELD)


def test_grant_for_another_job_key_is_refused() -> None:
    told = opened()
    grant = told.run.grant([told.books], 1, 4)
    forged = remake(told.run, grant, operation=p.GrantOperation(SECOND_KEY.public_key))
    assert_refused(told.ledger, forged, Reason.UNKNOWN_JOB_KEY)


def test_grant_that_outlives_its_job_key_is_refused() -> None:
    told = opened()
    told.ledger.seal(delegated(told, expires_at_ms=told.ledger.now_ms + 1_800_000))
    told.run.job = SECOND_KEY
    assert_refused(told.ledger, told.run.grant([told.books], 1, 4, minutes=60), Reason.JOB_KEY_EXPIRED)
    told.run.grants = 0
    assert_admitted(told.ledger, told.run.grant([told.books], 1, 4, minutes=20))


def test_grant_by_another_operator_is_refused() -> None:
    told = opened(SEVERAL)
    grant = told.run.grant([told.books], 1, 4)
    signers = ["operator-2", LIBRARIAN, *(f"governance-{number}" for number in range(1, 5))]
    forged = remake(told.run, grant, signers=signers, author=told.ledger.ids["operator-2"])
    assert_refused(told.ledger, forged, Reason.WRONG_AUTHOR)


def test_grant_for_an_unknown_campaign_is_refused() -> None:
    told = opened()
    grant = told.run.grant([told.books], 1, 4)
    assert_refused(told.ledger, remake(told.run, grant, campaign=digest("nowhere")), Reason.UNKNOWN_CAMPAIGN)


def test_grant_of_one_campaign_is_not_taken_for_another() -> None:
    told = opened()
    delegation, opening, other = other_campaign(told)
    grant = told.run.grant([told.books], 1, 4)
    forged = remake(other, grant, campaign=other.id)
    assert_refused(told.ledger, forged, Reason.UNKNOWN_JOB_KEY, before=[delegation, opening])


# The state's bounds


def test_step_whose_head_is_too_large_for_the_state_is_refused_by_name_and_the_state_map_never_sees_it() -> None:
    """The last step's counts and the refusals of the next, of the most sources and the largest numbers."""
    told = granted()
    refusal, _ = told.run.step()
    head = head_of(told.run)
    reason = Reason.MEMORIZATION_ABOVE_THRESHOLD.value
    huge = msgspec.structs.replace(
        head,
        undo_counts=tuple(
            SourceCounts(digest(n), 2**16, 2**16, (p.Count(reason, 2**16),), "")
            for n in range(2 * MAX_MANIFEST_SOURCES)
        ),
        pending=tuple(
            PendingRefusal(digest(n), reason, tuple(range(2**40, 2**40 + 8))) for n in range(2 * MAX_MANIFEST_SOURCES)
        ),
    )
    key = CAMPAIGN_HEAD_TABLE + told.run.id
    assert len(encode(huge)) > MAX_VALUE_BYTES
    with pytest.raises(InvariantBroken):
        told.ledger.state.set(key, encode(huge))
    view = StateView(told.ledger.state)
    view._records[key] = huge
    before = view.changes()
    with pytest.raises(Exception, match="oversized: a CampaignHead") as caught:
        admit(view, refusal, told.ledger.now_ms, told.ledger.committee)
    assert caught.type.__name__ == "Rejected"
    assert view.changes() == before
    assert view.find(key, CampaignHead) == huge


def test_changes_are_kept_or_forgotten_together() -> None:
    told = opened()
    view = StateView(told.ledger.state)
    small = PolicyHead(ZERO_DIGEST, 1, 1)
    view.put(POLICY_HEAD_KEY, small)
    assert view.find(POLICY_HEAD_KEY, PolicyHead) == small
    view.discard()
    assert view.changes() == {}
    found = view.find(POLICY_HEAD_KEY, PolicyHead)
    assert found is not None
    assert found.policy == told.run.policy_id
    view.put(POLICY_HEAD_KEY, small)
    view.commit()
    assert view.changes() == {POLICY_HEAD_KEY: encode(small)}


def test_state_value_of_another_kind_is_refused() -> None:
    assert_malformed(lambda: read_record(b"\x93\x01\x02\x03", CampaignRecord), Reason.BAD_PROOF)
    assert_malformed(lambda: read_record(b"", CampaignRecord), Reason.BAD_PROOF)


def test_campaign_record_keeps_what_later_events_are_judged_by() -> None:
    told = opened()
    value = told.ledger.state.get(CAMPAIGN_TABLE + told.run.id)
    assert value is not None
    record = read_record(value, CampaignRecord)
    assert (record.blocks, record.manifest) == (BLOCKS, told.run.manifest)
    assert (record.routing_granularity, record.event_granularity) == ("block", "batch")


def test_reasons_that_may_pass_later_are_those_of_things_still_on_their_way() -> None:
    assert Reason.SEQUENCE_GAP in RETRYABLE
    assert not RETRYABLE & {Reason.DUPLICATE, Reason.BAD_SIGNATURE, Reason.POLICY_NOT_IN_FORCE, Reason.CAMPAIGN_CLOSED}


def test_event_with_the_commitments_of_another_is_refused() -> None:
    told = opened()
    grant = told.run.grant([told.books], 1, 4)
    with pytest.raises(Exception, match="portion-mismatch"):
        told.ledger.check(grant.entry, told.run.grant([told.records], 1, 4).portions)
    assert remade(told.run, grant)
