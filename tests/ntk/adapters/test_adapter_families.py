"""Kernels of methods on every family, compared with autograd through peft's models."""

import copy
import math
import warnings

import peft
import pytest
import torch
import transformers as hf
from cases import FAMILIES, MAMBA, PAD, VOCABULARY, Mamba, batch_for, each_alone, randomized, relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from transformers.pytorch_utils import Conv1D

import ntk
from ntk import adapters
from propulsion import PropulsionConfig
from propulsion.layer import PropulsionLayer

EXACT = 1e-10
_SIZES = {
    "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20,
    "vocab_size": VOCABULARY, "pad_token_id": PAD, "num_labels": 3,
}  # fmt: skip
_BERT = _SIZES | {"max_position_embeddings": 82}
_IMAGES = {
    "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20, "image_size": 8,
    "patch_size": 4, "num_labels": 3,
}  # fmt: skip

# Families beside those of `cases`, which use a layer's weight otherwise than by calling the layer on the examples'
# tokens: read it, add its rows in place, share them between examples, compute with what it makes of no example.
TEXT = FAMILIES | {
    "jamba": lambda: hf.JambaConfig(
        **MAMBA, num_attention_heads=2, num_key_value_heads=1, intermediate_size=20, mamba_dt_rank=3, mamba_d_state=4,
        num_experts=2, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1,
    ),
    "mpnet": lambda: hf.MPNetConfig(**_BERT),
    "big_bird": lambda: hf.BigBirdConfig(**_BERT, attention_type="original_full"),
    "megatron-bert": lambda: hf.MegatronBertConfig(**_BERT),
    "rembert": lambda: hf.RemBertConfig(**_BERT, input_embedding_size=8, output_embedding_size=8),
    "fnet": lambda: hf.FNetConfig(**{key: size for key, size in _BERT.items() if key != "num_attention_heads"}),
    "yoso": lambda: hf.YosoConfig(**_BERT),
    "nystromformer": lambda: hf.NystromformerConfig(**_BERT, num_landmarks=4, segment_means_seq_len=4),
    "xlm": lambda: hf.XLMConfig(
        emb_dim=12, n_layers=2, n_heads=2, vocab_size=VOCABULARY, pad_index=PAD, pad_token_id=PAD, num_labels=3,
        max_position_embeddings=82, summary_type="first",
    ),
    "deberta": lambda: hf.DebertaConfig(
        **_BERT, relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=8
    ),
    "modernbert": lambda: hf.ModernBertConfig(
        **_BERT, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3, global_attn_every_n_layers=2,
        local_attention=4,
    ),
}  # fmt: skip


class Marked(nn.Module):
    """A classifier with SigLIP's attention pooling, which uses the readout of torch's own attention."""

    def __init__(self):
        super().__init__()
        config = hf.SiglipVisionConfig(**{key: size for key, size in _IMAGES.items() if key != "num_labels"})
        self.body, self.out = hf.SiglipVisionModel(config), nn.Linear(12, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.out(self.body(pixel_values).pooler_output)


VISION = {
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**_IMAGES)),
    "deit": lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**_IMAGES)),
    "beit": lambda: hf.BeitForImageClassification(hf.BeitConfig(**_IMAGES)),
    "siglip": Marked,
    "swin": lambda: hf.SwinForImageClassification(
        hf.SwinConfig(image_size=8, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2,
                      num_labels=3)
    ),
}  # fmt: skip


def text_model(family: str) -> nn.Module:
    torch.manual_seed(0)
    options = {"experts_implementation": "eager"} if family in ("mixtral", "jamba") else {}
    model = hf.AutoModelForSequenceClassification.from_config(TEXT[family](), attn_implementation="eager", **options)
    return randomized(model.double())


def oracle(model: nn.Module, inputs: dict[str, Tensor] | Tensor, chosen: list[nn.Parameter]) -> Tensor:
    """The kernel of the chosen parameters by plain autograd."""
    model.eval()
    rows = []
    for one in each_alone(inputs):
        result = model(one) if isinstance(one, Tensor) else model(**one)
        for value in getattr(result, "logits", result)[0]:
            found = torch.autograd.grad(value, chosen, retain_graph=True, allow_unused=True, materialize_grads=True)
            rows.append(torch.cat([g.flatten() for g in found]))
    features = torch.stack(rows).unflatten(0, (-1, 3))
    return torch.einsum("iap,jbp->ijab", features, features)


