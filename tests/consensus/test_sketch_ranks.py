"""At which rank a campaign sketches each tensor, by its own words on the log."""

import pytest

from consensus import portions as p
from consensus.rejection import Reason, Rejected
from consensus.sketch_ranks import sketch_ranks


def campaign(rank: int, **settings: str) -> p.Campaign:
    """Two parameter blocks, ``lower`` and ``upper``, the lower one of two tensors."""
    tensors = {name: p.Tensor(name, "F32", (4, 4)) for name in ("first", "second", "third")}
    return p.Campaign(
        name="campaign",
        purpose="research",
        policy=bytes(32),
        job_key=bytes(32),
        base_model="tiny",
        base_root=bytes(32),
        base_provenance=b"",
        parameter_blocks=(
            p.ParameterBlock("lower", (tensors["first"], tensors["second"])),
            p.ParameterBlock("upper", (tensors["third"],)),
        ),
        routing_granularity="block",
        event_granularity="batch",
        sampler_seed=bytes(32),
        batch_size=1,
        planned_steps=1,
        hyperparameters=tuple(p.Setting(name.replace("__", "."), value) for name, value in sorted(settings.items())),
        environment=(),
        factors_digest=b"",
        accumulator_window_steps=1,
        sketch_rank=rank,
        base_losses_sha256=b"",
    )


def test_block_has_the_rank_that_is_said_of_it_and_others_the_campaigns() -> None:
    found = sketch_ranks(campaign(6, optimizer="AdamW", sketch_rank__lower="16"))
    assert found == {"first": 16, "second": 16, "third": 6}


def test_rank_below_the_campaigns_does_not_count() -> None:
    assert sketch_ranks(campaign(6, sketch_rank__upper="1")) == {"first": 6, "second": 6, "third": 6}


def test_rank_of_a_block_that_there_is_not_says_nothing() -> None:
    assert sketch_ranks(campaign(6, sketch_rank__side="9")) == {"first": 6, "second": 6, "third": 6}


def test_campaign_without_sketches_has_no_ranks() -> None:
    assert sketch_ranks(campaign(0, sketch_rank__lower="16")) == {}


@pytest.mark.parametrize("value", ["", "0", "06", "-1", "65", "100", "6.5", "six", "٦", "6\n"])
def test_what_is_no_rank_is_refused(value: str) -> None:
    with pytest.raises(Rejected) as refusal:
        sketch_ranks(campaign(6, sketch_rank__lower=value))
    assert refusal.value.reason is Reason.BAD_FIELD
