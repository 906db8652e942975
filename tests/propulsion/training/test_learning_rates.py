"""The learning rate and weight decay of each parameter."""

import gc
import re
import sys

import pytest
import torch
import transformers
from architectures import build, inputs
from peft import IA3Config, get_peft_model

from propulsion import PropulsionConfig
from propulsion.pretrained import load_classifier
from propulsion.training import apply_propulsion
from propulsion.training.learning_rates import ADAPTER_RATE, HEAD_RATE, SCALE_RATE, WEIGHT_RATE, Rates, parameter_groups
from propulsion.training_checks import TrapWarnings

optimizers = sys.modules["torch.optim.optimizer"]  # The package's function of this name hides the module.


@pytest.fixture
def model(tiny_model):
    return load_classifier(tiny_model, num_labels=2)[0]


def by_parameter(model, **kwargs):
    groups = parameter_groups(model, **{"rates": Rates(), "weight_decay": 0.1} | kwargs)
    found = {id(p): group for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)  # No parameter is in two groups.
    return {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found}


def test_full_fine_tuning(model):
    groups = by_parameter(model)
    assert groups.keys() == dict(model.named_parameters()).keys()
    for name, group in groups.items():
        head = name.startswith("classifier")
        assert (group["role"], group["lr"]) == (("head", HEAD_RATE) if head else ("weight", WEIGHT_RATE))
        # Biases and norms are vectors, and vectors are not decayed.
        assert group["weight_decay"] == (0 if name.endswith("bias") or "LayerNorm" in name else 0.1)


@pytest.mark.parametrize("degree", [1, 15])
def test_scales_follow_their_degree_and_do_not_decay(model, degree):
    groups = by_parameter(apply_propulsion(model, degree=degree))
    scales = {name: group for name, group in groups.items() if group["role"] == "scale"}
    heads = groups.keys() - scales.keys()
    assert scales
    assert {(g["lr"], g["weight_decay"]) for g in scales.values()} == {(SCALE_RATE / degree, 0.0)}
    assert {(groups[name]["role"], groups[name]["lr"]) for name in heads} == {("head", HEAD_RATE)}
    assert not any(name.endswith("base_layer.weight") for name in groups)


def test_other_adapters_have_their_own_rate(model):
    groups = by_parameter(get_peft_model(model, IA3Config(target_modules=["query"], feedforward_modules=[])))
    assert {(group["role"], group["lr"]) for group in groups.values()} == {("adapter", ADAPTER_RATE)}


def test_given_rates_are_taken_as_they_are(model):
    groups = by_parameter(apply_propulsion(model, degree=15), rates=Rates(body=0.5, head=0.25))
    assert {(group["role"], group["lr"]) for group in groups.values()} == {("scale", 0.5), ("head", 0.25)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 1e-3, "weight_decay": 0.01}, "weight decay 0.01 acts on z"),
        ({"lr": 0.05, "weight_decay": 0.0}, r"learning rate 0.05 at degree 15: one step may move a scale by 75%"),
        ({"lr": 1e-3, "weight_decay": 0.0}, None),
    ],
)
def test_known_traps_are_pointed_out(options, message, recwarn):
    model = get_peft_model(build("bert"), PropulsionConfig(degree=15, positions="attn"))
    recwarn.clear()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **options)
    TrapWarnings().on_train_begin(None, None, None, model=model, optimizer=optimizer)
    found = [str(w.message) for w in recwarn]
    assert len(found) == (message is not None)
    assert message is None or re.search(message, found[0])


def warm_up(name: str, optimizer):
    schedulers = torch.optim.lr_scheduler
    return {
        "lambda": lambda: schedulers.LambdaLR(optimizer, lambda step: step / 10),
        "linear": lambda: schedulers.LinearLR(optimizer, start_factor=1e-3, total_iters=10),
        "one cycle": lambda: schedulers.OneCycleLR(optimizer, max_lr=0.05, total_steps=10),
        "transformers": lambda: transformers.get_cosine_schedule_with_warmup(optimizer, 5, 10),
    }[name]()


@pytest.mark.parametrize("name", ["lambda", "linear", "one cycle", "transformers"])
def test_the_largest_rate_of_a_schedule_is_looked_at(name, recwarn):
    """The first step of a warm-up has a rate near 0."""
    model = get_peft_model(build("bert"), PropulsionConfig(degree=15, positions="attn")).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    warm_up(name, optimizer)
    assert optimizer.param_groups[0]["lr"] < 0.01
    recwarn.clear()
    TrapWarnings().on_train_begin(None, None, None, model=model, optimizer=optimizer)
    model(**inputs("bert")).logits.square().sum().backward()
    optimizer.step()
    found = [str(w.message) for w in recwarn if "scale" in str(w.message)]
    assert [text[:29] for text in found] == ["learning rate 0.05 at degree "] * 2


def test_a_rate_that_rises_by_hand_is_looked_at_when_it_is_too_large(recwarn):
    model = get_peft_model(build("bert"), PropulsionConfig(degree=15, positions="attn")).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.0)
    found = []
    for step in range(6):
        optimizer.param_groups[0]["lr"] = step * 0.005
        model(**inputs("bert")).logits.square().sum().backward()
        recwarn.clear()
        optimizer.step()
        found.append(len(recwarn))
    assert found == [0, 0, 0, 0, 1, 0]  # 15 * 0.02 is the first above a quarter; it warns once.


@pytest.mark.parametrize(
    ("optimizer", "options", "messages"),
    [
        (torch.optim.AdamW, {"lr": 1e-3}, ["weight decay 0.01 acts on z"]),  # The default of torch.
        (torch.optim.AdamW, {"lr": 0.05}, ["weight decay 0.01 acts on z", "one step may move a scale by 75%"]),
        (torch.optim.Adam, {"lr": 1e-3}, []),
        (torch.optim.SGD, {"lr": 0.05}, []),
    ],
)
def test_the_first_step_is_looked_at_without_asking(optimizer, options, messages, recwarn):
    others = set(optimizers._global_optimizer_pre_hooks)  # Of models of other tests.
    model = get_peft_model(build("bert"), PropulsionConfig(degree=15, positions="attn")).train()
    other = torch.nn.Linear(2, 2)
    chosen = optimizer([p for p in model.parameters() if p.requires_grad], **options)
    recwarn.clear()
    for step in range(3):
        model(**inputs("bert")).logits.square().sum().backward()
        if step == 0:
            torch.optim.AdamW(other.parameters()).step()  # This causes no warning.
        chosen.step()
        found = [str(w.message) for w in recwarn if "scale" in str(w.message)]
        assert len(found) == len(messages)
    assert all(re.search(message, text) for message, text in zip(messages, found, strict=True))
    del model, chosen
    gc.collect()
    assert set(optimizers._global_optimizer_pre_hooks) <= others
