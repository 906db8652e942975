"""A classifier's pooling: as its checkpoint declares, saved with it, exact in kernels, and always reported."""

import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file

import ntk
from propulsion import PooledClassifier, PropulsionConfig
from propulsion.errors import UserError
from propulsion.pretrained import fingerprint, load_classifier, load_model, pooling_of

TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}


def declare(folder, config, *, place="1_Pooling", more=(), kind="sentence_transformers.models.Pooling"):
    """Write the files in which sentence-transformers declares a checkpoint's pooling."""
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


@pytest.mark.parametrize(
    ("config", "kind", "named"),
    [
        ({"pooling_mode_max_tokens": True}, "sentence_transformers.models.Pooling", "max"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "x.Pooling", "cls with mean"),
        ({"pooling_mode": "weightedmean"}, "x.Pooling", "weightedmean"),
        ({"pooling_mode": "lasttoken"}, "x.Pooling", "lasttoken"),
        ({"pooling_mode_of_the_future": True}, "x.Pooling", "pooling_mode_of_the_future"),
        ({}, "sentence_transformers.sparse_encoder.models.SpladePooling", "SpladePooling"),
    ],
)
def test_a_pooling_that_there_is_not_is_said(encoder, config, kind, named):
    folder = declare(encoder, config, kind=kind)
    with pytest.raises(UserError, match=f"declares the pooling {named}, .*: mean, first, or pooler"):
        load_classifier(folder, num_labels=2)
    assert pooling_of(load_classifier(folder, num_labels=2, pooling="mean")[0]) == "mean"


def test_damaged_declarations_are_said(encoder):
    declare(encoder, MEAN)
    (encoder / "1_Pooling" / "config.json").unlink()
    with pytest.raises(UserError, match=r"declares a pooling, but 1_Pooling/config.json is missing"):
        load_classifier(encoder, num_labels=2)
    (encoder / "modules.json").write_text("[")
    with pytest.raises(UserError, match=r"cannot read modules.json"):
        load_classifier(encoder, num_labels=2)
    with pytest.raises(UserError, match="pooling is 'max', expected one of auto, mean, first, pooler"):
        load_classifier(encoder, num_labels=2, pooling="max")
    with pytest.raises(UserError, match="pooling mean is for classifiers"):
        load_model(encoder, task_type="TOKEN_CLS", pooling="mean")


def test_what_is_left_out_is_said(encoder):
    more = [{"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"}]
    with pytest.warns(UserWarning, match=r"left out: Dense \(2_Dense\)"):
        load_classifier(declare(encoder, MEAN, more=more), num_labels=2)


def test_without_a_declaration_it_is_transformers_own(encoder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _ = load_classifier(encoder, num_labels=2)
    assert isinstance(model, hf.BertForSequenceClassification)
    assert pooling_of(model) == "pooler"


# --- every family ---------------------------------------------------------------------------------------------------

FAMILIES = {
    "bert": hf.BertConfig(**SIZES),
    "roberta": hf.RobertaConfig(**SIZES, pad_token_id=1),
    "mpnet": hf.MPNetConfig(**SIZES),
    "distilbert": hf.DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=64),
    "electra": hf.ElectraConfig(**SIZES, embedding_size=32),
    "albert": hf.AlbertConfig(**SIZES, embedding_size=16),
    "deberta-v2": hf.DebertaV2Config(**SIZES),
    "squeezebert": hf.SqueezeBertConfig(**SIZES, embedding_size=32, q_groups=1, k_groups=1, v_groups=1,
                                        post_attention_groups=1, intermediate_groups=1, output_groups=1),
    "modernbert": hf.ModernBertConfig(**SIZES, pad_token_id=0, cls_token_id=1, bos_token_id=1, sep_token_id=2,
                                      eos_token_id=2),
    "gpt2": hf.GPT2Config(n_embd=32, n_layer=1, n_head=2),
    "t5": hf.T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_decoder_layers=1, num_heads=2),
}  # fmt: skip


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_pools_and_padding_does_not_enter(family, pooling, tiny_model, tmp_path):
    config, tokenizer = FAMILIES[family], hf.AutoTokenizer.from_pretrained(tiny_model)
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    hf.AutoModel.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_classifier(tmp_path, num_labels=3, pooling=pooling, dtype=torch.float64)
    assert model.config.model_type == family
    rows = {n: v for n, v in batch(tokenizer).items() if n != "token_type_ids"}
    together = model(**rows).logits
    for row in range(3):
        real = {name: values[row : row + 1, : rows["attention_mask"][row].sum()] for name, values in rows.items()}
        torch.testing.assert_close(model(**real).logits, together[row : row + 1], rtol=1e-9, atol=1e-12)
        states = model.base_model(**real).last_hidden_state
        pooled = states.mean(dim=1) if pooling == "mean" else states[:, 0]
        torch.testing.assert_close(model.classifier(pooled), together[row : row + 1], rtol=1e-9, atol=1e-12)
    together.sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta-v2"])
