"""What a policy means: pure evaluation of sources, depth profiles and grants.

The trainer client and every validator call the same functions, so that what the job refuses and what
the log requires to be refused are one rule.
"""

from operator import lt

from consensus.identifiers import Digest, Role
from consensus.keys import SignatureScheme
from consensus.portions import BandRule, ClassProfile, ClassRule, GrantTerms, Policy, SourceClaim
from consensus.rejection import Reason, Rejected

REVOCATION_DRAIN = "drain"
REVOCATION_VOID = "void"
MOMENTUM_CARRY = "carry"
MOMENTUM_FLUSH = "flush"
ROUTING_GRANULARITIES = ("block", "layer", "head")
EVENT_GRANULARITIES = ("epoch", "batch", "example")
CUSTODY_ROLES = tuple(role.value for role in Role if role is not Role.OPERATOR)
"""Who may be asked to hold what the operator's job left."""
AUTHOR_SCHEMES = tuple(scheme.label for scheme in SignatureScheme)

DISCRETIONARY_REFUSALS = frozenset({Reason.MEMORIZATION_ABOVE_THRESHOLD.value})
"""Reasons for which a job may refuse an example that the policy alone would admit."""


def check_policy(policy: Policy) -> None:
    """The policy is one: known words, nothing listed twice.

    Raises:
        Rejected: ``BAD_FIELD``.
    """
    if policy.revocation not in (REVOCATION_DRAIN, REVOCATION_VOID):
        raise Rejected(Reason.BAD_FIELD, f"revocation is '{policy.revocation}', expected drain or void")
    if policy.momentum not in (MOMENTUM_CARRY, MOMENTUM_FLUSH):
        raise Rejected(Reason.BAD_FIELD, f"momentum is '{policy.momentum}', expected carry or flush")
    for known, listed, what in (
        (ROUTING_GRANULARITIES, policy.routing_granularities, "routing granularity"),
        (EVENT_GRANULARITIES, policy.event_granularities, "event granularity"),
        (AUTHOR_SCHEMES, policy.author_schemes, "author scheme"),
    ):
        unknown = sorted(set(listed) - set(known))
        if unknown or not listed:
            raise Rejected(Reason.BAD_FIELD, f"{what}: expected some of {', '.join(known)}, found {unknown or 'none'}")
    unknown = sorted(set(policy.custody) - set(CUSTODY_ROLES))
    if unknown:
        raise Rejected(Reason.BAD_FIELD, f"custody: expected some of {', '.join(CUSTODY_ROLES)}, found {unknown}")
    for what, names in (
        ("licence", policy.licences),
        ("purpose", policy.purposes),
        ("class", tuple(rule.content_class for rule in policy.classes)),
        ("routing granularity", policy.routing_granularities),
        ("event granularity", policy.event_granularities),
        ("author scheme", policy.author_schemes),
        ("required fact", policy.required_metadata),
        ("role of custody", policy.custody),
        ("auditor", tuple(auditor.hex() for auditor in policy.auditors)),
        *(
            (f"block of class {rule.content_class}", tuple(weight.block for weight in blocks))
            for rule in policy.classes
            for blocks in (rule.blocks, *(held.blocks for held in rule.bands))
        ),
    ):
        if len(set(names)) != len(names):
            raise Rejected(Reason.BAD_FIELD, f"a {what} is listed twice")
    _check_bands(policy)


def _check_bands(policy: Policy) -> None:
    edges = policy.entropy_edges_milli
    if not all(map(lt, edges, edges[1:])) or 0 in edges:
        raise Rejected(Reason.BAD_FIELD, f"edges of entropy bands: expected rising numbers above 0, found {edges}")
    told_apart = band_count(policy) if edges else 0
    for rule in policy.classes:
        bands = tuple(held.band for held in rule.bands)
        if not all(map(lt, bands, bands[1:])) or any(band >= told_apart for band in bands):
            raise Rejected(
                Reason.BAD_FIELD,
                f"class {rule.content_class} has rules for entropy bands {bands}: expected rising ones, from 0, of the "
                f"{told_apart} that the policy tells apart",
            )


def check_author_scheme(policy: Policy, scheme: int, whose: str) -> None:
    """The policy admits what is signed with this scheme.

    Raises:
        Rejected: ``SCHEME_NOT_ADMITTED``.
    """
    label = SignatureScheme(scheme).label
    if label not in policy.author_schemes:
        admitted = " or ".join(policy.author_schemes)
        raise Rejected(Reason.SCHEME_NOT_ADMITTED, f"{whose} signs with {label}, the policy admits {admitted}")


