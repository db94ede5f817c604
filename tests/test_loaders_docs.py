"""The scripts of docs/loaders run as they are, each in a process of its own, on a real release."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.release_parts import CLASSES, make_parts
from tests.test_import import HEAVY, loaded_after
from tests.verdict_parts import make_verdict

pytestmark = pytest.mark.slow

NEEDS = {
    "train_torch": None,
    "train_lightning": "lightning",
    "train_transformers": "transformers",
    "train_sklearn": None,
}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    return make_parts(folder / "in").release(folder / "release").directory


def run(repository: Path, script: str, *arguments: object) -> str:
    if (needed := NEEDS[script]) is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed: pip install 'synthaug[{needed}]'")
    ended = subprocess.run(
        [sys.executable, f"docs/loaders/{script}.py", *map(str, arguments)],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_every_script_is_run_here(repository: Path) -> None:
    assert {path.stem for path in (repository / "docs" / "loaders").glob("*.py")} == set(NEEDS)


def test_plain_pytorch(repository: Path, release: Path, tmp_path: Path) -> None:
    whole = run(repository, "train_torch", release, "--epochs", 6)
    assert "one: 12 real, 12 synthetic" in whole
    assert [int(n) for n in re.findall(r"epoch \d: (\d+) images", whole)] == [70, 70, 70, 50, 50, 50]
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", whole)]
    assert losses[-1] < losses[0]
    # Broken off after three epochs and gone on with: the same to the last digit shown, with workers too.
    state = tmp_path / "state.pt"
    schedule = ["--schedule-epochs", 6, "--state", state]
    first = run(repository, "train_torch", release, "--epochs", 3, *schedule)
    second = run(repository, "train_torch", release, "--epochs", 6, "--workers", 1, *schedule)
    assert re.findall(r"epoch.*", first + second) == re.findall(r"epoch.*", whole)


def test_lightning(repository: Path, release: Path) -> None:
    found = run(repository, "train_lightning", release, "--epochs", 8)
    assert float(re.findall(r"accuracy ([\d.]+)", found)[0]) > 0.4


def test_transformers(repository: Path, release: Path) -> None:
    found = run(repository, "train_transformers", release, "--epochs", 8)
    assert float(re.findall(r"validation accuracy ([\d.]+)", found)[0]) > 0.4


def test_transformers_by_the_verdict(repository: Path, tmp_path: Path) -> None:
    names, folder = list(CLASSES), tmp_path / "verdict"
    settings = {"loss": "class weights", "mix": "mixup", "added_weight": 0.3, "pretrain": True}
    verdict = make_verdict("helps", names=names, class_names=CLASSES, recipe_settings=settings, directory=folder)
    folder.mkdir()
    (folder / "verdict.json").write_text(verdict.model_dump_json(), encoding="utf-8")
    release = make_parts(tmp_path / "in").release(tmp_path / "release", verdict=verdict).directory
    found = run(repository, "train_transformers", release, "--follow-verdict")
    assert "the verdict also asks for: mixup of each batch" in found
    assert "validation accuracy" in found


def test_scikit_learn(repository: Path, release: Path) -> None:
    found = run(repository, "train_sklearn", release)
    assert "real images alone: 50 images" in found
    assert "as many synthetic as real: 70 images" in found
    assert re.search(r"^one +12 +12$", found, re.M)


def test_the_package_is_light_until_a_name_is_asked_for() -> None:
    assert loaded_after("import synthaug.loaders") & HEAVY == set()


_LIGHTNING = """
import sys
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from synthaug.errors import LoaderError
from synthaug.loaders.lightning import ReleaseDataModule

release, folder = sys.argv[1:]


