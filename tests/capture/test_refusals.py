"""What capture cannot do raises: by module or parameter, and with a way out."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from psgrad import CaptureError, PerSampleGrads, RefusedModelError, ShapeError
from tests.capture.test_capture import make
from tests.capture.unknown import product
from tests.model_oracle import grads_one_by_one, squared_loss


def test_a_parameter_used_outside_of_the_model_is_named():
    model = nn.ModuleDict({"encode": nn.Linear(3, 3), "decode": nn.Linear(3, 3)})
    with (
        PerSampleGrads(model["encode"], "sum"),
        pytest.raises(CaptureError, match=r"'weight' got an ordinary"),
    ):
        (model["encode"](torch.randn(2, 3)) @ model["encode"].weight).sum().backward()


def test_a_penalty_on_weights_is_named():
    model = nn.Sequential(nn.Linear(3, 3))
    with PerSampleGrads(model), pytest.raises(CaptureError, match=r"0\.weight.*weight_decay"):
        (model(torch.randn(2, 3)).mean() + model[0].weight.square().sum()).backward()


def test_after_a_failed_backward_the_next_one_is_clean():
    model, x = make("in-place residual")
    expected = grads_one_by_one(model, squared_loss, [x])
    with PerSampleGrads(model):
        handle = model.conv1.register_full_backward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            squared_loss(model, x + 1).backward()
        handle.remove()
        model.zero_grad()
        squared_loss(model, x).backward()
    for path, p in model.named_parameters():
        torch.testing.assert_close(p.grad_sample, expected[path])


def test_batch_norm_is_refused_by_path():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.ReLU()))
    with pytest.raises(RefusedModelError, match=r"1\.0 \(BatchNorm2d\).*GroupNorm"):
        PerSampleGrads(model)
    with PerSampleGrads(model.eval(), "sum"):
        model(torch.randn(2, 3, 4, 4)).sum().backward()
        model.train()
        with pytest.raises(RefusedModelError, match=r"1\.0"):
            model(torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Embedding(3, 2, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (nn.Embedding(3, 2, max_norm=1.0), "max_norm"),
        (nn.InstanceNorm2d(3, affine=True, track_running_stats=True), "running statistics"),
        (nn.SyncBatchNorm(3), "statistics of the whole batch"),
        (nn.BatchNorm2d(3, track_running_stats=False).eval(), "statistics of the whole batch"),
    ],
)
def test_settings_without_per_sample_gradients_are_refused(layer, reason):
    with pytest.raises(RefusedModelError, match=reason):
        PerSampleGrads(nn.Sequential(layer, nn.Linear(2, 2)))


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(RefusedModelError, match="no trainable parameter"):
        PerSampleGrads(nn.Sequential(nn.ReLU()))


def test_a_parameter_unfrozen_after_attaching_is_named():
    model = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3))
    with PerSampleGrads(model):
        model[0].requires_grad_(True)
        with pytest.raises(CaptureError, match=r"0\.bias, 0\.weight"):
            model(torch.randn(2, 3))
        with pytest.raises(CaptureError, match=r"0\.bias, 0\.weight"):
            model[1](model[0](torch.randn(2, 3))).sum().backward()


def test_a_second_handle_is_refused():
    model = nn.Linear(2, 2)
    with PerSampleGrads(model), pytest.raises(RefusedModelError, match="attached already"):
        PerSampleGrads(model)


def test_a_batch_of_the_wrong_rank_names_the_layer():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with PerSampleGrads(model), pytest.raises(ShapeError, match=r"0 \(Conv2d\).*batch.*\(3, 5, 5\)"):
        model(torch.randn(3, 5, 5))


def test_rows_per_sample_must_divide_the_batch():
    model = nn.Linear(2, 2)
    with PerSampleGrads(model, rows_per_sample=2), pytest.raises(ShapeError, match="rows_per_sample=2"):
        model(torch.randn(3, 2))


def test_batches_of_two_sizes_in_one_backward():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    with PerSampleGrads(model), pytest.raises(ShapeError, match="samples in"):
        (model["a"](torch.randn(3, 2)).sum() + model["b"](torch.randn(4, 2)).sum()).backward()


def test_a_module_vmap_cannot_run_is_named_with_a_way_out():
    class Unmappable(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.w * x.sum().item()

    model = nn.Sequential(nn.Linear(3, 3), Unmappable())
    with PerSampleGrads(model), pytest.raises(RefusedModelError, match=r"1 \(Unmappable\).*vmap"):
        model(torch.randn(2, 3))


def test_second_backward_through_one_forward_is_as_without_psgrad():
    model = nn.Linear(2, 2)
    with PerSampleGrads(model, "sum"):
        loss = model(torch.randn(3, 2, requires_grad=True)).sum()
        loss.backward(retain_graph=True)
        once, total = model.weight.grad_sample.clone(), model.weight.grad.clone()
        loss.backward()
        assert torch.equal(model.weight.grad_sample, once)
        assert torch.equal(model.weight.grad, 2 * total)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()


def test_a_model_for_one_size_of_batch_only_is_a_clear_error():
    class Eight(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x):
            return self.linear(x.reshape(8, 2))

    model = Eight()
    with PerSampleGrads(model), pytest.raises(CaptureError, match="8 rows, but not on fewer"):
        model(torch.randn(8, 2))


def test_learning_the_batch_axis_leaves_no_trace():
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Dropout(0.5), nn.utils.parametrizations.spectral_norm(nn.Linear(4, 2))
    )
    copied, x = copy.deepcopy(model), torch.randn(6, 3)
    torch.manual_seed(0)
    plain = copied(x)
    torch.manual_seed(0)
    with PerSampleGrads(model):
        out = model(x)
    torch.testing.assert_close(out, plain, rtol=0, atol=0)
    for buffer, other in zip(model.buffers(), copied.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=0, atol=0)


def test_learning_does_not_write_to_what_samples_share():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x, memory):
            return self.linear(x) * memory.mul_(0.5).add_(1)

    model, memory = Keeps(), torch.zeros(3)
    with PerSampleGrads(model):
        model(torch.randn(5, 4), memory)
    assert torch.equal(memory, torch.ones(3))


def test_a_layer_in_a_vmap_of_the_models_own_is_a_clear_error():
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            return torch.vmap(self.linear)(x * self.scale)

    model = nn.Sequential(Mapped())
    with PerSampleGrads(model), pytest.raises(CaptureError, match=r"0 \(Mapped\).*vmap inside"):
        model(torch.randn(4, 3))


@pytest.mark.parametrize("by", [lambda m: m, lambda m: m[0], lambda m: lambda x: m(input=x)])
def test_a_model_under_vmap_is_told_so(by):
    model = nn.Sequential(nn.Linear(3, 3))
    with PerSampleGrads(model), pytest.raises(CaptureError, match=r"0 \(Linear\).*under torch\.vmap while"):
        torch.vmap(by(model))(torch.randn(4, 3))


def test_a_checkpoint_inside_of_a_region_is_told_where_to_go():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.square, self.linear = nn.Parameter(torch.randn(3, 3)), nn.Linear(3, 3)

        def forward(self, x):
            return checkpoint(self.linear, product(x, self.square), use_reentrant=False)

    model = nn.Sequential(Checkpointed())
    with PerSampleGrads(model), pytest.raises(CaptureError, match=r"one of '0'.*around that module"):
        model(torch.randn(4, 3)).square().mean().backward()


def test_a_parameter_replaced_after_attaching_is_named():
    model = nn.Sequential(nn.Linear(3, 3))
    with PerSampleGrads(model):
        model[0].bias = nn.Parameter(torch.zeros(3))
        with pytest.raises(CaptureError, match=r"0\.bias"):
            model(torch.randn(2, 3))
