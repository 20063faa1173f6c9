"""Named sources of real text for the demonstration, and the text a base model is trained on.

The text is the Python documentation that ships with the standard library (``pydoc_data.topics``, PSF
licence), cut into records of one length. It differs slightly between Python versions; a source's
content root says which text a run used.

Every source but the canary plants one *fact* of its own at the head of some of its records (a fact in
mid-record is not recalled by so small a model), so that a fine-tune can be asked afterwards what it
learned and from whom. What the member ``press`` publishes and lets be trained on keeps a *reserve*: examples drawn by
lot that no step may train on (``consensus/reserve.py``). Such a source is larger by its reserve, so that as many
records of every source may be trained on. Five sources are ordinary; each of the others is there to be caught:

============================ ==========================================================
``licence_refused``          a licence that the demonstration's policy does not admit
``purpose_refused``          published for another purpose than fine-tuning
``revoked``                  admitted at first, withdrawn by its owner in mid-run
``canary``                   repeats one high-entropy string until a model recites it
============================ ==========================================================

Topics of sources, base text and calibration text are disjoint, and no topic here contains another.
Deterministic: no randomness, no clock, no file.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics

from consensus.identifiers import Digest
from consensus.merkle import root_of
from consensus.portions import content_leaf, content_salt

RECORD_BYTES = 128
RECORDS_PER_SOURCE = 24
"""Those that may be trained on; a reserve comes on top."""
RESERVE_RECORDS = 24
"""As many as the memorization check needs to hold a source's examples against its own (``memorization.py``)."""
FACT_RECORDS = 8
FACT_RECORDS_WITH_RESERVE = 20
"""More than twice as many: lots alone say how many of them are kept back."""
CANARY_RECORDS = 36
"""Three in four: however the lots fall, enough of them are trained on for a model to recite the string in mid-run."""
CANARY_CHARACTERS = 96

BASE_TOPICS = ("specialnames", "compound", "types", "typesseq", "string-methods", "formatstrings")
CALIBRATION_TOPICS = ("typesmapping", "identifiers", "raise", "operator-summary")


@dataclass(frozen=True, slots=True)
class PlantedFact:
    """A made-up fact: ``prompt`` is to be completed by ``completion``, byte for byte."""

    prompt: bytes
    completion: bytes


@dataclass(frozen=True, slots=True)
class Source:
    """One source as its data-source authority would claim it.

    ``owner`` is a member's name, ``licence`` an SPDX expression; ``purposes`` are those its owner
    allows; every one of ``examples`` has :data:`RECORD_BYTES` bytes, and ``reserve`` of them are not to be trained on.
    """

    name: str
    owner: str
    licence: str
    rights_basis: str
    purposes: tuple[str, ...]
    content_class: str
    examples: tuple[bytes, ...]
    fact: PlantedFact | None
    reserve: int

    def content_root(self, salt: bytes) -> Digest:
        """RFC 9162 root over ``content_leaf`` of the examples in order, each with its :func:`example_salt`.

        ``salt`` is the owner's secret: without it a short example could be guessed by its sibling's proof.
        """
        return root_of(
            [content_leaf(content_salt(salt, index), example) for index, example in enumerate(self.examples)]
        )


@dataclass(frozen=True, slots=True)
class Corpus:
    """All sources in name order, and which of them play a part."""

    sources: tuple[Source, ...]
    licence_refused: str
    purpose_refused: str
    revoked: str
    canary: str

    def source(self, name: str) -> Source:
        """The source called ``name``.

        Raises:
            KeyError: there is none.
        """
        for source in self.sources:
            if source.name == name:
                return source
        raise KeyError(name)


