"""Batches that mix adapters, and combinations of adapters."""

import pytest
import torch
from architectures import build, inputs, logits, randomize, scales
from peft import PeftModel, get_peft_model

from propulsion import PropulsionConfig, hotswap_adapter


def model_with_two(family: str, **fields) -> PeftModel:
    without = ["relative_attention_bias"]
    model = get_peft_model(
        build(family), PropulsionConfig(degree=3, positions="all", exclude_modules=without, **fields)
    )
    model.add_adapter("second", PropulsionConfig(degree=2, positions=["embedding", "mlp"], exclude_modules=without))
    randomize(model, spread=0.2)
    return model.eval()


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_a_batch_that_mixes_adapters_is_each_example_by_its_own(family):
    """This includes position embeddings, which have batch size 1."""
    model, batch = model_with_two(family), inputs(family)
    n = len(batch["input_ids"])
    names = ["second", "default", "__base__"][:n]
    mixed = model(**batch, adapter_names=names).logits
    for name in names:
        rows = [i for i, other in enumerate(names) if other == name]
        if name == "__base__":
            with model.disable_adapter():
                expected = logits(model, batch)
        else:
            model.set_adapter(name)
            expected = logits(model, batch)
        torch.testing.assert_close(mixed[rows], expected[rows], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_a_batch_that_mixes_adapters_generates(family, beams):
    model = get_peft_model(build(family), PropulsionConfig(degree=3, positions="mlp"))
    model.add_adapter("second", PropulsionConfig(degree=2, positions="attn"))
    randomize(model, spread=0.5).eval()
    options = {"num_beams": beams, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    if family == "bart":
        options["decoder_start_token_id"] = 2
    ids, names = inputs(family)["input_ids"], ["second", "default", "__base__"]
    mixed = model.generate(input_ids=ids, adapter_names=names, **options)
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected = model.generate(input_ids=ids[i : i + 1], **options)
        else:
            model.set_adapter(name)
            expected = model.generate(input_ids=ids[i : i + 1], **options)
        assert torch.equal(mixed[i, : expected.shape[1]], expected[0])


def test_an_output_that_all_examples_share_cannot_mix():
    model = get_peft_model(build("t5"), PropulsionConfig(degree=3, positions="embedding")).eval()
    batch = inputs("t5")
    with pytest.raises(ValueError, match=r"relative_attention_bias' is shared by all examples"):
        model(**batch, adapter_names=["default"] * len(batch["input_ids"]))


def test_mixed_batches_by_mistake():
    model, batch = model_with_two("bert"), inputs("bert")
    n = len(batch["input_ids"])
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): third"):
        model(**batch, adapter_names=["third"] * n)
    with pytest.raises(ValueError, match="one adapter name for each"):
        model(**batch, adapter_names=["default"] * (n + 1))
    model.merge_adapter()
    with pytest.raises(ValueError, match="call unmerge_adapter"):
        model(**batch, adapter_names=["default"] * n)
    model.unmerge_adapter()
    model.train()
    with pytest.raises(ValueError, match="evaluation mode"):
        model(**batch, adapter_names=["default"] * n)


def test_weights_of_one_compose_adapters():
    model, batch = model_with_two("bert"), inputs("bert")
    model.base_model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both")
    model.base_model.set_adapter(["default", "second"])
    expected = logits(model, batch)
    model.set_adapter("both")
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-10, atol=1e-12)


def test_a_combination_is_the_geometric_mean_and_is_saved(tmp_path):
    model, batch = get_peft_model(build("bert"), PropulsionConfig(degree=3)), inputs("bert")
    model.add_adapter("second", PropulsionConfig(degree=3))
    randomize(model, spread=0.2)
    model.base_model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")
    z = {name.rpartition(".")[2]: z for name, z in scales(model).items() if "layer.0.output.dense" in name}
    torch.testing.assert_close(z["mean"], (z["default"] * z["second"]).sqrt(), rtol=1e-12, atol=0)
    model.set_adapter("mean")
    output = logits(model, batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path / "mean", adapter_name="mean")
    assert torch.equal(logits(loaded, batch), output)


@pytest.mark.parametrize(
    ("adapters", "weights", "name", "message"),
    [
        (["default", "third"], [1.0, 1.0], "new", "expected existing adapters, got .'third'."),
        (["default", "second"], [1.0], "new", "one finite weight for each"),
        (["default"], [float("nan")], "new", "one finite weight for each"),
        (["default"], [1.0], "second", "'second', which exists"),
        (["default"], ["1"], "new", "one finite weight for each"),
        ([], [], "new", "one finite weight for each"),
        ("default", [1.0], "new", "a list of adapters and one of weights"),
        (["default"], 1.0, "new", "a list of adapters and one of weights"),
    ],
)
def test_combinations_by_mistake(adapters, weights, name, message, no_shape_checks):
    with pytest.raises(ValueError, match=message):
        model_with_two("bert").base_model.add_weighted_adapter(adapters, weights, name)


