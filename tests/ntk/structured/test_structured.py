"""The fast kernel, compared with an autograd loop and the reference: every family and every use of a parameter."""

import gc
import logging

import peft
import pytest
import torch
import transformers as hf
from cases import (
    FAMILIES,
    autograd_kernel,
    batch,
    batch_for,
    classifier,
    randomized,
    relative_error,
    rows,
    tied_gpt2,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import ntk
from propulsion import PropulsionConfig

EXACT = 1e-10
# Examples of these families run one at a time: their forward passes read values, or have a custom derivative.
ALONE = {"mixtral": "reads values", "t5": "reads values", "bart": "reads values", "bloom": "backward pass"}
NO_SDPA = ("deberta-v2", "gptj", "gemma2", "bloom")


@pytest.fixture
def messages(caplog):
    caplog.set_level(logging.INFO, logger="ntk")
    return lambda: caplog.messages


def compare(model, inputs, inputs2=None, *, output=None, params="all", **kwargs):
    """Compare kernel and per-parameter kernels with the reference, and the kernel with the autograd loop."""
    chosen = (lambda name, p: p.requires_grad) if params == "trainable" else (lambda name, p: True)
    options = {"output": output, "params": params}
    whole = ntk.empirical_ntk(model, inputs, inputs2, method="structured", **options, **kwargs)
    oracle = autograd_kernel(model, inputs, inputs2, output=output, params=chosen)
    assert relative_error(whole, oracle) <= EXACT
    layers = ntk.layer_kernels(model, inputs, inputs2, method="structured", **options, **kwargs)
    for name, kernel in ntk.layer_kernels(model, inputs, inputs2, method="jacobian", **options).items():
        # A kernel that is zero up to rounding is compared relative to the whole kernel.
        scale = max(float(kernel.norm()), 1e-6 * float(oracle.norm()))
        assert float((layers[name] - kernel).norm()) <= EXACT * scale, name
    assert relative_error(sum(layers.values(), torch.zeros_like(whole)), whole) <= EXACT


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, attention, messages):
    if attention == "sdpa" and family in NO_SDPA:
        pytest.skip("transformers has no sdpa for this family")
    if family == "gemma3":
        pytest.skip("its norms compute in float32, whose rounding the reference itself shows: see below")
    compare(classifier(family, attention), batch_for(family))
    assert not any(message.startswith("by the reference") for message in messages())
    refused = [message for message in messages() if message.startswith("not captured")]
    if family in ALONE:
        assert all(ALONE[family] in message for message in refused)
    else:
        assert not refused


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gemma3_to_the_rounding_of_its_own_norms(attention):
    """Gemma 3's norms compute in float32, whatever the model's precision; terms of its query norms nearly cancel."""
    model, inputs = classifier("gemma3", attention), batch()
    oracle = autograd_kernel(model, inputs)
    layers = ntk.layer_kernels(model, inputs, method="structured")
    assert relative_error(sum(layers.values(), torch.zeros_like(oracle)), oracle) <= EXACT
    for name, kernel in layers.items():
        expected = autograd_kernel(model, inputs, params=lambda n, p, name=name: n == name)
        assert relative_error(kernel, expected) <= (1e-6 if "self_attn" in name else EXACT), name


ADAPTERS = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"),
    "dora": lambda: peft.LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS", use_dora=True),
    "ia3": lambda: peft.IA3Config(task_type="SEQ_CLS"),
    "propulsion": lambda: PropulsionConfig(degree=3, positions=["all"], task_type="SEQ_CLS"),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama", "qwen2", "deberta-v2", "falcon"])
def test_adapters_off_their_initial_values(family, adapter, messages):
    if adapter == "ia3" and family == "qwen2":
        pytest.skip("peft has no default modules of IA3 for it")
    model = peft.get_peft_model(classifier(family), ADAPTERS[adapter]())
    compare(randomized(model), batch(), params="trainable")
    assert not any(message.startswith("by the reference") for message in messages())


def body_linears(model):
    """The names of the linear layers of a classifier's backbone."""
    inside = {id(m) for m in model.base_model.modules()}
    kinds = (nn.Linear, hf.pytorch_utils.Conv1D)
    return [name for name, m in model.named_modules() if isinstance(m, kinds) and id(m) in inside]


EVERYWHERE = {
    "lora": lambda names: peft.LoraConfig(r=2, target_modules=names, task_type="SEQ_CLS"),
    "ia3": lambda names: peft.IA3Config(target_modules=names, feedforward_modules=names[::3], task_type="SEQ_CLS"),
    "propulsion": lambda names: PropulsionConfig(degree=3, positions=["all"], task_type="SEQ_CLS"),
}


