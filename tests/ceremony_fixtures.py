"""A ceremony for tests, a round at a time, so that somebody can say something else."""

from collections.abc import Container
from typing import Self

from consensus.ceremony import Body, Invitation, SignedMessage, Transcript
from consensus.codec import decode, encode
from consensus.identifiers import Tag, tagged_message
from consensus.participant import Participant


class CeremonyTable:
    """All participants and what has been said."""

    def __init__(self, invitation: Invitation, members: dict[str, Participant]) -> None:
        self.invitation = invitation
        self.members = members
        self.messages: list[bytes] = []

    def transcript(self) -> Transcript:
        return Transcript(self.invitation, self.messages)

    def round(self, without: Container[str] = ()) -> Self:
        """Everybody, but ``without``, says what is due."""
        transcript = self.transcript()
        self.messages += [
            message
            for name, member in self.members.items()
            if name not in without and (message := member.next_message(transcript)) is not None
        ]
        return self

    def due(self, name: str) -> Body:
        """What a member would say now."""
        message = self.members[name].next_message(self.transcript())
        assert message is not None
        body: Body = decode(decode(message, SignedMessage, 1 << 20).body, Body, 1 << 20)  # type: ignore[arg-type]
        return body

    def signed(self, name: str, body: Body) -> bytes:
        """A member's word, whatever it says."""
        encoded = encode(body)
        signature = self.members[name].identity.sign(tagged_message(Tag.CEREMONY, encoded))
        return encode(SignedMessage(name, encoded, signature))

    def says(self, name: str, body: Body) -> Self:
        """A member says what it likes."""
        self.messages.append(self.signed(name, body))
        return self
