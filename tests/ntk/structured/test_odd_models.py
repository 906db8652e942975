"""Models that some way of differentiation cannot handle: kernels are exact, or refused with one clear message."""

import copy
import re
import warnings

import pytest
import torch
import transformers as hf
from cases import batch, classifier, randomized, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ntk

EXACT = 1e-11
METHODS = pytest.mark.parametrize("method", ["jacobian", "auto"])


def features(model: nn.Module, inputs: Tensor | dict[str, Tensor]) -> Tensor:
    """Jacobians (n, c, P) by one backward pass for each output and example, on copies of model and inputs."""
    entries = {"": inputs} if isinstance(inputs, Tensor) else inputs
    rows: list[Tensor] = []
    n = len(next(iter(entries.values())))
    for i in range(n):
        copied = not isinstance(model, torch.jit.ScriptModule | SparseBuffer)  # torch cannot copy such models.
        own = copy.deepcopy(model) if copied else model
        own.eval()
        one = {
            key: value[i : i + 1].detach().clone().requires_grad_(value.requires_grad) for key, value in entries.items()
        }
        result = own(one[""]) if "" in one else own(**one)
        for value in getattr(result, "logits", result).reshape(-1):
            found = torch.autograd.grad(value, list(own.parameters()), retain_graph=True, materialize_grads=True,
                                        allow_unused=True)  # fmt: skip
            rows.append(torch.cat([g.to_dense().flatten() for g in found]))
        if not copied:
            own.train()
    return torch.stack(rows).unflatten(0, (n, -1))


def by_hand(model: nn.Module, inputs: Tensor | dict[str, Tensor]) -> Tensor:
    J = features(model, inputs)
    return torch.einsum("iap,jbp->ijab", J, J)


class Two(nn.Module):
    """Two layers with an unusual operation between them."""

    def __init__(self, width: int = 4, outputs: int = 2):
        super().__init__()
        self.first, self.second = nn.Linear(3, width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)).tanh())

    def between(self, h: Tensor) -> Tensor:
        return h


class Checkpointed(Two):
    def between(self, h: Tensor) -> Tensor:
        return checkpoint(lambda z: self.second.weight[:, :1].sum() * z.sin(), h, use_reentrant=False)


class WholeCheckpointed(Two):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda z: super(WholeCheckpointed, self).forward(z), x, use_reentrant=False)


class Functional(Two):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.jacrev(lambda z: super(Functional, self).forward(z).sum()))(x)


class FunctionalJvp(Two):
    def between(self, h: Tensor) -> Tensor:
        return torch.func.jvp(torch.sin, (h,), (h,))[1]


class SparseBuffer(Two):
    def __init__(self, layout: str):
        super().__init__()
        matrix = torch.eye(4) + torch.diag(torch.ones(3), 1)
        self.register_buffer("graph", matrix.to_sparse() if layout == "coo" else matrix.to_sparse_csr())

    def between(self, h: Tensor) -> Tensor:
        return (self.graph.to(h.dtype) @ h.T).T


class Table(nn.Module):
    """Reads rows of a table that has sparse gradients."""

    def __init__(self, kind: str):
        super().__init__()
        self.table = (
            nn.Embedding(7, 4, sparse=True) if kind == "rows" else nn.EmbeddingBag(7, 4, sparse=True, mode=kind)
        )
        self.out = nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        found = self.table(ids)
        return self.out((found.mean(dim=1) if found.ndim == 3 else found).tanh())


class Squeezed(Two):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze()


