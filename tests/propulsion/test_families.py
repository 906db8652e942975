"""Operations on an adapter for every family of the fast kernel: wrap, train, save, reload, merge, unmerge, delete."""

import copy

import pytest
import torch
import transformers as hf
from cases import FAMILIES, batch_for, classifier, randomized
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from torch import Tensor, nn

from propulsion import PropulsionConfig

OPTIONS = {
    "degree 15": {"degree": 15, "positions": "all"},
    "vectors and norms": {"degree": 2.5, "positions": ["all", "norm"], "vectors": 2, "pooling": "l2"},
}


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm = nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.BatchNorm2d(4)
        self.two, self.line, self.out = nn.Conv2d(4, 3, 3), nn.Conv1d(3, 5, 2), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.two(torch.relu(self.norm(self.one(x)))).tanh().flatten(2)
        return self.out(self.line(hidden).mean(dim=-1))


class Perceptron(nn.Module):
    """A perceptron with parameters that belong to no submodule."""

    def __init__(self):
        super().__init__()
        self.token, self.gain = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(6))
        self.one, self.layer_norm, self.out = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer_norm(self.one(x + self.token) * (1 + self.gain)).tanh())


def vision() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, image_size=8, patch_size=4,
        num_labels=3,
    ))  # fmt: skip


Batch = dict[str, Tensor] | Tensor
# Models that read no text: a constructor, the shape of an example, modules trained in full, modules to adapt if not
# "all".
OTHERS = {
    "vit": (vision, (3, 8, 8), ["classifier"], None),
    # Running statistics are only saved if the norm is trained in full.
    "cnn": (Convolutional, (2, 8, 8), ["out", "norm"], ["one", "two", "line"]),
    "mlp": (Perceptron, (4,), ["out"], None),
}


def case(family: str, options: str) -> tuple[nn.Module, Batch, PropulsionConfig]:
    """A float64 model, a batch for it, and the modules to adapt."""
    if family in FAMILIES:
        return classifier(family), batch_for(family), PropulsionConfig(**OPTIONS[options], task_type="SEQ_CLS")
    make, shape, heads, targets = OTHERS[family]
    torch.manual_seed(0)
    model, x = randomized(make().double()).train(), torch.randn(4, *shape, dtype=torch.float64)
    fields = {**OPTIONS[options], "modules_to_save": heads}
    if targets:
        fields = {**fields, "positions": None, "target_modules": targets}
    return model, {"pixel_values": x} if family == "vit" else x, PropulsionConfig(**fields)


def call(model: nn.Module, batch: Batch) -> Tensor:
    output = model(batch) if isinstance(batch, Tensor) else model(**batch)
    return getattr(output, "logits", output)


def outputs(model: nn.Module, batch: Batch) -> Tensor:
    model.eval()
    with torch.no_grad():
        return call(model, batch)


def trained(model: nn.Module, batch: Batch, steps: int = 2) -> nn.Module:
    model.train()
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(chosen, lr=2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = call(model, batch)
        nn.functional.cross_entropy(logits, torch.arange(len(logits)) % 3).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_life_of_an_adapter(family, options, tmp_path):
    base, batch, config = case(family, options)
    plain = outputs(base, batch)
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = get_peft_model(copy.deepcopy(base), config)
    torch.testing.assert_close(outputs(model, batch), plain, rtol=1e-10, atol=1e-12)

    trained(model, batch)
    output = outputs(model, batch)
    assert not torch.equal(output, plain)
    frozen = dict(model.get_base_model().named_parameters())
    for name, p in frozen.items():
        if not p.requires_grad and "original_module" not in name:
            bare = name.replace("base_layer.", "")
            assert torch.equal(p, weights[bare]), name

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(outputs(loaded, batch), output)

    model.merge_adapter(safe_merge=True)
    # Norms of these families compute in float32, merged or not.
    single = family in ("gemma2", "gemma3", "t5", "llama", "mistral", "qwen2", "qwen3", "mixtral") and "norm" in options
    precision = 1e-5 if single else 1e-10
    size = float(output.abs().max())
    torch.testing.assert_close(outputs(model, batch), output, rtol=0, atol=precision * size)
    model.unmerge_adapter()
    assert torch.equal(outputs(model, batch), output)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(outputs(merged, batch), output, rtol=0, atol=precision * size)

    model.add_adapter("second", case(family, options)[2])
    model.set_adapter("second")
    torch.testing.assert_close(outputs(model, batch), plain, rtol=1e-10, atol=1e-12)
    model.delete_adapter("default")
    assert not any(name.endswith(".default") and "propulsion" in name for name, _ in model.named_parameters())


def test_peft_finds_the_base_model_by_itself(tmp_path):
    base, batch = classifier("bert"), batch_for("bert")
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        type(base).from_pretrained(tmp_path / "base"), PropulsionConfig(positions="attn", task_type="SEQ_CLS")
    )
    trained(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(outputs(loaded, batch), outputs(model, batch))
    meta = PeftModel.from_pretrained(
        type(base).from_pretrained(tmp_path / "base"), tmp_path / "adapter", low_cpu_mem_usage=True
    )
    assert torch.equal(outputs(meta, batch), outputs(model, batch))


def test_transformers_own_adapter_methods(tmp_path):
    base, batch = classifier("bert"), batch_for("bert")
    plain = outputs(base, batch)
    base.add_adapter(PropulsionConfig(degree=3, positions="attn"), adapter_name="mine")
    assert torch.equal(outputs(base, batch), plain)
    with torch.no_grad():
        for name, p in base.named_parameters():
            if "propulsion_z" in name:
                p += 0.1
    output = outputs(base, batch)
    assert not torch.equal(output, plain)
    base.save_pretrained(tmp_path)
    other = classifier("bert")
    other.load_adapter(str(tmp_path), adapter_name="mine")
    assert torch.equal(outputs(other, batch), output)
    base.disable_adapters()
    assert torch.equal(outputs(base, batch), plain)
    base.enable_adapters()
    base.delete_adapter("mine")
    assert torch.equal(outputs(base, batch), plain)


def test_gradient_checkpointing_gives_the_same_gradients():
    base, batch = classifier("llama"), batch_for("llama")
    found = []
    for checkpointing in (False, True):
        model = get_peft_model(copy.deepcopy(base), PropulsionConfig(degree=3, task_type="SEQ_CLS")).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        model(**batch).logits.square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-10, atol=1e-12)


def test_compiled_training_gives_the_same_gradients(no_shape_checks):
    torch._dynamo.reset()
    base, batch = classifier("bert"), batch_for("bert")
    model = get_peft_model(base, PropulsionConfig(degree=3, positions="attn")).eval()
    model(**batch).logits.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.compile(model, backend="aot_eager")(**batch).logits.square().sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-8, atol=1e-10)
