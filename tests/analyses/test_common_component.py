"""The split of kernels by the mean activation, compared with features from plain autograd for each example."""

import pytest
import torch
from cases import autograd_kernel, batch, classifier, relative_error

import ntk
from analyses.peft_kernels.mean_split import mean_inputs, split_methods

EXACT = 1e-10


def plain(model, inputs):
    """Inputs, outputs and output gradients of the backbone's linear layers, by hooks: layer -> example -> (x, y, g)."""
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith("bert.")}
    seen = {name: [] for name in linear}
    model.eval()
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        held = {}

        def hook(name, held=held):
            return lambda module, arguments, output: held.__setitem__(name, (arguments[0], output))

        handles = [m.register_forward_hook(hook(name)) for name, m in linear.items()]
        real = mask.bool()
        logits = model(input_ids=ids[real][None], attention_mask=mask[real][None]).logits[0]
        for handle in handles:
            handle.remove()
        for name, (x, y) in held.items():
            rows = [torch.autograd.grad(v, y, retain_graph=True)[0].flatten(0, -2) for v in logits]
            seen[name].append((x.detach().flatten(0, -2), y.detach().flatten(0, -2), torch.stack(rows)))
    return linear, seen


def expected(model, inputs):
    """Every kernel of the split, computed from its definition."""
    linear, seen = plain(model, inputs)
    total = {}
    for name, module in linear.items():
        weight, bias = module.weight.detach(), module.bias.detach()
        mean = torch.cat([x for x, _, _ in seen[name]]).mean(0)
        features = {}
        for x, y, g in seen[name]:
            parts = {"whole": (x, y), "common": (mean.expand_as(x), (weight @ mean + bias).expand_as(y)),
                     "residual": (x - mean, (x - mean) @ weight.T)}  # fmt: skip
            for part, (a, v) in parts.items():
                features.setdefault(f"full, {part}", []).append(torch.einsum("ctr,ts->crs", g, a).flatten(1))
                features.setdefault(f"Propulsion, {part}", []).append((g * v).sum(1))
            features.setdefault("BitFit", []).append(g.sum(1))
        for key, rows in features.items():
            J = torch.stack(rows)
            total[key] = total.get(key, 0) + torch.einsum("iap,jbp->ijab", J, J)
    return total


@pytest.fixture(scope="module")
def kernels():
    model, inputs = classifier("bert"), batch()
    return model, inputs, ntk.adapter_kernels(model, inputs, split_methods(mean_inputs(model, inputs)))


def test_every_part_is_what_its_definition_says(kernels):
    model, inputs, found = kernels
    by_definition = expected(model, inputs)
    assert found.keys() == by_definition.keys()
    for key, kernel in by_definition.items():
        assert relative_error(found[key], kernel) <= EXACT, key


def test_the_whole_is_the_kernel_of_the_weights(kernels):
    model, inputs, found = kernels
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "classifier"}
    weights = autograd_kernel(model, inputs, params=lambda name, p: name in linear)
    assert relative_error(found["full, whole"], weights) <= EXACT


def test_padding_has_no_part_in_the_means():
    model = classifier("bert")
    means, wider = mean_inputs(model, batch()), mean_inputs(model, batch(extra=3))
    for name, mean in means.items():
        torch.testing.assert_close(wider[name], mean, rtol=1e-12, atol=1e-12)
