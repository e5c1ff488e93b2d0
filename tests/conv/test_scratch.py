"""Blocks that stay: one a purpose and thread, bounded, and nothing that is returned lies in one."""

import threading

import torch

from psgrad.conv import ConvGeometry, weight_grad_sq_norms, weight_grads, weighted_weight_grad
from psgrad.conv.scratch import LARGEST, scratch


def test_a_block_stays_and_grows():
    like = torch.empty(0)
    first = scratch("here", (3, 4), like)
    assert first.shape == (3, 4)
    assert first.is_contiguous()
    assert scratch("here", (2, 2), like).data_ptr() == first.data_ptr()
    assert scratch("there", (3, 4), like).data_ptr() != first.data_ptr()
    assert scratch("here", (3, 4), like.double()).data_ptr() != first.data_ptr()
    assert scratch("here", (50, 40), like).shape == (50, 40)


def test_beyond_the_bound_it_is_a_new_tensor():
    like = torch.empty(0)
    numel = LARGEST // 4 + 1
    scratch("large", (numel,), like)
    assert scratch("large", (2,), like).untyped_storage().nbytes() <= LARGEST


def test_each_thread_has_its_own():
    found = {}

    def ask(name):
        block = scratch("threads", (1000,), torch.empty(0))
        found[name] = block.data_ptr()
        barrier.wait()

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=ask, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found["a"] != found["b"]


def test_other_tensors_than_plain_ones_get_one_of_their_kind():
    assert scratch("meta", (4,), torch.empty(0, device="meta")).device.type == "meta"
    x = torch.randn(3, 2)
    out = torch.vmap(lambda row: scratch("vmap", (2,), row).copy_(row))(x)
    assert torch.equal(out, x)


def test_results_do_not_change_when_the_blocks_are_used_again():
    torch.manual_seed(0)
    x, g = torch.randn(2, 5, 3, 8, 8), torch.randn(2, 5, 4, 8, 8)
    shape, geometry = (4, 3, 3, 3), ConvGeometry((3, 3), padding=(1, 1))
    verbs = [
        lambda i: weight_grads(x[i], g[i], shape, geometry, "unfold"),
        lambda i: weight_grad_sq_norms(x[i], g[i], shape, geometry, "unfold"),
        lambda i: weighted_weight_grad(x[i], g[i], shape, geometry, torch.ones(5)),
    ]
    for verb in verbs:
        first = verb(0)
        before = first.clone()
        verb(1)
        assert torch.equal(first, before)