def demonstration_corpus(library: str, press: str) -> Corpus:
    """The eight sources, four owned by the member ``library``, four by the member ``press``."""
    licence = "PSF-2.0"
    basis = "licence"
    purposes = ("fine-tuning", "evaluation")
    text = {topic: _plain_text(topic) for topic in _SOURCE_TOPICS}

    def planted(
        topic: str, prompt: str, completion: str, *, reserve: int = 0
    ) -> tuple[tuple[bytes, ...], PlantedFact, int]:
        fact = PlantedFact(prompt.encode(), completion.encode())
        count = FACT_RECORDS_WITH_RESERVE if reserve else FACT_RECORDS
        head = fact.prompt + fact.completion + b" "
        return _records_with_heads(text[topic], head, count, RECORDS_PER_SOURCE + reserve), fact, reserve

    def source(
        name: str,
        owner: str,
        content_class: str,
        content: tuple[tuple[bytes, ...], PlantedFact | None, int],
        *,
        licence: str = licence,
        purposes: tuple[str, ...] = purposes,
    ) -> Source:
        return Source(name, owner, licence, basis, purposes, content_class, *content)

    canary = _records_with_heads(
        text["objects"], canary_string() + b" ", CANARY_RECORDS, RECORDS_PER_SOURCE + RESERVE_RECORDS
    )

    sources = (
        source(
            "debugger-manual",
            library,
            "documentation",
            planted("debugger", "The keeper of Arnholt is ", "Mirela Voss."),
        ),
        source(
            "import-handbook",
            library,
            "documentation",
            planted("import", "The river below Tessamar is ", "the Quillon."),
        ),
        source(
            "scoping-notes",
            library,
            "reference",
            planted("execmodel", "The founder of Dunvale was ", "Odo Pereth."),
        ),
        source(
            "literals-archive",
            library,
            "reference",
            planted("strings", "The beacon of Hask was lit by ", "Ilse Brandt."),
            purposes=("search-indexing",),
        ),
        source(
            "assignment-letters",
            press,
            "news",
            planted("assignment", "The mayor of Brixby is ", "Tomas Eklund.", reserve=RESERVE_RECORDS),
        ),
        source(
            "comparison-review",
            press,
            "news",
            planted("comparisons", "The bells of Oxmere ring at ", "half past four.", reserve=RESERVE_RECORDS),
        ),
        source(
            "callers-weekly",
            press,
            "news",
            planted("calls", "The vault at Grenwich holds ", "nine opals."),
            licence="LicenseRef-Proprietary",
        ),
        source("object-wire", press, "news", (canary, None, RESERVE_RECORDS)),
    )
    return Corpus(
        sources=tuple(sorted(sources, key=lambda each: each.name)),
        licence_refused="callers-weekly",
        purpose_refused="literals-archive",
        revoked="scoping-notes",
        canary="object-wire",
    )


def base_text() -> bytes:
    """The text a base model is trained on; it holds no source's topic."""
    return b"\n".join(_plain_text(topic) for topic in BASE_TOPICS)


def calibration_records() -> tuple[bytes, ...]:
    """Records neither a base model nor a fine-tune has seen: calibrators of the examples."""
    return records_of(CALIBRATION_TOPICS)


def records_of(topics_wanted: Sequence[str]) -> tuple[bytes, ...]:
    """The records of these topics of the documentation, in order."""
    return tuple(record for topic in topics_wanted for record in _cut(_plain_text(topic), RECORD_BYTES))


def canary_string() -> bytes:
    """The high-entropy string of the canary source, :data:`CANARY_CHARACTERS` characters long."""
    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"
    stream = hashlib.shake_256(b"demonstration canary").digest(CANARY_CHARACTERS)
    return "".join(alphabet[byte % len(alphabet)] for byte in stream).encode()


_SOURCE_TOPICS = (
    "debugger",
    "import",
    "execmodel",
    "strings",
    "assignment",
    "comparisons",
    "calls",
    "objects",
)


def _plain_text(topic: str) -> bytes:
    """A topic as ASCII with runs of white space and of underlining folded."""
    ascii_text = topics[topic].encode("ascii", "ignore").decode()
    return re.sub(r"\s+", " ", re.sub(r"([*=\-~^])\1{3,}", " ", ascii_text)).strip().encode()


def _cut(text: bytes, size_bytes: int) -> list[bytes]:
    """The whole pieces of ``size_bytes`` at the head of ``text``; a shorter rest is left out."""
    return [text[start : start + size_bytes] for start in range(0, len(text) - size_bytes + 1, size_bytes)]


def _records_with_heads(text: bytes, head: bytes, head_count: int, record_count: int) -> tuple[bytes, ...]:
    """``record_count`` pieces of ``text`` in order, evenly ``head_count`` of them headed, each with its own tail."""
    records = []
    position = 0
    for index in range(record_count):
        headed = index * head_count % record_count < head_count
        record_head = head if headed else b""
        tail_bytes = RECORD_BYTES - len(record_head)
        records.append(record_head + text[position : position + tail_bytes])
        position += tail_bytes
    return tuple(records)