class Watch(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network, self.seen = torch.nn.Linear(64, 3), []

    def training_step(self, batch, _):
        self.seen.append((batch[0].double().sum().item(), batch[1].tolist()))
        return torch.nn.functional.cross_entropy(self.network(batch[0].flatten(1)), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(name, path=None):
    kept = ModelCheckpoint(f"{folder}/{name}", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, max_epochs=3, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[kept],
    )
    model = Watch()
    trainer.fit(model, datamodule=ReleaseDataModule(release, batch_size=16, synthetic_ratio=1.0), ckpt_path=path)
    return model.seen


whole = fit("whole")
assert len(whole) == 15 and len({first for first, _ in whole}) == 15
for step in (3, 5, 7):  # in the first epoch, behind it, in the second
    assert fit(f"from-{step}", f"{folder}/whole/step={step}.ckpt") == whole[step:], step
try:
    ReleaseDataModule(release, synthetic_ratio=-1)
except LoaderError as error:
    assert "synthetic_ratio is -1" in str(error)
else:
    raise AssertionError
"""


def test_lightning_goes_on_from_its_checkpoints_with_the_same_batches(
    repository: Path, release: Path, tmp_path: Path
) -> None:
    if importlib.util.find_spec("lightning") is None:
        pytest.skip("lightning is not installed: pip install 'synthaug[lightning]'")
    ended = subprocess.run(
        [sys.executable, "-c", _LIGHTNING, str(release), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ended.returncode == 0, ended.stderr


_FROM_THE_HUB = """
import sys
from pathlib import Path
import datasets
from torch.utils.data import DataLoader
from synthaug.loaders import ReleaseStream, balanced_loader
repo, revision, local = sys.argv[1:]
def ids(loader): return sorted(name for batch in loader for name in batch["sample_id"])
here = ids(balanced_loader(Path(local), output="dict"))
data = datasets.load_dataset(repo, revision=revision)
assert ids(balanced_loader(data, output="dict", num_workers=1)) == here
assert ids(balanced_loader(data["train"], output="dict")) == here
streamed = datasets.load_dataset(repo, revision=revision, streaming=True)
assert ids(DataLoader(ReleaseStream(streamed, output="dict"), 16)) == here
print(len(here))
"""


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub 2.4 with its HTTP library
def test_a_release_that_was_pushed(
    repository: Path, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    from synthaug.config import PushConfig
    from synthaug.formats.hub import push
    from tests.loopback_hub import LoopbackHub

    with LoopbackHub(token="hf_aVerySecretToken0123456789") as hub:
        environment = hub.environment(tmp_path / "home")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        push(release, PushConfig(repo_id="clinic/digits", real_images=True, private=False))
        revision = hub.repositories["clinic/digits"].commits[-1].sha
        ended = subprocess.run(
            [sys.executable, "-c", _FROM_THE_HUB, "clinic/digits", revision, str(release)],
            env={**os.environ, **environment, "PYTHONPATH": str(repository)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=180,
        )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split()[-1] == "70"


_SPAWNED = """
import json
import sys
from pathlib import Path
import torch.distributed as distributed
import torch.multiprocessing as processes
from synthaug.loaders import balanced_loader


def train(rank, release, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    options = {"multiprocessing_context": "spawn"} if rank else {}
    there = balanced_loader(release, batch_size=8, output="dict", num_workers=rank, loader_options=options)
    seen = [[list(batch["sample_id"]), batch["image"].sum().item()] for batch in there]
    here = balanced_loader(release, batch_size=8, output="dict")
    assert seen == [[list(batch["sample_id"]), batch["image"].sum().item()] for batch in here]
    Path(folder, f"{rank}.json").write_text(json.dumps([name for names, _ in seen for name in names]))
    distributed.destroy_process_group()


if __name__ == "__main__":
    processes.spawn(train, sys.argv[1:], nprocs=2)
"""


def test_two_processes_and_a_worker_that_is_spawned(repository: Path, release: Path, tmp_path: Path) -> None:
    """As on macOS and Windows: nothing is inherited, everything is sent. Ranks come from torch.distributed."""
    (tmp_path / "spawned.py").write_text(_SPAWNED)
    ended = subprocess.run(
        [sys.executable, tmp_path / "spawned.py", release, tmp_path],
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ended.returncode == 0, ended.stderr
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert len(one) == len(other) == 35
    assert len({*one, *other}) == 70
