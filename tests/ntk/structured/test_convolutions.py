"""Convolutions: kernels by rule are those of autograd and of the reference, whatever the options of the layer."""

import warnings

import peft
import pytest
import torch
from cases import autograd_kernel, randomized, relative_error
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import ntk
from ntk import patches
from ntk.counts import BY_EXAMPLE, BY_REFERENCE, PASSES, by_kind, counting

EXACT = 1e-10
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@pytest.fixture(autouse=True)
def no_parameter_is_slow():
    with warnings.catch_warnings():
        warnings.simplefilter("error", ntk.SlowKernelWarning)
        yield


def compare(model: nn.Module, x: Tensor, x2: Tensor | None = None, *, params="all", together=True, **options) -> None:
    """Compare the kernel with plain autograd, and each parameter's with the reference; rules take all operations."""
    model.eval()
    chosen = (lambda name, p: p.requires_grad) if params == "trainable" else (lambda name, p: True)
    with counting() as counted:
        found = ntk.empirical_ntk(model, x, x2, params=params, method="structured", **options)
    expected = autograd_kernel(model, x, x2, params=chosen)
    # All positions may lie in the border, so that there are no gradients.
    assert float((found - expected).norm()) <= EXACT * float(expected.norm())
    layers = ntk.layer_kernels(model, x, x2, params=params, method="structured", **options)
    for name, kernel in ntk.layer_kernels(model, x, x2, params=params, method="jacobian").items():
        scale = max(float(kernel.norm()), 1e-6 * float(expected.norm()))
        assert float((layers[name] - kernel).norm()) <= EXACT * scale, name
    assert not by_kind(counted)[BY_EXAMPLE]
    assert not by_kind(counted)[BY_REFERENCE]
    if together and "memory_budget" not in options:
        assert by_kind(counted)[PASSES]["batches"] == (1 if x2 is None else 2)


