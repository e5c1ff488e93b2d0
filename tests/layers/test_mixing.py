"""The list of layers that mix samples, against a check that knows no types: every module of torch.nn."""

import inspect

import pytest
import torch
from torch import nn

from psgrad import RefusedModelError, check_rows_independent
from psgrad.layers import why_samples_mix

N = 4
VECTORS, SIGNAL, IMAGES, VOLUMES = (N, 6), (N, 4, 8), (N, 4, 8, 8), (N, 4, 4, 4, 4)
SEQUENCES = (N, 5, 4)

# type -> (make, shape of the input, whether samples mix), one entry a mode or setting that matters
CASES = {
    **{
        kind: [(kind, VECTORS, False)]
        for kind in (
            nn.AlphaDropout, nn.CELU, nn.Dropout, nn.ELU, nn.FeatureAlphaDropout, nn.GELU, nn.Hardshrink,
            nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.LogSigmoid, nn.Mish,
            nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink,
            nn.Softsign, nn.Tanh, nn.Tanhshrink,
        )
    },
    nn.RReLU: [(lambda: nn.RReLU().eval(), VECTORS, False)],  # in training mode: below
    nn.Threshold: [(lambda: nn.Threshold(0.1, 0), VECTORS, False)],
    nn.Linear: [(lambda: nn.Linear(6, 3), VECTORS, False)],
    nn.LazyLinear: [(lambda: nn.LazyLinear(3), VECTORS, False)],
    nn.Flatten: [(nn.Flatten, IMAGES, False), (lambda: nn.Flatten(0), IMAGES, False)],
    nn.Unflatten: [(lambda: nn.Unflatten(1, (2, 3)), VECTORS, False)],
    nn.Softmax: [(lambda: nn.Softmax(1), VECTORS, False), (lambda: nn.Softmax(0), VECTORS, True)],
    nn.Softmin: [(lambda: nn.Softmin(1), VECTORS, False), (lambda: nn.Softmin(0), VECTORS, True)],
    nn.LogSoftmax: [(lambda: nn.LogSoftmax(1), VECTORS, False), (lambda: nn.LogSoftmax(0), VECTORS, True)],
    nn.Softmax2d: [(nn.Softmax2d, IMAGES, False)],
    nn.GLU: [(lambda: nn.GLU(1), VECTORS, False), (lambda: nn.GLU(0), VECTORS, True)],
    nn.Dropout1d: [(nn.Dropout1d, SIGNAL, False)],
    nn.Dropout2d: [(nn.Dropout2d, IMAGES, False)],
    nn.Dropout3d: [(nn.Dropout3d, VOLUMES, False)],
    nn.Conv1d: [(lambda: nn.Conv1d(4, 3, 3), SIGNAL, False)],
    nn.Conv2d: [(lambda: nn.Conv2d(4, 3, 3), IMAGES, False)],
    nn.Conv3d: [(lambda: nn.Conv3d(4, 3, 3), VOLUMES, False)],
    nn.LazyConv1d: [(lambda: nn.LazyConv1d(3, 3), SIGNAL, False)],
    nn.LazyConv2d: [(lambda: nn.LazyConv2d(3, 3), IMAGES, False)],
    nn.LazyConv3d: [(lambda: nn.LazyConv3d(3, 3), VOLUMES, False)],
    nn.ConvTranspose1d: [(lambda: nn.ConvTranspose1d(4, 3, 3), SIGNAL, False)],
    nn.ConvTranspose2d: [(lambda: nn.ConvTranspose2d(4, 3, 3), IMAGES, False)],
    nn.ConvTranspose3d: [(lambda: nn.ConvTranspose3d(4, 3, 3), VOLUMES, False)],
    nn.LazyConvTranspose1d: [(lambda: nn.LazyConvTranspose1d(3, 3), SIGNAL, False)],
    nn.LazyConvTranspose2d: [(lambda: nn.LazyConvTranspose2d(3, 3), IMAGES, False)],
    nn.LazyConvTranspose3d: [(lambda: nn.LazyConvTranspose3d(3, 3), VOLUMES, False)],
    nn.BatchNorm1d: [
        (lambda: nn.BatchNorm1d(6), VECTORS, True),
        (lambda: nn.BatchNorm1d(6).eval(), VECTORS, False),
        (lambda: nn.BatchNorm1d(4), SIGNAL, True),
    ],
    nn.BatchNorm2d: [
        (lambda: nn.BatchNorm2d(4), IMAGES, True),
        (lambda: nn.BatchNorm2d(4, affine=False), IMAGES, True),
        (lambda: nn.BatchNorm2d(4, momentum=None), IMAGES, True),
        (lambda: nn.BatchNorm2d(4, track_running_stats=False), IMAGES, True),
        (lambda: nn.BatchNorm2d(4, track_running_stats=False).eval(), IMAGES, True),
        (lambda: nn.BatchNorm2d(4).eval(), IMAGES, False),
        (lambda: BatchNormOfAnotherName(4), IMAGES, True),
    ],
    nn.BatchNorm3d: [(lambda: nn.BatchNorm3d(4), VOLUMES, True)],
    nn.LazyBatchNorm1d: [(nn.LazyBatchNorm1d, SIGNAL, True)],
    nn.LazyBatchNorm2d: [(nn.LazyBatchNorm2d, IMAGES, True)],
    nn.LazyBatchNorm3d: [(nn.LazyBatchNorm3d, VOLUMES, True)],
    nn.SyncBatchNorm: [(lambda: nn.SyncBatchNorm(4).eval(), IMAGES, False)],  # training needs CUDA; below
    nn.InstanceNorm1d: [
        (lambda: nn.InstanceNorm1d(4), SIGNAL, False),
        (lambda: nn.InstanceNorm1d(4, track_running_stats=True), SIGNAL, True),
    ],
    nn.InstanceNorm2d: [
        (lambda: nn.InstanceNorm2d(4, affine=True), IMAGES, False),
        (lambda: nn.InstanceNorm2d(4, track_running_stats=True), IMAGES, True),
        (lambda: nn.InstanceNorm2d(4, track_running_stats=True).eval(), IMAGES, False),
    ],
    nn.InstanceNorm3d: [(lambda: nn.InstanceNorm3d(4, track_running_stats=True), VOLUMES, True)],
    nn.LazyInstanceNorm1d: [(nn.LazyInstanceNorm1d, SIGNAL, True)],  # keeps statistics by default
    nn.LazyInstanceNorm2d: [(lambda: nn.LazyInstanceNorm2d(track_running_stats=False), IMAGES, False)],
    nn.LazyInstanceNorm3d: [(nn.LazyInstanceNorm3d, VOLUMES, True)],
    nn.GroupNorm: [(lambda: nn.GroupNorm(2, 4), IMAGES, False)],
    nn.LayerNorm: [(lambda: nn.LayerNorm(6), VECTORS, False)],
    nn.RMSNorm: [(lambda: nn.RMSNorm(6), VECTORS, False)],
    nn.LocalResponseNorm: [(lambda: nn.LocalResponseNorm(2), IMAGES, False)],
    nn.CrossMapLRN2d: [(lambda: nn.CrossMapLRN2d(2), IMAGES, False)],
    nn.ChannelShuffle: [(lambda: nn.ChannelShuffle(2), IMAGES, False)],
    nn.PixelShuffle: [(lambda: nn.PixelShuffle(2), IMAGES, False)],
    nn.PixelUnshuffle: [(lambda: nn.PixelUnshuffle(2), IMAGES, False)],
    nn.Unfold: [(lambda: nn.Unfold(3), IMAGES, False)],
    nn.Fold: [(lambda: nn.Fold(3, 2), (N, 8, 4), False)],
    nn.Upsample: [(lambda: nn.Upsample(scale_factor=2), IMAGES, False)],
    nn.UpsamplingNearest2d: [(lambda: nn.UpsamplingNearest2d(scale_factor=2), IMAGES, False)],
    nn.UpsamplingBilinear2d: [(lambda: nn.UpsamplingBilinear2d(scale_factor=2), IMAGES, False)],
    **{
        getattr(nn, f"{kind}{d}d"): [(lambda k=kind, d=d, a=args: getattr(nn, f"{k}{d}d")(*a), shape, False)]
        for d, shape in ((1, SIGNAL), (2, IMAGES), (3, VOLUMES))
        for kind, args in (
            ("AdaptiveAvgPool", (1,)), ("AdaptiveMaxPool", (1,)), ("AvgPool", (2,)), ("MaxPool", (2,)),
            ("LPPool", (2, 2)), ("CircularPad", (1,)), ("ReflectionPad", (1,)), ("ReplicationPad", (1,)),
            ("ZeroPad", (1,)), ("ConstantPad", (1, 0.5)),
        )
    },
    nn.FractionalMaxPool2d: [(lambda: nn.FractionalMaxPool2d(2, output_ratio=0.5), IMAGES, False)],
    nn.FractionalMaxPool3d: [(lambda: nn.FractionalMaxPool3d(2, output_ratio=0.5), VOLUMES, False)],
    nn.Embedding: [(lambda: nn.Embedding(9, 3), "words", False)],
    nn.EmbeddingBag: [(lambda: nn.EmbeddingBag(9, 3), "words", False)],
    nn.RNNCell: [(lambda: nn.RNNCell(6, 3), VECTORS, False)],
    nn.LSTMCell: [(lambda: nn.LSTMCell(6, 3), VECTORS, False)],
    nn.GRUCell: [(lambda: nn.GRUCell(6, 3), VECTORS, False)],
    nn.RNN: [
        (lambda: nn.RNN(4, 3, batch_first=True), SEQUENCES, False),
    ],
    nn.LSTM: [
        (lambda: nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True), SEQUENCES, False),
    ],
    nn.GRU: [
        (lambda: nn.GRU(4, 3, batch_first=True), SEQUENCES, False),
    ],
    nn.TransformerEncoderLayer: [
        (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), SEQUENCES, False),
    ],
    nn.TransformerEncoder: [
        (
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2),
            SEQUENCES,
            False,
        )
    ],
    # two inputs of the same shape
    nn.Bilinear: [(lambda: nn.Bilinear(6, 6, 3), (VECTORS, VECTORS), False)],
    nn.PairwiseDistance: [(nn.PairwiseDistance, (VECTORS, VECTORS), False)],
    nn.CosineSimilarity: [
        (nn.CosineSimilarity, (VECTORS, VECTORS), False),
        (lambda: nn.CosineSimilarity(0), (VECTORS, VECTORS), True),
    ],
    nn.MultiheadAttention: [
        (lambda: nn.MultiheadAttention(4, 2, batch_first=True), (SEQUENCES, SEQUENCES, SEQUENCES), False),
    ],
    nn.TransformerDecoderLayer: [
        (lambda: nn.TransformerDecoderLayer(4, 2, 8, batch_first=True), (SEQUENCES, SEQUENCES), False)
    ],
    nn.TransformerDecoder: [
        (
            lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 8, batch_first=True), 2),
            (SEQUENCES, SEQUENCES),
            False,
        )
    ],
    nn.Transformer: [
        (lambda: nn.Transformer(4, 2, 1, 1, 8, batch_first=True), (SEQUENCES, SEQUENCES), False),
    ],
}  # fmt: skip  # one a line is a page

