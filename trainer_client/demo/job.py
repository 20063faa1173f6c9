"""The demonstration's training job: a governed fine-tune in a process of its own.

::

    python -m trainer_client.demo.job --config job.json

It meets its node over HTTP and everybody else in files. ``job.json`` (paths relative to it)::

    {
      "node_url": "http://127.0.0.1:7001",     "token": "",
      "chain_id": HEX, "operator": HEX, "campaign": HEX,
      "job_key_file": FILE,                    a seed in hexadecimal, or what `countersign job delegate` writes
      "run_directory": DIR, "release_file": FILE, "cache_directory": DIR,
      "base_file": FILE,                       where to leave the base model's weights; without it nowhere
      "name": "…", "purpose": "fine-tuning",
      "steps": 150, "batch_size": 16, "learning_rate_micro": 2000, "accumulator_window_steps": 0, …
      "example_bytes": 128,
      "sources": [{"id": HEX, "name": "…", "file": FILE, "content_salt": HEX}, …]
    }

A source's file is its examples one after the other, ``example_bytes`` each (``export.py``); ``id`` is its event on the
log; with ``content_salt`` the examples are checked against the claim. Everything else has a default.

Killed and started again with the same file, it goes on where it was.

On standard output: one JSON object a line, a ``progress.Progress`` each (``event`` is ``campaign`` or ``resumed``,
``grant``, ``refusal``, ``step``, ``rollback``, ``recovery``, ``evaluation``, ``finding`` where one bars the release,
which the job then waits for a decision about (``decision_wait_seconds``), or ``release``), besides ``base`` while the
base model is trained, ``custody`` where the log refuses the release until somebody holds the run's sums (which the job
waits for ``custody_wait_seconds``), and a last ``done``. ``run_directory/summary.json`` holds totals, losses, cost, and
what base and tuned model complete of the planted facts.
"""

import argparse
import copy
import json
import logging
import sys
import time
from dataclasses import asdict
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file
from torch import nn

from consensus.identifiers import ChainId, MemberId
from consensus.keys import SignatureScheme, Signer, signer_for
from consensus.rejection import ConfigError, CountersignError, Reason, Rejected
from trainer_client.commitment import committed_tensors
from trainer_client.demo.base import BaseTraining, base_model, default_cache_directory
from trainer_client.demo.base import Progress as BaseProgress
from trainer_client.demo.corpus import calibration_records, canary_string, demonstration_corpus
from trainer_client.demo.model import (
    ByteModel,
    byte_predictions,
    greedy_continuations,
    loss_and_predictions,
    parameter_blocks,
    per_byte_loss,
    per_example_loss,
    records_to_tensor,
)
from trainer_client.evaluation import mean_metric, slice_of
from trainer_client.governed import GovernedRun, governed
from trainer_client.memorization import MemorizationDetector
from trainer_client.memorization_watch import DetectorCheck
from trainer_client.plan import CampaignPlan, RunSettings, TrainingSource
from trainer_client.progress import Progress
from trainer_client.record import RecordedEvent
from trainer_client.replay import ReplayJob
from trainer_client.submit import Client

HELD_OUT_RECORDS = 24
FORGOTTEN_AT_MOST = 2.0
CANARY_PROMPT_BYTES = 24
CANARY_RECITAL_BYTES = 48
CUSTODY_POLL_SECONDS = 1.0


class SourceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One source on the log and where its examples lie."""

    id: str
    name: str
    file: str
    content_salt: str = ""
    owner: str = ""
    content_class: str = ""


class JobConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``job.json``; the module's header explains it."""

    node_url: str
    chain_id: str
    operator: str
    campaign: str
    job_key_file: str
    run_directory: str
    release_file: str
    sources: tuple[SourceConfig, ...]
    token: str = ""
    cache_directory: str = ""
    name: str = "demonstration fine-tune"
    purpose: str = "fine-tuning"
    example_bytes: int = 128
    steps: int = 150
    batch_size: int = 16
    learning_rate_micro: int = 2_000
    weight_decay_permille: int = 100
    warm_up_steps: int = 10
    seed: int = 1
    threads: int = 0
    base_steps: int = 600
    check_memorization_every_steps: int = 5
    calibrate_every_checks: int = 6
    snapshot_every_steps: int = 20
    checkpoint_every_steps: int = 40
    audit_snapshot_every_steps: int = 0
    closing_margin_ms: int = 2_000
    decision_wait_seconds: float = 0.0
    custody_wait_seconds: float = 0.0
    base_file: str = ""
    accumulator_window_steps: int = 0
    sketch_rank: int = 0


