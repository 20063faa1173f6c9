"""Portions: the three parts of an event, what each kind puts in them, and their salted commitments.

An event's *leaf entry* on the log is small; what it says stands in up to three *portions*, one for each
role that answers for it. The entry holds a commitment to each portion, so members check everything and
outsiders see only what a bundle discloses:

* governance and operation portions: SHA-256 over tag, kind, role, a 32-byte salt and the content;
* data portion: an RFC 9162 tree over its items, one per source, each leaf salted on its own, and below
  an item that names examples another tree over pages of commitments with a salt per example. Disclosing one
  source's item (or one example of it) reveals nothing of any other.

An *example* is named by its source and its index in the tree under the source's content root; no digest
of an example ever stands on the log. All quantities are integers with their unit in the name; weights
and signals are permille (0 to 1000).
"""

import hashlib
import struct
from collections.abc import Iterator
from functools import lru_cache
from hashlib import sha256
from operator import itemgetter, lt
from typing import Annotated

from msgspec import Meta, Struct

from consensus.bands import LARGEST_LOSS_MILLI, MAX_BANDS
from consensus.codec import decode, encode
from consensus.identifiers import Digest, Role, Tag, tagged_hash, tagged_prefix
from consensus.keys import SignatureScheme
from consensus.merkle import leaf_hash, root_of
from consensus.rejection import Reason, Rejected

Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
OptionalBytes32 = Annotated[bytes, Meta(max_length=32)]
Natural = Annotated[int, Meta(ge=0, le=2**53 - 1)]
Permille = Annotated[int, Meta(ge=0, le=1_000)]
MAX_SKETCH_RANK = 64
SketchRank = Annotated[int, Meta(ge=0, le=MAX_SKETCH_RANK)]
LossMilli = Annotated[int, Meta(ge=0, le=LARGEST_LOSS_MILLI)]
Band = Annotated[int, Meta(ge=0, le=MAX_BANDS - 1)]
Name = Annotated[str, Meta(min_length=1, max_length=128)]
Text = Annotated[str, Meta(max_length=8_192)]

NANO = 1_000_000_000
"""One, in the billionths that a factor is written in."""
MAX_ITEMS = 4_096
MAX_EXAMPLES = 65_536
MAX_EVENT_EXAMPLES = 4_096
"""Examples one event may list, over all its items: as many as a campaign may present to a step."""

PAGE_EXAMPLES = 16
"""Commitments to a page of an item's example tree. Every member hashes every list: pages spare most of the nodes."""

MAX_BLOCKS = 4_096
MAX_TENSORS = 65_536
MAX_PORTIONS_BYTES = 4 * 1024 * 1024


def _require_whole(*digests: bytes) -> None:
    """Optional digests are 32 bytes or none; what a length bound cannot say. Decoding makes it ``MALFORMED``."""
    for digest in digests:
        if len(digest) not in (0, 32):
            raise ValueError(f"a digest of {len(digest)} bytes, expected 32 or none")


class Wire(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of every portion's structs: encoded as a MessagePack array, unknown fields refused."""


class Count(Wire, frozen=True):
    """How often one reason applied."""

    reason: Name
    count: Annotated[int, Meta(ge=1, le=2**53 - 1)]


Counts = Annotated[tuple[Count, ...], Meta(max_length=64)]


# Data portion: one item per source.


class SourceClaim(Wire, frozen=True):
    """What a data-source authority claims about one source. It proves who claimed, not who owns.

    ``content_root`` is the RFC 9162 root over the source's examples (``content_leaf``), ``licence`` an
    SPDX identifier, the window Unix milliseconds (``valid_until_ms`` exclusive). ``overlap_sha256`` is that of the
    overlap index of the same examples (``overlap.py``), or empty. ``reserve_below`` says which of them are never to be
    trained on (``reserve.py``); 0: none.
    """

    name: Name
    content_root: Bytes32
    example_count: Annotated[int, Meta(ge=1, le=2**53 - 1)]
    size_bytes: Natural
    licence: Name
    rights_basis: Name
    purposes: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=64)]
    content_class: Name
    valid_from_ms: Natural
    valid_until_ms: Natural
    statement: Text
    overlap_sha256: OptionalBytes32
    reserve_below: Natural

    def __post_init__(self) -> None:
        _require_whole(self.overlap_sha256)