class Read(nn.Module):
    """A layer, and two outputs that depend on all that it returns."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.before = nn.Parameter(torch.tensor(1.3))
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.layer(x * self.before)).flatten(1)
        weights = torch.linspace(0.5, 1.7, y.shape[1], dtype=y.dtype)
        return torch.stack([y @ weights, (y**2) @ weights.flip(0)], dim=1)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@st.composite
def layers(draw, transposed: bool):
    """A layer with any options, and the shape of one of its inputs."""
    torch.manual_seed(0)
    axes = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = [groups * draw(st.integers(1, 3)) for _ in range(2)]
    each = st.lists(st.integers(1, 3), min_size=axes, max_size=axes)
    kernel, stride, dilation = draw(each), draw(each), draw(each)
    size = [draw(st.integers(1, 5 if axes < 3 else 3)) for _ in range(axes)]
    options = {"kernel_size": kernel, "stride": stride, "dilation": dilation, "groups": groups,
               "bias": draw(st.booleans())}  # fmt: skip
    if transposed:
        options["padding"] = [draw(st.integers(0, d * (k - 1))) for k, d in zip(kernel, dilation)]
        options["output_padding"] = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation)]
        made = zip(size, stride, options["padding"], dilation, kernel, options["output_padding"])
        assume(all((n - 1) * s - 2 * p + d * (k - 1) + o + 1 > 0 for n, s, p, d, k, o in made))
    else:
        mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
        if axes == 3 and mode == "reflect":
            mode = "zeros"
        padding = draw(st.sampled_from(["valid", "same", "numbers"]))
        if padding == "same" and stride != [1] * axes:
            padding = "numbers"
        if padding == "numbers":
            padding = [draw(st.integers(0, 2 if mode == "zeros" else n - 1)) for n in size]
        pads = padding if isinstance(padding, list) else [0] * axes
        if padding == "same":
            assume(mode == "zeros" or all(d * (k - 1) < n for n, d, k in zip(size, dilation, kernel)))
        else:
            assume(all(n + 2 * p >= d * (k - 1) + 1 for n, p, d, k in zip(size, pads, dilation, kernel)))
        options |= {"padding": padding if isinstance(padding, str) else tuple(padding), "padding_mode": mode}
    kind = (TRANSPOSED if transposed else CONVOLUTIONS)[axes - 1]
    return kind(*channels, **options), (channels[0], *size)


OFTEN = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@OFTEN
@given(layers(transposed=False))
def test_convolutions(made):
    layer, shape = made
    compare(randomized(Read(layer).double()), numbers(3, *shape), together=False)


@OFTEN
@given(layers(transposed=True))
def test_transposed_convolutions(made):
    layer, shape = made
    compare(randomized(Read(layer).double()), numbers(3, *shape), together=False)


LAYERS = {
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "dilated": lambda: nn.Conv2d(4, 6, (3, 2), dilation=(1, 2)),
    "pointwise": lambda: nn.Conv2d(4, 6, 1),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1),
    "transposed, groups": lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2),
}


@pytest.mark.parametrize("reduce", [None, "trace", "diagonal", "sum"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_contraction_of_every_layout(name, reduce, monkeypatch):
    """Formed features, pairs of positions, few patches at a time, slices of channels, and a second batch."""
    torch.manual_seed(0)
    model = randomized(Read(LAYERS[name]()).double())
    x, x2 = numbers(4, 4, 6, 5), numbers(7, 4, 6, 5)[4:]
    expected = ntk.reduce_outputs(autograd_kernel(model, x, x2), reduce)
    symmetric = ntk.reduce_outputs(autograd_kernel(model, x), reduce)
    for way in ("formed features", "pairs of tokens"):
        monkeypatch.setattr("ntk.structured.contraction.Sizes.way", lambda self, layout, way=way: way)
        for at_once in (1, 300, 1 << 20):
            monkeypatch.setattr(patches, "_AT_ONCE", at_once)
            for budget in (None, 200_000):
                options = {"reduce": reduce, "method": "structured", "memory_budget": budget}
                assert relative_error(ntk.empirical_ntk(model, x, x2, **options), expected) <= EXACT
                assert relative_error(ntk.empirical_ntk(model, x, **options), symmetric) <= EXACT


class Shared(nn.Module):
    """One kernel at two sizes, in a linear layer's place, normalised, added to itself, and on frames of a film."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 3, 2, 2))
        self.vector = nn.Parameter(torch.randn(12))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 2))
        self.transposed = nn.Parameter(torch.randn(3, 3, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        frames = F.conv2d(x.flatten(0, 1), self.kernel, padding=1).unflatten(0, x.shape[:2])
        small = F.conv2d(x.mean(1), self.kernel, stride=2).flatten(1)
        flat = F.linear(x[:, 0, :, :2, :2].flatten(1), self.kernel.flatten(1))
        up = F.conv_transpose2d(x.flatten(0, 1), self.transposed, stride=2).unflatten(0, x.shape[:2])
        other = F.conv2d(x.mean(1), self.transposed.transpose(0, 1)) + self.normed(x.mean(1))
        parts = [frames.flatten(1), small, flat, up.flatten(1), other.flatten(1)]
        y = torch.tanh(torch.cat(parts, dim=1))
        return torch.stack([y.sum(1), (y * torch.linspace(0, 1, y.shape[1], dtype=y.dtype)).sum(1)], dim=1)


def test_kernels_with_several_uses():
    torch.manual_seed(0)
    compare(randomized(Shared().double()), numbers(3, 2, 3, 5, 4))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_norms_of_channels(axes):
    torch.manual_seed(0)
    convolution = CONVOLUTIONS[axes - 1]
    batch_norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1]
    instance_norm = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[axes - 1]
    x = numbers(4, 2, *(5, 4, 3)[:axes])
    norms = [
        batch_norm(4), batch_norm(4, affine=False), nn.GroupNorm(2, 4), instance_norm(4, affine=True),
        instance_norm(4, affine=True, track_running_stats=True), nn.PReLU(), nn.PReLU(4),
    ]  # fmt: skip
    for norm in norms:
        model = randomized(Read(nn.Sequential(convolution(2, 4, 2), norm)).double()).train()
        model(x + 1)  # so that stored statistics are not those of the start
        compare(model, x)


def test_norms_of_vectors():
    torch.manual_seed(0)
    for norm in (nn.BatchNorm1d(6), nn.GroupNorm(2, 6), nn.PReLU(6)):
        model = randomized(Read(nn.Sequential(nn.Linear(3, 6), norm)).double()).train()
        model(numbers(6, 3) + 1)
        compare(model, numbers(5, 3))


COMPANIONS = {
    "max_pool": lambda h: F.max_pool2d(h, 2),
    "avg_pool": lambda h: F.avg_pool2d(h, 3, stride=1, padding=1),
    "adaptive": lambda h: F.adaptive_avg_pool2d(h, 3),
    "global": lambda h: F.adaptive_avg_pool2d(h, 1),
    "adaptive max": lambda h: F.adaptive_max_pool2d(h, 2),
    "lp_pool": lambda h: F.lp_pool2d(h.abs() + 1, 2, 2),
    "unpooled": lambda h: F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), 2),
    "pixel_shuffle": lambda h: F.pixel_shuffle(h, 2),
    "pixel_unshuffle": lambda h: F.pixel_unshuffle(h, 2),
    "channel_shuffle": lambda h: F.channel_shuffle(h, 2),
    "nearest": lambda h: F.interpolate(h, scale_factor=2),
    "nearest-exact": lambda h: F.interpolate(h, scale_factor=2, mode="nearest-exact"),
    "bilinear": lambda h: F.interpolate(h, size=(5, 3), mode="bilinear"),
    "bicubic": lambda h: F.interpolate(h, size=(5, 3), mode="bicubic"),
    "antialias": lambda h: F.interpolate(h, size=(3, 3), mode="bilinear", antialias=True),
    "circular": lambda h: F.pad(h, (1, 1, 2, 0), mode="circular"),
    "reflect": lambda h: F.pad(h, (1, 1, 2, 0), mode="reflect"),
    "unfold": lambda h: F.unfold(h, 2),
    "response norm": lambda h: F.local_response_norm(h, 3),
    "instance norm": lambda h: F.instance_norm(h),
    "channels last": lambda h: h.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", COMPANIONS)
