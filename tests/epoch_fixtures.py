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
    epoch = before.epoch + 1
    stays = {member.name: member for member in before.members if member.name not in set(remove)}
    invited = [Invited(name, member.role) for name, member in stays.items()]
    invited += [Invited(name, Role(role)) for name, role in (add or {}).items()]
    counts = {role: sum(one.role == role for one in invited) for role in VOTING_ROLES}
    invitation = Invitation(
        version=1,
        name=genesis.name,
        nonce=genesis.nonce,
        created_ms=genesis.created_ms,
        certificate_scheme=genesis.certificate_scheme,
        members=tuple(invited),
        thresholds=tuple(RoleThreshold(role, default_threshold(counts[role])) for role in VOTING_ROLES),
        parameters=genesis.parameters,
        epoch=epoch,
    )
    participants = []
    for number, one in enumerate(invited):
        kept = None
        if one.name in stays and one.name not in set(rotate):
            held = secrets[one.name]
            kept = MemberSeeds(held.identity_seed, held.transport_seed, held.log_seed or bytes(32))
        seed = seed_bytes(epoch, f"epoch {one.name}", number)
        participants.append(Participant(invitation, one.name, seed, kept=kept))
    transcript = hold_ceremony(invitation, participants)
    return transcript.membership(), {one.name: one.secrets(transcript) for one in participants}


def change_event(ledger: MemoryLedger, membership: Membership, signers: Iterable[str] | None = None) -> CheckedEvent:
    """A membership event signed by all voters of the epoch that ends, or by ``signers``, the first its author."""
    names = [voter.name for voter in ledger.committee.voters] if signers is None else list(signers)
    portions = p.Portions(None, ledger.salted(MembershipChange(membership, "")), None)
    return ledger.signed(Kind.MEMBERSHIP, names, portions)


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
