"""Whole models with peft: training, saving, heads, several adapters, tied weights, and refused models."""

import copy

import pytest
import torch
from architectures import build, inputs, logits, randomize, scales
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from propulsion import PropulsionConfig, PropulsionModel

BATCH = inputs("bert")


def adapted(family: str = "bert", **fields) -> PeftModel:
    return randomize(get_peft_model(build(family), PropulsionConfig(**{"degree": 3, **fields})), spread=0.1)


def seeded(model: nn.Module):
    """The output, with the same dropout for every model."""
    torch.manual_seed(5)
    return model(**BATCH)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("training", [False, True])
def test_degree_1_is_ia3_on_the_same_modules_to_the_last_bit(training):
    names = ["query", "key", "value", "dense"]
    ours = randomize(get_peft_model(build("bert"), PropulsionConfig(degree=1, target_modules=names)))
    theirs = get_peft_model(build("bert"), IA3Config(target_modules=names, feedforward_modules=[]))
    pairs = {name: (z, theirs.get_parameter(name.replace("propulsion_z", "ia3_l"))) for name, z in scales(ours).items()}
    for z, ell in pairs.values():
        ell.data.copy_(z.detach()[:, None])
    left, right = (seeded(model.train(training)).logits for model in (ours, theirs))
    assert torch.equal(left, right)
    left.sin().sum().backward()
    right.sin().sum().backward()
    assert len(pairs) == 13
    for name, (z, ell) in pairs.items():
        assert torch.equal(z.grad, ell.grad[:, 0]), name


@pytest.mark.parametrize("degree", [2, 15, 2.5])
def test_another_degree_with_the_same_scale_is_the_same_function(degree):
    one, other = adapted(degree=1), adapted(degree=degree)
    with torch.no_grad():
        for z, ell in zip(scales(other).values(), scales(one).values(), strict=True):
            z.copy_(ell ** (1 / degree))
    torch.testing.assert_close(logits(other, BATCH), logits(one, BATCH), rtol=1e-12, atol=1e-12)
    for model in (one, other):
        model(**BATCH).logits.sum().backward()
    for (name, z), ell in zip(scales(other).items(), scales(one).values(), strict=True):
        expected = degree * z.detach() ** (degree - 1) * ell.grad
        torch.testing.assert_close(z.grad, expected, rtol=1e-10, atol=1e-12 * float(expected.abs().max()), msg=name)


def test_adapted_differs_from_the_base_and_disabling_restores_it():
    base = logits(build("bert"), BATCH)
    model = adapted()
    output = logits(model, BATCH)
    assert not torch.allclose(output, base)
    with model.disable_adapter():
        assert torch.equal(logits(model, BATCH), base)
    assert torch.equal(logits(model, BATCH), output)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, BATCH), base)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("fields", [{}, {"positions": ["attn", "embedding"]}, {"positions": "mlp"}], ids=str)
def test_reloading_is_exact(family, fields, tmp_path):
    model, batch = adapted(family, **fields), inputs(family)
    output = logits(model, batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(family), tmp_path)
    assert isinstance(loaded.base_model, PropulsionModel)
    assert loaded.peft_config["default"].positions == model.peft_config["default"].positions
    assert scales(loaded).keys() == scales(model).keys()
    assert all(torch.equal(z, scales(loaded)[name]) for name, z in scales(model).items())
    assert torch.equal(logits(loaded, batch), output)
    assert not trainable(loaded)
    # The file has the scales and no parameter of the base model, not even embeddings.
    size = sum(z.numel() * z.element_size() for z in scales(model).values())
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < size + 200 * len(scales(model))


def test_reloading_target_modules_and_blocks_is_exact(tmp_path):
    fields = {"target_modules": ["query", "output.dense"], "layers_to_transform": [1], "degree": 2.5}
    model = adapted(**fields)
    assert len(scales(model)) == 3
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path)
    assert torch.equal(logits(loaded, BATCH), logits(model, BATCH))


