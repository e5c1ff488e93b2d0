"""Models whose gradients DistributedDataParallel averages among processes: two real ones."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from psgrad import CaptureError, GradNorms, PerSampleGrads, RefusedModelError, clip_per_sample
from psgrad.ensemble import Ensemble
from tests.model_oracle import squared_loss

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


def test_gradients_that_would_not_be_averaged_among_processes_are_refused(tmp_path):
    mp.spawn(synchronised, (str(tmp_path),), nprocs=2)
