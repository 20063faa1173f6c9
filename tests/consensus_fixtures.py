"""A genesis for tests, with real keys: the same seed gives the same members and secrets."""

import hashlib
from collections.abc import Mapping

from consensus.genesis import MemberPlan, generate_genesis
from consensus.identifiers import Role
from consensus.keys import SignatureScheme
from consensus.membership import BLS_THRESHOLD, Genesis, Parameters
from consensus.participant import MemberSecrets

SMALLEST = {"data-source": 2, "governance": 1, "operator": 1, "verifier": 1}


def make_genesis(
    counts: Mapping[str, int] = SMALLEST,
    seed: int = 0,
    certificate_scheme: str = BLS_THRESHOLD,
    thresholds: Mapping[str, int] | None = None,
    *,
    scheme: SignatureScheme | None = None,
    schemes: Mapping[str, SignatureScheme] | None = None,
    parameters: Parameters | None = None,
) -> tuple[Genesis, dict[str, MemberSecrets]]:
    """``counts`` members of each role, called ``<role>-<n>`` from 1, and their secrets by name.

    Their identity keys are of ``scheme``, or of ``schemes`` by role.
    """
    by_role = schemes or {}
    plans = [
        MemberPlan(
            name=f"{role}-{number}",
            role=Role(role),
            seed=seed_bytes(seed, role, number),
            scheme=by_role.get(role, scheme),
        )
        for role, count in counts.items()
        for number in range(1, count + 1)
    ]
    return generate_genesis(
        name="countersign.example/test",
        nonce=seed_bytes(seed, "nonce", 0),
        created_ms=1_700_000_000_000,
        plans=plans,
        certificate_scheme=certificate_scheme,
        thresholds=None if thresholds is None else {Role(role): t for role, t in thresholds.items()},
        parameters=parameters,
    )


def seed_bytes(seed: int, purpose: str, number: int) -> bytes:
    """32 bytes fit for a test and nothing else."""
    return hashlib.sha256(f"test seed {seed} {purpose} {number}".encode()).digest()