def test_a_task_head_is_trained_and_saved_and_not_adapted(tmp_path):
    model = adapted(task_type="SEQ_CLS")
    names = trainable(model)
    assert not any("classifier" in name for name in scales(model))
    assert {name for name in names if "classifier" in name} == {
        "base_model.model.classifier.modules_to_save.default.weight",
        "base_model.model.classifier.modules_to_save.default.bias",
    }
    assert names >= scales(model).keys()
    with torch.no_grad():
        for name in names - scales(model).keys():
            model.get_parameter(name).normal_()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded, BATCH), logits(model, BATCH))
    assert trainable(loaded) == names


def test_without_a_task_the_head_is_adapted():
    model = adapted()
    assert "base_model.model.classifier.propulsion_z.default" in scales(model)
    assert trainable(model) == scales(model).keys()


@pytest.mark.parametrize(("bias", "other"), [("propulsion_only", False), ("all", True)])
def test_biases_can_be_trained(bias, other, tmp_path):
    model = adapted(positions="query", bias=bias)
    names = trainable(model) - scales(model).keys()
    assert "base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.bias" in names
    assert ("base_model.model.bert.pooler.dense.bias" in names) is other
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).normal_()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path)
    assert torch.equal(logits(loaded, BATCH), logits(model, BATCH))


def test_merging_and_unloading_gives_a_plain_model():
    model = adapted()
    output = logits(model, BATCH)
    merged = model.merge_and_unload(safe_merge=True)
    assert merged.state_dict().keys() == build("bert").state_dict().keys()
    torch.testing.assert_close(logits(merged, BATCH), output, rtol=1e-12, atol=1e-12)


def test_merging_a_tied_embedding_leaves_the_head_alone():
    model, batch = adapted("gpt2", positions="embedding"), inputs("gpt2")
    base = model.get_base_model()
    head, before = base.lm_head.weight, base.lm_head.weight.detach().clone()
    assert base.transformer.wte.base_layer.weight is head
    output = logits(model, batch)
    model.merge_adapter()
    assert torch.equal(base.lm_head.weight, before)
    assert not torch.equal(base.transformer.wte.weight, before)
    torch.testing.assert_close(logits(model, batch), output, rtol=1e-12, atol=1e-12)
    model.unmerge_adapter()
    assert base.transformer.wte.base_layer.weight is base.lm_head.weight is head
    with pytest.warns(UserWarning, match="no longer tied"):
        merged = model.merge_and_unload()
    assert torch.equal(merged.lm_head.weight, before)
    torch.testing.assert_close(logits(merged, batch), output, rtol=1e-12, atol=1e-12)


def test_several_adapters_switch_multiply_and_go():
    model = adapted(positions="attn")
    model.add_adapter("second", PropulsionConfig(degree=2, positions=["value", "mlp"]))
    first = logits(model, BATCH)
    with torch.no_grad():
        for name, z in scales(model).items():
            if name.endswith("second"):
                z.fill_(1.1)
    assert torch.equal(logits(model, BATCH), first)
    assert trainable(model) == {name for name in scales(model) if name.endswith("default")}
    model.set_adapter("second")
    second = logits(model, BATCH)
    assert not torch.allclose(second, first)
    assert trainable(model) == {name for name in scales(model) if name.endswith("second")}
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, BATCH)
    value = model.get_base_model().bert.encoder.layer[0].attention.self.value
    expected = value.propulsion_z["default"] ** 3 * value.propulsion_z["second"] ** 2
    torch.testing.assert_close(value.scale(["default", "second"]), expected, rtol=1e-14, atol=0)
    model.merge_adapter(adapter_names=["default", "second"])
    torch.testing.assert_close(logits(model, BATCH), both, rtol=1e-12, atol=1e-12)
    model.unmerge_adapter()
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model, BATCH), first)
    assert not any(name.endswith("second") for name in scales(model))


