"""The entry: a context around a fine-tune that enforces the policy inside each step and records it.

::

    with governed(model, optimizer, plan=plan, sources=sources, node=url, job_key=key, run_directory=path) as run:
        for batch in run.batches():
            run.learn(per_example_loss(model, batch.inputs))     # one loss per example, [B]
        run.release(path / "tuned.safetensors")

What a batch presents follows from the campaign's manifest and seed (``consensus/sampler.py``); examples that the
grant in force does not admit never reach the model. How deep one reaches follows from its class and, where the policy
has entropy bands, from the base model's loss on it, measured before the campaign opens (``base_losses.py``). ``learn``
runs the backward pass under the grant's depth profiles, clips per parameter block, steps the optimizer and records the
step. In order, per step:

1. a grant for it (asked for ahead; training pauses only without one);
2. refusals: sources outside the grant with the policy's true reason, examples recited before, and what owners keep in
   reserve (``consensus/reserve.py``);
3. forward (the caller's) and one routed backward pass per micro-batch, normalised by the *presented* count;
4. what the optimizer keeps of sources revoked since is dropped or accounted for (``momentum.py``); where the plan says
   so, per-source sums of gradients (``accumulators.py``), committed at the end of each window;
5. parameter commitment, hashed while the next step runs; refusals and step event then go to the outbox;
6. the memorization check of the step's suspects (``memorization_watch.py``). Above the policy's threshold the step is
   recorded with its signal, the job restored bit for bit, a ``rollback`` recorded, and the step repeated without
   the recited examples. They, and neighbours that the model recites as well, stay out.

A step none of whose examples is admitted is recorded without touching optimizer or parameters, and yields no batch.

**When the log refuses a step** the job restores its snapshot of the last final root, replays the steps that are on
the log (their batches are yielded again, ``replayed``, recorded nowhere), checks that it stands at the log's root,
and goes on with the next attempt. If the replay ends elsewhere, the campaign is abandoned.

**When the process dies** (``kill -9`` included), the same call with the same ``run_directory`` takes the campaign up
again: what was on disk is delivered, the last checkpoint restored, the steps since replayed in the same way.

**Several processes** (DDP, FSDP2: ``data_parallel.py``) all run the same lines, with the wrapped model. Each gets its
part of every step; the sum over them is what the policy's weights are about, and a step is one event. Where a rank has
fewer examples than another its batch is a *stand-in*: it runs like the others' and weighs nothing.

Forwards are replaced only inside the context and put back on exit, whatever happens (``routing.py``).
"""

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from consensus import portions as p
from consensus.identifiers import ZERO_DIGEST
from consensus.keys import Signer
from consensus.policy import MOMENTUM_FLUSH
from consensus.rejection import ConfigError, CountersignError, InvariantBroken, Reason, Rejected
from consensus.reserve import RESERVED
from consensus.review import DataSlice, Metric, metric_text
from consensus.sampler import presented_examples
from trainer_client.accumulators import SourceAccumulators, by_source
from trainer_client.audit_snapshots import AuditSnapshots, snapshot_directory
from trainer_client.commitment import root_of_tensors
from trainer_client.course import Course
from trainer_client.data_parallel import ParallelModel, pass_over
from trainer_client.evaluation import file_sha256
from trainer_client.grants import OpenGrant
from trainer_client.memorization_manifest import NAME as MANIFEST_NAME
from trainer_client.memorization_manifest import measured_by, recited_metric, reserve_metric, write_manifest
from trainer_client.memorization_watch import (
    CALIBRATORS_OF_A_SOURCE,
    MemorizationCheck,
    MemorizationWatch,
    last_pass_from,
    steps_of_a_pass,
)
from trainer_client.momentum import Momentum
from trainer_client.opening import RunArguments, open_run, own_directory
from trainer_client.outbox import Fate
from trainer_client.packing import Packing, taken_apart
from trainer_client.plan import CampaignPlan, RunSettings, TrainingSource, manifest_of, sketch_ranks_of
from trainer_client.progress import MemorizationPass, Moment, OnProgress, Summary
from trainer_client.ranks import Ranks
from trainer_client.record import Example, RecordedEvent
from trainer_client.resumption import RecordedStep
from trainer_client.rollback import (
    Stateful,
    TrainingState,
    step_beginning,
    take_snapshot,
)
from trainer_client.scaling import Scaling, prepared
from trainer_client.step_book import Step, random_digest, random_digest_of_all
from trainer_client.submit import Client

