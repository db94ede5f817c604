"""The benchmark of the method: its cells, its arithmetic, its tables; one cell from end to end."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from benchmarks.method import peers, speed, summary
from benchmarks.method.__main__ import choose, main
from benchmarks.method.busi import TEST, VALIDATION, stratified_busi, stratify
from benchmarks.method.cells import (
    ACTIONS,
    FINALS_FILE,
    GPU_SETTINGS,
    LIMIT_MINUTES,
    Cell,
    Place,
    all_cells,
    config_of,
    drop_unfinished,
    finite,
    keeping_finals,
    run_cell,
    sources,
)
from benchmarks.method.programs import contest
from benchmarks.method.settings import SETTINGS, make_config, with_dose
from benchmarks.method.solvers import solver_words
from benchmarks.method.speed import ddim, ddim_sigmas, equal_quality, time_to_kid
from synthaug.errors import UsageError
from synthaug.plan import _exact
from synthaug.records import DONE_FILE, Interval
from synthaug.report.verdict_words import AGAINST
from synthaug.trial import race
from synthaug.trial.statistics import paired_differences
from tests.honesty_parts import digits_job, quick


def place(folder: Path, **changes: Any) -> Place:
    values: dict[str, Any] = {
        "results": folder / "results",
        "data": folder / "data",
        "cache": folder / "cache",
        "threads": 1,
        "trial_minutes": 0.1,
    }
    return Place(**values | changes)


def flags(where: Place) -> list[str]:
    return [
        f"--results={where.results}",
        f"--data={where.data}",
        f"--cache={where.cache}",
        f"--threads={where.threads}",
        f"--trial-minutes={where.trial_minutes}",
        "--replicates=1",
    ]


# -- the list of cells --


def test_cells_have_names_of_their_own_come_after_what_they_need_and_fit_into_their_limit() -> None:
    cells = all_cells(3)
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    for position, cell in enumerate(cells):
        assert set(cell.needs) <= set(names[:position]), cell.name
        assert 0 < cell.estimate <= LIMIT_MINUTES, cell.name
        assert cell.action in ACTIONS


def test_every_setting_of_the_issue_and_every_peer_is_in_the_list() -> None:
    wanted = [cell for cell in all_cells(1) if not cell.optional]
    trials = {(cell.part, cell.setting) for cell in wanted if cell.action == "trial"}
    assert {name for part, name in trials if part == "utility"} == set(SETTINGS)
    contest_cells = {(cell.method, cell.minutes) for cell in wanted if cell.part == "peers"}
    for method in ("ours", "ddp-16", "diffusers-default", "diffusers-ours"):
        assert {(method, 5.0), (method, 15.0)} <= contest_cells
    assert {("smote", 0), ("mixup", 0)} <= contest_cells


def test_another_budget_has_cells_of_other_names() -> None:
    own, tried = ({cell.name for cell in all_cells(1, minutes) if cell.minutes} for minutes in (None, 1.0))
    assert not own & tried


def test_what_a_chosen_cell_needs_is_chosen_with_it() -> None:
    found = choose(all_cells(1), None, ["speed.pneumonia-60.solver"])
    assert [cell.name for cell in found] == ["utility.pneumonia-60.r0.b5.make", "speed.pneumonia-60.solver"]


def test_optional_cells_are_run_only_by_name() -> None:
    cells = all_cells(1)
    assert not any(cell.optional for cell in choose(cells, None, None))
    assert any(cell.method == "ddp-64" for cell in choose(cells, None, ["peers.digits.*"]))


def test_a_pattern_that_fits_nothing_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fits no cell"):
        choose(all_cells(1), None, ["nothing.*"])
    assert main(["--cells", "nothing.*", *flags(place(tmp_path))]) == 2
    assert "fits no cell" in capsys.readouterr().err


def test_cells_for_a_gpu_are_chosen_only_where_a_gpu_is_named() -> None:
    cells = all_cells(1)
    for patterns in (None, ["*pneumonia-60*"]):
        assert not any(cell.part == "gpu" for cell in choose(cells, None, patterns))
    by_name, by_part = choose(cells, None, ["*gpu*busi-30.*", "*digits*"]), choose(cells, ["gpu"], None)
    assert [cell.action for cell in by_name if cell.part == "gpu"] == ["make", "trial"]
    assert {cell.part for cell in by_part} == {"gpu"}
    assert {cell.setting for cell in by_part if cell.action == "trial"} == set(GPU_SETTINGS)


def test_on_a_gpu_the_recipe_is_the_same_and_lies_in_a_folder_of_its_own(tmp_path: Path) -> None:
    where = place(tmp_path)
    where.data.mkdir(exist_ok=True)
    (where.data / "pneumoniamnist.npz").touch()
    names = {cell.name: cell for cell in all_cells(1)}
    own, other = (config_of(names[f"{part}utility.pneumonia-60.r0.b5.make"], where) for part in ("", "gpu."))
    assert (own.train.device, other.train.device) == ("cpu", "cuda")
    assert own.output != other.output
    assert own.model_copy(update={"train": None, "output": ""}) == other.model_copy(
        update={"train": None, "output": ""}
    )
    assert own.train.model_copy(update={"device": "cuda"}) == other.train


def test_the_report_tells_of_a_gpu_apart_from_the_processor(tmp_path: Path) -> None:
    where, cells = place(tmp_path), all_cells(1)
    names = {cell.name: cell for cell in cells}
    keep(where, names["utility.pneumonia-60.r0.b5.trial"], trial_result(-0.02, "no evidence"))
    keep(where, names["gpu.utility.pneumonia-60.r0.b5.make"], MADE | {"training_images": 1_234_567})
    keep(where, names["gpu.utility.pneumonia-60.r0.b5.trial"], trial_result(0.04))
    mode = {
        "mode": "reduce-overhead", "training_images_per_second": 900.0, "training_seconds_beside_steps": 40.0,
        "samples_per_second": 700.0, "first_draw_seconds": 20.0,
    }  # fmt: skip
    rates = {
        "device": "a card", "batch_size": 256, "training_images_per_second": 300.0, "training_share": 0.1,
        "matrix_of": "bfloat16, 8192 squared", "matrix_flops_per_second": 5e14, "samples_per_second": 200.0,
        "sampling_share": 0.2, "peak_gpu_bytes": 2**30, "training_seconds_beside_steps": 3.0,
        "compiled": [mode, {"mode": "default", "failed": "no compiler | here"}],
    }  # fmt: skip
    keep(where, names["gpu.32"], rates)
    assert main(["--report", f"--docs={tmp_path / 'docs'}", *flags(where)]) == 0
    report = (tmp_path / "docs" / "method.md").read_text(encoding="utf-8")
    processor, gpu = report.split("## The same minutes on a GPU")
    assert "-2.0 [-3.0, -1.0]" in processor
    assert "1 of 1 trials compared" in processor
    assert "+4.0 [+3.0, +5.0]" in gpu
    assert "1,234,567, 120" in gpu
    assert "| not | 300 | 200 | 3 | |\n| reduce-overhead | 900 | 700 | 40 | 20 |\n| default | failed: no" in report


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_part_for_a_gpu_is_refused_by_name_without_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--only", "gpu", *flags(place(tmp_path))]) == 2
    assert "part 'gpu' needs a GPU" in capsys.readouterr().err


def test_a_budget_of_nothing_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--list", "--minutes=0", *flags(place(tmp_path))]) == 2
    assert "--minutes is 0" in capsys.readouterr().err


def test_records_hold_no_number_that_json_has_no_word_for() -> None:
    assert finite({"a": [1.0, float("nan")], 2: (float("inf"), "x", None)}) == {
        "a": [1.0, None],
        "2": [None, "x", None],
    }


# -- settings --


@given(n_real=st.integers(2, 5000), dose=st.integers(1, 10))
def test_a_dose_is_what_the_plan_then_allows(n_real: int, dose: int) -> None:
    config = make_config(
        SETTINGS["digits"], replicate=0, minutes=1, output=Path("x"), data=Path("d"), prepared=Path("p"), threads=1,
        trial_minutes=1,
    )  # fmt: skip
    share = _exact(with_dose(config, dose).plan.max_synthetic_share)
    assert int(n_real / (1 - share)) - n_real == dose * n_real


def test_replicates_differ_in_the_rare_subset_and_the_generator(tmp_path: Path) -> None:
    configs = [
        make_config(
            SETTINGS["digits"], replicate=k, minutes=2, output=tmp_path, data=tmp_path, prepared=tmp_path, threads=1,
            trial_minutes=1,
        )
        for k in range(3)
    ]  # fmt: skip
    assert [(config.dataset.cut_seed, config.seed) for config in configs] == [(0, 0), (1, 1), (2, 2)]
    assert len({config.split.seed for config in configs}) == 1


@hypothesis_settings(max_examples=40)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), min_size=30, max_size=120),
    seed=st.integers(0, 9),
)
def test_a_stratified_split_keeps_groups_whole_and_shares_within_one_group(
    sizes: list[tuple[int, int]], seed: int
) -> None:
    labels = np.concatenate([np.full(n, label) for label, n in sizes])
    groups = np.concatenate([np.full(n, number) for number, (_, n) in enumerate(sizes)])
    split = stratify(labels, groups, seed=seed)
    assert all(len(set(split[groups == group])) == 1 for group in np.unique(groups))
    for label in np.unique(labels):
        own = split[labels == label]
        assert abs((own == "test").sum() - TEST * len(own)) <= 4
        assert abs((own == "validation").sum() - VALIDATION * len(own)) <= 8


def test_busi_gets_a_table_of_splits_that_the_pipeline_reads(tmp_path: Path) -> None:
    from PIL import Image

    random, source = np.random.default_rng(0), tmp_path / "busi64"
    for name, number in (("benign", 40), ("normal", 20)):
        (source / name).mkdir(parents=True)
        for k in range(number):
            image = random.integers(0, 256, (64, 64)).astype(np.uint8)
            Image.fromarray(image).save(source / name / f"{k}.png")
    prepared = stratified_busi(source, tmp_path / "prepared")
    with (prepared / "metadata.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 60
    config = make_config(
        SETTINGS["busi-30"], replicate=0, minutes=1, output=tmp_path / "run", data=tmp_path,
        prepared=tmp_path / "prepared", threads=1, trial_minutes=1,
    )  # fmt: skip
    from synthaug.pipeline import plan_only

    config = config.model_copy(update={"dataset": config.dataset.model_copy(update={"cut": {"normal": 5}})})
    found = plan_only(config)
    told = [sum(row["split"] == split for row in rows) for split in ("validation", "test")]
    assert [sum(found.splits[split]) for split in ("validation", "test")] == told
    assert sum(found.splits["train"]) == 60 - sum(told) - found.held_back["cut"]
    assert not list(source.rglob("*ledger*")), "nothing is written beside the published files"


# -- pooling --


def interval(estimate: float, half: float) -> Interval:
    return Interval(estimate=estimate, low=estimate - half, high=estimate + half)


def test_one_replicate_of_one_setting_has_the_interval_of_its_trial() -> None:
    pooled = summary.pool({"a": [interval(0.03, 0.02)]})
    assert pooled is not None
    assert pooled.interval.estimate == 0.03
    assert pooled.interval.low == pytest.approx(0.01, abs=0.002)
    assert pooled.interval.high == pytest.approx(0.05, abs=0.002)


def test_nothing_pools_to_nothing() -> None:
    assert summary.pool({}) is None
    assert summary.pool({"a": []}) is None


def test_every_setting_counts_alike_however_many_replicates_it_has() -> None:
    pooled = summary.pool({"a": [interval(0.0, 0.01)], "b": [interval(0.04, 0.01)] * 5})
    assert pooled is not None
    assert pooled.interval.estimate == pytest.approx(0.02)
    assert (pooled.n_settings, pooled.n_replicates) == (2, 1)


def test_replicates_that_disagree_widen_the_interval() -> None:
    alike, apart = (summary.pool({"a": [interval(0.02 + d, 0.01), interval(0.02 - d, 0.01)]}) for d in (0.0, 0.02))
    assert alike is not None
    assert apart is not None
    assert apart.interval.high - apart.interval.low > 2 * (alike.interval.high - alike.interval.low)


@pytest.mark.parametrize("these", [True, False])
def test_pooled_intervals_hold_the_truth(these: bool) -> None:
    """Settings, replicates and trials with normal errors of known size; the truth is the mean asked about."""
    random, held, n = np.random.default_rng(3), 0, 150
    for number in range(n):
        settings = 0.01 + 0.02 * random.standard_normal(6)
        found = {}
        for name, truth in enumerate(settings):
            shared = 0.01 * random.standard_normal()  # the setting's test images
            found[str(name)] = [
                interval(truth + shared + 0.01 * random.standard_normal(), 1.96 * 0.01) for _ in range(3)
            ]
        pooled = summary.pool(found, these=these, seed=number)
        assert pooled is not None
        held += pooled.interval.low <= (settings.mean() if these else 0.01) <= pooled.interval.high
    assert held / n > 0.9


def test_the_recommended_dose_gains_nothing_where_the_verdict_says_zero() -> None:
    told = {"real": {"balanced_accuracy": interval(-0.03, 0.01).model_dump()}}
    assert summary.recommended({"dose": 0, "differences": told}).estimate == 0
    assert summary.recommended({"dose": 15, "differences": told}).estimate == -0.03


# -- the solver --


def test_a_solver_is_named_by_its_own_settings() -> None:
    from diffusers import EDMDPMSolverMultistepScheduler

    from synthaug.diffusion.pipeline import build_solver

    assert solver_words(build_solver(0.5).config) == "DPM-Solver++(3M), even in ln sigma"
    told = solver_words(build_solver(0.5).config, ["3", "8"])
    assert told == "DPM-Solver++(3M), even in ln sigma; fitted for 3, 8"
    assert solver_words(EDMDPMSolverMultistepScheduler().config) == "DPM-Solver++(2M), Karras levels"


def test_levels_of_ddim_fall_from_those_of_the_last_step_to_zero() -> None:
    sigmas = ddim_sigmas(50)
    alpha = np.prod(1 - np.linspace(1e-4, 0.02, 1000))
    assert len(sigmas) == 51
    assert sigmas[0] == pytest.approx(np.sqrt((1 - alpha) / alpha))
    assert (np.diff(sigmas) < 0).all()
    assert sigmas[-1] == 0


def test_ddim_is_first_order_on_images_whose_answer_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels are independent N(mean, spread²): the flow takes z·sigma to mean + (z·sigma - mean)·spread/total."""
    mean, spread, sigma_data = 0.3, 0.2, 0.5

    def perfect(_: Any, scaled: torch.Tensor, c_noise: torch.Tensor, *rest: Any) -> torch.Tensor:
        sigma = (4 * c_noise).exp().view(-1, 1, 1, 1)
        total = (sigma**2 + sigma_data**2).sqrt()
        noisy = scaled * total
        best = (spread**2 * noisy + sigma**2 * mean) / (spread**2 + sigma**2)
        return (best - (sigma_data / total) ** 2 * noisy) * total / (sigma * sigma_data)

    monkeypatch.setattr("synthaug.diffusion.network.predict", perfect)
    pipeline: Any = SimpleNamespace(
        config=SimpleNamespace(n_hints=4, fold=1),
        unet=torch.nn.Identity(),
        scheduler=SimpleNamespace(config=SimpleNamespace(sigma_data=sigma_data)),
    )
    noise, labels = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(4).long()
    errors = []
    for steps in (50, 100, 200):
        first = float(ddim_sigmas(steps)[0])
        exact = mean + (noise * first - mean) * spread / (spread**2 + first**2) ** 0.5
        errors.append(float((ddim(pipeline, labels, noise, ddim_sigmas(steps)) - exact).abs().max()))
    assert errors[0] > errors[1] > errors[2]
    assert 1.5 < errors[0] / errors[1] < 3
    assert errors[2] < 0.05


