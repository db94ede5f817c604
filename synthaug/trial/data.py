"""The images of a trial by use: which rows of which file an arm trains on, and what it is measured on.

```
<directory>/trial.json        the files, the form of the images, the scarce classes
<directory>/images.parquet    file (int64, position in the list), row, label, use (see `USES`); order is rank
<directory>/smote.npy, scrambled.npy    images made here
```
Nothing is copied: real and synthetic images stay in the files of the stages before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from synthaug.formats.atomic import whole_file, write_text
from synthaug.formats.reserved_array import reserved_array
from synthaug.trial.recipes import Recipe

# test images lie under a use of their own, which only the finalists are ever asked about.
USES = ("train", "validation", "test", "synthetic", "scrambled", "smote")
TRIAL_FILE = "trial.json"
TABLE_FILE = "images.parquet"
SMOTE_FILE = "smote.npy"
SCRAMBLED_FILE = "scrambled.npy"

_PIECE = 256
_PIECE_OF_SMOTE = 2048
# SMOTE interpolates towards one of this many neighbours (Chawla et al. 2002).
_NEIGHBOURS = 5


@dataclass(frozen=True)
class Part:
    """Images of one use: rows of a file with their labels, in order of rank."""

    use: str
    path: Path
    rows: np.ndarray  # int64 [n]
    labels: np.ndarray  # int64 [n]


@dataclass(frozen=True)
class Chosen:
    """Images picked from the trial's table."""

    files: np.ndarray  # int64 [n]
    rows: np.ndarray  # int64 [n]
    labels: np.ndarray  # int64 [n]
    weights: np.ndarray  # float32 [n], of each image in the loss
    added: np.ndarray  # bool [n]: not a real training image as it is

    def __len__(self) -> int:
        return len(self.labels)


class TrialData:
    """What `write_trial` wrote, opened where a fit needs it."""

    def __init__(self, directory: Path) -> None:
        values = json.loads((directory / TRIAL_FILE).read_text(encoding="utf-8"))
        self.low, self.high = float(values["low"]), float(values["high"])
        self.size, self.channels, self.n_classes = values["size"], values["channels"], values["n_classes"]
        self.scarce: tuple[int, ...] = tuple(values["scarce"])
        self._paths = [Path(path) if Path(path).is_absolute() else directory / path for path in values["files"]]
        self._open: dict[int, np.ndarray] = {}
        table = pd.read_parquet(directory / TABLE_FILE)
        self._tables = {use: part.reset_index(drop=True) for use, part in table.groupby("use", sort=False)}

    def labels(self, use: str) -> np.ndarray:
        return self._of(use)["label"].to_numpy(np.int64)

    def everything(self, use: str) -> Chosen:
        return _chosen(self._of(use), use not in {"train", "validation", "test"})

    def training(self, recipe: Recipe, seed: int, *, real_only: bool = False) -> Chosen:
        """The images that a recipe trains on; a seed draws its own of those there are more of than the dose.

        The doses of a seed hold each other: the larger begins with the smaller.
        """
        real = self._of("train")
        if recipe.share < 1:
            real = real[self._kept(real, recipe.share, seed)]
        parts = [_chosen(real, False)]
        if recipe.added != "none" and not real_only:
            for label, number in recipe.dose:
                table = self._of("train" if recipe.added == "duplicates" else recipe.added)
                table = table[table["label"] == label]
                order = np.random.default_rng([seed, label, 0xD05E]).permutation(len(table))
                # Of a control there may be fewer than the dose: whole rounds of them, then a part of one.
                picked = np.resize(order, number) if recipe.added == "duplicates" else order[:number]
                parts.append(_chosen(table.iloc[picked], True, recipe.added_weight))
        return Chosen(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in Chosen.__dataclass_fields__)
        )

    def images(self, chosen: Chosen, positions: np.ndarray) -> np.ndarray:
        """Images [len(positions), size, size, channels] of the chosen ones at these positions, as they are stored."""
        result: np.ndarray | None = None
        files = chosen.files[positions]
        for file in np.unique(files):
            here = np.flatnonzero(files == file)
            found = self._file(int(file))[chosen.rows[positions[here]]]
            if result is None:
                result = np.empty((len(positions), *found.shape[1:]), dtype=found.dtype)
            result[here] = found
        assert result is not None, "positions are never empty"
        return result

    def _kept(self, real: pd.DataFrame, share: float, seed: int) -> np.ndarray:
        keep = np.ones(len(real), dtype=bool)
        for label in self.scarce:
            mine = np.flatnonzero(real["label"].to_numpy() == label)
            left = np.random.default_rng([seed, label, 0x5A4E]).permutation(mine)[: max(1, round(share * len(mine)))]
            keep[mine] = np.isin(mine, left)
        return keep

    def _file(self, file: int) -> np.ndarray:
        if file not in self._open:
            self._open[file] = np.load(self._paths[file], mmap_mode="r")
        return self._open[file]

    def _of(self, use: str) -> pd.DataFrame:
        return self._tables.get(use, self._tables["train"].iloc[:0])


@lru_cache(maxsize=2)
def load_trial(directory: Path) -> TrialData:
    """Open a trial once in a process."""
    return TrialData(directory)


