"""Checks the vectors of transitions: computes what each event does to the state, from the specification alone.

    python tests/vectors/check_transitions.py [FOLDER]

As ``check_vectors.py``, whose helpers it uses, without a line of the implementation. Effects are those of section 13,
whole; of its rules only those that the refused events of the vectors break, and what decides an effect.
"""

import json
import struct
import sys
from pathlib import Path

from check_vectors import check as same
from check_vectors import (
    convict_by_votes,
    examples_at,
    expect,
    key_of,
    member_id,
    name,
    pack,
    presented_indexes,
    refuse_if,
    state_root,
    tagged,
    total_of,
    tree,
    unpack,
    verify_bls,
)
from check_vectors import message as signed_message

RECORDS = {
    1: "policy since_ms count",
    2: "policy since_ms",
    3: "author claim registered_at_ms revoked_at_ms revocation",
    4: "operator campaign scheme not_before_ms expires_at_ms replaced",
    5: "event operator purpose base_root blocks manifest sampler_seed batch_size planned_steps routing_granularity"
    " event_granularity accumulator_window_steps sketch_rank custody base_losses_sha256",
    6: "job_key next_sequence next_grant next_audit attempt steps root last_event undo_root undo_counts"
    " rollback_required pending presented admitted refused refusal_events discarded_steps rollbacks open_findings"
    " closed release",
    7: "campaign policy job_key sources first_step last_step opened_at_ms closes_at_ms",
    8: "campaign source presented admitted refused discarded first_step last_step momentum",
    9: "event member offence epoch view recorded_at_ms",
    10: "epoch membership event since_ms",
    11: "last_epoch successor",
    12: "campaign event test steps parameter_root standing recorded_at_ms",
    13: "campaign event author subject outcome recorded_at_ms",
    14: "campaign event auditor first_step last_step matched challenge matching differing recorded_at_ms",
    15: "campaign event auditor number first_step last_step picks answer_by_ms epoch beacon_key barring answer standing"
    " recorded_at_ms",
    16: "campaign event custodian last_event recorded_at_ms",
}
"""The tables of section 12."""

POLICY = (
    "name licences purposes classes entropy_edges_milli memorization_threshold_permille routing_granularities"
    " event_granularities author_schemes required_metadata least_sketch_rank auditors custody maximum_grant_steps"
    " maximum_grant_duration_ms global_clipping revocation momentum rationale"
)
PORTIONS = {
    "policy": (POLICY, ""),
    "delegation": ("", "campaign job_key scheme not_before_ms expires_at_ms replaces head"),
    "campaign": (
        "",
        "name purpose policy job_key base_model base_root base_provenance parameter_blocks routing_granularity"
        " event_granularity sampler_seed batch_size planned_steps hyperparameters environment factors_digest"
        " accumulator_window_steps sketch_rank base_losses_sha256",
    ),
    "grant": ("policy first_step last_step closes_at_ms", "job_key"),
    "step": (
        "grant policy index profiles presented admitted refused global_clip_nano skipped",
        "index previous root_before root_after deltas optimizer_digest learning_rate_nano loss_micro rng_digest"
        " memorization accumulator_root flushed carried step_microseconds",
    ),
    "refusal": ("grant policy refused", "index"),
    "rollback": ("grant policy", "discarded reason restored_root next_index next_attempt memorization"),
    "abandon": ("", "reason"),
    "release": ("", "parameter_root steps file_name file_sha256"),
    "evidence": ("proof", ""),
    "membership": ("membership statement", ""),
    "evaluation": ("", "name steps parameter_root data script_name script_sha256 metrics"),
    "decision": ("subject outcome rationale", ""),
    "audit-challenge": ("number first_step last_step picks answer_by_ms statement", ""),
    "audit-result": (
        "first_step last_step matched differing end_root tolerance environment statement answer",
        "",
    ),
    "custody": ("last_event", ""),
}
"""The fields of the governance and operation portions, in wire order (section 8)."""

JOB_KINDS = ("campaign", "step", "refusal", "rollback", "evaluation", "abandon", "release")
ZERO = bytes(32)


def named(names: str, values: list) -> dict:
    return dict(zip(names.split(), values, strict=True))