NO_LAYERS = {
    "containers and bases": {
        nn.Module, nn.Container, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList,
        nn.ParameterDict, nn.RNNBase, nn.RNNCellBase, nn.DataParallel,
    },
    "need the indices that a pooling returns": {nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d},
    "losses: they put the batch together on purpose": {
        kind for name, kind in vars(nn).items() if "Loss" in name and inspect.isclass(kind)
    },
}  # fmt: skip  # one a line is a page


class BatchNormOfAnotherName(nn.BatchNorm2d):
    """A disguise."""


def make(build, shape):
    torch.manual_seed(0)
    module = build()
    if shape == "words":
        return module, [torch.randint(9, (N, 5))]
    shapes = shape if isinstance(shape[0], tuple) else [shape]
    inputs = [torch.randn(s) for s in shapes]
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        module(*inputs)  # now it is of the type that it stands for
    return module, inputs


FLAT = [
    pytest.param(*case, id=f"{kind.__name__}-{i}")
    for kind, cases in CASES.items()
    for i, case in enumerate(cases)
]


@pytest.mark.parametrize(("build", "shape", "mixes"), FLAT)
def test_the_list_and_the_check_agree(build, shape, mixes):
    module, inputs = make(build, shape)
    assert any(why_samples_mix(m) for m in module.modules()) == mixes
    if not mixes:
        check_rows_independent(module, *inputs)
        return
    with pytest.raises(RefusedModelError, match=r"mixes samples|batch"):
        check_rows_independent(module, *inputs)


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (lambda: nn.RNN(4, 3), 1),
        (lambda: nn.LSTM(4, 3), 1),
        (lambda: nn.GRU(4, 3), 1),
        (lambda: nn.MultiheadAttention(4, 2), 3),
        (lambda: nn.TransformerEncoderLayer(4, 2, 8), 1),
    ],
)
def test_sequence_first_is_not_listed_but_found(build, inputs):
    """Inside a batch-first model they are right; given the batch in axis 0, they go along it."""
    module = build()
    assert not any(why_samples_mix(m) for m in module.modules())
    with pytest.raises(RefusedModelError):
        check_rows_independent(module, *[torch.randn(SEQUENCES)] * inputs)


def test_every_module_of_torch_has_a_case():
    every = {kind for kind in vars(nn).values() if inspect.isclass(kind) and issubclass(kind, nn.Module)}
    assert CASES.keys() | set().union(*NO_LAYERS.values()) == every


def test_random_numbers_drawn_by_need_are_taken_for_mixing():
    """RReLU draws one for each negative entry: what is drawn for a sample depends on those before it."""
    with pytest.raises(RefusedModelError, match="RReLU"):
        check_rows_independent(nn.RReLU(), torch.randn(VECTORS))


def test_sync_batch_norm_is_listed_where_it_cannot_run():
    assert why_samples_mix(nn.SyncBatchNorm(4))
    assert why_samples_mix(nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(4)))


def test_lazy_layers_are_listed_before_they_have_run():
    assert why_samples_mix(nn.LazyBatchNorm2d())
    assert why_samples_mix(nn.LazyInstanceNorm2d())
