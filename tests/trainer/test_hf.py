"""``transformers.Trainer`` under a campaign: a small GPT-2 of random weights, the real rules behind real HTTP."""

import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from fake_node import running_node
from governed_fixtures import assert_moved_alike
from hf_fixtures import (
    BATCH_SIZE,
    COLLATOR,
    STEPS,
    DiesAt,
    Scene,
    in_a_plain_loop,
    recorded,
    replayed,
    texts,
)
from hf_rank_fixtures import LENGTH, gpt2, lora, train
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, set_seed

from consensus.bands import UNMEASURED, decode_losses
from consensus.event import Kind
from consensus.portions import BandRule, BlockWeight, ClassRule, SourceRefusal
from consensus.review import Evaluation
from consensus.sampler import presented_examples
from trainer_client.base_losses import path_of
from trainer_client.commitment import parameter_root_of
from trainer_client.evaluation import mean_metric, slice_of
from trainer_client.heads import head_blocks
from trainer_client.hf import (
    GovernanceCallback,
    GovernedTrainer,
    PackingCollator,
    TrainerUnsupported,
    causal_losses,
)
from trainer_client.hf_options import not_given
from trainer_client.pieces import part_of_entry
from trainer_client.plan import RunSettings, default_blocks, manifest_of
from trainer_client.replay import Replayed
from trainer_client.route import RoutingLeak

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

NO_FIRST_LAYER = (ClassRule("documentation", 1_000, ()), ClassRule("news", 500, (BlockWeight("transformer.h.0", 0),)))


CHECKPOINTED = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}


class Table(Sequence[bytes]):
    """Rows by number; a slice is a table of columns."""

    def __init__(self, rows: list[bytes]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: object) -> object:
        return {"text": self.rows[place]} if isinstance(place, slice) else self.rows[place]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with running_node() as node:
        yield Scene(node, tmp_path)


@pytest.mark.parametrize("build", [gpt2, lora])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_chain_is_the_one_a_plain_loop_records(scene: Scene, build: type[nn.Module], accumulated: int) -> None:
    size = BATCH_SIZE // accumulated
    model = build()
    arguments = scene.arguments(per_device_train_batch_size=size, gradient_accumulation_steps=accumulated)
    trainer = scene.trainer(model, args=arguments)
    result = trainer.train()
    head = scene.node.head(bytes([7]) * 32)
    assert (head.closed, head.steps, scene.node.rejected) == ("released", STEPS, {})
    assert head.root == parameter_root_of(model)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert result.global_step == STEPS
    in_a_plain_loop(scene, build(), 8, size)
    steps = scene.steps(7)
    assert [step.index for step in steps] == list(range(1, STEPS + 1))
    assert [recorded(step) for step in steps] == [recorded(step) for step in scene.steps(8)]
    reasons = {
        item.reason for event in scene.events(Kind.REFUSAL) for item in event.items if isinstance(item, SourceRefusal)
    }
    assert reasons == {"licence-not-admitted"}


def test_examples_that_are_rows_of_a_table_are_probed_and_trained_on_row_by_row(scene: Scene) -> None:
    scene.texts = {name: Table(rows) for name, rows in scene.texts.items()}
    scene.trainer(gpt2()).train()
    head = scene.node.head(bytes([7]) * 32)
    assert (head.closed, head.steps) == ("released", STEPS)


def test_refused_example_changes_no_bit_and_blocked_one_no_bit_of_the_block_in_the_first_step(tmp_path: Path) -> None:
    found: list[dict[str, Tensor]] = []
    for changed in (None, "secret", "paper"):
        with running_node() as node:
            scene = Scene(node, tmp_path / str(changed), NO_FIRST_LAYER)
            scene.salt = None
            if changed is not None:
                scene.texts[changed] = [bytes(reversed(text)) for text in scene.texts[changed]]
            first: dict[str, Tensor] = {}

            class AfterFirst(TrainerCallback):
                def on_optimizer_step(self, args: object, state: object, control: object, **of: object) -> None:
                    model = of["model"]
                    assert isinstance(model, nn.Module)
                    for name, parameter in model.named_parameters():
                        first.setdefault(name, parameter.detach().clone())  # noqa: B023

            model = gpt2(0.0)
            scene.trainer(model, callbacks=[AfterFirst()]).train()
            found.append(first | {f"end {name}": each.detach() for name, each in model.named_parameters()})
    plain, secret, paper = found
    assert all(torch.equal(plain[name], secret[name]) for name in plain)
    assert all(torch.equal(plain[name], paper[name]) for name in plain if name.startswith("transformer.h.0."))
    assert not all(torch.equal(plain[name], paper[name]) for name in plain if name.startswith("transformer.h.1."))


