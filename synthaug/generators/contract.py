"""One suite that every generator must pass. Run it on your own: `check_generator(MyGenerator, data, settings, tmp)`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from synthaug.config import TrainConfig
from synthaug.generators.interface import Generator, TrainingData

# Files that can only be read by unpickling, which can run anyone's code.
_UNSAFE_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".joblib"}


def check_generator(kind: type[Generator], data: TrainingData, settings: TrainConfig, directory: Path) -> None:
    """Hold a generator against the promises of `interface.Generator`.

    Args:
        kind: The class under test.
        data: Small; at least two classes, and rows of `images` that `data` does not list.
        settings: With `images` set to a budget of seconds.
        directory: Empty, for checkpoints.

    Raises:
        AssertionError: A promise is broken; the message says which.
    """
    first, report = kind.fit(data, settings, seed=0, workdir=_new(directory / "work-1"))
    _check_report(report.images_seen, report.images_budget, settings)
    _check_saving(kind, first, data, directory)
    _check_sampling(first, data)
    _check_losses(first, data)
    _check_repeat(kind, first, data, settings, directory)
    _check_unlisted_rows_do_not_matter(kind, first, data, settings, directory)


def _draw(generator: Generator, data: TrainingData, seeds: list[int]) -> np.ndarray:
    labels = [index % len(data.classes) for index in range(len(seeds))]
    return generator.sample(labels, seeds, steps=4, guidance=1.0)


def _check_report(seen: int, budget: int, settings: TrainConfig) -> None:
    assert settings.images is not None, "settings.images must be set, or the suite cannot compare runs"
    assert budget == settings.images, f"the budget became {budget} although settings.images is {settings.images}"
    assert 0 < seen <= budget + settings.batch_size, f"{seen} images were seen on a budget of {budget}"


def _check_saving(kind: type[Generator], generator: Generator, data: TrainingData, directory: Path) -> None:
    folder = _new(directory / "saved")
    generator.save(folder)
    unsafe = [file.name for file in folder.rglob("*") if file.suffix in _UNSAFE_SUFFIXES]
    assert not unsafe, f"save wrote files that must be unpickled: {unsafe}"
    loaded = kind.load(folder, device="cpu")
    before, after = _draw(generator, data, [1, 2, 3, 4]), _draw(loaded, data, [1, 2, 3, 4])
    assert np.array_equal(before, after), "a loaded generator gives other images than the one that was saved"
    for guidance in (1.0, 2.0):
        steps, later = generator.default_steps(guidance), loaded.default_steps(guidance)
        assert steps == later, f"a loaded generator wants {later} steps with guidance {guidance}, the saved one {steps}"


def _check_sampling(generator: Generator, data: TrainingData) -> None:
    for guidance in (1.0, 2.0):
        steps = generator.default_steps(guidance)
        whole = isinstance(steps, int) and 2 <= steps <= 1000
        assert whole, f"{steps} steps by default with a guidance of {guidance}; 2 to 1000 can be asked for"
        drawn = generator.sample([0], [0], steps=steps, guidance=guidance)
        assert len(drawn) == 1, f"{len(drawn)} images of one label with the default of {steps} steps"
    images = _draw(generator, data, [5, 6, 7, 8])
    spec = data.pixels
    assert images.shape == (4, spec.size, spec.size, spec.channels), f"images have the shape {images.shape}"
    assert images.dtype == np.dtype(spec.dtype), f"images are {images.dtype}, the training images {spec.dtype}"
    assert images.min() >= spec.low, f"a value of {images.min()} lies under the lowest of the pixels, {spec.low}"
    assert images.max() <= spec.high, f"a value of {images.max()} lies over the highest of the pixels, {spec.high}"
    assert np.array_equal(images, _draw(generator, data, [5, 6, 7, 8])), "the same call gave other images"
    _draw(generator, data, [99, 98, 97, 96])
    assert np.array_equal(images, _draw(generator, data, [5, 6, 7, 8])), "an image depends on earlier calls"
    other = _draw(generator, data, [5, 16, 17, 18])
    # Compared as the network sees them: neighbours in the batch may change rounding, nothing more.
    difference = np.abs(spec.to_unit(images[:1]) - spec.to_unit(other[:1])).max()
    assert difference < 0.02, f"an image changed by {difference:.3f} with the seeds of its neighbours"
    assert not np.array_equal(images[1:], other[1:]), "the seed does not matter"
    for labels in ([-1], [len(data.classes)]):
        try:
            generator.sample(labels, [0], steps=4, guidance=1.0)
        except ValueError:
            continue
        raise AssertionError(f"label {labels[0]} was accepted; there are {len(data.classes)} classes")


def _check_losses(generator: Generator, data: TrainingData) -> None:
    levels = generator.loss_levels
    if not levels:
        return
    assert all(level > 0 for level in levels), f"a noise level of {levels} is no standard deviation"
    rows, labels = data.rows[:6], data.labels[:6].tolist()
    images = np.array(data.images[rows])
    losses = generator.denoising_losses(images, labels, draws=2, seed=0)
    assert losses.shape == (len(rows), len(levels)), f"losses have the shape {losses.shape}"
    assert np.isfinite(losses).all(), "a loss is not a number"
    assert (losses >= 0).all(), "a loss lies under zero"
    again = generator.denoising_losses(images, labels, draws=2, seed=0)
    assert np.array_equal(losses, again), "the same images and seed gave other losses"
    alone = generator.denoising_losses(images[:1], labels[:1], draws=2, seed=0)
    assert np.allclose(alone, losses[:1], rtol=1e-3, atol=1e-5), "an image's losses depend on its neighbours"
    other = generator.denoising_losses(images, labels, draws=2, seed=1)
    assert not np.array_equal(losses, other), "the noise does not depend on the seed"
    try:
        generator.denoising_losses(images[:1], [len(data.classes)], draws=1, seed=0)
    except ValueError:
        return
    raise AssertionError(f"losses were given for label {len(data.classes)}; there are {len(data.classes)} classes")


def _check_repeat(
    kind: type[Generator], first: Generator, data: TrainingData, settings: TrainConfig, directory: Path
) -> None:
    again, _ = kind.fit(data, settings, seed=0, workdir=_new(directory / "work-2"))
    same = np.array_equal(_draw(first, data, [1, 2]), _draw(again, data, [1, 2]))
    assert same, "the same data, settings and seed gave another generator"


def _check_unlisted_rows_do_not_matter(
    kind: type[Generator], first: Generator, data: TrainingData, settings: TrainConfig, directory: Path
) -> None:
    unlisted = np.setdiff1d(np.arange(len(data.images)), np.concatenate([data.rows, data.heldout_rows]))
    assert len(unlisted), "give the suite some images that the data do not list"
    images = np.array(data.images)
    images[unlisted] = 0
    changed = TrainingData(**{**data.__dict__, "images": images})
    other, _ = kind.fit(changed, settings, seed=0, workdir=_new(directory / "work-3"))
    same = np.array_equal(_draw(first, data, [1, 2]), _draw(other, data, [1, 2]))
    assert same, "the generator read images that the data do not list"


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
