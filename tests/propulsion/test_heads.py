"""Heads that are trained in full together with scales: combined, in mixed batches, merged, swapped, renamed."""

import pytest
import torch
import transformers as hf
from architectures import build, inputs, logits, randomize, scales
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from propulsion import PropulsionConfig, hotswap_adapter
from propulsion.heads import head_modules


def heads(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if f".modules_to_save.{adapter}." in name]


def move(parameters: list[nn.Parameter], seed: int) -> None:
    """Change the trained parameters, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def config(**fields) -> PropulsionConfig:
    return PropulsionConfig(**{"degree": 3, "positions": "attn", "task_type": "SEQ_CLS", **fields})


def two(family: str = "bert") -> PeftModel:
    model = get_peft_model(build(family), config())
    model.add_adapter("second", config())
    randomize(model, spread=0.2)
    move(heads(model, "default"), 3)
    move(heads(model, "second"), 4)
    return model.eval()


def outputs(model: PeftModel, adapter: str, batch: dict[str, Tensor]) -> Tensor:
    model.set_adapter(adapter)
    return logits(model, batch)


@pytest.mark.parametrize("family", ["bert", "roberta"])  # Heads of one layer and of two layers.
def test_a_combination_has_the_mean_of_the_heads(family, tmp_path):
    model, batch = two(family), inputs(family)
    model.base_model.add_weighted_adapter(["default", "second"], [0.25, 0.75], "mean")
    for one, other, mean in zip(*(heads(model, name) for name in ("default", "second", "mean")), strict=True):
        torch.testing.assert_close(mean, 0.25 * one + 0.75 * other, rtol=1e-12, atol=1e-14)
    output = outputs(model, "mean", batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(family), tmp_path / "mean", adapter_name="other")
    assert torch.equal(logits(loaded, batch), output)


def test_one_adapter_of_weight_one_is_itself():
    model, batch = two(), inputs("bert")
    model.base_model.add_weighted_adapter(["second"], [1.0], "same")
    torch.testing.assert_close(outputs(model, "same", batch), outputs(model, "second", batch), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("order", [["bare", "default"], ["default", "bare"]])
def test_composing_with_an_adapter_that_has_no_head_keeps_the_head(order):
    model = get_peft_model(build("bert"), PropulsionConfig(degree=3, positions="attn", modules_to_save=["classifier"]))
    model.add_adapter("bare", PropulsionConfig(degree=3, positions="mlp", exclude_modules=["classifier"]))
    randomize(model, spread=0.2).eval()
    move(heads(model, "default"), 3)
    model.base_model.add_weighted_adapter(order, [1.0, 1.0], "both")
    for one, combined in zip(heads(model, "default"), heads(model, "both"), strict=True):
        assert torch.equal(one, combined)
    with pytest.raises(
        ValueError, match=r"sum to 1 over the adapters that have trained 'classifier' .default., got 0.5"
    ):
        model.base_model.add_weighted_adapter(order, [0.5, 0.5], "half")
    assert "half" not in model.peft_config


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.5, 0.4], [-1.0, 1.0]])
def test_heads_have_no_other_combination(weights):
    model, batch = two(), inputs("bert")
    before = outputs(model, "default", batch)
    with pytest.raises(ValueError, match="expected weights that sum to 1 over the adapters that have trained"):
        model.base_model.add_weighted_adapter(["default", "second"], weights, "new")
    assert set(model.peft_config) == {"default", "second"}
    assert not heads(model, "new")
    assert torch.equal(outputs(model, "default", batch), before)


def test_biases_and_running_statistics_have_no_combination():
    model = get_peft_model(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)),
                           PropulsionConfig(target_modules=["0"], modules_to_save=["1"]))  # fmt: skip
    model.add_adapter("second", PropulsionConfig(target_modules=["0"], modules_to_save=["1"]))
    model.base_model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "equal")
    model.train()(torch.randn(5, 3))
    with pytest.raises(ValueError, match="expected equal buffers 'running_mean' in '1'"):
        model.base_model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "new")
    model = get_peft_model(build("bert"), PropulsionConfig(positions="attn", bias="all"))
    with pytest.raises(ValueError, match=r"adapters that train no biases, got \['default'\]"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "new")
    assert set(model.peft_config) == {"default"}


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_mixed_batch_gives_each_example_its_own_head(family):
    model, batch = two(family), inputs(family)
    names = ["second", "default", "__base__"]
    mixed = model(**batch, adapter_names=names).logits
    for i, name in enumerate(names[:2]):
        torch.testing.assert_close(mixed[i], outputs(model, name, batch)[i], rtol=1e-12, atol=1e-14)
    with model.disable_adapter():
        torch.testing.assert_close(mixed[2], logits(model, batch)[2], rtol=1e-12, atol=1e-14)


def test_in_a_mixed_batch_an_adapter_without_a_head_has_the_original_one():
    model = get_peft_model(build("bert"), PropulsionConfig(degree=3, positions="attn", modules_to_save=["classifier"]))
    model.add_adapter("bare", PropulsionConfig(degree=3, positions="mlp"))
    randomize(model, spread=0.2).eval()
    move(heads(model, "default"), 3)
    batch, names = inputs("bert"), ["bare", "default", "bare"]
    expected = {name: outputs(model, name, batch) for name in ("bare", "default")}
    for active in expected:  # This holds for either active adapter.
        model.set_adapter(active)
        mixed = model(**batch, adapter_names=names).logits
        for i, name in enumerate(names):
            torch.testing.assert_close(mixed[i], expected[name][i], rtol=1e-12, atol=1e-14)


def test_only_adapters_with_the_head_in_use_are_merged():
    model, batch = two(), inputs("bert")
    expected = outputs(model, "second", batch)
    model.set_adapter("default")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"of the adapters to merge \(second\), but it uses that of default: call"):
            merge(adapter_names=["second"])
    model.set_adapter("second")
    merged = model.merge_and_unload(adapter_names=["second"])
    torch.testing.assert_close(logits(merged, batch), expected, rtol=1e-12, atol=1e-14)


def test_deleting_an_adapter_leaves_the_other_with_its_head():
    model, batch = two(), inputs("bert")
    expected = outputs(model, "second", batch)
    model.set_adapter("default")
    model.delete_adapter("default")
    assert not heads(model, "default")
    assert torch.equal(outputs(model, "second", batch), expected)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_hotswapping_swaps_the_head_too(family, tmp_path):
    model, batch = two(family), inputs(family)
    expected = {name: outputs(model, name, batch) for name in ("default", "second")}
    model.save_pretrained(tmp_path)
    model.set_adapter("default")
    memory = [p.data_ptr() for p in (*heads(model, "default"), *scales(model).values())]
    hotswap_adapter(model, tmp_path / "second")
    assert torch.equal(logits(model, batch), expected["second"])
    assert [p.data_ptr() for p in (*heads(model, "default"), *scales(model).values())] == memory
    hotswap_adapter(model, tmp_path)
    assert torch.equal(logits(model, batch), expected["default"])


def test_hotswapping_names_what_differs(tmp_path):
    with_head, without = two(), get_peft_model(build("bert"), PropulsionConfig(degree=3, positions="attn"))
    with_head.save_pretrained(tmp_path / "head")
    without.save_pretrained(tmp_path / "none")
    before = logits(with_head.eval(), inputs("bert"))
    with pytest.raises(ValueError, match=r"modules and heads, but only this model's has .*classifier.bias"):
        hotswap_adapter(with_head, tmp_path / "none")
    with pytest.raises(ValueError, match=r"modules and heads, but only the one in .* has .*classifier.bias"):
        hotswap_adapter(without, tmp_path / "head")
    assert torch.equal(logits(with_head, inputs("bert")), before)


def trained_in_full(model: nn.Module) -> set[str]:
    names = (name for name, p in model.named_parameters() if p.requires_grad and ".modules_to_save." in name)
    return {name.partition(".modules_to_save.")[0].removeprefix("base_model.model.") for name in names}


SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 30}
TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "cls_token_id": 3, "sep_token_id": 4}
SIDES = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")}
BART = {"d_model": 8, "vocab_size": 30, **SIDES}
XLNET = {"d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 8, "vocab_size": 30}
HEADS = {
    "deberta": (lambda: build("deberta"), "SEQ_CLS", {"pooler", "classifier"}),
    "deberta-v2": (lambda: build("deberta-v2"), "SEQ_CLS", {"pooler", "classifier"}),
    "distilbert": (lambda: build("distilbert"), "SEQ_CLS", {"pre_classifier", "classifier"}),
    "bert": (lambda: build("bert"), "SEQ_CLS", {"classifier"}),
    "bart": (lambda: hf.BartForSequenceClassification(hf.BartConfig(**BART)), "SEQ_CLS", {"classification_head"}),
    "bart, spans": (lambda: hf.BartForQuestionAnswering(hf.BartConfig(**BART)), "QUESTION_ANS", {"qa_outputs"}),
    "xlnet": (
        lambda: hf.XLNetForSequenceClassification(hf.XLNetConfig(**XLNET)),
        "SEQ_CLS",
        {"sequence_summary", "logits_proj"},
    ),
    "modernbert, tags": (
        lambda: hf.ModernBertForTokenClassification(hf.ModernBertConfig(**SIZES, **TOKENS)),
        "TOKEN_CLS",
        {"head", "classifier"},
    ),
    "bert, tags": (lambda: hf.BertForTokenClassification(hf.BertConfig(**SIZES)), "TOKEN_CLS", {"classifier"}),
    "bert, spans": (lambda: hf.BertForQuestionAnswering(hf.BertConfig(**SIZES)), "QUESTION_ANS", {"qa_outputs"}),
}


@pytest.mark.parametrize("name", HEADS)
def test_all_of_a_new_head_is_trained(name, tmp_path):
    make, task_type, expected = HEADS[name]
    base = make().double().eval()
    model = get_peft_model(base, PropulsionConfig(degree=3, task_type=task_type)).eval()
    assert trained_in_full(model) == expected
    assert not any("propulsion_z" in key and key.split(".")[2] in expected for key in scales(model))
    randomize(model, spread=0.2)
    move(heads(model, "default"), 3)
    ids = inputs("bert")["input_ids"]
    batch = {"input_ids": torch.cat([ids, torch.full_like(ids[:, :1], 2)], dim=1)}  # End of text.
    output = model(**batch)[0].detach()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path, adapter_name="again").eval()
    assert torch.equal(loaded(**batch)[0], output)


def test_an_excluded_part_of_a_head_stays_frozen():
    model = get_peft_model(build("deberta"), config(exclude_modules=["pooler"]))
    assert trained_in_full(model) == {"classifier"}


class Normed(hf.BertForSequenceClassification):
    """A classifier whose head has a part with the same name as parts of the backbone."""

    def __init__(self, config):
        super().__init__(config)
        self.dense = nn.Linear(8, 8)


def test_a_part_of_a_head_that_cannot_be_told_by_name_is_said():
    with pytest.warns(
        UserWarning,
        match=r"'dense' is part of the head of Normed .*: peft .* would train '",
    ):
        model = get_peft_model(Normed(hf.BertConfig(**SIZES)), config())
    assert trained_in_full(model) == {"classifier"}


@pytest.mark.parametrize("width", [8, 16])
def test_what_a_checkpoint_lacks_in_the_body_is_said(width, tmp_path, recwarn):
    sizes = hf.BertConfig(**{**SIZES, "hidden_size": width})
    hf.BertForMaskedLM(sizes).save_pretrained(tmp_path / "language")
    base = hf.BertForSequenceClassification.from_pretrained(tmp_path / "language")
    base.save_pretrained(tmp_path / "whole")
    with pytest.warns(UserWarning, match=r"lacks bert\.pooler\.dense, whose weights are random and stay so"):
        get_peft_model(base, config()).unload()
    recwarn.clear()
    model = get_peft_model(base, config(modules_to_save=["pooler"]))
    assert trained_in_full(model) == {"bert.pooler", "classifier"}
    get_peft_model(hf.BertForSequenceClassification.from_pretrained(tmp_path / "whole"), config())
    get_peft_model(hf.BertForSequenceClassification(sizes), config())  # The head is random by intention.
    assert not [str(w.message) for w in recwarn if "random" in str(w.message)]


def test_where_no_body_is_named_loading_tells_the_head(tmp_path):
    sizes = hf.T5Config(d_model=8, d_kv=4, num_layers=1, num_heads=2, d_ff=8, vocab_size=30)
    hf.T5ForConditionalGeneration(sizes).save_pretrained(tmp_path)
    assert head_modules(hf.T5ForQuestionAnswering.from_pretrained(tmp_path)) == ["qa_outputs"]
    assert head_modules(hf.T5ForQuestionAnswering(sizes)) == []
