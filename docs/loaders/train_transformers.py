"""The Hugging Face Trainer over a release (`pip install 'synthaug[transformers]'`), by what its verdict says.

python docs/loaders/train_transformers.py runs/quickstart/release --epochs 4
python docs/loaders/train_transformers.py runs/quickstart/release --follow-verdict
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from synthaug.loaders import BalancedLoader, ReleaseDataset, balanced_loader

parser = argparse.ArgumentParser()
parser.add_argument("release", type=Path)
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--follow-verdict", action="store_true", help="dose and recipe of the release's verdict")
arguments = parser.parse_args()


def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The names that models of transformers have."""
    return {
        "pixel_values": torch.stack([item["image"] for item in items]),
        "labels": torch.tensor([item["label"] for item in items]),
        "weight": torch.tensor([float(item["weight"]) for item in items]),
    }


class Classifier(nn.Module):
    def __init__(self, n_classes: int, n_values: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(n_values, 64), nn.ReLU(), nn.Linear(64, n_classes))

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        logits = self.network(pixel_values)
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        return {"loss": (losses * weight).sum() / weight.sum(), "logits": logits}


class ReleaseTrainer(Trainer):
    """The loader divides its epochs among processes itself, so it is not handed to accelerate."""

    def __init__(self, loader: BalancedLoader, **settings: Any) -> None:
        super().__init__(train_dataset=loader.dataset, **settings)
        self._loader = loader

    def get_train_dataloader(self) -> BalancedLoader:
        return self._loader


how = {"follow_verdict": True, "epochs": arguments.epochs} if arguments.follow_verdict else {"synthetic_ratio": 1.0}
loader = balanced_loader(arguments.release, batch_size=64, output="dict", loader_options={"collate_fn": collate}, **how)
for note in loader.left_to_you:
    print(f"the verdict also asks for: {note}")
validation = ReleaseDataset(arguments.release, split="validation", output="dict")
network = Classifier(len(loader.dataset.classes), loader.dataset[0]["image"].numel())
with tempfile.TemporaryDirectory() as folder:
    settings = TrainingArguments(
        folder,
        num_train_epochs=arguments.epochs,
        learning_rate=3e-3,
        per_device_eval_batch_size=64,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    trainer = ReleaseTrainer(
        loader, model=network, args=settings, eval_dataset=validation, data_collator=collate,
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())},
    )  # fmt: skip
    trained = trainer.train()
    print(f"loss {trained.training_loss:.3f}, validation accuracy {trainer.evaluate()['eval_accuracy']:.3f}")