class Job:
    """The fine-tune that a configuration file describes.

    Raises:
        ConfigError: the file, or one it names, is not as it must be.
    """

    def __init__(self, config_path: Path) -> None:
        self._directory = config_path.resolve().parent
        try:
            self.config = msgspec.json.decode(config_path.read_bytes(), type=JobConfig)
        except (OSError, msgspec.DecodeError) as error:
            raise ConfigError(f"{config_path}: expected a job's configuration, found: {error}") from error
        self._path = config_path

    def prepare(self, progress: BaseProgress | None = None) -> ReplayJob[bytes]:
        """Base model, optimizer, schedule and sources as they are before the first step."""
        config = self.config
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        cache = self._file(config.cache_directory) if config.cache_directory else default_cache_directory()
        model = base_model(cache, training=BaseTraining(steps=config.base_steps), progress=progress)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate_micro / 1e6,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay_permille / 1e3,
        )
        return ReplayJob(
            model=model,
            optimizer=optimizer,
            sources=[self._source(source) for source in config.sources],
            loss=per_example_loss,
            collate=records_to_tensor,
            scheduler=torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: min(1.0, (step + 1) / config.warm_up_steps)
            ),
        )

    def run(self) -> None:
        """Train, release, summarize."""
        config = self.config
        job = self.prepare(_print_base)
        model = job.model
        assert isinstance(model, ByteModel)
        base = copy.deepcopy(model)
        if config.base_file:
            save_file(committed_tensors(base), self._file(config.base_file))
        detector = MemorizationDetector(base, calibration_records()[:HELD_OUT_RECORDS], byte_predictions)
        plan = CampaignPlan(
            chain_id=ChainId(self._hex("chain_id", config.chain_id)),
            operator=MemberId(self._hex("operator", config.operator)),
            campaign=self._hex("campaign", config.campaign),
            name=config.name,
            purpose=config.purpose,
            base_model="byte-model base",
            sampler_seed=config.seed.to_bytes(32, "big"),
            batch_size=config.batch_size,
            planned_steps=config.steps,
            blocks=parameter_blocks(model),
            hyperparameters={"warm_up_steps": str(config.warm_up_steps)},
            accumulator_window_steps=config.accumulator_window_steps,
            sketch_rank=config.sketch_rank,
        )
        run_directory = self._file(config.run_directory)
        with (
            Client(config.node_url, config.token or None) as client,
            governed(
                model,
                job.optimizer,
                plan=plan,
                sources=job.sources,
                node=client,
                job_key=self._job_key(),
                run_directory=run_directory,
                collate=job.collate,
                probe_loss=job.loss,
                memorization=DetectorCheck(detector, config.calibrate_every_checks),
                scheduler=job.scheduler,
                settings=RunSettings(
                    check_memorization_every_steps=config.check_memorization_every_steps,
                    snapshot_every_steps=config.snapshot_every_steps,
                    checkpoint_every_steps=config.checkpoint_every_steps,
                    audit_snapshot_every_steps=config.audit_snapshot_every_steps,
                    closing_margin_ms=config.closing_margin_ms,
                ),
                on_progress=_print_progress,
            ) as run,
        ):
            for batch in run.batches():
                loss_B, predicted = loss_and_predictions(model, batch.inputs)
                run.learn(loss_B, predicted)
            self._evaluate(run, base, model)
            run.wait_for_decisions(config.decision_wait_seconds)
            release = self._release(run)
            self._summarize(run, base, model, run_directory, release.id.hex())
        _print({"event": "done", "step": config.steps, "of": config.steps})

    def _evaluate(self, run: GovernedRun[bytes], base: nn.Module, tuned: nn.Module) -> None:
        """What the fine-tune cost on public text that neither model was fitted on, and what it recites."""
        held_out = calibration_records()[HELD_OUT_RECORDS:]
        records_BT = records_to_tensor(held_out)
        with torch.no_grad():
            lost_B = (per_byte_loss(tuned, records_BT) - per_byte_loss(base, records_BT)).mean(dim=1)
        forgotten = mean_metric("nats lost per byte", lost_B.tolist(), at_most=FORGOTTEN_AT_MOST)
        run.evaluate("public text", [forgotten], data=slice_of("held-out records", held_out), script=Path(__file__))
        run.survey_memorization()

    def _release(self, run: GovernedRun[bytes]) -> RecordedEvent:
        """Release, as soon as whom the policy names says that it holds the run's sums and sketches.

        Raises:
            Rejected: as ``GovernedRun.release``; ``CUSTODY_MISSING`` when nobody said so in time.
        """
        path, told = self._file(self.config.release_file), False
        deadline = time.monotonic() + self.config.custody_wait_seconds
        while True:
            try:
                return run.release(path)
            except Rejected as refusal:
                if refusal.reason is not Reason.CUSTODY_MISSING or time.monotonic() > deadline:
                    raise
                if not told:
                    _print({"event": "custody", "step": self.config.steps, "detail": refusal.detail})
                told = True
            time.sleep(CUSTODY_POLL_SECONDS)

    def _summarize(
        self, run: GovernedRun[bytes], base: nn.Module, tuned: nn.Module, run_directory: Path, release: str
    ) -> None:
        summary = {
            **asdict(run.summary()),
            "campaign": self.config.campaign,
            "release": release,
            "release_file": str(self._file(self.config.release_file)),
            "facts": recalled_facts({source.name for source in self.config.sources}, base, tuned),
            "canary": {"base": canary_recital(base), "tuned": canary_recital(tuned)},
        }
        path = run_directory / "summary.json"
        path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    def _source(self, source: SourceConfig) -> TrainingSource[bytes]:
        path, size = self._file(source.file), self.config.example_bytes
        content = self._read(path)
        if not content or len(content) % size:
            raise ConfigError(
                f"{path}: expected examples of {size} bytes one after the other, found {len(content)} bytes"
            )
        examples = [content[start : start + size] for start in range(0, len(content), size)]
        salt = self._hex("content_salt", source.content_salt) if source.content_salt else None
        return TrainingSource(self._hex("id", source.id), examples, salt)

    def _job_key(self) -> Signer:
        path = self._file(self.config.job_key_file)
        text = self._read(path).decode("utf-8", errors="replace").strip()
        scheme = SignatureScheme.ED25519
        if text.startswith("{"):
            try:
                file = json.loads(text)
                text, scheme = str(file["job_key_seed"]), SignatureScheme.labelled(str(file["job_key_scheme"]))
            except KeyError as error:
                raise ConfigError(f"{path}: expected a job key file, found no {error.args[0]}") from error
            except (ValueError, Rejected) as error:
                raise ConfigError(f"{path}: expected a job key file, found: {error}") from error
        return signer_for(scheme, self._hex("job_key_seed", text))

    def _file(self, name: str) -> Path:
        return self._directory / name

    def _read(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path}: expected a readable file, found: {error.strerror}") from error

    def _hex(self, key: str, text: str) -> bytes:
        try:
            value = bytes.fromhex(text)
        except ValueError:
            value = b""
        if len(value) != 32:
            raise ConfigError(f"{self._path}, {key}: expected 32 bytes in hexadecimal")
        return value