@pytest.mark.parametrize("adapter", EVERYWHERE)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_on_all_linear_layers_of_every_family(family, adapter, messages):
    model = classifier(family)
    model = randomized(peft.get_peft_model(model, EVERYWHERE[adapter](body_linears(model))))
    inputs = batch_for(family)
    oracle = autograd_kernel(model, inputs, params=lambda name, p: p.requires_grad)
    kernel = ntk.empirical_ntk(model, inputs, params="trainable", method="structured")
    assert relative_error(kernel, oracle) <= EXACT
    assert not any(message.startswith("by the reference") for message in messages())


def test_adapters_of_single_parameters_are_no_change_of_the_model():
    """peft registers the stack of experts again in each forward pass, with the same values."""
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")
    model = randomized(peft.get_peft_model(classifier("mixtral"), config))
    assert any("experts.lora_A" in name for name, _ in model.named_parameters())
    oracle = autograd_kernel(model, batch(), params=lambda name, p: p.requires_grad)
    for method in ("structured", "jacobian"):
        kernel = ntk.empirical_ntk(model, batch(), params="trainable", method=method)
        assert relative_error(kernel, oracle) <= EXACT


@pytest.mark.parametrize("words", [[5, 9], [3, 4, 8]])
def test_tied_head_with_label_words(words):
    compare(tied_gpt2(), batch(), output=ntk.outputs.label_words(words))


def test_untied_head():
    torch.manual_seed(0)
    config = FAMILIES["gpt2"]()
    config.tie_word_embeddings = False
    model = randomized(hf.GPT2LMHeadModel(config).double())
    assert model.lm_head.weight is not model.transformer.wte.weight
    compare(model, batch(), output=ntk.outputs.label_words([5, 9]))


def test_gradient_checkpointing_on():
    model = classifier("bert")
    model.gradient_checkpointing_enable()
    compare(model, batch())


def test_vision_transformer():
    torch.manual_seed(0)
    config = hf.ViTConfig(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
                          image_size=8, patch_size=4, num_labels=3)  # fmt: skip
    model = randomized(hf.ViTForImageClassification(config).double())
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    oracle = autograd_kernel(model, images, output=lambda result, _: result.logits)
    assert relative_error(ntk.empirical_ntk(model, {"pixel_values": images}, method="structured"), oracle) <= EXACT


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(2, 4, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.two = nn.Conv2d(4, 4, 3, groups=2)
        self.up = nn.ConvTranspose2d(4, 3, 2)
        self.line = nn.Conv1d(3, 2, 3, dilation=2)
        self.out = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.one(x)))
        hidden = torch.tanh(self.up(self.two(hidden))).flatten(2)
        return self.out(self.line(hidden).mean(dim=-1))


def test_convolutions():
    torch.manual_seed(0)
    model = randomized(Convolutional().double())
    model.norm.running_mean += torch.randn(4)
    compare(model, torch.randn(5, 2, 8, 8, dtype=torch.float64))


class Custom(nn.Module):
    """Uses parameters that belong to no submodule, in every way."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))  # a class token
        self.scale = nn.Parameter(torch.randn(6))  # LayerScale, 1 + w
        self.power = nn.Parameter(1 + 0.1 * torch.randn(6))  # Propulsion's z
        self.matrix = nn.Parameter(torch.randn(6, 6))  # transposed, sliced, used several times
        self.three = nn.Parameter(torch.randn(2, 6, 3))  # used in an einsum
        self.temperature = nn.Parameter(torch.tensor(0.7))  # a scalar parameter
        self.table = nn.Parameter(torch.randn(9, 6))  # indexed directly
        self.cell = nn.GRU(6, 6, batch_first=True)  # a recurrent layer
        self.unused = nn.Parameter(torch.randn(3))
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        hidden = torch.cat([self.token.expand(n, -1, -1), x], dim=1)
        hidden = hidden + self.table[: hidden.shape[1]]
        hidden = hidden @ self.matrix.T + F.linear(hidden, self.matrix) * (1 + self.scale)
        hidden = hidden * self.power**3 / self.temperature
        hidden = torch.tanh(hidden) @ self.matrix[:, :6].mT.contiguous()
        hidden = hidden + torch.einsum("nti,hij->ntj", hidden, self.three).repeat(1, 1, 2)
        hidden = F.rms_norm(hidden, (6,), self.scale) - self.token[0]
        hidden = hidden + self.cell(hidden)[0]
        return self.out(hidden.mean(dim=1))


def test_parameters_used_by_hand():
    torch.manual_seed(0)
    compare(Custom().double(), torch.randn(4, 3, 6, dtype=torch.float64))


class Mixing(nn.Module):
    """A module without a rule: it sorts the rows of different examples together."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        hidden = torch.relu(self.first(x[order]))
        return self.second(hidden[order.argsort()])


