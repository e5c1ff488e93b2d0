"""Models with modules that run one sample at a time: by what they do with parameters, rows and layers."""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import StochasticDepth

from tests.capture.unknown import product


class Frames(nn.Module):
    """Every frame a row of the convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        frames = torch.tanh(self.conv(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        return self.head(frames.mean((1, 3, 4)))


class FramesFirst(Frames):
    """The same, frame-major: rows that are a multiple of the batch, in an order no shape tells."""

    def forward(self, x):
        x = x.transpose(0, 1)
        frames = torch.tanh(self.conv(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        return self.head(frames.mean((0, 3, 4)))


class OneByOne(Frames):
    """Layers called on one sample after another."""

    def forward(self, x):
        return torch.cat([self.head(F.relu(self.conv(row[:, 0])).mean((2, 3))) for row in x.split(1)])


class FromTable(nn.Module):
    """A small network makes a bias from a constant table, as Swin V2 does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.linspace(-1, 1, 10).reshape(1, 5, 2))
        self.bias = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3))
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return torch.tanh(self.linear(x) + self.bias(self.table)).sum(1)


class SequenceFirst(nn.Module):
    """Time is axis 0 of everything but the model's input."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0)

    def forward(self, x):
        return self.layer(self.embed(x.transpose(0, 1))).sum(0)


class CrossAttention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x):
        q, padding = self.embed(x), x[:, :, 0] > 1.5
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        out, weights = self.attention(q, x.tanh() @ x.new_ones(3, 4), q, padding, attn_mask=causal)
        return out + weights.mean()


class SelfAttention(CrossAttention):
    def forward(self, x):
        q = self.embed(x)
        mask = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype)
        mask[0, 1] = -torch.inf
        return self.attention(q, q, q, need_weights=False, attn_mask=mask)[0]


class UsesChildsWeights(nn.Module):
    """Children's parameters without calling the children, some as they are and some not."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.c = nn.Linear(3, 3)

    def forward(self, x):
        bias = self.b.bias.clone()
        bias[1] = 0
        x = torch.tanh(F.linear(x, self.a.weight, self.a.bias)) * self.scale
        x = torch.tanh(F.linear(x, self.b.weight, bias))
        return self.c(product(x, self.c.weight)).mean(1)


class NormalisesByFunction(nn.Module):
    """Layer norms by function: over channels, with a bias that is computed, with a weight that is."""

    def __init__(self):
        super().__init__()
        self.norm = LayerNorm2d(3)
        self.weight = nn.Parameter(torch.randn(3))
        self.bias = nn.Parameter(torch.randn(3))
        self.turn = nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        x = product(x, self.turn)
        x = torch.tanh(self.norm(x.mT.unsqueeze(3)).squeeze(3).mT)
        x = x + F.layer_norm(x, [3], self.weight, self.bias.sin(), 0.1)
        return F.layer_norm(x.cos(), (3,), self.weight.sin(), self.bias)


class WritesInPlace(nn.Module):
    """Fresh tensors that are written to, in a module with parameters of its own."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(3))
        self.mix = nn.Conv1d(6, 4, 1)
        self.drop = StochasticDepth(0.3, "row")

    def forward(self, x):
        out = torch.zeros(x.shape[0], 6, 3, dtype=x.dtype)
        out[:, 0] = self.token
        out[:, 1:] = x
        out += 1
        mixed = torch.stack([self.mix(row) for row in out])  # without a batch axis
        return F.relu_(mixed) + 0 * self.drop(out[:, :4])


class TiedByFunction(nn.Module):
    """A layer's weight is used again, as it is, outside of the layer."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"embed": nn.Linear(3, 4), "mid": nn.Linear(4, 4)})

    def forward(self, x):
        x = torch.tanh(self.inner["mid"](torch.tanh(self.inner["embed"](x))))
        return product(x, self.inner["embed"].weight)


class TableByMethod(nn.Module):
    """A module that is never called: it hands its table out by a method."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 5))

        def get(self):
            return self.table.sin()

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = TableByMethod.Table()
            self.out = nn.Linear(3, 3)

        def forward(self, x):
            return self.out(product(x.mT, self.table.get().mT).mT)

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = TableByMethod.Mixer(), TableByMethod.Mixer(), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Position(nn.Module):
    """Returns `[T, E]` of its table, for a batch that it only asks for its length."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 3))

    def forward(self, x):
        return self.table[: x.shape[1]]


