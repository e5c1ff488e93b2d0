"""The rules in a graph that runs on other tensors: of other sizes (`dynamic=True`), of other layouts."""

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


@pytest.mark.parametrize("mode", ["real", "fake"])
@pytest.mark.parametrize("strategy", ["unfold", "correlate", "loop", "grouped"])
def test_a_graph_of_a_strategy_reads_any_layout(strategy, mode):
    """Also batches cut from the middle of a data set; and of no call's temporary memory is it made a part."""

    def gradients(w, x):
        return vmap(grad(lambda w, x: F.conv2d(x, w, groups=4).tanh().sum()), (None, 0))(w, x)

    w, data = torch.randn(8, 1, 3, 3), torch.randn(9, 1, 4, 6, 6)
    layouts = {
        "offset": data[3:7],
        "channels_last": data[:4, 0].to(memory_format=torch.channels_last).unsqueeze(1),
        "expanded": data[:1].expand(4, -1, -1, -1, -1),
    }
    with use_rules(strategy):
        gradients(w, data[:4])  # memory for temporaries is there now
        graph = make_fx(gradients, tracing_mode=mode)(w, data[:4])
    for x in layouts.values():
        torch.testing.assert_close(graph(w, x), gradients(w, x))
    assert not [node for node in graph.graph.nodes if node.op == "get_attr"]


def test_a_compiled_function_takes_a_data_set_in_batches():
    def gradients(w, x):
        return vmap(grad(lambda w, x: F.conv2d(x, w).tanh().sum()), (None, 0))(w, x)

    w, data = torch.randn(6, 2, 3, 3), torch.randn(8, 1, 2, 6, 6)
    torch._dynamo.reset()
    compiled = torch.compile(gradients, backend="aot_eager", fullgraph=True)
    with use_rules("unfold"):
        for x in data.split(4):
            torch.testing.assert_close(compiled(w, x), gradients(w, x))
    torch._dynamo.reset()