def summed(counts: list, more: list, sign: int = 1) -> list:
    """Lists of (reason, count): sorted by reason, without zeros."""
    totals = {reason: count for reason, count in counts}
    for reason, count in more:
        totals[reason] = totals.get(reason, 0) + sign * count
    return [[reason, totals[reason]] for reason in sorted(totals) if totals[reason]]


class Event:
    """An event taken apart, its commitments compared with its portions."""

    def __init__(self, encoded: bytes) -> None:
        entry_bytes, portions = unpack(encoded)
        entry = unpack(entry_bytes)
        _, _, _, self.kind, self.author, self.campaign, self.sequence, self.attempt, *committed, signatures = entry
        self.id = tagged(name("event"), pack([*entry[:-1], []]))
        self.signers = [signer for signer, _ in signatures]
        data, governance, operation = unpack(portions)
        kind = self.kind.encode()
        self.items: list = []
        found = [b"", b"", b""]
        if data is not None:
            salt, items = data
            leaves = []
            for number, (content, listed) in enumerate(items):
                item_salt = tagged(name("salt"), salt, b"item", struct.pack(">Q", number))
                leaves.append(tagged(name("source-entry"), item_salt, content))
                self.items.append((unpack(content), listed))
            found[0] = tagged(name("portion"), kind, b"data-source", tree(leaves), struct.pack(">Q", len(items)))
        contents = []
        for place, role, held in ((1, b"governance", governance), (2, b"operator", operation)):
            contents.append(None if held is None else unpack(held[1]))
            if held is not None:
                found[place] = tagged(name("portion"), kind, role, *held)
        same(found, committed, f"commitments of a {self.kind}")
        names = PORTIONS.get(self.kind, ("", ""))
        self.governance, self.operation = (
            {} if content is None else named(held, content) for held, content in zip(names, contents, strict=True)
        )


class Log:
    """The state, and who takes part. ``put`` writes a whole record."""

    def __init__(self, genesis: bytes) -> None:
        self.genesis = unpack(genesis)
        self.chain_id = tagged(name("genesis"), genesis)
        self.epoch, self.members, self.groups = 0, self.genesis[6], self.genesis[8]
        self.state: dict[bytes, bytes] = {}

    def get(self, table: int, key: bytes, missing: str = "") -> dict | None:
        value = self.state.get(bytes([table]) + key)
        refuse_if(value is None and bool(missing), missing)
        return None if value is None else named(RECORDS[table], unpack(value))

    def put(self, table: int, key: bytes, **record: object) -> None:
        same(sorted(record), sorted(RECORDS[table].split()), f"fields of table {table}")
        self.state[bytes([table]) + key] = pack([record[field] for field in RECORDS[table].split()])

    def change(self, table: int, key: bytes, **fields: object) -> None:
        held = self.get(table, key)
        assert held is not None
        self.put(table, key, **{**held, **fields})

    def holder(self, member: bytes) -> bytes:
        """Who answers for what a member signed."""
        while (retired := self.get(11, member)) is not None and retired["successor"]:
            member = retired["successor"]
        return member

    def find(self, table: int, campaign: bytes, subject: bytes) -> dict | None:
        return self.get(table, review_key(campaign, subject))

    def admit(self, event: Event, now: int) -> None:
        """One event, at a ledger block's timestamp: all of it or nothing."""
        before = dict(self.state)
        try:
            if event.kind in JOB_KINDS[1:]:
                self.require_job(event)
            EFFECTS[event.kind](self, event, now)
        except BaseException:
            self.state = before
            raise

    def require_job(self, event: Event) -> None:
        """Rules 11 to 14, but for times, and the effect of each."""
        head = self.get(6, event.campaign, "unknown-campaign")
        refuse_if(bool(head["closed"]), "campaign-closed")
        refuse_if(event.signers != [head["job_key"]], "unknown-job-key")
        refuse_if(event.sequence < head["next_sequence"], "duplicate")
        refuse_if(event.sequence > head["next_sequence"], "sequence-gap")
        refuse_if(event.attempt != head["attempt"], "step-chain-broken")
        self.change(6, event.campaign, next_sequence=head["next_sequence"] + 1)

    def found_open(self, campaign: bytes, subject: bytes, stands_open: bool) -> None:
        """``subject`` is the last open finding, or none."""
        others = [held for held in self.get(6, campaign)["open_findings"] if held != subject]
        self.change(6, campaign, open_findings=[*others, subject] if stands_open else others)