def test_examples_of_convolutional_networks_run_together(name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(COMPANIONS[name](self.conv(x)) * 1).flatten(1)
            return torch.stack([y.sum(1), (y * torch.linspace(0, 1, y.shape[1], dtype=y.dtype)).sum(1)], dim=1)

    torch.manual_seed(0)
    compare(randomized(Net().double()), numbers(4, 2, 4, 4))


class Block(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, norm):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1, bias=False), norm(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), norm(width),
        )  # fmt: skip
        self.skip = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), norm(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def resnet(norm) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1, bias=False), norm(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1), Block(4, 4, 1, norm),
        Block(4, 8, 2, norm), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.inner = nn.Conv2d(2, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)
        self.up, self.norm = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.GroupNorm(2, 8)
        self.last, self.out = nn.ConvTranspose2d(8, 2, 4, 2, 1), nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.down(x))
        second = self.up(torch.relu(self.inner(first)))
        third = self.last(F.silu(self.norm(torch.cat([first, second], dim=1))))
        return self.out(torch.cat([third, x], dim=1)).flatten(2).mean(1)[:, ::13]


class ConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.mixing = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.wide, self.narrow = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale, self.out = nn.Parameter(torch.ones(8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.norm(self.mixing(x).permute(0, 2, 3, 1))
        h = self.scale * self.narrow(F.gelu(self.wide(h)))
        return self.out((x + h.permute(0, 3, 1, 2)).mean((2, 3)))


class TCN(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(3 if i == 0 else 6, 6, 2, dilation=2**i) for i in range(3))
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            h = torch.relu(layer(F.pad(x, (2**i, 0))))
            x = h if i == 0 else x + h
        return self.out(x[:, :, -1])


def volume() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 3, 2, stride=2), nn.BatchNorm3d(3), nn.ReLU(), nn.Conv3d(3, 4, 2, padding=1), nn.AvgPool3d(2),
        nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


NETWORKS = {
    "resnet, group norm": (lambda: resnet(lambda width: nn.GroupNorm(2, width)), (3, 16, 16)),
    "resnet, batch norm": (lambda: resnet(nn.BatchNorm2d), (3, 16, 16)),
    "unet": (UNet, (2, 8, 8)),
    "convnext": (ConvNeXt, (3, 8, 8)),
    "tcn": (TCN, (3, 9)),
    "conv3d": (volume, (1, 4, 4, 4)),
}


def network(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model, x = randomized(make().double()), numbers(5, *shape)
    model.train()(x + 1)
    return model.eval(), x


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    model, x = network(name)
    compare(model, x)
    compare(model, x, numbers(8, *x.shape[1:])[5:])


@pytest.mark.parametrize("name", NETWORKS)
def test_little_memory(name):
    """In segments of the model and tiles of the examples the kernel is the same."""
    model, x = network(name)
    expected = autograd_kernel(model, x)
    for budget in (1e5, 3e5):
        try:
            with counting() as counted:
                found = ntk.empirical_ntk(model, x, method="structured", memory_budget=budget)
        except MemoryError:
            assert budget == 1e5
            continue
        assert relative_error(found, expected) <= EXACT
        assert not by_kind(counted)[BY_REFERENCE]


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
@pytest.mark.parametrize("name", ["resnet, group norm", "unet", "conv3d"])
def test_models_adapted_by_peft(name, options):
    model, x = network(name)
    names = [n for n, m in model.named_modules() if isinstance(m, CONVOLUTIONS)]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names, **options)).double()
    compare(randomized(adapted), x, params="trainable")


