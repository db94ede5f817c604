"""Plug into training: a release, balanced as you say, in anyone's training loop.

```python
from synthaug.loaders import balanced_loader

loader = balanced_loader("runs/x/release", batch_size=64, synthetic_ratio=1.0, transform=my_albumentations)
```
docs/loaders/ has scripts for plain PyTorch, Lightning, the Hugging Face Trainer and scikit-learn. Names are imported
when they are first asked for, so that `import synthaug.loaders` is light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synthaug.loaders.arrays import as_arrays, as_frame
    from synthaug.loaders.dataset import ReleaseDataset, augment
    from synthaug.loaders.loader import BalancedLoader, MixSampler, balanced_loader
    from synthaug.loaders.mixing import constant, decay_to_real, mix_then_real
    from synthaug.loaders.online import SyntheticReplace
    from synthaug.loaders.stream import ReleaseStream

_PLACES = {
    "BalancedLoader": "loader",
    "MixSampler": "loader",
    "ReleaseDataset": "dataset",
    "ReleaseStream": "stream",
    "SyntheticReplace": "online",
    "as_arrays": "arrays",
    "as_frame": "arrays",
    "augment": "dataset",
    "balanced_loader": "loader",
    "constant": "mixing",
    "decay_to_real": "mixing",
    "mix_then_real": "mixing",
}

__all__ = [
    "BalancedLoader",
    "MixSampler",
    "ReleaseDataset",
    "ReleaseStream",
    "SyntheticReplace",
    "as_arrays",
    "as_frame",
    "augment",
    "balanced_loader",
    "constant",
    "decay_to_real",
    "mix_then_real",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
