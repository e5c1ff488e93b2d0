"""Installing the rules: there, gone, nested, threaded, compiled."""

from __future__ import annotations

import copy
import os
import signal
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from psgrad.conv import functorch, install_rules, uninstall_rules, use_rules
from psgrad.errors import StrategyError
from tests.conv.functorch_models import (
    ALL,
    OPERATORS,
    SHIPPED,
    close,
    kernels,
    looped,
    loss_of,
    model,
    parameters,
    samples,
)

# Being there, and being gone


def test_the_kernels_are_there_and_gone() -> None:
    with use_rules():
        inside = kernels()
    assert len(inside) == len(OPERATORS)
    assert not set(inside) & set(SHIPPED)


def test_the_shipped_rules_are_back_after_an_exception() -> None:
    def fail(x: Tensor) -> Tensor:
        F.conv2d(x, torch.zeros(1, 2, 3, 3).double())
        raise KeyError("user")

    with pytest.raises(KeyError, match="user"), use_rules("loop"):
        vmap(fail)(samples()[0])
    with pytest.raises(ZeroDivisionError), use_rules("loop"), use_rules("unfold"):
        _ = 1 / 0
    assert kernels() == SHIPPED


def gradients_of_one_layer() -> None:
    x = torch.ones(2, 1, 2, 3, 3)
    vmap(grad(lambda w, x: F.conv2d(x, w).sum()), (None, 0))(torch.ones(1, 2, 2, 2), x)


def test_nesting_inner_strategy_wins_and_outer_comes_back(used: list[str]) -> None:
    with use_rules("loop"):
        gradients_of_one_layer()
        with use_rules("unfold"):
            gradients_of_one_layer()
            with use_rules("auto"):
                gradients_of_one_layer()
        gradients_of_one_layer()
    gradients_of_one_layer()  # PyTorch's own
    assert used == ["loop", "unfold", "auto", "loop"]


def test_install_and_uninstall(used: list[str]) -> None:
    install_rules("loop")
    try:
        gradients_of_one_layer()
        install_rules("unfold")
        gradients_of_one_layer()
        with use_rules("grouped"):
            gradients_of_one_layer()
            uninstall_rules()
            gradients_of_one_layer()
        gradients_of_one_layer()
    finally:
        uninstall_rules()
    gradients_of_one_layer()
    assert used == ["loop", "unfold", "grouped", "grouped", "loop"]
    with pytest.raises(StrategyError, match="uninstall_rules"):
        uninstall_rules()
    with use_rules(), pytest.raises(StrategyError, match="uninstall_rules"):
        uninstall_rules()


def test_threads_follow_their_own_strategies(used: list[str]) -> None:
    here, there, failed = threading.Event(), threading.Event(), []

    def other() -> None:
        try:
            gradients_of_one_layer()  # without a use of its own: the newest
            with use_rules("unfold"):
                gradients_of_one_layer()
                there.set()
                assert here.wait(60)
                gradients_of_one_layer()  # the first thread has left
        except BaseException as error:
            failed.append(error)
            raise

    with use_rules("auto"), use_rules("loop"):
        thread = threading.Thread(target=other)
        thread.start()
        assert there.wait(60)
        gradients_of_one_layer()
    here.set()
    thread.join()
    assert not failed
    assert used == ["loop", "unfold", "loop", "unfold"]


def test_many_threads_enter_and_leave() -> None:
    x, y = samples()
    failed = []

    def work(strategy: str) -> None:
        net = copy.deepcopy(shared)  # functional_call swaps the module's parameters
        try:
            for _ in range(10):
                with use_rules(strategy):
                    close(vmap(grad(loss_of(net)), (None, 0, 0))(parameters(net), x, y), right)
        except BaseException as error:
            failed.append(error)

    shared = model()
    right = looped(shared, x, y)
    threads = [threading.Thread(target=work, args=(strategy,)) for strategy in ALL]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_process_forked_while_another_thread_enters_can_use_the_rules() -> None:
    held, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with functorch._REGISTRY._lock:  # as a thread does inside of `enter`
            held.set()
            forked.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that waits for the lock
        try:
            with use_rules():
                os._exit(0)
        finally:
            os._exit(1)
    forked.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


# torch.compile


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("strategy", ["auto", "unfold"])
def test_a_compiled_function_is_traced_with_the_rules(strategy: str, used: list[str]) -> None:
    net, (x, y) = model(), samples()
    compiled = torch.compile(vmap(grad(loss_of(net)), (None, 0, 0)), backend="aot_eager", fullgraph=True)
    with use_rules(strategy):
        close(compiled(parameters(net), x, y), looped(net, x, y))
    assert set(used) == {strategy}
    close(compiled(parameters(net), x, y), looped(net, x, y))  # its graph stays as it was traced


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_code_cannot_install_the_rules() -> None:
    x, w = torch.ones(2, 1, 2, 3, 3), torch.ones(1, 2, 2, 2)

    def inside(x: Tensor) -> Tensor:
        with use_rules():
            return vmap(lambda x: F.conv2d(x, w))(x)

    def installing(x: Tensor) -> Tensor:
        install_rules()
        return x

    def uninstalling(x: Tensor) -> Tensor:
        uninstall_rules()
        return x

    for function in (inside, installing, uninstalling):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        with pytest.raises(RuntimeError, match="around the compiled function"):
            compiled(x)
    # without fullgraph that piece runs uncompiled
    close(torch.compile(inside, backend="aot_eager")(x), torch.full((2, 1, 1, 2, 2), 8.0))