def test_degrees_of_single_modules():
    model = get_peft_model(
        build("bert"), PropulsionConfig(degree=15, degree_pattern={"query": 2, r"layer\.1\..*key": 3})
    )
    degrees = {name: m.degree["default"] for name, m in model.named_modules() if hasattr(m, "propulsion_z")}
    for name, degree in degrees.items():
        expected = 2 if name.endswith("query") else 3 if "layer.1" in name and name.endswith("key") else 15
        assert degree == expected, name


def test_a_pattern_of_no_module_is_pointed_out(recwarn):
    patterns = {"query": 2, "qury": 3}
    get_peft_model(build("bert"), PropulsionConfig(positions="attn", degree_pattern=patterns))
    assert [str(w.message) for w in recwarn if "degree_pattern" in str(w.message)] == [
        "degree_pattern ['qury'] matches no adapted module: correct it, or drop it"
    ]


def test_norms_on_request():
    model, batch = get_peft_model(build("llama"), PropulsionConfig(degree=2, positions="norm")), inputs("llama")
    randomize(model, spread=0.2)
    output = logits(model, batch)
    assert len(scales(model)) == 5
    model.merge_adapter()
    torch.testing.assert_close(logits(model, batch), output, rtol=1e-10, atol=1e-12)


def saved(folder, seed: int, **fields) -> PeftModel:
    generator = torch.Generator().manual_seed(seed)
    model = get_peft_model(build("bert"), PropulsionConfig(**{"degree": 3, "positions": "attn", **fields})).eval()
    randomize(model, spread=0.2)
    with torch.no_grad():
        for z in scales(model).values():
            z += 0.1 * torch.randn(z.shape, generator=generator, dtype=z.dtype)
    model.save_pretrained(folder)
    return model


def test_hotswapping_puts_another_adapter_in_place(tmp_path):
    first, second = saved(tmp_path / "a", 0), saved(tmp_path / "b", 1)
    batch = inputs("bert")
    before = {name: z.data_ptr() for name, z in scales(first).items()}
    assert not torch.equal(logits(first, batch), logits(second, batch))
    hotswap_adapter(first, tmp_path / "b")
    assert torch.equal(logits(first, batch), logits(second, batch))
    assert {name: z.data_ptr() for name, z in scales(first).items()} == before


def test_hotswapping_does_not_compile_again(tmp_path, no_shape_checks):
    torch._dynamo.reset()
    first, second = saved(tmp_path / "a", 0), saved(tmp_path / "b", 1)
    batch = inputs("bert")
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(first, backend=backend)
    with torch.no_grad():
        compiled(**batch)
        count = len(graphs)
        hotswap_adapter(compiled, tmp_path / "b")
        torch.testing.assert_close(compiled(**batch).logits, logits(second, batch))
    assert len(graphs) == count > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"degree": 4}, "degree = 3, got 4"),
        ({"positions": "mlp"}, "same modules"),
        ({"vectors": 2}, "vectors = 1, got 2"),
    ],
)
def test_hotswapping_what_does_not_fit_changes_nothing(tmp_path, fields, message):
    model, batch = saved(tmp_path / "a", 0), inputs("bert")
    saved(tmp_path / "b", 1, **fields)
    output = logits(model, batch)
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, tmp_path / "b")
    assert torch.equal(logits(model, batch), output)


def test_hotswapping_an_adapter_that_is_not_there(tmp_path):
    model = saved(tmp_path, 0)
    with pytest.raises(ValueError, match=r"expected an existing adapter, got 'other'; there are \['default'\]"):
        hotswap_adapter(model, tmp_path, "other")


def test_a_head_that_is_scaled_but_not_trained_is_pointed_out():
    with pytest.warns(UserWarning, match=r"'classifier' is part of the head .* task_type"):
        get_peft_model(build("bert"), PropulsionConfig(positions="all"))


def test_a_damaged_adapter_is_not_swapped_in(tmp_path):
    model = model_with_two("bert")
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.save_pretrained(tmp_path)
    randomize(model, spread=float("inf")).save_pretrained(tmp_path / "infinite")
    for name, p in model.named_parameters():
        p.data.copy_(before[name])
    with pytest.raises(ValueError, match="expected finite values, got others in"):
        hotswap_adapter(model, tmp_path / "infinite")
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"adapter_config.json is damaged: expected an object"):
        hotswap_adapter(model, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