def test_equal_quality_is_reached_where_no_larger_number_of_steps_is_worse() -> None:
    def one(steps: int, kid: float) -> dict[str, Any]:
        return {"steps": steps, "kid": kid, "kid_half_width": 0.1, "seconds": float(steps)}

    ours = [one(6, 0.1), one(10, 0.5), one(16, 0.2), one(20, 0.2)]
    assert equal_quality(ours, [one(50, 0.2)]) == {"equal_steps": 16, "times_faster": 50 / 16}
    assert equal_quality([one(20, 0.9)], [one(50, 0.2)])["equal_steps"] is None


def test_a_solver_that_is_nearer_with_few_steps_alone_is_not_said_to_have_got_there() -> None:
    from benchmarks.method.report import _solver

    def one(steps: int, kid: float) -> dict[str, Any]:
        return {"steps": steps, "kid": kid, "kid_half_width": 0.01, "seconds": float(steps), "coverage": 0.9}

    result = {"samples": 64, "n_real": 60, "class": "normal", "equal_steps": None, "times_faster": None}
    item = {
        "setting": "digits",
        "stale": False,
        "result": result | {"ours": [one(2, 0.1), one(20, 0.3)], "ddim": [one(50, 0.2)]},
    }
    told = "\n".join(_solver(item))
    assert (
        "There is no number of steps from which on ours is at the KID of 50-step DDIM; by themselves these are: "
        in told
    )
    assert "2 (25.0 times as fast)." in told
    item = {"setting": "digits", "stale": False, "result": result | {"ours": [one(20, 0.3)], "ddim": [one(50, 0.2)]}}
    assert "and none that was tried is." in "\n".join(_solver(item))


