"""Sign-gradient kernels from features, compared with those from whole Jacobians."""

import copy

import peft
import pytest
import torch
from cases import batch, classifier, relative_error

import ntk
from ntk import adapters
from ntk.dynamics import kernel_regression, sign_gradient_kernel

EXACT = 1e-10


def jacobian(model, wanted, inputs):
    """Jacobian ``(n, c, P)`` by one backward pass for each example and output."""
    chosen = [p.requires_grad_() for name, p in model.named_parameters() if wanted(name)]
    rows = []
    for i in range(len(inputs["input_ids"])):
        logits = model(**{key: value[i : i + 1] for key, value in inputs.items()}).logits[0]
        gradients = [
            torch.autograd.grad(f, chosen, retain_graph=True, allow_unused=True, materialize_grads=True) for f in logits
        ]
        rows.append(torch.stack([torch.cat([g.flatten() for g in of_output]) for of_output in gradients]))
    return torch.stack(rows)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_full_fine_tuning(family):
    model, inputs = classifier(family).eval(), batch()
    biases = {} if family == "llama" else {"bias": adapters.BitFit()}
    found = ntk.sign_gradient_kernels(model, inputs, {"full": adapters.Full(), **biases})
    assert relative_error(found["full"], sign_gradient_kernel(jacobian(model, lambda name: True, inputs))) <= EXACT
    if biases:
        flat = jacobian(model, lambda name: name.endswith("bias"), inputs)
        assert relative_error(found["bias"], sign_gradient_kernel(flat)) <= EXACT


def test_an_adapter_beside_the_network_and_new_columns():
    model, inputs = classifier("bert").eval(), batch()
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["query", "output.dense"])
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).double().eval()
    layers = {n.removeprefix("base_model.model."): m for n, m in wrapped.named_modules() if hasattr(m, "lora_A")}
    a = {name: m.lora_A["default"].weight.detach() for name, m in layers.items()}
    method = adapters.LoRA(rank=3, alpha=6, modules=list(a), a=a)
    whole = sign_gradient_kernel(jacobian(wrapped, lambda name: "lora_B" in name, inputs))
    found = ntk.sign_gradient_kernels(model, inputs, {"it": method})["it"]
    assert relative_error(found, whole) <= EXACT
    fewer = {key: value[:2] for key, value in inputs.items()}
    found = ntk.sign_gradient_kernels(model, inputs, {"it": method}, fewer)["it"]
    assert relative_error(found, whole[:, :2]) <= EXACT


def test_it_is_a_kernel_of_its_own():
    model, inputs = classifier("bert").eval(), batch()
    signed = ntk.flatten(ntk.sign_gradient_kernels(model, inputs, {"full": adapters.Full()})["full"])
    assert (signed - signed.T).abs().max() > 1e-3 * signed.abs().max()
    assert (signed.diagonal() > 0).all()  # The diagonal is the sum of an example's absolute gradients.


def test_what_cannot_be_done_is_said():
    model, inputs = classifier("bert").eval(), batch()
    with pytest.raises(ValueError, match="a sign has no weight"):
        ntk.sign_gradient_kernels(model, inputs, {"mean": adapters.LoRA(rank=2, modules=["query"], a="expected")})
    with pytest.raises(MemoryError, match="use fewer examples"):
        ntk.sign_gradient_kernels(model, inputs, {"full": adapters.Full()}, memory_budget=20_000)


def test_regression_is_that_of_a_symmetric_kernel_where_the_kernel_is_symmetric():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(9, 20, dtype=torch.float64, generator=generator)
    kernel, y, f0 = features @ features.T, features[:, 0].sign(), features[:, 1]
    found = ntk.sign_gradient_regression(
        kernel[:6, :6], y[:6], f0[:6], cross=kernel[6:, :6], initial_cross=f0[6:], ridge=0.3
    )
    expected = kernel_regression(
        kernel[:6, :6], y[:6, None], f0[:6, None], cross=kernel[6:, :6], initial_cross=f0[6:, None], ridge=0.3
    )
    assert torch.allclose(found, expected[:, 0], rtol=1e-10)
    # Without ridge the predictions equal the targets, also for a kernel that is not symmetric.
    skew = features @ features.sign().T
    met = ntk.sign_gradient_regression(skew, y, f0, cross=skew, initial_cross=f0, ridge=0.0)
    assert torch.allclose(met, y, atol=1e-9)
    with pytest.raises(ValueError, match="ridge must be at least 0"):
        ntk.sign_gradient_regression(skew, y, f0, cross=skew, initial_cross=f0, ridge=-1.0)
    with pytest.raises(ValueError, match="expected kernels"):
        ntk.sign_gradient_regression(skew, y[:3], f0[:3], cross=skew, initial_cross=f0, ridge=0.1)
    with pytest.raises(ArithmeticError, match="larger ridge"):
        ntk.sign_gradient_regression(0 * skew, y, f0, cross=skew, initial_cross=f0, ridge=0.0)
