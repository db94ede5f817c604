"""Plain PyTorch over a release: augmentation, a schedule, and a training that goes on where it was broken off.

python docs/loaders/train_torch.py runs/quickstart/release --epochs 6
"""

from __future__ import annotations

import argparse
from pathlib import Path

import albumentations as A
import torch
from albumentations.pytorch import ToTensorV2
from torch import nn
from torch.utils.data import DataLoader

from synthaug.loaders import ReleaseDataset, balanced_loader, mix_then_real

parser = argparse.ArgumentParser()
parser.add_argument("release", type=Path)
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--schedule-epochs", type=int, help="of the whole training, where this is a part of it")
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--state", type=Path, help="a file to go on from, and to write after each epoch")
arguments = parser.parse_args()

torch.manual_seed(0)
augmentation = A.Compose([A.Affine(rotate=10, translate_percent=0.05, p=1), A.ToFloat(), ToTensorV2()])
loader = balanced_loader(
    arguments.release,
    batch_size=64,
    synthetic_ratio=1.0,  # as many synthetic images as real ones, of the classes that have any
    schedule=mix_then_real(max(1, (arguments.schedule_epochs or arguments.epochs) // 2)),
    transform=augmentation,
    num_workers=arguments.workers,
)
for row in loader.table():
    print(f"{row['class']}: {row['n_real']} real, {row['n_synthetic']} synthetic")

network = nn.Sequential(nn.Flatten(), nn.LazyLinear(64), nn.ReLU(), nn.LazyLinear(len(loader.dataset.classes)))
network(loader.dataset[0][0][None])  # tells the lazy layers their sizes
optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
first = 0
if arguments.state and arguments.state.exists():
    state = torch.load(arguments.state, weights_only=True)
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    loader.load_state_dict(state["loader"])
    first = state["loader"]["epoch"]

for epoch in range(first, arguments.epochs):
    total = seen = 0.0
    for images, labels in loader:
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total, seen = total + loss.item() * len(labels), seen + len(labels)
    print(f"epoch {epoch}: {seen:.0f} images, loss {total / seen:.3f}")
    if arguments.state:
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader.state_dict()}
        torch.save(state, arguments.state)

validation = DataLoader(ReleaseDataset(arguments.release, split="validation"), batch_size=64)
with torch.no_grad():
    right = sum((network(images).argmax(1) == labels).sum().item() for images, labels in validation)
print(f"validation: {right} of {len(validation.dataset)} right")
