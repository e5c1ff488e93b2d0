"""The rules under a trace whose sizes are symbols, as with `torch.compile(dynamic=True)`."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from psgrad.conv import use_rules


@pytest.mark.parametrize("convolve", [F.conv2d, F.conv_transpose2d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("w_dim", [None, 0])
def test_traced_with_symbols_for_sizes(w_dim, dtype, convolve):
    """What the graph computes is right for other sizes, too: nothing was planned for those of the trace."""

    def loss(w, x):
        return convolve(x, w, stride=2, padding=1).square().sum()

    def gradients(w, x):
        return vmap(grad(loss), (w_dim, 0))(w, x)

    def arguments(size, batch):
        w = torch.randn(batch, 3, 3, 3, 3) if w_dim == 0 else torch.randn(3, 3, 3, 3)
        return w.to(dtype), torch.randn(batch, 1, 3, size, size).to(dtype)

    with use_rules():
        graph = make_fx(gradients, tracing_mode="symbolic")(*arguments(8, 4))
    for size, batch in ((8, 4), (5, 6), (1, 3)):
        w, x = arguments(size, batch)
        expected = gradients(w.double(), x.double())
        close = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.5}
        torch.testing.assert_close(graph(w, x).double(), expected, **close)