class SolvesAnEquation(nn.Module):
    """Returns the outputs and their derivatives by the inputs, as physics-informed networks do."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.clone().requires_grad_()
        u = self.second(self.first(x).tanh())
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return torch.cat([u, slope[:, :2]], dim=1)


class Determinant(nn.Module):
    """Determinants and solvers, whose derivatives are wrong if a forward pass runs while gradients are disabled."""

    def __init__(self, kind: str):
        super().__init__()
        self.matrix, self.out, self.kind = nn.Parameter(torch.eye(3) + 0.1 * torch.randn(3, 3)), nn.Linear(1, 2), kind

    def forward(self, x: Tensor) -> Tensor:
        A = self.matrix + x[:, :, None] * x[:, None, :]
        found = {
            "slogdet": lambda: torch.linalg.slogdet(A)[1],
            "det": lambda: torch.linalg.det(A),
            "logdet": lambda: torch.logdet(A @ A.mT),
            "solve": lambda: torch.linalg.solve(A, x[:, :, None]).sum((1, 2)),
            "lu_solve": lambda: torch.linalg.lu_solve(*torch.linalg.lu_factor(A), x[:, :, None]).sum((1, 2)),
            "inverse": lambda: torch.linalg.inv(A).sum((1, 2)),
            "cholesky_solve": lambda: torch.cholesky_solve(x[:, :, None], torch.linalg.cholesky(A @ A.mT)).sum((1, 2)),
        }[self.kind]()
        return self.out(found[:, None])


class Distances(nn.Module):
    """Distances to centres, whose derivative by vmap differs from autograd's."""

    def __init__(self, p: float):
        super().__init__()
        self.centres, self.out, self.p = nn.Parameter(torch.randn(5, 3)), nn.Linear(5, 2), p

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cdist(x, self.centres, p=self.p).tanh())


class Stale(nn.Module):
    """Has a second attribute for a parameter, which torch.func.functional_call does not replace."""

    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(3, 4), nn.Linear(4, 2)
        self.parts = [self.first.weight, self.first.bias]

    def forward(self, x: Tensor) -> Tensor:
        own = dict(self.first.named_parameters())
        assert len(own) == 2
        return self.out(torch.nn.functional.linear(x, *self.parts).tanh())


