"""The kernel of Propulsion's adapter against the formula u_j = k z_j^(k-1) sum_t g_tj v_tj, computed with hooks."""

import pytest
import torch
from cases import CONFIGS, batch, classifier, relative_error, rows
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import ntk
from propulsion import PropulsionConfig

EXACT = 1e-12


def features(model: nn.Module, inputs, degree: float, scales: dict[str, torch.Tensor]) -> torch.Tensor:
    """Features u (n, c, m) of every adapted layer, without padding, for one example and output at a time.

    g is the gradient at the scaled output y = z^k v, and v is the output before scaling.
    """
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def scaled(name):
        def hook(module, args, v):
            y = scales[name] ** degree * v
            y.retain_grad()
            seen[name] = (v, y)
            return y

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(scaled(name)) for name in scales]
    model.eval()
    examples = []
    for i in range(len(inputs["input_ids"])):
        one = rows(inputs, slice(i, i + 1))
        real = one["attention_mask"].bool()[0]
        one = {key: value[:, real] for key, value in one.items()}
        outputs = []
        for c in range(model.config.num_labels):
            model.zero_grad()
            model(**one).logits[0, c].backward()
            outputs.append(
                torch.cat(
                    [
                        (
                            degree * z ** (degree - 1) * (seen[name][1].grad * seen[name][0]).flatten(0, -2).sum(0)
                        ).detach()
                        for name, z in scales.items()
                    ]
                )
            )
        examples.append(torch.stack(outputs))
    for hook in hooks:
        hook.remove()
    return torch.stack(examples)


def scaled_modules(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D, nn.Embedding))]


def width(module: nn.Module) -> int:
    return (
        module.embedding_dim if isinstance(module, nn.Embedding) else getattr(module, "nf", None) or module.out_features
    )


def adapter_kernel(family: str, degree: int, values: dict[str, torch.Tensor]) -> torch.Tensor:
    model = get_peft_model(classifier(family), PropulsionConfig(degree=degree, positions="all"))
    zs = {name: p for name, p in model.named_parameters() if "propulsion_z" in name}
    assert sum(p.requires_grad for p in model.parameters()) == len(zs) == len(values)
    with torch.no_grad():
        for name, z in values.items():
            zs[f"base_model.model.{name}.propulsion_z.default"].copy_(z)
    # z is always float32; it is converted to float64 only for the comparison.
    return ntk.empirical_ntk(model.double(), batch(), params="trainable", method="jacobian")


@pytest.mark.parametrize("degree", [1, 15])
@pytest.mark.parametrize("family", CONFIGS)
def test_at_z_equal_one_the_kernel_is_degree_squared_times_the_closed_form(family, degree):
    model = classifier(family)
    ones = {name: torch.ones(width(model.get_submodule(name)), dtype=torch.float64) for name in scaled_modules(model)}
    u = features(model, batch(), 1, ones)
    closed_form = torch.einsum("iap,jbp->ijab", u, u)
    assert relative_error(adapter_kernel(family, degree, ones), degree**2 * closed_form) <= EXACT


@pytest.mark.parametrize("family", CONFIGS)
def test_away_from_one_the_gradient_is_taken_at_the_scaled_output(family):
    model, degree = classifier(family), 3
    generator = torch.Generator().manual_seed(0)
    scales = {
        # These values are exact in float32, in which the adapter stores z.
        name: 1 + torch.randint(-8, 9, (width(model.get_submodule(name)),), generator=generator).double() / 64
        for name in scaled_modules(model)
    }
    u = features(model, batch(), degree, scales)
    closed_form = torch.einsum("iap,jbp->ijab", u, u)
    assert relative_error(adapter_kernel(family, degree, scales), closed_form) <= EXACT
