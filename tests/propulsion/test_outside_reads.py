"""Models that read a layer's weight, or its other attributes, without calling the adapted layer."""

import copy
import pickle

import pytest
import torch
import transformers as hf
from architectures import build, inputs, randomize, scales
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from propulsion import PropulsionConfig
from propulsion.layers import layer_class

WIDTH = 8
X = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IDS = torch.randint(3, 30, (3, 6), generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class ByHand(nn.Module):
    """Reads weights of every kind of layer, and also calls some of the layers."""

    def __init__(self):
        super().__init__()
        self.line, self.turned = nn.Linear(WIDTH, WIDTH), Conv1D(WIDTH, WIDTH)
        self.table, self.norm = nn.Embedding(9, WIDTH), nn.LayerNorm(WIDTH)
        self.kernel = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.gemma = hf.models.gemma.modeling_gemma.GemmaRMSNorm(WIDTH)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.line.weight.T + self.line.bias + x @ self.turned.weight + self.turned.bias
        x = self.kernel(x.mT).mT + self.kernel.weight[:, 0, 0] + self.normed(x) * (1 + self.gemma.weight)
        x = F.layer_norm(x, self.norm.normalized_shape, self.norm.weight, self.norm.bias, self.norm.eps)
        return F.linear(x.tanh() + self.table.weight[:5], self.table.weight)


class Projection(nn.Linear):
    """A layer with methods other than forward."""

    @property
    def lengths(self) -> Tensor:
        return self.weight.norm(dim=1)

    def back(self, y: Tensor) -> Tensor:
        return y @ self.weight


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.there = Projection(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.there.back(self.there(x).tanh()) / self.there.lengths


def encoder(**options) -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 12, 0.0, batch_first=True, **options), 2)


def mamba() -> nn.Module:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "vocab_size": 30, "pad_token_id": 0}
    return hf.MambaForCausalLM(hf.MambaConfig(**sizes, state_size=4, time_step_rank=3))


def jamba() -> nn.Module:
    return hf.JambaForCausalLM(hf.JambaConfig(
        hidden_size=WIDTH, num_hidden_layers=2, vocab_size=30, pad_token_id=0, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=12, mamba_dt_rank=3, mamba_d_state=4, num_experts=1,
        num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1,
    ))  # fmt: skip


def clip() -> nn.Module:
    return hf.CLIPVisionModel(hf.CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    ))  # fmt: skip


def siglip() -> nn.Module:
    return hf.SiglipVisionModel(hf.SiglipVisionConfig(
        hidden_size=WIDTH, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    ))  # fmt: skip


def whisper() -> nn.Module:
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder")
             for what, n in {"layers": 1, "attention_heads": 2, "ffn_dim": 12}.items()}  # fmt: skip
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(
        vocab_size=30, d_model=WIDTH, **sides, num_mel_bins=4, max_source_positions=6, max_target_positions=10,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, dropout=0.0,
    ))  # fmt: skip


