"""`nn.LSTM`, `nn.GRU` and `nn.RNN` as they are: every sample's gradient is that of the sample alone."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from psgrad import PerSampleGrads, RefusedModelError, clip_per_sample
from psgrad.layers import RULES
from tests.model_oracle import assert_clipped, grads_one_by_one, squared_loss

KINDS = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "RNN": nn.RNN,
    "RNN with relu": lambda *args, **options: nn.RNN(*args, nonlinearity="relu", **options),
}
OPTIONS = {
    "plain": {},
    "without bias": {"bias": False},
    "two layers": {"num_layers": 2},
    "two directions": {"num_layers": 2, "bidirectional": True},
}


class Reader(nn.Module):
    """The mean over time and the last states `[layers, N, H]` of a network, to a vector a sample."""

    def __init__(self, kind, *, batch_first=True, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(3, 4)
        self.network = KINDS[kind](4, 5, batch_first=batch_first, **options)
        self.batch_first = batch_first
        self.double()

    def forward(self, x):
        x = self.embed(x)
        out, state = self.network(x if self.batch_first else x.transpose(0, 1))
        states = state if isinstance(state, tuple) else (state,)
        ends = [s.transpose(0, 1).flatten(1) for s in states]
        return torch.cat([out.mean(1 if self.batch_first else 0), *ends], 1)


def assert_exact(model, x, rows_per_sample=1, **options):
    """All as the oracle has it, and on the whole batch at once."""
    assert assert_clipped(model, x, clip_per_sample, rows_per_sample, **options) == []


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_network(kind, options, batch_first):
    torch.manual_seed(1)
    # as many samples as steps, as layers and directions, and one
    for rows in (6, 4, 1):
        model = Reader(kind, batch_first=batch_first, **OPTIONS[options])
        assert_exact(model, torch.randn(rows, 6, 3, dtype=torch.float64))


def test_a_projection():
    assert_exact(Reader("LSTM", num_layers=2, proj_size=2), torch.randn(5, 6, 3, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_several_rows_a_sample(kind):
    assert_exact(Reader(kind, num_layers=2), torch.randn(6, 4, 3, dtype=torch.float64), rows_per_sample=2)


def test_a_network_that_is_the_model():
    class Last(nn.LSTM):
        def forward(self, x):
            return super().forward(x)[0][:, -1]

    torch.manual_seed(0)
    assert_exact(Last(3, 4, batch_first=True).double(), torch.randn(5, 6, 3, dtype=torch.float64))


@pytest.mark.parametrize("frozen", ["_l0", "_hh_", "bias", "weight"])
def test_frozen_in_part(frozen):
    model = Reader("GRU", num_layers=2)
    for name, p in model.network.named_parameters():
        p.requires_grad_(frozen not in name)
    assert_exact(model, torch.randn(5, 4, 3, dtype=torch.float64))


def test_a_memory_budget():
    assert_exact(Reader("LSTM"), torch.randn(6, 20, 3, dtype=torch.float64), memory_budget=40_000)


def test_the_steps_of_a_layer_are_computed_together(monkeypatch):
    rows, rule = [], type(RULES[nn.Linear])
    for name in ("grads", "sq_norms"):
        monkeypatch.setattr(rule, name, counting(getattr(rule, name), rows))
    assert_exact(Reader("LSTM"), torch.randn(5, 20, 3, dtype=torch.float64))
    assert len(rows) < 20  # of two batches; the states in pieces no larger than their gradients


def counting(compute, rows):
    def counted(self, call):
        rows.append(call.rows_per_sample)
        return compute(self, call)

    return counted


def test_dropout_between_layers_and_only_in_training():
    model, x = Reader("GRU", num_layers=2, dropout=1.0), torch.randn(5, 4, 3, dtype=torch.float64)
    with PerSampleGrads(model):
        squared_loss(model, x).backward()
    assert not model.network.weight_ih_l1.grad_sample.any()
    assert model.network.weight_hh_l1.grad_sample.any()
    assert_exact(model.eval(), x)


def test_rows_of_which_samples_have_several_run_inside_of_a_region():
    class Windows(Reader):
        def forward(self, x):
            return super().forward(x.repeat(2, 1, 1)).unflatten(0, (2, -1)).sum(0)

    model, x = Windows("LSTM"), torch.randn(5, 4, 3, dtype=torch.float64)
    expected = grads_one_by_one(model, squared_loss, [x])
    with PerSampleGrads(model, "sum") as handle:
        for _ in range(2):
            model.zero_grad()
            (squared_loss(model, x) * len(x)).backward()
            assert list(handle.regions) == [""]
            for path, p in model.named_parameters():
                torch.testing.assert_close(p.grad_sample, expected[path])


def test_the_network_is_left_as_it_was():
    model, x = Reader("LSTM"), torch.randn(5, 4, 3, dtype=torch.float64)
    expected = model(x)
    with PerSampleGrads(model):
        torch.testing.assert_close(model(x), expected)
        weights = dict(model.network.named_parameters())
        assert all(a is b for a, b in zip(model.network._flat_weights, weights.values(), strict=True))
        with torch.no_grad():
            assert torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, x = Reader("LSTM"), torch.randn(5, 4, 3, dtype=torch.float64)
    norms = []
    for half in (False, True):
        model, x = (model.to(dtype), x.to(dtype)) if half else (model, x)
        with clip_per_sample(model, 1.0) as clip:
            squared_loss(model, x).backward()
            norms.append(clip.result.norms.double())
    torch.testing.assert_close(norms[1], norms[0], rtol=0.05, atol=0)


def test_an_empty_batch():
    model = Reader("LSTM")
    with clip_per_sample(model, 1.0, "sum") as clip:
        model(torch.randn(3, 4, 3, dtype=torch.float64)).sum().backward()
        model.zero_grad()
        model(torch.randn(0, 4, 3, dtype=torch.float64)).sum().backward()
        assert clip.result.norms.shape == (0,)


def test_the_batch_where_time_belongs_is_refused():
    class Mixes(Reader):
        def forward(self, x):
            return self.network(self.embed(x))[0].mean(1)

    with (
        PerSampleGrads(model := Mixes("LSTM", batch_first=False)),
        pytest.raises(RefusedModelError, match=r"network \(LSTM\) mixes samples(?s:.*)batch_first=True"),
    ):
        model(torch.randn(5, 5, 3, dtype=torch.float64))


class Packs(Reader):
    """Takes `[N, T, 4]`, of which the last says how many steps a sample has."""

    def __init__(self, kind, *, in_order=False, **options):
        super().__init__(kind, **options)
        self.in_order = in_order

    def forward(self, x):
        lengths = x[:, 0, 3].long()
        packed = pack_padded_sequence(
            self.embed(x[..., :3]), lengths, batch_first=True, enforce_sorted=self.in_order
        )
        out, state = self.network(packed)
        out, _ = pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])
        states = state if isinstance(state, tuple) else (state,)
        return torch.cat([out.sum(1), *(s.transpose(0, 1).flatten(1) for s in states)], 1)


def sequences(*lengths):
    torch.manual_seed(1)
    x = torch.randn(len(lengths), 7, 4, dtype=torch.float64)
    x[..., 3] = torch.tensor(lengths).unsqueeze(1)
    return x


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_sequence(kind, options):
    model, x = Packs(kind, **OPTIONS[options]), sequences(3, 7, 1, 4, 4, 2)
    expected = model(x)
    with PerSampleGrads(model):
        torch.testing.assert_close(model(x), expected)
    assert_exact(model, x)


def test_a_packed_sequence_in_order():
    assert_exact(Packs("LSTM", in_order=True), sequences(5, 4, 4, 3))


def test_a_packed_sequence_that_its_rows_are_computed_of_is_refused():
    class RowsOfAll(Packs):
        def forward(self, x):
            packed = pack_padded_sequence(
                x[..., :3], x[:, 0, 3].long(), batch_first=True, enforce_sorted=False
            )
            return self.network(packed._replace(data=self.embed(packed.data)))[1][0][-1]

    with PerSampleGrads(model := RowsOfAll("LSTM")), pytest.raises(RefusedModelError, match="RowsOfAll"):
        model(sequences(3, 7, 1, 4))