def review_key(campaign: bytes, subject: bytes) -> bytes:
    return tagged(name("campaign"), campaign)[:16] + subject[:16]


def usage_key(campaign: bytes, source: bytes) -> bytes:
    return tagged(name("campaign"), campaign, source)


def policy(log: Log, event: Event, now: int) -> None:
    before = log.get(1, ZERO)
    log.put(2, event.id, policy=list(event.governance.values()), since_ms=now)
    log.put(1, ZERO, policy=event.id, since_ms=now, count=before["count"] + 1 if before else 1)


def source(log: Log, event: Event, now: int) -> None:
    claim = event.items[0][0]
    log.put(3, event.id, author=event.author, claim=claim, registered_at_ms=now, revoked_at_ms=0, revocation=b"")


def revocation(log: Log, event: Event, now: int) -> None:
    (revoked, _), _ = event.items[0]
    held = log.get(3, revoked, "unknown-source")
    refuse_if(log.holder(held["author"]) != event.author, "wrong-author")
    refuse_if(bool(held["revocation"]), "duplicate")
    log.change(3, revoked, revoked_at_ms=now, revocation=event.id)


def delegation(log: Log, event: Event, now: int) -> None:
    said = event.operation
    told = {field: said[field] for field in ("campaign", "scheme", "not_before_ms", "expires_at_ms")}
    log.put(4, said["job_key"], operator=event.author, replaced=False, **told)
    head = log.get(6, event.campaign)
    if head is not None:
        refuse_if((said["replaces"], said["head"]) != (head["job_key"], head["last_event"]), "step-chain-broken")
        log.change(4, head["job_key"], replaced=True)
        log.change(6, event.campaign, job_key=said["job_key"])


def campaign(log: Log, event: Event, now: int) -> None:
    said = event.operation
    in_force = named(POLICY, log.get(2, said["policy"], "unknown-policy")["policy"])
    shared = [field for field in RECORDS[5].split() if field in said]
    log.put(
        5,
        event.campaign,
        event=event.id,
        operator=event.author,
        blocks=[block for block, _ in said["parameter_blocks"]],
        manifest=[content for content, _ in event.items],
        custody=in_force["custody"] if said["accumulator_window_steps"] else [],
        **{field: said[field] for field in shared},
    )
    head: dict[str, object] = dict.fromkeys(RECORDS[6].split(), 0)
    head |= dict.fromkeys(("next_sequence", "next_grant", "next_audit"), 1)
    head |= {field: [] for field in ("undo_counts", "pending", "open_findings")}
    head |= {"undo_root": b"", "release": b"", "closed": "", "rollback_required": False}
    head |= {"job_key": said["job_key"], "root": said["base_root"], "last_event": event.id}
    log.put(6, event.campaign, **head)


def grant(log: Log, event: Event, now: int) -> None:
    head, terms = log.get(6, event.campaign, "unknown-campaign"), event.governance
    refuse_if(event.sequence > head["next_grant"], "sequence-gap")
    sources = [content[0] for content, _ in event.items]
    owners = {log.holder(log.get(3, each, "unknown-source")["author"]) for each in sources}
    roles = {member_id(member): member[1] for member in log.members}
    refuse_if(not owners <= set(event.signers), "missing-signature")
    surplus = set(event.signers) - owners - {event.author}
    refuse_if(any(roles[signer] != "governance" for signer in surplus), "surplus-signature")
    log.put(
        7,
        event.id,
        campaign=event.campaign,
        job_key=event.operation["job_key"],
        sources=sources,
        opened_at_ms=now,
        **terms,
    )
    log.change(6, event.campaign, next_grant=head["next_grant"] + 1)