def test_base_losses_are_the_trainers_own_without_dropout_and_sort_examples_into_bands(scene: Scene) -> None:
    model = gpt2(0.5).eval()
    own = [(source, scene.texts[name]) for name, source in scene.sources.items() if name != "secret"]
    expected = []
    for _, contents in sorted(own):
        inputs = COLLATOR(contents)
        with torch.no_grad():
            outputs = model(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        expected += (1_000 * causal_losses(outputs, inputs["labels"])).tolist()
    edge = round(sorted(expected)[len(expected) // 2]) + 1
    closed = (BandRule(1, 1_000, (BlockWeight("transformer.h.0", 0),)),)
    classes = tuple(ClassRule(name, 1_000, (), closed) for name in ("documentation", "news"))
    scene.node.policy(classes=classes, entropy_edges_milli=(edge,))
    scene.trainer(model, args=scene.arguments(per_device_train_batch_size=2, gradient_accumulation_steps=3)).train()
    found = decode_losses(path_of(scene.directory / "7", bytes([7]) * 32).read_bytes(), 24)
    measured = [loss for loss in found if loss != UNMEASURED]
    assert measured == pytest.approx(expected, abs=1)
    stated = {each.band for event in scene.events(Kind.STEP) for each in event.governance.profiles}  # type: ignore[union-attr]
    assert (stated, scene.node.head(bytes([7]) * 32).closed) == ({0, 1}, "released")


@pytest.mark.parametrize("build", [gpt2, lora])
def test_training_by_heads_moves_all_heads_but_the_closed_one(scene: Scene, build: type[nn.Module]) -> None:
    model = build()
    table = head_blocks(model, default_blocks(model))
    closed, open_ = sorted(block for block in table if block.endswith(("h.0.attn.head.0", "h.0.attn.head.1")))
    rules = (ClassRule(name, 1_000, (BlockWeight(closed, 0),)) for name in ("documentation", "news"))
    scene.node.policy(classes=tuple(rules), routing_granularities=("head",))
    scene.plan_changes["routing_granularity"] = "head"
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = scene.trainer(model)
    trainer.train()
    assert scene.node.head(bytes([7]) * 32).closed == "released"
    moved = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for block in (closed, open_):
        same = [torch.equal(part_of_entry(moved, entry), part_of_entry(base, entry)) for entry in table[block]]
        assert same == [block == closed] * len(same)
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


@pytest.mark.parametrize("changes", [{"activation_checkpointing": True}, {"bf16": True}], ids=str)
def test_checkpointed_and_bf16_training_is_recorded_and_released(scene: Scene, changes: dict[str, object]) -> None:
    trainer = scene.trainer(gpt2(), args=scene.arguments(**changes))
    trainer.train()
    assert scene.node.head(bytes([7]) * 32).closed == "released"


def test_callback_behind_the_governance_records_evaluations_of_the_weights_after_each_step(scene: Scene) -> None:
    class Measures(TrainerCallback):
        def on_step_end(self, args: object, state: object, control: object, **of: object) -> None:
            run = trainer.governance.run
            assert run is not None
            metric = mean_metric("loss", [1.0, 2.0])
            run.evaluate("held-out", [metric], data=slice_of("held out", texts("held out")), script=Path(__file__))

    trainer = scene.trainer(gpt2(), callbacks=[Measures()])
    trainer.train()
    roots = [step.root_after for step in scene.steps()]
    found = [event.operation for event in scene.events(Kind.EVALUATION)]
    assert [each.parameter_root for each in found if isinstance(each, Evaluation)] == roots
    assert scene.node.head(bytes([7]) * 32).closed == "released"


def test_evaluation_is_the_trainers_own_and_changes_nothing(scene: Scene) -> None:
    held_out = [{key: value[0] for key, value in COLLATOR([text]).items()} for text in texts("held out")]
    arguments = scene.arguments(eval_strategy="steps", eval_steps=2)
    trainer = scene.trainer(gpt2(0.0), args=arguments, eval_dataset=held_out)
    trainer.data_collator = lambda examples: (
        COLLATOR(examples) if isinstance(examples[0], bytes) else {
            key: torch.stack([each[key] for each in examples]) for key in examples[0]
        }
    )  # fmt: skip
    trainer.train()
    assert sum("eval_loss" in line for line in trainer.state.log_history) == STEPS // 2
    scene.trainer(gpt2(0.0), 8).train()
    assert [step.root_after for step in scene.steps(7)] == [step.root_after for step in scene.steps(8)]


def test_step_refused_by_the_log_is_taken_again_and_the_trainer_goes_on(scene: Scene) -> None:
    refused = scene.refuse_last_step_once()
    model = gpt2()
    result = scene.trainer(model).train()
    head = scene.node.head(bytes([7]) * 32)
    assert refused
    assert (head.closed, head.steps, head.rollbacks, result.global_step) == ("released", STEPS, 1, STEPS)
    assert head.root == parameter_root_of(model)


def test_model_that_bypasses_the_routing_is_refused_by_name_before_anything_is_on_the_log(scene: Scene) -> None:
    class Bypass(GPT2LMHeadModel):
        def forward(self, *arguments: object, **named: object) -> object:
            outputs = super().forward(*arguments, **named)
            outputs.logits = outputs.logits + self.transformer.ln_f.bias.sum()
            return outputs

    model = Bypass(gpt2().config)
    with pytest.raises(RoutingLeak, match=r"transformer\.ln_f\.bias"):
        scene.trainer(model).train()
    assert scene.events(Kind.CAMPAIGN) == []
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm=1.0: a global norm"),
        ({"max_steps": 3}, "planned_steps=6"),
        ({"gradient_accumulation_steps": 2}, "batch_size=6"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"train_sampling_strategy": "group_by_length"}, "the campaign fixes the order"),
        ({"dataloader_num_workers": 1}, "dataloader_num_workers"),
        ({"optim": "lomo"}, "optim=lomo"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "stepped by evaluations"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"neftune_noise_alpha": 1.0}, "neftune"),
        ({"fsdp": True, "fsdp_plugin_args": {"fsdp_version": 1}}, "fsdp_config version 1"),
        ({"fsdp": True, "fsdp_plugin_args": {"activation_checkpointing": True}}, "renames the parameters"),
        ({"fsdp": True, "fsdp_plugin_args": {"cpu_offload": True}}, "cpu_offload"),
        ({"fsdp": True, "fsdp_config": {"xla": True}}, "fsdp_config xla"),
        ({"fsdp": True, "torch_compile": True}, "torch_compile with fsdp"),
        ({"deepspeed": "configuration.json"}, "several processes"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end"),
    ],
    ids=str,
)
def test_option_that_cannot_be_governed_is_refused_by_name(
    scene: Scene, changes: dict[str, object], named: str
) -> None:
    arguments = scene.arguments()
    for name, value in changes.items():
        setattr(arguments, name, value)
    with pytest.raises(TrainerUnsupported, match=named):
        scene.trainer(gpt2(), args=arguments)
    assert scene.events(Kind.CAMPAIGN) == []


