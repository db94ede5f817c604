"""Lightning over a release (`pip install 'synthaug[lightning]'`).

python docs/loaders/train_lightning.py runs/quickstart/release --epochs 4
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn

from synthaug.loaders.lightning import ReleaseDataModule

parser = argparse.ArgumentParser()
parser.add_argument("release", type=Path)
parser.add_argument("--epochs", type=int, default=4)
arguments = parser.parse_args()


class Classifier(pl.LightningModule):
    def __init__(self, n_classes: int, n_values: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(n_values, 64), nn.ReLU(), nn.Linear(64, n_classes))

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        losses = nn.functional.cross_entropy(self.network(batch["image"]), batch["label"], reduction="none")
        # Synthetic images count for less here; the loader says how much each sample weighs.
        loss = (losses * batch["weight"]).sum() / batch["weight"].sum()
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
        right = self.network(batch["image"]).argmax(1) == batch["label"]
        self.log("accuracy", right.float().mean(), batch_size=len(right))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


pl.seed_everything(0, verbose=False)
data = ReleaseDataModule(arguments.release, batch_size=64, synthetic_ratio=1.0, synthetic_weight=0.5, output="dict")
image = next(iter(data.val_dataloader()))["image"][0]
classes = data.train_dataloader().dataset.classes
trainer = pl.Trainer(
    max_epochs=arguments.epochs,
    accelerator="cpu",
    devices=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    num_sanity_val_steps=0,
    log_every_n_steps=1,
)
trainer.fit(Classifier(len(classes), image.numel()), datamodule=data)
metrics = trainer.callback_metrics
print(f"loss {metrics['train_loss']:.3f}, validation accuracy {metrics['accuracy']:.3f}")
