"""Gradient clipping, every member by its own norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from psgrad.ensemble.optim.per_member import as_hyperparameter, numbers_of
from psgrad.ensemble.optim.sgd import Values
from psgrad.errors import ConfigError, MemberError

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor] | Tensor, max_norm: Values) -> Tensor:
    """Scale each member's gradient, in place, so that its L2 norm over all parameters is at most `max_norm`.

    As `torch.nn.utils.clip_grad_norm_` does for a model alone, with the same 1e-6 in the quotient.

    Parameters
    ----------
    parameters
        Stacked `[K, ...]`; those without a gradient are left out.
    max_norm
        A number, or K of them.

    Returns
    -------
    Tensor
        `[K]` norms before clipping; 0 where no parameter has a gradient. NaN or infinity only where the
        member's own gradient is not finite.

    Raises
    ------
    MemberError
        If there are no parameters, or they are not all `[K, ...]` with one K.
    ConfigError
        If a `max_norm` is negative or NaN, or they are not one or K.

    """
    everyone = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    heads = {p.shape[:1] for p in everyone}
    if len(heads) != 1 or not everyone[0].ndim:
        shapes = sorted({tuple(p.shape) for p in everyone})
        raise MemberError(f"parameters of one ensemble are [K, ...] with one K, got {shapes}")
    members = everyone[0].shape[0]
    limit = as_hyperparameter("max_norm", max_norm, members)
    if not all(value >= 0 for value in numbers_of(limit)):
        raise ConfigError(f"max_norm must not be negative or NaN, got {max_norm!r}")
    grads = [p.grad for p in everyone if p.grad is not None]
    if not grads:
        return torch.zeros(members, dtype=everyone[0].dtype, device=everyone[0].device)
    where = grads[0]
    # [P, K] -> [K]
    each = torch.stack([torch.linalg.vector_norm(g.reshape(members, -1), dim=1).to(where) for g in grads])
    norms = torch.linalg.vector_norm(each, dim=0)
    factors = (where.new_tensor(numbers_of(limit)) / (norms + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, [factors.to(g).reshape(-1, *(1,) * (g.ndim - 1)) for g in grads])
    return norms