def test_time_to_kid_is_the_first_budget_that_reaches_ours() -> None:
    found = time_to_kid({"ours": [(5, 0.3), (15, 0.2)], "quick": [(5, 0.1)], "slow": [(5, 0.9), (15, 0.3)], "no": []})
    assert found == {"ours": 5, "quick": 5, "slow": 15, "no": None}


def test_ratios_are_medians_of_rounds() -> None:
    def one(images: float) -> dict[str, float]:
        return {"training_images_per_second": images, "samples_per_second": images, "peak_bytes": 100}

    rounds = [{"ours": one(a), "peer": one(2.0)} for a in (4.0, 40.0, 6.0)]
    assert speed.ratios(rounds)["peer"]["training_images_per_second"] == 3


@pytest.mark.slow
def test_rounds_of_speed_go_on_after_what_was_measured_before_the_run_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The programs are stand-ins: what counts here is which of them are run again."""
    run: list[str] = []
    figures = {"training_images_per_second": 2.0, "samples_per_second": 1.0, "peak_bytes": 1}

    def one(name: str) -> dict[str, float]:
        if len(run) == 3:
            raise KeyboardInterrupt
        run.append(name)
        return figures

    monkeypatch.setattr(speed, "run_ours", lambda job: one("ours"))
    monkeypatch.setattr(peers, "run_program", lambda peer, job, cache: one(peer.name))
    monkeypatch.setattr(speed, "ROUNDS", 1)
    cell, where = Cell("speed.digits.rates", "speed", "rates", "digits"), place(tmp_path)
    # A round of other code is none of these.
    where.work.mkdir(parents=True)
    old = {"sources": "other", "rounds": [dict.fromkeys(("ours", "ddp-16"), figures)]}
    (where.work / f"{cell.name}.rounds.json").write_text(json.dumps(old), encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        speed.rates(cell, where)
    before, learned = list(run), [name for name, peer in peers.PEERS.items() if peer.learns]
    run.clear()
    found = speed.rates(cell, where)
    assert before + run == ["ours", *learned]
    assert set(found["ratios"]) == set(learned)


# -- the contest --


class Clock:
    """Stands in for `time`: only what is said to take time does, so that no busy machine changes a count."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Slow(contest.Learner):
    """Learns nothing and takes a known time; draws the mean of its classes."""

    batch_size, power, sample_batch, steps_per_sample = 4, 1.0, 2, 2

    def __init__(self, job: dict[str, Any], size: int, channels: int, n_classes: int) -> None:
        self.shape, self.rate, self.seconds = (channels, size, size), 0.0, job.get("each", 0.01)

    def build(self, rate: float, steps: int) -> None:
        self.rate = rate

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        assert images.min() >= -1
        assert images.max() <= 1
        contest.time.sleep(0.05)

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.tensor(float("nan") if self.rate > 0.5 else abs(self.rate - 0.1))

    def average(self) -> None:
        pass

    def draw(self, labels: torch.Tensor) -> torch.Tensor:
        contest.time.sleep(self.seconds * self.steps_per_sample)
        return torch.zeros(len(labels), *self.shape) + labels.view(-1, 1, 1, 1) / 10

    def evaluate_once(self, labels: torch.Tensor) -> None:
        contest.time.sleep(self.seconds)

    @property
    def parameters(self) -> int:
        return 0


