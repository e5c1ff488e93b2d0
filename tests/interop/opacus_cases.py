"""Models and runs of Opacus, with its own modes, that psgrad inside of it is tried on."""

import copy

import torch
from opacus.grad_sample import (
    GradSampleModule,
    GradSampleModuleFastGradientClipping,
)
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import (
    DPLossFastGradientClipping,
    DPTensorFastGradientClipping,
)
from torch import nn

from tests.model_oracle import grads_one_by_one, squared_loss

IN = {1: (4, 11), 2: (4, 9, 8), 3: (4, 6, 5, 7)}
CONVOLUTIONS = {
    "1d, strided": (1, lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2)),
    "1d, same, even kernel": (1, lambda: nn.Conv1d(4, 6, 4, padding="same", groups=2)),
    "2d, strided groups": (2, lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=2)),
    "2d, valid, no bias": (2, lambda: nn.Conv2d(4, 6, 3, padding="valid", bias=False)),
    "2d, dilated": (2, lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2)),
    "2d, patches": (2, lambda: nn.Conv2d(4, 6, 2, stride=2)),
    "2d, circular": (2, lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")),
    "2d, reflect, same": (2, lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect")),
    "3d, same": (3, lambda: nn.Conv3d(4, 6, 3, padding="same")),
    "3d, replicate": (3, lambda: nn.Conv3d(4, 6, 2, padding=1, padding_mode="replicate")),
    "1d transposed": (1, lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1)),
    "2d transposed, groups": (2, lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2)),
    "3d transposed": (3, lambda: nn.ConvTranspose3d(4, 6, 2)),
}
LAYOUTS = {
    "contiguous": lambda t: t,
    "permuted": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
}


def state():
    return (
        list(GradSampleModule.GRAD_SAMPLERS.items()),
        list(GradSampleModuleFastGradientClipping.NORM_SAMPLERS.items()),
        DPTensorFastGradientClipping.__dict__["backward"],
        GradSampleModule.rearrange_grad_samples,
    )


def case(name, layout="contiguous", dtype=torch.float64):
    torch.manual_seed(0)
    rank, make = CONVOLUTIONS[name]
    return make().to(dtype), LAYOUTS[layout](torch.randn(5, *IN[rank], dtype=dtype))


def opacus_grads(model, x, loss=squared_loss, **options):
    engine = GradSampleModule(copy.deepcopy(model), **options)
    loss(engine, x).backward()
    return {name: p.grad_sample for name, p in engine._module.named_parameters() if p.requires_grad}


def ghost(model, x, max_grad_norm, ghost_clipping=True, kind=GradSampleModuleFastGradientClipping):
    """Per-sample norms and the clipped sum of Opacus's ghost mode."""
    model = copy.deepcopy(model)
    engine = kind(model, max_grad_norm=max_grad_norm, use_ghost_clipping=ghost_clipping)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(model.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=max_grad_norm,
        expected_batch_size=len(x),
    )
    criterion = DPLossFastGradientClipping(engine, optimizer, RowLosses())
    output = engine(x) if isinstance(engine, nn.Module) else model(x)
    criterion(output).backward()
    return engine.per_sample_gradient_norms, {name: p.grad for name, p in model.named_parameters()}


class RowLosses(nn.Module):
    """`squared_loss` before its mean over rows, for a criterion with a `reduction`."""

    reduction = "mean"

    def forward(self, out):
        weights = torch.linspace(0.5, 1.5, out.shape[1:].numel(), dtype=out.dtype).reshape(out.shape[1:])
        losses = (out.sin() * weights).flatten(1).sum(1)
        return losses if self.reduction == "none" else losses.mean()


def clipped_one_by_one(model, x, max_grad_norm):
    grads = grads_one_by_one(model, squared_loss, (x,))
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
    factors = (max_grad_norm / (norms + 1e-6)).clamp(max=1)  # Opacus's
    return norms, {name: torch.tensordot(factors, g, 1) for name, g in grads.items()}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular", bias=False)
        self.norm = nn.GroupNorm(2, 8)
        self.second = nn.Conv2d(8, 6, 3, stride=2)
        self.head = nn.Linear(6 * 4 * 4, 5)

    def forward(self, x):
        return self.head(self.second(self.norm(self.first(x)).tanh()).relu().flatten(1))


def small(samples=6):
    torch.manual_seed(1)
    return Small().double(), torch.randn(samples, 3, 9, 9, dtype=torch.float64)
