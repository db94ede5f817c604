"""The name of a solver. Alone in a file: the program that measures our memory imports it, and little else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def solver_words(config: Any, fitted: Iterable[str] = ()) -> str:
    """What a pipeline's solver is, from its scheduler's settings and the numbers of evaluations that it has weights of
    its own for: a record names the solver that it was made with."""
    levels = {"exponential": "even in ln sigma", "karras": "Karras levels"}.get(
        config.sigma_schedule, f"{config.sigma_schedule} levels"
    )
    name = {"dpmsolver++": "DPM-Solver++", "sde-dpmsolver++": "SDE-DPM-Solver++"}[config.algorithm_type]
    own = f"; fitted for {', '.join(fitted)}" if fitted else ""
    return f"{name}({config.solver_order}M), {levels}{own}"
