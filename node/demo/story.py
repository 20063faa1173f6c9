"""The demonstration, act by act. Each act is a method; what it finds out goes into ``RunFacts`` at the end.

Nothing is asserted here that was not read from a node, from the job's summary or from ``countersign verify``.
"""

import json
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from math import gcd
from pathlib import Path

from consensus.identifiers import VOTING_ROLES
from consensus.predicates import Predicate
from consensus.rejection import Unavailable
from node.demo.claiming import show_policy, show_sources
from node.demo.closing import Seen, closing_rows, gather, recalled, reserve_of
from node.demo.consortium import (
    COUNCIL,
    GUILD,
    LABORATORY,
    LIBRARY,
    PRESS,
    Claims,
    Consortium,
    Node,
    NodeAnswer,
    found,
    read_corpus,
)
from node.demo.deciding import Deciding, named
from node.demo.directory import prepare
from node.demo.display import NO, OK, Display, safe
from node.demo.facts import (
    CheckFacts,
    CustodyFacts,
    Moment,
    PartyFacts,
    RecallFacts,
    ReplayFacts,
    RunFacts,
    SurveyFacts,
    TraceFacts,
    TracingFacts,
    summary_of,
)
from node.demo.keeping import Keeping
from node.demo.processes import Processes, ProcessFailed
from node.demo.proof import bundle_path, check, export, questions
from node.demo.replaying import Replays
from node.demo.report import render
from node.demo.tracing import trace
from node.demo.training import CHECK_MEMORIZATION_EVERY_STEPS, JobSummary, Training, TrainingOptions
from node.files import DirectoryLock

REPLICATION_SECONDS = 30.0
EXPORT_SECONDS = 30.0
LEAST_GRANT_STEPS = 8
GRANTS_PER_RUN = 6