@pytest.fixture
def images(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    values = random.integers(0, 256, (60, 8, 8, 1)).astype(np.uint8)
    labels = np.repeat([0, 1, 2], 20)
    path = tmp_path / "images.npz"
    peers.write_images(path, values, np.arange(50), labels[:50], np.arange(50, 60), labels[50:])
    return path


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(contest, "time", found)
    return found


def job(images: Path, out: Path, **changes: Any) -> dict[str, Any]:
    out.mkdir()
    values: dict[str, Any] = {
        "images": str(images), "classes": ["a", "b", "c"], "counts": {"1": 6, "2": 4}, "minutes": 0.1,
        "rates": [0.01], "threads": 1, "seed": 0, "out": str(out),
    }  # fmt: skip
    return values | changes


def make(work: dict[str, Any]) -> dict[str, Any]:
    data = contest.Data(work)
    return contest._make(Slow(work, data.size, data.channels, 3), data, work)


def test_a_learner_that_has_time_draws_all_that_is_wanted_within_its_budget(
    images: Path, tmp_path: Path, clock: Clock
) -> None:
    found = make(job(images, tmp_path / "out", minutes=0.1))
    assert found["n_drawn"] == found["n_wanted"] == 10
    assert {path.parent.name for path in (tmp_path / "out").rglob("*.png")} == {"b", "c"}
    assert len(list((tmp_path / "out" / "b").iterdir())) == 6
    # What is left of the six seconds is used for training.
    assert 5 < found["training_seconds"] + found["sampling_seconds"] <= 6
    assert found["training_images"] == 4 * found["training_steps"] > 300


def test_a_learner_that_draws_too_slowly_offers_fewer_of_every_class(
    images: Path, tmp_path: Path, clock: Clock
) -> None:
    found = make(job(images, tmp_path / "out", counts={"1": 500, "2": 500}, minutes=0.5, each=0.5))
    assert 10 < found["n_drawn"] < 40
    # Half of the budget, and the tenth that the last batches may run over.
    assert 14 < found["sampling_seconds"] < 19
    counts = [len(list((tmp_path / "out" / name).iterdir())) for name in ("b", "c")]
    assert abs(counts[0] - counts[1]) <= 1


def test_the_rate_with_the_least_heldout_loss_is_taken_and_one_that_breaks_down_is_not(
    images: Path, tmp_path: Path, clock: Clock
) -> None:
    found = make(job(images, tmp_path / "out", rates=[1.0, 0.09, 0.01]))
    assert found["rate"] == 0.09
    assert found["tuned"]["1.0"] is None


def test_classes_are_drawn_by_their_power(images: Path) -> None:
    data = contest.Data({"images": str(images), "seed": 0})
    torch.manual_seed(0)
    for power, share in ((1.0, 0.2), (0.0, 1 / 3)):
        assert float((data.batch(20_000, power)[1] == 2).float().mean()) == pytest.approx(share, abs=0.02)


def test_all_are_timed_at_the_batch_that_the_job_says(images: Path, tmp_path: Path, clock: Clock) -> None:
    seen: list[int] = []

    class Watched(Slow):
        def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return super().loss(images, labels).requires_grad_()

        def evaluate_once(self, labels: torch.Tensor) -> None:
            seen.append(len(labels))
            super().evaluate_once(labels)

    work = job(images, tmp_path / "out", seconds=1.0, ddpm_seconds=1.0, sample_batch=speed.SAMPLE_BATCH)
    data = contest.Data(work)
    found = contest._speed(Watched(work, data.size, data.channels, 3), data, work)
    assert max(seen) == 64
    assert found["samples_per_second"] == pytest.approx(64 / (0.01 * Slow.steps_per_sample), rel=0.01)
    assert found["ddpm"]["samples"] == 64


_THEIRS = """
import torch

class Unet(torch.nn.Module):
    def __init__(self, *, dim, num_classes, dim_mults, channels):
        super().__init__()
        self.scale, self.calls = torch.nn.Parameter(torch.ones(())), []

    def forward_with_cond_scale(self, *args, cond_scale=1.0, rescaled_phi=0.0, **kwargs):
        logits = self.forward(*args, cond_drop_prob=0.0)
        if cond_scale == 1:
            return logits
        null_logits = self.forward(*args, cond_drop_prob=1.0)
        return null_logits + (logits - null_logits) * cond_scale, null_logits

    def forward(self, x, time, classes, cond_drop_prob=None):
        self.calls.append(cond_drop_prob)
        return x * self.scale * (1 - cond_drop_prob)

class GaussianDiffusion(torch.nn.Module):
    def __init__(self, model, **_):
        super().__init__()
        self.model = model

    def model_predictions(self, x, t, classes, cond_scale=6.0, rescaled_phi=0.7):
        output, without = self.model.forward_with_cond_scale(
            x, t, classes, cond_scale=cond_scale, rescaled_phi=rescaled_phi
        )
        return output
"""
_EMA = """
import copy
import torch

class EMA(torch.nn.Module):
    def __init__(self, model, **_):
        super().__init__()
        self.ema_model = copy.deepcopy(model)
"""


@pytest.mark.parametrize(("guidance", "evaluations"), [(None, 1), (2.0, 2)])
def test_the_package_with_guidance_evaluates_its_averaged_network_once_a_step(
    guidance: float | None, evaluations: int, programs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a stand-in with the package's two returns and one unpacking, since its environment takes minutes to make;
    docs/log.md has what the package itself does."""
    (tmp_path / "denoising_diffusion_pytorch").mkdir()
    (tmp_path / "denoising_diffusion_pytorch" / "__init__.py").write_text("", encoding="utf-8")
    (tmp_path / "denoising_diffusion_pytorch" / "classifier_free_guidance.py").write_text(_THEIRS, encoding="utf-8")
    (tmp_path / "ema_pytorch.py").write_text(_EMA, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    names = [
        "run_ddp",
        "ema_pytorch",
        *(f"denoising_diffusion_pytorch{end}" for end in ("", ".classifier_free_guidance")),
    ]
    try:
        run_ddp = importlib.import_module("run_ddp")
        own = {} if guidance is None else {"guidance": guidance}
        learner = run_ddp.Guided({"width": 4, "rates": [1e-3]} | own, 8, 1, 2)
        trained = learner.diffusion.model
        learner.average()
        learner.evaluate_once(torch.tensor([0, 1, 1]))  # not two, which unpack by chance
    finally:
        for name in names:
            sys.modules.pop(name, None)
    assert learner.diffusion.model is not trained
    assert not trained.calls
    assert learner.diffusion.model.calls == [0.0, 1.0][:evaluations]


def test_mixed_images_lie_between_two_of_their_class(images: Path, tmp_path: Path, programs: None) -> None:
    import run_pixels

    own = np.random.default_rng(1).random((5, 4, 4, 1)).astype(np.float32)
    mixed = run_pixels.mixup(own, 50, np.random.default_rng(0))
    assert mixed.shape == (50, 4, 4, 1)
    assert (mixed >= own.min(0) - 1e-6).all()
    assert (mixed <= own.max(0) + 1e-6).all()
    assert not any((np.abs(mixed[k] - one) < 1e-7).all() for k in range(50) for one in own)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs find `contest` beside them, as where they are run."""
    monkeypatch.syspath_prepend(str(peers.PROGRAMS))
    for name in ("contest", "run_pixels", "run_diffusers"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize(("size", "parameters"), [(8, 1_000_000), (28, 2_400_000)])
def test_the_example_at_our_size_has_about_our_parameters_and_the_images_form(
    size: int, parameters: int, programs: None
) -> None:
    import run_diffusers

    learner = run_diffusers.Example({"parameters": parameters, "rates": [1e-3]}, size, 1, 2)
    assert abs(learner.parameters / parameters - 1) < 0.3
    labels = torch.tensor([0, 1])
    learner.build(1e-3, 10)
    learner.step(torch.zeros(2, 1, size, size), labels)
    learner.average()
    learner.steps_per_sample = 2
    assert learner.draw(labels).shape == (2, 1, size, size)


def test_the_example_at_its_own_widths_pads_to_a_side_that_its_levels_divide(programs: None) -> None:
    import run_diffusers

    learner = run_diffusers.Example.__new__(run_diffusers.Example)
    learner.size, learner.side = 28, 32
    padded = learner._padded(torch.ones(1, 1, 28, 28))
    assert padded.shape == (1, 1, 32, 32)
    assert float(padded.sum()) == 28**2 - (32**2 - 28**2)


def test_images_of_more_than_eight_bits_are_refused(tmp_path: Path) -> None:
    rows = np.arange(2)
    with pytest.raises(peers.PeerFailed, match="8 bits"):
        peers.write_images(tmp_path / "x.npz", np.zeros((2, 8, 8, 1), np.uint16), rows, rows, rows, rows)


def test_a_program_that_fails_leaves_no_samples_and_says_why(images: Path, tmp_path: Path) -> None:
    peer = peers.Peer("broken", "", "run_pixels.py", settings={"method": "nothing"})
    with pytest.raises(peers.PeerFailed, match=r"broken: its program ended with 1.*KeyError"):
        peers.make_samples(
            peer, images, ["a", "b", "c"], {1: 2}, tmp_path / "out", cache=tmp_path, minutes=1, threads=1, seed=0
        )
    assert not (tmp_path / "out").exists()


# -- what is kept of a trial, and the tables --


@pytest.mark.slow
def test_finals_are_kept_beside_the_verdict_and_say_what_it_says(tmp_path: Path) -> None:
    work = digits_job(tmp_path / "job")
    samples = {label: work.images(work.spare(label)[:18]) for label in work.scarce}
    before = race.final
    with quick(), keeping_finals():
        verdict = work.try_samples(samples)
    assert race.final is before
    with np.load(verdict.directory / FINALS_FILE, allow_pickle=False) as arms:
        table = work.world.table
        test = table[table["held_back"].isna() & (table["split"] == "test")].sort_values("row")
        labels = test["label"].to_numpy(np.int64)
        clusters = np.unique(test["group_key"], return_inverse=True)[1]
        found = paired_differences(arms["synthetic"], arms["real"], labels, clusters, rare=work.scarce)
    told = verdict.differences["real"]
    for metric in ("balanced_accuracy", "rare_auprc"):
        assert found[metric].estimate == pytest.approx(told[metric].estimate, abs=1e-6)


def keep(where: Place, cell: Cell, result: dict[str, Any]) -> None:
    record = {
        "cell": {
            "name": cell.name, "part": cell.part, "action": cell.action, "setting": cell.setting,
            "replicate": cell.replicate, "method": cell.method, "minutes": cell.minutes,
        },
        "started": "2026-11-23 10:00:00", "seconds": 60.0, "threads": 2,
        "machine": {"processor": "a processor", "cores": 2, "load_before": 0.5, "load_after": 1.0},
        "versions": {"torch": "2"}, "commit": "abc", "sources": sources(), "result": result,
    }  # fmt: skip
    path = where.result(cell.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record), encoding="utf-8")


def trial_result(gain: float, outcome: str = "helps", coverage: float = 0.9, kid: float = 0.01) -> dict[str, Any]:
    found = {metric: interval(gain, 0.01).model_dump() for metric in summary.METRICS}
    return {
        "outcome": outcome, "sentence": outcome, "dose": 30 if outcome == "helps" else 0, "offered": 60,
        "differences": dict.fromkeys(summary.AGAINST, found), "coverage": coverage, "kid": kid,
    }  # fmt: skip


MADE = {
    "making_seconds": 110.0, "training_seconds": 100.0, "sampling_seconds": 10.0, "training_images": 90_000,
    "near_copies": 2, "near_copies_of": 400, "heldout_near_copies": 3, "heldout_near_copies_of": 300,
    "withheld": {}, "stages": {"train": 700.0}, "samples_per_second": 12.0, "training_images_per_second": 120.0,
}  # fmt: skip


def test_the_report_says_what_the_cells_found(tmp_path: Path) -> None:
    where = place(tmp_path)
    cells = {cell.name: cell for cell in all_cells(2)}
    for replicate, gain in enumerate((0.03, 0.05)):
        keep(where, cells[f"utility.digits.r{replicate}.b2.make"], MADE)
        keep(where, cells[f"utility.digits.r{replicate}.b2.trial"], trial_result(gain))
    keep(where, cells["utility.pneumonia-60.r0.b5.trial"], trial_result(-0.02, "harms"))
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1], 50)
    for method, quality, kid in (("ours", 2.0, 0.01), ("diffusers-ours", 0.2, 0.3)):
        stem = f"peers.digits.r0.{method}.b5"
        keep(where, cells[f"{stem}.make"], MADE | {"n_wanted": 60, "n_drawn": 40})
        keep(where, cells[f"{stem}.trial"], trial_result(0.01, kid=kid, coverage=1 - kid))
        scores = np.eye(2)[labels] * quality + random.random((5, 100, 2))
        np.savez(
            where.finals(f"{stem}.trial"), real=scores, synthetic=scores / scores.sum(-1, keepdims=True),
            labels=labels, clusters=np.arange(100), rare=[1],
        )  # fmt: skip
    rate = {
        "parameters": 1000, "training_images_per_second": 100.0, "samples_per_second": 10.0, "peak_bytes": 2**28,
        "peak_bytes_of_imports": 2**27, "training_flops_per_second": 3e10, "sampling_flops_per_second": 4e10,
        "matrix_flops_per_second": 1e11, "matrix_of": "float32", "training_share": 0.3, "sampling_share": 0.4,
    }  # fmt: skip
    ddpm = {"samples": 16, "steps": 1000, "steps_timed": 20, "extrapolated": True, "samples_per_second": 0.002}
    rounds = [{"ours": rate, "diffusers-default": rate | {"samples_per_second": 0.1, "ddpm": ddpm}}]
    keep(where, cells["speed.pneumonia-60.rates"], {"rounds": rounds, "ratios": speed.ratios(rounds)})
    point = {"seconds": 1.0, "kid": 0.1, "kid_half_width": 0.01, "coverage": 0.9}
    sweep = {"ours": [point | {"steps": 20}], "ddim": [point | {"steps": 50, "seconds": 3.0}]}
    keep(
        where, cells["speed.pneumonia-60.solver"],
        sweep
        | {"solver": "a solver of before", "class": "normal"}
        | {"samples": 64, "n_real": 60, "equal_steps": 20, "times_faster": 3.0},
    )  # fmt: skip
    docs = tmp_path / "docs"
    arguments = ["--report", f"--docs={docs}", *flags(where)]
    assert main([*arguments[:-1], "--replicates=2"]) == 0
    text = (docs / "method.md").read_text(encoding="utf-8")
    assert "| digits (four of ten digits cut to 10, 8 px) | 2 of 2 | helps 2 | +4.0 [" in text
    assert "| 2 of 400 (0.5%) | 3 of 300 (1.0%) |" in text
    assert "extrapolated from 20 of 1000 steps" in text
    assert "5e+03" in text  # ours over the thousand steps
    assert "30% of it in training" in text
    assert "60 (20 short)" in text
    assert "| a solver of before | 20 |" in text
    assert "made by other code" not in text
    assert "of its budget" not in text
    assert "From 20 steps on ours is no worse than 50-step DDIM, 3.0 times as fast" in text
    found = json.loads((docs / "method.json").read_text(encoding="utf-8"))
    (row,) = found["contest"]
    assert (row["trials"], row["above"], row["below"]) == (1, 1, 0)
    assert (row["coverage_ahead"], row["coverage_of"]) == (1, 1)
    # -2 points are not lost by who follows a verdict of no dose.
    assert next(one for one in found["utility"] if one["setting"] == "pneumonia-60")["recommended"] == 0
    assert found["overall"]["like these"]["real"]["balanced_accuracy"]["estimate"] == pytest.approx(0.01)
    from PIL import Image

    for name in ("utility", "peers", "kid", "solver"):
        with Image.open(docs / f"method_{name}.png") as picture:
            assert min(picture.size) > 200


