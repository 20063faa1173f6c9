"""Scenes for jobs of ``transformers.Trainer``: a campaign of three sources over a small GPT-2 of random weights."""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fake_node import SALT, FakeNode
from hf_rank_fixtures import LENGTH
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.optimization import get_scheduler

from consensus.event import CheckedEvent, Kind
from consensus.keys import Ed25519SigningKey
from consensus.portions import ClassRule, StepOperation
from consensus.rejection import Reason, Rejected
from trainer_client.governed import governed
from trainer_client.hf import FixedLengthCollator, GovernanceCallback, GovernedTrainer, causal_losses
from trainer_client.plan import CampaignPlan, RunSettings, TrainingSource
from trainer_client.replay import Replayed, ReplayJob, read_logged_campaign, replay
from trainer_client.submit import Client

STEPS, BATCH_SIZE = 6, 6
COLLATOR = FixedLengthCollator(LENGTH)
EVERYTHING = (ClassRule("documentation", 1_000, ()), ClassRule("news", 1_000, ()))


def texts(name: str) -> list[bytes]:
    """Of 8 to 12 symbols each."""
    digests = [hashlib.sha256(f"{name} {number}".encode()).digest() for number in range(8)]
    return [bytes(byte % 63 + 1 for byte in digest[: 8 + number % 5]) for number, digest in enumerate(digests)]


class Scene:
    """A campaign of three sources, of which the policy refuses one; its node, and the ways to train in it."""

    def __init__(self, node: FakeNode, directory: Path, classes: tuple[ClassRule, ...] = EVERYTHING) -> None:
        self.node, self.directory = node, directory
        node.policy(classes=classes)
        self.texts = {name: texts(name) for name in ("manual", "paper", "secret")}
        self.sources = {
            "manual": node.source("manual", self.texts["manual"]),
            "paper": node.source("paper", self.texts["paper"], owner="data-source-2", content_class="news"),
            "secret": node.source("secret", self.texts["secret"], licence="LicenseRef-Proprietary"),
        }
        self.salt: bytes | None = SALT
        self.delegated: set[bytes] = set()
        self.plan_changes: dict[str, object] = {}

    def refuse_last_step_once(self) -> list[bytes]:
        """The log takes the last step of a campaign at its second attempt only; the ids of the events it refused."""
        refused: list[bytes] = []

        def refuse(event: CheckedEvent) -> Rejected | None:
            if not refused and isinstance(event.operation, StepOperation) and event.operation.index == STEPS:
                refused.append(event.id)
                return Rejected(Reason.GRANT_CLOSED, "too late")
            return None

        self.node.refuse_step = refuse
        return refused

    def campaign(self, number: int = 7, seed: int = 0) -> dict[str, object]:
        """Arguments that ``governed`` and ``GovernanceCallback`` share."""
        campaign = bytes([number]) * 32
        key = Ed25519SigningKey(bytes([number]) * 32)
        if campaign not in self.delegated:
            self.node.delegate(campaign, key)
            self.delegated.add(campaign)
        plan = CampaignPlan(
            chain_id=self.node.chain_id,
            operator=self.node.member_id("operator-1"),
            campaign=campaign,
            name="a campaign",
            purpose="fine-tuning",
            base_model="tiny",
            sampler_seed=bytes([seed]) * 32,
            **{"batch_size": BATCH_SIZE, "planned_steps": STEPS, **self.plan_changes},  # type: ignore[arg-type]
        )
        return {
            "plan": plan,
            "sources": [TrainingSource(self.sources[name], self.texts[name], self.salt) for name in self.sources],
            "node": self.node.url,
            "job_key": key,
            "run_directory": self.directory / str(number),
        }

    def options(self, **changes: object) -> dict[str, object]:
        return {
            "output_dir": str(self.directory / "output"),
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH_SIZE,
            "max_grad_norm": 0.0,
            "learning_rate": 0.01,
            "weight_decay": 0.1,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **changes,
        }

    def arguments(self, **changes: object) -> TrainingArguments:
        return TrainingArguments(**self.options(**changes))

    def trainer(
        self, model: nn.Module, number: int = 7, kind: type[GovernedTrainer] = GovernedTrainer, **options: object
    ) -> GovernedTrainer:
        arguments = options.pop("args", None) or self.arguments()
        callback = GovernanceCallback(
            **self.campaign(number),
            release=self.directory / "tuned.safetensors",
            settings=options.pop("settings", RunSettings()),
            memorization=options.pop("memorization", None),
        )
        callbacks = [callback]
        return kind(
            model, arguments, data_collator=COLLATOR, callbacks=[*callbacks, *options.pop("callbacks", [])], **options
        )

    def steps(self, number: int = 7) -> list[StepOperation]:
        return [
            event.operation
            for event in self.node.order
            if event.entry.campaign == bytes([number]) * 32 and isinstance(event.operation, StepOperation)
        ]

    def events(self, kind: Kind) -> list[CheckedEvent]:
        return [event for event in self.node.order if event.entry.kind is kind]


def recorded(step: StepOperation) -> tuple[object, ...]:
    return (
        step.index, step.root_before, step.root_after, step.optimizer_digest, step.loss_micro, step.rng_digest,
        step.learning_rate_nano, step.deltas,
    )  # fmt: skip


def in_a_plain_loop(
    scene: Scene, model: nn.Module, number: int, micro_batch_size: int, scaler: torch.amp.GradScaler | None = None
) -> None:
    """The same campaign without the Trainer: with the optimizer it makes; schedule, order and seed by hand."""
    optimizer, scheduler = made_by_the_trainer(scene, model)
    with governed(
        model, optimizer, **scene.campaign(number), collate=COLLATOR, scheduler=scheduler, scaler=scaler,
        micro_batch_size=micro_batch_size,
    ) as run:  # fmt: skip
        for batch in run.batches():
            run.learn(losses(model, batch.inputs, half=scaler is not None))


def made_by_the_trainer(scene: Scene, model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    """Optimizer and schedule as the Trainer makes them, and the model as it begins to train it."""
    optimizer = Trainer(model, scene.arguments()).create_optimizer()
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=STEPS)
    set_seed(42)
    model.train()
    return optimizer, scheduler


def losses(model: nn.Module, inputs: dict[str, Tensor], *, half: bool = False) -> Tensor:
    """One a row, computed in float16 as accelerate does it, if so asked."""
    with torch.autocast("cpu", torch.float16, enabled=half):
        outputs = model(**{name: tensor for name, tensor in inputs.items() if name != "labels"})
    outputs.logits = outputs.logits.float()
    return causal_losses(outputs, inputs["labels"])


def replayed(
    scene: Scene, model: nn.Module, micro_batch_size: int, scaler: torch.amp.GradScaler | None = None
) -> Replayed:
    """Campaign 7 again, by a loop without the Trainer."""
    optimizer, scheduler = made_by_the_trainer(scene, model)
    with Client(scene.node.url) as client:
        logged = read_logged_campaign(client, bytes([7]) * 32)
    sources = [TrainingSource(scene.sources[name], scene.texts[name], scene.salt) for name in scene.sources]
    loss = partial(losses, half=scaler is not None)
    return replay(
        logged, ReplayJob(model, optimizer, sources, loss, COLLATOR, scheduler, micro_batch_size, scaler=scaler)
    )


class DiesAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: object, state: object, control: object, **of_trainer: object) -> None:
        if state.global_step == self.step - 1:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