def due(log: Log, event: Event, held: dict, momentum_word: str) -> list[bytes]:
    """The sources whose momentum a step with admitted examples settles (rule 34)."""
    found = []
    for listed in log.get(5, event.campaign)["manifest"]:
        usage, record = log.get(8, usage_key(event.campaign, listed[0])), log.get(3, listed[0])
        revoked = bool(record["revocation"]) and record["revoked_at_ms"] <= held["opened_at_ms"]
        unsettled = usage is not None and usage["admitted"] and usage["momentum"] not in ("flush", momentum_word)
        if listed[0] not in held["sources"] and revoked and unsettled:
            found.append(listed[0])
    return sorted(found)


def presented(log: Log, place: bytes, index: int) -> dict[bytes, list[int]]:
    """What the sampler presents to a step, by source."""
    opened = log.get(5, place)
    size = sum(count for _, _, count in opened["manifest"])
    indexes = presented_indexes(opened["sampler_seed"], size, opened["batch_size"], index)
    found: dict[bytes, list[int]] = {}
    for each, example in examples_at(opened["manifest"], indexes):
        same(log.get(3, each)["claim"][12], 0, "reserve")
        found.setdefault(each, []).append(example)
    return {each: sorted(examples) for each, examples in found.items()}


def require_conserved(log: Log, event: Event, pending: list) -> None:
    """Rules 29 to 31, where no source has a reserve."""
    accounted, refused = {}, {}
    totals: list = [0, 0, []]
    for (each, _, shown, admitted, counts, _), listed in event.items:
        accounted[each] = list(listed)
        refused[each] = counts
        refuse_if(shown != admitted + sum(count for _, count in counts), "counts-not-conserved")
        totals = [totals[0] + shown, totals[1] + admitted, summed(totals[2], counts)]
    for each, reason, examples in pending:
        refuse_if(each not in accounted, "counts-not-conserved")
        accounted[each] += examples
        refused[each] = summed(refused[each], [[reason, len(examples)]], -1)
    refuse_if(any(refused.values()), "counts-not-conserved")
    told = {each: sorted(examples) for each, examples in accounted.items()}
    refuse_if(told != presented(log, event.campaign, event.operation["index"]), "counts-not-conserved")
    refuse_if(
        totals != [event.governance[field] for field in ("presented", "admitted", "refused")], "counts-not-conserved"
    )


def step(log: Log, event: Event, now: int) -> None:
    said, terms, place = event.operation, event.governance, event.campaign
    head, held = log.get(6, place), log.get(7, terms["grant"], "unknown-grant")
    rules = named(POLICY, log.get(2, held["policy"])["policy"])
    refuse_if(head["rollback_required"], "rollback-required")
    refuse_if(said["index"] != head["steps"] + 1 or said["previous"] != head["last_event"], "step-chain-broken")
    refuse_if(said["root_before"] != head["root"], "parameter-root-broken")
    require_conserved(log, event, head["pending"])
    settled = due(log, event, held, rules["momentum"]) if terms["admitted"] else []
    told = {"flush": said["flushed"], "carry": [each for each, _ in said["carried"]]}
    refuse_if(told.pop(rules["momentum"]) != settled or any(told.values()), "momentum-unaccounted")
    undo = {}
    for each in settled:
        undo[each] = [each, 0, 0, [], log.get(8, usage_key(place, each))["momentum"]]
    for (each, _, shown, admitted, refused, _), listed in event.items:
        same(admitted, len(listed), "examples listed")
        key = usage_key(place, each)
        usage = log.get(8, key)
        if usage is None:
            usage = dict.fromkeys(RECORDS[8].split(), 0)
            usage |= {"campaign": place, "source": each, "refused": [], "first_step": said["index"], "momentum": ""}
        undo[each] = [each, shown, admitted, refused, usage["momentum"]]
        usage["presented"] += shown
        usage["admitted"] += admitted
        usage["refused"] = summed(usage["refused"], refused)
        usage["last_step"] = max(usage["last_step"], said["index"])
        usage["momentum"] = "" if admitted else usage["momentum"]
        log.put(8, key, **usage)
    for each in settled:
        log.change(8, usage_key(place, each), momentum=rules["momentum"])
    log.change(
        6,
        place,
        steps=said["index"],
        root=said["root_after"],
        last_event=event.id,
        undo_root=said["root_before"],
        undo_counts=[undo[each] for each in sorted(undo)],
        rollback_required=any(each[2] > rules["memorization_threshold_permille"] for each in said["memorization"]),
        pending=[],
        presented=head["presented"] + terms["presented"],
        admitted=head["admitted"] + terms["admitted"],
        refused=head["refused"] + sum(count for _, count in terms["refused"]),
    )