def compare(model: nn.Module, inputs: dict[str, Tensor] | Tensor, precision: float = EXACT) -> None:
    """Compare full, BitFit, Propulsion, LoRA and (IA)3 on every layer, computed by one call, with peft's models."""
    layers = adapters.layers_of(model)
    linear = [name for name, layer in layers.items() if not isinstance(layer, nn.Embedding)]
    everywhere = [name for name in layers if name not in ("shared", "transformer.shared", "model.shared")]
    expected, methods = {}, {"full": adapters.Full()}
    expected["full"] = oracle(model, inputs, list(model.parameters()))
    if biases := [p for name, p in model.named_parameters() if name.endswith("bias")]:
        methods["bitfit"], expected["bitfit"] = adapters.BitFit(), oracle(model, inputs, biases)
    configs = {
        "propulsion": PropulsionConfig(degree=3, target_modules=everywhere),
        "lora": peft.LoraConfig(r=2, target_modules=linear),
        "ia3": peft.IA3Config(target_modules=linear, feedforward_modules=linear[::2]),
    }
    methods |= {"propulsion": adapters.Propulsion(3), "ia3": adapters.IA3(linear, linear[::2])}
    for key, config in configs.items():
        adapted = peft.get_peft_model(copy.deepcopy(model), config).double()
        expected[key] = oracle(adapted, inputs, [p for p in adapted.parameters() if p.requires_grad])
        if key == "lora":
            modules = {name.removeprefix("base_model.model."): m for name, m in adapted.named_modules()}
            a = {name: modules[name].lora_A["default"].weight.detach() for name in linear}
            methods["lora"] = adapters.LoRA(rank=2, alpha=8, modules=list(a).__contains__, a=a)
    found = ntk.adapter_kernels(model, inputs, methods)
    for key, kernel in expected.items():
        assert relative_error(found[key], kernel) <= precision, key


class Scaled(nn.Linear):
    """A layer of a class that peft does not know."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x.tanh())


class Odd(nn.Module):
    """Uses the weights of its layers in every way other than by one plain call of the layer."""

    def __init__(self):
        super().__init__()
        self.read, self.called, self.scaled = nn.Linear(6, 6), nn.Linear(6, 6), Scaled(6, 6)
        self.twin, self.other_twin, self.turned = nn.Linear(6, 6), nn.Linear(6, 6), Conv1D(6, 6)
        self.other_twin.weight = self.twin.weight
        self.places, self.fixed = nn.Embedding(9, 6), nn.Linear(6, 6)
        self.register_buffer("angles", torch.linspace(0, 1, 18, dtype=torch.float64).reshape(3, 6))
        self.block = nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.read.weight.T + self.read.bias + (self.called.weight @ x.mT).mT + self.called(x)
        x = self.scaled(x) + self.other_twin(self.twin(x))
        x += self.places(torch.arange(3))
        x *= self.fixed(self.angles)
        x = self.turned(x).relu_() @ self.turned.weight
        x = self.block(x) + self.attention(x, x, x)[0]
        return self.out(x.mean(dim=1))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = weight_norm(nn.Linear(6, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).tanh().mean(dim=1))


def odd(kind: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return randomized(kind().double()), torch.randn(4, 3, 6, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:the model reads the weight")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("family", TEXT)
def test_text(family):
    # Gemma 3 normalises in float32, whatever the model's precision.
    compare(text_model(family), batch_for(family, (5, 3)), 1e-6 if family == "gemma3" else EXACT)


@pytest.mark.filterwarnings("ignore:the model reads the weight")
@pytest.mark.parametrize("family", VISION)
def test_vision(family):
    torch.manual_seed(0)
    model = randomized(VISION[family]().double())
    compare(model, {"pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.float64)})


@pytest.mark.filterwarnings("ignore:the model reads the weight")
@pytest.mark.parametrize("kind", [Odd, Mamba])
def test_weights_that_are_read_shared_and_changed(kind):
    model, x = odd(kind)
    compare(model, x if kind is Odd else batch_for("bert", (5, 5))["input_ids"])


METHODS = {
    "propulsion": adapters.Propulsion(3),
    "lora": adapters.LoRA(rank=2),
    "mean": adapters.LoRA(rank=2, a="expected"),
    "dora": adapters.DoRA(rank=2),
    "loha": adapters.LoHa(rank=2),
    "inputs": adapters.IA3([], feedforward=None),
}


@pytest.mark.filterwarnings("ignore:the model reads the weight")
@pytest.mark.parametrize("kind", [Odd, Normed])
@pytest.mark.parametrize("reduce", [None, "trace", "diagonal", "sum"])
def test_the_fast_way_is_the_reference_in_every_layout(kind, reduce):
    model, x = odd(kind)
    other = x[:2].flip(2)
    fast = ntk.adapter_kernels(model, x, METHODS, other, reduce=reduce)
    for key, kernel in ntk.adapter_kernels(model, x, METHODS, other, reduce=reduce, method="jacobian").items():
        assert relative_error(fast[key], kernel) <= EXACT, key


def test_a_layer_whose_weight_is_computed_takes_lora():
    """LoRA adapts all linear layers, including the one under weight_norm, with the same matrices as peft."""
    model, x = odd(Normed)
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["one", "two"])).double()
    expected = oracle(adapted, x, [p for p in adapted.parameters() if p.requires_grad])
    modules = {name.removeprefix("base_model.model."): m for name, m in adapted.named_modules()}
    a = {name: modules[name].lora_A["default"].weight.detach() for name in ("one", "two")}
    assert relative_error(ntk.adapter_kernels(model, x, {"it": adapters.LoRA(2, 8, a=a)})["it"], expected) <= EXACT


class Sometimes(nn.Module):
    """Calls a layer for some examples and reads its weight for others."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.one.weight, self.one.bias) if bool((x.abs() > 9).any()) else self.one(x)
        return self.two(hidden.tanh().mean(dim=1))