class SourceRevocation(Wire, frozen=True):
    """The author takes one source back; what that does to open grants is the policy's to say."""

    source: Bytes32
    reason: Text


class ManifestRange(Wire, frozen=True):
    """Examples ``first`` to ``first + count - 1`` of a source, presented to a campaign in this order."""

    source: Bytes32
    first: Natural
    count: Annotated[int, Meta(ge=1, le=2**53 - 1)]


class GrantedSource(Wire, frozen=True):
    """One source a grant admits."""

    source: Bytes32


class SourceUse(Wire, frozen=True):
    """One source's part in a step; ``presented == admitted + sum(refused)``.

    ``examples_root`` commits to the admitted examples; members hold the list beside the item.
    """

    source: Bytes32
    content_class: Name
    presented: Annotated[int, Meta(ge=1, le=MAX_EXAMPLES)]
    admitted: Annotated[int, Meta(ge=0, le=MAX_EXAMPLES)]
    refused: Counts
    examples_root: Bytes32


class SourceRefusal(Wire, frozen=True):
    """Examples of one source kept from a step for one reason; ``examples_root`` commits to them."""

    source: Bytes32
    reason: Name
    count: Annotated[int, Meta(ge=1, le=MAX_EXAMPLES)]
    examples_root: Bytes32


# Governance portion.


class BlockWeight(Wire, frozen=True):
    """A weight for one named parameter block."""

    block: Name
    weight_permille: Permille


BlockWeights = Annotated[tuple[BlockWeight, ...], Meta(max_length=MAX_BLOCKS)]


class BandRule(Wire, frozen=True):
    """As ``ClassRule``, for the class's examples of one entropy band (``bands.py``), counted from 0."""

    band: Band
    default_weight_permille: Permille
    blocks: BlockWeights


class ClassRule(Wire, frozen=True):
    """How deeply a content class may move the parameters: a default and exceptions by block name.

    ``bands`` are the entropy bands with a rule of their own; the class's rule is that of every other one.
    """

    content_class: Name
    default_weight_permille: Permille
    blocks: BlockWeights
    bands: Annotated[tuple[BandRule, ...], Meta(max_length=MAX_BANDS)] = ()


class Policy(Wire, frozen=True):
    """A signed governance artifact; ``policy.py`` evaluates it.

    ``entropy_edges_milli`` are what divides examples into entropy bands (``bands.py``), empty for one band of all;
    ``required_metadata`` names facts that a campaign should record (hyperparameters, captured environment);
    ``least_sketch_rank`` is how finely a campaign must sketch its gradients example by example, 0 where it need not;
    ``author_schemes`` are the signature schemes (``SignatureScheme.label``) that may sign a policy and what runs under
    it; ``auditors`` are the members, none of them an operator, that alone may audit by lot, where there are any;
    ``custody`` are the roles of which a member must hold a campaign's accumulators before its release;
    ``global_clipping`` says whether a step may scale the gradients of all parameter blocks by one factor;
    ``revocation`` is ``drain`` (open grants run out) or ``void`` (they close at once); ``momentum`` what becomes of a
    revoked source's gradients in the optimizer's state: ``carry`` (they fade) or ``flush`` (that state is dropped).
    """

    name: Name
    licences: Annotated[tuple[Name, ...], Meta(max_length=256)]
    purposes: Annotated[tuple[Name, ...], Meta(max_length=64)]
    classes: Annotated[tuple[ClassRule, ...], Meta(max_length=256)]
    entropy_edges_milli: Annotated[tuple[LossMilli, ...], Meta(max_length=MAX_BANDS - 1)]
    memorization_threshold_permille: Permille
    routing_granularities: Annotated[tuple[Name, ...], Meta(max_length=8)]
    event_granularities: Annotated[tuple[Name, ...], Meta(max_length=8)]
    author_schemes: Annotated[tuple[Name, ...], Meta(max_length=8)]
    required_metadata: Annotated[tuple[Name, ...], Meta(max_length=256)]
    least_sketch_rank: SketchRank
    auditors: Annotated[tuple[Bytes32, ...], Meta(max_length=64)]
    custody: Annotated[tuple[Name, ...], Meta(max_length=8)]
    maximum_grant_steps: Annotated[int, Meta(ge=1, le=2**53 - 1)]
    maximum_grant_duration_ms: Annotated[int, Meta(ge=1, le=2**53 - 1)]
    global_clipping: bool
    revocation: Name
    momentum: Name
    rationale: Text