def refusal(log: Log, event: Event, now: int) -> None:
    head = log.get(6, event.campaign)
    refuse_if(head["rollback_required"], "rollback-required")
    pending = {(each, reason): examples for each, reason, examples in head["pending"]}
    for (each, reason, count, _), listed in event.items:
        same(count, len(listed), "examples listed")
        earlier = pending.get((each, reason), [])
        fresh = set(presented(log, event.campaign, event.operation["index"]).get(each, [])) - set(earlier)
        refuse_if(not set(listed) <= fresh, "counts-not-conserved")
        pending[each, reason] = sorted([*earlier, *listed])
    merged = [[each, reason, pending[each, reason]] for each, reason in sorted(pending)]
    log.change(6, event.campaign, pending=merged, refusal_events=head["refusal_events"] + 1)


def rollback(log: Log, event: Event, now: int) -> None:
    head, said = log.get(6, event.campaign), event.operation
    discarded = said["discarded"]
    refuse_if(said["next_attempt"] != head["attempt"] + 1, "step-chain-broken")
    refuse_if(len(set(discarded)) < len(discarded), "duplicate")
    undoes = head["last_event"] in discarded
    refuse_if(undoes and discarded[-1] != head["last_event"], "bad-field")
    refuse_if(head["rollback_required"] and not undoes, "rollback-required")
    refuse_if(undoes and not head["undo_root"], "nothing-to-roll-back")
    refuse_if(said["restored_root"] != (head["undo_root"] if undoes else head["root"]), "parameter-root-broken")
    refuse_if(said["next_index"] != head["steps"] + 1 - undoes, "step-chain-broken")
    totals = {field: head[field] for field in ("presented", "admitted", "refused")}
    for each, shown, admitted, refused, momentum_before in head["undo_counts"] if undoes else ():
        key = usage_key(event.campaign, each)
        usage = log.get(8, key)
        usage["presented"] -= shown
        usage["admitted"] -= admitted
        usage["refused"] = summed(usage["refused"], refused, -1)
        usage["discarded"] += admitted
        usage["momentum"] = momentum_before
        log.put(8, key, **usage)
        totals["presented"] -= shown
        totals["admitted"] -= admitted
        totals["refused"] -= sum(count for _, count in refused)
    log.change(
        6,
        event.campaign,
        attempt=said["next_attempt"],
        steps=said["next_index"] - 1,
        root=said["restored_root"],
        last_event=event.id,
        undo_root=b"",
        undo_counts=[],
        rollback_required=False,
        pending=[],
        discarded_steps=head["discarded_steps"] + len(discarded),
        rollbacks=head["rollbacks"] + 1,
        **totals,
    )


def abandon(log: Log, event: Event, now: int) -> None:
    log.change(6, event.campaign, closed="abandoned")


def release(log: Log, event: Event, now: int) -> None:
    head, said = log.get(6, event.campaign), event.operation
    refuse_if(head["rollback_required"], "rollback-required")
    refuse_if(bool(head["pending"]), "counts-not-conserved")
    refuse_if(bool(head["open_findings"]), "finding-open")
    refuse_if((said["parameter_root"], said["steps"]) != (head["root"], head["steps"]), "root-not-final")
    for role in log.get(5, event.campaign)["custody"]:
        words = [log.find(16, event.campaign, member_id(member)) for member in log.members if member[1] == role]
        kept = any(word is not None and word["last_event"] == head["last_event"] for word in words)
        refuse_if(not kept, "custody-missing")
    log.change(6, event.campaign, closed="released", release=event.id)