def write_trial(
    directory: Path,
    parts: Iterable[Part],
    *,
    low: float,
    high: float,
    size: int,
    channels: int,
    n_classes: int,
    scarce: Iterable[int],
) -> None:
    """Write which image serves what. Files inside `directory` are noted relative to it."""
    files: list[Path] = []
    tables = []
    for part in parts:
        if part.path not in files:
            files.append(part.path)
        tables.append(
            pd.DataFrame({"file": files.index(part.path), "row": part.rows, "label": part.labels, "use": part.use})
        )
    with whole_file(directory / TABLE_FILE) as temporary:
        pd.concat(tables, ignore_index=True).to_parquet(temporary, index=False)
    values = {
        "files": [
            str(path.relative_to(directory) if path.is_relative_to(directory) else path.absolute()) for path in files
        ],
        "low": low,
        "high": high,
        "size": size,
        "channels": channels,
        "n_classes": n_classes,
        "scarce": [int(label) for label in scarce],
    }
    write_text(directory / TRIAL_FILE, json.dumps(values, indent=1) + "\n")


def write_scrambled(real: Part, numbers: Mapping[int, int], path: Path, low: float, high: float, seed: int) -> Part:
    """Content-free images of each class: real ones with the phases of noise, so the same spectrum and no anatomy."""
    images: np.ndarray = np.load(real.path, mmap_mode="r")
    labels = np.repeat(list(numbers), list(numbers.values())).astype(np.int64)
    out = reserved_array(path, images.dtype, (len(labels), *images.shape[1:]))
    done = 0
    for label, number in numbers.items():
        random = np.random.default_rng([seed, label, 0x5C4A])
        rows = np.resize(random.permutation(real.rows[real.labels == label]), number)
        for start in range(0, number, _PIECE):
            piece = rows[start : start + _PIECE]
            made = scramble(images[piece].astype(np.float64), low, high, random)
            out[done : done + len(piece)] = made if images.dtype.kind == "f" else np.rint(made)
            done += len(piece)
    out.flush()
    return Part("scrambled", path, np.arange(len(labels)), labels)


def scramble(images: np.ndarray, low: float, high: float, random: np.random.Generator) -> np.ndarray:
    """Give images the phases of white noise; amplitudes of all spatial frequencies, so mean and contrast, stay.

    Every channel of an image gets the same change of phase, which keeps how channels go together. What leaves
    low..high is clipped, the one thing that changes the spectrum a little.

    Args:
        images: [n, size, size, channels] float.
        low, high: Range of the values.
    """
    noise = np.fft.fft2(random.standard_normal(images.shape[:3]), axes=(1, 2))
    turn = np.exp(1j * np.angle(noise))
    # The mean is the frequency 0; noise may have a negative one, which would turn the image into its negative.
    turn[:, 0, 0] = 1
    spectrum = np.fft.fft2(images, axes=(1, 2)) * turn[..., None]
    result: np.ndarray = np.clip(np.fft.ifft2(spectrum, axes=(1, 2)).real, low, high)
    return result


def write_smote(real: Part, numbers: Mapping[int, int], path: Path, seed: int) -> Part:
    """SMOTE (Chawla et al. 2002) on pixels, by imbalanced-learn: `numbers[label]` new images of each class.

    Classes with one real image are left out: there is no neighbour to go towards.
    """
    from imblearn.over_sampling import SMOTE

    images: np.ndarray = np.load(real.path, mmap_mode="r")
    counts = {label: int((real.labels == label).sum()) for label in numbers}
    numbers = {label: number for label, number in numbers.items() if counts[label] > 1 and number > 0}
    labels = np.repeat(list(numbers), list(numbers.values())).astype(np.int64)
    out = reserved_array(path, images.dtype, (len(labels), *images.shape[1:]))
    done = 0
    for label, number in numbers.items():
        own = real.rows[real.labels == label]
        # SMOTE wants two classes and looks for neighbours in one alone: an image of another stands for the rest.
        other = real.rows[real.labels != label][:1]
        flat = images[np.concatenate([own, other])].reshape(len(own) + 1, -1).astype(np.float32)
        for piece, start in enumerate(range(0, number, _PIECE_OF_SMOTE)):
            size = min(_PIECE_OF_SMOTE, number - start)
            smote = SMOTE(
                sampling_strategy={1: len(own) + size},
                k_neighbors=min(_NEIGHBOURS, len(own) - 1),
                random_state=int(np.random.default_rng([seed, label, piece, 0x5307]).integers(2**31)),
            )
            made = smote.fit_resample(flat, np.array([1] * len(own) + [0]))[0][len(flat) :]
            made = made.reshape(size, *images.shape[1:])
            out[done : done + size] = made if images.dtype.kind == "f" else np.rint(made)
            done += size
    out.flush()
    return Part("smote", path, np.arange(len(labels)), labels)


def _chosen(table: pd.DataFrame, added: bool, weight: float = 1.0) -> Chosen:
    n = len(table)
    return Chosen(
        table["file"].to_numpy(np.int64),
        table["row"].to_numpy(np.int64),
        table["label"].to_numpy(np.int64),
        np.full(n, weight, dtype=np.float32),
        np.full(n, added),
    )