def language(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def vision(model: nn.Module) -> Tensor:
    return model(pixel_values=torch.linspace(-1, 1, 2 * 3 * 64, dtype=torch.float64).reshape(2, 3, 8, 8)).pooler_output


NORMS = {"positions": ["all", "norm"]}
# A constructor, a call, and the modules to adapt.
CASES = {
    "encoder": (encoder, lambda model: model(X), {}),
    "encoder, padded": (encoder, lambda model: model(X, src_key_padding_mask=PADDED)[~PADDED], NORMS),
    "encoder, norm first": (lambda: encoder(norm_first=True, activation="gelu"), lambda model: model(X), NORMS),
    "decoder layer": (
        lambda: nn.TransformerDecoderLayer(WIDTH, 2, 12, 0.0, batch_first=True),
        lambda model: model(X, X.flip(1)),
        NORMS,
    ),
    "norms alone": (
        lambda: nn.TransformerEncoderLayer(WIDTH, 2, 12, 0.0, batch_first=True),
        lambda model: model(X),
        {"positions": "norm"},
    ),
    "attention": (Attention, lambda model: model(X), {}),
    "by hand": (
        ByHand,
        lambda model: model(X),
        {"target_modules": ["line", "turned", "table", "norm", "kernel", "gemma"]},
    ),
    "methods": (Tied, lambda model: model(X), {}),
    "mamba": (mamba, language, NORMS),
    "mamba's convolution": (mamba, language, {"target_modules": ["conv1d", "dt_proj"]}),
    "jamba": (jamba, language, {}),
    "whisper": (
        whisper,
        lambda model: model(input_features=X[:, :4].repeat(1, 1, 2)[..., :12], decoder_input_ids=IDS).logits,
        {},
    ),
    "clip": (clip, vision, {}),
    "siglip": (siglip, vision, {}),
    "deberta": (lambda: build("deberta"), lambda model: model(**inputs("deberta")).logits, NORMS),
    "deberta-v2": (lambda: build("deberta-v2"), lambda model: model(**inputs("deberta-v2")).logits, NORMS),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_adapted_model_is_the_merged_one_and_every_scale_gets_a_gradient(name, training):
    make, call, fields = CASES[name]
    torch.manual_seed(0)
    base = make().double()
    with torch.no_grad():
        for p in base.parameters():
            p += 0.3 * torch.randn_like(p)
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = call(base.eval()).detach()
    model = randomize(get_peft_model(base, PropulsionConfig(degree=3, **fields)), spread=0.2).train(training)
    output = call(model)
    output.square().sum().backward()
    assert not [name for name, z in scales(model).items() if z.grad is None or not z.grad.any()]
    precision = 1e-11 * float(output.abs().max())
    with torch.no_grad():
        torch.testing.assert_close(call(model), output, rtol=0, atol=precision)
        assert (output - plain).abs().max() > 1e6 * precision
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(call(model), output, rtol=0, atol=precision)
        model.unmerge_adapter()
        with model.disable_adapter():
            torch.testing.assert_close(call(model.eval()), plain, rtol=0, atol=precision)
        merged = model.merge_and_unload().train(training)
        torch.testing.assert_close(call(merged), output, rtol=0, atol=precision)


def test_where_the_fused_path_zeroes_padding_the_adapted_model_does_too():
    model = randomize(get_peft_model(encoder().double().eval(), PropulsionConfig(degree=3)), spread=0.2)
    with torch.no_grad():
        output = model(X, src_key_padding_mask=PADDED)
    assert not output[PADDED].any()
    assert output[~PADDED].any()


def test_reads_follow_the_active_adapters():
    model = get_peft_model(Attention().double().eval(), PropulsionConfig(degree=3))
    model.add_adapter("second", PropulsionConfig(degree=2))
    randomize(model, spread=0.2).eval()
    attention = model.get_base_model().attention
    by_name = {}
    for name, degree in (("default", 3), ("second", 2)):
        model.set_adapter(name)
        layer = attention.out_proj
        expected = layer.base_layer.weight * (layer.propulsion_z[name] ** degree)[:, None]
        torch.testing.assert_close(layer.weight, expected, rtol=1e-14, atol=0)
        by_name[name] = model(X)
    with model.disable_adapter():
        assert attention.out_proj.weight is attention.out_proj.base_layer.weight
    for name, expected in by_name.items():
        torch.testing.assert_close(model(X, adapter_names=[name] * len(X)), expected, rtol=1e-12, atol=1e-14)


def test_a_batch_that_mixes_adapters_is_refused_where_a_weight_is_read():
    model = get_peft_model(Attention().double(), PropulsionConfig(degree=3)).eval()
    with pytest.raises(ValueError, match=r"reads the weight of 'attention.out_proj' and does not call it"):
        model(X, adapter_names=["default", "__base__", "default"])
    model(X)  # Nothing of the adapter remains.


def test_dtypes_and_gradients_of_what_is_read():
    layer = layer_class(nn.Linear(4, 3))(nn.Linear(4, 3).bfloat16(), "default", PropulsionConfig(degree=15))
    with torch.no_grad():
        layer.propulsion_z["default"].fill_(1.001)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    scale = torch.tensor(1.001) ** 15
    assert torch.equal(layer.weight, (layer.base_layer.weight.float() * scale).bfloat16())
    assert layer.weight.requires_grad


ATTRIBUTES = [
    (nn.LayerNorm(4), {"eps": 1e-5, "normalized_shape": (4,), "elementwise_affine": True}),
    (nn.RMSNorm(4), {"normalized_shape": (4,)}),
    (nn.Embedding(5, 4, padding_idx=1), {"num_embeddings": 5, "embedding_dim": 4, "padding_idx": 1}),
    (nn.Linear(5, 4), {"in_features": 5, "out_features": 4}),
    (Conv1D(4, 5), {"nf": 4, "nx": 5}),
    (
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        {"in_channels": 2, "out_channels": 4, "kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1), "groups": 1},
    ),
]


@pytest.mark.parametrize(("base", "attributes"), ATTRIBUTES, ids=lambda value: type(value).__name__)
def test_adapted_layers_answer_for_what_they_adapt(base, attributes):
    layer = layer_class(base)(base, "default", PropulsionConfig())
    for twin in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        for name, value in attributes.items():
            assert getattr(twin, name) == value
        with pytest.raises(AttributeError, match="no_such_thing"):
            _ = twin.no_such_thing
        assert not hasattr(twin, "_hf_hook")
    base._hf_hook = "a mark of accelerate's"
    assert not hasattr(layer, "_hf_hook")
    if not hasattr(base, "bias"):
        assert not hasattr(layer, "bias")


def test_what_is_set_on_an_adapted_layer_reaches_what_it_adapts():
    base = nn.LayerNorm(4)
    layer = layer_class(base)(base, "default", PropulsionConfig())
    layer.eps = 0.5
    layer.own = 3
    assert base.eps == 0.5
    assert layer.own == 3
    assert not hasattr(base, "own")


def test_a_norm_of_another_kind_is_not_read():
    class SigmoidRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return F.normalize(x, dim=-1) * self.weight.sigmoid()

    base = SigmoidRMSNorm()
    layer = layer_class(base)(base, "default", PropulsionConfig())
    with pytest.raises(ValueError, match="to be read; SigmoidRMSNorm does neither"):
        _ = layer.weight


class Normed(nn.Module):
    """Calls a layer whose weight is computed from other parameters, and also reads that weight."""

    def __init__(self, norm):
        super().__init__()
        self.line = norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.line(x).tanh(), self.line.weight)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_a_weight_that_is_computed_is_read_scaled_and_not_merged(norm):
    model = randomize(get_peft_model(Normed(norm).double().eval(), PropulsionConfig(degree=3)), spread=0.2)
    line = model.get_base_model().line
    scale = line.propulsion_z["default"] ** 3
    output = model(X)
    expected = F.linear((line.base_layer(X) * scale).tanh(), line.base_layer.weight * scale[:, None])
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-14)
    output.sum().backward()
    assert line.propulsion_z["default"].grad.all()
    with pytest.raises(ValueError, match="computed from other"):
        model.merge_adapter()
