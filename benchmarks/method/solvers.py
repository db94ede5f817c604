"""The name of a solver. Alone in a file: the program that measures our memory imports it, and little else."""

from __future__ import annotations

from typing import Any


def solver_words(config: Any) -> str:
    """What a pipeline's solver is, from its scheduler's settings: a record names the solver that it was made with."""
    levels = {"exponential": "even in ln sigma", "karras": "Karras levels"}.get(
        config.sigma_schedule, f"{config.sigma_schedule} levels"
    )
    name = {"dpmsolver++": "DPM-Solver++", "sde-dpmsolver++": "SDE-DPM-Solver++"}[config.algorithm_type]
    return f"{name}({config.solver_order}M), {levels}"
