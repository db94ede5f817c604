"""Stage: can the checkpoint be asked which images it was trained on? The denoising-loss attack, on our own images."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from synthaug.config import Config
from synthaug.digest import digest_json
from synthaug.errors import LeakError, ReleaseError
from synthaug.progress import progress
from synthaug.records import (
    IMAGES_FILE,
    MEMBERSHIP_FILE,
    MEMBERSHIP_SCORES_FILE,
    PIPELINE_DIR,
    SEEN_FILE,
    SPLITS_FILE,
    Checkpoint,
    ClassMembership,
    Membership,
    MembershipFigures,
    Source,
    Splits,
)

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

# Noises at each level. More tell members a little better and take as much longer (docs/log.md).
DRAWS = 3
# Bounds on the time: images looked at in all (more where there are many classes), and of a class on either side.
MOST_IMAGES = 2000
MOST_OF_A_CLASS = 500
LEAST_OF_A_CLASS = 100
_PIECE = 256


def membership(config: Config, source: Source, splits: Splits, checkpoint: Checkpoint, directory: Path) -> Membership:
    """Try to tell the checkpoint's training images from held-out ones by its denoising loss.

    The attack of Matsumoto et al. 2023 (arXiv 2302.03262) and Carlini et al. 2023 (arXiv 2301.13188): a network makes
    out the images that it was trained on better than others like them. Members are the images used for gradients,
    the others those of the validation split; test images are not read. Each image is shown as it is, with its class,
    under the same few noises at each noise level of the generator; the levels are fixed and combined by mean rank.

    Writes membership.json (the record) and membership.parquet: image_id, label, member (bool), score (float64, higher
    for the likelier member), roughness (float64, the control), loss_0, loss_1 … (float32, by noise level). Neither the
    table nor a part of it is ever released: it says of single images whether they were trained on.

    Raises:
        CheckpointError: The checkpoint cannot be loaded.
        LeakError: The checkpoint has seen a test image.
    """
    import torch

    from synthaug.formats.atomic import write_text
    from synthaug.generators import generator_class, resolve_device
    from synthaug.quality.arithmetic import torch_threads
    from synthaug.quality.membership import Attacked, combined_score, figures, roughness

    started = time.monotonic()
    kind = generator_class(checkpoint.generator)
    table = _images_of_the_attack(splits, checkpoint)
    most = int(np.clip(MOST_IMAGES // (2 * len(source.classes)), LEAST_OF_A_CLASS, MOST_OF_A_CLASS))
    table, n_again = _without_repeats(table, source)
    table = _at_most(table, most, config.seed)
    levels = kind.loss_levels
    losses = np.zeros((len(table), len(levels)), dtype=np.float32)
    rough = np.zeros(len(table))
    if levels:
        images: np.ndarray = np.load(source.directory / IMAGES_FILE, mmap_mode="r")
        generator = kind.load(checkpoint.directory / PIPELINE_DIR, device=resolve_device(config.train.device))
        rows, labels = table["row"].to_numpy(), table["label"].to_numpy()
        with torch_threads(config.train.threads), progress("membership attack", len(table), "images") as bar:
            for start in range(0, len(table), _PIECE):
                piece = slice(start, start + _PIECE)
                pictures = images[rows[piece]]
                losses[piece] = generator.denoising_losses(
                    pictures, labels[piece].tolist(), draws=DRAWS, seed=config.seed
                )
                rough[piece] = roughness(pictures)
                bar.update(len(pictures))
        del generator
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    score = combined_score(losses, table["label"].to_numpy())
    attacked = Attacked(
        score=score,
        control=-rough,
        member=table["member"].to_numpy(bool),
        labels=table["label"].to_numpy(),
        groups=table["group_key"].to_numpy(str),
    )

    def measure(chosen: np.ndarray) -> MembershipFigures:
        found = figures(attacked.only(chosen), config.seed)
        if levels:
            return found
        why = f"generator '{kind.name}' does not denoise, so there is no loss to attack"
        return MembershipFigures(n_members=found.n_members, n_heldout=found.n_heldout, unavailable=why)

    overall = measure(np.ones(len(table), dtype=bool))
    classes = tuple(
        ClassMembership(label=label, name=name, **measure(attacked.labels == label).model_dump())
        for label, name in enumerate(source.classes)
        if (attacked.labels == label).any()
    )
    scores = table[["image_id", "label", "member"]].assign(score=score, roughness=rough)
    scores = scores.assign(**{f"loss_{column}": losses[:, column] for column in range(len(levels))})
    scores.to_parquet(directory / MEMBERSHIP_SCORES_FILE, index=False)
    result = Membership(
        directory=directory,
        digest="",
        overall=overall,
        classes=classes,
        levels=levels,
        draws=DRAWS,
        most_of_a_class=most,
        notes=tuple(_notes(overall, table, most, n_again)),
        seconds=round(time.monotonic() - started, 3),
    )
    plain = result.model_dump(mode="json", exclude={"digest", "seconds"})
    result = result.model_copy(update={"digest": digest_json([checkpoint.digest, plain])})
    write_text(directory / MEMBERSHIP_FILE, result.model_dump_json(indent=1) + "\n")
    if overall.auc is not None:
        logger.info(
            "membership attack: AUC %.3f (95 %% %.3f to %.3f; 0.5 is guessing)",
            overall.auc.estimate, overall.auc.low, overall.auc.high,
        )  # fmt: skip
    else:
        logger.warning("membership attack: unavailable, %s", overall.unavailable)
    return result


def refuse_membership(config: Config, found: Membership, file: Path, earlier: str | None = None) -> None:
    """Raise where the attack succeeds more often than `privacy.max_membership_auc` allows.

    What is held against the limit is the estimate, not an end of its interval: the strict reading. That of a class
    counts only where its interval lies above guessing; so small a class may come out at any figure by chance. A limit
    that is the default does not refuse what could not be measured; one that the user set does.

    Args:
        file: Where the figures are.
        earlier: Digest of the checkpoint, where it is one of an earlier job of which samples were kept.

    Raises:
        ReleaseError: An AUC is above the limit, or the user's own limit cannot be held against anything.
    """
    limit = config.privacy.max_membership_auc
    if limit is None:
        return
    from synthaug.text import printable

    which = (
        "the checkpoint" if earlier is None else f"checkpoint {earlier[:12]} of an earlier job, whose samples are kept,"
    )
    way_out = (
        "Train shorter (train.images or train.minutes), give it more real images"
        if earlier is None
        else "Draw its classes again from a new one"
    )
    advice = f"{way_out}, or set another privacy.max_membership_auc (null: none). The figures are in {file}."
    overall = found.overall
    if overall.auc is None:
        if "max_membership_auc" in config.privacy.model_fields_set:
            raise ReleaseError(
                f"no release is made: privacy.max_membership_auc is {limit:g}, and the membership attack on "
                f"{which.rstrip(',')} is unavailable: {overall.unavailable}. A larger validation split "
                "(split.validation) would allow it; without privacy.max_membership_auc nothing is refused for it."
            )
        return
    above = []
    if overall.auc.estimate > limit:
        above.append(f"{_spelled(overall)} over all classes")
    above += [
        f"{_spelled(item)} for class '{printable(item.name)}'"
        for item in found.classes
        if item.auc is not None and item.auc.estimate > limit and item.auc.low > 0.5
    ]
    if above:
        listed = "; ".join(above[:5]) + (f"; and {len(above) - 5} more classes" if len(above) > 5 else "")
        raise ReleaseError(
            f"no release is made: {which} tells its training images from others. The membership attack reaches "
            f"an AUC of {listed}, where 0.5 is guessing and privacy.max_membership_auc allows {limit:g}. {advice}"
        )


def _spelled(item: MembershipFigures) -> str:
    assert item.auc is not None
    return f"{item.auc.estimate:.3f} (95 % {item.auc.low:.3f} to {item.auc.high:.3f})"


def _images_of_the_attack(splits: Splits, checkpoint: Checkpoint) -> pd.DataFrame:
    """Images that the checkpoint has seen, with `member` (bool): used for gradients, not for stopping."""
    import pandas as pd

    table = pd.read_parquet(splits.directory / SPLITS_FILE)
    seen = pd.read_parquet(checkpoint.directory / SEEN_FILE)
    # An id stands for a picture: where the same one is in the source twice, the row that was used counts.
    table = table[table["held_back"].isna() & table["image_id"].isin(seen["image_id"])]
    if len(leaked := table[table["split"] == "test"]):
        raise LeakError(
            f"{len(leaked)} test images are among those the checkpoint has seen ({leaked['image_id'].iloc[0]}, …). "
            "Remove stages/train-* of the run folder and run again."
        )
    members = set(seen.loc[seen["use"] == "train", "image_id"])
    table = table.assign(member=table["image_id"].isin(members))
    return table.sort_values(["label", "member", "row"], ignore_index=True)


def _without_repeats(table: pd.DataFrame, source: Source) -> tuple[pd.DataFrame, int]:
    """Drop held-out images whose pixels, flipped or not, are those of a member: they are members."""
    from synthaug.quality.copies import picture_hash

    images: np.ndarray = np.load(source.directory / IMAGES_FILE, mmap_mode="r")
    hashes = np.array([picture_hash(images[row]) for row in table["row"]], dtype=str)
    member = table["member"].to_numpy(bool)
    again = ~member & np.isin(hashes, hashes[member])
    return table[~again].reset_index(drop=True), int(again.sum())


def _at_most(table: pd.DataFrame, most: int, seed: int) -> pd.DataFrame:
    """At most so many members and others of each class, drawn by the seed."""
    random = np.random.default_rng([seed, 0x6D])
    order = random.permutation(len(table))
    place = table.iloc[order].groupby(["label", "member"]).cumcount().sort_index()
    return table[place < most].reset_index(drop=True)


def _notes(overall: MembershipFigures, table: pd.DataFrame, most: int, n_again: int) -> list[str]:
    from synthaug.quality.membership import LEAST_HELDOUT_FOR_RATE

    if overall.auc is None:
        return [f"The membership attack on the checkpoint is unavailable: {overall.unavailable}."]
    notes = [
        "The held-out images of the membership attack are those of the validation split, by which training was stopped "
        "and the weights were chosen: they are a little closer to members than strangers would be, so its figures err "
        "on the low side."
    ]
    if n_again:
        notes.append(
            f"{n_again} held-out images are training images, as they are or flipped, and were left out of the "
            "membership attack. Others may be training images moved a little; they bring its figures down."
        )
    if (table.groupby(["label", "member"]).size() >= most).any():
        notes.append(f"The membership attack looked at {most} images of a class on either side at most.")
    if overall.true_positive_rate is None:
        notes.append(
            f"The share of training images told at 1 % false alarms is unavailable: no class has "
            f"{LEAST_HELDOUT_FOR_RATE} held-out images (or groups), and fewer cannot show so small a share."
        )
    control = overall.control_auc
    if control is not None and not control.low <= 0.5 <= control.high:
        notes.append(
            "Training and held-out images differ before any generator has seen them (by the roughness of the picture "
            f"alone, AUC {control.estimate:.3f}, 95 % {control.low:.3f} to {control.high:.3f}): the membership "
            "attack's figures hold that difference too."
        )
    return notes
