"""Methods by name: all have the same head and data order, each trains its own parameters, mistakes give one line."""

import pytest
import torch
from architectures import build
from peft import PeftModel
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from propulsion.data import load_task_data
from propulsion.errors import UserError
from propulsion.methods import Method, apply_method, head_modules, method_names, parse_options, trainable_parameters
from propulsion.positions import is_norm
from propulsion.pretrained import load_classifier
from propulsion.training import TrainingOptions, train
from propulsion.training.learning_rates import BIAS_RATE, Rates, parameter_groups

METHODS = ["full", "bitfit", "head", "propulsion:degree=2", "propulsion:positions=attn", "lora:r=2", "ia3", "loha:r=2",
           "prefix_tuning", "p_tuning", "adalora", "vera:r=4", "ln_tuning"]  # fmt: skip


def adapted(folder, text, seed=0):
    model, tokenizer = load_classifier(folder, num_labels=2, seed=seed)
    return apply_method(model, Method.parse(text), task_type="SEQ_CLS", seed=seed), tokenizer


def head_of(model):
    found = {name.split(".")[-1]: p for name, p in model.named_parameters() if "classifier" in name and p.requires_grad}
    assert found.keys() == {"weight", "bias"}
    return found


@pytest.mark.parametrize("text", METHODS)
def test_the_head_does_not_depend_on_the_method(tiny_models, text):
    reference = head_of(adapted(tiny_models["SEQ_CLS"], "head")[0])
    found = head_of(adapted(tiny_models["SEQ_CLS"], text)[0])
    assert all(torch.equal(found[name], reference[name]) for name in reference)
    other = head_of(adapted(tiny_models["SEQ_CLS"], text, seed=1)[0])
    assert not torch.equal(other["weight"], reference["weight"])


@pytest.mark.parametrize("text", METHODS)
def test_a_method_draws_from_its_seed_alone(tiny_models, text):
    runs = []
    for disturb in (0, 1):
        torch.manual_seed(disturb)
        state = torch.get_rng_state()
        runs.append(adapted(tiny_models["SEQ_CLS"], text)[0].state_dict())
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_all_methods_see_the_same_rows_in_the_same_order(tiny_models):
    data = load_task_data("demo", n_train=12, n_validation=4)
    orders = {}
    for text in METHODS:
        model, tokenizer = adapted(tiny_models["SEQ_CLS"], text)
        seen = orders.setdefault(text, [])
        model.register_forward_pre_hook(
            lambda m, a, k, seen=seen: seen.append(k["input_ids"].tolist()), with_kwargs=True
        )
        train(
            model,
            tokenizer,
            data,
            TrainingOptions(max_steps=5, per_device_train_batch_size=4, learning_rate=None, head_learning_rate=None),
            progress=False,
        )
    assert all(order == orders["full"] for order in orders.values())


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "gpt2", "llama", "t5"])
def test_norms_are_tuned_on_every_architecture(family):
    model = build(family)
    norms = {name for name, module in model.named_modules() if is_norm(module)}
    adapted = apply_method(model, Method("ln_tuning"), task_type="FEATURE_EXTRACTION")
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name.removeprefix("base_model.model.").partition(".ln_tuning_layers")[0] for name in trained} == norms


def test_what_our_own_methods_train(tiny_models):
    def trained(text):
        model, _ = adapted(tiny_models["SEQ_CLS"], text)
        return {name for name, p in model.named_parameters() if p.requires_grad}, model

    everything, model = trained("full")
    assert everything == dict(model.named_parameters()).keys()
    head, _ = trained("head")
    assert head == {"classifier.weight", "classifier.bias"}
    biases, model = trained("bitfit")
    assert biases == {name for name in everything if name.endswith("bias")} | head
    assert {g["role"]: g["lr"] for g in parameter_groups(model, rates=Rates(), weight_decay=0)}["bias"] == BIAS_RATE
    assert trained("none")[0] == set()