def test_sharding_where_accelerate_does_none_is_refused_by_name(scene: Scene) -> None:
    (problem,) = not_given(scene.arguments(fsdp=True), Accelerator(cpu=True))
    assert problem.startswith("fsdp: accelerate shards no model on 'cpu'")


@pytest.mark.parametrize("option", [{"model_init": gpt2}, {"train_dataset": [{"input_ids": [1]}]}], ids=", ".join)
def test_trainers_own_model_or_examples_are_refused_by_name(scene: Scene, option: dict[str, object]) -> None:
    with pytest.raises(TrainerUnsupported, match=next(iter(option))):
        scene.trainer(gpt2(), **option)


def test_steps_without_an_admitted_example_are_recorded_also_as_the_last_ones(scene: Scene) -> None:
    """One example a step, of three sources of which one is refused: some steps are empty, here the last too."""
    manifest = manifest_of(scene.campaign()["sources"])  # type: ignore[arg-type]
    secret = scene.sources["secret"]

    def is_empty(seed: int, step: int) -> bool:
        return presented_examples(manifest, bytes([seed]) * 32, 1, step)[0][0] == secret

    seed = next(seed for seed in range(64) if is_empty(seed, STEPS) and not is_empty(seed, 1))
    given = scene.campaign(9, seed)
    given["plan"] = dataclasses.replace(given["plan"], batch_size=1)  # type: ignore[type-var]
    callback = GovernanceCallback(**given, release=scene.directory / "tuned.safetensors")
    arguments = scene.arguments(per_device_train_batch_size=1)
    trainer = GovernedTrainer(gpt2(), arguments, data_collator=COLLATOR, callbacks=[callback])
    trainer.train()
    head = scene.node.head(bytes([9]) * 32)
    assert (head.closed, head.steps) == ("released", STEPS)
    assert head.admitted == sum(not is_empty(seed, step) for step in range(1, STEPS + 1))
    assert trainer.state.global_step == STEPS


