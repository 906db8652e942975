"""bitsandbytes' 8-bit and 4-bit layers on a CPU: adapted, trained, saved, merged into the layers' own scales.

bitsandbytes is not in the test environment, since it prints a message when it is imported, and other tests require that
a command prints a single line. `.ci/run` installs it after the other tests and then runs these.
"""

import copy

import pytest
import torch
from architectures import build, inputs, logits, scales
from peft import PeftModel, get_peft_model
from torch import nn

from propulsion import PropulsionConfig
from propulsion.layers import layer_class

bnb = pytest.importorskip("bitsandbytes", reason="needs the extra 'quantised'")

KINDS = {
    "8-bit": lambda i, o: bnb.nn.Linear8bitLt(i, o, has_fp16_weights=False),
    "4-bit": lambda i, o: bnb.nn.Linear4bit(i, o, compute_dtype=torch.float32, quant_type="nf4"),
    "4-bit, scales once": lambda i, o: bnb.nn.Linear4bit(
        i, o, compute_dtype=torch.float32, quant_type="fp4", compress_statistics=False
    ),
}


def quantised(kind: str, linear: nn.Linear) -> nn.Module:
    layer = KINDS[kind](linear.in_features, linear.out_features)
    layer.load_state_dict(linear.state_dict())
    layer.support_avx512bf16_for_cpu = False  # some processors pack the weight at the first call
    return layer.to("cpu")


def adapted(kind: str, d_in: int = 128, d_out: int = 8):
    torch.manual_seed(0)
    base = quantised(kind, nn.Linear(d_in, d_out))
    layer = layer_class(base)(base, "default", PropulsionConfig(degree=3, init_noise=0.1))
    return layer, torch.randn(5, d_in)


@pytest.mark.parametrize("called", [False, True], ids=["new", "called before"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_scaled_trained_merged_and_unmerged(kind, called):
    layer, x = adapted(kind)
    base, z = layer.base_layer, layer.propulsion_z["default"]
    with torch.no_grad():
        z[0] = 0.0
    if called:
        base(x)
    copied = copy.deepcopy(base)
    output = layer(x)
    torch.testing.assert_close(output, copied(x) * z.detach() ** 3)
    weight, bits = base.weight, base.weight.detach().clone()
    layer.merge(safe_merge=True)
    torch.testing.assert_close(layer(x), output, rtol=0, atol=1e-6 * float(output.abs().max()))
    assert not torch.equal(base(x), copied(x))
    layer.unmerge()
    assert base.weight is weight
    assert torch.equal(base.weight, bits)
    assert torch.equal(layer(x), output)
    layer.train()(x.requires_grad_(True)).sum().backward()
    torch.testing.assert_close(z.grad, 3 * z.detach() ** 2 * copied(x).detach().sum(dim=0))


def test_a_negative_scale_merges_where_numbers_have_opposites():
    layer, x = adapted("8-bit")
    with torch.no_grad():
        layer.propulsion_z["default"][:3] *= -1
    output = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), output, rtol=0, atol=1e-6 * float(output.abs().max()))
    layer, x = adapted("4-bit")
    with torch.no_grad():
        layer.propulsion_z["default"][:3] *= -1
    output = layer(x)
    with pytest.raises(ValueError, match=r"a quantised Linear4bit of dtype torch\.uint8: z\^k is negative"):
        layer.merge()
    assert torch.equal(layer(x), output)


def test_what_no_scale_folds_into_is_refused():
    layer, x = adapted("4-bit", d_in=96)
    output = layer(x)
    with pytest.raises(ValueError, match="its blocks of 64 numbers run across rows"):
        layer.merge()
    assert torch.equal(layer(x), output)
    base = bnb.nn.Linear8bitLt(4, 3, has_fp16_weights=False)  # It is quantised when it moves to a device.
    with pytest.raises(ValueError, match="not quantised yet"):
        layer_class(base)(base, "default", PropulsionConfig()).merge()


@pytest.mark.parametrize("kind", [bnb.nn.Embedding8bit, bnb.nn.EmbeddingNF4])
def test_an_embedding_is_adapted_and_not_merged(kind):
    """The rows of an embedding are tokens, not outputs; here there are as many tokens as outputs."""
    torch.manual_seed(0)
    base = kind(64, 64)
    base.load_state_dict(nn.Embedding(64, 64).state_dict())
    base = base.to("cpu")
    layer, ids = layer_class(base)(base, "default", PropulsionConfig(degree=2, init_value=1.1)), torch.arange(8)
    torch.testing.assert_close(layer(ids), base(ids) * 1.1**2)
    with pytest.raises(ValueError, match="one scale for each row, but its outputs are columns"):
        layer.merge()


def quantised_bert(kind: str) -> nn.Module:
    model = build("bert").float()
    for module in list(model.bert.encoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, quantised(kind, child))
    return model.requires_grad_(False)


def test_the_life_of_an_adapter_of_a_quantised_model(tmp_path):
    model, batch = get_peft_model(quantised_bert("8-bit"), PropulsionConfig(degree=3)), inputs("bert")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        model.train()(**batch).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    output = logits(model.eval(), batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised_bert("8-bit"), tmp_path)
    assert torch.equal(logits(loaded, batch), output)
    model.merge_adapter(safe_merge=True)
    size = float(output.abs().max())
    torch.testing.assert_close(logits(model, batch), output, rtol=0, atol=1e-5 * size)
    model.unmerge_adapter()
    assert torch.equal(logits(model, batch), output)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), output, rtol=0, atol=1e-5 * size)
    assert not scales(merged)
