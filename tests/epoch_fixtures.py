"""Changes of members for tests, with real keys: a ceremony for the next epoch among who stays and who joins."""

from collections.abc import Iterable, Mapping

from consensus_fixtures import seed_bytes
from ledger_fixtures import MemoryLedger

from consensus import portions as p
from consensus.ceremony import Invitation, Invited
from consensus.event import CheckedEvent, Kind
from consensus.identifiers import VOTING_ROLES, Role
from consensus.membership import Committee, Genesis, Membership, RoleThreshold, default_threshold
from consensus.membership_change import MembershipChange
from consensus.participant import MemberSecrets, MemberSeeds, Participant, hold_ceremony


def next_membership(
    genesis: Genesis,
    before: Committee,
    secrets: Mapping[str, MemberSecrets],
    *,
    add: Mapping[str, str] | None = None,
    remove: Iterable[str] = (),
    rotate: Iterable[str] = (),
) -> tuple[Membership, dict[str, MemberSecrets]]:
    """The next epoch and all its secrets: ``add`` is role by name, ``rotate`` get new keys."""
    invitation = invitation_to(genesis, before, add=add, remove=remove)
    kept = kept_seeds(invitation, before, secrets, rotate=rotate)
    participants = [
        Participant(
            invitation, one.name, seed_bytes(invitation.epoch, f"epoch {one.name}", number), kept=kept.get(one.name)
        )
        for number, one in enumerate(invitation.members)
    ]
    transcript = hold_ceremony(invitation, participants)
    return transcript.membership(), {one.name: one.secrets(transcript) for one in participants}


def invitation_to(
    genesis: Genesis, before: Committee, *, add: Mapping[str, str] | None = None, remove: Iterable[str] = ()
) -> Invitation:
    """To the ceremony of the next epoch: who stays, then who is added; default quorums."""
    invited = [Invited(member.name, member.role) for member in before.members if member.name not in set(remove)]
    invited += [Invited(name, Role(role)) for name, role in (add or {}).items()]
    counts = {role: sum(one.role == role for one in invited) for role in VOTING_ROLES}
    return Invitation(
        version=1,
        name=genesis.name,
        nonce=genesis.nonce,
        created_ms=genesis.created_ms,
        certificate_scheme=genesis.certificate_scheme,
        members=tuple(invited),
        thresholds=tuple(RoleThreshold(role, default_threshold(counts[role])) for role in VOTING_ROLES),
        parameters=genesis.parameters,
        epoch=before.epoch + 1,
        refreshes=None,
    )


def kept_seeds(
    invitation: Invitation, before: Committee, secrets: Mapping[str, MemberSecrets], *, rotate: Iterable[str] = ()
) -> dict[str, MemberSeeds]:
    """What those who stay under their keys bring along."""
    stay = {member.name for member in before.members} - set(rotate)
    return {
        one.name: MemberSeeds(held.identity_seed, held.transport_seed, held.log_seed or bytes(32))
        for one in invitation.members
        if one.name in stay and (held := secrets[one.name])
    }


def change_event(ledger: MemoryLedger, membership: Membership, signers: Iterable[str] | None = None) -> CheckedEvent:
    """A membership event signed by all voters of the epoch that ends, or by ``signers``, the first its author."""
    names = [voter.name for voter in ledger.committee.voters] if signers is None else list(signers)
    portions = p.Portions(None, ledger.salted(MembershipChange(membership, "")), None)
    return ledger.signed(Kind.MEMBERSHIP, names, portions)


def carrier_of(ledger: MemoryLedger) -> tuple[bytes, bytes]:
    """Header and certificate of a carrier of the last ledger block; the log stays as it was."""
    terminal = ledger.ledger
    ledger.seal()
    ledger.states.pop()
    ledger.ledger = terminal
    return ledger.certified.pop()


def begin_epoch(
    ledger: MemoryLedger,
    *,
    add: Mapping[str, str] | None = None,
    remove: Iterable[str] = (),
    rotate: Iterable[str] = (),
) -> Membership:
    """Change the members of a ledger: its next ledger block is made by the new ones."""
    membership, secrets = next_membership(
        ledger.genesis, ledger.committee, ledger.secrets, add=add, remove=remove, rotate=rotate
    )
    ledger.seal(change_event(ledger, membership))
    ledger.enter_epoch(membership, secrets)
    return membership