E = TypeVar("E")

DEFAULT_SETTINGS = RunSettings()


class TrainingFailed(CountersignError):
    """A step cannot be taken: its loss is not finite, or ``learn`` was not called as it must be."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Admitted examples of one step (of one micro-batch, where steps are split), collated.

    ``replayed`` marks a step that is on the log already and is only computed again. Without ``examples`` it is a
    stand-in: ``inputs`` are of one example that this pass teaches nothing.
    """

    step: int
    attempt: int
    inputs: Any
    examples: tuple[Example, ...]
    replayed: bool
    packing: Packing | None = None
    """Where ``collate`` packed the examples, whose positions are whose."""


class GovernedRun(Generic[E]):
    """A fine-tune under a campaign; made by ``governed`` and used inside its ``with``."""

    def __init__(self, arguments: RunArguments[E]) -> None:
        optimizer, scaler = prepared(arguments.optimizer, arguments.scaler)
        self._arguments = arguments = replace(arguments, optimizer=optimizer)
        self._ranks = Ranks.of_job()
        self._parallel = ParallelModel(arguments.model, self._ranks)
        self._model = self._parallel.module
        self._optimizer = arguments.optimizer
        self._plan = arguments.plan
        self._settings = arguments.settings
        self._sources = {source.id: source for source in arguments.sources}
        self._manifest = manifest_of(arguments.sources)
        manifest_size = sum(entry.count for entry in self._manifest)
        self._steps_of_a_pass = steps_of_a_pass(manifest_size, self._plan.batch_size)
        self._scheduler = arguments.scheduler
        self._micro_batch_size = arguments.micro_batch_size or self._plan.batch_size
        self._watch = MemorizationWatch(
            arguments.memorization,
            self._settings.check_memorization_every_steps,
            self._plan.planned_steps,
            self._micro_batch_size,
            last_pass_from(manifest_size, self._plan.batch_size, self._plan.planned_steps),
        )
        self._stack = ExitStack()
        self._micro_batch = ExitStack()
        self._accumulators = _accumulators_of(arguments, self._model, self._ranks)
        self._momentum = Momentum(self._optimizer)
        self._scaling = Scaling(self._optimizer, self._plan.clip_norm, self._plan.clip_scope, scaler)
        parts = {
            "scheduler": self._scheduler,
            "accumulators": self._accumulators,
            "momentum": self._momentum,
            "scaler": self._scaling.scaler,
        }
        stateful = {name: part for name, part in parts.items() if part is not None}
        self._state = TrainingState(self._model, self._optimizer, stateful)
        self._step: Step | None = None
        self._admitted: set[bytes] = set()
        self._grant: OpenGrant | None = None
        self._learning_rate: float | None = None
        self._yielded: tuple[Moment, tuple[Example, ...]] | None = None
        self._wait_on_close = False

    def __enter__(self) -> Self:
        """Opens the campaign and asks for its first grant.

        Raises:
            Rejected: by the log, or because the examples are not the claimed ones. RoutingUnsupported:
            the model holds parameters that no policy can be enforced on. RoutingLeak: by the probe.
            ConfigError, Unavailable. RankFailed: another process of the job could not open it.
        """
        try:
            self._stack.callback(self._ranks.close)
            opened = open_run(
                self._arguments,
                self._parallel,
                self._ranks,
                self._state,
                self._stack,
                lambda: self._wait_on_close,
                self._accumulators,
                self._momentum,
                self._scaling,
            )
            self._calibrate(opened.reserves)
        except BaseException:
            self._stack.close()
            raise
        self._routing, self._block_of, self._classes = opened.routing, opened.block_of, opened.classes
        self._base_losses = opened.base_losses
        self._reserves = opened.reserves
        self._record, self._ledger, self._book = opened.record, opened.ledger, opened.book
        audits = AuditSnapshots(
            snapshot_directory(self._arguments.run_directory, self._plan.campaign),
            self._plan.campaign,
            self._settings.audit_snapshot_every_steps,
            self._ranks,
        )
        self._stack.callback(audits.close)
        self._course = Course(
            opened, self._state, self._parallel, self._ranks, self._settings.snapshot_every_steps, audits
        )
        if opened.taken_up is not None:
            try:
                self._course.take_up(opened.taken_up, self._again)
                self._admitted.update(self._ledger.admitted_sources(self._manifest))
            except BaseException:
                self._stack.close()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._micro_batch.close()
            if error is None:
                self._course.resolve()
        finally:
            self._wait_on_close = error is None
            self._stack.close()

    def batches(self) -> Iterator[Batch]:
        """The batches of every step still to take, in order; ``learn`` must be called for each."""
        return self._generate()

    def learn(self, loss_B: Tensor, predicted: tuple[Tensor, Tensor] | None = None) -> None:
        """Backward pass of the batch last yielded; with a step's last batch, the step itself.

        Args:
            loss_B: one loss per example of the batch, each normalised by constants alone.
            predicted: for the memorization check, the logits ``[B, T, V]`` of this forward pass and the
                targets ``[B, T]`` they were compared with, nothing masked, padded or packed.

        Raises:
            TrainingFailed: no batch waits, or a loss is not finite. RoutingError: as ``routing.py``.
        """
        if not self.backward(loss_B, predicted):
            return
        if self.step_optimizer() and self._scheduler is not None:
            with self._record.costs.training():
                self._scheduler.step()  # type: ignore[attr-defined]
        self.optimizer_stepped()

    def backward(self, loss_B: Tensor, predicted: tuple[Tensor, Tensor] | None = None) -> bool:
        """``learn`` up to the optimizer, for a loop that steps optimizer and scheduler by itself (``hf.py``).

        Returns:
            Whether this was the step's last batch: its gradients are final and clipped, the optimizer is to step,
            by ``step_optimizer`` where losses are scaled, then the scheduler, then ``optimizer_stepped`` is to be
            called.
        """
        step = self._step
        if step is None or self._yielded is None:
            raise TrainingFailed("a loss is due once for each batch that the run presents")
        costs = self._record.costs
        begun, examples = self._yielded
        costs.add_training(begun)
        self._yielded = None
        with costs.governance(), costs.memorization():
            if examples and not step.replayed:
                threshold_permille = step.grant.policy.memorization_threshold_permille
                self._watch.look(step.index, self._content(examples), predicted, threshold_permille)
        with costs.training():
            loss = self._routing.routed_loss(loss_B, self._plan.batch_size)
            if not torch.isfinite(loss):
                raise TrainingFailed(f"step {step.index}: the loss is {loss.item()}")
            self._scaling.backward(self._parallel.of_all(loss))
            step.loss_sum += loss.item() * self._plan.batch_size if examples else 0.0
            step.learned += 1
            self._micro_batch.close()
            if step.learned < len(step.batches):
                return False
            self._routing.finish_step()
            scaled = step.scaled = self._scaling.finish(self._model, self._block_of)
        with costs.governance():
            if self._ranks.size > 1:
                self._add_up(step)
            if step.before is None and self._watch.has_suspects:
                step.before = take_snapshot(self._state, self._course.done, ZERO_DIGEST, step.beginning)
            self._book.settle_optimizer()
            self._momentum.take_step(
                step.flushed,
                tuple(carried.source for carried in step.carried),
                step.weights_by_source(),
                skipped=scaled.skipped,
            )
            if self._accumulators is not None and scaled.skipped:
                self._accumulators.skip_step()
            elif self._accumulators is not None:
                policy = step.grant.permission.policy
                self._accumulators.take_step(policy, self._optimizer, scaled.factors)
        self._learning_rate = float(self._optimizer.param_groups[0]["lr"])
        return True

    def _add_up(self, step: Step) -> None:
        """What the ranks saw of a step, on all of them."""
        seen = self._ranks.gathered((step.loss_sum, self._watch.suspects))
        step.loss_sum = sum(loss_sum for loss_sum, _ in seen)
        self._watch.suspect(self._content(tuple(sorted(set().union(*(suspects for _, suspects in seen))))))

    def step_optimizer(self) -> bool:
        """The optimizer's step whose last ``backward`` said so; whether it was taken, not skipped for an overflow.

        Raises:
            TrainingFailed: no step waits for that.
        """
        step = self._step
        if step is None or step.scaled is None or step.stepped:
            raise TrainingFailed("the optimizer is to step without all losses of a step")
        with self._record.costs.training():
            self._scaling.step(step.scaled)
        step.stepped = True
        return not step.scaled.skipped

    def optimizer_stepped(self) -> None:
        """Optimizer and scheduler took the step whose last ``backward`` said so: record it.

        Raises:
            TrainingFailed: no step waits for that, or losses are scaled and the loop stepped its optimizer itself.
        """
        step = self._step
        if step is None or self._learning_rate is None:
            raise TrainingFailed("the optimizer stepped without all losses of a step")
        if self._scaling.scaler is not None and not step.stepped:
            raise TrainingFailed("losses are scaled: step the optimizer by run.step_optimizer, which may have to skip")
        learning_rate, self._learning_rate = self._learning_rate, None
        with self._record.costs.governance():
            self._finish_step(step, learning_rate)

    @property
    def done(self) -> int:
        """Steps taken and not undone."""
        return self._course.done

    def evaluate(
        self, name: str, metrics: Sequence[Metric], *, data: DataSlice, script: Path | None = None
    ) -> RecordedEvent | None:
        """Record what was measured on the weights as they stand, after the last step taken (``evaluation.py``).

        Training does not wait for the log. None, and nothing is recorded, where the log has the same test of the same
        weights, and while steps that are on the log are replayed. Of several processes all call it, and what the first
        measured counts.

        Args:
            script: the file that measured; None is the program that runs.

        Raises:
            ConfigError: the script cannot be read. Rejected: ``BAD_FIELD`` for two metrics of one name, or none.
        """
        script = script or Path(sys.argv[0])
        return self._record_evaluation(name, metrics, data, (script.name, file_sha256(script)))

    def survey_memorization(self) -> tuple[p.MemorizationSignal, ...]:
        """Assess every example the weights were shown, and record it: the memorization manifest, due before a release.

        The signals found, in order. The file ``memorization.jsonl`` in the run's directory lists them all; its digest
        and how many examples are recited go to the log (``memorization_manifest.py``). Any recited bars the release
        until a decision of governance (``wait_for_decisions``).

        Raises:
            ConfigError: the run checks no memorization, or has taken no step yet.
        """
        if self._course.is_replaying or self._grant is None:
            raise ConfigError(
                "memorization is surveyed after the last step taken, not before or while steps are replayed"
            )
        threshold_permille = self._grant.policy.memorization_threshold_permille
        terms = (self._manifest, self._plan.sampler_seed, self._plan.batch_size)
        shown = {example for index in range(1, self._course.done + 1) for example in presented_examples(*terms, index)}
        assessed = tuple(
            sorted(
                (source, number)
                for source, number in shown
                if source in self._admitted and number not in self._reserves[source]
            )
        )
        with self._record.costs.governance(), self._record.costs.memorization():
            found = self._watch.survey(self._model, self._content(assessed), threshold_permille)
            signals = self._ranks.by_first(lambda: found)
            directory = own_directory(self._arguments.run_directory, self._ranks)
            data = write_manifest(directory / "memorization.jsonl", assessed, signals)
        with self._record.costs.governance():
            flagged, of = self._flagged_of_reserve(self._grant)
        metrics = [recited_metric(signals, threshold_permille)]
        if of:
            metrics.append(reserve_metric(flagged))
        self._record_evaluation(MANIFEST_NAME, metrics, data, measured_by())
        return signals

    def _record_evaluation(
        self, name: str, metrics: Sequence[Metric], data: DataSlice, script: tuple[str, bytes]
    ) -> RecordedEvent | None:
        with self._record.costs.governance():
            self._course.resolve()
            if self._course.is_replaying:
                return None
            event = self._ledger.record_evaluation(name, metrics, data, script)
            if event is None:
                return None
        detail = "; ".join(metric_text(metric) for metric in metrics)
        self._book.note("evaluation", self._course.done, id=event.id.hex(), detail=f"{name}: {detail}")
        return event

    def wait_for_decisions(self, limit_seconds: float) -> None:
        """Wait until no finding bars the release: until governance has accepted each of those that are open.

        Where an accelerator is too dear to wait for people, leave it out: ``release`` is refused then, and the job,
        started again after the decision, goes on from here.

        Raises:
            Rejected: ``FINDING_OPEN``: one was rejected, or still waits after ``limit_seconds``; a step was refused.
        """
        self._settle()
        findings = self._ledger.open_findings()
        if not findings:
            return
        for finding in findings:
            self._book.note("finding", self._course.done, id=finding.hex(), detail="bars the release")
        with self._record.costs.paused():
            left = self._ledger.wait_for_decisions(limit_seconds)
        if left:
            raise Rejected(
                Reason.FINDING_OPEN,
                f"no decision after {limit_seconds:.0f} s about {len(left)} findings, the first is {left[0].hex()}",
            )

    def _settle(self) -> None:
        """Wait until everything recorded is on the log.

        Raises:
            Rejected: something was refused.
        """
        self._course.resolve()
        with self._record.costs.paused():
            failure = self._ledger.wait_all_settled()
        if failure is not None:
            raise _rejected(failure)

    def release(self, path: Path) -> RecordedEvent:
        """Save the weights as safetensors, wait until every step is final, and release exactly these.

        Raises:
            Rejected: a step or the release was refused. After ``FINDING_OPEN`` it may be called again.
        """
        self._settle()
        tensors = self._parallel.copied()
        self._ranks.by_first(lambda: self._check_recorded(tensors))
        self._course.keep_for_audits(last=True)
        digest = self._ranks.by_first(lambda: _save(tensors, path))
        with self._record.costs.paused():
            event = self._ledger.record_release(path.name, digest)
        self._book.note("release", self._course.done, id=event.id.hex())
        return event

    def _check_recorded(self, tensors: Mapping[str, Tensor]) -> None:
        root = root_of_tensors(tensors)
        if root != self._ledger.place.root:
            raise InvariantBroken(
                f"the weights have root {root.hex()}, recorded is {self._ledger.place.root.hex()}: they were"
                " changed outside run.learn"
            )

    def abandon(self, reason: str) -> RecordedEvent:
        """End the campaign on the log without a release."""
        self._course.resolve()
        return self._ledger.record_abandon(reason)

    def summary(self) -> Summary:
        """What happened so far and what it cost."""
        place = self._ledger.place
        background_cpu_seconds = self._ledger.background_cpu_seconds + self._book.background_cpu_seconds
        if self._accumulators is not None:
            background_cpu_seconds += self._accumulators.cpu_seconds
        return self._record.summary(place.steps, place.attempt, place.root.hex(), background_cpu_seconds)

    def _generate(self) -> Iterator[Batch]:
        for step in self.steps():
            for examples in step.batches:
                yield self.present(step, examples)
                if self._yielded is not None:
                    raise TrainingFailed(f"step {step.index}: run.learn was not called for its batch")

    def steps(self) -> Iterator[Step]:
        """The steps with admitted examples, each begun when asked for; ``present`` their batches one after another."""
        while not self.complete():
            step = self._begin_step()
            if not step.admitted:
                with self._record.costs.governance():
                    self._finish_step(step, float(self._optimizer.param_groups[0]["lr"]))
                continue
            self._optimizer.zero_grad(set_to_none=True)
            self._model.zero_grad(set_to_none=True)  # divided tensors are not the optimizer's
            yield step

    def complete(self) -> bool:
        """Whether every planned step is taken and on the log; goes back to where the log stands if it refused one."""
        with self._record.costs.governance():
            self._course.follow_finality()
            if self._course.done < self._plan.planned_steps:
                return False
            self._course.resolve()
        with self._record.costs.paused():
            failure = self._ledger.wait_all_settled()
        if failure is not None:
            self._course.go_back(failure)
        return self._course.done >= self._plan.planned_steps

    def _begin_step(self) -> Step:
        index = self._course.done + 1
        self._watch.begin()
        with self._record.costs.governance():
            self._course.keep_for_audits()
        self._step = self._course.next_again()
        if self._step is not None:
            return self._step
        with self._record.costs.paused():
            grant = self._ledger.permission_for(index)
        self._scaling.check_admitted(grant.policy)
        with self._record.costs.governance():
            presented = presented_examples(self._manifest, self._plan.sampler_seed, self._plan.batch_size, index)
            refused = {example: why for example in presented if (why := self._why_refused(example, grant)) is not None}
            admitted = tuple(example for example in presented if example not in refused)
            beginning = step_beginning(self._state)
            due = self._momentum.due(grant) if admitted else ()
            flushes = grant.policy.momentum == MOMENTUM_FLUSH
            self._step = Step(
                index=index,
                grant=grant,
                admitted=admitted,
                refused=refused,
                replayed=False,
                rng_digest=random_digest_of_all(random_digest(beginning.random), self._ranks),
                beginning=beginning,
                started=time.perf_counter(),
                before=self._course.snapshot_if_due(),
                profiles=self._profiles(grant, admitted),
                batches=self._ranks.micro_batches(admitted, self._micro_batch_size),
                flushed=due if flushes else (),
                carried=() if flushes else tuple(map(self._momentum.carried, due)),
            )
            self._grant = grant
            self._admitted.update(source for source, _ in self._step.admitted)
        return self._step

    def _why_refused(self, example: Example, grant: OpenGrant) -> str | None:
        source, number = example
        if number in self._reserves[source]:
            return RESERVED
        if source in grant.refused:
            return grant.refused[source]
        return Reason.MEMORIZATION_ABOVE_THRESHOLD.value if example in self._course.recited else None

    def _again(self, step: RecordedStep, grant: OpenGrant) -> Step:
        """A step on the log, to be taken again."""
        presented = presented_examples(self._manifest, self._plan.sampler_seed, self._plan.batch_size, step.index)
        admitted = step.in_order(presented)
        self._grant = grant
        return Step(
            index=step.index,
            grant=grant,
            admitted=admitted,
            refused={},
            replayed=True,
            rng_digest=ZERO_DIGEST,
            beginning=step_beginning(self._state),
            started=time.perf_counter(),
            before=None,
            profiles=self._profiles(grant, admitted),
            batches=self._ranks.micro_batches(admitted, self._micro_batch_size),
            flushed=step.operation.flushed,
            carried=step.operation.carried,
        )

    def _profiles(self, grant: OpenGrant, admitted: Sequence[Example]) -> dict[Example, p.ClassProfile]:
        edges_milli = grant.policy.entropy_edges_milli
        return {
            example: grant.profiles[self._classes[example[0]], self._base_losses.band(example, edges_milli)]
            for example in admitted
        }

    def _content(self, examples: tuple[Example, ...]) -> dict[Example, E]:
        return {(source, example): self._sources[source].examples[example] for source, example in examples}

    def present(self, step: Step, examples: tuple[Example, ...]) -> Batch:
        """One of a step's batches, whose forward and backward pass are due now."""
        if self._accumulators is not None:
            examples = by_source(examples)
            self._accumulators.expect(step.index, examples)
        with self._record.costs.governance():
            shown = pass_over(examples, step.admitted, step.weights_permille, self._ranks)
            inputs, packing = taken_apart(self._arguments.collate(list(self._content(shown.examples).values())))
            groups = [source for source, _ in shown.examples]
            last = step.learned + 1 == len(step.batches)
            self._micro_batch.enter_context(self._parallel.pass_of(last=last))
            self._micro_batch.enter_context(
                self._routing.micro_batch(shown.weights_BK, groups, shown.profiles_of_step, packing)
            )
        self._yielded = (Moment.now(), examples)
        attempt = self._ledger.place.attempt
        return Batch(step.index, attempt, inputs, examples, step.replayed, packing)

    def _finish_step(self, step: Step, learning_rate: float) -> None:
        self._step = None
        self._record.trained(step.index, replayed=step.replayed)
        accumulator_root = None
        if self._accumulators is not None:
            accumulator_root = self._accumulators.end_step(step.index, recorded=not step.replayed)
        if step.replayed:
            self._course.took_again(step)
            return
        before = self._course.parameters
        after = self._parallel.copied() if step.admitted else before
        threshold_permille = step.grant.policy.memorization_threshold_permille
        with self._record.costs.memorization():
            found = self._watch.signals(self._model, threshold_permille)
        # All ranks assess the same suspects; the first one's figures count, also where it alone finds any.
        signals = self._ranks.by_first(lambda: found) if self._watch.has_suspects else found
        self._course.resolve()
        self._book.write(step, before, after, self._optimizer, learning_rate, signals, accumulator_root)
        self._course.took(step, after)
        recited = tuple(signal for signal in signals if signal.signal_permille > threshold_permille)
        if recited:
            event = self._course.resolve()  # on disk before anything is looked for: it is undone after a crash, too
            self._course.undo(step, event, before, recited + self._swept(step, recited))
        elif step.index % self._steps_of_a_pass == 0:
            self._note_pass(step)

    def _note_pass(self, step: Step) -> None:
        """As a pass over the manifest ends: what the check says of examples that nobody trained on."""
        flagged, assessed = self._flagged_of_reserve(step.grant)
        if assessed:
            recited = len(self._course.recited)
            self._record.memorization_passes[step.index] = MemorizationPass(step.index, recited, flagged, assessed)
            detail = f"recited so far: {recited}; taken for recited in reserve: {flagged} of {assessed}"
            self._book.note("memorization", step.index, detail=detail)

    def _calibrate(self, reserves: Mapping[bytes, frozenset[int]]) -> None:
        """Give the check, if there is one, what it may hold each source's examples against."""
        if self._arguments.memorization is not None:
            kept = [(source, sorted(numbers)[:CALIBRATORS_OF_A_SOURCE]) for source, numbers in reserves.items()]
            self._watch.keep_apart(self._content(tuple((source, number) for source, held in kept for number in held)))

    def _flagged_of_reserve(self, grant: OpenGrant) -> tuple[int, int]:
        sources = self._admitted - grant.refused.keys()
        threshold_permille = grant.policy.memorization_threshold_permille
        with self._record.costs.memorization():
            found = self._watch.flagged_of_reserve(self._model, sources, threshold_permille)
        return self._ranks.by_first(lambda: found)

    def _swept(self, step: Step, recited: tuple[p.MemorizationSignal, ...]) -> tuple[p.MemorizationSignal, ...]:
        """What else the model recites, of the recited examples' sources."""
        found = [(signal.source, signal.example) for signal in recited]
        contents = {source: self._sources[source].examples for source, _ in found}
        reserved = {(source, number) for source in contents for number in self._reserves[source]}
        out = self._course.recited | reserved
        threshold_permille = step.grant.policy.memorization_threshold_permille
        with self._record.costs.memorization():
            swept = self._watch.sweep(self._model, found, contents, out, threshold_permille)
        return self._ranks.by_first(lambda: swept)


