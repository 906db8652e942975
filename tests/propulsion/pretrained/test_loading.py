"""Loading a classifier: the seed determines the head, global state stays, bad checkpoints give one clear line."""

import json
import random
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from propulsion.errors import UserError
from propulsion.pretrained import fingerprint, load_classifier, load_model


@pytest.fixture
def checkpoint(tiny_model, tmp_path):
    """A copy of a checkpoint that a test may damage."""
    return shutil.copytree(tiny_model, tmp_path / "checkpoint")


def test_the_packaged_model_is_the_default():
    model, tokenizer = load_classifier(num_labels=2)
    assert model.config.num_labels == 2
    assert 22_000_000 < model.num_parameters() < 23_000_000
    assert tokenizer.model_max_length <= model.config.max_position_embeddings
    assert not model.training


def headless(folder):
    """Remove the head, as in a pre-trained checkpoint."""
    weights = load_file(folder / "model.safetensors")
    save_file({name: w for name, w in weights.items() if not name.startswith("classifier")},
              folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    return folder


def test_the_head_follows_its_seed_and_nothing_else(checkpoint):
    headless(checkpoint)
    heads = []
    for before, seed in ((0, 3), (1, 3), (1, 4)):
        torch.manual_seed(before)
        heads.append(load_classifier(checkpoint, num_labels=2, seed=seed)[0].classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])


def test_global_random_states_are_untouched(checkpoint):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002

    before = states()
    load_classifier(headless(checkpoint), num_labels=2)
    assert states() == before


def test_float64_is_float32_widened(checkpoint):
    narrow, wide = (
        load_classifier(headless(checkpoint), num_labels=2, dtype=t)[0] for t in (torch.float32, torch.float64)
    )
    for p, q in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert q.dtype == torch.float64
        assert torch.equal(p.double(), q)


def test_loading_says_nothing(checkpoint, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_classifier(headless(checkpoint), num_labels=2)
    assert capfd.readouterr() == ("", "")


def test_a_head_of_another_size_is_replaced_with_a_warning(checkpoint):
    with pytest.warns(UserWarning, match="has another size and was replaced"):
        model, _ = load_classifier(checkpoint, num_labels=3)
    assert model.classifier.out_features == 3


def test_one_label_is_a_regression(checkpoint):
    model, _ = load_classifier(headless(checkpoint), num_labels=1)
    assert model.config.problem_type == "regression"


def test_decoders_pad_with_their_end_of_text(tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.eos_token, tokenizer.pad_token = "[SEP]", None
    GPT2ForSequenceClassification(
        GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=32, vocab_size=len(tokenizer))
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_classifier(tmp_path, num_labels=2)
    assert tokenizer.pad_token == "[SEP]"
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.model_max_length == 32


def test_roberta_takes_two_tokens_fewer_than_it_has_positions(tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.model_max_length = 10**6
    RobertaForSequenceClassification(
        RobertaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
                      vocab_size=len(tokenizer), max_position_embeddings=34, pad_token_id=1)
    ).save_pretrained(tmp_path)  # fmt: skip
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_classifier(tmp_path, num_labels=2)
    assert tokenizer.model_max_length == 32
    ids = torch.full((1, 32), 5)
    assert model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.isfinite().all()


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


WORDS = "bert.embeddings.word_embeddings.weight"


def test_damaged_weights_are_named(checkpoint):
    edit_weights(checkpoint, lambda weights: weights[WORDS][5].fill_(float("nan")))
    with pytest.raises(UserError, match=f"not finite in {WORDS}: the checkpoint is damaged"):
        load_classifier(checkpoint, num_labels=2)


def test_weights_that_do_not_fit_the_configuration(checkpoint):
    edit_weights(checkpoint, lambda weights: weights.update({WORDS: weights[WORDS][:, :16].clone()}))
    with pytest.raises(UserError, match=f"do not fit its config.json: of another shape: {WORDS}"):
        load_classifier(checkpoint, num_labels=2)


def test_absent_body_weights_are_reported(checkpoint):
    edit_weights(checkpoint, lambda weights: weights.pop(WORDS))
    with pytest.warns(UserWarning, match=f"lacks weights, which start at random: {WORDS}"):
        load_classifier(checkpoint, num_labels=2, allow_unfitting_weights=True)
    with pytest.raises(UserError, match=f"missing: {WORDS}"):
        load_classifier(checkpoint, num_labels=2)


def test_cut_off_weights_file(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load the weights of") as caught:
        load_classifier(checkpoint, num_labels=2)
    assert "\n" not in str(caught.value)


def remove(folder, *names):
    for path in folder.iterdir():
        if path.name in names or any(path.name.startswith(name) for name in names):
            path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: remove(folder, "model.safetensors"), "cannot load the weights of"),
        (lambda folder: remove(folder, "config.json"), "cannot load a model from folder"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
        (lambda folder: remove(folder, "tokenizer", "vocab"), "cannot load a tokenizer of"),
    ],
)
def test_incomplete_folders(checkpoint, damage, message):
    damage(checkpoint)
    with pytest.raises(UserError, match=message) as caught:
        load_classifier(checkpoint, num_labels=2)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_neither_folder_nor_reachable():
    with pytest.raises(UserError, match="'no-such/model': there is no such folder, and the Hugging Face hub"):
        load_classifier("no-such/model", num_labels=2)


def test_an_architecture_without_a_classifier(checkpoint):
    (checkpoint / "config.json").write_text(json.dumps({"model_type": CLIPConfig.model_type.replace("clip", "vits")}))
    with pytest.raises(UserError, match="of type 'vits', for which transformers has no sequence classifier"):
        load_classifier(checkpoint, num_labels=2)


def test_gguf_files_that_are_not_there_or_not_gguf(tmp_path):
    with pytest.raises(UserError, match=r"model file .*model.gguf does not exist"):
        load_model(tmp_path / "model.gguf", task_type="CAUSAL_LM")
    (tmp_path / "model.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="cannot load a model from folder") as caught:
        load_model(tmp_path / "model.gguf", task_type="CAUSAL_LM")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM", "CAUSAL_LM"])
def test_fingerprints_tell_base_models_apart_and_nothing_else(tiny_models, task_type):
    first, again = (load_model(tiny_models[task_type], task_type=task_type, seed=seed)[0] for seed in (0, 1))
    assert fingerprint(first) == fingerprint(again)  # The head has no effect.
    next(iter(again.base_model.parameters())).data[0] += 1
    assert fingerprint(first) != fingerprint(again)
