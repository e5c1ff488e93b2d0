"""What training scripts and libraries do to a model that a handle is attached to."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from psgrad import CaptureError, GradNorms, PerSampleGrads, RefusedModelError, clip_per_sample
from psgrad.ensemble import Ensemble
from tests.model_oracle import grads_one_by_one, squared_loss

HANDLES = [PerSampleGrads, GradNorms, lambda model: clip_per_sample(model, 1.0)]


class Marked(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3))
        self.linear = nn.Linear(3, 2)

    def forward(self, inputs, labels=None):
        return self.linear(inputs * self.scale)


def synchronised(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    x = torch.randn(4, 3)
    for handle in HANDLES:
        model = Marked()
        parallel = DistributedDataParallel(model)
        with pytest.raises(RefusedModelError, match=r"averages gradients among processes"):
            handle(parallel)
        for attached in (model, model.linear):
            with handle(attached):
                with pytest.raises(CaptureError, match=r"model\.module.*all_reduce"):
                    parallel(x)
                squared_loss(model, x).backward()
                with torch.no_grad():
                    parallel(x)
                with parallel.no_sync():
                    squared_loss(parallel, x).backward()
        ensemble = Ensemble.from_factory(Marked, seeds=range(2))
        parallel = DistributedDataParallel(ensemble)
        with handle(ensemble), pytest.raises(CaptureError, match=r"model\.module.*all_reduce"):
            parallel(x)
    dist.destroy_process_group()


def test_parameters_in_parts_and_without_values_are_refused(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        fully_shard(model[1])
        for handle in HANDLES:
            with pytest.raises(RefusedModelError, match=r"1\.weight: a DTensor.*\n  1\.bias: a DTensor"):
                handle(model)
    finally:
        dist.destroy_process_group()
    for handle in HANDLES:
        with pytest.raises(RefusedModelError, match=r"weight: on the meta device.*to_empty"):
            handle(nn.Linear(3, 2, device="meta"))


def test_gradients_that_would_not_be_averaged_among_processes_are_refused(tmp_path):
    mp.spawn(synchronised, (str(tmp_path),), nprocs=2)


@pytest.mark.parametrize("handle", HANDLES)
def test_gradients_are_added_in_place_as_autograd_does(handle):
    """`p.grad` may be a view of a buffer of all gradients."""
    torch.manual_seed(0)
    model, x = Marked().double(), torch.randn(5, 3).double()
    flat = torch.ones(sum(p.numel() for p in model.parameters())).double()
    sizes = [p.numel() for p in model.parameters()]
    for p, view in zip(model.parameters(), flat.split(sizes), strict=True):
        p.grad = view.view_as(p)
    with handle(model):
        squared_loss(model, x).backward()
    assert (flat != 1).all()
    torch.testing.assert_close(flat, torch.cat([p.grad.flatten() for p in model.parameters()]))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_made_under_a_handle_can_be_attached_to(copied):
    torch.manual_seed(0)
    model, x = nn.Sequential(Marked(), nn.Linear(2, 2)).double(), torch.randn(5, 3).double()
    with clip_per_sample(model, 1.0):
        squared_loss(model, x).backward()
        clone = copied(model)
        expected = grads_one_by_one(model=copy.deepcopy(clone), loss_of=squared_loss, inputs=[x])
        for _ in range(2):  # and again, after a handle has gone
            with PerSampleGrads(clone):
                squared_loss(clone, x).backward()
            for name, p in clone.named_parameters():
                torch.testing.assert_close(p.grad_sample, expected[name])


def test_a_copy_of_an_ensemble_made_under_a_handle_can_be_attached_to():
    ensemble, x = Ensemble.from_factory(Marked, seeds=range(2)), torch.randn(5, 3)
    with clip_per_sample(ensemble, 1.0):
        clone = copy.deepcopy(ensemble)
    with GradNorms(clone) as norms:
        clone.loss(F.cross_entropy, x, torch.zeros(5, dtype=torch.long)).sum().backward()
    assert norms.norms.shape == (2, 5)


def test_forward_keeps_its_signature():
    """Trainers look there for the columns of a data set that the model takes."""
    model = Marked()
    before = inspect.signature(model.forward)
    with clip_per_sample(model, 1.0):
        assert inspect.signature(model.forward) == before


@pytest.mark.parametrize("handle", HANDLES)
def test_parameters_without_elements(handle):
    class Nothing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.empty = nn.Linear(0, 2)
            self.own = nn.Parameter(torch.rand(0))

        def forward(self, x):
            return self.linear(x) + self.empty(x[:, :0]) + self.own.sum()

    torch.manual_seed(0)
    model, x = Nothing().double(), torch.randn(5, 3).double()
    expected = grads_one_by_one(copy.deepcopy(model), squared_loss, [x])
    with handle(model) as attached, PerSampleGrads(copied := copy.deepcopy(model)):
        squared_loss(copied, x).backward()
        squared_loss(model, x).backward()
    for name, p in copied.named_parameters():
        torch.testing.assert_close(p.grad_sample, expected[name])
    norms = torch.stack([g.flatten(1).square().sum(1) for g in expected.values()]).sum(0).sqrt()
    if isinstance(attached, GradNorms):
        torch.testing.assert_close(attached.norms, norms)
    assert model.empty.weight.grad.shape == (2, 0)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_default_device_is_not_the_models(device):
    torch.manual_seed(0)
    model, x, y = Marked(), torch.randn(5, 3), torch.randn(5, 2)
    torch.set_default_device(device)
    try:
        for handle in (*HANDLES, lambda model: clip_per_sample(model, 1.0, memory_budget=1)):
            with handle(model):
                F.mse_loss(model(x), y).backward()
    finally:
        torch.set_default_device(None)
    assert all(p.grad.device.type == "cpu" for p in model.parameters())


@pytest.mark.parametrize(
    "transform",
    [
        lambda model, x: torch.func.jvp(model, (x,), (x,)),
        lambda model, x: torch.func.jacrev(model)(x),
        lambda model, x: torch.func.grad(lambda x: model(x).sum())(x),
    ],
)
def test_a_model_under_a_transform_is_told_so(transform):
    model = nn.Sequential(nn.Linear(3, 3))
    with PerSampleGrads(model), pytest.raises(CaptureError, match=r"0 \(Linear\).*torch\.func\.grad, jacrev"):
        transform(model, torch.randn(4, 3))


def test_a_frozen_backbone_of_torch_jit():
    torch.manual_seed(0)
    with pytest.warns(FutureWarning, match="deprecated"):
        backbone = torch.jit.trace(
            nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double(), torch.randn(2, 3).double()
        )
    model, x = nn.Sequential(backbone, nn.Linear(4, 2).double()), torch.randn(5, 3).double()
    with pytest.raises(RefusedModelError, match=r"0\.0 \(TracedModule\): torch\.jit compiled it"):
        PerSampleGrads(nn.Sequential(backbone))
    backbone.requires_grad_(False)
    expected = grads_one_by_one(model, squared_loss, [x])
    with PerSampleGrads(model):
        squared_loss(model, x).backward()
    torch.testing.assert_close(model[1].weight.grad_sample, expected["1.weight"])
