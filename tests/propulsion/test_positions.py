"""The modules at each position: the paper's counts, every architecture, and no scale without effect."""

import pytest
import torch
from architectures import FAMILIES, build, inputs, logits, randomize, scales
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)  # fmt: skip

from propulsion import PropulsionConfig
from propulsion.positions import POSITIONS, resolve


@pytest.fixture(scope="module")
def roberta_base() -> RobertaForSequenceClassification:
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2)
    with torch.device("meta"):
        return RobertaForSequenceClassification(config)


# Counted from the architecture: d = 768, feed-forward 3072, 12 layers, 2 labels.
@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"positions": "all"}, 3 * 768 + 12 * (5 * 768 + 3072) + 768 + 2),
        ({"positions": "all", "modules_to_save": ["classifier"]}, 3 * 768 + 12 * (5 * 768 + 3072)),
        ({"positions": "attn"}, 12 * 3 * 768),
        ({"positions": ["query", "value"]}, 12 * 2 * 768),
        ({"positions": "attention_output"}, 12 * 768),
        ({"positions": "mlp"}, 12 * (3072 + 768)),
        ({"positions": "embedding"}, 3 * 768),
        ({"positions": "attn", "layers_to_transform": [0, 11]}, 2 * 3 * 768),
        ({"positions": "all", "layers_to_transform": 3, "layers_pattern": "layer"}, 5 * 768 + 3072),
        ({"positions": "all", "exclude_modules": ["word_embeddings", "out_proj"]}, 86_018 - 768 - 2),
    ],
    ids=str,
)
def test_roberta_base_has_the_papers_counts(roberta_base, fields, count):
    model = get_peft_model(roberta_base, PropulsionConfig(**fields))
    assert sum(z.numel() for z in scales(model).values()) == count
    model.unload()


def test_the_two_headline_variants_are_those_of_the_paper(roberta_base):
    for positions, count in {"all": 86_018, "attn": 27_648}.items():
        model = get_peft_model(roberta_base, PropulsionConfig(positions=positions))
        assert model.get_nb_trainable_parameters()[0] == count
        model.unload()


# Families that no table of ours names: modules at (attn, attention_output, mlp), counted from their published sizes.
@pytest.mark.parametrize(
    ("family", "counts"),
    {
        "longformer": (36, 12, 24),
        "swin": (36, 12, 24),  # Neither the reductions between its stages
        "codegen": (28, 28, 56),
        "whisper": (36, 12, 16),
        "led": (108, 36, 48),
        "phimoe": (96, 32, 0),  # nor the routers of experts are feed-forward layers,
        "jamba": (12, 4, 48),  # nor is Mamba's in_proj attention.
        "gpt_oss": (108, 36, 0),
    }.items(),
    ids=str,
)
def test_layers_of_attention_are_found_without_a_table(family, counts):
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(family))
    for position, count in zip(("attn", "attention_output", "mlp"), counts, strict=True):
        if count:
            assert len(resolve(model, position)) == count, position
        else:
            with pytest.raises(ValueError, match="no linear layers but those of attention"):
                resolve(model, position)


@pytest.mark.parametrize("family", ["mamba", "fnet"])
def test_a_model_without_attention_is_refused(family):
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(family))
    with pytest.raises(ValueError, match=f"not known for the architecture '{family}'"):
        resolve(model, "attn")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_has_the_positions(family):
    model, (*_, counts, fused) = build(family), FAMILIES[family]
    for position, count in zip(("attn", "attention_output", "mlp"), counts, strict=True):
        if count:
            assert len(resolve(model, position)) == count, position
    separate = ("query", "key", "value")
    if fused:
        for position in separate:
            with pytest.raises(ValueError, match="fuses query, key and value"):
                resolve(model, position)
    else:
        parts = [resolve(model, position) for position in separate]
        assert set.union(*parts) == resolve(model, "attn")
        assert [len(part) for part in parts] == [counts[0] // 3] * 3
    both = ["attn", "attention_output"]
    assert resolve(model, both) == resolve(model, both[0]) | resolve(model, both[1])
    assert resolve(model, "embedding") < resolve(model, "all")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_scale_has_an_effect_and_merges(family):
    model, batch = build(family), inputs(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    base = logits(model, batch)
    adapted = get_peft_model(model, PropulsionConfig(degree=3, positions="all"))
    assert torch.equal(logits(adapted, batch), base)
    randomize(adapted, spread=0.1)
    adapted(**batch).logits.square().sum().backward()
    dead = [name for name, z in scales(adapted).items() if z.grad is None or not z.grad.any()]
    # The key's scale also multiplies attention scores, so it has an effect here.
    assert not dead
    output = logits(adapted, batch)
    adapted.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(adapted, batch), output, rtol=0, atol=1e-11 * float(output.abs().max()))
    adapted.unmerge_adapter()
    assert torch.equal(logits(adapted, batch), output)
    restored = adapted.unload()
    assert all(torch.equal(p, before[name]) for name, p in restored.named_parameters())
    assert torch.equal(logits(restored, batch), base)


def test_stacked_experts_are_no_position():
    with pytest.raises(ValueError, match="'mlp' has no module of its own in 'mixtral', whose blocks"):
        resolve(build("mixtral"), "mlp")


def test_a_vision_transformer_has_the_positions():
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4
    )
    model = ViTForImageClassification(config)
    counts = {"attn": 6, "query": 2, "key": 2, "value": 2, "attention_output": 2, "mlp": 4, "norm": 5, "all": 13}
    assert {position: len(resolve(model, position)) for position in counts} == counts


def test_any_model_has_all_and_embedding():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2), nn.ReLU())
    assert resolve(model, "all") == {"0", "1"}
    assert resolve(model, "embedding") == {"0"}
    with pytest.raises(ValueError, match="not known for the architecture 'Sequential', in which no layers named"):
        resolve(model, "query")
    with pytest.raises(ValueError, match="'embedding' matches no module of Linear"):
        resolve(nn.Linear(3, 2), "embedding")


def test_a_layer_that_does_not_exist_is_an_error(roberta_base):
    with pytest.raises(ValueError, match=r"expected layers_to_transform to name blocks .* got \[12\]"):
        resolve(roberta_base, "attn", 12)


def test_a_module_read_through_its_weight_is_a_position():
    assert resolve(nn.TransformerEncoderLayer(4, 2, 8), "all") == {"linear1", "linear2", "self_attn.out_proj"}
    for family in ("deberta", "deberta-v2"):
        assert any("rel_embeddings" in name for name in resolve(build(family), "all"))


def test_a_module_that_is_not_used_is_no_position():
    for family in ("t5", "bart"):
        with pytest.raises(ValueError, match=r"shared' would have no effect: .* does not call it"):
            get_peft_model(build(family), PropulsionConfig(target_modules=["shared"]))


def test_every_position_is_of_use_somewhere(roberta_base):
    assert all(resolve(roberta_base, position) for position in POSITIONS)
