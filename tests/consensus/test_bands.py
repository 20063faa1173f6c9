"""Entropy bands: which band a loss is of, what makes a policy's bands, and what a step may state of them."""

import pytest
from ledger_fixtures import BLOCKS, CampaignRun, Story, digest
from rules_fixtures import assert_admitted, assert_refused, granted, opened, remake, tell

from consensus import portions as p
from consensus.bands import LARGEST_LOSS_MILLI, UNMEASURED, band_of, decode_losses, encode_losses
from consensus.bundle import open_bundle
from consensus.epochs import anchor
from consensus.event import CheckedEvent
from consensus.predicates import Answer, Predicate, Status, verify
from consensus.rejection import Reason, Rejected
from node.bundles import export_bundle

EDGES = (1_500, 3_000)
HIGH = p.BandRule(2, 0, (p.BlockWeight(BLOCKS[-1], 700),))
"""The last band moves the last parameter block alone."""

CLASSES = (
    p.ClassRule("medical", 500, (p.BlockWeight(BLOCKS[0], 0),), (HIGH,)),
    p.ClassRule("text", 1_000, ()),
)
MOST = {"medical": ((0, 500, 500), (0, 500, 500), (0, 0, 700)), "text": ((1_000, 1_000, 1_000),) * 3}
"""What that comes to: class to bands to weights over the parameter blocks."""


@pytest.mark.parametrize(
    ("loss_milli", "band"), [(0, 0), (1_499, 0), (1_500, 1), (2_999, 1), (3_000, 2), (LARGEST_LOSS_MILLI, 2)]
)
def test_an_edge_is_the_first_loss_of_the_band_above_it(loss_milli: int, band: int) -> None:
    assert band_of(loss_milli, EDGES) == band


def test_without_edges_everything_is_of_one_band_and_with_them_the_unmeasured_of_none() -> None:
    assert band_of(UNMEASURED, ()) == band_of(0, ()) == 0
    with pytest.raises(Rejected, match="base-losses-missing"):
        band_of(UNMEASURED, EDGES)


def test_file_of_losses_is_four_bytes_an_example_and_of_no_other_size() -> None:
    losses = (0, 1_500, LARGEST_LOSS_MILLI, UNMEASURED)
    encoded = encode_losses(losses)
    assert encoded.hex() == "00000000000005dcfffffffeffffffff"
    assert decode_losses(encoded, 4) == losses
    for spoiled in (encoded[:-1], encoded + b"\x00", encoded[:-4], b""):
        with pytest.raises(Rejected, match="malformed"):
            decode_losses(spoiled, 4)


def campaign(told: Story, base_losses_sha256: bytes, *sources: bytes, batch_size: int = 4) -> CampaignRun:
    manifest = tuple(p.ManifestRange(source, 0, 8) for source in sorted(sources))
    return CampaignRun(told.ledger, manifest, "banded", batch_size, base_losses_sha256=base_losses_sha256)


def under_bands() -> Story:
    """An open campaign, and a policy with bands in force since."""
    told = opened()
    told.ledger.seal(told.ledger.policy(classes=CLASSES, entropy_edges_milli=EDGES))
    return told


def banded(told: Story, *sources: bytes, batch_size: int = 4) -> CampaignRun:
    """A campaign over these sources that committed to base losses, everything granted."""
    run = campaign(told, digest("losses"), *sources, batch_size=batch_size)
    told.ledger.seal(*run.open())
    told.ledger.seal(run.grant(sources, 1, 100))
    return run


def test_campaign_without_base_losses_is_refused_under_a_policy_with_bands() -> None:
    told = under_bands()
    delegation, opening = campaign(told, b"", told.books).open()
    assert_refused(told.ledger, opening, Reason.BASE_LOSSES_MISSING, before=[delegation])
    assert_admitted(told.ledger, campaign(told, digest("losses"), told.books).open()[1], before=[delegation])


def test_campaign_that_committed_to_no_losses_gets_no_grant_once_a_policy_has_bands() -> None:
    told = under_bands()
    assert_refused(told.ledger, told.run.grant([told.books], 1, 4), Reason.BASE_LOSSES_MISSING)


def profiles(*stated: tuple[str, int]) -> tuple[p.ClassProfile, ...]:
    return tuple(p.ClassProfile(name, band, MOST[name][band]) for name, band in stated)


def with_profiles(run: CampaignRun, step: CheckedEvent, stated: tuple[p.ClassProfile, ...]) -> CheckedEvent:
    return remake(run, step, governance=tell(step.governance, profiles=stated))


def test_step_states_each_band_of_each_admitted_class_once_and_in_order() -> None:
    told = under_bands()
    run = banded(told, told.books, told.records, batch_size=12)
    (step,) = run.step()
    for good in (
        [("medical", 0), ("text", 0)],
        [("medical", 1), ("medical", 2), ("text", 0), ("text", 1), ("text", 2)],
    ):
        assert_admitted(told.ledger, with_profiles(run, step, profiles(*good)))
    for wrong in (
        [("medical", 0), ("medical", 1)],
        [("medical", 2), ("medical", 1), ("text", 0)],
        [("medical", 1), ("medical", 1), ("text", 0)],
        [("text", 0), ("medical", 0)],
    ):
        assert_refused(told.ledger, with_profiles(run, step, profiles(*wrong)), Reason.BAD_FIELD)
    beyond = (*profiles(("medical", 0)), p.ClassProfile("text", 3, (0, 0, 0)))
    assert_refused(told.ledger, with_profiles(run, step, beyond), Reason.BAD_FIELD)


def test_step_that_states_more_bands_than_it_has_examples_is_refused() -> None:
    told = under_bands()
    run = banded(told, told.books, batch_size=2)
    (step,) = run.step()
    assert_admitted(told.ledger, with_profiles(run, step, profiles(("text", 0), ("text", 2))))
    three = profiles(("text", 0), ("text", 1), ("text", 2))
    assert_refused(told.ledger, with_profiles(run, step, three), Reason.BAD_FIELD)


def test_profile_of_another_band_is_no_excuse_for_depth_above_the_maximum() -> None:
    told = under_bands()
    run = banded(told, told.records)
    (step,) = run.step()
    deep = p.ClassProfile("medical", 2, MOST["medical"][1])
    assert_refused(told.ledger, with_profiles(run, step, (deep,)), Reason.DEPTH_ABOVE_MAXIMUM)


def test_block_that_only_other_bands_may_move_must_not_have_moved() -> None:
    """The middle block moved, and the step says that all its examples are of the last band, which may not move it."""
    told = under_bands()
    run = banded(told, told.records)
    (step,) = run.step()
    assert_refused(told.ledger, with_profiles(run, step, profiles(("medical", 2))), Reason.DEPTH_ABOVE_MAXIMUM)
    assert_admitted(told.ledger, with_profiles(run, step, profiles(("medical", 1), ("medical", 2))))


def test_verdict_says_who_attests_the_bands() -> None:
    told = under_bands()
    run = banded(told, told.books)
    told.ledger.seal(*run.step())
    for of, is_banded in ((run, True), (granted().run, False)):
        pinned = anchor(of.ledger.genesis, of.ledger.chain_id)
        bundle = export_bundle(of.ledger, Predicate.POLICY_IN_FORCE, campaign=of.id)
        verdict = verify(open_bundle(pinned, bundle), Predicate.POLICY_IN_FORCE)
        assert verdict.answer is Answer.YES
        attested = [step.text for step in verdict.steps if step.status is Status.ATTESTED]
        assert any("which entropy band" in text for text in attested) == is_banded
