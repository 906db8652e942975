"""peft_kernels on a tiny model: the content of its result, and messages for mistakes."""

import dataclasses
import re

import numpy as np
import pytest
import torch

import ntk
from analyses.peft_kernels import ANALYSIS, Config, run
from analyses.peft_kernels.analysis import STAGE
from analyses.peft_kernels.measures import label_kernel
from analyses.peft_kernels.methods import FULL, REFERENCE, MethodChoice
from analyses.peft_kernels.tables import summary
from analyses.records import load_result
from analyses.subjects.readout import Readout
from propulsion.data import draw_rows, load_task_data
from propulsion.errors import UserError
from propulsion.pretrained import load_classifier, load_model

CHOICE = MethodChoice(positions=("attn",), degrees=(15.0,), ranks=(1, 2), vera_rank=3, subset=5)


@pytest.fixture(scope="module")
def config(tiny_model, tmp_path_factory):
    return Config(
        model=str(tiny_model), n_examples=6, methods=CHOICE, top=2, null_draws=2, resamples=5, seeds=(3, 4),
        dtype="float64", output_dir=tmp_path_factory.mktemp("peft") / "result",
    )  # fmt: skip


@pytest.fixture(scope="module")
def result(config):
    return run(config)


def value(result, name, left=FULL, right=""):
    return result.metric(name, stage=STAGE, left=left, right=right).value


def seed_values(result, seed):
    rows = [row for row in result.tables["seed_values"] if row["seed"] == seed]
    return {(row["metric"], row["left"], row["right"]): row["value"] for row in rows}


def test_full_fine_tuning_is_the_kernel_of_the_backbone(config, result, tiny_model):
    model, _ = load_classifier(str(tiny_model), num_labels=2, seed=3, dtype=torch.float64)
    backbone = sum(p.numel() for name, p in model.named_parameters() if name.startswith("bert."))
    assert result.model["parameters"] - backbone == 32 * 2 + 2
    full, *parts = (result.arrays[f"{STAGE}.{name}"] for name in (FULL, "linear: full, whole", "BitFit", "norm tuning"))
    assert np.linalg.eigvalsh(full).min() > -1e-12 * np.trace(full)
    # Each of these kernels is over a part of the backbone's parameters.
    assert all(np.trace(part) < np.trace(full) for part in parts)


def test_the_degree_changes_the_size_alone(result):
    for metric in ("cka", "alignment", "eigenspace_overlap"):
        assert value(result, metric, right="Propulsion, degree 15") == pytest.approx(
            value(result, metric, right=REFERENCE), rel=1e-9
        )
    ratio = value(result, "trace_ratio", right=REFERENCE) / value(result, "trace_ratio", right="Propulsion, degree 15")
    assert ratio == pytest.approx(15**2)
    (row,) = result.tables["degree"]
    assert row["trace_ratio"] == pytest.approx(row["expected"]) == 225
    assert row["deviation"] < 1e-12
    by_seed = {seed: seed_values(result, seed) for seed in (3, 4)}
    for values in by_seed.values():
        assert values["k_star", FULL, REFERENCE] ** 2 == pytest.approx(values["trace_ratio", FULL, REFERENCE])


def test_every_method_has_every_metric_and_there_are_all_null_models(result):
    for name in (row["method"] for row in result.tables["methods"]):
        for metric in ("trace", "effective_rank"):
            assert value(result, metric, left=name) > 0
        assert abs(value(result, "label_cka", left=name, right="labels")) <= 1
        for metric in ("cka", "alignment", "trace_ratio", "eigenspace_overlap"):
            assert name == FULL or np.isfinite(value(result, metric, right=name))
    nulls = [row["null"].split()[0] for row in result.tables["nulls"]]
    assert nulls == ["Gaussian", "Propulsion,", "random", "last"]


def test_the_split_adds_up_and_is_compared_part_by_part(result):
    for row in result.tables["split"]:
        assert row["common"] + row["residual"] + row["cross"] == pytest.approx(1)
    for part in ("whole", "common", "residual"):
        pair = [result.arrays[f"{STAGE}.linear: {name}, {part}"] for name in ("full", "Propulsion")]
        names = (f"linear: full, {part}", f"linear: Propulsion, {part}")
        assert seed_values(result, 3)["cka", *names] == pytest.approx(ntk.cka(*map(torch.from_numpy, pair)))


def test_label_kernels():
    labels = np.array([0, 2, 2])
    assert label_kernel(labels, regression=False).tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    assert label_kernel(labels / 2, regression=True).tolist() == [[0, 0, 0], [0, 1, 1], [0, 1, 1]]


def test_every_number_is_the_mean_over_seeds_and_nulls_are_among_them(result):
    by_seed = [seed_values(result, seed) for seed in (3, 4)]
    assert by_seed[0].keys() == by_seed[1].keys() == {(m.name, m.left, m.right) for m in result.metrics}
    for metric in result.metrics:
        each = [values[metric.name, metric.left, metric.right] for values in by_seed]
        assert metric.value == pytest.approx(np.mean(each), rel=1e-12)
    assert by_seed[0]["cka", FULL, REFERENCE] != by_seed[1]["cka", FULL, REFERENCE]
    null = result.tables["nulls"][0]["null"]
    assert by_seed[0]["cka", FULL, null] != by_seed[1]["cka", FULL, null]


