"""What psgrad does not know to keep samples apart, though it does."""

import torch


def product(x, weight):
    """`x @ weight`, of any number of axes and a matrix or a vector."""
    if weight.ndim == 1:
        return product(x, weight.unsqueeze(1)).squeeze(-1)
    return torch.einsum("...i,ij,j->...j", x, weight, weight.detach().new_ones(weight.shape[1]))
