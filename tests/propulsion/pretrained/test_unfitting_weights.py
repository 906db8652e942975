"""Checkpoints whose weights do not fit their config.json: refused with what is missing or left over, unless allowed."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from propulsion.errors import UserError
from propulsion.pretrained import load_classifier, load_model

LAYER = "bert.encoder.layer.0.output.dense.weight"


@pytest.fixture
def checkpoint(tiny_model, tmp_path):
    """A copy that a test may change: a BERT of one layer."""
    return shutil.copytree(tiny_model, tmp_path / "checkpoint")


def set_config(**values):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


def set_weights(change):
    def apply(folder):
        file = folder / "model.safetensors"
        save_file({name: w.contiguous() for name, w in change(load_file(file)).items()}, file, {"format": "pt"})

    return apply


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


UNFITTING = {
    "another architecture": (set_config(model_type="gpt2", architectures=["GPT2Model"]), "no weight of GPT2"),
    "foreign names": (set_weights(lambda w: {f"x.{name.replace('e', 'q')}": v for name, v in w.items()}), "no weight"),
    "absent layers": (set_config(num_hidden_layers=3), r"missing: bert\.encoder\.layer\.1\..*, and 29 more"),
    "an absent weight": (set_weights(lambda w: {n: v for n, v in w.items() if n != LAYER}), f"missing: {LAYER}"),
    "layers left over": (set_config(num_hidden_layers=0), r"without a place in the model: bert\.encoder\.layer\.0"),
    "a negative number of layers": (set_config(num_hidden_layers=-1), r"without a place in the model: .* 13 more"),
    "a weight left over": (
        set_weights(lambda w: w | {"bert.encoder.layer.0.adapter.weight": torch.ones(4, 4)}),
        r"without a place in the model: bert\.encoder\.layer\.0\.adapter\.weight",
    ),
    "another shape": (set_config(intermediate_size=32), r"of another shape: .*intermediate"),
    "zeros": (set_weights(lambda w: {n: torch.zeros_like(v) for n, v in w.items()}), "all the same number"),
    "ones": (set_weights(lambda w: {n: torch.ones_like(v) for n, v in w.items()}), "all the same number"),
    "too few embeddings": (
        both(
            set_config(vocab_size=100),
            set_weights(lambda w: {n: v[:100] if "word_embeddings" in n else v for n, v in w.items()}),
        ),
        "token ids up to 30521, and the model has embeddings for ids below 100",
    ),
}


@pytest.mark.parametrize("case", UNFITTING)
def test_weights_that_do_not_fit_are_refused_unless_allowed(checkpoint, case):
    change, message = UNFITTING[case]
    change(checkpoint)
    with pytest.raises(
        UserError, match=rf"do not fit its config\.json: .*{message}.*allow_unfitting_weights"
    ) as caught:
        load_classifier(checkpoint, num_labels=2)
    assert "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match=message):
        load_classifier(checkpoint, num_labels=2, allow_unfitting_weights=True)


FITTING = {
    "no head": set_weights(lambda w: {n: v for n, v in w.items() if not n.startswith("classifier")}),
    "the head of pre-training": set_weights(lambda w: w | {"cls.predictions.bias": torch.zeros(9)}),
    "names without the body's prefix": set_weights(lambda w: {n.removeprefix("bert."): v for n, v in w.items()}),
    "a causal mask": set_weights(lambda w: w | {"bert.encoder.mask": torch.ones(1, 1, 4, 4)}),
    "positions": set_weights(lambda w: w | {"bert.embeddings.places": torch.arange(64)[None]}),
}


@pytest.mark.parametrize("case", FITTING)
def test_what_a_classifier_does_not_need_may_differ(checkpoint, case):
    FITTING[case](checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_classifier(checkpoint, num_labels=2)


def test_a_new_pooler_is_fine(checkpoint):
    set_weights(lambda w: {n: v for n, v in w.items() if "pooler" not in n})(checkpoint)
    with pytest.warns(UserWarning, match=r"lacks weights, which start at random: bert\.pooler"):
        load_classifier(checkpoint, num_labels=2)


@pytest.mark.parametrize(
    ("task_type", "absent"),
    [("CAUSAL_LM", "lm_head.weight"), ("SEQ_2_SEQ_LM", "decoder.layers.0.fc1.weight"),
     ("TOKEN_CLS", "encoder.layer.0.output.dense.weight")],
)  # fmt: skip
def test_models_that_write_need_their_own_head_too(tiny_models, tmp_path, task_type, absent):
    folder = shutil.copytree(tiny_models[task_type], tmp_path / "model")
    set_weights(lambda w: {n: v for n, v in w.items() if not n.endswith(absent)})(folder)
    with pytest.raises(UserError, match=f"missing: .*{absent}"):
        load_model(folder, task_type=task_type)
