"""Custody over HTTP: handing in the files of a campaign's windows, in parts, and having them back.

The log is read on the node's thread (``LogReading``) and everything else is done in a worker thread, one request at a
time (``one_thread.py``): what of a campaign stands is worked out once for each state of its head.
"""

from collections import OrderedDict

from consensus.accumulators import MAX_WINDOW_BYTES
from consensus.epochs import anchor
from consensus.rejection import Reason, Rejected
from consensus.state import CAMPAIGN_HEAD_TABLE
from node import request_fields as fields
from node.api_log import LogReading
from node.custody import MAX_READ_BYTES, CommittedWindow, CommittedWindows, HeldWindow, committed_windows
from node.endpoints import Call, Endpoint
from node.errors_http import OCTETS, HttpReply, json_reply
from node.one_thread import OneThread
from node.service import Service

CAMPAIGNS_REMEMBERED = 16


class CustodyApi:
    """The endpoints of a custodian. On a node that is none each refuses as ``not-found``."""

    def __init__(self, service: Service, max_body_bytes: int) -> None:
        self._service = service
        self._max_body_bytes = max_body_bytes
        genesis = service.ledger.genesis
        self._trusted = anchor(genesis, genesis.chain_id)
        self._remembered: OrderedDict[bytes, tuple[bytes, tuple[CommittedWindow, ...]]] = OrderedDict()
        self._thread = OneThread()

    def endpoints(self) -> tuple[Endpoint, ...]:
        """The table."""
        return (
            Endpoint(
                "GET",
                "/v1/custody/{campaign}",
                "A campaign's windows of accumulators, and what of them is kept here.",
                self.status,
                refusals=(404, 409, 413, 429),
            ),
            Endpoint(
                "PUT",
                "/v1/custody/{campaign}/windows/{root}",
                "Hand in the list of a window that the log commits to.",
                self.put_window,
                body=OCTETS,
                refusals=(404, 409, 503),
            ),
            Endpoint(
                "GET",
                "/v1/custody/{campaign}/windows/{root}",
                "The list of a window.",
                self.window,
                content_type=OCTETS,
                refusals=(404, 429),
            ),
            Endpoint(
                "PUT",
                "/v1/custody/{campaign}/blobs/{sha256}",
                "Hand in the next part of a file that such a list names.",
                self.put_part,
                ("offset",),
                body=OCTETS,
                refusals=(404, 409, 503),
            ),
            Endpoint(
                "GET",
                "/v1/custody/{campaign}/blobs/{sha256}",
                "At most 4 MiB of a file, from an offset on.",
                self.part,
                ("offset",),
                content_type=OCTETS,
                refusals=(404, 429),
            ),
        )

    async def status(self, call: Call) -> HttpReply:
        """What is kept of a campaign."""
        campaign, committed, desk = self._campaign(call), self._committed(), self._service.custody
        windows, set_aside_bytes = await self._thread.run(
            call.request, lambda: (desk.windows(campaign, committed), desk.set_aside_bytes)
        )
        return json_reply(
            {
                "maximum_bytes": desk.maximum_bytes,
                "set_aside_bytes": set_aside_bytes,
                "windows": [_window_fields(window) for window in windows],
            }
        )

    async def put_window(self, call: Call) -> HttpReply:
        """Take a window's list."""
        campaign, root, committed = self._campaign(call), fields.digest("root", call.path["root"]), self._committed()
        desk = self._service.custody
        content = await call.request.body(min(self._max_body_bytes, MAX_WINDOW_BYTES))
        await self._thread.run(call.request, lambda: desk.take_list(campaign, root, content, committed))
        return json_reply({"root": root.hex()})

    async def window(self, call: Call) -> HttpReply:
        """A window's list."""
        campaign, root = self._campaign(call), fields.digest("root", call.path["root"])
        content = await self._thread.run(call.request, lambda: self._service.custody.read_list(campaign, root))
        return HttpReply(200, content, OCTETS)

    async def put_part(self, call: Call) -> HttpReply:
        """Take the next part of a file."""
        campaign, sha256 = self._campaign(call), fields.digest("sha256", call.path["sha256"])
        offset = fields.optional_number(call.query, "offset", 0)
        desk = self._service.custody
        content = await call.request.body(self._max_body_bytes)
        held_bytes = await self._thread.run(call.request, lambda: desk.take_part(campaign, sha256, offset, content))
        return json_reply({"held_bytes": held_bytes})

    async def part(self, call: Call) -> HttpReply:
        """Part of a file."""
        campaign, sha256 = self._campaign(call), fields.digest("sha256", call.path["sha256"])
        offset = fields.optional_number(call.query, "offset", 0)
        desk = self._service.custody
        content = await self._thread.run(call.request, lambda: desk.read_part(campaign, sha256, offset, MAX_READ_BYTES))
        return HttpReply(200, content, OCTETS)

    @staticmethod
    def _campaign(call: Call) -> bytes:
        return fields.digest("campaign", call.path["campaign"])

    def _committed(self) -> CommittedWindows:
        """What stands on the log as it is now; to be asked in the worker thread."""
        reading = LogReading(self._service.ledger)

        def committed(campaign: bytes) -> tuple[CommittedWindow, ...]:
            head = reading.state.get(CAMPAIGN_HEAD_TABLE + campaign)
            if head is None:
                raise Rejected(Reason.UNKNOWN_CAMPAIGN, f"campaign {campaign.hex()} is not on the log")
            known = self._remembered.get(campaign)
            if known is None or known[0] != head:
                known = head, committed_windows(self._trusted, reading, campaign)
                self._remembered[campaign] = known
                self._remembered.move_to_end(campaign)
                while len(self._remembered) > CAMPAIGNS_REMEMBERED:
                    self._remembered.popitem(last=False)
            return known[1]

        return committed


def _window_fields(held: HeldWindow) -> dict[str, object]:
    return {
        "first_step": held.window.first,
        "last_step": held.window.last,
        "root": held.window.root.hex(),
        "listed": held.is_listed,
        "files": [
            {"sha256": file.sha256.hex(), "size_bytes": file.size_bytes, "held_bytes": file.held_bytes}
            for file in held.files
        ],
    }
