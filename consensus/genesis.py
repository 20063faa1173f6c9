"""The genesis file people read, and a genesis whose members' secrets all begin in one place.

JSON form: objects with the wire types' field names, bytes as lower-case hex, nothing optional. Reading
is strict: a repeated, missing or unknown name, upper-case hex, a float or ``NaN`` is refused, so that two
readers cannot see two memberships in one file. The chain id is the digest of the *canonical* bytes, never
of the JSON: layout does not matter.

``generate_genesis`` holds the founding ceremony (``ceremony``, ``participant``) in memory: what members who do not
trust one machine do by exchanging files, with the same messages and checks. Reading a file does not decide whether a
genesis is sound: that is ``membership.check_genesis``.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import msgspec
from msgspec import Struct

from consensus.ceremony import Invitation, Invited
from consensus.codec import encode
from consensus.identifiers import VOTING_ROLES, Role
from consensus.keys import SignatureScheme
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
    default_threshold,
)
from consensus.participant import MemberSecrets, Participant, hold_ceremony
from consensus.rejection import Reason, Rejected

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
    """A genesis from a ceremony among all members in this process, and each member's secrets by name.

    ``thresholds`` default to ``default_threshold`` of each role's size.

    Raises:
        Rejected: ``BAD_KEY`` for a seed or nonce of another length than 32 bytes; ``BAD_MEMBERSHIP`` for an unknown
            certificate scheme, and for members that make no genesis.
    """
    if len(nonce) != 32:
        raise Rejected(Reason.BAD_KEY, f"a nonce has 32 bytes, not {len(nonce)}")
    quorums = {role: default_threshold(sum(plan.role == role for plan in plans)) for role in VOTING_ROLES}
    quorums.update(thresholds or {})
    invitation = Invitation(
        version=VERSION,
        name=name,
        nonce=nonce,
        created_ms=created_ms,
        certificate_scheme=certificate_scheme,
        members=tuple(Invited(plan.name, plan.role) for plan in plans),
        thresholds=tuple(RoleThreshold(role=role, threshold=quorums[role]) for role in VOTING_ROLES),
        parameters=parameters or Parameters(),
        epoch=GENESIS_EPOCH,
        refreshes=None,
    )
    participants = [Participant(invitation, plan.name, plan.seed, plan.scheme) for plan in plans]
    transcript = hold_ceremony(invitation, participants)
    return transcript.genesis(), {one.name: one.secrets(transcript) for one in participants}


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
