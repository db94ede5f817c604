"""The optimiser: momentum made orthogonal for the matrices inside the network, Adam for everything else.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): the update of a weight matrix is the nearest
matrix whose singular values are all about 1, so that directions with small gradients are learned too. A convolution's
weight [out, in, k, k] counts as a matrix [out, in * k * k]. `torch.optim.Muon` takes matrices only, no convolutions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

# Matrices move this many times as far as Adam's rate says; docs/log.md has the measurements.
MATRIX_RATIO = 10.0
# Bounds the singular values of a matrix by its inverse, whatever the gradients say for how long.
_WEIGHT_DECAY = 0.1
_MOMENTUM = 0.95
_BETAS = (0.9, 0.99)
_EPSILON = 1e-8
# Of the quintic iteration in the post above: steepest at zero, at the price of singular values in 0.7..1.2.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
# What meets pixels or looks a class up is no map between hidden features.
_NOT_INSIDE = ("conv_in.", "conv_out.", "class_embedding.")


class Muon(torch.optim.Optimizer):
    """Muon for `matrices`, Adam (Kingma and Ba 2015) for `rest`.

    Args:
        matrices: Weights with two or more dimensions; the first is the output's.
        rest: All other weights.
        lr: Adam's rate; matrices move `MATRIX_RATIO` times as far.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], rest: Iterable[nn.Parameter], lr: float) -> None:
        groups = [{"params": list(matrices), "matrices": True}, {"params": list(rest), "matrices": False}]
        # "fused" tells torch that a loaded state's steps belong on the device of the weights.
        super().__init__([group for group in groups if group["params"]], {"lr": lr, "fused": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every weight that has a gradient. A closure is not supported and must be None."""
        assert closure is None, "the training loop takes its gradients itself"
        for group in self.param_groups:
            own = [parameter for parameter in group["params"] if parameter.grad is not None]
            (self._move_matrices if group["matrices"] else self._move_rest)(own, group["lr"])

    def _move_matrices(self, parameters: list[nn.Parameter], rate: float) -> None:
        weights: list[Tensor] = [*parameters]
        gradients = [_gradient(parameter) for parameter in parameters]
        momenta = [self._moment(parameter, "first") for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - _MOMENTUM)
        # Nesterov's: the gradient once more, ahead of the momentum.
        updates = torch._foreach_lerp(gradients, momenta, _MOMENTUM)
        far = rate * MATRIX_RATIO
        torch._foreach_mul_(weights, 1 - far * _WEIGHT_DECAY)
        alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for weight, update in zip(weights, updates, strict=True):
            matrix = update.flatten(1)
            alike[matrix.shape].append((weight, matrix))
        for (rows, columns), members in alike.items():
            # Matrices of one shape in one product: alone they are too small to keep a core busy.
            turned = orthogonal(torch.stack([matrix for _, matrix in members]))
            moves = [move.reshape(weight.shape) for (weight, _), move in zip(members, turned, strict=True)]
            scale = math.sqrt(max(1.0, rows / columns))
            torch._foreach_add_([weight for weight, _ in members], moves, alpha=-far * scale)

    def _move_rest(self, parameters: list[nn.Parameter], rate: float) -> None:
        steps = [
            self.state[parameter].setdefault("step", torch.zeros((), device=parameter.device))
            for parameter in parameters
        ]
        adam(
            [*parameters],
            [_gradient(parameter) for parameter in parameters],
            [self._moment(parameter, "first") for parameter in parameters],
            [self._moment(parameter, "second") for parameter in parameters],
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            lr=rate,
            weight_decay=0.0,
            eps=_EPSILON,
            maximize=False,
        )

    def _moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        moment: Tensor = state[name]
        return moment


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "only weights with a gradient are moved"
    return parameter.grad


def muon(network: nn.Module, lr: float) -> Muon:
    """Return the optimiser of a U-Net of `diffusers`."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        inside = parameter.ndim >= 2 and not any(part in name for part in _NOT_INSIDE)
        (matrices if inside else rest).append(parameter)
    return Muon(matrices, rest, lr)


def orthogonal(matrices: Tensor) -> Tensor:
    """Return the matrices [n, rows, columns] with singular values brought near 1 (those above about 1e-3 of the norm).

    Newton-Schulz iteration x <- (a + b xx' + c (xx')^2) x. Its factors are polynomials of the first xx', so they are
    multiplied among themselves, rows by rows, and with x at the end only: for the long rows of convolutions 2.5 times
    less work than to iterate on x. A matrix of zeros stays one.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    gram, product = x @ x.mT, None
    a, b, c = _QUINTIC
    for iteration in range(_ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if iteration + 1 < _ITERATIONS:
            gram = factor @ gram @ factor
    assert product is not None
    x = product @ x
    return x.mT if tall else x
