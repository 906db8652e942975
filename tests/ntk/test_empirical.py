"""empirical_ntk and layer_kernels, compared with an autograd loop over examples in float64."""

import copy

import pytest
import torch
from cases import CONFIGS, autograd_kernel, batch, classifier, relative_error, rows, tied_gpt2
from torch import nn

import ntk
from ntk import reference
from ntk.layout import LAYOUTS

# Tolerance for the rounding of float64 sums of a few thousand products.
EXACT = 1e-12


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", CONFIGS)
def test_equals_autograd_on_padded_classifiers(family, attention):
    model, inputs = classifier(family, attention), batch()
    assert relative_error(ntk.empirical_ntk(model, inputs, method="jacobian"), autograd_kernel(model, inputs)) <= EXACT


@pytest.mark.parametrize("family", CONFIGS)
def test_padding_does_not_count(family):
    model = classifier(family)
    unpadded = ntk.empirical_ntk(model, batch())
    for side in ("right", "left"):
        for extra in (5, 50):
            padded = ntk.empirical_ntk(model, batch(side=side, extra=extra))
            assert relative_error(padded, unpadded) <= EXACT


@pytest.mark.parametrize("family", CONFIGS)
def test_neighbours_do_not_count(family):
    model, inputs = classifier(family), batch()
    together = ntk.empirical_ntk(model, inputs)
    alone = ntk.empirical_ntk(model, rows(inputs, slice(1, 3)))
    assert relative_error(together[1:3, 1:3], alone) <= EXACT


def test_masks_with_holes_are_taken_as_they_are():
    model, inputs = classifier("bert"), batch((7, 7, 7))
    inputs["attention_mask"][1, 2:4] = 0
    assert relative_error(ntk.empirical_ntk(model, inputs), autograd_kernel(model, inputs)) <= EXACT


def test_tied_gpt2_with_label_words():
    model, inputs = tied_gpt2(), batch()
    output = ntk.outputs.label_words([5, 9])
    assert model.lm_head.weight is model.transformer.wte.weight
    kernel = ntk.empirical_ntk(model, inputs, output=output)
    assert kernel.shape == (4, 4, 2, 2)
    assert relative_error(kernel, autograd_kernel(model, inputs, output=output)) <= EXACT


def test_plain_modules_on_tensors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    assert relative_error(ntk.empirical_ntk(model, x), autograd_kernel(model, x)) <= EXACT


def test_two_sided_with_uneven_tiles_equals_one_tile():
    model, left, right = classifier("roberta"), batch((4, 6, 2, 3, 5)), batch((3, 3, 8), seed=9)
    example = 3 * 8 * (sum(p.numel() for p in model.parameters()) + max(p.numel() for p in model.parameters()))
    kernels = 2 * 5 * 5 * 9 * 8
    for inputs2 in (right, None):
        whole = ntk.empirical_ntk(model, left, inputs2)
        assert relative_error(whole, autograd_kernel(model, left, inputs2)) <= EXACT
        tiled = ntk.empirical_ntk(model, left, inputs2, memory_budget=kernels + 2 * 2 * example, method="jacobian")
        assert relative_error(tiled, whole) <= EXACT


def test_reductions_and_flatten():
    model, inputs = classifier("bert"), batch()
    kernel = ntk.empirical_ntk(model, inputs)
    matrix = ntk.flatten(kernel)
    assert matrix.shape == (12, 12)
    assert matrix[1 * 3 + 2, 3 * 3 + 0] == kernel[1, 3, 2, 0]
    assert torch.allclose(matrix, matrix.T, rtol=1e-13, atol=0)
    assert ntk.spectrum(kernel)[-1] > -1e-12 * ntk.spectrum(kernel)[0]
    by_hand = {
        "trace": sum(kernel[:, :, a, a] for a in range(3)),
        "diagonal": torch.stack([kernel[:, :, a, a] for a in range(3)], dim=2),
        "sum": sum(kernel[:, :, a, b] for a in range(3) for b in range(3)),
    }
    for reduce, expected in by_hand.items():
        assert torch.allclose(ntk.empirical_ntk(model, inputs, reduce=reduce), expected, rtol=1e-12)
    summed = ntk.empirical_ntk(model, inputs, output=ntk.outputs.sum_of_logits, reduce="trace")
    assert torch.allclose(summed, by_hand["sum"], rtol=1e-11)


def test_layer_kernels_sum_to_the_kernel_and_are_the_kernels_of_each_parameter():
    model, inputs = classifier("bert"), batch()
    layers = ntk.layer_kernels(model, inputs)
    assert list(layers) == [name for name, _ in model.named_parameters()]
    assert relative_error(sum(layers.values()), ntk.empirical_ntk(model, inputs)) <= EXACT
    name = "bert.encoder.layer.1.attention.self.value.weight"
    assert relative_error(layers[name], autograd_kernel(model, inputs, params=lambda n, p: n == name)) <= EXACT


def test_params_trainable_and_predicate():
    model, inputs = classifier("gpt2"), batch()
    for name, p in model.named_parameters():
        p.requires_grad_(".mlp." in name)
    expected = autograd_kernel(model, inputs, params=lambda name, p: ".mlp." in name)
    assert relative_error(ntk.empirical_ntk(model, inputs, params="trainable"), expected) <= EXACT
    assert relative_error(ntk.empirical_ntk(model, inputs, params=lambda name, p: ".mlp." in name), expected) <= EXACT