def test_methods_on_convolutional_networks():
    model, x = network("convnext")
    methods = {
        "full": ntk.adapters.Full(), "bias": ntk.adapters.BitFit(), "norms": ntk.adapters.NormTuning(),
        "lora": ntk.adapters.LoRA(rank=2, modules=["wide", "narrow"]), "propulsion": ntk.adapters.Propulsion(),
    }  # fmt: skip
    found, slow = (ntk.adapter_kernels(model, x, methods, method=method) for method in ("auto", "jacobian"))
    for key in methods:
        assert relative_error(found[key], slow[key]) <= EXACT, key
    assert relative_error(found["full"], autograd_kernel(model, x)) <= EXACT
    with pytest.raises(ValueError, match="'lora' names mixing, a Conv2d: adapters are on linear layers"):
        ntk.adapter_kernels(model, x, {"lora": ntk.adapters.LoRA(rank=2, modules=["mixing", "wide"])})


def test_what_is_explained_is_what_runs():
    model, x = network("unet")
    rows = {row.name: row for row in ntk.explain(model, x).rows}
    assert {row.way for row in rows.values()} == {"rule"}
    assert rows["up.weight"].operations == {"torch.nn.functional.conv_transpose2d": 1}


UNSUITABLE = {
    "batch statistics": lambda: nn.Sequential(nn.Conv1d(2, 4, 2), nn.BatchNorm1d(4, track_running_stats=False)),
    "no batch axis": lambda: Unbatched(),
    "kernel from data": lambda: Dynamic(),
}


class Unbatched(nn.Module):
    """Each example by itself, without an axis of examples."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv1d(2, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.layer(row) for row in x])


class Dynamic(nn.Module):
    """Data as the kernel, and a parameter as the input."""

    def __init__(self):
        super().__init__()
        self.image = nn.Parameter(torch.randn(1, 2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.conv1d(self.image, row[None, :, :3]) for row in x])


@pytest.mark.parametrize("name", UNSUITABLE)
def test_other_forms_are_exact_without_the_rule(name):
    torch.manual_seed(0)
    model, x = randomized(Read(UNSUITABLE[name]()).double()).eval(), numbers(4, 2, 5)
    with pytest.warns(ntk.SlowKernelWarning):
        found = ntk.empirical_ntk(model, x)
    assert relative_error(found, autograd_kernel(model, x)) <= EXACT


BLANK = {
    "filled by position": lambda h: _filled(h, [1.0, 2.0, 3.0, 4.0]),
    "filled by rows": lambda h: _rows_filled(h),
}


def _filled(h: Tensor, values: list[float]) -> Tensor:
    found = h.new_empty(len(h), 2, h.shape[1])
    for i in range(len(h)):
        found[i, 0] = values[i % 4]
    found[:, 1] = h
    return found.prod(1)


def _rows_filled(h: Tensor) -> Tensor:
    found = torch.empty_like(torch.cat([h, h], 1))
    found[:2, 4:], found[2:, 4:] = 1.0, 3.0
    found[:, :4] = h
    return found[:, :4] * found[:, 4:]


@pytest.mark.parametrize("name", BLANK)
def test_reserved_memory_that_was_filled_by_position_is_noticed(name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(BLANK[name](self.first(x))))

    torch.manual_seed(0)
    model, x = randomized(Net().double()), numbers(6, 3)
    found = ntk.empirical_ntk(model, x)
    assert relative_error(found, autograd_kernel(model, x)) <= EXACT