def test_rows_that_change_places(messages):
    torch.manual_seed(0)
    compare(Mixing().double(), torch.randn(6, 4, dtype=torch.float64))
    assert any("may mix the examples" in message for message in messages())


class Centred(nn.Module):
    """Examples change one another's outputs; without a shift, a check on two of them would mostly not notice."""

    def __init__(self, shift: float):
        super().__init__()
        self.first, self.second, self.shift = nn.Linear(4, 4), nn.Linear(4, 2), shift

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(torch.tanh(hidden - hidden.mean(dim=0) + self.shift * x))


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_examples_that_change_one_another_run_alone(shift):
    """A kernel is that of separate examples, whatever the batch."""
    torch.manual_seed(1)
    model, x = Centred(shift).double(), torch.randn(5, 4, dtype=torch.float64)
    layers = ntk.layer_kernels(model, x, method="structured")
    for name, kernel in ntk.layer_kernels(model, x, method="jacobian").items():
        assert float((layers[name] - kernel).norm()) <= EXACT * max(1.0, float(kernel.norm())), name


class Doubled(torch.autograd.Function):
    """An operation with a custom derivative."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return 2 * x * weight

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return 2 * g * weight, (2 * g * x).sum(dim=0)


class Foreign(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(Doubled.apply(x, self.weight).tanh())


def test_operations_that_no_capture_sees(messages):
    torch.manual_seed(0)
    model, x = Foreign().double(), torch.randn(5, 4, dtype=torch.float64)
    oracle = autograd_kernel(model, x)
    assert relative_error(ntk.empirical_ntk(model, x, method="structured"), oracle) <= EXACT
    assert any(message.startswith("by the reference instead: weight") for message in messages())


@pytest.mark.parametrize(
    ("family", "budget"),
    [("bert", 100_000), ("albert", 50_000), ("gpt2", 50_000), ("llama", 30_000), ("deberta-v2", 300_000)],
)
def test_little_memory(family, budget):
    """With little memory the model runs in segments and the examples in tiles."""
    model, left, right = classifier(family), batch_for(family, (6, 2, 6, 5, 4, 3)), batch_for(family, (5, 6), seed=9)
    for inputs2 in (None, right):
        kernel = ntk.empirical_ntk(model, left, inputs2, method="structured", memory_budget=budget)
        assert relative_error(kernel, autograd_kernel(model, left, inputs2)) <= EXACT


def test_too_little_memory_says_the_least(messages):
    model, inputs = classifier("bert"), batch((7, 7))
    with pytest.raises(MemoryError, match=r"two examples need at least 0.0\d+ MB") as caught:
        ntk.empirical_ntk(model, inputs, method="structured", memory_budget=3_000)
    least = float(str(caught.value).split("at least ")[1].split(" MB")[0]) * 1e6
    kernel = ntk.empirical_ntk(model, inputs, method="structured", memory_budget=1.1 * least)
    assert messages() == []
    assert relative_error(kernel, autograd_kernel(model, inputs)) <= EXACT


def test_holes_in_the_mask():
    model, inputs = classifier("bert"), batch((7, 7, 7, 4))
    inputs["attention_mask"][1, 2:4] = 0
    compare(model, inputs)


def test_position_ids_and_types_of_batch_one():
    model, inputs = classifier("bert"), batch((6, 6, 6))
    inputs["position_ids"] = torch.arange(6)[None]
    inputs["token_type_ids"] = torch.tensor([[0, 0, 0, 1, 1, 1]])
    oracle = autograd_kernel(model, {key: value.expand(3, -1) for key, value in inputs.items()})
    assert relative_error(ntk.empirical_ntk(model, inputs, method="structured"), oracle) <= EXACT


def test_decoders_without_a_padding_token_run_one_example_at_a_time():
    model = classifier("gpt2")
    model.config.pad_token_id = None
    compare(model, batch((5, 5, 5)))


def test_models_that_ignore_the_mask_are_not_padded():
    """The model averages over all tokens, including padding: mixed lengths would change its outputs."""

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = hf.BertConfig(pad_token_id=1)
            self.words, self.out = nn.Embedding(50, 6), nn.Linear(6, 2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.out(self.words(input_ids).mean(dim=1).tanh())

    torch.manual_seed(0)
    model, inputs = Mean().double(), batch((7, 3, 5, 5))
    cut = [
        rows({key: value[:, :k] for key, value in inputs.items()}, slice(i, i + 1)) for i, k in enumerate((7, 3, 5, 5))
    ]
    kernel = ntk.empirical_ntk(model, inputs, method="structured")
    for i, left in enumerate(cut):
        for j, right in enumerate(cut):
            oracle = autograd_kernel(model, left, right)
            assert relative_error(kernel[i : i + 1, j : j + 1], oracle) <= EXACT


def test_nothing_waits_for_the_garbage_collector():
    """A cycle of references would keep each batch's activations beyond the memory budget."""

    def tensors() -> int:
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    model, inputs = classifier("bert"), batch()
    methods = {"full": ntk.adapters.Full(), "Propulsion": ntk.adapters.Propulsion(), "LoRA": ntk.adapters.LoRA(rank=2)}
    ntk.adapter_kernels(model, inputs, methods)
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        ntk.empirical_ntk(model, inputs, method="structured")
        ntk.adapter_kernels(model, inputs, methods)
        assert tensors() == before
    finally:
        gc.enable()


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    others=st.lists(st.integers(1, 9), min_size=0, max_size=3),
    family=st.sampled_from(["bert", "gpt2", "llama"]),
    side=st.sampled_from(["left", "right"]),
    extra=st.integers(0, 3),
)
def test_any_lengths(lengths, others, family, side, extra):
    model, left = classifier(family), batch(tuple(lengths), side=side, extra=extra)
    right = batch(tuple(others), seed=5) if others else None
    kernel = ntk.empirical_ntk(model, left, right, method="structured")
    reference = ntk.empirical_ntk(model, left, right, method="jacobian")
    assert relative_error(kernel, reference) <= EXACT


