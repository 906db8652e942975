"""Which cells an analysis takes for the same: those of equal configuration, rows and weights, and no others."""

import dataclasses
import json
import shutil
from importlib import resources
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from analyses import (
    ablation,
    convergence,
    kernel_distance,
    kernel_drift,
    linearized_prediction,
    method_comparison,
    peft_kernels,
    pooling,
)
from analyses.core.cells import PLACES, Grid, settings_of
from analyses.linearized_prediction.setting import Config as PredictionConfig
from propulsion.data.tasks import get_task

MODULES = {
    method_comparison: method_comparison.Config,
    ablation: ablation.Config,
    convergence: convergence.Config,
    kernel_drift: kernel_drift.Config,
    kernel_distance: kernel_distance.Config,
    peft_kernels: peft_kernels.Config,
    linearized_prediction: PredictionConfig,
    pooling: pooling.Config,
}
ANALYSES = [pytest.param(module, config, id=module.__name__.split(".")[1]) for module, config in MODULES.items()]
# These look for a folder of the task in the data folder.
NESTED = (method_comparison, ablation, convergence, kernel_drift, linearized_prediction, pooling)


class Asked(BaseException):
    """Carries the settings of the first cell that an analysis asks for."""


@pytest.fixture
def first_settings(monkeypatch):
    def cell(self, name, settings, compute):
        raise Asked(settings)

    monkeypatch.setattr(Grid, "cell", cell)

    def of(module, config):
        with pytest.raises(Asked) as caught:
            module.run(config)
        return caught.value.args[0]

    return of


@pytest.fixture
def rows(tmp_path):
    """Two data folders of the same name: the demonstration's rows, and the same with one word more in one row."""
    found = {}
    for place in ("one", "other"):
        folder = tmp_path / place / "data" / "demo"
        folder.mkdir(parents=True)
        for split in ("train", "validation"):
            text = (resources.files("propulsion.data") / "demo" / f"{split}.jsonl").read_text(encoding="utf-8")
            lines = text.splitlines()
            if place == "other" and split == "train":
                row = json.loads(lines[0])
                lines[0] = json.dumps(row | {"sentence": row["sentence"] + " indeed"})
            (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        found[place] = folder.parent
    return found


@pytest.fixture
def models(tiny_model, tmp_path):
    """Folders of the same name: the same weights; one number of one weight changed; another dropout."""
    found = {"one": Path(tiny_model)}
    for kind in ("copy", "weight", "config"):
        found[kind] = tmp_path / kind / Path(tiny_model).name
        shutil.copytree(tiny_model, found[kind])
    state = load_file(found["weight"] / "model.safetensors")
    state["bert.embeddings.word_embeddings.weight"][7, 3] += 0.1
    save_file(state, found["weight"] / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((found["config"] / "config.json").read_text())
    (found["config"] / "config.json").write_text(json.dumps(settings | {"hidden_dropout_prob": 0.25}))
    return found


@pytest.mark.parametrize(("module", "config_class"), ANALYSES)
def test_cells_follow_rows_and_weights_and_no_names(module, config_class, rows, models, tmp_path, first_settings):
    def settings(data, model):
        folder = rows[data] if module in NESTED else rows[data] / "demo"
        config = config_class(output_dir=tmp_path / "result")
        if hasattr(config, "run"):
            # All rows are drawn, whatever the task has.
            training = dataclasses.replace(config.run.training, max_length=32)
            chosen = dataclasses.replace(
                config.run, data_dir=folder, model=str(models[model]), n_train=10**6, n_validation=10**6,
                training=training,
            )  # fmt: skip
            return first_settings(module, dataclasses.replace(config, run=chosen))
        more = {"seeds": (0, 1)}
        return first_settings(module, dataclasses.replace(config, data_dir=folder, model=str(models[model]), **more))

    first = settings("one", "one")
    assert settings("one", "copy") == first
    shutil.copytree(rows["one"], tmp_path / "moved")
    rows["moved"] = tmp_path / "moved"
    assert settings("moved", "one") == first
    for data, model in (("other", "one"), ("one", "weight"), ("one", "config")):
        assert settings(data, model) != first, (data, model)


def leaves(config, prefix=""):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def changed(config, path, value):
    name, _, rest = path.partition(".")
    value = changed(getattr(config, name), rest, value) if rest else value
    other = object.__new__(type(config))  # Past the checks: only whether the field counts matters here.
    for field in dataclasses.fields(config):
        object.__setattr__(other, field.name, value if field.name == name else getattr(config, field.name))
    return other


@pytest.mark.parametrize(("module", "config_class"), ANALYSES)
def test_every_field_counts_that_is_not_declared_free(module, config_class):
    config = config_class()
    declared = module.ANALYSIS.free

    def settings(config):
        return settings_of(config, free=declared, task=get_task("demo"), rows="r", model="m")

    first, free = settings(config), {*declared, *PLACES}
    for path in leaves(config):
        assert (settings(changed(config, path, "another")) == first) == (path in free), path


def test_a_field_that_is_declared_free_must_be_there():
    with pytest.raises(AssertionError, match="no field"):
        settings_of(convergence.Config(), free=("nothing_such",), task=get_task("demo"), rows="r", model="m")


@pytest.mark.parametrize(
    "change", [{"rows": "s"}, {"model": "n"}, {"task": dataclasses.replace(get_task("demo"), degree=2.0)}]
)
def test_rows_model_and_task_count(change):
    shared = {"task": get_task("demo"), "rows": "r", "model": "m"}
    first = settings_of(convergence.Config(), free=convergence.ANALYSIS.free, **shared)
    assert settings_of(convergence.Config(), free=convergence.ANALYSIS.free, **shared | change) != first