class Custody(Wire, frozen=True):
    """The author holds the files of every window of accumulators that stands in the campaign up to ``last_event``."""

    last_event: Bytes32


class GrantTerms(Wire, frozen=True):
    """What a grant permits: steps ``first_step`` to ``last_step``, on the log by ``closes_at_ms``."""

    policy: Bytes32
    first_step: Annotated[int, Meta(ge=1, le=2**53 - 1)]
    last_step: Annotated[int, Meta(ge=1, le=2**53 - 1)]
    closes_at_ms: Natural


class ClassProfile(Wire, frozen=True):
    """The depth profile applied to a content class's examples of one entropy band: a weight per parameter block, in
    table order."""

    content_class: Name
    band: Band
    weights_permille: Annotated[tuple[Permille, ...], Meta(min_length=1, max_length=MAX_BLOCKS)]


class StepGovernance(Wire, frozen=True):
    """Under which grant and policy a step ran, the profiles it applied, and its totals.

    ``index`` repeats the operation portion's, so that a step can be placed in its grant without opening that
    portion, which may name other owners' sources.

    What ties parameter blocks together, so that an example kept out of one bears on it by what it does in another:
    ``global_clip_nano`` is the factor by which the gradients of all blocks were scaled, in billionths, 0 where each was
    clipped on its own; ``skipped`` a step that nothing came of, since a gradient overflowed under loss scaling.
    """

    grant: Bytes32
    policy: Bytes32
    index: Annotated[int, Meta(ge=1, le=2**53 - 1)]
    profiles: Annotated[tuple[ClassProfile, ...], Meta(max_length=MAX_EVENT_EXAMPLES)]
    presented: Natural
    admitted: Natural
    refused: Counts
    global_clip_nano: Annotated[int, Meta(ge=0, le=NANO)]
    skipped: bool


class RefusalGovernance(Wire, frozen=True):
    """Under which grant and policy examples were refused, with exact counts by reason."""

    grant: Bytes32
    policy: Bytes32
    refused: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=64)]


class RollbackGovernance(Wire, frozen=True):
    """The policy a discarded step would have broken."""

    grant: Bytes32
    policy: Bytes32


# Operation portion.


class Delegation(Wire, frozen=True):
    """The operator lets ``job_key`` (its id, as in ``job_key.py``) write one campaign for a while.

    To replace a lost or stolen key, ``replaces`` names it and ``head`` the campaign's last event exactly;
    both are empty otherwise.
    """

    campaign: Bytes32
    job_key: Bytes32
    scheme: SignatureScheme
    not_before_ms: Natural
    expires_at_ms: Natural
    replaces: OptionalBytes32
    head: OptionalBytes32

    def __post_init__(self) -> None:
        _require_whole(self.replaces, self.head)


class Tensor(Wire, frozen=True):
    """A parameter tensor: name, safetensors dtype name, shape."""

    name: Name
    dtype: Annotated[str, Meta(min_length=1, max_length=16)]
    shape: Annotated[tuple[Natural, ...], Meta(max_length=16)]


class ParameterBlock(Wire, frozen=True):
    """A named group of tensors at the campaign's routing granularity."""

    name: Name
    tensors: Annotated[tuple[Tensor, ...], Meta(min_length=1, max_length=MAX_TENSORS)]


class Setting(Wire, frozen=True):
    """A named value, as text: a hyperparameter or a fact about the environment."""

    name: Name
    value: Text


Settings = Annotated[tuple[Setting, ...], Meta(max_length=4_096)]