class TestModelsThatAreNoFunction:
    def test_buffers_written_in_forward(self):
        class Counting(nn.Module):
            def __init__(self):
                super().__init__()
                self.out = nn.Linear(3, 2)
                self.register_buffer("seen", torch.zeros(1))

            def forward(self, x: Tensor) -> Tensor:
                self.seen += 1
                return self.out(x) * self.seen

        with pytest.raises(ValueError, match="changes its seen in its own forward pass"):
            ntk.empirical_ntk(Counting(), torch.randn(2, 3))

    def test_parameters_written_in_forward(self):
        class Drifting(nn.Module):
            def __init__(self):
                super().__init__()
                self.out = nn.Linear(3, 2)

            def forward(self, x: Tensor) -> Tensor:
                with torch.no_grad():
                    self.out.weight.mul_(0.99)
                return self.out(x)

        with pytest.raises((ValueError, RuntimeError), match=r"out.weight|modified by an inplace"):
            ntk.empirical_ntk(Drifting(), torch.randn(2, 3))

    def test_noise(self):
        class Noisy(nn.Module):
            def __init__(self):
                super().__init__()
                self.out = nn.Linear(3, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.out(F.dropout(x, 0.5, training=True))

        with pytest.raises(ValueError, match="draws random numbers in evaluation mode"):
            ntk.empirical_ntk(Noisy(), torch.randn(2, 3))

    def test_overflow_names_the_layer(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        with torch.no_grad():
            model[0].bias.fill_(10)
            model[1].weight.fill_(3e38)
        with pytest.raises(ValueError, match=r"activations overflow at 1 \(Linear\)"):
            ntk.empirical_ntk(model, torch.randn(2, 3))

    @pytest.mark.parametrize("trainable", [True, False])
    def test_gradients_that_do_not_exist_name_the_layer(self, trainable):
        class Rooted(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.second(self.first(x).abs().sqrt())

        model = Rooted()
        nn.init.zeros_(model.first.weight)
        nn.init.zeros_(model.first.bias)
        model.first.requires_grad_(trainable)
        with pytest.raises(ValueError, match=r"gradients at the output of first \(Linear\)"):
            ntk.empirical_ntk(model, torch.randn(2, 3))
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", ["structured", "jacobian"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision_is_near_and_widened(method, dtype):
    model, inputs = classifier("bert"), batch()
    exact = ntk.empirical_ntk(model, inputs)
    kernel = ntk.empirical_ntk(model.to(dtype), inputs, method=method)
    assert kernel.dtype == torch.float32
    assert relative_error(kernel.double(), exact) < (0.1 if dtype == torch.bfloat16 else 1e-5)


def test_the_model_is_left_as_it_was_found():
    model, inputs = classifier("bert"), batch()
    model.classifier.weight.requires_grad_(False)
    model.classifier.bias.grad = torch.ones(3, dtype=torch.float64)
    before = {name: (p.clone(), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    ntk.empirical_ntk(model, inputs, method="structured")
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0])
        assert p.requires_grad == before[name][1]
        assert p.grad is before[name][2]
    assert model.training
    assert not any(hasattr(value, "_ntk_state") for value in inputs.values())
