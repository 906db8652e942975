"""Kernels in a process with several threads: models are left as they were, and other threads may draw numbers."""

import threading

import pytest
import torch
from torch import nn

import ntk

X = torch.linspace(-1, 1, 12).reshape(4, 3)


class Calling(nn.Module):
    """Calls a function at each forward pass in the main thread."""

    def __init__(self, function, noise=0.0):
        super().__init__()
        self.inner, self.noise, self.function = nn.Linear(3, 2), noise, function

    def forward(self, x):
        if threading.current_thread() is threading.main_thread():
            self.function()
        return nn.functional.dropout(self.inner(x), self.noise, training=True)


@pytest.mark.parametrize("method", ["jacobian", "structured"])
def test_two_threads_on_one_model_leave_it_as_it_was(method):
    kernels, entered, done = {}, threading.Event(), threading.Event()

    def kernel(name):
        kernels[name] = ntk.empirical_ntk(model, X, reduce="trace", method=method)

    def second():
        handle = model.inner.register_forward_pre_hook(lambda *_: enter())
        try:
            kernel("second")
        finally:
            handle.remove()

    def enter():
        if threading.current_thread() is thread:
            entered.set()
            done.wait(5)  # Until the first thread has restored the model.

    def start():
        if thread.ident is None:
            thread.start()
            entered.wait(0.2)  # The second thread gets no further than its wait for the first.

    thread = threading.Thread(target=second)
    model = Calling(start).train()
    kernel("first")
    done.set()
    thread.join()
    assert not entered.is_set() or torch.equal(kernels["first"], kernels["second"])
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.backends.mha.get_fastpath_enabled()


def test_other_threads_may_draw_random_numbers():
    def draw():
        state = torch.get_rng_state()
        thread = threading.Thread(target=torch.randn, args=(5,))
        thread.start()
        thread.join()
        drawn.append((state, torch.get_rng_state()))

    drawn, waiting = [], threading.Event()
    other = threading.Thread(target=waiting.wait, daemon=True)
    other.start()  # A process of one thread has drawn itself.
    try:
        ntk.empirical_ntk(Calling(draw).eval(), X, reduce="trace", method="jacobian")
        (before, after), now = drawn[-1], torch.get_rng_state()
        assert not torch.equal(before, after)
        assert torch.equal(after, now)  # The other thread's numbers will not be drawn again.
        with pytest.raises(ValueError, match="draws random numbers"):
            ntk.empirical_ntk(Calling(draw, noise=0.5).eval(), X, reduce="trace", method="jacobian")
    finally:
        waiting.set()


def test_attention_that_drops_nothing_draws_nothing():
    class Attention(Calling):
        def forward(self, x):
            q = super().forward(x)[:, None, :, None]
            return nn.functional.scaled_dot_product_attention(q, q, q).flatten(1)

    waiting = threading.Event()
    other = threading.Thread(target=waiting.wait, daemon=True)
    other.start()
    try:
        ntk.empirical_ntk(Attention(lambda: torch.manual_seed(3)), X, reduce="trace")
    finally:
        waiting.set()
