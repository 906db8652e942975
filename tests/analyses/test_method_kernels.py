"""Kernels of methods by their names in training, compared with the kernels of peft's models."""

import copy

import pytest
import torch

import ntk
from analyses.subjects.trained_methods import HEAD, tangents, with_head
from propulsion.errors import UserError
from propulsion.methods import Method, apply_method
from propulsion.pretrained import load_classifier
from propulsion.training.learning_rates import HEAD_RATE, SCALE_RATE

TEXTS = (
    "full", "propulsion:positions=all", "propulsion:positions=attn,degree=4", "lora:r=2", "bitfit", "ia3", "head",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_classifier(str(tiny_model), num_labels=2, seed=1, dtype=torch.float64)[0]


@pytest.fixture(scope="module")
def inputs():
    ids = torch.randint(5, 200, (4, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_every_method_has_the_kernel_of_the_model_it_trains(model, inputs):
    methods = {text: Method.parse(text) for text in TEXTS}
    found = tangents(model, methods, task_type="SEQ_CLS", seed=3, degree=3)
    margin = ntk.outputs.margin()
    kernels = with_head(ntk.adapter_kernels(model, inputs, found.methods, output=margin), TEXTS)
    for text, method in methods.items():
        trained = apply_method(copy.deepcopy(model), method.with_defaults(degree=3), task_type="SEQ_CLS", seed=3)
        expected = ntk.empirical_ntk(
            trained.double(), inputs, params="trainable", output=ntk.outputs.margin(), method="jacobian"
        )
        torch.testing.assert_close(kernels[text], expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    assert found.rates["propulsion:positions=all"] == {"body": pytest.approx(SCALE_RATE / 3), HEAD: HEAD_RATE}


def test_rates_weigh_the_head(model, inputs):
    found = tangents(model, {"full": Method("full")}, task_type="SEQ_CLS")
    kernels = ntk.adapter_kernels(model, inputs, found.methods)
    weight = found.rates["full"][HEAD] / found.rates["full"]["body"]
    assert weight == pytest.approx(10)
    torch.testing.assert_close(
        with_head(kernels, ["full"], found.rates)["full"], kernels["full"] + weight * kernels[HEAD]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prefix_tuning", "no tangent kernel here"),
        ("lora:use_dora=true", "only plain LoRA"),
        ("propulsion:vectors=2", "one vector a layer"),
    ],
)
def test_methods_without_a_kernel_are_refused(model, text, message):
    with pytest.raises(UserError, match=message):
        tangents(model, {text: Method.parse(text)}, task_type="SEQ_CLS")