def test_a_seed_is_as_it_is_alone_and_is_measured_once(config, result, tmp_path, monkeypatch):
    alone = dataclasses.replace(config, seeds=(4,), output_dir=tmp_path / "alone")
    values = seed_values(run(alone), 4)
    assert values == seed_values(result, 4)
    monkeypatch.setattr("analyses.peft_kernels.analysis._measure", lambda *_, **__: pytest.fail("measured twice"))
    again = run(config)
    assert [(m.name, m.value, m.low, m.high) for m in again.metrics] == [
        (m.name, m.value, m.low, m.high) for m in result.metrics
    ]
    with pytest.raises(pytest.fail.Exception, match="measured twice"):  # Other settings: computed again.
        run(dataclasses.replace(config, n_examples=5))


def test_layers_make_up_both_kernels(result):
    rows = result.tables["layers"]
    kinds = ("query", "key", "value", "attention output", "MLP up", "MLP down")
    expected = [("embedding", None), *((kind, 0) for kind in kinds), ("pooler", None), ("biases and norms", None)]
    assert [(row["kind"], row["block"]) for row in rows] == expected
    assert sum(row["full_share"] for row in rows) == pytest.approx(1, rel=1e-10)
    assert sum(row["propulsion_share"] or 0 for row in rows) == pytest.approx(1, rel=1e-10)
    assert all(row["propulsion_cka_low"] <= row["propulsion_cka"] <= row["propulsion_cka_high"] for row in rows[:-1])
    assert rows[-1]["cka"] is None


def test_similarities_and_the_map_of_methods(result):
    names = [row["method"] for row in result.tables["methods"]]
    assert not any("degree" in name for name in names)
    values = {(row["left"], row["right"]): row["cka"] for row in result.tables["similarity"]}
    points = {row["method"]: np.array([row["x"], row["y"]]) for row in result.tables["embedding"]}
    assert set(points) == set(names)
    for name in names[1:]:
        assert values[FULL, name] == values[name, FULL] == pytest.approx(value(result, "cka", right=name))
        # The map has only two axes, so that points are at most as far apart as their kernels.
        assert np.sum((points[FULL] - points[name]) ** 2) <= 2 * (1 - values[FULL, name]) + 1e-12


def test_a_language_model_is_asked_for_a_word(tmp_path, tiny_models, tiny_model):
    folder = llama(tmp_path / "llama", tiny_model)
    config = Config(
        model=str(folder), readout=Readout("label_words"), n_examples=4, methods=CHOICE, top=2, null_draws=1,
        resamples=2, seeds=(0,), dtype="float64", output_dir=tmp_path / "result",
    )  # fmt: skip
    result = run(config)
    assert [row["method"] for row in result.tables["left_out"]] == ["BitFit"]
    assert "BitFit" not in [row["method"] for row in result.tables["methods"]]
    assert {row["block"] for row in result.tables["layers"]} == {None, 0, 1}
    assert result.model["prompt"]["words"] == [" terrible", " great"]
    assert "BitFit left out" in summary(result)
    # Compare with gradients of the words' logits from plain autograd.
    model, tokenizer = load_model(str(folder), task_type="CAUSAL_LM", dtype=torch.float64)
    rows = draw_rows(load_task_data("demo").validation, load_task_data("demo").task, 4, 0)
    ids = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (" terrible", " great")]
    gradients = []
    for sentence in rows["sentence"]:
        batch = tokenizer(f"{sentence.strip()} It was", return_tensors="pt")
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0, -1]
        body = [p for name, p in model.named_parameters() if name.startswith("model.")]
        found = torch.autograd.grad(logits[ids[1]] - logits[ids[0]], body, allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
    J = torch.stack(gradients)
    np.testing.assert_allclose(result.arrays[f"{STAGE}.{FULL}"], (J @ J.T).numpy(), rtol=1e-9)


def llama(folder, tiny_model):
    """A folder with a tiny random Llama with tied embeddings, like SmolLM2, and the demo model's tokenizer."""
    import transformers as hf

    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(0)
    hf.LlamaForCausalLM(
        hf.LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                       num_key_value_heads=1, vocab_size=len(tokenizer), max_position_embeddings=64,
                       pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True)
    ).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder


def test_the_command_writes_what_it_prints(config, tmp_path, capsys):
    ANALYSIS.publish(
        dataclasses.replace(
            config, output_dir=tmp_path / "result", runs_dir=ANALYSIS.folder(config).with_name("result-runs")
        )
    )
    files = {path.name for path in (tmp_path / "result").iterdir()}
    figures = ("peft_kernels", "peft_kernels_map", "peft_kernels_layers")
    assert files == {
        "result.json",
        "kernels.npz",
        "SHA256SUMS",
        *(f"{name}.{end}" for name in figures for end in ("png", "pdf")),
    }
    assert summary(load_result(tmp_path / "result")) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_examples": 1}, "n_examples must be at least 2"),
        ({"top": 7}, "top must be between 1 and the 6 examples"),
        ({"methods": MethodChoice(ranks=())}, "ranks must be"),
        ({"methods": MethodChoice(positions=("nowhere",))}, "nowhere"),
        ({"seeds": (1, 1)}, "seeds must be"),
        ({"readout": Readout(head="label_words")}, "label words need a causal language model"),
        ({"task": "sts"}, "unknown task"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_is_named(config, tmp_path, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ANALYSIS.publish(dataclasses.replace(config, output_dir=tmp_path / "result", **changes))
    assert not (tmp_path / "result").exists()
