"""Small private models, made through the engine's door."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from psgrad.dp import PrivacyEngine, PrivateOptimizer


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)
    )


def dataset(count: int) -> TensorDataset:
    choices = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(count, 2, 5, generator=choices), torch.randint(3, (count,), generator=choices)
    )


def loader_of(count: int = 16, batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    options = {"generator": torch.Generator().manual_seed(2)} | options
    return DataLoader(dataset(count), batch_size=batch_size, **options)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def private(
    engine: PrivacyEngine | None = None,
    *,
    model: nn.Module | None = None,
    optimizer: Callable[[Any], torch.optim.Optimizer] = sgd,
    loader: DataLoader[Any] | None = None,
    **options: Any,
) -> tuple[nn.Module, PrivateOptimizer, DataLoader[Any]]:
    model = network() if model is None else model
    return (engine or PrivacyEngine()).make_private(
        module=model,
        optimizer=optimizer([p for p in model.parameters() if p.requires_grad]),
        data_loader=loader_of() if loader is None else loader,
        **{"noise_multiplier": 1.0, "max_grad_norm": 0.1} | options,
    )


def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model(x), y).backward()


def train(model: nn.Module, optimizer: PrivateOptimizer, batches: Any) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        backward(model, x, y)
        optimizer.step()


def in_parts(loader: DataLoader[Any], optimizer: PrivateOptimizer, size: int) -> BatchMemoryManager:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus's own
        return BatchMemoryManager(data_loader=loader, max_physical_batch_size=size, optimizer=optimizer)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])