class Layered(nn.Module):
    """Attention with torch's fast implementation in evaluation mode."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.body, self.out = nn.TransformerEncoder(layer, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x).mean(dim=1))


X = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
IDS = torch.tensor([[0, 1, 1], [2, 3, 4], [5, 6, 0], [1, 2, 5]])
MODELS = {
    "checkpoint": (Checkpointed, X),
    "checkpoint of all": (WholeCheckpointed, X),
    "jacrev inside": (Functional, X),
    "jvp inside": (FunctionalJvp, X),
    "sparse buffer": (lambda: SparseBuffer("coo"), X),
    "compressed buffer": (lambda: SparseBuffer("csr"), X),
    "sparse rows": (lambda: Table("rows"), IDS),
    "sparse bag": (lambda: Table("sum"), IDS),
    "sparse mean": (lambda: Table("mean"), IDS),
    "squeezed": (lambda: Squeezed(outputs=1), X),
    "squeezed outputs": (lambda: Squeezed(outputs=3), X),
    "one example squeezed": (lambda: Squeezed(outputs=1), X[:1]),
    "slope of the inputs": (SolvesAnEquation, X),
    "inputs that take gradients": (SolvesAnEquation, X.clone().requires_grad_()),
    "inputs that take gradients for nothing": (Two, X.clone().requires_grad_()),
    "scripted": (lambda: torch.jit.script(Two()), X),
    "scripted inside": (lambda: nn.Sequential(nn.Linear(3, 3), torch.jit.script(Two())), X),
    "traced": (lambda: torch.jit.trace(Two().double(), X), X),
    **{kind: (lambda kind=kind: Determinant(kind), X)
       for kind in ("slogdet", "det", "logdet", "solve", "lu_solve", "inverse", "cholesky_solve")},
    **{f"distances {p}": (lambda p=p: Distances(p), X) for p in (1.0, 2.0, 3.0)},
    "stale": (Stale, X),
    "fast path": (Layered, torch.randn(3, 5, 4, dtype=torch.float64)),
}  # fmt: skip


@METHODS
@pytest.mark.parametrize("name", MODELS)
def test_exact(name, method):
    make, x = MODELS[name]
    torch.manual_seed(0)
    model, before = make().double(), x.detach().clone()
    expected = by_hand(model, x)
    for tile in (None, x):
        found = ntk.empirical_ntk(model, x, tile, method=method)
        assert not found.requires_grad
        assert relative_error(found, expected) <= EXACT
    assert torch.equal(x, before)
    assert x.grad is None
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.training


@METHODS
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_run_as_they_were_written(backend, method):
    torch.manual_seed(0)
    plain = Two().double()
    model = torch.compile(copy.deepcopy(plain), backend=backend)
    inside = nn.Sequential(torch.compile(copy.deepcopy(plain), backend=backend))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for compiled in (model, inside):
            assert relative_error(ntk.empirical_ntk(compiled, X, method=method), by_hand(plain, X)) <= EXACT
    assert torch._dynamo.eval_frame._stance.stance == "default"


@METHODS
def test_inside_of_inference_mode(method):
    torch.manual_seed(0)
    model = Two().double()
    with torch.inference_mode():
        found = ntk.empirical_ntk(model, X.clone(), method=method)
        assert torch.is_inference_mode_enabled()
    assert relative_error(found, by_hand(model, X)) <= EXACT


@METHODS
def test_models_made_in_inference_mode(method):
    with torch.inference_mode():
        model = Two().double()
    with pytest.raises(ValueError, match=r"first.weight was made in torch.inference_mode.* copy.deepcopy"):
        ntk.empirical_ntk(model, X, method=method)
    mended = copy.deepcopy(model)
    assert relative_error(ntk.empirical_ntk(mended, X, method=method), by_hand(mended, X)) <= EXACT


@METHODS
def test_complex_parameters_say_so(method):
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.filter, self.out = nn.Parameter(torch.randn(2, dtype=torch.complex128)), nn.Linear(3, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=3))

    with pytest.raises(ValueError, match=r"parameter filter is complex .*view_as_real"):
        ntk.empirical_ntk(Spectral(), X, method=method)
    rest = ntk.empirical_ntk(Spectral(), X, method=method, params=lambda name, p: not p.is_complex())
    assert rest.shape == (4, 4, 2, 2)


@METHODS
def test_hooks_of_training_are_no_part_of_a_derivative_and_stay(method):
    torch.manual_seed(0)
    model = Two().double()
    expected = by_hand(model, X)
    calls = []
    model.first.weight.register_hook(lambda g: calls.append(1) or g * 0)
    model.second.weight.register_post_accumulate_grad_hook(lambda p: calls.append(2))
    assert relative_error(ntk.empirical_ntk(model, X, method=method), expected) <= EXACT
    assert calls == []
    model(X).sum().backward()
    assert sorted(calls) == [1, 2]
    assert not model.first.weight.grad.any()


class Settings:
    def __init__(self):
        self.kind, self.sizes = "long", [1, 2]


class Restless(Two):
    """Stores values, counts calls, replaces a module, and changes settings that its outputs depend on."""

    def __init__(self, fails: bool = False):
        super().__init__()
        self.settings, self.calls, self.seen, self.fails = Settings(), 0, {"h": []}, fails
        self.register_buffer("scale", torch.ones(4))

    def between(self, h: Tensor) -> Tensor:
        self.calls += 1
        self.settings.kind = "short"
        self.settings.sizes.append(3)
        self.seen["last"] = h
        self.last = h
        self.activation = nn.Tanh()
        if self.fails:
            self.train()
            raise RuntimeError("no more")
        return h * self.calls + len(self.settings.sizes)


@METHODS
@pytest.mark.parametrize("fails", [False, True])
def test_what_a_pass_changes_is_put_back_and_changes_no_other_pass(fails, method):
    torch.manual_seed(0)
    model = Restless(fails).double()
    model.second.eval()
    attributes = set(vars(model))
    if fails:
        with pytest.raises(ValueError, match=r"fails on example 0 by itself: RuntimeError: no more$"):
            ntk.empirical_ntk(model, X, method=method)
    else:
        assert relative_error(ntk.empirical_ntk(model, X, method=method), by_hand(model, X)) <= EXACT
    assert set(vars(model)) == attributes
    assert model.calls == 0
    assert vars(model.settings) == {"kind": "long", "sizes": [1, 2]}
    assert model.seen == {"h": []}
    assert list(dict(model.named_children())) == ["first", "second"]
    assert model.training
    assert not model.second.training
    assert not model._forward_pre_hooks


@METHODS
def test_buffers_that_a_pass_writes_to_are_put_back(method):
    class Counting(Two):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def between(self, h: Tensor) -> Tensor:
            self.count += 1
            return h * self.count

    model = Counting()
    with pytest.raises(ValueError, match="changes its count in its own forward pass"):
        ntk.empirical_ntk(model, X.float(), method=method)
    assert float(model.count) == 0


@METHODS
def test_bigbird_says_what_it_changes_and_has_it_back(method):
    torch.manual_seed(0)
    config = hf.BigBirdConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20,
                              vocab_size=50, num_labels=2, max_position_embeddings=96, block_size=4,
                              num_random_blocks=1)  # fmt: skip
    model = randomized(hf.BigBirdForSequenceClassification(config).double())
    ids = torch.randint(3, 50, (2, 48))
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    kinds = [type(module) for module in model.modules()]
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"changes its \S*attention_type from 'block_sparse' to 'original_full'"):
        ntk.empirical_ntk(model, {"input_ids": ids, "attention_mask": mask}, method=method)
    assert model.config.attention_type == "block_sparse"
    assert model.bert.attention_type == "block_sparse"
    assert kinds == [type(module) for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())


class Mostly(nn.Module):
    """A large layer whose operation returns several tensors, so that the reference computes it, and a small one."""

    def __init__(self):
        super().__init__()
        self.rows, self.out = nn.Parameter(torch.randn(900, 3)), nn.Linear(900, 2)

    def forward(self, x: Tensor) -> Tensor:
        data, rows = torch.broadcast_tensors(x.mean(dim=1)[:, None], self.rows)
        return self.out((data * rows).sum(dim=2).tanh())


@pytest.mark.parametrize("n", [2, 7])
@pytest.mark.parametrize("layers", [False, True])
def test_the_least_memory_that_is_named_is_enough(n, layers):
    torch.manual_seed(0)
    model, x = Mostly().double(), torch.randn(n, 5, 3, dtype=torch.float64)
    compute = ntk.layer_kernels if layers else ntk.empirical_ntk
    for method in ("auto", "jacobian"):
        with pytest.raises(MemoryError, match=r"needs? at least") as caught:
            compute(model, x, method=method, memory_budget=2_000)
        least = float(re.search(r"at least ([\d.]+) MB", str(caught.value))[1]) * 1e6
        compute(model, x, method=method, memory_budget=least)


@pytest.mark.parametrize("make", [Functional, WholeCheckpointed, lambda: SparseBuffer("coo")])
def test_kernels_of_adapters_say_in_one_line_what_they_cannot_capture(make):
    torch.manual_seed(0)
    model, x = make().double(), X
    methods = {"Propulsion": ntk.adapters.Propulsion()}
    for compute in (ntk.adapter_kernels, ntk.sign_gradient_kernels):
        try:
            found = compute(model, x, methods)["Propulsion"]
        except NotImplementedError as error:
            words = str(error)
        else:
            assert bool(torch.isfinite(found).all())
            continue
        assert "cannot be captured" in words
        assert "\n" not in words


def test_hooks_that_a_model_registers_in_a_pass_and_their_mark_go_together():
    """transformers registers hooks once, when hidden states are requested, and marks the model as hooked."""
    model, inputs = classifier("bert"), batch()
    first = ntk.hidden_state_kernel(model, inputs)
    ntk.empirical_ntk(model, inputs, params=lambda name, p: name.startswith("classifier"))
    assert torch.equal(ntk.hidden_state_kernel(model, inputs), first)
    assert model(**inputs, output_hidden_states=True).hidden_states
