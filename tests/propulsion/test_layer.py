"""Single layers: the formula, its gradient, merging, dtypes and torch.func transforms."""

import pytest
import torch
from peft import IA3Config, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from propulsion import PropulsionConfig
from propulsion.layers import layer_class
from propulsion.scale import power

D_IN, D_OUT = 5, 4
DEGREES = [1, 2, 3, 15, 55, 0.5, 2.5]

BASES = {
    "linear": lambda: nn.Linear(D_IN, D_OUT),
    "linear without bias": lambda: nn.Linear(D_IN, D_OUT, bias=False),
    "conv1d": lambda: Conv1D(D_OUT, D_IN),
    "embedding": lambda: nn.Embedding(7, D_OUT, padding_idx=1),
}


def adapted(kind: str, *, degree: float = 3, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    base = BASES[kind]().to(dtype)
    with torch.no_grad():
        for p in base.parameters():
            p += torch.randn_like(p)
    layer = layer_class(base)(base, "default", PropulsionConfig(degree=degree))
    with torch.no_grad():
        layer.propulsion_z["default"] += 0.3 * torch.randn(D_OUT)
    return layer


def example(kind: str, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if kind == "embedding":
        return torch.randint(0, 7, (1, 6), generator=generator)
    return torch.randn(2, 3, D_IN, generator=generator, dtype=torch.float64).to(dtype)


def bits(layer: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in layer.get_base_layer().parameters()]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("degree", DEGREES)
def test_output_is_the_formula(kind, degree):
    layer, x = adapted(kind, degree=degree), example(kind)
    z = layer.propulsion_z["default"]
    assert (z > 0).all()
    torch.testing.assert_close(layer(x), layer.base_layer(x) * z.pow(degree), rtol=1e-15, atol=0)


@pytest.mark.parametrize("kind", BASES)
def test_the_starting_point_is_the_base_exactly(kind):
    base, x = BASES[kind](), example(kind, torch.float32)
    layer = layer_class(base)(base, "default", PropulsionConfig())
    assert torch.equal(layer(x), base(x))


def test_noise_around_one_is_reproducible():
    def noisy() -> Tensor:
        torch.manual_seed(3)
        return layer_class(base)(base, "default", PropulsionConfig(init_weights=False)).propulsion_z["default"]

    base = nn.Linear(D_IN, 50)
    z = noisy()
    assert torch.equal(z, noisy())
    assert 0 < (z - 1).abs().max() < 0.1


@pytest.mark.parametrize("degree", [1, 2, 3, 15])
def test_an_integer_power_is_exact_for_every_sign(degree):
    z = torch.tensor([-1.5, -1.0, 0.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    # Powers of few bits are exact in float64, so the reference is exact Python arithmetic.
    assert power(z, degree).tolist() == [x**degree for x in z.tolist()]
    (gradient,) = torch.autograd.grad(power(z, degree).sum(), z)
    assert gradient.tolist() == [degree * x ** (degree - 1) for x in z.tolist()]


@pytest.mark.parametrize("degree", [0.5, 1.5, 2.5])
def test_a_real_power_is_odd_and_finite(degree):
    z = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    scale = power(z, degree)
    assert torch.equal(scale, -scale.flip(0))
    torch.testing.assert_close(scale[3:], z[3:] ** degree)
    (gradient,) = torch.autograd.grad(scale.sum(), z)
    expected = torch.tensor([degree * abs(x) ** (degree - 1) if x else 0.0 for x in z.tolist()], dtype=z.dtype)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("degree", DEGREES)
def test_the_gradient_is_that_of_the_scale_times_k_z_to_the_k_minus_1(degree):
    layer, x = adapted("linear", degree=degree), example("linear")
    z = layer.propulsion_z["default"]
    ell = power(z, degree).detach().requires_grad_()
    torch.manual_seed(4)
    weights = torch.randn(2, 3, D_OUT, dtype=torch.float64)
    (direct,) = torch.autograd.grad((layer(x).sin() * weights).sum(), z)
    (of_scale,) = torch.autograd.grad(((layer.base_layer(x) * ell).sin() * weights).sum(), ell)
    torch.testing.assert_close(direct, degree * z.detach() ** (degree - 1) * of_scale, rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d"])
def test_degree_1_is_ia3_on_the_output_to_the_last_bit(kind):
    layer, x = adapted(kind, degree=1), example(kind)
    z = layer.propulsion_z["default"]
    config = IA3Config(target_modules=["0"], feedforward_modules=[], fan_in_fan_out=kind == "conv1d")
    ia3 = get_peft_model(nn.Sequential(layer.base_layer), config)
    ell = next(p for name, p in ia3.named_parameters() if "ia3_l" in name)
    ell.data.copy_(z.detach().reshape(ell.shape))
    ours, theirs = layer(x), ia3(x)
    assert torch.equal(ours, theirs)
    (ours_gradient,) = torch.autograd.grad(ours.sin().sum(), z)
    (theirs_gradient,) = torch.autograd.grad(theirs.sin().sum(), ell)
    assert torch.equal(ours_gradient, theirs_gradient.flatten())


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("degree", DEGREES)
def test_merged_is_unmerged_and_unmerging_restores_the_bits(kind, degree):
    layer, x = adapted(kind, degree=degree), example(kind)
    before, output, base_output = bits(layer), layer(x), layer.base_layer(x)
    layer.merge(safe_merge=True)
    # Relative to the largest term of the sum, since x W may cancel.
    torch.testing.assert_close(layer(x), output, rtol=0, atol=1e-14 * float(output.abs().max()))
    assert not equal(bits(layer), before)
    layer.unmerge()
    assert equal(bits(layer), before)
    assert torch.equal(layer(x), output)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base_output)
    assert not layer.merged


@pytest.mark.parametrize("kind", BASES)
def test_zero_scales_merge_and_unmerge(kind):
    layer, x = adapted(kind), example(kind)
    with torch.no_grad():
        layer.propulsion_z["default"][:2] = 0.0
    before = bits(layer)
    layer.merge(safe_merge=True)
    assert not layer(x)[..., :2].any()
    layer.unmerge()
    assert equal(bits(layer), before)


def test_merging_one_adapter_after_another_is_merging_both():
    layer, x = adapted("linear", degree=2), example("linear")
    layer.update_layer("second", PropulsionConfig(degree=5, init_weights=False))
    layer.set_adapter(["default", "second"])
    output, before = layer(x), bits(layer)
    expected = power(layer.propulsion_z["default"], 2) * power(layer.propulsion_z["second"], 5)
    torch.testing.assert_close(output, layer.base_layer(x) * expected, rtol=1e-14, atol=0)
    layer.merge()
    together = bits(layer)
    layer.unmerge()
    layer.merge(adapter_names=["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        layer.merge(adapter_names=["second"])
    assert equal(bits(layer), together)
    layer.unmerge()
    assert equal(bits(layer), before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_safe_merge_refuses_what_is_not_finite_and_changes_nothing():
    layer = adapted("linear", degree=55, dtype=torch.float16)
    with torch.no_grad():
        layer.propulsion_z["default"].fill_(2.0)
    before = bits(layer)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        layer.merge(safe_merge=True)
    assert not layer.merged
    assert equal(bits(layer), before)


def test_a_model_that_moved_to_another_dtype_while_merged_unmerges():
    layer = adapted("linear", dtype=torch.float32)
    before = bits(layer)
    layer.merge()
    layer.double()
    layer.unmerge()
    assert equal(bits(layer), [p.double() for p in before])


def test_what_cannot_be_merged_is_refused():
    base = nn.Embedding(7, D_OUT, max_norm=1.0)
    with pytest.raises(ValueError, match="max_norm"):
        layer_class(base)(base, "default", PropulsionConfig()).merge()
    base = nn.Linear(D_IN, D_OUT)
    base.weight = nn.Parameter(torch.ones(D_OUT, D_IN, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised"):
        layer_class(base)(base, "default", PropulsionConfig()).merge()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", BASES)
def test_z_is_float32_over_narrower_layers(kind, dtype):
    layer, x = adapted(kind, degree=15, dtype=dtype), example(kind, dtype)
    z = layer.propulsion_z["default"]
    assert z.dtype == torch.float32
    with torch.no_grad():
        z.fill_(1.001)  # It is 1 in bfloat16, while z^15 is not.
    output = layer(x)
    assert output.dtype == dtype
    # Only the product is rounded; the scale is not rounded before.
    scale = torch.tensor(1.001, dtype=torch.float32) ** 15
    assert torch.equal(output, (layer.base_layer(x).float() * scale).to(dtype))
    assert not torch.equal(output, layer.base_layer(x))
    output.float().sum().backward()
    assert z.grad is not None
    assert z.grad.dtype == torch.float32
    layer.merge(safe_merge=True)
    assert layer.base_layer.weight.dtype == dtype
    # One rounding of the weight against one of the product, and a sum has D_IN such terms.
    precision = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x), output, rtol=precision, atol=precision)


def test_a_float64_model_has_float64_scales():
    assert adapted("linear").propulsion_z["default"].dtype == torch.float64
    later = adapted("linear", dtype=torch.float32).double()
    assert later.propulsion_z["default"].dtype == torch.float64
    assert later(example("linear")).dtype == torch.float64


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("degree", [3, 2.5])
def test_torch_func_agrees_with_autograd(kind, degree):
    layer, x = adapted(kind, degree=degree), example(kind)
    name = "propulsion_z.default"
    z = dict(layer.named_parameters())[name]

    def output(z: Tensor, one: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {name: z}, (one[None],)).sum((0, 1))

    batch = x.mT if kind == "embedding" else x
    jacobian = torch.func.vmap(torch.func.jacrev(output), in_dims=(None, 0))(z, batch)
    for one, rows in zip(batch, jacobian, strict=True):
        expected = [torch.autograd.grad(value, z, retain_graph=True)[0] for value in output(z, one)]
        torch.testing.assert_close(rows, torch.stack(expected), rtol=1e-14, atol=0)


class GemmaLike(nn.Module):
    """Multiplies by 1 + weight, like Gemma's norms."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D_OUT))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class GemmaLikeRMSNorm(GemmaLike):
    pass


class SigmoidRMSNorm(GemmaLike):
    """Multiplies by a sigmoid of its weight."""

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight.sigmoid()


OTHERS = {
    "convolution 1d": (lambda: nn.Conv1d(2, D_OUT, 3), (5, 2, 7)),
    "convolution 1d, no batch": (lambda: nn.Conv1d(2, D_OUT, 3), (2, 7)),
    "convolution 2d": (lambda: nn.Conv2d(2, D_OUT, 3, bias=False), (5, 2, 7, 6)),
    "grouped convolution 2d": (lambda: nn.Conv2d(4, D_OUT, 3, groups=2), (5, 4, 7, 6)),
    "convolution 3d": (lambda: nn.Conv3d(2, D_OUT, 3), (5, 2, 7, 6, 5)),
    "layer norm": (lambda: nn.LayerNorm(D_OUT), (3, 5, D_OUT)),
    "layer norm without bias": (lambda: nn.LayerNorm(D_OUT, bias=False), (3, 5, D_OUT)),
    "rms norm": (lambda: nn.RMSNorm(D_OUT), (3, 5, D_OUT)),
    "norm of one plus w": (GemmaLikeRMSNorm, (3, 5, D_OUT)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OTHERS)
def test_convolutions_and_norms(kind, dtype):
    torch.manual_seed(0)
    make, shape = OTHERS[kind]
    base = make().to(dtype)
    with torch.no_grad():
        for p in base.parameters():
            p += 0.3 * torch.randn_like(p)
    layer = layer_class(base)(base, "default", PropulsionConfig(degree=3, init_noise=0.1))
    x = torch.randn(shape).to(dtype)
    axis = shape.index(D_OUT, 1) if "norm" in kind else len(shape) - (base.weight.ndim - 1)
    z = layer.propulsion_z["default"].detach()
    along = [1] * len(shape)
    along[axis] = -1
    output = layer(x)
    expected = (base(x).double() * z.double().view(along) ** 3).to(dtype)
    precision = torch.finfo(dtype).eps
    torch.testing.assert_close(output, expected, rtol=8 * precision, atol=8 * precision)
    before = bits(layer)
    layer.merge(safe_merge=True)
    size = float(output.abs().max())
    torch.testing.assert_close(layer(x), output, rtol=8 * precision, atol=8 * precision * size)
    layer.unmerge()
    assert equal(bits(layer), before)
    assert torch.equal(layer(x), output)


def test_a_norm_that_uses_its_weight_in_its_own_way_adapts_and_does_not_merge():
    base = SigmoidRMSNorm()
    layer = layer_class(base)(base, "default", PropulsionConfig(degree=2, init_value=1.1))
    x = torch.randn(3, D_OUT)
    output, before = layer(x), bits(layer)
    torch.testing.assert_close(output, base(x) * 1.1**2)
    with pytest.raises(ValueError, match="SigmoidRMSNorm does neither: keep the adapter unmerged"):
        layer.merge()
    assert equal(bits(layer), before)
    assert torch.equal(layer(x), output)


def test_norms_without_a_weight_or_over_several_axes_are_not_adapted():
    assert layer_class(nn.LayerNorm(4, elementwise_affine=False)) is None
    assert layer_class(nn.LayerNorm((3, 4))) is None


class PackedLinear(nn.Module):
    """A quantised layer as backends have it: integers, and a scale for each output."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = D_IN, D_OUT
        self.register_buffer("qweight", torch.randint(-8, 8, (D_IN, D_OUT), dtype=torch.int8))

    def forward(self, x):
        return x @ self.qweight.to(x.dtype) / 8


def test_a_quantised_linear_is_adapted_and_not_merged():
    base = PackedLinear()
    layer = layer_class(base)(base, "default", PropulsionConfig(degree=2, init_value=1.1))
    x = torch.randn(3, D_IN)
    torch.testing.assert_close(layer(x), base(x) * 1.1**2)
    with pytest.raises(ValueError, match="got a quantised PackedLinear"):
        layer.merge()
