"""The search for copies on real images: planted copies are found, other real images are not taken for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from synthaug.quality.alignment import canvas_for, shrink, to_floats, unexplained
from synthaug.quality.alterations import alterations, planted
from synthaug.quality.calibration import calibrate, clopper_pearson, same_picture
from synthaug.quality.copies import CopySearch, Projection, encode, fit_projection, near_duplicates, picture_hash
from synthaug.records import PixelSpec

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def spec_of(images: np.ndarray) -> PixelSpec:
    size, channels = images.shape[1], images.shape[3]
    return PixelSpec(
        channels=channels, dtype=images.dtype.name, colour={1: "grey", 3: "rgb"}.get(channels, "channels"), low=0.0,
        high={"uint8": 255.0, "uint16": 65535.0}.get(images.dtype.name, 1.0), size=size, fit="none",
        interpolation="none", smallest=(size, size), largest=(size, size),
    )  # fmt: skip


class Search:
    """What the judge builds, of some images."""

    def __init__(self, images: np.ndarray) -> None:
        self.spec, self.images = spec_of(images), images
        self.canvas = canvas_for(images.shape[1])
        self.pictures = self.shrink(images)
        self.projection = fit_projection(self.pictures, self.canvas, 0)
        self.search = CopySearch(
            self.pictures, encode(self.pictures, self.projection, self.canvas), self.projection, self.canvas
        )

    def shrink(self, images: np.ndarray) -> np.ndarray:
        return shrink(images, self.spec.low, self.spec.high)

    def threshold(self, heldout: np.ndarray) -> float:
        found = self.search.find(self.shrink(heldout))
        honest = found.distance[~same_picture(found.distance, found.contrast)]
        calibrated = calibrate(honest, np.arange(len(honest)), 0.01)
        assert calibrated.alarms.mean() <= 0.01
        return calibrated.threshold

    def caught(self, threshold: float, number: int) -> dict[str, float]:
        some = self.images[np.random.default_rng(1).permutation(len(self.images))[:number]]
        return {
            item.name: float(
                (self.search.find(self.shrink(planted(some, self.spec, item, 0))).distance < threshold).mean()
            )
            for item in alterations(self.spec.size)
        }


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    from sklearn.datasets import load_digits

    return np.rint(load_digits().images * (255 / 16)).astype(np.uint8)[..., None]


@pytest.fixture(scope="module")
def search(digits: np.ndarray) -> Search:
    return Search(digits[:1200])


@pytest.mark.slow
def test_planted_copies_of_digits_are_caught(digits: np.ndarray, search: Search) -> None:
    caught = search.caught(search.threshold(digits[1200:]), 150)
    assert caught["exact"] == caught["mirrored"] == caught["upside down"] == 1
    assert min(caught[name] for name in ("shifted by 1 px", "shifted by 1 px both ways", "20 % darker")) >= 0.99
    # So small pictures resemble each other, and the distance is short.
    assert min(caught[name] for name in ("noise of 0.02", "gamma 0.7", "20 % brighter")) >= 0.8


@pytest.mark.slow
def test_planted_copies_of_radiographs_are_caught() -> None:
    """The bars: all exact and flipped copies, 99 % of small changes, at most 1 % of false alarms."""
    path = SHARED / "pneumoniamnist.npz"
    if not path.exists():
        pytest.skip(f"{path} is not here: PneumoniaMNIST is not part of the repository")
    arrays = np.load(path)
    training, heldout = arrays["train_images"][..., None], arrays["val_images"][..., None]
    known = {picture_hash(image) for image in training}
    search = Search(training)
    caught = search.caught(search.threshold(np.stack([x for x in heldout if picture_hash(x) not in known])), 200)
    assert caught["exact"] == caught["mirrored"] == caught["upside down"] == 1
    listed = {item.name: caught[item.name] for item in alterations(28) if item.listed}
    assert min(listed.values()) >= 0.99, listed


def test_a_changed_spot_does_not_hide_a_copy() -> None:
    """A marker, a black corner: the worst ninth of the picture is left out of the comparison."""
    random = np.random.default_rng(0)
    smooth = np.kron(random.uniform(0, 255, (300, 8, 8)), np.ones((4, 4)))
    images = np.rint(smooth).astype(np.uint8)[..., None]
    search = Search(images)
    marked = images[:50].copy()
    marked[:, 2:9, 2:9] = 255
    found = search.search.find(search.shrink(marked))
    np.testing.assert_array_equal(found.row, np.arange(50))
    assert found.distance.max() < 0.1
    others = np.kron(random.uniform(0, 255, (50, 8, 8)), np.ones((4, 4)))[..., None].astype(np.uint8)
    assert search.search.find(search.shrink(others)).distance.min() > 0.3


def test_find_names_the_nearest_and_the_ratio(digits: np.ndarray) -> None:
    few = Search(digits[:5])  # All are compared: no shortlist stands between.
    found = few.search.find(few.shrink(digits[2:4, :, ::-1]))
    np.testing.assert_array_equal(found.row, [2, 3])
    assert (found.distance < 0.02).all()
    assert (found.ratio < 0.1).all()
    one = Search(digits[:1]).search.find(few.shrink(digits[7:8]))
    assert one.ratio.tolist() == [1]
    assert 0.2 < one.distance[0] <= 1


def test_the_shortlist_misses_nothing_that_comparing_all_would_find(digits: np.ndarray, search: Search) -> None:
    copies = digits[:40].astype(np.float64)
    noise = np.random.default_rng(0).normal(0, 8, copies.shape)
    queries = search.shrink(np.rint(np.clip(np.roll(copies, 1, 1) * 0.9 + noise, 0, 255)).astype(np.uint8))
    found = search.search.find(queries)
    back = torch.tensor([[-1.0, 0.0]]).expand(40, 2)
    own = unexplained(to_floats(queries), to_floats(search.pictures[:40]), back, search.canvas).numpy()
    assert (found.distance <= own + 0.02).all()


def test_a_query_alone_is_judged_as_in_company(digits: np.ndarray, search: Search) -> None:
    queries = search.shrink(digits[1200:1240])
    together = search.search.find(queries)
    for i in (0, 7, 39):
        alone = search.search.find(queries[i : i + 1])
        assert alone.row[0] == together.row[i]
        np.testing.assert_allclose(alone.distance[0], together.distance[i], atol=1e-5)


def test_a_search_by_cells_finds_the_same_copies(
    digits: np.ndarray, search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synthaug.quality.copies._MOST_EXACT", 300)
    cells = Search(digits[:1200])
    queries = search.shrink(planted(digits[:60], search.spec, alterations(8)[4], 0))
    assert alterations(8)[4].name == "shifted by 1 px both ways"
    np.testing.assert_array_equal(cells.search.find(queries).row, np.arange(60))
    # Cells are made once, from what was there: what comes later changes nothing before.
    monkeypatch.setattr("synthaug.quality.copies._DUPLICATE_TILE", 64)
    rows = np.concatenate([np.arange(400), np.arange(20)])
    found = near_duplicates(search.pictures, rows, search.projection, search.canvas, 0.02)
    assert found[400:].all()
    np.testing.assert_array_equal(
        near_duplicates(search.pictures, rows[:350], search.projection, search.canvas, 0.02), found[:350]
    )


def test_no_reference_means_no_copy(digits: np.ndarray, search: Search) -> None:
    empty = CopySearch(search.pictures[:0], np.empty((0, 35), np.float32), search.projection, search.canvas)
    found = empty.find(search.pictures[:3])
    assert found.distance.tolist() == found.ratio.tolist() == [1, 1, 1]
    assert found.row.tolist() == [-1, -1, -1]


@pytest.mark.parametrize(("size", "channels", "side"), [(8, 1, 8), (28, 3, 28), (33, 5, 16), (64, 1, 32), (100, 1, 25)])
def test_canvases_are_small_and_grey(size: int, channels: int, side: int) -> None:
    images = np.random.default_rng(0).integers(0, 65536, (3, size, size, channels)).astype(np.uint16)
    canvas = canvas_for(size)
    assert shrink(images, 0, 65535).shape == (3, side, side) == (3, canvas.side, canvas.side)
    assert canvas.window >= 4


def test_flat_and_broken_images_are_copies_of_nothing(digits: np.ndarray, search: Search) -> None:
    images = np.zeros((4, 8, 8, 1), dtype=np.float32)
    images[1], images[2], images[3, 0, 0] = np.nan, np.inf, 0.01
    found = search.search.find(shrink(images, 0, 1))
    np.testing.assert_allclose(found.distance, 1, atol=0.02)
    # And nothing is a copy of a flat one.
    flat = Search(np.concatenate([digits[:3], np.full((1, 8, 8, 1), 100, np.uint8)]))
    assert (flat.search.find(flat.shrink(digits[50:60])).row < 3).all()


def test_a_negative_is_another_picture(digits: np.ndarray, search: Search) -> None:
    assert search.search.find(search.shrink(255 - digits[:20])).distance.min() > 0.2


def test_hash_is_blind_to_flips_only(digits: np.ndarray) -> None:
    image = digits[3]
    for view in (image[:, ::-1], image[::-1], image[::-1, ::-1]):
        assert picture_hash(image) == picture_hash(view)
    assert picture_hash(image) != picture_hash(image.transpose(1, 0, 2))
    other = image.copy()
    other[0, 0] ^= 1
    assert picture_hash(image) != picture_hash(other)


def test_duplicates_are_marked_after_the_first_and_more_rows_change_nothing(
    digits: np.ndarray, search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synthaug.quality.copies._DUPLICATE_TILE", 8)
    images = digits[:40].copy()
    images[20] = images[3]
    images[5] = images[4, :, ::-1]
    images[33] = np.roll(images[9], 1, 0)
    pictures, rows = search.shrink(images), np.arange(40)

    def marked(many: int) -> np.ndarray:
        return near_duplicates(pictures, rows[:many], search.projection, search.canvas, 0.03)

    assert np.flatnonzero(marked(40)).tolist() == [5, 20, 33]
    for many in (0, 4, 6, 21, 33):
        np.testing.assert_array_equal(marked(many), marked(40)[:many])
    # A collapsed class: one picture over and over.
    same = search.shrink(np.repeat(digits[:1], 60, axis=0))
    assert (
        near_duplicates(same, np.arange(60), search.projection, search.canvas, 0.03).tolist() == [False] + [True] * 59
    )


def test_a_projection_is_read_as_it_was_written(search: Search, tmp_path: Path) -> None:
    search.projection.save(tmp_path / "p.npy")
    again = Projection.load(tmp_path / "p.npy")
    np.testing.assert_array_equal(again.mean, search.projection.mean)
    np.testing.assert_array_equal(again.axes, search.projection.axes)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 3, 6])
def test_alterations_keep_the_form_and_change_the_picture(dtype: str, channels: int) -> None:
    random = np.random.default_rng(0)
    top = {"uint8": 255, "uint16": 65535, "float32": 1}[dtype]
    images = np.kron(random.uniform(0.2, 0.8, (2, 7, 7, channels)), np.ones((1, 4, 4, 1))) * top
    images = images.astype(dtype)
    spec = spec_of(images)
    for item in alterations(28):
        found = planted(images, spec, item, 5)
        assert found.shape == images.shape
        assert found.dtype == images.dtype
        assert (found != images).any() == (item.name != "exact"), item.name
        np.testing.assert_array_equal(found, planted(images, spec, item, 5))
    assert len({item.name for item in alterations(28)}) == len(alterations(28))


def test_thresholds_call_no_more_than_their_share() -> None:
    random = np.random.default_rng(0)
    for n, place in ((9, 1), (99, 1), (199, 2), (1000, 10)):
        distances = random.uniform(0.2, 0.9, n)
        found = calibrate(distances, np.arange(n), 0.01)
        assert found.threshold == np.sort(distances)[place - 1]
        assert found.n_groups == n
        # Oracle: leave each one out.
        alarms = [distances[i] < np.sort(np.delete(distances, i))[max(1, int(0.01 * n)) - 1] for i in range(n)]
        np.testing.assert_array_equal(found.alarms, alarms)


def test_images_of_a_group_are_held_out_together() -> None:
    """Ten images of one patient, all near: with itself in the set each would excuse the others."""
    distances = np.concatenate([np.full(10, 0.1), np.linspace(0.5, 0.9, 190)])
    alone = calibrate(distances, np.arange(200), 0.01)
    together = calibrate(distances, np.concatenate([np.zeros(10, dtype=int), np.arange(1, 191)]), 0.01)
    assert alone.alarms.sum() == 0
    assert together.n_groups == 191
    assert together.alarms[:10].all()
    # A single group leaves nobody to measure it by.
    single = calibrate(distances, np.zeros(200), 0.01)
    assert not single.measured
    assert not single.alarms.any()


def test_patients_with_many_like_images_do_not_make_false_alarms_common() -> None:
    """Twenty patients of twenty images each: by images the rate would be four times what was asked."""
    random = np.random.default_rng(0)
    rates = []
    for _ in range(200):
        patients = random.normal(0, 1, (20, 1)) + random.normal(0, 0.2, (20, 20))
        found = calibrate(patients.ravel(), np.repeat(np.arange(20), 20), 0.05)
        new = random.normal(0, 1, (200, 1)) + random.normal(0, 0.2, (200, 5))
        rates.append((new < found.threshold).mean())
    assert np.mean(rates) < 0.06


def test_only_what_stands_out_is_the_same_picture() -> None:
    """Near alone is not enough (a class of like images), nor standing out alone (far from all, less far from one)."""
    distance, contrast = np.array([0.01, 0.05, 0.01, 0.3, 0.2]), np.array([0.02, 0.09, 0.6, 0.01, 0.9])
    assert same_picture(distance, contrast).tolist() == [True, True, False, False, False]


def test_images_of_a_class_that_are_all_alike_are_not_repeats() -> None:
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:28, 0:28]
    blobs = [
        np.exp(-((y - 14 + random.normal(0, 1)) ** 2 + (x - 14 + random.normal(0, 1)) ** 2) / random.uniform(30, 60))
        for _ in range(120)
    ]
    textures = [np.kron(random.uniform(0, 1, (7, 7)), np.ones((4, 4))) for _ in range(120)]
    images = np.rint(np.stack([*blobs, *textures]) * 255).astype(np.uint8)[..., None]
    search = Search(np.concatenate([images[:80], images[120:200]]))
    found = search.search.find(search.shrink(np.concatenate([images[80:120], images[200:]])))
    assert found.distance[:40].max() < 0.08
    assert same_picture(found.distance, found.contrast).mean() < 0.05
    moved = np.roll(images[120:140], 1, 2)
    again = search.search.find(search.shrink(moved))
    assert same_picture(again.distance, again.contrast).all()


@pytest.mark.parametrize("copies", [1, 3])
def test_repeats_are_found_where_most_images_are_repeats(digits: np.ndarray, copies: int) -> None:
    some = digits[::17][:100]
    views = [some[:, :, ::-1], some[:, ::-1], some[:, ::-1, ::-1]][:copies]
    search = Search(np.concatenate([some, *views]))
    distance, other, contrast = search.search.neighbours()
    own = np.tile(np.arange(100), copies + 1)
    assert (other % 100 == own[:, None])[distance < 0.02].mean() > 0.95
    assert same_picture(distance, contrast).any(1).mean() > 0.9
    assert not (other == np.arange(len(own))[:, None])[distance < 1].any()


def test_false_alarms_on_new_images_are_as_rare_as_promised() -> None:
    random = np.random.default_rng(0)
    share = [
        float((random.normal(0, 1, 2000) < calibrate(random.normal(0, 1, 150), np.arange(150), 0.01).threshold).mean())
        for _ in range(300)
    ]
    assert abs(np.mean(share) - 1 / 151) < 0.0015


def test_intervals_are_those_of_the_textbook() -> None:
    assert clopper_pearson(0, 0) == (0.0, 1.0)
    # The rule of three, exactly: 1 - 0.025 ** (1 / n).
    assert clopper_pearson(0, 100) == (0.0, pytest.approx(1 - 0.025**0.01))
    assert clopper_pearson(100, 100) == (pytest.approx(0.025**0.01), 1.0)
    assert clopper_pearson(5, 50) == (pytest.approx(0.0333, abs=1e-4), pytest.approx(0.2181, abs=1e-4))
