"""Generators: one small interface, and the registry that turns a name of the configuration into a class."""

from __future__ import annotations

from importlib import import_module

from synthaug.errors import ConfigError
from synthaug.generators.interface import Generator

# Modules are imported when asked for: each brings heavy libraries of its own.
REGISTRY: dict[str, str] = {
    "edm": "synthaug.generators.edm:EDMGenerator",
}


def resolve_device(wanted: str) -> str:
    """Return 'cpu' or 'cuda' for a device of the configuration; 'auto' takes a GPU where there is one.

    Raises:
        ConfigError: 'cuda' was asked for and is not there.
    """
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device is cuda, but torch sees no CUDA device here. Set train.device: auto or cpu.")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def generator_class(name: str) -> type[Generator]:
    """Return the generator of that name.

    Raises:
        ConfigError: There is none.
    """
    if name not in REGISTRY:
        raise ConfigError(f"train.generator: no generator is called '{name}'; known are {', '.join(sorted(REGISTRY))}.")
    module, _, attribute = REGISTRY[name].partition(":")
    found: type[Generator] = getattr(import_module(module), attribute)
    return found
