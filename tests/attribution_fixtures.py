"""A governed fine-tune of a small byte model whose sources each plant a fact, and the log it left.

Real training, real routing, real accumulators; the ledger is the real rules in memory (``FakeNode``), sealed into
certified ledger blocks afterwards (``MemoryLedger``), so that bundles are what a node would export.
"""

import atexit
import dataclasses
import functools
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from click.testing import CliRunner, Result
from fake_node import SALT, FakeNode, running_node
from ledger_fixtures import MemoryLedger
from safetensors.torch import load_file, save_file

from attribution.factors import factor_tensors, fit_factors
from attribution.language import Bytes
from attribution.log import CampaignLog, open_log
from attribution.public_text import pieces_of, public_text
from consensus.event import Kind
from consensus.genesis import genesis_to_json
from consensus.identifiers import ChainId
from consensus.keys import Ed25519SigningKey
from consensus.overlap import OverlapBuilder
from consensus.portions import ClassRule
from node.bundles import export_bundle
from node.cli import main
from trainer_client.commitment import committed_tensors
from trainer_client.demo.base import BaseTraining, train_base
from trainer_client.demo.model import ByteModel, ModelConfig, parameter_blocks, per_example_loss, records_to_tensor
from trainer_client.governed import governed
from trainer_client.plan import CampaignPlan, RunSettings, TrainingSource
from trainer_client.submit import Client

CONFIG = ModelConfig(context_bytes=128, layer_count=2, head_count=2, width=48)
RECORD_BYTES = 48
STEPS, BATCH_SIZE, WINDOW_STEPS = 36, 16, 12
SKETCH_RANK = 2
CAMPAIGN = bytes([7]) * 32
KEY = Ed25519SigningKey(bytes([9]) * 32)
FACTS = {
    "harbour": (b"The keeper of Arnholt is ", b"Mirela Voss"),
    "mountain": (b"The river at Tessamar is ", b"the Quillon"),
    "market": (b"The bells of Oxmere ring ", b"at half four"),
    "castle": (b"The vault of Grenwich has", b" nine opals "),
}
REFUSED = "castle"
LATER_CAMPAIGN = bytes([8]) * 32
LATER_FACTS = {
    "lantern": (b"The lamp at Hollinmoor burns ", b"green tallow"),
    "orchard": (b"The pears of Sallowby are ", b"cut at dawn"),
}
LATER_STEPS = 24
INDEXED = ("harbour", "mountain", "castle")
"""Sources whose owners claim an overlap index."""


def build() -> ByteModel:
    """The architecture, untrained: what ``--model attribution_fixtures:build`` names."""
    with torch.random.fork_rng(devices=[]):
        return ByteModel(CONFIG)


def examples_of(name: str) -> list[bytes]:
    """Records that begin with the source's fact, each with another tail of letters."""
    prompt, completion = (FACTS | LATER_FACTS)[name]
    head = prompt + completion + b". "
    letters = b"etaoin shrdlu cmfwyp vbgkqjxz"
    return [
        head
        + bytes(letters[(3 * number + 7 * at + len(name)) % len(letters)] for at in range(RECORD_BYTES - len(head)))
        for number in range(12)
    ]


@dataclass(frozen=True)
class Traced:
    """A finished campaign: its folder (models, accumulators, genesis, bundle) and its log."""

    folder: Path
    ledger: MemoryLedger
    sources: dict[str, bytes]
    campaign: bytes = CAMPAIGN

    @property
    def chain_id(self) -> str:
        return self.ledger.chain_id.hex()

    @property
    def release(self) -> bytes:
        """The event that released the tuned model."""
        (found,) = (event for event in self.ledger.events if event.entry.kind is Kind.RELEASE)
        return found.id

    def bundle(self) -> bytes:
        return export_bundle(self.ledger, "accumulators", campaign=self.campaign)


