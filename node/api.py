"""The node's HTTP interface: submitting events, grants, the node's own state, and everything ``api_log.py`` reads.

Bytes are taken untouched: what a client posts is what ``Service.submit_each`` checks and the log keeps. A request
passes, in this order: ``auth.Gate``, the router, the strict reading of its query, its endpoint. Every refusal is
``{"error", "detail"}``; every endpoint stands in ``/v1/openapi.json``.

A batch is 4-byte big-endian length and event, repeated. Its framing is checked whole before the first event is
submitted; then each event has its own result, in order, whatever happened to those before it.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import trio

from consensus.codec import decode
from consensus.event import MAX_ENTRY_BYTES, MAX_EVENT_BYTES, CheckedEvent, Entry, event_id, unpack
from consensus.identifiers import Digest
from consensus.rejection import Reason, Rejected, Unavailable
from consensus.state import ChallengeRecord
from node import request_fields as fields
from node.api_custody import CustodyApi
from node.api_log import LogApi, status_fields
from node.auth import Gate
from node.config import ApiSection, api_tokens
from node.endpoints import Call, Endpoint, MethodNotAllowed, Router
from node.errors_http import OCTETS, HttpFault, HttpReply, SlowClient, error_reply, json_reply, reply_to
from node.http_server import AddressReport, HttpLimits, HttpRequest, serve_http
from node.messages import in_turns
from node.metrics import CONTENT_TYPE, Metrics
from node.openapi import document
from node.service import EventState, GrantStatus, Service

__all__ = ["Api", "serve"]

VERSION = "1"
MAX_BATCH_EVENTS = 4_096
FRAME_LENGTH_BYTES = 4
LONG_EVENT_BYTES = 8 << 10
"""To check an event over this size is long work: one of a MiB takes up to 70 ms."""
_UNMATCHED = "unmatched"


class Api:
    """Answers requests for one node."""

    def __init__(self, service: Service, config: ApiSection, tokens: Sequence[str], metrics: Metrics) -> None:
        """``tokens``: those of ``config.api_tokens``."""
        self._service = service
        self._max_body_bytes = config.max_body_bytes
        self._max_event_bytes = min(config.max_body_bytes, MAX_EVENT_BYTES)
        self._gate = Gate(tokens)
        self._metrics = metrics
        custody = CustodyApi(service, config.max_body_bytes)
        self._router = Router((*self._endpoints(), *LogApi(service).endpoints(), *custody.endpoints()))
        self._document = document(self.endpoints, VERSION)

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """All there are."""
        return self._router.endpoints

    async def __call__(self, request: HttpRequest) -> HttpReply:
        """Answer a request."""
        started = time.perf_counter()
        template = _UNMATCHED
        method = "OTHER"
        reply = error_reply(500, HttpFault.INTERNAL, "see the node's log")
        is_answered = True
        try:
            self._gate.admit(request.headers)
            endpoint, path = self._router.find(request.method, request.path)
            template, method = endpoint.template, endpoint.method
            reply = await endpoint.answer(Call(request, path, fields.read_query(request.query, endpoint.query)))
        except (Rejected, Unavailable, SlowClient) as error:
            reply = reply_to(error)
        except MethodNotAllowed as error:
            detail = f"{request.method} {request.path[:80]}, allowed: {error.allowed}"
            reply = error_reply(405, HttpFault.METHOD_NOT_ALLOWED, detail, ("allow", error.allowed))
        except trio.Cancelled:  # who asked was cut off, or the node ends
            is_answered = False
            raise
        finally:
            if is_answered:
                self._metrics.request_answered(method, template, reply.status, time.perf_counter() - started)
        return reply

    def _endpoints(self) -> tuple[Endpoint, ...]:
        return (
            Endpoint(
                "POST",
                "/v1/events",
                "Submit one signed event.",
                self._post_event,
                ("wait",),
                body=OCTETS,
                status=202,
                refusals=(409, 503),
            ),
            Endpoint(
                "POST",
                "/v1/events/batch",
                "Submit signed events, each after its length as 4 bytes big-endian.",
                self._post_batch,
                body=OCTETS,
                refusals=(503,),
            ),
            Endpoint(
                "POST",
                "/v1/grants",
                "Ask for a grant: its unsigned event.",
                self._post_grant,
                body=OCTETS,
                status=202,
                refusals=(409, 503),
            ),
            Endpoint("GET", "/v1/grants", "Grants on their way.", self._grants),
            Endpoint("GET", "/v1/grants/{id}", "How far a grant has come.", self._grant, refusals=(404,)),
            Endpoint(
                "POST",
                "/v1/grants/{id}/sign",
                "Countersign a grant by hand.",
                self._sign_grant,
                refusals=(404, 409, 503),
            ),
            Endpoint(
                "GET",
                "/v1/audits/{campaign}/{challenge}/share",
                "This member's share of the beacon of a final audit challenge.",
                self._beacon_share,
                refusals=(404, 503),
            ),
            Endpoint(
                "GET",
                "/v1/audits/{campaign}/{challenge}/beacon",
                "The beacon of a final audit challenge, of the shares of this member and its peers.",
                self._beacon,
                refusals=(404, 503),
            ),
            Endpoint("GET", "/v1/status", "This node now.", self._status),
            Endpoint("GET", "/v1/health", "200 while the node serves.", self._health, refusals=(503,)),
            Endpoint("GET", "/metrics", "Prometheus metrics.", self._prometheus, content_type=CONTENT_TYPE),
            Endpoint("GET", "/v1/openapi.json", "This document.", self._openapi),
        )

    # Events

    async def _post_event(self, call: Call) -> HttpReply:
        seconds = fields.wait_seconds(call.query)
        identifier, leaf_hash = self._submit(await self._event_body(call))
        call.request.release_body()
        status = self._service.status_of(identifier)
        if seconds and status.state is EventState.PENDING:
            call.request.give_way()
            status = await self._service.wait_final(identifier, seconds)
        if status.state is EventState.REJECTED and status.reason is not None:
            raise Rejected(status.reason, status.detail)
        return json_reply({**status_fields(identifier, status), "leaf_hash": leaf_hash.hex()}, 202)

    async def _event_body(self, call: Call) -> bytes:
        """An event, when it may be checked."""
        encoded = await call.request.body(self._max_event_bytes)
        if len(encoded) > LONG_EVENT_BYTES:
            await call.request.next_turn(len(encoded))
        return encoded

    def _submit(self, encoded: bytes) -> tuple[Digest, Digest]:
        """Id and leaf hash of an event that was taken: all that is kept of it while its client waits."""
        (answer,) = self._submit_each((encoded,))
        if isinstance(answer, Rejected):
            raise answer.anew()
        return answer.id, answer.leaf_hash

    def _submit_each(self, encoded: Sequence[bytes]) -> list[CheckedEvent | Rejected]:
        answers = self._service.submit_each(encoded)
        for answer in answers:
            if isinstance(answer, Rejected):
                self._metrics.event_rejected(answer.reason.value)
            else:
                self._metrics.event_submitted()
        return answers

    async def _post_batch(self, call: Call) -> HttpReply:
        events = split_batch(await call.request.body(self._max_body_bytes))
        results: list[dict[str, object]] = []
        for turn in in_turns(events):
            await call.request.next_turn()
            results += map(self._result, turn, self._submit_each(turn))
        return json_reply({"results": results})

    def _result(self, encoded: bytes, answer: CheckedEvent | Rejected) -> dict[str, object]:
        if isinstance(answer, Rejected):
            return {
                "id": _id_of(encoded),
                "status": EventState.REJECTED.value,
                "error": answer.reason.value,
                "detail": answer.detail,
            }
        status = status_fields(answer.id, self._service.status_of(answer.id))
        return {**status, "leaf_hash": answer.leaf_hash.hex()}

    # Grants

    async def _post_grant(self, call: Call) -> HttpReply:
        encoded = await self._event_body(call)
        desk = self._service.grants
        return json_reply(_grant_fields(desk.status(await desk.request(encoded))), 202)

    async def _grant(self, call: Call) -> HttpReply:
        return json_reply(_grant_fields(self._service.grants.status(fields.digest("grant id", call.path["id"]))))

    async def _grants(self, call: Call) -> HttpReply:
        return json_reply({"grants": [_grant_fields(status) for status in self._service.grants.list()]})

    async def _sign_grant(self, call: Call) -> HttpReply:
        return json_reply(_grant_fields(await self._service.grants.sign(fields.digest("grant id", call.path["id"]))))

    # Audits

    async def _beacon_share(self, call: Call) -> HttpReply:
        beacons = self._service.beacons
        record = self._challenge(call)
        found = beacons.share(record)
        return json_reply({"voter": found.voter.hex(), "epoch": record.epoch, "share": found.share.hex()})

    async def _beacon(self, call: Call) -> HttpReply:
        record = self._challenge(call)
        beacon = await self._service.beacons.beacon(record)
        return json_reply({"number": record.number, "epoch": record.epoch, "beacon": beacon.hex()})

    def _challenge(self, call: Call) -> ChallengeRecord:
        campaign = fields.digest("campaign", call.path["campaign"])
        return self._service.beacons.record(campaign, fields.digest("audit challenge", call.path["challenge"]))

    # The node

    async def _status(self, call: Call) -> HttpReply:
        now, service = self._service.snapshot(), self._service
        return json_reply(
            {
                "name": service.name,
                "role": service.role,
                "log": service.ledger.genesis.name,
                "chain_id": service.ledger.genesis.chain_id.hex(),
                "epoch": now.epoch,
                "view": now.view,
                "height": now.height,
                "head": now.head.hex(),
                "timestamp_ms": now.timestamp_ms,
                "log_size": now.log_size,
                "log_root": now.log_root.hex(),
                "state_root": now.state_root.hex(),
                "peers_connected": list(now.peers_connected),
                "peers_total": now.peers_total,
                "mempool": {"events": now.mempool_events, "bytes": now.mempool_bytes},
                "voting": now.voting,
                "why_not_voting": now.why_not_voting,
                "votes_sent": now.votes_sent,
                "halted": now.halted,
                "catching_up": now.catching_up,
                "log_missing": now.log_missing,
                "evidence": now.evidence,
                "finality": {
                    "count": now.finality.count,
                    "median_ms": now.finality.median_ms,
                    "p99_ms": now.finality.p99_ms,
                },
                "clocks_ahead_ms": dict(now.clocks_ahead_ms),
                "roles_connected": {reach.role.value: reach.connected for reach in now.roles},
                "tolerances": [
                    {
                        "role": role.role.value,
                        "members": role.members,
                        "threshold": role.threshold,
                        "agreement": role.agreement,
                        "validity": role.validity,
                        "liveness": role.liveness,
                    }
                    for role in service.ledger.committee.tolerances()
                ],
            }
        )

    async def _health(self, call: Call) -> HttpReply:
        now = self._service.snapshot()
        if now.halted:
            raise Unavailable(f"the node has halted: {now.halted}")
        return json_reply({"status": "ok", "height": now.height, "catching_up": now.catching_up, "voting": now.voting})

    async def _prometheus(self, call: Call) -> HttpReply:
        await call.request.next_turn()
        return HttpReply(200, self._metrics.render(), CONTENT_TYPE)

    async def _openapi(self, call: Call) -> HttpReply:
        return json_reply(self._document)


async def serve(
    service: Service,
    config: ApiSection,
    metrics: Metrics | None = None,
    *,
    task_status: AddressReport = trio.TASK_STATUS_IGNORED,
) -> None:
    """Listen where the configuration says and serve until cancelled; tells the address.

    ``metrics`` are the node's where other parts count into them too.

    Raises:
        ConfigError: the address cannot be listened on; names ``api.listen``. Or as ``api_tokens``.
        InvariantBroken: what a request found (within an exception group): the node must stop.
    """
    api = Api(service, config, api_tokens(config), metrics or Metrics(service))
    limits = HttpLimits()
    roomy = replace(limits, bodies_bytes=max(limits.bodies_bytes, 4 * config.max_body_bytes))
    await serve_http(api, config.listen, "api.listen", roomy, task_status=task_status)


def split_batch(body: bytes) -> list[bytes]:
    """The events of a batch.

    Raises:
        Rejected: ``MALFORMED`` when its frames do not end with it; ``OVERSIZED`` over ``MAX_BATCH_EVENTS``.
    """
    events: list[bytes] = []
    at = 0
    while at < len(body):
        if len(events) == MAX_BATCH_EVENTS:
            raise Rejected(Reason.OVERSIZED, f"a batch of more than {MAX_BATCH_EVENTS} events")
        start = at + FRAME_LENGTH_BYTES
        end = start + int.from_bytes(body[at:start], "big")
        if start > len(body) or end > len(body):
            raise Rejected(Reason.MALFORMED, f"frame {len(events)} of the batch ends after its {len(body)} bytes")
        events.append(body[start:end])
        at = end
    return events


def _id_of(encoded: bytes) -> str:
    """The id of a refused event, empty where its bytes say none."""
    try:
        return event_id(decode(unpack(encoded).entry, Entry, MAX_ENTRY_BYTES)).hex()
    except Rejected:
        return ""


def _grant_fields(grant: GrantStatus) -> dict[str, object]:
    return {
        "id": grant.id.hex(),
        "campaign": grant.campaign.hex(),
        "status": grant.state.value,
        "signers": list(grant.signers),
        "missing": list(grant.missing),
        "refusals": [
            {"member": refusal.member, "error": refusal.reason.value, "detail": refusal.detail}
            for refusal in grant.refusals
        ],
    }