def failed_result(sentence: str) -> dict[str, Any]:
    return trial_result(0.0, "no evidence") | {
        "differences": {}, "coverage": None, "kid": None, "offered": 0, "sentence": sentence,
    }  # fmt: skip


def test_a_trial_of_ours_that_compared_nothing_counts_as_nothing_gained_and_is_named(tmp_path: Path) -> None:
    where, cells = place(tmp_path), {cell.name: cell for cell in all_cells(3)}
    for replicate, gain in enumerate((0.06, 0.03)):
        keep(where, cells[f"utility.digits.r{replicate}.b2.trial"], trial_result(gain))
    keep(where, cells["utility.digits.r2.b2.make"], MADE | {"withheld": {"3": "collapsed: one image"}})
    keep(where, cells["utility.digits.r2.b2.trial"], failed_result("no evidence: there is no sample to try."))
    keep(where, cells["utility.pneumonia-60.r0.b5.trial"], failed_result("no evidence: time ran out."))
    docs = tmp_path / "docs"
    assert main(["--report", f"--docs={docs}", *flags(where)[:-1], "--replicates=3"]) == 0
    found = json.loads((docs / "method.json").read_text(encoding="utf-8"))
    rows = {row["setting"]: row for row in found["utility"]}
    assert rows["digits"]["real/balanced_accuracy"]["estimate"] == pytest.approx(0.03)
    assert (rows["digits"]["compared"], rows["digits"]["replicates"]) == (2, 3)
    # A setting that failed entirely does not drop out of the mean.
    assert rows["pneumonia-60"]["real/rare_auprc"] == {"estimate": 0, "low": 0, "high": 0}
    for kind in ("like these", "these"):
        mean = found["overall"][kind]["real"]["balanced_accuracy"]
        assert mean["estimate"] == pytest.approx(0.015)
        assert mean["settings"] == 2
    text = (docs / "method.md").read_text(encoding="utf-8")
    assert "8 px) | 2 of 3 |" in text
    assert "60, 28 px) | 0 of 1 |" in text
    assert "2 of 4 trials compared" in text
    assert "digits, replicate 2 (withheld: 3): no evidence: there is no sample to try;" in text