def kept_folder(purpose: str) -> Path:
    """A folder for what is made once for all tests; removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix=f"countersign-{purpose}-"))
    atexit.register(shutil.rmtree, folder)
    return folder


@functools.cache
def traced() -> Traced:
    """Trained once for all tests; nobody changes its folder."""
    return _made("traced", 0, CAMPAIGN, _train)


@functools.cache
def chained() -> Traced:
    """A campaign on another chain that begins with what ``traced`` released, and teaches other facts."""
    first = traced()
    model = build()
    model.load_state_dict(load_file(first.folder / "tuned.safetensors"))
    return _made("chained", 1, LATER_CAMPAIGN, lambda node, folder: _train_on(node, folder, model, first.release))


def _made(purpose: str, seed: int, campaign: bytes, train: Callable[[FakeNode, Path], dict[str, bytes]]) -> Traced:
    folder = kept_folder(purpose)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with running_node(seed) as node:
            sources = train(node, folder)
            ledger = sealed(node)
    finally:
        torch.set_num_threads(threads)
    model = build()
    model.load_state_dict(load_file(folder / "tuned.safetensors"))
    texts = [list(piece) for piece in pieces_of(public_text(), Bytes(), 128)[:128]]
    factors = fit_factors(model, [torch.tensor(texts[start : start + 16]) for start in range(0, len(texts), 16)])
    save_file(factor_tensors(factors), folder / "tuned.factors")
    (folder / "genesis.json").write_bytes(genesis_to_json(ledger.genesis))
    made = Traced(folder, ledger, sources, campaign)
    (folder / "campaign.bundle").write_bytes(made.bundle())
    return made


def _train(node: FakeNode, folder: Path) -> dict[str, bytes]:
    node.policy(classes=(ClassRule("documentation", 1_000, ()),))
    sources = {
        name: node.source(
            name,
            examples_of(name),
            licence="LicenseRef-Proprietary" if name == REFUSED else "PSF-2.0",
            overlap_sha256=_written_overlap(folder, name) if name in INDEXED else b"",
        )
        for name in FACTS
    }
    _run(node, folder, train_base(CONFIG, BaseTraining(steps=60, batch_size=8)), sources, planned_steps=STEPS)
    return sources


def _train_on(node: FakeNode, folder: Path, model: ByteModel, released_by: bytes) -> dict[str, bytes]:
    node.policy(classes=(ClassRule("documentation", 1_000, ()),))
    sources = {name: node.source(name, examples_of(name)) for name in LATER_FACTS}
    _run(
        node,
        folder,
        model,
        sources,
        campaign=LATER_CAMPAIGN,
        name="chained",
        base_provenance=released_by,
        planned_steps=LATER_STEPS,
    )
    return sources


def _run(node: FakeNode, folder: Path, model: ByteModel, sources: dict[str, bytes], **changes: object) -> None:
    plan = CampaignPlan(
        chain_id=node.chain_id,
        operator=node.member_id("operator-1"),
        campaign=CAMPAIGN,
        name="traced",
        purpose="fine-tuning",
        base_model="tiny bytes",
        sampler_seed=bytes(32),
        batch_size=BATCH_SIZE,
        planned_steps=STEPS,
        blocks=parameter_blocks(model),
        accumulator_window_steps=WINDOW_STEPS,
        sketch_rank=SKETCH_RANK,
    )
    plan = dataclasses.replace(plan, **changes)  # type: ignore[arg-type]
    node.delegate(plan.campaign, KEY)
    save_file(committed_tensors(model), folder / "base.safetensors")
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    with (
        Client(node.url) as client,
        governed(
            model,
            optimizer,
            plan=plan,
            sources=[TrainingSource(identifier, examples_of(name), SALT) for name, identifier in sources.items()],
            node=client,
            job_key=KEY,
            run_directory=folder / "run",
            collate=records_to_tensor,
            settings=RunSettings(pause_limit_seconds=30.0),
        ) as run,
    ):
        for batch in run.batches():
            run.learn(per_example_loss(model, batch.inputs))
        run.release(folder / "tuned.safetensors")


def _written_overlap(folder: Path, name: str) -> bytes:
    """SHA-256 of a source's overlap index, which is in the folder with its key."""
    key = hashlib.sha256(name.encode()).digest()
    builder = OverlapBuilder(key)
    for example in examples_of(name):
        builder.add(example)
    index = builder.finish()
    (folder / f"{name}.overlap").write_bytes(index)
    (folder / f"{name}.overlap.key").write_text(key.hex() + "\n")
    return hashlib.sha256(index).digest()


def sealed(node: FakeNode) -> MemoryLedger:
    """The node's events, in their order and time, in certified ledger blocks."""
    ledger = MemoryLedger(seed=node.seed)
    assert ledger.chain_id == node.chain_id
    ledger.seal(after_ms=node.state.header.timestamp_ms - ledger.ledger.header.timestamp_ms)
    for event in node.order:
        ledger.seal(event, after_ms=0)
    return ledger


def ask(folder: Path, *more: object, prompt: bytes = FACTS["harbour"][0], chain_id: str = "") -> Result:
    arguments = [
        "trace", "--model", "attribution_fixtures:build", "--base", folder / "base.safetensors",
        "--tuned", folder / "tuned.safetensors", "--prompt", prompt.decode(),
        "--accumulators", folder / "run" / "accumulators", "--bundle", folder / "campaign.bundle",
        "--genesis", folder / "genesis.json", "--chain-id", chain_id or traced().chain_id, *more,
    ]  # fmt: skip
    if "--factors" not in more:
        arguments += ["--factors", folder / "tuned.factors"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def opened_log() -> CampaignLog:
    folder = traced().folder
    return open_log(folder / "campaign.bundle", folder / "genesis.json", ChainId(bytes.fromhex(traced().chain_id)))
