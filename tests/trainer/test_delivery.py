"""Delivery against a real HTTP server: order, retries of what may pass, and the end at what may not."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from fake_node import FakeNode, endless_node, running_node

from consensus.event import CheckedEvent
from consensus.rejection import InvariantBroken, Reason, Rejected
from trainer_client.calls import Retries
from trainer_client.delivery import DROPS_WHILE_THE_LOG_GREW, Delivery
from trainer_client.outbox import Outbox, State
from trainer_client.submit import Client


@dataclass
class Clock:
    """Delivery's, turned by hand."""

    seconds: float = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def node() -> Iterator[FakeNode]:
    with running_node() as running:
        yield running


@pytest.fixture
def events() -> list[tuple[bytes, bytes]]:
    """Three sources as another node of the same chain logged them: ids and wire forms."""
    elsewhere = FakeNode()
    identifiers = [elsewhere.source(f"source {number}", [b"example"]) for number in range(3)]
    return [(each, elsewhere.answer("GET", f"/v1/events/{each.hex()}/raw", b"")[1]) for each in identifiers]


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    with Outbox(tmp_path / "outbox.sqlite") as opened:
        yield opened


@pytest.fixture
def delivery(node: FakeNode, outbox: Outbox, clock: Clock) -> Iterator[Delivery]:
    with Client(node.url, retries=Retries(1, 0.01, 0.01)) as client:
        made = Delivery(outbox, client, retryable_limit_seconds=60.0, monotonic=clock)
        yield made
        made.stop()


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_events_reach_the_log_in_order(
    node: FakeNode, outbox: Outbox, delivery: Delivery, events: list[tuple[bytes, bytes]]
) -> None:
    outbox.put(events)
    delivery.start()
    assert outbox.wait_settled(events[-1][0], 60).state is State.FINAL
    assert [event.id for event in node.order] == [identifier for identifier, _ in events]
    assert delivery.failure is None


def test_event_already_on_the_log_counts_as_delivered(
    node: FakeNode, outbox: Outbox, delivery: Delivery, events: list[tuple[bytes, bytes]]
) -> None:
    node.take(events[0][1])
    refused = {"id": events[0][0].hex(), "status": "rejected", "error": "duplicate"}
    node.answers = [(200, {}, json.dumps({"results": [refused]}).encode())]
    outbox.put(events[:1])
    delivery.start()
    assert outbox.wait_settled(events[0][0], 60).state is State.FINAL


def test_refusal_that_may_pass_is_tried_again(
    node: FakeNode, outbox: Outbox, delivery: Delivery, events: list[tuple[bytes, bytes]]
) -> None:
    times = 0

    def twice(event: CheckedEvent) -> Rejected | None:
        nonlocal times
        times += 1
        return Rejected(Reason.UNKNOWN_GRANT, "not here yet") if times <= 2 else None

    node.refuse_step = twice
    outbox.put(events[:1])
    delivery.start()
    assert outbox.wait_settled(events[0][0], 60).state is State.FINAL
    assert times > 2


def test_refusal_that_does_not_pass_in_time_is_a_failure(
    node: FakeNode, outbox: Outbox, delivery: Delivery, clock: Clock, events: list[tuple[bytes, bytes]]
) -> None:
    def half_a_minute_later(event: CheckedEvent) -> Rejected:
        clock.seconds += 30.0
        return Rejected(Reason.UNKNOWN_GRANT, "never")

    node.refuse_step = half_a_minute_later
    outbox.put(events)
    delivery.start()
    eventually(lambda: delivery.failure is not None)
    assert delivery.failure is not None
    assert (delivery.failure.id, delivery.failure.reason) == (events[0][0], "unknown-grant")