def test_a_trial_without_a_difference_is_no_zero_where_a_dose_is_recommended() -> None:
    trial = {"result": {"differences": {}, "dose": 30}}
    assert summary.differences([trial], "real", "balanced_accuracy") == []


def test_in_the_contest_our_failure_is_a_loss_and_the_others_is_named(tmp_path: Path) -> None:
    where, cells = place(tmp_path), {cell.name: cell for cell in all_cells(1)}

    def tried(setting: str, method: str, result: dict[str, Any]) -> None:
        minutes = 0 if method in ("smote", "mixup") else 5
        for action, what in (("make", MADE), ("trial", result)):
            keep(where, cells[f"peers.{setting}.r0.{method}.b{minutes}.{action}"], what)

    tried("digits", "ours", failed_result("no evidence: all was withheld."))
    tried("digits", "ddp-16", trial_result(0.04))
    # One that harms is beaten by nobody who offers nothing.
    tried("digits", "diffusers-ours", trial_result(-0.04, "harms"))
    tried("digits", "smote", failed_result("no evidence: no sample was accepted."))
    tried("busi-30", "mixup", trial_result(0.01))
    chosen = list(cells.values())
    rows = {row["method"]: row for row in summary.contest(summary.against_peers(chosen, where))}
    lost = rows["ddp-16"]
    assert (lost["trials"], lost["ours_failed"], lost["above"], lost["below"]) == (1, 1, 0, 1)
    assert lost["balanced_accuracy"]["estimate"] == pytest.approx(-0.04)
    assert (lost["coverage_ahead"], lost["coverage_of"]) == (0, 1)
    assert rows["diffusers-ours"]["balanced_accuracy"]["estimate"] == 0
    assert rows["diffusers-ours"]["below"] == 1
    assert (rows["smote"]["trials"], rows["smote"]["below"]) == (0, 0)
    assert rows["smote"]["balanced_accuracy"] is None
    docs = tmp_path / "docs"
    assert main(["--report", f"--docs={docs}", *flags(where)]) == 0
    text = (docs / "method.md").read_text(encoding="utf-8")
    assert "| 1 (1; 0; 0) | -4.0 [" in text.replace("\u2212", "-")
    assert (
        "SMOTE on pixels, digits, replicate 0: its trial compared nothing: no evidence: no sample was accepted" in text
    )
    assert "mixup of two images of the class, busi-30, replicate 0: ours is not done" in text