def governed(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    plan: CampaignPlan,
    sources: Sequence[TrainingSource[E]],
    node: str | Client,
    job_key: Signer,
    run_directory: Path,
    collate: Callable[[Sequence[E]], Any] = torch.stack,  # type: ignore[assignment]
    probe_loss: Callable[[nn.Module, Any], Tensor] | None = None,
    memorization: MemorizationCheck[E] | None = None,
    scheduler: Stateful | None = None,
    scaler: torch.amp.GradScaler | None = None,
    micro_batch_size: int | None = None,
    settings: RunSettings = DEFAULT_SETTINGS,
    on_progress: OnProgress | None = None,
) -> GovernedRun[E]:
    """A governed run, to be entered with ``with``; the header of this module shows its use.

    Args:
        node: URL of the operator's node, or a client of it.
        job_key: the key the operator delegated for this campaign.
        run_directory: outbox, checkpoints and record of this run; one that holds a campaign's checkpoint takes it up.
        collate: examples to the batch's inputs; the default stacks tensors. ``Packed`` inputs hold several examples in
            a row (``packing.py``).
        probe_loss: model and inputs to a loss per example, as in training: tried before anything is on the log
            (``probe.py``), and what base losses are measured with, where the policy has entropy bands
            (``base_losses.py``).
        memorization: see ``memorization_watch.DetectorCheck``; None checks nothing, and records no signal.
        scheduler: stepped after each optimizer step and restored with it; do not step it yourself.
        scaler: of losses, for autocast to float16: leave scaling, stepping and updating to the run. A step it skips
            is recorded as skipped. An optimizer that Accelerate prepared brings its own.
        micro_batch_size: examples per forward pass of one process; None takes a step's examples at once.
    """
    return GovernedRun(
        RunArguments(
            model=model,
            optimizer=optimizer,
            plan=plan,
            sources=sources,
            node=node,
            job_key=job_key,
            run_directory=run_directory,
            collate=collate,
            probe_loss=probe_loss,
            memorization=memorization,
            scheduler=scheduler,
            scaler=scaler,
            micro_batch_size=micro_batch_size,
            settings=settings,
            on_progress=on_progress,
        )
    )


def _save(tensors: dict[str, Tensor], path: Path) -> bytes:
    """SHA-256 of the file written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    save_file(tensors, unfinished)
    digest = hashlib.sha256(unfinished.read_bytes()).digest()
    unfinished.replace(path)
    return digest


def _accumulators_of(arguments: RunArguments[E], model: nn.Module, ranks: Ranks) -> SourceAccumulators | None:
    plan = arguments.plan
    if not plan.accumulator_window_steps:
        return None
    directory = own_directory(arguments.run_directory, ranks) / "accumulators"
    return SourceAccumulators(
        directory,
        plan.campaign,
        plan.accumulator_window_steps,
        plan.planned_steps,
        plan.sketch_rank,
        sketch_ranks_of(plan, model),
        ranks=ranks,
    )


def _rejected(failure: Fate) -> Rejected:
    reason = Reason(failure.reason) if failure.reason in frozenset(Reason) else Reason.BAD_FIELD
    return Rejected(reason, f"event {failure.id.hex()}: {failure.detail}")
