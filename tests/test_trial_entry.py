"""The user's own code, named in the configuration: found, run once, called as it wants to be, refused by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synthaug.config import Config
from synthaug.errors import ConfigError
from synthaug.evaluate import check_evaluation, code_identity
from synthaug.records import PixelSpec
from synthaug.trial.backbone import backbone_features
from synthaug.trial.entry import build, entry_identity, load_entry
from tests import stand_ins

SETTING = "evaluate.classifier"
pytestmark = pytest.mark.usefixtures("clean_path")


@pytest.fixture
def clean_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def file(text: str, name: str = "own.py") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return file


def test_a_name_in_a_file_and_one_in_a_module(write: Callable[..., Path]) -> None:
    assert load_entry(f"{write('answer = 42')}:answer", SETTING) == 42
    assert load_entry("sklearn.naive_bayes:GaussianNB", SETTING).__name__ == "GaussianNB"


def test_a_module_in_the_working_directory_is_found(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("answer = 43", "synthaug_test_module_in_cwd.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in {"", str(tmp_path)}])
    assert load_entry("synthaug_test_module_in_cwd:answer", SETTING) == 43
    del sys.modules["synthaug_test_module_in_cwd"]


def test_a_file_is_run_once_and_again_when_it_has_changed(write: Callable[..., Path]) -> None:
    path = write("made = []")
    first = load_entry(f"{path}:made", SETTING)
    assert load_entry(f"{path}:made", SETTING) is first
    write("made = [1]")
    assert load_entry(f"{path}:made", SETTING) == [1]


def test_files_of_one_name_are_two_modules(write: Callable[..., Path]) -> None:
    one, other = write("value = 1", "one/own.py"), write("value = 2", "other/own.py")
    assert [load_entry(f"{path}:value", SETTING) for path in (one, other, one)] == [1, 2, 1]


def test_a_class_of_a_file_can_be_looked_up_in_its_module(write: Callable[..., Path]) -> None:
    # Dataclasses, pickling and joblib all do.
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n  x: int\n"
    made = load_entry(f"{write(text)}:A", SETTING)
    assert vars(sys.modules[made.__module__])["A"] is made


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ("no_colon", r"evaluate\.classifier is 'no_colon'; write 'package\.module:name' or 'file\.py:name'"),
        (":name", r"write 'package\.module:name'"),
        ("module:", r"write 'package\.module:name'"),
        ("/no/such/place/own.py:name", r"there is no file /no/such/place/own\.py"),
        ("no_such_module_anywhere:name", "importing no_such_module_anywhere failed: ModuleNotFoundError"),
        ("sklearn.naive_bayes:NoSuchBayes", "naive_bayes has no 'NoSuchBayes'"),
        ("..:name", r"evaluate\.classifier: importing"),
    ],
)
def test_what_cannot_be_found_is_said(entry: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        load_entry(entry, SETTING)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def broken(:", "SyntaxError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("import no_such_module_anywhere", "ModuleNotFoundError"),
    ],
)
def test_a_file_that_fails_when_it_is_run_is_named(write: Callable[..., Path], text: str, what: str) -> None:
    path = write(text)
    for _ in range(2):
        with pytest.raises(ConfigError, match=rf"{SETTING}: importing .*own\.py failed: .*{what}"):
            load_entry(f"{path}:name", SETTING)
    # Mended, it works in the same process.
    write("name = 5")
    assert load_entry(f"{path}:name", SETTING) == 5


def test_identity_is_the_name_and_a_files_content(write: Callable[..., Path], tmp_path: Path) -> None:
    assert entry_identity(None) is None
    assert entry_identity("package.module:name") == "package.module:name"
    path = write("a = b = 1")
    first = entry_identity(f"{path}:a")
    assert first != entry_identity(f"{path}:b")
    # Where the file lies is of no account.
    assert entry_identity(f"{write('a = b = 1', 'elsewhere/own.py')}:a") == first
    write("a = b = 2")
    assert entry_identity(f"{path}:a") != first
    path.unlink()
    assert "missing" in str(entry_identity(f"{path}:a"))


def test_identity_runs_nothing(write: Callable[..., Path]) -> None:
    assert entry_identity(f"{write('raise SystemExit')}:a") is not None
    assert entry_identity("no_such_module_anywhere:a") is not None


def _two(a: int, b: int) -> None:
    raise AssertionError("never called")


class _Estimator:
    """An estimator by its methods; three positional settings tempt `build` to pass the form."""

    def __init__(self, a: int = 0, b: int = 0, c: int = 0) -> None:
        self.settings = (a, b, c)

    def fit(self, x: Any, y: Any) -> None: ...

    def predict_proba(self, x: Any) -> None: ...

    def get_params(self) -> dict[str, int]:
        return {}

    def __call__(self) -> None:
        raise AssertionError("an estimator is not called")


def test_factories_are_called_with_the_form_or_with_nothing() -> None:
    assert build(lambda channels, size, n_classes: (channels, size, n_classes), 1, 8, 10) == (1, 8, 10)
    assert build(lambda *form: form, 1, 8, 10) == (1, 8, 10)
    assert build(lambda channels, size, n_classes, width=4: width, 1, 8, 10) == 4
    assert build(lambda: "none", 1, 8, 10) == "none"
    assert build(lambda width=3: width, 1, 8, 10) == 3
    assert build(dict, 1, 8, 10) == {}
    with pytest.raises(TypeError, match="missing 2 required"):
        build(_two, 1, 8, 10)


def test_a_factory_that_raises_a_type_error_is_not_called_again() -> None:
    calls = []

    def factory(channels: int, size: int, n_classes: int) -> None:
        calls.append((channels, size, n_classes))
        raise TypeError("its own")

    with pytest.raises(TypeError, match="its own"):
        build(factory, 1, 8, 10)
    assert calls == [(1, 8, 10)]


def test_estimators_are_taken_as_they_are_and_their_classes_made_without_arguments() -> None:
    from sklearn.linear_model import LogisticRegression

    estimator = _Estimator(1, 2, 3)
    assert build(estimator, 1, 8, 10) is estimator
    assert build(_Estimator, 1, 8, 10).settings == (0, 0, 0)
    assert isinstance(build(LogisticRegression, 1, 8, 10), LogisticRegression)
    assert build(5, 1, 8, 10) == 5


def test_a_torch_class_is_given_the_form(write: Callable[..., Path]) -> None:
    assert isinstance(build(torch.nn.Identity, 1, 8, 10), torch.nn.Identity)
    assert build(torch.nn.Linear, 4, 5, True).weight.shape == (5, 4)


def check_both(config: Config, folder: Path) -> None:
    """As a run does: when it begins, and when the dataset is read."""
    check_evaluation(config)
    check_evaluation(config, stand_ins.read(config, folder))


def test_settings_without_own_code_pass_the_check(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config()
    check_evaluation(config)
    assert code_identity(config) == [None, None]


@pytest.mark.parametrize("name", ["sklearn.naive_bayes:GaussianNB", "{file}:network", "{file}:estimator"])
def test_what_is_of_use_passes_the_check(
    tiny_config: Callable[..., Config], write: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    path = write(
        "from sklearn.naive_bayes import GaussianNB\nfrom torch import nn\nestimator = GaussianNB()\n"
        "def network(channels, size, n_classes):\n    return nn.Linear(channels * size**2, n_classes)\n"
    )
    config = tiny_config(evaluate={"classifier": name.format(file=path), "backbone": f"{path}:network"})
    check_both(config, tmp_path)
    assert code_identity(config) == [entry_identity(name.format(file=path)), entry_identity(f"{path}:network")]


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"classifier": "{file}:nothing"}, r"evaluate\.classifier: .*own\.py has no 'nothing'"),
        ({"classifier": "{file}:number"}, r"evaluate\.classifier .*gave a int"),
        ({"classifier": "{file}:raising"}, r"evaluate\.classifier .*raising failed .*OSError: no weights"),
        ({"classifier": "{file}:wanting"}, r"evaluate\.classifier .*wanting failed .*TypeError"),
        ({"classifier": "sklearn.svm:LinearSVC"}, r"evaluate\.classifier .*gave a LinearSVC"),
        ({"classifier": "nonsense"}, r"evaluate\.classifier is 'nonsense'"),
        ({"backbone": "{file}:nothing"}, r"evaluate\.backbone: .*own\.py has no 'nothing'"),
        ({"backbone": "/no/such/own.py:nothing"}, r"evaluate\.backbone: there is no file"),
    ],
)
def test_what_is_of_no_use_is_refused_before_any_work(
    tiny_config: Callable[..., Config],
    write: Callable[..., Path],
    tmp_path: Path,
    settings: dict[str, str],
    what: str,
) -> None:
    path = write(
        "number = 3\ndef raising(channels, size, n_classes):\n    raise OSError('no weights')\n"
        "def wanting(a, b):\n    return None\n"
    )
    config = tiny_config(evaluate={key: value.format(file=path) for key, value in settings.items()})
    with pytest.raises(ConfigError, match=what):
        check_both(config, tmp_path)


def test_a_factory_is_not_called_with_a_form_that_is_not_known(
    tiny_config: Callable[..., Config], write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write("def picky(channels, size, n_classes):\n    raise ValueError(f'{n_classes} classes')\n")
    config = tiny_config(evaluate={"classifier": f"{path}:picky"})
    check_evaluation(config)
    with pytest.raises(ConfigError, match=r"channels, size, n_classes = \(1, 8, 3\): ValueError: 3 classes"):
        check_both(config, tmp_path)


BACKBONES = """
import torch
from torch import nn