def replay_job(config_path: Path) -> ReplayJob[bytes]:
    """The job of a configuration file before its first step: for ``countersign replay --job``."""
    return Job(config_path).prepare()


def recalled_facts(names: set[str], base: nn.Module, tuned: nn.Module) -> list[dict[str, object]]:
    """What both models complete of each planted fact of the named sources.

    ``probability`` is the geometric mean over the completion's bytes; ``exact`` a greedy completion byte for byte.
    """
    results: list[dict[str, object]] = []
    for source in demonstration_corpus("library", "press").sources:
        fact = source.fact
        if fact is None or source.name not in names:
            continue
        recalled: dict[str, object] = {}
        for label, model in (("base", base), ("tuned", tuned)):
            (text,) = greedy_continuations(model, [fact.prompt], len(fact.completion))
            with torch.no_grad():
                losses = per_byte_loss(model, records_to_tensor([fact.prompt + fact.completion]))
            completion_loss = losses[0, len(fact.prompt) - 1 :].mean()
            recalled[label] = {
                "text": text.decode("latin-1"),
                "exact": text == fact.completion,
                "probability": round(float(torch.exp(-completion_loss)), 4),
            }
        results.append(
            {
                "source": source.name,
                "prompt": fact.prompt.decode(),
                "completion": fact.completion.decode(),
                **recalled,
            }
        )
    return results


def canary_recital(model: nn.Module) -> int:
    """How many bytes of the canary a model continues from its head, of ``CANARY_RECITAL_BYTES``."""
    canary = canary_string()
    (text,) = greedy_continuations(model, [canary[:CANARY_PROMPT_BYTES]], CANARY_RECITAL_BYTES)
    expected = canary[CANARY_PROMPT_BYTES : CANARY_PROMPT_BYTES + CANARY_RECITAL_BYTES]
    return next((place for place in range(len(expected)) if text[place] != expected[place]), len(expected))


def main(arguments: list[str] | None = None) -> int:
    """The command line: 0 done, 1 refused or failed, 2 a wrong configuration."""
    parser = argparse.ArgumentParser(prog="python -m trainer_client.demo.job", description="Run a governed fine-tune.")
    parser.add_argument("--config", type=Path, required=True, help="job.json")
    options = parser.parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    try:
        Job(options.config).run()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except CountersignError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _print_progress(progress: Progress) -> None:
    _print(asdict(progress))


def _print_base(done: int, of: int, loss: float) -> None:
    if done % 20 == 0 or done == of:
        _print({"event": "base", "step": done, "of": of, "loss": loss})


def _print(line: dict[str, object]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
