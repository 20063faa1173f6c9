"""What a policy means, rule by rule."""

import msgspec
import pytest
from ledger_fixtures import digest

from consensus import portions as p
from consensus.identifiers import Digest
from consensus.policy import (
    check_grant_terms,
    check_policy,
    check_profile,
    class_rule,
    maximum_profile,
    why_refused,
)
from consensus.rejection import Reason, Rejected

POLICY = p.Policy(
    name="p",
    licences=("CC0-1.0",),
    purposes=("research",),
    classes=(p.ClassRule("medical", 500, (p.BlockWeight("embedding", 0),)), p.ClassRule("text", 1_000, ())),
    memorization_threshold_permille=800,
    routing_granularities=("block",),
    event_granularities=("batch",),
    author_schemes=("ed25519", "ml-dsa-65"),
    required_metadata=("code.commit",),
    least_sketch_rank=0,
    auditors=(),
    custody=(),
    maximum_grant_steps=10,
    maximum_grant_duration_ms=1_000,
    global_clipping=False,
    revocation="drain",
    momentum="carry",
    rationale="",
)
CLAIM = p.SourceClaim("s", digest("c"), 8, 8, "CC0-1.0", "own", ("research",), "text", 100, 200, "", b"")
BLOCKS = ("embedding", "layer.0")


def why(claim: dict[str, object], revoked: bool = False, from_ms: int = 100, until_ms: int = 199) -> Reason | None:
    return why_refused(POLICY, msgspec.structs.replace(CLAIM, **claim), revoked, "research", from_ms, until_ms)


def test_policy_with_known_words_passes() -> None:
    check_policy(POLICY)


def test_admissible_source_is_not_refused() -> None:
    assert why({}) is None


@pytest.mark.parametrize(
    ("claim", "window", "reason"),
    [
        ({}, (99, 199), Reason.SOURCE_NOT_YET_VALID),
        ({}, (100, 200), Reason.SOURCE_EXPIRED),
        ({"licence": "CC-BY-4.0"}, (100, 199), Reason.LICENCE_NOT_ADMITTED),
        ({"purposes": ("sale",)}, (100, 199), Reason.PURPOSE_NOT_ADMITTED),
        ({"content_class": "poison"}, (100, 199), Reason.CLASS_NOT_ADMITTED),
    ],
)
def test_source_is_refused_for_the_rule_it_breaks(
    claim: dict[str, object], window: tuple[int, int], reason: Reason
) -> None:
    assert why(claim, from_ms=window[0], until_ms=window[1]) == reason
    assert why(claim, revoked=True, from_ms=window[0], until_ms=window[1]) == Reason.SOURCE_REVOKED


def test_purpose_must_be_the_sources_and_the_policys() -> None:
    claim = msgspec.structs.replace(CLAIM, purposes=("research", "sale"))
    assert why_refused(POLICY, claim, False, "sale", 100, 199) == Reason.PURPOSE_NOT_ADMITTED
    wider = msgspec.structs.replace(POLICY, purposes=("research", "sale"))
    assert why_refused(wider, CLAIM, False, "sale", 100, 199) == Reason.PURPOSE_NOT_ADMITTED
    assert why_refused(wider, claim, False, "sale", 100, 199) is None


def test_class_has_at_most_one_rule() -> None:
    assert class_rule(POLICY, "text") == POLICY.classes[1]
    assert class_rule(POLICY, "Text") is None


def test_maximum_profile_takes_the_default_but_for_named_blocks() -> None:
    assert maximum_profile(POLICY, "medical", BLOCKS).weights_permille == (0, 500)
    assert maximum_profile(POLICY, "text", BLOCKS).weights_permille == (1_000, 1_000)
    with pytest.raises(Rejected, match="class-not-admitted"):
        maximum_profile(POLICY, "poison", BLOCKS)


def test_profile_up_to_the_maximum_passes_and_above_is_refused() -> None:
    check_profile(POLICY, p.ClassProfile("medical", (0, 500)), BLOCKS)
    check_profile(POLICY, p.ClassProfile("medical", (0, 0)), BLOCKS)
    for weights, reason in (((1, 500), "depth-above"), ((0, 501), "depth-above"), ((0,), "bad-field")):
        with pytest.raises(Rejected, match=reason):
            check_profile(POLICY, p.ClassProfile("medical", weights), BLOCKS)
    with pytest.raises(Rejected, match="class-not-admitted"):
        check_profile(POLICY, p.ClassProfile("poison", (0, 0)), BLOCKS)


@pytest.mark.parametrize(
    ("first", "last", "closes_ms", "reason"),
    [
        (1, 11, 1_500, "grant-exceeds-policy"),
        (2, 1, 1_500, "grant-exceeds-policy"),
        (1, 10, 1_000, "grant-closed"),
        (1, 10, 2_001, "grant-exceeds-policy"),
    ],
)
def test_grant_outside_its_policys_bounds_is_refused(first: int, last: int, closes_ms: int, reason: str) -> None:
    identifier = Digest(digest("policy"))
    check_grant_terms(identifier, POLICY, p.GrantTerms(identifier, 1, 10, 2_000), 1_000)
    with pytest.raises(Rejected, match=reason):
        check_grant_terms(identifier, POLICY, p.GrantTerms(identifier, first, last, closes_ms), 1_000)