def test_what_took_longer_than_its_budget_is_marked(tmp_path: Path) -> None:
    where, cells = place(tmp_path), {cell.name: cell for cell in all_cells(1)}
    keep(where, cells["utility.digits.r0.b2.make"], MADE | {"making_seconds": 150.0})
    for method in ("ours", "smote"):
        minutes = 5 if method == "ours" else 0
        keep(where, cells[f"peers.digits.r0.{method}.b{minutes}.make"], MADE | {"making_seconds": 360.0})
        keep(where, cells[f"peers.digits.r0.{method}.b{minutes}.trial"], trial_result(0.01))
    docs = tmp_path / "docs"
    assert main(["--report", f"--docs={docs}", *flags(where)]) == 0
    text = (docs / "method.md").read_text(encoding="utf-8")
    assert "| digits, replicate 0 | 2 | 150 (**1.25 of its budget**) |" in text
    assert "| 5 | 360 (**1.20 of its budget**) |" in text
    assert "| none | 360 |" in text


def test_training_and_sampling_that_were_cut_are_begun_again_and_what_is_done_is_kept(tmp_path: Path) -> None:
    for name, done in (("train-aa", True), ("train-bb", False), ("sample-cc", False), ("judge-dd", False)):
        (tmp_path / "stages" / name).mkdir(parents=True)
        (tmp_path / "stages" / name / "state.safetensors").touch()
        if done:
            (tmp_path / "stages" / name / DONE_FILE).touch()
    drop_unfinished(tmp_path)
    assert sorted(path.name for path in (tmp_path / "stages").iterdir()) == ["judge-dd", "train-aa"]
    drop_unfinished(tmp_path / "nothing yet")


def test_nothing_that_the_digest_leaves_out_decides_a_verdict() -> None:
    """The trial takes words from the pages, which no digest counts, and by their names it goes through its comparisons:
    with another name here, records of verdicts must become stale by hand (`CODE_VERSIONS["evaluate"]`)."""
    assert list(AGAINST) == ["real", "duplicates", "scrambled"]


def test_cells_of_other_code_are_marked_kept_and_done_again_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    where, cells = place(tmp_path), {cell.name: cell for cell in all_cells(1)}
    make, trial = (f"utility.digits.r0.b2.{action}" for action in ("make", "trial"))
    keep(where, cells[trial], trial_result(0.01))
    # What it made is on this machine.
    keep(where, cells[make], MADE | {"checkpoint": "made"})
    (where.results / "made").mkdir(parents=True, exist_ok=True)
    path = where.result(make)
    path.write_text(path.read_text(encoding="utf-8").replace(sources(), "0" * 64), encoding="utf-8")
    assert main(["--cells", trial, "--list", *flags(where)]) == 0
    # The trial too: what it tried is of that code.
    assert capsys.readouterr().out.count("done in 1.0 min, made by other code") == 2
    docs = tmp_path / "docs"
    assert main(["--report", f"--docs={docs}", *flags(where)]) == 0
    text = (docs / "method.md").read_text(encoding="utf-8")
    assert f"- `{make}`" in text
    assert f"- `{trial}`" in text
    assert "| digits, replicate 0 (made by other code) |" in text
    assert "| 1 of 1, 1 made by other code |" in text
    capsys.readouterr()
    run: list[str] = []

    def one(cell: Cell, *_: Any) -> None:
        run.append(cell.name)
        keep(where, cell, MADE if cell.action == "make" else trial_result(0.02))

    monkeypatch.setattr("benchmarks.method.__main__._in_process", one)
    assert main(["--cells", trial, *flags(where)]) == 0
    assert run == []
    assert "2 cells made by other code are kept as they are; --redo-stale" in capsys.readouterr().out
    where.result(trial).unlink()
    assert main(["--cells", trial, *flags(where)]) == 1
    assert run == []
    assert f"{trial}: left out, since {make} was made by other code" in capsys.readouterr().out
    assert main(["--cells", trial, "--redo-stale", *flags(where)]) == 0
    assert run == [make, trial]
    assert main(["--cells", trial, "--redo-stale", *flags(where)]) == 0
    assert run == [make, trial]


