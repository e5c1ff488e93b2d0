"""Models, losses and loops that the tests of the rules under `torch.func` share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from psgrad.conv import ConvGeometry
from psgrad.conv.problem import normalise
from psgrad.conv.strategies import STRATEGIES

SAMPLE = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
PROBLEM = normalise(SAMPLE, SAMPLE[..., :3, :3], (1, 1, 2, 2), ConvGeometry())[2]
ALL = ["auto", *(name for name, s in STRATEGIES.items() if s.refusal(PROBLEM, "grads") is None)]
OPERATORS = ("convolution", "_convolution", "convolution_backward")
Params = dict[str, Tensor]


def close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def kernels() -> list[str]:
    """The kernel that vmap finds for each operator, as the dispatcher prints it."""
    lines = [torch._C._dispatch_dump(f"aten::{operator}").splitlines() for operator in OPERATORS]
    return [line for dump in lines for line in dump if line.startswith("FuncTorchBatched:")]


SHIPPED = kernels()


class Convolutions(nn.Module):
    """A convolution, a grouped and strided one and a transposed one, in 1-, 2- or 3-D."""

    def __init__(self, rank: int, dropout: float = 0.0) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        transpose = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]
        self.layers = nn.Sequential(
            conv(2, 4, 3, padding="same", bias=False),
            nn.Tanh(),
            nn.Dropout(dropout),
            conv(4, 6, 3, stride=2, padding=1, groups=2),
            nn.Tanh(),
            transpose(6, 4, 2, stride=2, groups=2, dilation=2, output_padding=1),
            nn.Tanh(),
            nn.Flatten(1),
            nn.LazyLinear(3),
        )
        self.layers(torch.zeros(1, 2, *(4,) * rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def model(rank: int = 2, seed: int = 0, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return Convolutions(rank, dropout).double()


def parameters(module: nn.Module) -> Params:
    return {name: p.detach() for name, p in module.named_parameters()}


def samples(rank: int = 2, count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 2, *(4,) * rank, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


def loss_of(module: nn.Module) -> Callable[[Params, Tensor, Tensor], Tensor]:
    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(module, params, (x[None],)), y[None])

    return loss


def looped(module: nn.Module, x: Tensor, y: Tensor) -> Params:
    """Per-sample gradients by autograd, one sample at a time."""
    rows = []
    for n in range(len(x)):
        loss = F.cross_entropy(module(x[n : n + 1]), y[n : n + 1])
        rows.append(torch.autograd.grad(loss, list(module.parameters())))
    names = [name for name, _ in module.named_parameters()]
    return {name: torch.stack(grads) for name, grads in zip(names, zip(*rows, strict=True), strict=True)}