@pytest.mark.filterwarnings("ignore:the model reads the weight")
@pytest.mark.parametrize("large", [0, 3])
def test_layers_that_only_some_examples_call(large):
    model, x = odd(Sometimes)
    x[large, 0, 0] = 10.0
    compare(model, x)


class BiasRead(nn.Module):
    """Calls layers and also reads biases: a whole one, a part of one, that of a norm, or one for some examples only."""

    def __init__(self):
        super().__init__()
        self.one, self.part, self.some = (nn.Linear(6, 6) for _ in range(3))
        self.norm, self.out = nn.LayerNorm(6), nn.Linear(6, 3)
        self.limit = math.inf

    def forward(self, x: Tensor) -> Tensor:
        x = (self.one(x) + 2 * self.one.bias).tanh()
        x = self.part(x) * self.part.bias[:1] + self.norm(x) * self.norm.bias
        x = self.some(x) + self.some.bias if bool((x.abs() > self.limit).any()) else self.some(x)
        return self.out(x.tanh().mean(dim=1))


@pytest.mark.parametrize("reader", range(4))
@pytest.mark.parametrize("places", [["one", "part", "some", "out"], ["some"], ["one"], ["out"]])
def test_biases_that_are_read_outside_the_call_are_scaled(places, reader):
    """Only the examples from `reader` on read the bias of `some`, while the check looks at the first example."""
    model, x = odd(BiasRead)
    with torch.no_grad():
        hidden = (model.one(x) + 2 * model.one.bias).tanh()
        sizes = (model.part(hidden) * model.part.bias[:1] + model.norm(hidden) * model.norm.bias).abs().amax(dim=(1, 2))
    x = x[sizes.argsort()]
    model.limit = float(sizes.sort().values[:reader].max()) if reader else 0.0
    adapted = peft.get_peft_model(copy.deepcopy(model), PropulsionConfig(degree=3, target_modules=places)).double()
    expected = oracle(adapted, x, [p for p in adapted.parameters() if p.requires_grad])
    for method in ("auto", "jacobian"):
        found = ntk.adapter_kernels(model, x, {"it": adapters.Propulsion(3, modules=places)}, method=method)["it"]
        assert relative_error(found, expected) <= EXACT


def test_a_named_module_that_takes_no_adapter_is_refused():
    model, x = odd(BiasRead)
    with pytest.raises(ValueError, match="'it' names norm, a LayerNorm"):
        ntk.adapter_kernels(model, x, {"it": adapters.Propulsion(3, modules=["norm", "out"])})


