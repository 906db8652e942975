"""What a classifier reads: the pooling that its checkpoint declares, saved with it, exact in kernels, never silent."""

import json
import shutil

import pytest

from propulsion.pretrained import load_classifier, pooling_of

TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}


def declare(folder, config, *, place="1_Pooling", more=(), kind="sentence_transformers.models.Pooling"):
    """Write what sentence-transformers writes beside a checkpoint."""
    modules = [TRANSFORMER, {"idx": 1, "name": "1", "path": place, "type": kind}, *more]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / place).mkdir(exist_ok=True)
    (folder / place / "config.json").write_text(json.dumps(config))
    return folder


MEAN = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture
def encoder(tiny_models, tmp_path):
    """A copy of a tiny BERT without a head, as a pre-trained checkpoint is; its biases are not zero."""
    return shutil.copytree(tiny_models["SEQ_CLS"], tmp_path / "encoder")


def batch(tokenizer):
    return tokenizer(["a good film", "bad", "not so very bad at all"], padding=True, return_tensors="pt")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MEAN, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": ["cls"]}, "first"),
        ({"word_embedding_dimension": 32}, "mean"),  # sentence-transformers' default.
    ],
)
def test_the_declared_pooling_is_the_default(encoder, config, expected):
    model, _ = load_classifier(declare(encoder, config, place="7_Another"), num_labels=2)
    assert pooling_of(model) == expected
    assert not any("pooler" in name for name, _ in model.named_parameters())


def test_the_packaged_model_is_read_by_its_mean():
    with pytest.warns(UserWarning, match=r"pooling mean.*Normalize.*untrained: bert.pooler.dense.weight \(Gaussian"):
        model, _ = load_classifier(num_labels=2)
    assert pooling_of(model) == "mean"