def test_callback_in_an_ordinary_trainer_refuses_to_train_ungoverned(scene: Scene) -> None:
    rows = [{key: value[0] for key, value in COLLATOR([text]).items()} for text in texts("manual")]
    callback = GovernanceCallback(**scene.campaign())
    trainer = Trainer(gpt2(), scene.arguments(), train_dataset=rows, callbacks=[callback])
    with pytest.raises(TrainerUnsupported, match="GovernedTrainer"):
        trainer.train()


@pytest.mark.parametrize("build", [gpt2, lora])
@pytest.mark.parametrize("died_at", [2, 4, STEPS])
def test_training_that_died_is_taken_up_and_ends_with_the_same_chain(
    scene: Scene, build: type[nn.Module], died_at: int
) -> None:
    settings = RunSettings(snapshot_every_steps=2, checkpoint_every_steps=2)
    with pytest.raises(KeyboardInterrupt):
        scene.trainer(build(), settings=settings, callbacks=[DiesAt(died_at)]).train()
    set_seed(99)
    trainer = scene.trainer(build(), settings=settings)
    result = trainer.train(resume_from_checkpoint=True)
    assert result.global_step == STEPS
    scene.trainer(build(), 8).train()
    assert [step.index for step in scene.steps(7)] == list(range(1, STEPS + 1))
    assert [recorded(step) for step in scene.steps(7)] == [recorded(step) for step in scene.steps(8)]


def test_packed_batch_and_a_trainers_own_checkpoint_are_refused(scene: Scene) -> None:
    trainer = scene.trainer(gpt2())
    with pytest.raises(TrainerUnsupported, match="taken up from its own run_directory"):
        trainer.train(resume_from_checkpoint="output/checkpoint-2")
    trainer.data_collator = lambda examples: COLLATOR([b"".join(examples)])
    with pytest.raises(TrainerUnsupported, match="one row per example"):
        trainer.train()
    assert scene.events(Kind.CAMPAIGN) == []


@pytest.mark.parametrize("build", [gpt2, lora])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_accumulators_are_those_of_a_plain_loop_and_replay_bit_for_bit(
    scene: Scene, build: Callable[[], nn.Module], accumulated: int
) -> None:
    scene.plan_changes = {"accumulator_window_steps": 4}
    size = BATCH_SIZE // accumulated
    arguments = scene.arguments(per_device_train_batch_size=size, gradient_accumulation_steps=accumulated)
    scene.trainer(build(), args=arguments).train()
    in_a_plain_loop(scene, build(), 8, size)
    roots = [step.accumulator_root != b"" for step in scene.steps(7)]
    assert roots == [False, False, False, True, False, True]
    assert [recorded(step) for step in scene.steps(7)] == [recorded(step) for step in scene.steps(8)]

    model = build()
    found = replayed(scene, model, size)
    assert found == Replayed(STEPS, STEPS, None, parameter_root_of(model))


def test_recital_under_the_trainer_is_undone_and_the_trainer_goes_on(scene: Scene) -> None:
    caught: list[tuple[bytes, int]] = []
    asked: list[int] = []

    class Recites:
        def glance(self, shown: Mapping[tuple[bytes, int], object], hits_BT: Tensor, floor: int) -> list[object]:
            return []

        def signals(
            self, model: nn.Module, shown: Mapping[tuple[bytes, int], object], threshold: int
        ) -> dict[object, int]:
            asked.append(len(shown))
            if caught or len(asked) < 4:
                return {}
            caught.append(min(shown))
            return {caught[0]: 900}

    model = gpt2()
    result = scene.trainer(model, memorization=Recites()).train()
    head = scene.node.head(bytes([7]) * 32)
    assert (head.closed, head.steps, head.rollbacks, result.global_step) == ("released", STEPS, 1, STEPS)
    assert head.root == parameter_root_of(model)
    refused = [
        example
        for event in scene.events(Kind.REFUSAL)
        for item, held in zip(event.items, event.portions.data.items, strict=True)  # type: ignore[union-attr]
        if isinstance(item, SourceRefusal) and item.reason == "memorization-above-threshold"
        for example in [(item.source, number) for number in held.examples]
    ]
    assert set(refused) == set(caught)