@pytest.mark.parametrize("chosen", ["logits_of_classes", "margin", "loss"])
def test_outputs(chosen):
    model = classifier("roberta")
    inputs = batch() | {"labels": torch.tensor([0, 2, 1, 1])}
    output, by_hand = {
        "logits_of_classes": (ntk.outputs.classes([2, 0]), lambda o, i: o.logits[:, [2, 0]]),
        "margin": (ntk.outputs.margin(), lambda o, i: o.logits[:, 1:2] - o.logits[:, 0:1]),
        "loss": (ntk.outputs.loss, lambda o, i: -o.logits.log_softmax(1).gather(1, i["labels"][:, None])),
    }[chosen]
    plain = {key: value for key, value in inputs.items() if key != "labels"}
    expected = autograd_kernel(model, plain if chosen != "loss" else inputs, output=by_hand)
    assert relative_error(ntk.empirical_ntk(model, inputs, output=output), expected) <= EXACT


def test_the_model_is_left_as_it_was_found():
    model, inputs = classifier("bert"), batch()
    model.bert.encoder.layer[0].eval()
    model.classifier.weight.requires_grad_(False)
    model.classifier.bias.grad = torch.ones_like(model.classifier.bias)
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    required = [p.requires_grad for p in model.parameters()]
    config = model.config.to_json_string()
    state = torch.get_rng_state()
    ntk.empirical_ntk(model, inputs | {"labels": torch.tensor([0, 1, 2, 0])})
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert modes == [m.training for m in model.modules()]
    assert required == [p.requires_grad for p in model.parameters()]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["classifier.bias"]
    assert config == model.config.to_json_string()
    assert torch.equal(state, torch.get_rng_state())


class _NoVmap(torch.autograd.Function):
    """x^2 without a vmap rule, like BLOOM's GELU."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.outer = nn.Linear(4, 2)

    def forward(self, x):
        return self.outer(_NoVmap.apply(self.inner(x)))


def test_models_that_torch_func_cannot_trace_are_exact_too(caplog):
    torch.manual_seed(0)
    model = Untraceable().double()
    x = torch.randn(4, 3, dtype=torch.float64)
    with caplog.at_level("INFO", logger="ntk.reference"):
        kernel = ntk.empirical_ntk(model, x, method="jacobian")
    assert "one backward pass per output" in caplog.text
    assert relative_error(kernel, autograd_kernel(model, x)) <= EXACT


def test_tiles_fit_the_budget():
    params = {"w": torch.zeros(1000, dtype=torch.float64)}
    kernel_bytes, example_bytes = 2 * 10 * 10 * 4 * 8, 2 * (8000 + 8000)
    size = reference._tile_size(params, 10, 10, 2, LAYOUTS[None], 1, kernel_bytes + 2 * 3 * example_bytes)
    assert size == 3


class TestMistakes:
    @pytest.mark.parametrize("method", ["jacobian", "structured"])
    def test_kernel_larger_than_memory_says_what_it_needs(self, method):
        with pytest.raises(MemoryError, match=r"needs? at least .* but memory_budget is .*fewer"):
            ntk.empirical_ntk(classifier("bert"), batch(), method=method, memory_budget=5_000)

    def test_unknown_method(self):
        with pytest.raises(ValueError, match="method must be one of 'jacobian', 'structured', 'auto'"):
            ntk.empirical_ntk(classifier("bert"), batch(), method="magic")

    def test_unknown_reduction(self):
        with pytest.raises(ValueError, match="reduce must be None, 'trace'"):
            ntk.empirical_ntk(classifier("bert"), batch(), reduce="mean")

    def test_no_parameter_selected(self):
        with pytest.raises(ValueError, match="selects none"):
            ntk.empirical_ntk(classifier("bert"), batch(), params=lambda name, p: False)

    def test_unknown_parameter_choice(self):
        with pytest.raises(ValueError, match="params='encodr' is no parameter or module"):
            ntk.empirical_ntk(classifier("bert"), batch(), params="encodr")

    def test_language_model_without_output_says_what_to_pass(self):
        with pytest.raises(ValueError, match=r"ntk\.outputs\.label_words"):
            ntk.empirical_ntk(tied_gpt2(), batch())

    def test_encoder_without_a_head(self):
        with pytest.raises(ValueError, match="no logits"):
            ntk.empirical_ntk(classifier("bert").bert, batch())

    def test_nan_weights_name_the_parameter(self):
        model = classifier("bert")
        model.classifier.weight.data[0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"classifier\.weight holds NaN"):
            ntk.empirical_ntk(model, batch())

    def test_noise_in_evaluation_mode(self):
        class Noisy(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(3, 2)

            def forward(self, x):
                return self.linear(x) + torch.randn(2)

        with pytest.raises(ValueError, match="random numbers in evaluation mode"):
            ntk.empirical_ntk(Noisy(), torch.ones(2, 3))

    def test_output_of_the_wrong_shape(self):
        with pytest.raises(ValueError, match=r"must return a tensor \(n, c\)"):
            ntk.empirical_ntk(classifier("bert"), batch(), output=lambda o, i: o.logits[..., None])

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ([[1, 2]], "a tensor or a mapping|Type-check"),
            ({}, "no batched tensor"),
            ({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, "share their first dimension"),
            ({"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(3, 3)}, "share their first dimension"),
            ({"input_ids": torch.ones(2, 3), "attention_mask": torch.zeros(2, 3)}, "no real token"),
            ({"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 4)}, "does not fit"),
            ({"input_ids": torch.ones(2, 3), "attention_mask": torch.full((2, 3), 0.5)}, "zeros and ones"),
        ],
    )
    def test_unusable_inputs(self, inputs, message):
        with pytest.raises((ValueError, TypeError), match=message):
            ntk.empirical_ntk(classifier("bert"), inputs)