class Campaign(Wire, frozen=True):
    """One fine-tune, fixed before its first step.

    ``base_root`` is the base model's parameter root; ``base_provenance`` the event that released it on
    another log, or empty. The presented examples of every step follow from the manifest (data portion),
    ``sampler_seed`` and ``batch_size`` (``sampler.py``), so refusals = presented − admitted is checkable.
    For tracing: ``factors_digest`` is the SHA-256 of the Kronecker factors file, or empty;
    ``accumulator_window_steps`` how many steps a window of per-source sums holds, 0 where none are kept;
    ``sketch_rank`` the rank at which each example's gradients are kept beside them, 0 where they are not.
    ``base_losses_sha256`` is that of the file of the base model's losses (``bands.py``), or empty.
    """

    name: Name
    purpose: Name
    policy: Bytes32
    job_key: Bytes32
    base_model: Name
    base_root: Bytes32
    base_provenance: OptionalBytes32
    parameter_blocks: Annotated[tuple[ParameterBlock, ...], Meta(min_length=1, max_length=MAX_BLOCKS)]
    routing_granularity: Name
    event_granularity: Name
    sampler_seed: Bytes32
    batch_size: Annotated[int, Meta(ge=1, le=MAX_EXAMPLES)]
    planned_steps: Annotated[int, Meta(ge=1, le=2**53 - 1)]
    hyperparameters: Settings
    environment: Settings
    factors_digest: OptionalBytes32
    accumulator_window_steps: Natural
    sketch_rank: SketchRank
    base_losses_sha256: OptionalBytes32

    def __post_init__(self) -> None:
        _require_whole(self.base_provenance, self.factors_digest, self.base_losses_sha256)


class GrantOperation(Wire, frozen=True):
    """The job a grant is for."""

    job_key: Bytes32


class BlockDelta(Wire, frozen=True):
    """One parameter block's change in a step: its L2 norm in millionths, and a digest of the change."""

    norm_micro: Natural
    digest: Bytes32


class MemorizationSignal(Wire, frozen=True):
    """How strongly the model now reproduces one example, 0 to 1000."""

    source: Bytes32
    example: Natural
    signal_permille: Permille


class CarriedMomentum(Wire, frozen=True):
    """What momentum keeps of a revoked source's gradients as a step begins, at most: of each its share, in billionths.

    The share is of what the gradient weighed in the first moment when it came; 0 where no state is kept.
    """

    source: Bytes32
    residual_nano: Annotated[int, Meta(ge=0, le=10**9)]


class StepOperation(Wire, frozen=True):
    """What one optimizer step did to the parameters. Claims of the operator, chained and countable.

    ``previous`` is the campaign's last step, rollback or opening event. ``loss_micro`` and
    ``learning_rate_nano`` are millionths and billionths. ``accumulator_root`` is that of the window of per-source
    sums which this step ends (``accumulators.py``), empty in every other step. ``flushed`` are the revoked sources for
    which the optimizer's state was dropped before the step, ``carried`` those whose momentum goes on
    (``momentum_rules.py``).
    """

    index: Annotated[int, Meta(ge=1, le=2**53 - 1)]
    previous: Bytes32
    root_before: Bytes32
    root_after: Bytes32
    deltas: Annotated[tuple[BlockDelta, ...], Meta(min_length=1, max_length=MAX_BLOCKS)]
    optimizer_digest: Bytes32
    learning_rate_nano: Natural
    loss_micro: Natural
    rng_digest: Bytes32
    memorization: Annotated[tuple[MemorizationSignal, ...], Meta(max_length=MAX_EXAMPLES)]
    accumulator_root: OptionalBytes32
    flushed: Annotated[tuple[Bytes32, ...], Meta(max_length=MAX_ITEMS)]
    carried: Annotated[tuple[CarriedMomentum, ...], Meta(max_length=MAX_ITEMS)]
    step_microseconds: Natural

    def __post_init__(self) -> None:
        _require_whole(self.accumulator_root)


class RefusalOperation(Wire, frozen=True):
    """The step the examples were presented to."""

    index: Annotated[int, Meta(ge=1, le=2**53 - 1)]


class Rollback(Wire, frozen=True):
    """Steps undone. ``discarded`` names their events, newest first, whether on the log or not.

    ``restored_root`` is the parameter root the job stands at again; steps from ``next_index`` on follow
    with ``next_attempt``.
    """

    discarded: Annotated[tuple[Bytes32, ...], Meta(min_length=1, max_length=1_024)]
    reason: Name
    restored_root: Bytes32
    next_index: Annotated[int, Meta(ge=1, le=2**53 - 1)]
    next_attempt: Annotated[int, Meta(ge=1, le=2**53 - 1)]
    memorization: Annotated[tuple[MemorizationSignal, ...], Meta(max_length=MAX_EXAMPLES)]


