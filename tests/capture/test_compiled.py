"""What torch.compile returns is refused by name; the module inside of it is as good as ever."""

import pytest
import torch
from torch import nn

from psgrad import PerSampleGrads, RefusedModelError, clip_per_sample


@pytest.mark.parametrize("attach", [PerSampleGrads, lambda m: clip_per_sample(m, 1.0)])
def test_a_compiled_model_is_refused_with_what_to_do(attach):
    model = torch.compile(nn.Linear(5, 4), backend="eager")
    with pytest.raises(RefusedModelError, match=r"OptimizedModule.*model\._orig_mod"):
        attach(model)
    with PerSampleGrads(model._orig_mod, "sum"):
        model._orig_mod(torch.randn(6, 5)).sum().backward()
    assert model._orig_mod.weight.grad_sample.shape == (6, 4, 5)