class Temperature(nn.Module):
    """Returns a number."""

    def __init__(self):
        super().__init__()
        self.log = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return self.log.exp()


class AddsWhatModulesReturn(nn.Module):
    """Modules whose results have no batch in axis 0."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.position = Position()
        self.temperature = Temperature()

    def forward(self, x):
        x = self.linear(x)
        return (x + self.position(x)).tanh().sum(1) / self.temperature(x)


class TimeFirst(nn.Module):
    """Returns `[T, N, E]` of `[N, T, E]`."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        return product(x, self.weight).tanh().transpose(0, 1)


class MeanOverTimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = TimeFirst()

    def forward(self, x):
        return self.inner(x).mean(0)


class WindowsAndQuery(nn.Module):
    """A module with parameters of its own is given windows as rows, and one query per sample."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.randn(3))
            self.linear = nn.Linear(3, 3)

        def forward(self, windows, query):
            query = query.repeat_interleave(len(windows) // max(1, len(query)), 0)
            return torch.tanh(self.linear(windows) + self.bias) * query

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = WindowsAndQuery.Attention()

        def forward(self, x, query):
            windows = x.unflatten(1, (2, 2)).flatten(0, 1)
            return x + self.attention(windows, query).reshape(x.shape)

    def __init__(self):
        super().__init__()
        self.stem, self.query, self.block = nn.Linear(3, 3), nn.Linear(3, 3), self.Block()

    def forward(self, x):
        x = self.stem(x)
        return self.block(x, self.query(x.mean(1, keepdim=True)))


class WindowsBroadcast(WindowsAndQuery):
    """The same, where windows taken for one sample's would not be seen by any shape."""

    class Block(WindowsAndQuery.Block):
        def forward(self, x, query):
            windows = x.unflatten(1, (2, 2)).flatten(0, 1)
            return self.attention(windows, query).reshape(-1, len(x), 4, 3).mean(0) + x


class Recurrent(nn.Module):
    """A cell, step after step."""

    def __init__(self, cell):
        super().__init__()
        self.embed, self.cell = nn.Linear(3, 4), cell

    def forward(self, x):
        state = None
        for step in self.embed(x).unbind(1):
            state = self.cell(step, state)
        return sum(state) if isinstance(state, tuple) else state


SEQUENCE = (5, 3)
MODELS = {
    "frames": (Frames, (3, 3, 4, 5)),
    "frames first": (FramesFirst, (3, 3, 4, 5)),
    "one by one": (OneByOne, (1, 3, 4, 5)),
    "bias from a table": (FromTable, SEQUENCE),
    "sequence first": (SequenceFirst, SEQUENCE),
    "self-attention": (SelfAttention, SEQUENCE),
    "cross-attention": (CrossAttention, SEQUENCE),
    "attention with all options": (lambda: CrossAttention(add_bias_kv=True, add_zero_attn=True), SEQUENCE),
    "attention of other sizes": (lambda: CrossAttention(kdim=4, vdim=4, bias=False), SEQUENCE),
    "children's weights": (UsesChildsWeights, SEQUENCE),
    "norms by function": (NormalisesByFunction, SEQUENCE),
    "written in place": (WritesInPlace, SEQUENCE),
    "tied by function": (TiedByFunction, SEQUENCE),
    "a table by a method": (TableByMethod, SEQUENCE),
    "results without a batch": (AddsWhatModulesReturn, SEQUENCE),
    "results with time first": (MeanOverTimeFirst, SEQUENCE),
    "windows and a query": (WindowsAndQuery, (4, 3)),
    "windows, broadcast": (WindowsBroadcast, (4, 3)),
    "LSTM cell": (lambda: Recurrent(nn.LSTMCell(4, 2)), SEQUENCE),
    "LSTM cell without bias": (lambda: Recurrent(nn.LSTMCell(4, 2, bias=False)), SEQUENCE),
    "GRU cell": (lambda: Recurrent(nn.GRUCell(4, 2)), SEQUENCE),
    "RNN cell": (lambda: Recurrent(nn.RNNCell(4, 2)), SEQUENCE),
    "RNN cell with relu": (lambda: Recurrent(nn.RNNCell(4, 2, nonlinearity="relu")), SEQUENCE),
}

NOT_EMPTY = ("one by one", "written in place", "windows, broadcast")
"""Models that cannot run on an empty batch."""


def make(name, rows=6):
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model = build().double()
    for p in model.parameters():
        nn.init.normal_(p)
    return model, torch.randn(rows, *shape, dtype=torch.double)