class Frozen(nn.Module):
    """A layer that runs without gradients, and an embedding with a table computed without them, as in RoFormer."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.places = hf.models.roformer.modeling_roformer.RoFormerSinusoidalPositionalEmbedding(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.one(x)
        return self.out((self.two(x) + self.places(x.shape[:2])).tanh().mean(dim=1))


@pytest.mark.filterwarnings("ignore:the model reads the weight")
def test_layers_without_gradients():
    model, x = odd(Frozen)
    methods = {"propulsion": adapters.Propulsion(3), "lora": adapters.LoRA(rank=2)}
    adapted = peft.get_peft_model(copy.deepcopy(model), PropulsionConfig(degree=3)).double()
    expected = oracle(adapted, x, [p for p in adapted.parameters() if p.requires_grad])
    for method in ("auto", "jacobian"):
        found = ntk.adapter_kernels(model, x, methods, method=method)
        assert relative_error(found["propulsion"], expected) <= EXACT


class TestWhatIsSaid:
    def test_methods_that_do_not_act_where_a_weight_is_read(self):
        model, x = odd(Odd)
        with pytest.warns(UserWarning, match=r"reads the weight of read .* an adapter of lora acts on calls alone"):
            ntk.adapter_kernels(model, x, {"lora": adapters.LoRA(modules=["read", "out"])})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ntk.adapter_kernels(model, x, {"lora": adapters.LoRA(modules=["out"]), "all": adapters.Propulsion()})

    def test_single_weights_of_a_layer_of_its_own_class(self):
        model, x = odd(Odd)
        ntk.adapter_kernels(model, x, {"it": adapters.RandomSubset(3, modules=["fixed", "twin", "out"])})
        for name in ("scaled", "read"):
            with pytest.raises(NotImplementedError, match=rf"{name} does more .*: leave it out of modules"):
                ntk.adapter_kernels(model, x, {"it": adapters.RandomSubset(3, modules=[name])})

    def test_a_layer_without_tokens_stops_only_the_methods_that_need_it(self):
        class Pair(nn.Linear):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                return super().forward(x), x

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.pair, self.out = Pair(6, 6), nn.Linear(6, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.out(self.pair(x)[0].tanh().mean(dim=1))

        model, x = odd(Model)
        with pytest.raises(NotImplementedError, match=r"pair returns tuple .*: leave it out of the method's modules"):
            ntk.adapter_kernels(model, x, {"it": adapters.Propulsion()})
        ntk.adapter_kernels(model, x, {"it": adapters.Propulsion(modules=["out"]), "full": adapters.Full()})

    def test_a_method_at_a_layer_that_the_model_never_uses(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.idle, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.out(x.mean(dim=1))

        model, x = odd(Model)
        with pytest.raises(ValueError, match=r"'it' .* trains nothing in this model that its output depends on"):
            ntk.adapter_kernels(model, x, {"it": adapters.Propulsion(modules=["idle"])})

    def test_nothing_of_the_model_is_changed(self):
        model, x = odd(Odd)
        before = {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ntk.adapter_kernels(model, x, METHODS, method="jacobian")
        with pytest.raises(ValueError, match="floating-point"):
            ntk.adapter_kernels(model, x, METHODS, method="jacobian", output=lambda y, _: y.long())
        assert {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()} == before
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "albert", "opt"])
def test_plain_layers_take_the_fast_way(family, caplog):
    caplog.set_level("INFO", logger="ntk")
    methods = {"propulsion": adapters.Propulsion(), "lora": adapters.LoRA(rank=2)}
    ntk.adapter_kernels(text_model(family), batch_for(family, (5, 3)), methods)
    slow = [message for message in caplog.messages if message.startswith("layers by their calls")]
    # T5 shares its bias by position between examples.
    assert all("relative_attention_bias" in message and message.count("(") == 2 for message in slow)
    assert bool(slow) == (family == "t5")


@pytest.mark.parametrize("family", TEXT)
def test_the_same_words_mean_the_layers_that_training_adapts(family):
    """Propulsion's kernel on all layers covers the layers that training adapts, which are those that the model uses."""
    model = text_model(family)
    trained = peft.get_peft_model(copy.deepcopy(model), PropulsionConfig(task_type="SEQ_CLS"))
    bare = trained.get_base_model().named_modules()
    scaled = {name for name, module in bare if isinstance(module, PropulsionLayer)}
    layers = set(adapters.layers_of(model))
    assert scaled <= layers
    for idle in layers - scaled:
        with pytest.raises(ValueError, match="trains nothing in this model that its output depends on"):
            ntk.adapter_kernels(model, batch_for(family, (4,)), {"it": adapters.Propulsion(modules=idle)})