def test_a_clone_goes_on_from_the_records_of_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = place(tmp_path, records=tmp_path / "records")
    cells = {cell.name: cell for cell in all_cells(1)}
    make, trial = (f"utility.digits.r0.b2.{action}" for action in ("make", "trial"))
    given = ["--cells", "utility.digits.*", f"--records={where.records}", *flags(where)]
    # Both done: nothing is run, though what was made lies on another machine.
    keep(where, cells[make], MADE | {"checkpoint": "elsewhere"})
    keep(where, cells[trial], trial_result(0.01))
    run: list[str] = []

    def one(cell: Cell, *_: Any) -> None:
        run.append(cell.name)
        keep(where, cell, MADE if cell.action == "make" else trial_result(0.02))

    monkeypatch.setattr("benchmarks.method.__main__._in_process", one)
    assert main(given) == 0
    assert run == []
    # A trial that is not done needs the samples themselves.
    where.result(trial).unlink()
    assert main(given) == 0
    assert run == [make, trial]
    docs = tmp_path / "docs"
    assert main(["--report", f"--docs={docs}", *given[2:]]) == 0
    assert "| digits, replicate 0 |" in (docs / "method.md").read_text(encoding="utf-8")


def test_a_record_has_ours_minus_a_peer_where_the_probabilities_are_gone(tmp_path: Path) -> None:
    where, cells = place(tmp_path), {cell.name: cell for cell in all_cells(1)}
    told = {"balanced_accuracy": {"estimate": 0.012, "low": -0.01, "high": 0.034}}
    for method, changes in (("ours", {}), ("ddp-16", {"ours_minus": told})):
        keep(where, cells[f"peers.digits.r0.{method}.b5.make"], MADE | {"n_wanted": 60, "n_drawn": 60})
        keep(where, cells[f"peers.digits.r0.{method}.b5.trial"], trial_result(0.01) | changes)

    def of_peer() -> dict[str, Any]:
        return next(row for row in summary.against_peers(list(cells.values()), where) if row["method"] == "ddp-16")

    assert of_peer()["ours_minus"] == told
    assert not of_peer()["ours_of_then"]
    # Made again by other code, ours is not the one that the difference is to.
    path = where.result("peers.digits.r0.ours.b5.trial")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sources": "other"}))
    assert of_peer()["ours_of_then"]
    assert main(["--report", f"--docs={tmp_path / 'docs'}", *flags(where)]) == 0
    report = (tmp_path / "docs" / "method.md").read_text(encoding="utf-8")
    assert "+1.2 [-1.0, +3.4] (to ours of then)" in report
    assert "| 1 (0; 1; 0) | +1.2 [" in report


def test_a_record_names_the_code_that_made_it_and_other_code_works_in_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, cell = place(tmp_path), Cell("speed.digits.rates", "speed", "rates", "digits")
    monkeypatch.setitem(ACTIONS, "rates", lambda cell, place: {"found": 1})
    assert run_cell(cell, where)["sources"] == sources()
    assert not where.stale(cell)
    before = where.work
    monkeypatch.setattr("benchmarks.method.cells.sources", lambda: "1" * 64)
    assert where.stale(cell)
    assert where.work != before


def test_a_report_of_nothing_says_so_and_lists_what_is_left(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    assert main(["--report", f"--docs={docs}", *flags(place(tmp_path))]) == 0
    text = (docs / "method.md").read_text(encoding="utf-8")
    assert "No cell has been run yet" in text
    assert "| utility | busi-30 | ours | 2 |" in text
    assert not list(docs.glob("*.png"))


def test_cells_without_their_images_fail_by_name_and_what_is_done_is_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = place(tmp_path)
    cells = {cell.name: cell for cell in all_cells(1)}
    keep(where, cells["utility.digits.r0.b2.make"], MADE)
    assert main(["--cells", "utility.digits.r0.b2.make", *flags(where)]) == 0
    assert capsys.readouterr().out == ""
    assert main(["--cells", "utility.breastmnist.*", *flags(where)]) == 1
    said = capsys.readouterr().out
    assert "breastmnist.npz is not there; --data names the folder" in said
    assert "trial: left out, since utility.breastmnist.r0.b5.make is not done" in said
    assert not where.result("utility.breastmnist.r0.b5.make").exists()


def test_a_cell_that_takes_too_long_is_stopped_and_leaves_no_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.method.__main__.LIMIT_MINUTES", 0.02)
    where = place(tmp_path)
    assert main(["--cells", "utility.digits.r0.b2.make", *flags(where)]) == 1
    assert "stopped after 0.02 minutes; run the command again" in capsys.readouterr().out
    assert not where.result("utility.digits.r0.b2.make").exists()


@pytest.mark.slow
def test_a_peer_from_its_samples_to_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mixup of digits through adoption, audit and trial (with too little time for a verdict), in the real processes."""
    where = place(tmp_path)
    assert main(["--cells", "peers.digits.r0.mixup.*", *flags(where)]) == 0
    made, tried = (where.load(f"peers.digits.r0.mixup.b0.{action}") for action in ("make", "trial"))
    assert made is not None
    assert tried is not None
    assert made["result"]["n_drawn"] == 4 * 30
    assert tried["result"]["offered"] == 4 * 30
    assert tried["result"]["near_copies_of"] == 4 * 30
    assert tried["result"]["coverage"] > 0.5
    assert tried["machine"]["cores"] >= 1
    capsys.readouterr()
    assert main(["--cells", "peers.digits.r0.mixup.*", *flags(where)]) == 0
    assert capsys.readouterr().out == "", "nothing is run again"
    assert main(["--report", f"--docs={tmp_path / 'docs'}", *flags(where)]) == 0
    assert "mixup of two images of the class" in (tmp_path / "docs" / "method.md").read_text(encoding="utf-8")