COLOURS = {
    "refusal": "yellow",
    "rollback": "red",
    "revocation": "magenta",
    "killed": "bold blue",
    "back": "blue",
    "grant": "dim",
    "finding": "red",
    "decision": "bold yellow",
    "custody": "cyan",
    "claim": "dim",
}


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for."""

    directory: Path
    keep: bool
    training: TrainingOptions


class Story:
    """One run. ``tell`` it once, inside the ``Processes`` it was given."""

    def __init__(self, options: Options, display: Display, processes: Processes) -> None:
        self._options = options
        self._display = display
        self._processes = processes
        self._started = time.monotonic()
        self._started_at = datetime.now(UTC)
        self._moments: list[Moment] = []
        self._lock: DirectoryLock | None = None

    def tell(self) -> tuple[RunFacts, Consortium]:
        """All acts up to the report.

        Raises:
            CountersignError: whatever went wrong, with the log to look at.
        """
        self._display.title("Countersign", "one fine-tune, five nodes; nobody is asked to trust anybody else")
        consortium = self._found()
        self._start(consortium)
        claims = self._claim(consortium)
        training = self._training(consortium, claims)
        job = self._train(training)
        survey, custody = self._release(consortium, claims, training, job)
        recall = recalled(claims, job)
        replays = Replays(training)
        replay = self._replay(replays, claims, recall)
        parties = self._replicated(consortium)
        checks = self._prove(consortium, claims, job)
        tracing = self._trace(training, replays, replay, recall)
        seen = Seen(
            self._started_at,
            self._seconds(),
            tuple(self._moments),
            parties,
            checks,
            recall,
            survey,
            custody,
            replay,
            tracing,
            training.release_file,
            training.base_losses,
        )
        facts = self._report(consortium, claims, job, seen)
        return facts, consortium

    # Acts

    def _found(self) -> Consortium:
        display = self._display
        directory = self._options.directory
        display.act(1, "Consortium", "five parties, each with its own keys and files")
        if prepare(directory, self._options.keep):
            display.line(f"[dim]an earlier demo run in {safe(str(directory))} was replaced[/]")
        with display.waiting("distributed key generation"):
            consortium = found(directory, self._processes)
        self._lock = DirectoryLock.acquire(directory)
        display.table(
            ("member", "role", "", "files"),
            [
                (
                    f"[bold]{node.name}[/]",
                    node.role.value,
                    "votes" if node.role in VOTING_ROLES else "replicates and checks",
                    f"[dim]{safe(str(node.files.directory))}/[/]",
                )
                for node in consortium.nodes.values()
            ],
        )
        display.line()
        display.done("group keys from a distributed key generation: nobody ever held a role's secret")
        display.done(f"chain id [bold]{consortium.chain_id.hex()}[/] is all that a verifier pins")
        tolerances = consortium.committee.tolerances()
        display.line()
        display.table(
            ("role", "members", "needed", "one history despite", "no invalid event despite", "goes on despite"),
            [
                (
                    tolerance.role.value,
                    str(tolerance.members),
                    str(tolerance.threshold),
                    f"{tolerance.agreement} traitors",
                    f"{tolerance.validity} traitors",
                    f"{tolerance.liveness} silent",
                )
                for tolerance in tolerances
            ],
            right=(1, 2),
        )
        display.line("[dim]one honest role is enough: history forks only if every role has more traitors than that;[/]")
        display.line("[dim]the log waits as soon as one role has more silent members (here: any voter that is down)[/]")
        self._remember(Moment("consortium", self._seconds(), None, "five members founded a chain by key generation"))
        return consortium

    def _start(self, consortium: Consortium) -> None:
        display = self._display
        display.act(2, "Nodes", "five processes, libp2p between them, RocksDB under each")

        def up(node: Node, answer: NodeAnswer) -> None:
            assert node.child is not None
            display.done(
                f"{node.name:<11} pid {node.child.process_id:<7} {node.url}  [dim]{len(answer.peers_connected)} peers, "
                f"log {safe(str(node.log))}[/]"
            )

        with display.waiting("starting"):
            consortium.start(up)
        self._remember(Moment("consortium", self._seconds(), None, "all five nodes are connected to each other"))

    def _claim(self, consortium: Consortium) -> Claims:
        display = self._display
        display.act(3, "Claims", "what each party signs before anything is trained")
        command = [sys.executable, "-P", "-m", "trainer_client.demo.export"]
        command += ["--library", LIBRARY, "--press", PRESS, "--out", str(self._options.directory)]
        with display.waiting("writing the sources' texts"):
            log = self._options.directory / "export.log"
            self._processes.check_run("the export of the sources", command, log, EXPORT_SECONDS)
        corpus = read_corpus(self._options.directory)
        with display.waiting("signing"):
            policy, policy_event = consortium.sign_policy(self._grant_steps())
            signed = tuple(consortium.sign_source(source, corpus.example_bytes) for source in corpus.sources)
        show_sources(display, corpus, signed)
        show_policy(display, policy, policy_event)
        access = consortium.delegate()
        display.done(f"{LABORATORY} delegated a job key for one campaign and one hour")
        self._remember(
            Moment(
                "claim",
                self._seconds(),
                None,
                f"{len(signed)} sources, the policy and a job key are on the log, each signed by its owner",
            )
        )
        return Claims(corpus, signed, policy, policy_event, access)

    def _training(self, consortium: Consortium, claims: Claims) -> Training:
        training = Training(
            consortium=consortium,
            processes=self._processes,
            display=self._display,
            tell=self._show,
            clock=self._seconds,
            sources=claims.sources,
            revoked=claims.source(claims.corpus.revoked),
            access=claims.access,
            options=self._options.training,
            decide=lambda finding, step: self._deciding(consortium, claims, training).decide(finding, step),
            hand_over=lambda step: self._keeping(consortium, training).hand_over(step),
        )
        return training

    def _deciding(self, consortium: Consortium, claims: Claims, training: Training) -> Deciding:
        return Deciding(consortium, self._processes, claims, training.manifest, self._show, self._seconds)

    def _keeping(self, consortium: Consortium, training: Training) -> Keeping:
        campaign, folder = training.access.campaign, training.accumulators
        return Keeping(consortium, self._processes, campaign, folder, self._show, self._seconds)

    def _train(self, training: Training) -> JobSummary:
        steps = self._options.training.steps
        self._display.act(4, "Fine-tune", f"{steps} steps; depth profiles are enforced inside the backward pass")
        job = training.run()
        view = training.view
        if view.losses:
            self._display.done(f"loss {view.losses[0]:.2f} → {view.losses[-1]:.2f} nats per byte")
        self._display.done(
            f"governance cost {job.step_overhead_percent:.1f} % on top of training time; "
            f"the job stood still for {job.paused_seconds:.1f} s"
        )
        return job

    def _release(
        self, consortium: Consortium, claims: Claims, training: Training, job: JobSummary
    ) -> tuple[SurveyFacts, CustodyFacts]:
        self._display.act(5, "Release", "the weights, bound to the recorded steps")
        with self._display.waiting("countersign campaign recited"):
            survey = self._deciding(consortium, claims, training).survey()
        text = f"{survey.examples} examples were surveyed, the strongest is recited at {survey.highest_permille} ‰"
        if survey.recited:
            self._display.done(f"{text}: {safe(named(survey.recited))}, released by {COUNCIL}'s decision on the log")
        else:
            self._display.done(f"{text}; none above the policy's {survey.threshold_permille} ‰")
        reserve, custody = reserve_of(job), training.custody
        self._display.done(
            f"held against the sources' reserves: of {reserve.texts} texts that no step trained on, the check takes "
            f"{reserve.taken_for_recited} for recited"
        )
        if custody is None:
            raise ProcessFailed("the campaign was released, and nobody holds its sums and sketches")
        self._display.done(
            f"{custody.custodian} holds the sums and sketches of all {custody.windows} windows, by its word on the log"
        )
        answer = consortium.nodes[GUILD].client.event(job.release, 30.0)
        self._display.done(f"{safe(str(training.release_file))}, {training.release_file.stat().st_size / 1e6:.1f} MB")
        self._display.done(f"release event {job.release[:16]}… is final in ledger block {answer.height}")
        text = f"the final weights are released, bound by event {job.release[:16]}…"
        self._remember(Moment("release", self._seconds(), None, text))
        return survey, custody

    def _replicated(self, consortium: Consortium) -> tuple[PartyFacts, ...]:
        """Where all nodes stand, once they stand at one height; else where they stood last."""
        self._display.act(7, "Proof", f"{GUILD}, the rights-holder, has checked everything itself; now it shows it")
        deadline = time.monotonic() + REPLICATION_SECONDS
        with self._display.waiting("comparing the nodes"):
            while True:
                answers = {name: node.status() for name, node in consortium.nodes.items()}
                known = {name: answer for name, answer in answers.items() if answer is not None}
                if len(known) == len(answers) and len({answer.height for answer in known.values()}) == 1:
                    break
                if time.monotonic() > deadline:
                    heights = ", ".join(f"{name} {answer.height}" for name, answer in known.items())
                    raise Unavailable(f"the nodes do not stand at one height: {heights}")
                consortium.check()
                time.sleep(0.05)
        parties = tuple(
            PartyFacts(
                name,
                consortium.nodes[name].role.value,
                consortium.nodes[name].role in VOTING_ROLES,
                answer.height,
                answer.log_root,
                answer.state_root,
            )
            for name, answer in known.items()
        )
        same = len({(party.log_root, party.state_root) for party in parties}) == 1
        sentence = (
            f"{len(parties)} nodes at ledger block {parties[0].height}: "
            f"{'the same' if same else '[red]different[/]'} log root {parties[0].log_root[:16]}… and state root "
            f"{parties[0].state_root[:16]}…"
        )
        self._display.line(f"{OK if same else NO} {sentence}")
        self._display.line()
        return parties

    def _prove(self, consortium: Consortium, claims: Claims, job: JobSummary) -> tuple[CheckFacts, ...]:
        revoked, refused = claims.source(claims.corpus.revoked), claims.source(claims.corpus.licence_refused)
        asked = questions(
            claims.access.campaign,
            job.release,
            (revoked.description.name, revoked.id),
            (refused.description.name, refused.id),
        )
        checks = []
        for question in asked:
            with self._display.waiting(f"countersign verify {question.predicate.value}"):
                bundle = export(consortium, question)
                found_out = check(consortium, self._processes, question, bundle)
            checks.append(found_out)
            kinds = [status for _, status, _ in found_out.steps]
            counts = ", ".join(f"{kinds.count(kind)} {kind.replace('-', ' ')}" for kind in dict.fromkeys(kinds))
            self._display.line(
                f"{OK if found_out.passed else NO} [bold]{found_out.predicate:<18}[/] {safe(found_out.answer):<8}"
                f"{safe(found_out.question)} [dim]{counts}[/]"
            )
            for number, status, text in found_out.steps:
                if status == "failed":
                    self._display.line(f"    [red]{number} {safe(text)}[/]")
        self._display.line()
        self._display.line("[dim]Ask again, offline, from anywhere these files are:[/]")
        for found_out in checks:
            self._display.verbatim(found_out.command)
        yes = sum(found_out.passed for found_out in checks)
        text = f"{yes} of {len(checks)} checks say yes, each in a fresh process with nothing but files"
        self._remember(Moment("release", self._seconds(), None, text))
        return tuple(checks)

    def _replay(self, replays: Replays, claims: Claims, recall: tuple[RecallFacts, ...]) -> ReplayFacts:
        display = self._display
        display.act(6, "Replay", "the fine-tune again from what the log says, then once more without one source")
        left_out = next((fact.source for fact in recall if fact.fate == "admitted"), claims.corpus.sources[0].name)
        with display.waiting("countersign replay, twice"):
            replay = replays.run(claims.source(left_out))
        sentence = f"{replay.matched} of {replay.steps} steps came out as recorded, bit for bit"
        display.line(f"{OK} {sentence}" if replay.exact else f"{NO} {sentence}; {safe(replay.difference)}")
        audit = replays.record()
        display.done(f"{GUILD} put that on the log in its own name: audit result {audit[:16]}…")
        display.done(f"the same campaign without {safe(left_out)} ended in {safe(str(replays.weights_without))}")
        display.line(f"[dim]Both took {replay.seconds:.0f} s. Again, while the nodes run (--keep-running):[/]")
        display.verbatim(replay.command)
        text = f"{replay.matched} of {replay.steps} steps came out again bit for bit; {GUILD} recorded it"
        self._remember(Moment("release", self._seconds(), None, text))
        return replay

    def _trace(
        self, training: Training, replays: Replays, replay: ReplayFacts, recall: tuple[RecallFacts, ...]
    ) -> TracingFacts:
        display = self._display
        display.act(8, "Trace", "which source taught it that? asked of the log; no source's text is read again")
        with display.waiting("countersign trace: factors of the released weights, then every planted fact"):
            bundle = bundle_path(training.consortium, Predicate.ACCUMULATORS)
            tracing = trace(training, bundle, replays.weights_without, recall)
        rows = []
        for each in tracing.traces:
            fact = each.fact
            rows.append(
                (
                    f"{safe(fact.prompt)}\n[bold]{safe(fact.completion)}[/]",
                    f"{safe(fact.source)}\n[dim]{fact.fate}[/]",
                    f"{fact.base_probability:.0%} → {fact.tuned_probability:.0%}",
                    f"{each.without_probability:.0%}",
                    _answered(each),
                    OK if each.right else NO,
                )
            )
        display.table(("output", "planted by", "chance per byte", "without*", "the log's answer", ""), rows, right=(3,))
        display.line()
        display.line(f"[dim]* chance per byte in the campaign replayed without {safe(replay.without)}[/]")
        display.line(
            f"[dim]sums and sketches came from {COUNCIL}'s node, each held to the log; {LABORATORY} was not asked[/]"
        )
        display.line(
            f"[dim]z: deviations above the source's own scores for {tracing.controls} pieces of public text; "
            f"all answers took {tracing.seconds:.0f} s[/]"
        )
        display.line("[dim]Ask again, with all that the answer rests on:[/]")
        display.verbatim(tracing.command)
        right = sum(each.right for each in tracing.traces)
        text = f"{right} of {len(tracing.traces)} planted facts traced rightly: to their source; if refused, to none"
        self._remember(Moment("release", self._seconds(), None, text))
        return tracing

    def _report(self, consortium: Consortium, claims: Claims, job: JobSummary, seen: Seen) -> RunFacts:
        self._display.act(9, "Report", "for people and for programs")
        with self._display.waiting("reading the campaign from the rights-holder's node"):
            facts = gather(consortium, claims, job, seen)
        directory = self._options.directory
        (directory / "report.html").write_text(render(facts), encoding="utf-8")
        (directory / "summary.json").write_text(json.dumps(summary_of(facts), indent=2) + "\n", encoding="utf-8")
        self._display.table(("", ""), closing_rows(facts))
        return facts

    # Inside

    def _grant_steps(self) -> int:
        """Steps of a grant: some grants to a run, none of which ends at a step that checks for recital.

        What such a step found names several owners' sources, so no single owner's bundle shows it; after a rollback
        its index is then known to within one, which must not be the difference between two grants.
        """
        steps = max(LEAST_GRANT_STEPS, self._options.training.steps // GRANTS_PER_RUN)
        while gcd(steps, CHECK_MEMORIZATION_EVERY_STEPS) > 1:
            steps += 1
        return steps

    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def _remember(self, moment: Moment) -> None:
        self._moments.append(moment)

    def _show(self, moment: Moment) -> None:
        self._remember(moment)
        place = f"step {moment.step}" if moment.step else ""
        colour = COLOURS.get(moment.kind, "dim")
        self._display.line(f"[dim]{moment.seconds:6.1f} s  {place:<9}[/] [{colour}]{safe(moment.text)}[/]")


def _answered(trace: TraceFacts) -> str:
    """Markup: the source that stands out, or that none does."""
    if not trace.made_likelier:
        return "[dim]not shaped here[/]"
    leading = trace.ranked[0] if trace.ranked else None
    if not trace.shaped_here or leading is None:
        return "[dim]no source stands out[/]"
    return f"[bold]{safe(leading.source)}[/]\n[dim]z {leading.z:.1f}, entry {leading.entry}[/]"
