"""The oracle for models: one ordinary backward per sample, in float64, on an untouched copy."""

import copy

import torch

from psgrad import PerSampleGrads


def grads_one_by_one(model, loss_of, inputs, rows_per_sample=1):
    """{path: [N, *shape]} of every trainable parameter; `loss_of(model, *inputs)` for one sample's rows."""
    model = copy.deepcopy(model)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    samples = inputs[0].shape[0] // rows_per_sample
    rows = []
    for n in range(samples):
        part = [t[n * rows_per_sample : (n + 1) * rows_per_sample] for t in inputs]
        grads = torch.autograd.grad(loss_of(model, *part), list(trainable.values()), allow_unused=True)
        rows.append(grads)
    return {
        name: None if rows[0][i] is None else torch.stack([row[i] for row in rows])
        for i, name in enumerate(trainable)
    }


def squared_loss(model, x):
    """A loss without parameters that depends on every output: the mean over rows."""
    out = model(x)
    weights = torch.linspace(0.5, 1.5, out[0].numel(), dtype=out.dtype).reshape(out.shape[1:])
    return (out.sin() * weights).flatten(1).sum(1).mean()


def assert_written_out(model, batch):
    """Every parameter's gradients are the oracle's, and of an empty batch there are none; `batch(rows)`."""
    x = batch(3)
    expected = grads_one_by_one(model, squared_loss, [x])
    with PerSampleGrads(model, "sum"):
        (squared_loss(model, x) * 3).backward()
        for path, grads in expected.items():
            torch.testing.assert_close(model.get_parameter(path).grad_sample, grads)
        model.zero_grad()
        model(batch(0)).sum().backward()
        for p in model.parameters():
            assert p.grad_sample.shape == (0, *p.shape)


def assert_clipped(model, x, handle_of, rows_per_sample=1, **options):
    """Norms and clipped sum are the oracle's, half of the samples clipped; return the handle's regions."""
    expected = grads_one_by_one(model, squared_loss, [x], rows_per_sample)
    norms = torch.stack([g.flatten(1).square().sum(1) for g in expected.values()]).sum(0).sqrt()
    bound = norms.median().item()
    factors = (bound / norms).clamp(max=1)
    samples = len(x) // rows_per_sample
    with handle_of(model, bound, "sum", rows_per_sample=rows_per_sample, **options) as clip:
        for _ in range(2):  # the first batch, and one when all is known
            model.zero_grad()
            (squared_loss(model, x) * samples).backward()
            torch.testing.assert_close(clip.result.norms, norms)
            for path, p in model.named_parameters():
                if p.requires_grad:
                    torch.testing.assert_close(p.grad, torch.tensordot(factors, expected[path], 1))
        return list(clip.regions)
