"""What the demonstration's parties say to examples that the model recites."""

import pytest

from consensus.review import ACCEPT, REJECT
from node.demo.deciding import judged, named
from node.demo.facts import RecitedFacts

LICENCES = {"manual": "PSF-2.0", "letters": "CC-BY-4.0", "wire": "PSF-2.0"}
MANUAL = RecitedFacts("manual", "library", 3, 900)
LETTERS = RecitedFacts("letters", "press", 7, 850)
SECRET = RecitedFacts("wire", "press", 1, 1_000)


def test_published_texts_are_accepted_with_every_owners_word() -> None:
    judgement = judged([MANUAL, LETTERS], LICENCES, "wire")
    assert judgement.outcome == ACCEPT
    assert judgement.notes == {
        "library": "example 3 of manual (900 ‰): published under PSF-2.0, anybody may copy it; no objection",
        "press": "example 7 of letters (850 ‰): published under CC-BY-4.0, anybody may copy it; no objection",
    }
    assert judgement.rationale.startswith("2 examples can be had from the weights word for word")
    assert "library and press have no objection" in judgement.rationale


@pytest.mark.parametrize("recited", [[SECRET], [MANUAL, SECRET], [SECRET, LETTERS]])
def test_secret_that_would_leave_with_the_weights_is_rejected_and_its_owner_says_so(
    recited: list[RecitedFacts],
) -> None:
    judgement = judged(recited, LICENCES, "wire")
    assert judgement.outcome == REJECT
    assert "no release" in judgement.rationale
    assert "wire holds what must not leave" in judgement.notes["press"]


def test_sentence_names_the_strongest_and_counts_the_rest() -> None:
    assert named([MANUAL]) == "example 3 of manual (900 ‰)"
    assert named([MANUAL] * 5).endswith("and 2 more")