class Abandon(Wire, frozen=True):
    """The campaign ends without a release."""

    reason: Text


class Release(Wire, frozen=True):
    """The final weights: ``parameter_root`` must be the campaign's, on the log.

    ``file_sha256`` is the SHA-256 of the released safetensors file.
    """

    parameter_root: Bytes32
    steps: Natural
    file_name: Name
    file_sha256: Bytes32


# Wire form and commitments.


class DataItem(Wire, frozen=True):
    """One source's item: its canonical content, and the examples under its ``examples_root``."""

    content: bytes
    examples: Annotated[tuple[Natural, ...], Meta(max_length=MAX_EXAMPLES)] = ()


class DataPortion(Wire, frozen=True):
    """A data portion as members hold it. Salts of items and examples derive from ``salt``."""

    salt: Bytes32
    items: Annotated[tuple[DataItem, ...], Meta(max_length=MAX_ITEMS)]


class SaltedPortion(Wire, frozen=True):
    """A governance or operation portion as members hold it."""

    salt: Bytes32
    content: bytes


class Portions(Wire, frozen=True):
    """The portions of one event; ``None`` where its kind has none."""

    data: DataPortion | None
    governance: SaltedPortion | None
    operation: SaltedPortion | None


# Hashes that every event needs: the bytes of tagged_hash, with the constant parts joined beforehand.

_EIGHT, _SALT_BYTES = (length.to_bytes(8, "big") for length in (8, 32))
"""Lengths of a number and of a salt, as ``tagged_hash`` writes them before each."""

_ITEM_SALT_START = tagged_prefix(Tag.SALT) + _SALT_BYTES
_ITEM_SALT_END = len(b"item").to_bytes(8, "big") + b"item" + _EIGHT
_ITEM_LEAF_START = tagged_prefix(Tag.SOURCE_ENTRY) + _SALT_BYTES


def item_salt(salt: bytes, item: int) -> Digest:
    """The salt of a data portion's item, ``SALT(salt, "item", item)``; reveals no other item's. 32 bytes make 32."""
    return Digest(sha256(_ITEM_SALT_START + salt + _ITEM_SALT_END + item.to_bytes(8, "big")).digest())


def examples_key(salt: bytes, item: int) -> Digest:
    """What the salts of an item's examples are drawn from; reveals no other item's."""
    return tagged_hash(Tag.SALT, salt, b"examples", item.to_bytes(8, "big"))


def example_salts(key: bytes, count: int) -> Iterator[bytes]:
    """Salts of the first examples of a list, 32 bytes each of one SHAKE-256 (FIPS 202); one reveals no other."""
    drawn = hashlib.shake_256(tagged_prefix(Tag.SALT, key)).digest(32 * count)
    return map(_ONLY, struct.iter_unpack("32s", drawn))


_ONLY = itemgetter(0)


def item_leaf(salt: bytes, content: bytes) -> Digest:
    """Leaf of a data portion's tree, ``SOURCE_ENTRY(salt, content)``: ``salt`` is the item's own, 32 bytes."""
    return Digest(sha256(_ITEM_LEAF_START + salt + len(content).to_bytes(8, "big") + content).digest())


def example_commitment(salt: bytes, example: int) -> Digest:
    """Commitment to one example of an item's list: ``salt`` is the example's own."""
    return tagged_hash(Tag.EXAMPLE, salt, example.to_bytes(8, "big"))


def content_leaf(salt: bytes, example: bytes) -> Digest:
    """Leaf of a source's content tree. ``salt`` keeps short examples from being guessed by their digest."""
    return tagged_hash(Tag.CONTENT, salt, example)


def content_salt(source_salt: bytes, index: int) -> Digest:
    """The salt of the example at ``index`` of a source's content tree; reveals no other example's."""
    return tagged_hash(Tag.SALT, source_salt, b"content", index.to_bytes(8, "big"))