def test_a_saved_model_loads_where_this_package_is_imported_and_says_so_where_not(family, tiny_model, tmp_path):
    config, tokenizer = FAMILIES[family], hf.AutoTokenizer.from_pretrained(tiny_model)
    config.vocab_size = len(tokenizer)
    hf.AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model, tokenizer = load_classifier(tmp_path / "base", num_labels=3, pooling="mean")
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    rows = {n: v for n, v in batch(tokenizer).items() if n != "token_type_ids"}
    expected = model(**rows).logits
    for again in (
        hf.AutoModelForSequenceClassification.from_pretrained(saved),
        load_classifier(saved, num_labels=3)[0],
        load_classifier(saved, num_labels=3, pooling="mean")[0],
    ):
        assert isinstance(again, PooledClassifier)
        assert torch.equal(again.eval()(**rows).logits, expected)
        assert fingerprint(again) == fingerprint(model)
    with pytest.raises(UserError, match="was trained and saved with pooling mean"):
        load_classifier(saved, num_labels=3, pooling="pooler")
    with pytest.warns(UserWarning, match="has another size and was replaced"):
        assert load_classifier(saved, num_labels=2)[0].config.num_labels == 2


def test_plain_transformers_refuses_or_runs_the_saved_code(encoder, tmp_path):
    model, tokenizer = load_classifier(encoder, num_labels=2, pooling="first")
    model.save_pretrained(tmp_path / "saved")
    torch.save((dict(batch(tokenizer)), model(**batch(tokenizer)).logits), tmp_path / "expected.pt")
    code = """
import sys, torch, transformers as hf
rows, expected = torch.load(sys.argv[2])
try:
    hf.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
except ValueError as error:
    assert "trust_remote_code" in str(error)
    model = hf.AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
    assert torch.equal(model(**rows).logits, expected) and "propulsion" not in sys.modules
    print("refused, then the same")
"""
    arguments = [sys.executable, "-c", code, str(tmp_path / "saved"), str(tmp_path / "expected.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
                          cwd=tmp_path)  # fmt: skip
    assert done.stdout.endswith("refused, then the same\n"), done.stderr


# --- kernels and adapters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_kernels_are_exact(encoder, pooling):
    model, tokenizer = load_classifier(encoder, num_labels=2, pooling=pooling, dtype=torch.float64)
    rows = batch(tokenizer)
    expected = ntk.layer_kernels(model, rows, method="jacobian")
    found = ntk.layer_kernels(model, rows, method="structured")
    for name, kernel in expected.items():
        torch.testing.assert_close(found[name], kernel, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("config", [LoraConfig(task_type=TaskType.SEQ_CLS), PropulsionConfig(task_type="SEQ_CLS")])
def test_peft_finds_the_head_and_another_model_is_not_silent(encoder, tmp_path, config):
    model, tokenizer = load_classifier(encoder, num_labels=2, pooling="mean")
    adapted = get_peft_model(model, config)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad and "classifier" in name]
    assert len(trained) == 2
    assert all("modules_to_save" in name for name in trained)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_classifier(encoder, num_labels=2, pooling="mean")[0], tmp_path / "adapter")
    rows = batch(tokenizer)
    assert torch.equal(again.eval()(**rows).logits, adapted.eval()(**rows).logits)
    with pytest.raises(KeyError, match="classifier"):
        PeftModel.from_pretrained(load_classifier(encoder, num_labels=2, pooling="pooler")[0], tmp_path / "adapter")


# --- untrained weights ----------------------------------------------------------------------------------------------


def put(folder, name, weight, bias):
    weights = load_file(folder / "model.safetensors")
    weights |= {f"{name}.weight": weight, f"{name}.bias": bias}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


GAUSSIAN = 0.02 * torch.randn(32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["pooler.dense", "cls.seq_relationship"])  # With and without BERT's own classifier.
def test_untrained_weights_are_told_by_their_values(encoder, name):
    declare(encoder, MEAN)
    put(encoder, name, GAUSSIAN, torch.zeros(32))
    with pytest.warns(UserWarning, match=rf"looks untrained: (bert\.)?{name}.weight \(Gaussian of std 0.02"):
        load_classifier(encoder, num_labels=2)
    learnt = GAUSSIAN + 0.02 * torch.outer(torch.randn(32), torch.ones(32))  # One direction has a larger scale.
    for weight, bias in ((GAUSSIAN, torch.full((32,), 1e-3)), (GAUSSIAN**3, torch.zeros(32)),
                         (learnt, torch.zeros(32))):  # fmt: skip
        put(encoder, name, weight, bias)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_classifier(encoder, num_labels=2)


def test_a_pooler_that_was_never_trained_is_said_where_it_is_read(encoder):
    put(encoder, "pooler.dense", GAUSSIAN, torch.zeros(32))
    for pooling in ("auto", "pooler"):
        with pytest.warns(UserWarning, match=r"read through weights that look untrained: bert.pooler.dense.weight"):
            load_classifier(encoder, num_labels=2, pooling=pooling)