class Statistics(nn.Module):
    def __init__(self, channels, size, n_classes):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        assert not torch.is_grad_enabled()
        return self.dropout(torch.stack([x.mean((1, 2, 3)), x.amin((1, 2, 3)), x[:, 0, 0, 1]], 1)).double()


class Grid(Statistics):
    def forward(self, x):
        return x


class Sum(Statistics):
    def forward(self, x):
        return x.sum(0).flatten(1)


class Pair(Statistics):
    def forward(self, x):
        return x.flatten(1), x


class Broken(Statistics):
    def forward(self, x):
        raise RuntimeError("expected 3 channels")


def raising(channels, size, n_classes):
    raise FileNotFoundError("weights.pt")


def array(channels, size, n_classes):
    return [1]
"""


def _pixels(**changes: Any) -> PixelSpec:
    values = {
        "channels": 2, "dtype": "uint8", "colour": "channels", "low": 0, "high": 255, "size": 8, "fit": "none",
        "interpolation": "none", "smallest": (8, 8), "largest": (8, 8),
    }  # fmt: skip
    return PixelSpec(**{**values, **changes})


def test_a_backbone_gives_features_of_the_rows_asked_for(write: Callable[..., Path]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 2), dtype=np.uint8)
    look = backbone_features(f"{write(BACKBONES)}:Statistics", _pixels(), 4, 1)
    # More than a piece, in an order of its own.
    rows = np.random.default_rng(1).permutation(300)[:290]
    features = look(images, rows)
    assert (features.shape, features.dtype) == ((290, 3), np.dtype(np.float32))
    units = images[rows].astype(np.float64) / 255 * 2 - 1
    expected = np.stack([units.mean((1, 2, 3)), units.min((1, 2, 3)), units[:, 0, 1, 0]], 1)
    np.testing.assert_allclose(features, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("Grid", r"turned 5 images into Tensor of shape \(5, 2, 8, 8\); \[n, n_features\] is wanted"),
        ("Sum", r"turned 5 images into Tensor of shape \(2, 64\)"),
        ("Pair", r"turned 5 images into tuple"),
        ("Broken", r"Broken failed on images \[n, 2, 8, 8\]: RuntimeError: expected 3 channels"),
        ("raising", r"raising failed when it was called with .* \(2, 8, 4\): FileNotFoundError: weights\.pt"),
        ("array", "gave a list; a torch module is wanted"),
    ],
)
def test_a_backbone_that_gives_no_features_is_refused(write: Callable[..., Path], name: str, what: str) -> None:
    images = np.zeros((5, 8, 8, 2), dtype=np.uint8)
    with pytest.raises(ConfigError, match=rf"evaluate\.backbone .*{what}"):
        backbone_features(f"{write(BACKBONES)}:{name}", _pixels(), 4, 1)(images, np.arange(5))