def test_overloaded_node_is_waited_for_without_a_limit_and_asked_by_one_event_after_growing_pauses(
    node: FakeNode,
    outbox: Outbox,
    delivery: Delivery,
    clock: Clock,
    events: list[tuple[bytes, bytes]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked: list[bytes] = []

    def full(event: CheckedEvent) -> Rejected:
        asked.append(event.id)
        return Rejected(Reason.OVERLOADED, "no room")

    node.refuse_step = full
    outbox.put(events)
    batches: list[tuple[float, int]] = []
    while clock.seconds < 200.0:
        assert not delivery._round()
        if asked:
            batches.append((clock.seconds, len(asked)))
            asked.clear()
        clock.seconds += 0.125
    assert [size for _, size in batches] == [3] + [1] * (len(batches) - 1)
    pauses = [later - earlier for (earlier, _), (later, _) in pairwise(batches)]
    assert pauses == sorted(pauses)
    assert pauses[0] < 1.0 < pauses[-1] < 10.0
    assert delivery.failure is None
    assert [fate.state for fate in outbox.unsettled()] == [State.QUEUED] * 3
    assert [record.getMessage() for record in caplog.records].count(
        "the node asks to slow down, events wait in the outbox: no room"
    ) == 1

    clock.seconds += 10.0
    node.refuse_step = lambda event: None
    assert delivery._round()
    assert outbox.unsettled()[0].id == events[1][0]
    assert delivery._round()
    assert outbox.unsettled() == ()
    assert [event.id for event in node.order] == [identifier for identifier, _ in events]


def test_time_of_an_overloaded_node_is_none_of_a_refusal_that_may_pass(
    node: FakeNode, outbox: Outbox, delivery: Delivery, clock: Clock, events: list[tuple[bytes, bytes]]
) -> None:
    outbox.put(events[:1])
    for reason in (Reason.UNKNOWN_GRANT, Reason.OVERLOADED, Reason.UNKNOWN_GRANT):
        node.refuse_step = lambda event, reason=reason: Rejected(reason, "")  # type: ignore[misc]
        assert not delivery._round()
        clock.seconds += 70.0
    assert delivery.failure is None
    assert not delivery._round()
    assert delivery.failure is not None


def test_what_a_node_drops_while_nothing_becomes_final_is_sent_again_however_often(
    node: FakeNode, outbox: Outbox, delivery: Delivery, events: list[tuple[bytes, bytes]]
) -> None:
    node.hold = True
    outbox.put(events)
    for _ in range(3 * DROPS_WHILE_THE_LOG_GREW):
        delivery._round()
        assert [fate.state for fate in outbox.unsettled()] == [State.ACCEPTED] * 3
        node.drop_pending()
        assert delivery._round()
    assert delivery.failure is None
    node.release_held()
    eventually(lambda: not delivery._round() and outbox.unsettled() == ())
    assert [event.id for event in node.order] == [identifier for identifier, _ in events]


def test_event_that_never_gets_on_a_log_that_grows_is_a_failure_in_the_end(
    node: FakeNode, outbox: Outbox, delivery: Delivery, events: list[tuple[bytes, bytes]]
) -> None:
    outbox.put(events[:1])
    drops = 0
    while delivery.failure is None:
        node.hold = True
        delivery._round()
        node.drop_pending()
        drops += 1
        node.hold = False
        node.source(f"another {drops}", [b"example"])
        assert delivery._round()
        assert drops < 100
    assert drops > DROPS_WHILE_THE_LOG_GREW
    assert delivery.failure.reason == "sequence-gap"


def test_events_dropped_before_a_refused_one_are_settled_before_that_is_told(
    node: FakeNode, outbox: Outbox, delivery: Delivery, events: list[tuple[bytes, bytes]]
) -> None:
    node.hold = True
    node.refuse_step = lambda event: Rejected(Reason.BAD_FIELD, "no") if event.id == events[1][0] else None
    outbox.put(events)
    delivery._round()
    assert [fate.state for fate in outbox.unsettled()] == [State.ACCEPTED, State.QUEUED]
    node.drop_pending()
    assert delivery._follow()
    assert delivery.failure is None
    delivery._round()
    assert [fate.state for fate in outbox.unsettled()] == [State.ACCEPTED, State.QUEUED]
    node.release_held()
    delivery._round()
    assert delivery.failure is not None
    assert delivery.failure.id == events[1][0]
    assert [event.id for event in node.order] == [events[0][0]]


def test_delivery_outlives_a_full_disk(
    node: FakeNode,
    outbox: Outbox,
    delivery: Delivery,
    events: list[tuple[bytes, bytes]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    node.refuse_step = lambda event: Rejected(Reason.BAD_FIELD, "long" * 10_000)
    outbox.put(events)
    with outbox._changed:
        pages = outbox._connection.execute("PRAGMA page_count").fetchone()[0]
        outbox._connection.execute(f"PRAGMA max_page_count = {pages}")
    delivery.start()
    eventually(lambda: len(node.requests) > 2)
    assert delivery.failure is None
    assert [fate.state for fate in outbox.unsettled()] == [State.QUEUED] * 3
    assert sum("waits for room on the disk" in record.getMessage() for record in caplog.records) == 1
    with outbox._changed:
        outbox._connection.execute("PRAGMA max_page_count = 1000000")
    eventually(lambda: delivery.failure is not None)
    node.refuse_step = lambda event: None
    delivery.resume()
    assert outbox.wait_settled(events[2][0], 60).state is State.FINAL


def test_what_ends_the_delivery_reaches_the_job(
    outbox: Outbox, delivery: Delivery, events: list[tuple[bytes, bytes]]
) -> None:
    outbox.put(events)
    outbox._connection.close()
    delivery.start()
    delivery._thread.join(60)
    with pytest.raises(InvariantBroken, match="ProgrammingError"):
        _ = delivery.failure


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (200, {"Content-Encoding": "gzip"}, b"<html>no gzip</html>"),
        (503, {"Content-Encoding": "gzip"}, b"<html>no gzip</html>"),
        (200, {}, b'{"more": ' + b"[" * 200_000),
        (502, {}, b'{"more": ' + b"[" * 200_000),
        (200, {}, b'{"results": [{"id": "00", "status": "rejected", "error": "bad-field", "detail": "\\ud800"}]}'),
    ],
)
def test_answer_that_no_node_gives_does_not_end_the_delivery(
    node: FakeNode,
    outbox: Outbox,
    delivery: Delivery,
    events: list[tuple[bytes, bytes]],
    status: int,
    headers: dict[str, str],
    body: bytes,
) -> None:
    node.answers = [(status, headers, body)] * 2
    outbox.put(events[:1])
    delivery.start()
    assert outbox.wait_settled(events[0][0], 60).state is State.FINAL
    assert delivery.failure is None


@pytest.mark.parametrize("answer", ["silence", "header", "drip"])
def test_delivery_ends_at_once_while_an_answer_does_not(
    outbox: Outbox, events: list[tuple[bytes, bytes]], answer: str, caplog: pytest.LogCaptureFixture
) -> None:
    outbox.put(events)
    with endless_node(answer) as url, Client(url) as client:
        delivery = Delivery(outbox, client)
        delivery.start()
        time.sleep(0.3)
        started = time.monotonic()
        delivery.stop()
        assert time.monotonic() - started < 20
        assert delivery.failure is None
    assert not caplog.records
    assert len(outbox.unsettled()) == 3


def test_delivery_ends_at_once_while_it_waits_as_long_as_a_node_wishes(
    node: FakeNode, outbox: Outbox, events: list[tuple[bytes, bytes]]
) -> None:
    node.answers = [(503, {"Retry-After": "60"}, b"")] * 2
    outbox.put(events)
    with Client(node.url) as client:
        delivery = Delivery(outbox, client)
        delivery.start()
        eventually(lambda: bool(node.requests))
        started = time.monotonic()
        delivery.stop()
        assert time.monotonic() - started < 20
        assert delivery.failure is None
        node.answers = []
        assert client.checkpoint()


@pytest.fixture
def narrow(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How large the batches were that a node which takes 900 bytes at once was sent; an event has 411."""
    sizes: list[int] = []
    answer = node.answer

    def refuse_large(method: str, target: str, body: bytes) -> tuple[int, bytes]:
        if method == "POST":
            sizes.append(len(body))
            if len(body) > 900:
                return 413, b"<html>Request Entity Too Large</html>"
        return answer(method, target, body)

    monkeypatch.setattr(node, "answer", refuse_large)
    return sizes


def test_batch_too_large_for_the_node_is_halved_until_it_fits_and_stays_so(
    node: FakeNode, outbox: Outbox, delivery: Delivery, events: list[tuple[bytes, bytes]], narrow: list[int]
) -> None:
    outbox.put(events)
    delivery.start()
    assert outbox.wait_settled(events[2][0], 60).state is State.FINAL
    assert [event.id for event in node.order] == [identifier for identifier, _ in events]
    assert [size > 900 for size in narrow] == [True, False, False, False]


def test_single_event_too_large_for_the_node_is_refused_by_name(
    outbox: Outbox, delivery: Delivery, events: list[tuple[bytes, bytes]], narrow: list[int]
) -> None:
    large = (bytes(32), bytes(1_000))
    outbox.put([events[0], large, events[1]])
    delivery.start()
    eventually(lambda: delivery.failure is not None)
    assert delivery.failure is not None
    assert (delivery.failure.id, delivery.failure.reason) == (large[0], "oversized")
    assert "Too Large" in delivery.failure.detail
    assert len(narrow) == 3


def test_nothing_is_sent_behind_a_refused_event_until_told_to(
    node: FakeNode, outbox: Outbox, delivery: Delivery, events: list[tuple[bytes, bytes]]
) -> None:
    node.refuse_step = lambda event: Rejected(Reason.BAD_FIELD, "no") if event.id == events[0][0] else None
    outbox.put(events[:1])
    delivery.start()
    eventually(lambda: delivery.failure is not None)
    outbox.put(events[1:])
    assert not delivery._round()
    assert node.order == []
    delivery.resume()
    assert outbox.wait_settled(events[2][0], 60).state is State.FINAL


def test_event_rejected_after_it_was_accepted_is_a_failure_once_those_before_it_are_settled(
    node: FakeNode, outbox: Outbox, delivery: Delivery, events: list[tuple[bytes, bytes]]
) -> None:
    node.hold = True
    outbox.put(events)
    delivery.start()
    eventually(lambda: all(fate.state is State.ACCEPTED for fate in outbox.unsettled()))
    with node.lock:
        node.pending.pop(events[1][0])
        node.rejected[events[1][0]] = Rejected(Reason.OUTSIDE_GRANT, "late")
        held_back = node.pending.pop(events[2][0])
    node.release_held()
    eventually(lambda: delivery.failure is not None)
    with node.lock:
        node.pending[events[2][0]] = held_back
    first = outbox.fate(events[0][0])
    assert first is not None
    assert first.state is State.FINAL
    assert delivery.failure is not None
    assert delivery.failure.reason == "outside-grant"