def on_two_processes(
    scene: Scene, directory: Path, build: Callable[..., nn.Module] = gpt2, **changes: object
) -> tuple[dict[str, Tensor], Replayed]:
    """Campaign 8 trained by two processes; the second one's weights, and what the replay by both found."""
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "ddp_backend": "gloo"}
    specification = directory / "specification"
    options = scene.options(**CHECKPOINTED, **split, **changes)
    specification.write_bytes(
        pickle.dumps((scene.campaign(8), options, directory / "ranks.safetensors", build.__name__))
    )
    tests = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "default",
    }
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hf_rank_fixtures"]
    subprocess.run([sys.executable, *launch, str(specification)], env=environment, check=True, timeout=180)
    assert [step.index for step in scene.steps(8)] == list(range(1, STEPS + 1))
    return pickle.loads((directory / "of-rank-1").read_bytes())  # type: ignore[no-any-return]


COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
"""By the compiler's own tracing and backward pass, without the minutes of generating C++."""


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("DDP", {}), ("FSDP2", {"fsdp": True}), ("DDP", COMPILED)],
    ids=["DDP", "FSDP2", "compiled, DDP"],
)
def test_two_processes_train_what_one_trains_with_accumulation_and_checkpointing_and_are_replayed(
    scene: Scene, tmp_path: Path, kind: str, changes: dict[str, object]
) -> None:
    alone = train(scene.campaign(7), scene.options(**CHECKPOINTED), tmp_path / "alone.safetensors")
    of_second, replayed_by_both = on_two_processes(scene, tmp_path, **changes)
    for found, expected in zip(scene.steps(8), scene.steps(7), strict=True):
        assert found.loss_micro == pytest.approx(expected.loss_micro, rel=1e-3)
    wanted, base = alone.state_dict(), gpt2(dropout=0.0).state_dict()
    for found in (load_file(tmp_path / "ranks.safetensors"), of_second):
        assert_moved_alike(found, {name: wanted[name] for name in found}, base)
    opened = scene.events(Kind.CAMPAIGN)[1].operation
    told = {setting.name: setting.value for setting in opened.hyperparameters}  # type: ignore[union-attr]
    assert told["data_parallel"] == kind
    assert replayed_by_both == Replayed(STEPS, STEPS, None, scene.node.head(bytes([8]) * 32).root)


def test_two_processes_with_lora_on_sharded_weights_in_float16_skip_alike_and_are_replayed(
    scene: Scene, tmp_path: Path
) -> None:
    of_second, replayed_by_both = on_two_processes(scene, tmp_path, lora, fsdp=True, fp16=True)
    skipped = [event.governance.skipped for event in scene.events(Kind.STEP)]  # type: ignore[union-attr]
    assert skipped[0]
    assert not all(skipped)
    released = load_file(tmp_path / "ranks.safetensors")
    assert all(torch.equal(of_second[name], tensor) for name, tensor in released.items())
    base = lora(dropout=0.0).state_dict()
    moved = {name for name, tensor in released.items() if not torch.equal(tensor, base[name])}
    assert moved
    assert all("lora" in name for name in moved)
    assert replayed_by_both == Replayed(STEPS, STEPS, None, scene.node.head(bytes([8]) * 32).root)


def test_packed_rows_train_what_padded_ones_train(scene: Scene) -> None:
    found = {}
    for number, collator in ((7, COLLATOR), (8, PackingCollator(LENGTH))):
        callback = GovernanceCallback(**scene.campaign(number), release=scene.directory / f"{number}.safetensors")
        model = gpt2(dropout=0.0)
        GovernedTrainer(model, scene.arguments(), data_collator=collator, callbacks=[callback]).train()
        assert len(scene.steps(number)) == STEPS
        found[number] = model.state_dict()
    assert_moved_alike(found[8], found[7], gpt2(dropout=0.0).state_dict(), part=0.05)


def test_packed_rows_with_a_loss_of_rows_are_refused(scene: Scene) -> None:
    options = {"compute_loss_func": lambda outputs, labels: outputs.logits.mean(dim=(1, 2))}
    callback = GovernanceCallback(**scene.campaign(7))
    trainer = GovernedTrainer(
        gpt2(), scene.arguments(), data_collator=PackingCollator(LENGTH), callbacks=[callback], **options
    )
    with pytest.raises(TrainerUnsupported, match="rows hold several examples"):
        trainer.train()
