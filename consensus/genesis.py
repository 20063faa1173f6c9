"""The genesis file people read, and a genesis whose members' secrets all begin in one place.

JSON form: objects with the wire types' field names, bytes as lower-case hex, nothing optional. Reading
is strict: a repeated, missing or unknown name, upper-case hex, a float or ``NaN`` is refused, so that two
readers cannot see two memberships in one file. The chain id is the digest of the *canonical* bytes, never
of the JSON: layout does not matter.

``generate_genesis`` runs every role's key generation in memory. Members who do not trust one machine with
all secrets exchange the messages of ``key_generation`` instead; the genesis they reach has the same form.
Neither function decides whether a genesis is sound: that is ``membership.check_genesis``.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import msgspec
from msgspec import Struct

from consensus import bls
from consensus.codec import encode
from consensus.identifiers import VOTING_ROLES, MemberId, Role, Tag, tagged_hash
from consensus.key_generation import Ceremony, run_local_key_generation
from consensus.keys import Ed25519SigningKey, MlDsa65SigningKey, SignatureScheme, Signer
from consensus.membership import (
    BLS_THRESHOLD,
    GENESIS_EPOCH,
    MAX_GENESIS_BYTES,
    VERSION,
    Genesis,
    Member,
    Parameters,
    RoleGroup,
    RoleThreshold,
    SchemeNeeds,
    default_threshold,
    member_id,
    scheme_needs,
)
from consensus.rejection import Reason, Rejected
from consensus.threshold import member_possession_context

MAX_JSON_BYTES = 4 * MAX_GENESIS_BYTES

_HEX_FIELDS = frozenset(
    {
        "nonce",
        "identity_key",
        "transport_key",
        "log_key",
        "bls_key",
        "bls_possession",
        "group_key",
        "share_keys",
        "possession",
    }
)
_STRUCT_FIELDS: dict[str, type[Struct]] = {
    "members": Member,
    "thresholds": RoleThreshold,
    "groups": RoleGroup,
    "parameters": Parameters,
}


@dataclass(frozen=True, slots=True, repr=False)
class MemberPlan:
    """A member to be. All its secrets are derived from its 32-byte ``seed`` and nothing else."""

    name: str
    role: Role
    seed: bytes
    scheme: SignatureScheme | None = None
    """Of its identity key; None for what the certificate scheme needs, or Ed25519."""


@dataclass(frozen=True, slots=True, repr=False)
class MemberSecrets:
    """What a member keeps to itself. A verifier has no log seed and no key share."""

    identity: Signer
    identity_seed: bytes
    transport_seed: bytes
    log_seed: bytes | None
    key_share: bls.Secret | None
    """Its share of the role key, or its own BLS secret where roles have none; ``None`` where certificates need neither.
    """


def genesis_to_json(genesis: Genesis) -> bytes:
    """The file people read: two-space indented, one line end at the end."""
    return json.dumps(_readable(genesis), indent=2).encode() + b"\n"


def genesis_from_json(encoded: bytes) -> Genesis:
    """The genesis a file says; not yet checked.

    Raises:
        Rejected: ``OVERSIZED``; ``MALFORMED``.
    """
    if len(encoded) > MAX_JSON_BYTES:
        raise Rejected(Reason.OVERSIZED, f"genesis of {len(encoded)} bytes, at most {MAX_JSON_BYTES} allowed")
    try:
        parsed = json.loads(
            encoded.decode("utf-8"),
            object_pairs_hook=_unique_names,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
        )
        genesis = msgspec.convert(_wire_list(Genesis, parsed), Genesis)
        encode(genesis)  # a lone surrogate is a string that has no bytes, hence no chain id
        return genesis
    except (ValueError, RecursionError, OverflowError, msgspec.ValidationError) as error:
        raise Rejected(Reason.MALFORMED, f"not a genesis file: {error!s:.500}") from error


def generate_genesis(
    *,
    name: str,
    nonce: bytes,
    created_ms: int,
    plans: Sequence[MemberPlan],
    certificate_scheme: str = BLS_THRESHOLD,
    thresholds: Mapping[Role, int] | None = None,
    parameters: Parameters | None = None,
) -> tuple[Genesis, dict[str, MemberSecrets]]:
    """A genesis with all key ceremonies run in this process, and each member's secrets by name.

    ``thresholds`` default to ``default_threshold`` of each role's size.

    Raises:
        Rejected: ``BAD_KEY`` for a seed or nonce of another length than 32 bytes; ``BAD_MEMBERSHIP`` for an unknown
            certificate scheme.
    """
    if len(nonce) != 32:
        raise Rejected(Reason.BAD_KEY, f"a nonce has 32 bytes, not {len(nonce)}")
    quorums = {role: default_threshold(sum(plan.role == role for plan in plans)) for role in VOTING_ROLES}
    quorums.update(thresholds or {})
    needs = scheme_needs(certificate_scheme)
    identities = {plan.name: _identity(plan, needs) for plan in plans}
    with_bls = {plan.name for plan in plans if needs.member_keys and plan.role in VOTING_ROLES}
    shares: dict[str, bls.Secret] = {plan.name: _own_bls_secret(plan) for plan in plans if plan.name in with_bls}
    groups: list[RoleGroup] = []
    if needs.group_keys:
        for role in VOTING_ROLES:
            role_plans = [plan for plan in plans if plan.role == role]
            ceremony = Ceremony(nonce, GENESIS_EPOCH, role, quorums[role], len(role_plans))
            made, possession = run_local_key_generation(
                ceremony,
                [_id(identities[plan.name]) for plan in role_plans],
                [derive_seed(plan.seed, "bls") for plan in role_plans],
            )
            shares.update({plan.name: share.secret for plan, share in zip(role_plans, made, strict=True)})
            group = made[0].group
            groups.append(
                RoleGroup(
                    role=role,
                    threshold=group.threshold,
                    group_key=group.group_key,
                    share_keys=group.share_keys,
                    possession=possession,
                )
            )
    genesis = Genesis(
        version=VERSION,
        name=name,
        nonce=nonce,
        created_ms=created_ms,
        certificate_scheme=certificate_scheme,
        members=tuple(_member(plan, identities[plan.name], nonce, plan.name in with_bls) for plan in plans),
        thresholds=tuple(RoleThreshold(role=role, threshold=quorums[role]) for role in VOTING_ROLES),
        groups=tuple(groups),
        parameters=parameters or Parameters(),
    )
    secrets = {
        plan.name: MemberSecrets(
            identity=identities[plan.name],
            identity_seed=derive_seed(plan.seed, "identity"),
            transport_seed=derive_seed(plan.seed, "transport"),
            log_seed=derive_seed(plan.seed, "log") if plan.role in VOTING_ROLES else None,
            key_share=shares.get(plan.name),
        )
        for plan in plans
    }
    return genesis, secrets


def derive_seed(seed: bytes, purpose: str) -> bytes:
    """The seed of one of a member's keys; seeds of different purposes say nothing of each other."""
    return tagged_hash(Tag.KEY_DERIVATION, seed, purpose.encode())