def evidence(log: Log, event: Event, now: int) -> None:
    kind, first, second = event.governance["proof"]
    same(kind, "vote-evidence", "proof")
    member, offence, epoch, view = convict_by_votes(log.genesis, log.chain_id, first, second)
    key = tagged(name("evidence"), member, struct.pack(">Q", epoch), offence.encode())
    refuse_if(log.get(9, key) is not None, "duplicate")
    log.put(9, key, event=event.id, member=member, offence=offence, epoch=epoch, view=view, recorded_at_ms=now)


def membership(log: Log, event: Event, now: int) -> None:
    following = event.governance["membership"]
    _, epoch, members, _, groups = following
    old, new = ({member_id(each): (each[0], each[1]) for each in held} for held in (log.members, members))
    joins = {place: member for member, place in new.items() if member not in old}
    for member in old.keys() - new.keys():
        log.put(11, member, last_epoch=log.epoch, successor=joins.get(old[member], b""))
    digest = tagged(name("membership"), log.chain_id, pack(following))
    log.put(10, ZERO, epoch=epoch, membership=digest, event=event.id, since_ms=now)
    log.epoch, log.members, log.groups = epoch, members, groups


def put_review(log: Log, table: int, event: Event, now: int, **said: object) -> None:
    """A record of what somebody says about a campaign, under the event that says it."""
    key = review_key(event.campaign, event.id)
    log.put(table, key, campaign=event.campaign, event=event.id, recorded_at_ms=now, **said)


def evaluation(log: Log, event: Event, now: int) -> None:
    head, said = log.get(6, event.campaign), event.operation
    refuse_if((said["parameter_root"], said["steps"]) != (head["root"], head["steps"]), "root-not-final")
    blank = [[metric[0], 0, 0, 0, *metric[4:]] for metric in said["metrics"]]
    test = tagged(
        name("evaluation"),
        pack([said["name"], 0, ZERO, said["data"], said["script_name"], said["script_sha256"], blank]),
    )
    for finding in head["open_findings"]:
        held = log.find(12, event.campaign, finding)
        if held is not None and (held["test"], held["standing"]) == (test, "unmet"):
            log.change(12, review_key(event.campaign, finding), standing="superseded")
            log.found_open(event.campaign, finding, False)
    met = True
    for _, _, low, high, _, _, threshold in said["metrics"]:
        if threshold is not None:
            side, bound = threshold
            met = met and (low >= bound if side == "at-least" else high <= bound)
    put_review(
        log,
        12,
        event,
        now,
        test=test,
        steps=said["steps"],
        parameter_root=said["parameter_root"],
        standing="met" if met else "unmet",
    )
    log.found_open(event.campaign, event.id, not met)


def decision(log: Log, event: Event, now: int) -> None:
    said = event.governance
    subject, outcome = said["subject"], said["outcome"]
    if outcome != "note":
        table = next(table for table in (12, 15) if log.find(table, event.campaign, subject) is not None)
        log.change(table, review_key(event.campaign, subject), standing=f"{outcome}ed")
        log.found_open(event.campaign, subject, outcome == "reject")
    put_review(
        log,
        13,
        event,
        now,
        author=event.author,
        subject=subject,
        outcome=outcome,
    )


def audit_challenge(log: Log, event: Event, now: int) -> None:
    head, said = log.get(6, event.campaign, "unknown-campaign"), event.governance
    refuse_if(said["number"] < head["next_audit"], "duplicate")
    refuse_if(said["number"] > head["next_audit"], "sequence-gap")
    rules = named(POLICY, log.get(2, log.get(1, ZERO)["policy"])["policy"])
    barring = bool(rules["auditors"])
    told = {field: said[field] for field in ("number", "first_step", "last_step", "picks", "answer_by_ms")}
    put_review(
        log,
        15,
        event,
        now,
        auditor=event.author,
        epoch=log.epoch,
        beacon_key=bytes(total_of([key_of(group[2]) for group in log.groups])),
        barring=barring,
        answer=b"",
        standing="open",
        **told,
    )
    log.change(6, event.campaign, next_audit=head["next_audit"] + 1)
    log.found_open(event.campaign, event.id, barring)


