"""decomposition on a tiny model: its numbers are those of kernels computed directly; language models in words."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import ntk
from analyses.core.intervals import LOGIT, mean_interval
from analyses.decomposition import ALL, FULL, METRIC, ROTATED, SCALES, STAGE, Config, run, summary
from analyses.subjects.batch import held_out
from analyses.subjects.readout import Readout
from ntk.adapters import Propulsion
from propulsion.data import load_task_data
from propulsion.pretrained import load_classifier

KINDS = ("query", "key", "value", "attention output", "MLP up", "MLP down")


@pytest.fixture(scope="module")
def config(tiny_model, tmp_path_factory):
    return Config(
        model=str(tiny_model), n_examples=6, seeds=(3, 4), null_draws=3, dtype="float64",
        readout=Readout(pooling="mean"), output_dir=tmp_path_factory.mktemp("decomposition") / "result",
    )  # fmt: skip


@pytest.fixture(scope="module")
def result(config):
    return run(config)


def direct(config, seed):
    """The model of one seed, its inputs, and the kernels of its linear layers."""
    data = load_task_data("demo")
    model, tokenizer = load_classifier(config.model, num_labels=2, pooling="mean", seed=seed, dtype=torch.float64)
    inputs, _ = held_out(data, tokenizer, config.n_examples, seed)
    parts = ntk.decomposition(model, inputs, reduce="trace")
    return model, inputs, {name: each for name, each in parts.items() if each.full.any()}


def test_every_number_is_that_of_the_kernels(config, result):
    each = {seed: direct(config, seed) for seed in config.seeds}
    rows = {row["group"]: row for row in result.tables["groups"]}
    assert set(rows) == {*(f"block 0, {kind}" for kind in KINDS), *KINDS, ALL}  # the mean does not use the pooler
    values = {(row["seed"], row["group"]): row for row in result.tables["seed_values"]}
    for seed, (model, inputs, layers) in each.items():
        (query,) = (name for name in layers if name.endswith("query"))
        parts, whole = layers[query], sum(one.full for one in layers.values())
        found = values[seed, "query"]
        assert found == values[seed, "block 0, query"] | {"group": "query"}
        assert found["full_metric"] == pytest.approx(ntk.cka(parts.full, parts.metric))
        assert found["metric_scales"] == pytest.approx(ntk.cka(parts.metric, parts.propulsion))
        assert found["full_scales"] == pytest.approx(ntk.cka(parts.full, parts.propulsion))
        spread = float(model.get_submodule(query).weight.detach().square().mean())
        assert found["metric_ratio"] == pytest.approx(float(parts.metric.trace() / parts.full.trace()) / spread)
        assert found["scales_ratio"] == pytest.approx(float(parts.propulsion.trace() / parts.metric.trace()))
        assert found["share"] == pytest.approx(float(parts.full.trace() / whole.trace()))
        assert found["directions"] == pytest.approx(ntk.equivalent_directions(parts.full, found["full_scales"]))
        rotated = ntk.adapter_kernels(model, inputs, {"it": Propulsion(modules=[query], basis="rotated", seed=seed)},
                                      reduce="trace")["it"]  # fmt: skip
        assert found["metric_rotated"] == pytest.approx(ntk.cka(parts.metric, rotated))
    three = [values[seed, ALL]["full_scales"] for seed in config.seeds]
    expected = mean_interval(three, LOGIT)
    assert [rows[ALL][f"full_scales{end}"] for end in ("", "_low", "_high")] == pytest.approx(list(expected))
    _, _, layers = each[config.seeds[0]]
    for part, pick in ((FULL, "full"), (METRIC, "metric"), (SCALES, "propulsion")):
        total = sum(getattr(one, pick) for one in layers.values())
        np.testing.assert_allclose(result.arrays[f"{STAGE}.{part}"], total, rtol=1e-5)
    assert result.arrays[f"{STAGE}.{ROTATED}"].shape == (6, 6)


def test_the_distance_lies_in_the_interval_that_the_two_steps_prove(config, result):
    """In the printed table, the mean over seeds of the distance of the centred kernels, and of its bounds."""
    rows = [line.split("|")[1:-1] for line in summary(result, markdown=True).splitlines() if "|" in line]
    start = next(i for i, row in enumerate(rows) if "best scale" in row[1])
    printed = {
        row[0].strip(): [float(cell) for cell in row[1:]] for row in rows[start + 2 : start + 2 + len(KINDS) + 1]
    }
    assert set(printed) == {*KINDS, ALL}
    for kind, (distance, low, high) in printed.items():
        assert low - 0.001 <= distance <= high + 0.001, kind
    distances, bounds = [], []
    for seed in config.seeds:
        _, _, layers = direct(config, seed)
        full, metric, scales = (
            ntk.center(sum(getattr(parts, part) for parts in layers.values()))
            for part in ("full", "metric", "propulsion")
        )
        distances.append(ntk.kernel_distance(full, scales, scaled=True))
        angles = [math.acos(ntk.kernel_alignment(*pair)) for pair in ((full, metric), (metric, scales))]
        bounds.append([math.sin(abs(angles[0] - angles[1])), math.sin(min(sum(angles), math.pi / 2))])
    expected = [np.mean(distances), *np.mean(bounds, axis=0)]
    assert printed[ALL] == pytest.approx(expected, abs=0.002)


def test_one_seed_has_no_interval(config, tmp_path):
    alone = run(replace(config, seeds=(3,), output_dir=tmp_path / "result"))
    row = next(row for row in alone.tables["groups"] if row["group"] == ALL)
    assert row["full_scales_low"] is None
    assert math.isfinite(row["full_scales"])
    assert "[" not in summary(alone)


def test_a_language_model_in_words(tiny_decoder, tmp_path):
    readout = Readout(head="label_words", words=("bad", "good"), prompt="{text}")
    options = {"model": str(tiny_decoder), "readout": readout, "n_examples": 4, "seeds": (0,), "null_draws": 1}
    found = run(Config(**options, output_dir=tmp_path / "result"))
    kinds = {row["kind"] for row in found.tables["groups"] if row["block"] is not None}
    assert kinds == set(KINDS)
    up = next(row for row in found.tables["groups"] if row["kind"] == "MLP up")
    assert up["layers"] == 2  # the gate and the layer beside it