@pytest.mark.parametrize("autocast", [True, False])
def test_a_bfloat16_base_has_float32_scales(autocast, tmp_path):
    base = build("bert").bfloat16()
    model = get_peft_model(base, PropulsionConfig(), autocast_adapter_dtype=autocast)
    assert {z.dtype for z in scales(model).values()} == {torch.float32}
    randomize(model, spread=0.01)
    loss = model(**BATCH, labels=torch.tensor([0, 1, 0])).loss
    loss.backward()
    assert all(z.grad.isfinite().all() for z in scales(model).values())
    model.save_pretrained(tmp_path)
    for low in (False, True):  # with low_cpu_mem_usage, peft casts what it loaded
        loaded = PeftModel.from_pretrained(build("bert").bfloat16(), tmp_path, low_cpu_mem_usage=low)
        assert all(torch.equal(z, scales(model)[name]) for name, z in scales(loaded).items())
        assert torch.equal(logits(loaded, BATCH), logits(model, BATCH))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_a_model_leaves_its_scales_in_float32(dtype):
    """1 + 1e-3 is 1 in bfloat16, so that the adapter would have no effect."""
    model = get_peft_model(build("bert").float(), PropulsionConfig(degree=3))
    with torch.no_grad():
        for z in scales(model).values():
            z.fill_(1.001)
    before = {name: z.detach().clone() for name, z in scales(model).items()}
    model.to(dtype)
    assert all(torch.equal(z, before[name]) for name, z in scales(model).items())
    assert {p.dtype for name, p in model.named_parameters() if "propulsion_z" not in name} == {dtype}
    assert logits(model, BATCH).dtype == dtype
    assert {z.dtype for z in scales(model.double()).values()} == {torch.float64}
    assert {z.dtype for z in scales(model.to(dtype)).values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_scales_in_float32(dtype):
    model = randomize(get_peft_model(build("bert").to(dtype), PropulsionConfig(degree=3)), spread=0.01).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**BATCH, labels=torch.tensor([0, 1, 0])).loss
    loss.backward()
    assert {z.grad.dtype for z in scales(model).values()} == {dtype}
    assert all(z.grad.isfinite().all() for z in scales(model).values())