def examples_root(key: bytes, examples: tuple[int, ...]) -> Digest:
    """Root over an item's examples, whose salts are drawn from ``key``: an RFC 9162 tree over pages.

    An entry of it is ``PAGE_EXAMPLES`` commitments, end to end; of the last page those that are left. Each is
    ``example_commitment``, with what all have in common put together once: a step may list thousands.
    """
    salts = example_salts(key, len(examples))
    before = tagged_prefix(Tag.EXAMPLE) + _SALT_BYTES
    framed = struct.Struct(f">{len(before)}s32s8sQ").pack
    committed = [
        sha256(framed(before, salt, _EIGHT, example)).digest() for salt, example in zip(salts, examples, strict=True)
    ]
    firsts = range(0, len(committed), PAGE_EXAMPLES)
    return root_of([leaf_hash(b"".join(committed[first : first + PAGE_EXAMPLES])) for first in firsts])


def data_items_root(portion: DataPortion) -> Digest:
    """Root of the tree over a data portion's salted items."""
    return root_of(
        [item_leaf(item_salt(portion.salt, number), item.content) for number, item in enumerate(portion.items)]
    )


def data_commitment(kind: str, items_root: bytes, item_count: int) -> Digest:
    """Commitment to a data portion, from the root and size of its item tree."""
    start = _portion_start(kind, Role.DATA_SOURCE)
    return Digest(sha256(start + items_root + _EIGHT + item_count.to_bytes(8, "big")).digest())


def portion_commitment(kind: str, role: Role, salt: bytes, content: bytes) -> Digest:
    """Commitment to a governance or operation portion."""
    return Digest(sha256(_portion_start(kind, role) + salt + len(content).to_bytes(8, "big") + content).digest())


@lru_cache(maxsize=256)
def _portion_start(kind: str, role: Role) -> bytes:
    """What is hashed before the salt, or the root, of a portion: the same for all that a log has of a kind."""
    return tagged_prefix(Tag.PORTION, kind.encode(), role.encode()) + _SALT_BYTES


def commitments(kind: str, portions: Portions) -> tuple[bytes, bytes, bytes]:
    """The three commitments of an event's entry, data, governance, operation; empty where absent."""
    data = governance = operation = b""
    if portions.data is not None:
        data = data_commitment(kind, data_items_root(portions.data), len(portions.data.items))
    if portions.governance is not None:
        held = portions.governance
        governance = portion_commitment(kind, Role.GOVERNANCE, held.salt, held.content)
    if portions.operation is not None:
        held = portions.operation
        operation = portion_commitment(kind, Role.OPERATOR, held.salt, held.content)
    return data, governance, operation


def decode_portions(encoded: bytes) -> Portions:
    """Portions from their wire form.

    Raises:
        Rejected: as ``codec.decode``.
    """
    return decode(encoded, Portions, MAX_PORTIONS_BYTES)


def use_item(
    portion_salt: bytes,
    number: int,
    source: bytes,
    content_class: str,
    refused: tuple[Count, ...],
    admitted: tuple[int, ...],
) -> DataItem:
    """The item of a step for one source: ``admitted`` are example indexes, ``refused`` counts by reason."""
    use = SourceUse(
        source=source,
        content_class=content_class,
        presented=len(admitted) + sum(count.count for count in refused),
        admitted=len(admitted),
        refused=refused,
        examples_root=examples_root(examples_key(portion_salt, number), admitted),
    )
    return DataItem(encode(use), admitted)


def refusal_item(portion_salt: bytes, number: int, source: bytes, reason: str, examples: tuple[int, ...]) -> DataItem:
    """The item of a refusal for one source and reason."""
    refusal = SourceRefusal(
        source=source,
        reason=reason,
        count=len(examples),
        examples_root=examples_root(examples_key(portion_salt, number), examples),
    )
    return DataItem(encode(refusal), examples)


def check_examples(portion: DataPortion, number: int, root: bytes) -> None:
    """An item's listed examples are strictly increasing and hash to its root.

    Raises:
        Rejected: ``PORTION_MISMATCH`` or ``BAD_FIELD``.
    """
    examples = portion.items[number].examples
    if not all(map(lt, examples, examples[1:])):
        raise Rejected(Reason.BAD_FIELD, f"examples of item {number} are not strictly increasing")
    if examples_root(examples_key(portion.salt, number), examples) != root:
        raise Rejected(Reason.PORTION_MISMATCH, f"examples of item {number} do not hash to its root")