def why_refused(
    policy: Policy, claim: SourceClaim, revoked: bool, purpose: str, from_ms: int, until_ms: int
) -> Reason | None:
    """Why a source may not be used for ``purpose`` from ``from_ms`` through ``until_ms``; None if it may."""
    if revoked:
        return Reason.SOURCE_REVOKED
    if from_ms < claim.valid_from_ms:
        return Reason.SOURCE_NOT_YET_VALID
    if until_ms >= claim.valid_until_ms:
        return Reason.SOURCE_EXPIRED
    if claim.licence not in policy.licences:
        return Reason.LICENCE_NOT_ADMITTED
    if purpose not in claim.purposes or purpose not in policy.purposes:
        return Reason.PURPOSE_NOT_ADMITTED
    if class_rule(policy, claim.content_class) is None:
        return Reason.CLASS_NOT_ADMITTED
    return None


def class_rule(policy: Policy, content_class: str) -> ClassRule | None:
    """The policy's rule for a content class, if it has one."""
    return next((rule for rule in policy.classes if rule.content_class == content_class), None)


def band_count(policy: Policy) -> int:
    """How many entropy bands the policy tells apart, at least 1."""
    return len(policy.entropy_edges_milli) + 1


def maximum_profile(policy: Policy, content_class: str, band: int, blocks: tuple[str, ...]) -> ClassProfile:
    """The deepest profile a class may have in an entropy band over these parameter blocks, in their order.

    Raises:
        Rejected: ``CLASS_NOT_ADMITTED``; ``BAD_FIELD`` for a band that the policy does not have.
    """
    rule = class_rule(policy, content_class)
    if rule is None:
        raise Rejected(Reason.CLASS_NOT_ADMITTED, f"the policy has no rule for class '{content_class}'")
    if not 0 <= band < band_count(policy):
        raise Rejected(Reason.BAD_FIELD, f"entropy band {band}, the policy has {band_count(policy)}, from 0")
    held: ClassRule | BandRule = next((each for each in rule.bands if each.band == band), rule)
    exceptions = {weight.block: weight.weight_permille for weight in held.blocks}
    weights = tuple(exceptions.get(block, held.default_weight_permille) for block in blocks)
    return ClassProfile(content_class=content_class, band=band, weights_permille=weights)


def check_profile(policy: Policy, applied: ClassProfile, blocks: tuple[str, ...]) -> None:
    """An applied profile stays at or below the maximum of its class and entropy band in every parameter block.

    Raises:
        Rejected: ``BAD_FIELD``, ``CLASS_NOT_ADMITTED`` or ``DEPTH_ABOVE_MAXIMUM``.
    """
    if len(applied.weights_permille) != len(blocks):
        raise Rejected(
            Reason.BAD_FIELD,
            f"profile of class '{applied.content_class}' has {len(applied.weights_permille)} weights, "
            f"the campaign has {len(blocks)} parameter blocks",
        )
    maximum = maximum_profile(policy, applied.content_class, applied.band, blocks)
    for block, weight, most in zip(blocks, applied.weights_permille, maximum.weights_permille, strict=True):
        if weight > most:
            raise Rejected(
                Reason.DEPTH_ABOVE_MAXIMUM,
                f"class '{applied.content_class}' in block '{block}': weight {weight} ‰, at most {most} ‰ in entropy "
                f"band {applied.band}",
            )


def check_grant_terms(policy_id: Digest, policy: Policy, terms: GrantTerms, now_ms: int) -> None:
    """A grant stays inside its policy's bounds and is not already closed.

    Raises:
        Rejected: ``GRANT_EXCEEDS_POLICY`` or ``GRANT_CLOSED``.
    """
    steps = terms.last_step - terms.first_step + 1
    if not 1 <= steps <= policy.maximum_grant_steps:
        raise Rejected(
            Reason.GRANT_EXCEEDS_POLICY,
            f"{steps} steps, policy {policy_id.hex()} allows {policy.maximum_grant_steps}",
        )
    if terms.closes_at_ms <= now_ms:
        raise Rejected(Reason.GRANT_CLOSED, f"closes at {terms.closes_at_ms} ms, it is {now_ms} ms")
    duration_ms = terms.closes_at_ms - now_ms
    if duration_ms > policy.maximum_grant_duration_ms:
        raise Rejected(
            Reason.GRANT_EXCEEDS_POLICY,
            f"open for {duration_ms} ms, policy {policy_id.hex()} allows {policy.maximum_grant_duration_ms} ms",
        )