def signer_for(scheme: SignatureScheme, seed: bytes) -> Signer:
    """The signing key of ``scheme`` that ``seed`` gives.

    Raises:
        Rejected: ``BAD_KEY`` for a seed of another length than 32 bytes.
    """
    if scheme == SignatureScheme.ML_DSA_65:
        return MlDsa65SigningKey(seed)
    return Ed25519SigningKey(seed)


def _identity(plan: MemberPlan, needs: SchemeNeeds) -> Signer:
    if len(plan.seed) != 32:
        raise Rejected(Reason.BAD_KEY, f"a seed has 32 bytes, not {len(plan.seed)}")
    return signer_for(plan.scheme or needs.identity or SignatureScheme.ED25519, derive_seed(plan.seed, "identity"))


def _own_bls_secret(plan: MemberPlan) -> bls.Secret:
    return bls.secret_from_seed(derive_seed(plan.seed, "bls"))


def _id(identity: Signer) -> MemberId:
    return member_id(identity.scheme, identity.public_key)


def _member(plan: MemberPlan, identity: Signer, nonce: bytes, with_bls: bool) -> Member:
    bls_key = bls_possession = log_key = b""
    if with_bls:
        own = _own_bls_secret(plan)
        bls_key = bls.public_key(own)
        bls_possession = bls.prove_possession(own, member_possession_context(nonce, _id(identity)))
    if plan.role in VOTING_ROLES:
        log_key = Ed25519SigningKey(derive_seed(plan.seed, "log")).public_key
    return Member(
        name=plan.name,
        role=plan.role,
        scheme=int(identity.scheme),
        identity_key=identity.public_key,
        transport_key=Ed25519SigningKey(derive_seed(plan.seed, "transport")).public_key,
        log_key=log_key,
        bls_key=bls_key,
        bls_possession=bls_possession,
    )


def _readable(value: object) -> object:
    if isinstance(value, Struct):
        return {name: _readable(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, tuple):
        return [_readable(item) for item in value]
    return value.hex() if isinstance(value, bytes) else value


def _wire_list(kind: type[Struct], value: object) -> list[object]:
    """The array form of a JSON object that has exactly the fields of ``kind``."""
    names = kind.__struct_fields__
    if not isinstance(value, dict) or sorted(value) != sorted(names):
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{kind.__name__} has the fields {sorted(names)}, found {found!a:.300}")
    tag = kind.__struct_config__.tag
    return ([] if tag is None else [tag]) + [_wire_field(name, value[name]) for name in names]


def _wire_field(name: str, value: object) -> object:
    if isinstance(value, list):
        return [_wire_field(name, item) for item in value]
    if name in _STRUCT_FIELDS:
        return _wire_list(_STRUCT_FIELDS[name], value)
    if name in _HEX_FIELDS:
        return _unhex(name, value)
    return value


def _unhex(name: str, value: object) -> bytes:
    if not isinstance(value, str) or set(value) - set("0123456789abcdef"):
        raise ValueError(f"{name} is not lower-case hex")
    return bytes.fromhex(value)


def _unique_names(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name appears twice in one object")
    return names


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text:.40} is not a whole number")
