"""The optimiser of the diffusion model: orthogonal updates for matrices, Adam's for the rest."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from synthaug.diffusion.muon import MATRIX_RATIO, Muon, muon, orthogonal
from synthaug.diffusion.network import build_unet


@pytest.mark.parametrize("shape", [(3, 8, 72), (2, 40, 16), (1, 32, 32), (2, 1, 9)])
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    turned = left.mT @ orthogonal(matrices) @ right.mT

    diagonal = turned.diagonal(dim1=1, dim2=2)
    off = turned - torch.diag_embed(diagonal)
    assert off.abs().max() < 1e-3
    # The iteration promises 0.68 to 1.21 for what is not far below the norm.
    found = diagonal[values > 0.02 * values.norm(dim=1, keepdim=True)]
    assert found.min() > 0.65
    assert found.max() < 1.25


def test_multiplied_among_themselves_the_factors_do_what_the_iteration_does() -> None:
    spread = torch.logspace(0, -5, 24)  # Ill-conditioned: singular values down to a hundred-thousandth.
    left, _, right = torch.linalg.svd(
        torch.randn(24, 200, generator=torch.Generator().manual_seed(2)), full_matrices=False
    )
    matrix = left @ torch.diag(spread) @ right
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x

    assert torch.allclose(orthogonal(matrix[None])[0].double(), x, atol=1e-3)


def test_no_gradient_no_move() -> None:
    assert not orthogonal(torch.zeros(2, 4, 9)).any()


def test_what_is_no_matrix_moves_as_with_adam() -> None:
    torch.manual_seed(3)
    ours, theirs = (nn.ParameterList([nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(2, 3))]) for _ in range(2))
    own, reference = Muon([], ours, 0.01), torch.optim.Adam(theirs, lr=0.01, betas=(0.9, 0.99))
    for _ in range(7):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        own.step()
        reference.step()

    assert all(torch.allclose(mine, other, atol=1e-7) for mine, other in zip(ours, theirs, strict=True))


def test_a_convolution_moves_a_known_way_whatever_the_size_of_its_gradient() -> None:
    for size in (1e-6, 1.0, 1e6):
        weight = nn.Parameter(torch.zeros(4, 8, 3, 3))
        weight.grad = size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(4))
        Muon([weight], [], 0.001).step()
        values = torch.linalg.svdvals(weight.detach().flatten(1)) / (0.001 * MATRIX_RATIO)
        assert 0.65 < values.min() <= values.max() < 1.25


def test_weights_stay_bounded_whatever_the_gradients_say_for_how_long() -> None:
    weight = nn.Parameter(torch.zeros(4, 8, 3, 3))
    optimizer = Muon([weight], [], 0.005)
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    for _ in range(500):
        weight.grad = gradient
        optimizer.step()

    assert torch.linalg.svdvals(weight.detach().flatten(1)).max() < 1.25 / 0.1


def test_a_training_that_goes_on_from_its_state_does_the_same() -> None:
    torch.manual_seed(6)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 3))
    images = torch.randn(8, 1, 9, 9)

    def take(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            network(images).square().mean().backward()
            optimizer.step()

    first = muon(network, 0.001)
    take(network, first, 3)
    other = copy.deepcopy(network)
    second = muon(other, 0.001)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take(network, first, 3)
    take(other, second, 3)

    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


def test_what_meets_pixels_and_classes_is_left_to_adam() -> None:
    unet = build_unet(size=8, channels=1, n_classes=3, n_hints=6, fold=1, width=16, dropout=0.0)
    names = {parameter: name for name, parameter in unet.named_parameters()}
    matrices, rest = ({names[item] for item in group["params"]} for group in muon(unet, 0.001).param_groups)

    assert matrices | rest == set(names.values())
    assert {"conv_in.weight", "conv_out.weight", "class_embedding.weight"} <= rest
    assert "mid_block.resnets.0.conv1.weight" in matrices
    assert not [name for name in matrices if name.endswith("bias") or "norm" in name]
