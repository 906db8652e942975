"""Python code in a model's folder runs only if the caller trusts it, whatever is answered on the terminal."""

import json
import shutil

import pytest
from transformers import dynamic_module_utils

from propulsion.adapters import load_adapter
from propulsion.errors import UserError
from propulsion.pretrained import load_classifier, load_model

CODE = """
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

Path({marker!r}).write_text("ran")

class OwnConfig(BertConfig):
    model_type = "own-bert"

class OwnClassifier(BertForSequenceClassification):
    config_class = OwnConfig

class OwnTokenizer(BertTokenizerFast):
    pass

def generate(*args, **kwargs):
    pass
"""
MAPS = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnClassifier",
        "AutoModelForCausalLM": "own.OwnClassifier", "AutoModel": "own.OwnClassifier"}  # fmt: skip


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that the code writes; the terminal answers yes to every question."""
    monkeypatch.setattr("builtins.input", lambda *words: "y")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "ran"


def with_code(source, folder, marker, change, file="own.py"):
    shutil.copytree(source, folder)
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(CODE.format(marker=str(marker)))
    for name, values in change.items():
        content = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps(content))
    return folder


OWN_TYPE = {"config.json": {"model_type": "own-bert", "auto_map": MAPS}}


def test_a_model_of_its_own_type_needs_trust(tiny_model, tmp_path, marker):
    folder = with_code(tiny_model, tmp_path / "model", marker, OWN_TYPE)
    with pytest.raises(UserError, match=r"Python code .* pass trust_remote_code") as caught:
        load_classifier(folder, num_labels=2)
    assert not marker.exists()
    assert "\n" not in str(caught.value)
    model, _ = load_classifier(folder, num_labels=2, trust_remote_code=True)
    assert type(model).__name__ == "OwnClassifier"
    assert marker.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"config.json": {"auto_map": MAPS}},
        {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}}},
        {"tokenizer_config.json": {"tokenizer_class": "OwnTokenizer",
                                   "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}},
    ],
)  # fmt: skip
def test_code_beside_a_known_type_is_not_run(tiny_model, tmp_path, marker, change):
    folder = with_code(tiny_model, tmp_path / "model", marker, change)
    try:
        load_classifier(folder, num_labels=2)
    except UserError as error:
        assert "trust_remote_code" in str(error)  # noqa: PT017  Loading may also succeed, with the class it knows.
    assert not marker.exists()


def test_code_for_generation_is_not_run(tiny_decoder, tmp_path, marker):
    folder = with_code(tiny_decoder, tmp_path / "model", marker, {}, "custom_generate/generate.py")
    load_model(folder, task_type="CAUSAL_LM")
    assert not marker.exists()


def test_the_body_of_a_pooled_classifier_runs_no_code(tiny_model, tmp_path, marker):
    model, tokenizer = load_classifier(tiny_model, num_labels=2, pooling="mean")
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    body = {"config.json": {"body_config": config["body_config"] | {"auto_map": MAPS}}}
    load_classifier(with_code(tmp_path / "saved", tmp_path / "model", marker, body), num_labels=2)
    assert not marker.exists()


def test_an_adapter_runs_no_code(tiny_model, tmp_path, marker):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    own = {"peft_type": "LORA", "auto_mapping": {"base_model_class": "OwnClassifier", "parent_library": "own"}}
    (folder / "adapter_config.json").write_text(json.dumps(own))
    with pytest.raises(UserError, match=r"the adapter in .* does not fit this model"):
        load_adapter(load_classifier(tiny_model, num_labels=2)[0], folder)
    assert not marker.exists()