def audit_result(log: Log, event: Event, now: int) -> None:
    said = event.governance
    challenge, matching, differing = b"", [], []
    if said["answer"] is not None:
        challenge, beacon, picked = said["answer"]
        key = review_key(event.campaign, challenge)
        held = log.get(15, key, "not-found")
        refuse_if(bool(held["answer"]), "duplicate")
        numbers = struct.pack(">Q", held["epoch"]), struct.pack(">Q", held["number"])
        signed = signed_message(name("beacon"), log.chain_id, numbers[0], event.campaign, numbers[1])
        verify_bls(key_of(held["beacon_key"]), signed, beacon, "bad-signature")
        matching = [number for number, differs in picked if not differs]
        differing = [number for number, differs in picked if differs]
        standing = held["standing"]
        if standing == "open":
            standing = "differed" if differing else "passed"
        log.change(15, key, answer=event.id, standing=standing)
        bars = standing == "rejected" or (held["barring"] and standing in ("open", "differed"))
        log.found_open(event.campaign, challenge, bars)
    put_review(
        log,
        14,
        event,
        now,
        auditor=event.author,
        first_step=said["first_step"],
        last_step=said["last_step"],
        matched=said["matched"],
        challenge=challenge,
        matching=matching,
        differing=differing,
    )


def custody(log: Log, event: Event, now: int) -> None:
    last = event.governance["last_event"]
    refuse_if(last != log.get(6, event.campaign, "unknown-campaign")["last_event"], "step-chain-broken")
    held = log.find(16, event.campaign, event.author)
    refuse_if(held is not None and held["last_event"] == last, "duplicate")
    log.put(
        16,
        review_key(event.campaign, event.author),
        campaign=event.campaign,
        event=event.id,
        custodian=event.author,
        last_event=last,
        recorded_at_ms=now,
    )


EFFECTS = {
    "policy": policy,
    "source": source,
    "revocation": revocation,
    "delegation": delegation,
    "campaign": campaign,
    "grant": grant,
    "step": step,
    "refusal": refusal,
    "rollback": rollback,
    "abandon": abandon,
    "release": release,
    "evidence": evidence,
    "membership": membership,
    "evaluation": evaluation,
    "decision": decision,
    "audit-challenge": audit_challenge,
    "audit-result": audit_result,
    "custody": custody,
}


def compare(key: bytes, found: bytes | None, told: bytes | None, what: str) -> None:
    """Field by field, so that the one that differs is named."""
    records = [{} if held is None else named(RECORDS[key[0]], unpack(held)) for held in (found, told)]
    for field in RECORDS[key[0]].split():
        same(records[0].get(field), records[1].get(field), f"{what}, {field} in table {key[0]}")


def check_story(case: dict) -> int:
    """Every ledger block of a story; returns how many events it took, or refused."""
    log = Log(bytes.fromhex(case["genesis"]))
    total = 0

    def judge(trial: dict) -> None:
        state = dict(log.state)
        try:
            for encoded in (*trial["before"], trial["event"]):
                log.admit(Event(bytes.fromhex(encoded)), trial["timestamp_ms"])
        finally:
            log.state = state

    for number, block in enumerate(case["blocks"], 1):
        what = f"{case['what']}, ledger block {number}"
        for trial in block["refused"]:
            expect(judge, {**trial, "what": f"{what}, {trial['what']}"})
        before = dict(log.state)
        for encoded in block["events"]:
            log.admit(Event(bytes.fromhex(encoded)), block["timestamp_ms"])
        changed = {key: value for key, value in log.state.items() if before.get(key) != value}
        written = {bytes.fromhex(key): bytes.fromhex(value) for key, value in block["changed"]}
        told = {key: value for key, value in written.items() if before.get(key) != value}
        for key in sorted(told.keys() | changed.keys()):
            compare(key, changed.get(key), told.get(key), what)
        same(state_root(sorted(log.state.items())).hex(), block["state_root"], f"{what}, state root")
        total += len(block["events"]) + len(block["refused"])
    return total


def main(folder: str | Path = Path(__file__).parent) -> None:
    cases = json.loads(Path(folder, "transitions.json").read_text(encoding="ascii"))
    print(f"{sum(check_story(case) for case in cases)} events do what the vectors say")


if __name__ == "__main__":
    main(*sys.argv[1:])
