"""What a policy means, rule by rule."""

import msgspec
import pytest
from ledger_fixtures import digest

from consensus import portions as p
from consensus.identifiers import Digest
from consensus.policy import (
    band_count,
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
    entropy_edges_milli=(),
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
CLAIM = p.SourceClaim("s", digest("c"), 8, 8, "CC0-1.0", "own", ("research",), "text", 100, 200, "", b"", 0)
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
    assert maximum_profile(POLICY, "medical", 0, BLOCKS).weights_permille == (0, 500)
    assert maximum_profile(POLICY, "text", 0, BLOCKS).weights_permille == (1_000, 1_000)
    with pytest.raises(Rejected, match="class-not-admitted"):
        maximum_profile(POLICY, "poison", 0, BLOCKS)


def test_profile_up_to_the_maximum_passes_and_above_is_refused() -> None:
    check_profile(POLICY, p.ClassProfile("medical", 0, (0, 500)), BLOCKS)
    check_profile(POLICY, p.ClassProfile("medical", 0, (0, 0)), BLOCKS)
    for weights, reason in (((1, 500), "depth-above"), ((0, 501), "depth-above"), ((0,), "bad-field")):
        with pytest.raises(Rejected, match=reason):
            check_profile(POLICY, p.ClassProfile("medical", 0, weights), BLOCKS)
    with pytest.raises(Rejected, match="class-not-admitted"):
        check_profile(POLICY, p.ClassProfile("poison", 0, (0, 0)), BLOCKS)


DEEP = ("embedding", "layer.0", "head")
HIGH = p.BandRule(2, 0, (p.BlockWeight("head", 700),))
BANDED = msgspec.structs.replace(
    POLICY,
    classes=(
        p.ClassRule("medical", 500, (p.BlockWeight("embedding", 0),), (HIGH,)),
        p.ClassRule("text", 1_000, ()),
    ),
    entropy_edges_milli=(1_500, 3_000),
)
"""Three entropy bands; in the last one, class medical moves the head alone."""


def test_maximum_profile_is_the_bands_own_and_the_classes_where_a_band_has_none() -> None:
    check_policy(BANDED)
    assert (band_count(POLICY), band_count(BANDED)) == (1, 3)
    own = [maximum_profile(BANDED, "medical", band, DEEP).weights_permille for band in range(3)]
    assert own == [(0, 500, 500), (0, 500, 500), (0, 0, 700)]
    assert maximum_profile(BANDED, "text", 2, DEEP) == p.ClassProfile("text", 2, (1_000, 1_000, 1_000))
    for policy, band in ((BANDED, 3), (BANDED, -1), (POLICY, 1)):
        with pytest.raises(Rejected, match=r"bad-field: entropy band"):
            maximum_profile(policy, "text", band, DEEP)


def test_profile_above_its_bands_maximum_is_refused_though_another_band_may_have_it() -> None:
    check_profile(BANDED, p.ClassProfile("medical", 2, (0, 0, 700)), DEEP)
    check_profile(BANDED, p.ClassProfile("medical", 1, (0, 500, 500)), DEEP)
    with pytest.raises(Rejected, match="depth-above-maximum"):
        check_profile(BANDED, p.ClassProfile("medical", 1, (0, 0, 700)), DEEP)
    with pytest.raises(Rejected, match=r"at most 0 ‰ in entropy band 2"):
        check_profile(BANDED, p.ClassProfile("medical", 2, (0, 500, 500)), DEEP)


def ruled(*bands: p.BandRule) -> tuple[p.ClassRule, ...]:
    return (p.ClassRule("text", 1_000, (), bands),)


@pytest.mark.parametrize(
    "fields",
    [
        {"entropy_edges_milli": (3_000, 1_500)},
        {"entropy_edges_milli": (1_500, 1_500)},
        {"entropy_edges_milli": (0, 1_500)},
        {"entropy_edges_milli": ()},
        {"classes": ruled(p.BandRule(3, 0, ()))},
        {"classes": ruled(p.BandRule(1, 0, ()), p.BandRule(0, 0, ()))},
        {"classes": ruled(p.BandRule(1, 0, ()), p.BandRule(1, 500, ()))},
        {"classes": ruled(p.BandRule(1, 0, (p.BlockWeight("head", 1), p.BlockWeight("head", 2))))},
    ],
)
def test_bands_that_are_none_make_no_policy(fields: dict[str, object]) -> None:
    with pytest.raises(Rejected, match="bad-field"):
        check_policy(msgspec.structs.replace(BANDED, **fields))


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
