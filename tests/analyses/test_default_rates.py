"""The analysis of default rates: it resumes, and its comparison follows from the stored cells."""

from dataclasses import replace

import pytest

from analyses import default_rates
from analyses.records import load_result
from analyses.subjects.training_run import RunConfig
from propulsion.errors import UserError
from propulsion.training import TrainingOptions


@pytest.fixture
def config(tiny_model, tmp_path):
    return default_rates.Config(
        methods=("full", "head"), factors=(3.0,), resamples=20, output_dir=tmp_path / "result",
        run=RunConfig(model=str(tiny_model), n_train=16, n_validation=12,
                      training=TrainingOptions(max_steps=2, per_device_train_batch_size=4, max_length=32)),
    )  # fmt: skip


def test_automatic_and_fixed_rates_come_first_and_make_a_result(config, capsys):
    default_rates.ANALYSIS.publish(replace(config, max_runs=3))
    assert not config.output_dir.exists()
    part = replace(config, max_runs=0, partial=True, output_dir=config.output_dir.with_name("part"),
                   runs_dir=config.output_dir.with_name("result-runs"))  # fmt: skip
    default_rates.ANALYSIS.publish(part)
    assert [row["method"] for row in load_result(part.output_dir).tables["summary"]] == ["full"]
    default_rates.ANALYSIS.publish(replace(config, max_runs=2))
    rows = {row["method"]: row for row in load_result(config.output_dir).tables["summary"]}
    assert [row["grid points"] for row in rows.values()] == [2, 1]
    default_rates.ANALYSIS.publish(replace(config, overwrite=True))
    result = load_result(config.output_dir, analysis="default_rates")
    runs = {(row["method"], row["setting"]): row for row in result.tables["runs"]}
    assert len(runs) == 6
    for method in config.methods:
        rates = {setting: runs[method, setting]["learning_rates"]["head"] for setting in ("fixed", "auto", "x 3")}
        assert rates["fixed"] == 1e-3
        assert rates["x 3"] == pytest.approx(3 * rates["auto"])
    for row in result.tables["summary"]:
        scores = [runs[row["method"], setting]["score"] for setting in ("auto", "x 3")]
        assert row["best"] == max(scores)
        assert row["auto learns"] == (runs[row["method"], "auto"]["low"] > row["chance"])
    assert result.tables["missing"] == [{"cells": 0}]
    assert "best of grid" in capsys.readouterr().out


def test_mistakes(config):
    with pytest.raises(UserError, match="other than 1"):
        default_rates.run(replace(config, factors=(1.0,)))
    with pytest.raises(UserError, match="unknown method"):
        default_rates.run(replace(config, methods=("lorra",)))