class Silent(nn.Module):
    """A model that neither calls one of its layers nor reads its weight."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(x)


class Detached(Silent):
    """A model that calls one of its layers without gradients."""

    def forward(self, x):
        return self.out(x + self.table.weight.detach().sum())


def test_a_scale_without_effect_is_pointed_out(recwarn):
    model, x = get_peft_model(Silent(), PropulsionConfig(degree=3)).train(), torch.randn(5, 4)
    with pytest.warns(UserWarning, match=r"did not call 'table' in this pass, nor read .* have no effect"):
        model(x)
    recwarn.clear()
    model(x)
    get_peft_model(Silent(), PropulsionConfig(exclude_modules=["table"])).train()(x)
    assert not recwarn.list


def test_a_scale_without_gradient_is_pointed_out(recwarn):
    model, x = get_peft_model(Detached(), PropulsionConfig(degree=3)).train(), torch.randn(5, 4)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(x).sum().backward()
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"no gradient has reached the scales of 'table' in this step"):
        optimizer.step()
    recwarn.clear()
    optimizer.step()
    assert not recwarn.list


class Shifted(nn.Linear):
    """A linear layer that does more than multiply by its weight."""

    def forward(self, x):
        return super().forward(x) + 1


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_layer_that_does_more_than_multiply_by_its_weight_adapts_and_does_not_merge():
    torch.manual_seed(0)
    model, x = get_peft_model(nn.Sequential(Shifted(4, 3)), PropulsionConfig(init_value=1.1)).eval(), torch.randn(5, 4)
    output, weight = model(x), model.base_model.model[0].base_layer.weight
    with pytest.raises(ValueError, match="Shifted does more in its forward: keep the adapter unmerged"):
        model.merge_adapter()
    assert model.base_model.model[0].base_layer.weight is weight
    assert torch.equal(model(x), output)
    model = get_peft_model(nn.Sequential(Doubled(4, 3)), PropulsionConfig(init_value=1.1)).eval()
    output = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), output)


def test_a_weight_that_is_computed_is_not_merged():
    for wrap in (nn.utils.parametrizations.weight_norm, nn.utils.weight_norm):
        model = get_peft_model(nn.Sequential(wrap(nn.Linear(4, 3))), PropulsionConfig(init_value=1.1)).eval()
        with pytest.raises(ValueError, match=r"expected a \w*Linear with a weight of its own to merge into"):
            model.merge_adapter()


def test_unloading_a_merged_model_gives_the_base_back():
    base = logits(build("bert"), BATCH)
    model = adapted()
    model.merge_adapter()
    restored = model.unload()
    assert torch.equal(logits(restored, BATCH), base)
    assert not restored._forward_pre_hooks


def test_a_merged_adapter_is_saved_as_it_is(tmp_path):
    model = adapted()
    output = logits(model, BATCH)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build("bert"), tmp_path), BATCH), output)


def test_a_pickled_model_is_the_same_model(tmp_path):
    model = adapted("gpt2")
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    batch = inputs("gpt2")
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_names_in_a_saved_adapter_are_stable():
    names = get_peft_model_state_dict(adapted(positions="query")).keys()
    prefix = "base_model.model.bert.encoder.layer"
    assert names == {f"{prefix}.{i}.attention.self.query.propulsion_z" for i in (0, 1)}


def test_an_adapter_of_another_base_is_refused(tmp_path):
    adapted(positions="query").save_pretrained(tmp_path)
    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, vocab_size=30)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*query.propulsion_z"):
        PeftModel.from_pretrained(BertForSequenceClassification(config), tmp_path)


def test_nothing_matched_is_an_error():
    for fields in ({"target_modules": ["nothing"]}, {"positions": "query", "exclude_modules": ["query"]}):
        with pytest.raises(ValueError, match=r"not found in the base model|No modules were targeted"):
            get_peft_model(build("bert"), PropulsionConfig(**fields))


def test_inference_mode_trains_nothing():
    assert not trainable(adapted(inference_mode=True))


def test_wrapping_copies_no_weight():
    base = build("gpt2")
    before = {id(p): p.data_ptr() for p in base.parameters()}
    model = get_peft_model(base, PropulsionConfig(degree=3))
    frozen = [p for name, p in model.named_parameters() if "propulsion_z" not in name]
    assert {id(p): p.data_ptr() for p in frozen} == before
    network = model.get_base_model()
    assert network.lm_head.base_layer.weight is network.transformer.wte.base_layer.weight
    model.train()(**inputs("gpt2")).logits.sum().backward()
    assert all(p.grad is None for p in frozen)


def test_training_moves_the_scales_and_nothing_else():
    model = get_peft_model(build("bert"), PropulsionConfig(degree=15, positions="attn")).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        model(**BATCH, labels=torch.tensor([0, 1, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == scales(model).keys()


def test_a_copy_is_a_model_of_its_own():
    model = adapted("gpt2")
    batch = inputs("gpt2")
    output = logits(model, batch)
    model.merge_adapter()
    twin = copy.deepcopy(model)
    model.unmerge_adapter()
    twin.unmerge_adapter()
    assert torch.equal(logits(twin, batch), output)
    base = twin.get_base_model()
    assert base.lm_head.base_layer.weight is base.transformer.wte.base_layer.weight


def test_all_linear_leaves_the_head_and_the_embeddings_out():
    model = adapted("gpt2", target_modules="all-linear")
    assert len(scales(model)) == 8
    model.add_adapter("second", PropulsionConfig(target_modules="all-linear"))
    assert len(scales(model)) == 16


def test_printing_the_trainable_parameters(capsys):
    adapted(positions="query").print_trainable_parameters()
    assert "trainable params: 16 " in capsys.readouterr().out


class TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.second(self.first(x)))


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (TwoNames, {"target_modules": ["act"]}, "'act' to be one of torch.nn.* got the unsupported ReLU"),
        (TwoNames, {}, "every module under one name, got one as 'first' and 'second'"),
        (TwoNames, {"target_modules": "all-linear"}, "every module under one name"),
        (lambda: build("gpt2"), {"positions": "query"}, "position 'query' has no module of its own in 'gpt2'"),
    ],
    ids=["layer norm", "shared", "shared, all-linear", "fused"],
)
def test_what_cannot_be_adapted_is_refused_before_anything_is_replaced(model, fields, message):
    model = model()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, PropulsionConfig(**fields))
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_a_module_with_another_methods_adapter_is_refused():
    model = get_peft_model(nn.Sequential(nn.Linear(3, 2)), LoraConfig(target_modules=["0"])).base_model.model
    with pytest.raises(ValueError, match="'0' to be plain, got one with another method's adapter"):
        get_peft_model(model, PropulsionConfig(target_modules=["0"]))
