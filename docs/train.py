"""A governed fine-tune of a very small byte model on the registered sources: train.py JOB_KEY_FILE RUN_DIRECTORY."""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from consensus.keys import SignatureScheme, signer_for
from consensus.rejection import CountersignError
from trainer_client.governed import governed
from trainer_client.plan import CampaignPlan, TrainingSource
from trainer_client.progress import Progress
from trainer_client.submit import Client

BYTES = 64


class ByteModel(nn.Module):
    """Predicts each byte from the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        self.hidden = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 256)

    def forward(self, bytes_BT: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(functional.gelu(self.hidden(self.embedding(bytes_BT)))))


def examples(path: Path) -> list[bytes]:
    content = path.read_bytes()
    return [content[start : start + BYTES] for start in range(0, len(content), BYTES)]


def collate(records: list[bytes]) -> torch.Tensor:
    return torch.tensor([list(record.ljust(BYTES)) for record in records])


def per_example_loss(model: nn.Module, bytes_BT: torch.Tensor) -> torch.Tensor:
    logits_BTV = model(bytes_BT[:, :-1])
    return functional.cross_entropy(logits_BTV.transpose(1, 2), bytes_BT[:, 1:], reduction="none").mean(dim=1)


def show(happening: Progress) -> None:
    loss = "" if happening.loss is None else f"loss {happening.loss:.3f}"
    print(happening.event, happening.step, loss or happening.detail)


def main() -> None:
    job_key_file, run_directory = map(Path, sys.argv[1:])
    torch.manual_seed(1)
    job = json.loads(job_key_file.read_text())
    with Client(job["node_url"]) as client:
        registered = client.sources()
    sources = [
        TrainingSource(
            bytes.fromhex(source.id),
            examples(Path(f"{source.name}.txt")),
            bytes.fromhex(Path(f"{source.name}.salt").read_text()),
        )
        for source in registered
    ]
    plan = CampaignPlan(
        chain_id=bytes.fromhex(job["chain_id"]),
        operator=bytes.fromhex(job["operator"]),
        campaign=bytes.fromhex(job["campaign"]),
        name=run_directory.name,
        purpose="research",
        base_model="untrained byte model",
        sampler_seed=bytes(32),
        batch_size=16,
        planned_steps=40,
    )
    model = ByteModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.002)
    with governed(
        model,
        optimizer,
        plan=plan,
        sources=sources,
        node=job["node_url"],
        job_key=signer_for(SignatureScheme.labelled(job["job_key_scheme"]), bytes.fromhex(job["job_key_seed"])),
        run_directory=run_directory,
        collate=collate,
        on_progress=show,
    ) as run:
        for batch in run.batches():
            run.learn(per_example_loss(model, batch.inputs))
        run.release(run_directory / "tuned.safetensors")
    summary = run.summary()
    print(summary.presented_examples, "presented;", summary.admitted_examples, "admitted;", summary.refused_examples)


if __name__ == "__main__":
    try:
        main()
    except CountersignError as problem:
        sys.exit(f"train.py: {problem}")