def test_options_reach_the_method(tiny_models):
    model, _ = adapted(tiny_models["SEQ_CLS"], "lora:r=3,target_modules=query+value,use_rslora=true")
    config = model.peft_config["default"]
    assert (config.r, config.target_modules, config.use_rslora) == (3, {"query", "value"}, True)
    model, _ = adapted(tiny_models["SEQ_CLS"], "propulsion:vectors=3,pooling=max,degree=0.5")
    config = model.peft_config["default"]
    assert (config.vectors, config.pooling, config.degree) == (3, "max", 0.5)


def test_a_head_of_two_modules_is_trained_whole():
    """DeBERTa's pooler is outside the backbone and starts at random, and peft does not count it as part of the head."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = DebertaV2ForSequenceClassification(DebertaV2Config(vocab_size=50, **sizes))
    assert head_modules(model) == ["pooler", "classifier"]
    adapted = apply_method(model, Method("propulsion", {"degree": 2}), task_type="SEQ_CLS")
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert any("pooler.modules_to_save" in name and "weight" in name for name in trained)
    assert any("classifier.modules_to_save" in name for name in trained)


# Methods that need options on such a small encoder, another task, or another kind of model.
NEED_MORE = {"adaption_prompt", "c3a", "cartridge", "cpt", "ln_tuning", "miss", "multitask_prompt_tuning", "poly",
             "road", "shadow", "shira", "trainable_tokens", "vblora", "waveft", "xlora"}  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(method_names()) - NEED_MORE - {"full", "bitfit", "head", "none"}))
def test_every_method_of_peft_trains_by_its_name(tiny_models, name):
    model, _ = adapted(tiny_models["SEQ_CLS"], name)
    assert isinstance(model, PeftModel)
    ids = torch.randint(5, 100, (2, 6))
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([0, 1])).loss.backward()
    assert trainable_parameters(model) > 66
    assert head_of(model)["weight"].grad is not None


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("ln_tuning", "target_modules=LayerNorm+"), ("miss", "r=4"), ("road", "group_size=4"),
        ("shira", "r=2"), ("c3a", "block_size=8"), ("vblora", "vector_length=8"), ("waveft", "n_frequency=9"),
    ],
)  # fmt: skip
def test_methods_that_need_an_option(tiny_models, text, options):
    assert trainable_parameters(adapted(tiny_models["SEQ_CLS"], f"{text}:{options}")[0]) > 66


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lorra", "unknown method 'lorra' .did you mean lora.*: the methods are full, bitfit, head, none, adalora"),
        ("lora:rank=2", "method lora has no option rank; its options: .*r,"),
        ("full:r=2", "method full has no option r; its options: none"),
        ("lora:r", "'r' is not of the form OPTION=VALUE"),
        ("lora:task_type=CAUSAL_LM", "option task_type follows from the task"),
        ("lora:r=abc", "method lora, with r=abc, cannot be used here"),
        ("lora:r=0", "method lora, with r=0, cannot be used here: .*r.*"),
        (
            "lora:target_modules=nowhere",
            "method lora, with target_modules=nowhere, cannot be used here: .*target_modules",
        ),
        ("propulsion:degree=-1", "method propulsion, with degree=-1, cannot be used here: degree must be"),
        ("cpt", "method cpt cannot be used here: .*CAUSAL_LM"),
    ],
)
def test_mistakes(tiny_models, text, message):
    with pytest.raises(UserError, match=message) as caught:
        adapted(tiny_models["SEQ_CLS"], text)
    assert "\n" not in str(caught.value)


def test_models_without_biases_or_heads():
    with pytest.raises(UserError, match="has no bias to train"):
        apply_method(build("llama"), Method("bitfit"), task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="has no head of its own to train"):
        apply_method(build("llama"), Method("head"), task_type="CAUSAL_LM")


def test_values_of_options():
    texts = ["a=1", "b=true", "c=x+y", "d=[1, 2]", "e=None", "f-g=text", "h=x+", r"i=.*\d+\.query"]
    assert parse_options(texts) == {
        "a": 1, "b": True, "c": ["x", "y"], "d": [1, 2], "e": None, "f_g": "text", "h": ["x"], "i": r".*\d+\.query",
    }  # fmt: skip
