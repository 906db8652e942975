"""The same tests for every analysis, each on its smallest configuration."""

import dataclasses
import importlib
import json
import os
import pkgutil
import shutil
import signal
import socket
import traceback
from dataclasses import fields, is_dataclass, replace
from importlib import resources
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import analyses
from analyses.core import analysis as core
from analyses.core.analysis import Analysis, GridOutput
from analyses.core.cells import PLACES, Grid, settings_of
from analyses.core.errors import MISTAKES
from analyses.records import Metric, Result, load_result, write_result
from analyses.spectrum import MEASURED
from analyses.subjects.options import model_identity
from analyses.subjects.training_run import RunConfig
from propulsion.data import load_task_data
from propulsion.data.own import ROW_OPTIONS
from propulsion.data.tasks import get_task
from propulsion.training import TrainingOptions

TRAINING = TrainingOptions(
    max_steps=2, per_device_train_batch_size=4, max_length=32, learning_rate=0.01, head_learning_rate=0.01
)


def runs(model: str) -> RunConfig:
    return RunConfig(model=model, n_train=16, n_validation=12, degree=3, training=TRAINING)


SMALLEST = {
    "ablation": lambda model: {"factor": "layers", "n_layers": 1, "seeds": (0, 1), "run": runs(model)},
    "choose": lambda model: {"candidates": ("full", "head"), "n_examples": 4, "resamples": 5, "run": runs(model)},
    "complexity": lambda model: {"n": 24, "m": 16, "tokens": 8, "rank": 4, "vectors": 3, "repeats": 1},
    "convergence": lambda model: {"methods": ("full", "head"), "seeds": (0,), "run": runs(model)},
    "decomposition": lambda model: {"model": model, "n_examples": 4, "seeds": (0, 1), "null_draws": 2},
    "lora_law": lambda model: {"model": model, "n_examples": 4, "ranks": (1, 4), "draws": 2},
    "default_rates": lambda model: {"methods": ("head",), "factors": (3.0,), "resamples": 5, "run": runs(model)},
    "degree_scale": lambda model: {"widths": (32,), "depths": (1,), "draws": 2, "n_examples": 4},
    "delta_weights": lambda model: {"methods": ("full", "propulsion"), "run": runs(model)},
    "foresight": lambda model: {
        "candidates": ("full", "head", "bitfit"), "sizes": (16,), "seeds": (0,), "n_examples": 4, "resamples": 5,
        "run": runs(model),
    },
    "instruction_tuning": lambda model: {
        "methods": ("none", "propulsion:degree=3"), "max_steps": 1, "max_train_samples": 4, "max_eval_samples": 4,
        "max_length": 48, "per_device_train_batch_size": 4,
    },
    "johnson_lindenstrauss": lambda model: {"dimensions": (4, 16), "draws": 200},
    "kernel_distance": lambda model: {
        "model": model, "n_examples": 4, "n_validation": 8, "training": TRAINING, "seeds": (0, 1), "null_draws": 1,
        "resamples": 2,
    },
    "kernel_drift": lambda model: {
        "methods": ("full", "propulsion"), "seeds": (0,), "n_examples": 6, "n_jacobians": 3, "width": 8,
        "resamples": 2, "null_draws": 1, "checkpoints": (), "run": runs(model),
    },
    "linearized_prediction": lambda model: {
        "model": model, "methods": ("full", "head"), "sizes": (8,), "n_test": 8, "seeds": (0,), "training": TRAINING,
        "sign_limit": 0, "permutations": 2, "again": (),
    },
    "memory": lambda model: {"methods": ("head",), "rounds": 1, "run": runs(model)},
    "method_comparison": lambda model: {
        "methods": ("full", "head"), "seeds": (0,), "tuning_steps": 1, "rate_extensions": 0,
        "run": runs(model),
    },
    "parameter_count": lambda model: {},
    "peft_kernels": lambda model: {
        "model": model, "n_examples": 4, "seeds": (0, 1), "top": 2, "null_draws": 1, "resamples": 2,
    },
    "pooling": lambda model: {
        "methods": ("full", "head"), "poolings": ("mean",), "n_examples": 4, "run": runs(model),
    },
    "spectrum": lambda model: {"model": model, "methods": ("full", "lora"), "n_examples": 6, "seeds": (0,),
                               "null_draws": 2},
    "theorem1": lambda model: {
        "n_in": 16, "width": 16, "depth": 2, "draws": 2, "transformer_widths": (16, 32), "transformer_draws": 2,
    },
    "width_convergence": lambda model: {"activations": ("relu",), "widths": (16, 32), "draws": 2},
}  # fmt: skip
"""By analysis, the options of its smallest sensible configuration, of a model in a folder."""


ENCODERS = dict.fromkeys(
    ("complexity", "johnson_lindenstrauss", "parameter_count", "theorem1", "width_convergence"), False
)
"""Analyses without a pre-trained model; all others store its fingerprint and that of their rows."""


def every_analysis() -> dict[str, Analysis]:
    """Every analysis of the package, found by searching its modules."""
    names = [module.name for module in pkgutil.iter_modules(analyses.__path__, "analyses.")]
    found = (getattr(importlib.import_module(name), "ANALYSIS", None) for name in names)
    return {analysis.name: analysis for analysis in found if analysis is not None}


ANALYSES = every_analysis()


@pytest.fixture(scope="module", params=sorted(ANALYSES))
def asked(request, tiny_model, tiny_decoder, tmp_path_factory):
    """An analysis, its smallest configuration, and the folder that its result goes to."""
    folder = tmp_path_factory.mktemp(request.param) / "result"
    analysis = ANALYSES[request.param]
    options = SMALLEST[request.param](str(tiny_model))
    if request.param == "instruction_tuning":
        rows = tmp_path_factory.mktemp("instructions")
        for split in ("train", "validation"):
            lines = [json.dumps({"sentence": f"text {i}", "label": i % 2}) for i in range(8)]
            (rows / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        options |= {"model": str(tiny_decoder), "data_dir": rows}
    return analysis, analysis.config(output_dir=folder, **options), folder


def in_a_process_that_is_killed(work) -> None:
    """Run in a fork of this process, which must end by SIGKILL."""
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)  # OpenMP's threads do not exist in a fork.
            work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the process ended by itself: {os.waitstatus_to_exitcode(status)}"
    assert os.WTERMSIG(status) == signal.SIGKILL


def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_analysis_has_a_smallest_configuration():
    assert SMALLEST.keys() == ANALYSES.keys()


def test_a_killed_run_leaves_no_result_and_the_same_command_makes_it(asked, monkeypatch, capfd):
    analysis, config, folder = asked
    cells = folder.with_name("result-runs")
    write = Grid._write

    def written(self, *arguments):
        if self.computed:  # The first cell is written, the second only computed.
            kill()
        return write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Grid, "_write", written)
        patch.setattr(core, "write_result", kill)
        in_a_process_that_is_killed(lambda: analysis.publish(config))
    assert not folder.exists()
    before = files(cells)
    assert bool(before) == hasattr(config, "runs_dir")
    analysis.publish(config)
    result = load_result(folder, analysis=analysis.name)
    assert result.metrics
    identified = ENCODERS.get(analysis.name, True)
    assert ("fingerprint" in result.model) == identified
    assert any("fingerprint" in name or name == "tasks" for name in result.dataset) == identified
    assert result.config.keys() == vars(config).keys()
    assert {name: content for name, content in files(cells).items() if name in before} == before
    assert not [path for path in folder.parent.iterdir() if "partial" in path.name]
    assert analysis.summary(result) in capfd.readouterr().out
    assert "\n| " in f"\n{analysis.summary(result, markdown=True)}"


def test_cells_are_published_under_the_name_of_the_model_that_was_asked_for(asked, models, tmp_path):
    """Cells of a model serve its copy in another folder, whose name the result then has."""
    analysis, config, folder = asked
    if not isinstance(config, GridOutput):
        return
    copy = {"model": str(models["copy"])}
    new = replace(config, **({"run": replace(config.run, **copy)} if hasattr(config, "run") else copy),
                  output_dir=tmp_path / "result", runs_dir=folder.with_name("result-runs"))  # fmt: skip
    before = files(new.runs_dir)
    result, first = analysis.run(new), load_result(folder)
    assert files(new.runs_dir) == before
    assert result.model["fingerprint"] == first.model["fingerprint"]
    by_path = {key for key, value in first.model.items() if value == model_of(config)}
    assert {key: result.model[key] for key in by_path} == dict.fromkeys(by_path, copy["model"])


def model_of(config):
    return getattr(config, "run", config).model


def test_its_figure_is_drawn_again_to_the_same_bytes(asked, tmp_path):
    analysis, _, folder = asked
    own = ("result.json", "kernels.npz", "SHA256SUMS")
    figures = {name: content for name, content in files(folder).items() if name not in own}
    assert bool(figures) == analysis.draws
    if analysis.draws:
        importlib.import_module(f"figures.{analysis.name}").write(load_result(folder), tmp_path)
        assert files(tmp_path) == figures


def test_a_result_is_not_replaced_unasked(asked):
    analysis, config, folder = asked
    before = files(folder)
    with pytest.raises(MISTAKES, match="already holds a result"):
        analysis.publish(config)
    assert files(folder) == before


def test_a_bad_option_is_named_before_anything_is_written(asked, tmp_path):
    analysis, config, _ = asked
    limits = [(name, least - 1) for name, least in analysis.least.items()] + list(analysis.above.items())
    limits += [(path, name) for path in devices(config) for name in ("meta", "foo")]
    for path, value in limits:
        if isinstance(attrgetter(path)(config), tuple):
            value = (value,)
        bad = replace(changed(config, path, value), output_dir=tmp_path / "result")
        with pytest.raises(MISTAKES, match=path.rpartition(".")[2]):
            analysis.publish(bad)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("analysis", [pytest.param(a, id=name) for name, a in ANALYSES.items()])
def test_options_are_checked_before_rows_are_read_or_anything_is_written(analysis, tmp_path, monkeypatch):
    """Numbers that are not finite, values given twice and unknown tasks, in whichever option."""
    monkeypatch.setattr("propulsion.data.loading.source_of", lambda *_: pytest.fail("rows were read"))
    config = analysis.config(output_dir=tmp_path / "result", **REQUIRED.get(analysis.name, {}))
    bad = {}
    for path, value in core.leaves(dataclasses.asdict(config)):
        if isinstance(value, float) or path.endswith("memory_budget_gb"):
            bad[path] = [float("inf"), float("nan")]
        elif isinstance(value, tuple) and value and len(value) < 20 and path != "readout.words":
            bad[path] = [value + value[-1:]]
        elif path in ("task", "tasks"):
            bad[path] = ["nothing_such"]
    for path, values in bad.items():
        for value in values:
            with pytest.raises(MISTAKES, match=path.rpartition(".")[2]):
                analysis.publish(changed_past_the_checks(config, path, value))
    assert not list(tmp_path.iterdir())


REQUIRED = {"instruction_tuning": {"model": "nowhere"}}
"""Options without a default."""


def test_two_processes_do_not_work_in_one_folder(tmp_path, monkeypatch):
    """Neither on one result nor on the cells of one grid; the second names the first."""
    analysis, (asked, answer) = ANALYSES["convergence"], (os.pipe(), os.pipe())
    one = analysis.config(output_dir=tmp_path / "one")

    def wait(*_):
        os.write(asked[1], b"1")
        os.read(answer[0], 1)
        kill()

    with monkeypatch.context() as patch:
        patch.setattr(RunConfig, "load", wait)
        child = os.fork()
        if not child:
            try:
                analysis.publish(one)
            finally:
                os._exit(1)
        os.read(asked[0], 1)
        for other, name in ((one, "one"), (replace(one, output_dir=tmp_path / "two", runs_dir=tmp_path / "one-runs"),
                                           "one-runs")):  # fmt: skip
            holder = f"{tmp_path / name} is in use by process {child} on {socket.gethostname()}"
            with pytest.raises(MISTAKES, match=holder):
                analysis.publish(other)
        os.write(answer[1], b"1")
        os.waitpid(child, 0)
        patch.setattr(RunConfig, "load", lambda *_: pytest.fail("let in"))
        with pytest.raises(pytest.fail.Exception, match="let in"):  # A killed process holds nothing.
            analysis.publish(one)
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".lock"]


def devices(config):
    """The paths of the fields that name a device."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name == "device":
            yield field.name
        elif is_dataclass(value):
            yield from (f"{field.name}.{path}" for path in devices(value))


def changed(config, path, value):
    name, _, rest = path.partition(".")
    return replace(config, **{name: changed(getattr(config, name), rest, value) if rest else value})


# --- analyses of cells -----------------------------------------------------------------------------------------------

GRIDS = pytest.mark.parametrize(
    "analysis", [pytest.param(a, id=name) for name, a in ANALYSES.items() if issubclass(a.config, GridOutput)]
)


class Asked(BaseException):
    """Raised with the settings of the first cell that an analysis asks for."""


@pytest.fixture
def first_settings(monkeypatch):
    def cell(self, name, settings, compute):
        raise Asked(settings)

    monkeypatch.setattr(Grid, "cell", cell)

    def of(analysis, config):
        with pytest.raises(Asked) as caught:
            analysis.run(config)
        return caught.value.args[0]

    return of


@pytest.fixture
def rows(tmp_path):
    """Two data folders of the same name: the demonstration task's rows, and the same with one more word in one row."""
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
    """Model folders of the same name: equal weights; one changed number of one weight; another dropout."""
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


@GRIDS
def test_cells_follow_rows_and_weights_and_no_names(analysis, rows, models, tmp_path, first_settings):
    def settings(data, model):
        inputs = {"data_dir": rows[data], "model": str(models[model])}
        config = analysis.config(output_dir=tmp_path / "result")
        if hasattr(config, "run"):
            # Use all rows of the task, however many it has.
            training = replace(config.run.training, max_length=32)
            run = replace(config.run, n_train=10**6, n_validation=10**6, training=training, **inputs)
            return first_settings(analysis, replace(config, run=run))
        return first_settings(analysis, replace(config, seeds=(0, 1), **inputs))

    first = settings("one", "one")
    assert settings("one", "copy") == first
    shutil.copytree(rows["one"], tmp_path / "moved")
    rows["moved"] = tmp_path / "moved"
    assert settings("moved", "one") == first
    for data, model in (("other", "one"), ("one", "weight"), ("one", "config")):
        assert settings(data, model) != first, (data, model)


READS = {"comparison": "method_comparison", "rates_from": "method_comparison", "convergence": "convergence"}
"""Analysis of the earlier result that an option names."""


@pytest.mark.parametrize("differs", ["", "rows", "model", "task"])
@pytest.mark.parametrize(
    ("analysis", "option"),
    [pytest.param(a, f.name, id=f"{n}-{f.name}") for n, a in ANALYSES.items() for f in dataclasses.fields(a.config)
     if f.name in READS],
)  # fmt: skip
def test_an_earlier_result_must_be_of_the_same_task_rows_and_model(
    analysis, option, differs, rows, models, tmp_path, monkeypatch
):
    inputs = {"data_dir": rows["one"], "model": str(models["one"])}
    config = analysis.config(output_dir=tmp_path / "result", **{option: tmp_path / "earlier"})
    methods = ("full", "lora", "head")
    config = replace(config, methods=methods)
    if hasattr(config, "run"):
        config = replace(
            config, run=replace(config.run, training=replace(config.run.training, max_length=32), **inputs)
        )
    else:
        config = replace(config, **inputs)
    task = "sst2" if differs == "task" else "demo"
    all_rows = load_task_data("demo", data_dir=rows["other" if differs == "rows" else "one"]).all_rows
    planted = Result(
        analysis=READS[option], config={"run": {"training": {}}}, seed=0, arrays={}, environment={}, seconds={},
        metrics=[Metric(MEASURED, 3.0, None, None, "steps", "trained", method, "") for method in methods],
        tables={"summary": [{"task": "demo", "method": method, "rate_factor": 1.0} for method in methods]},
        model=model_identity(str(models["weight" if differs == "model" else "copy"]), "auto"), coverage={},
        dataset={"name": task, "tasks": {task: {"all_rows": all_rows}}},
    )  # fmt: skip
    write_result(planted, tmp_path / "earlier")

    def stop(*_, **__):
        raise Asked

    monkeypatch.setattr(Grid, "cell", stop)
    for module in ("delta_weights.training_run", "spectrum._kernels"):
        monkeypatch.setattr(f"analyses.{module}", stop)
    if not differs:
        with pytest.raises(Asked):
            analysis.run(config)
        return
    words = {"rows": "is of other data of demo", "model": "is of another model", "task": "is of sst2, not of demo"}
    with pytest.raises(MISTAKES, match=words[differs]):
        analysis.run(config)


def leaves(config, prefix=""):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def changed_past_the_checks(config, path, value):
    name, _, rest = path.partition(".")
    value = changed_past_the_checks(getattr(config, name), rest, value) if rest else value
    other = object.__new__(type(config))  # Skip the checks: only the identity of cells matters here.
    for field in dataclasses.fields(config):
        object.__setattr__(other, field.name, value if field.name == name else getattr(config, field.name))
    return other


@GRIDS
def test_every_field_counts_that_is_not_declared_free(analysis):
    config = analysis.config()

    def settings(config):
        return settings_of(config, free=analysis.free, task=get_task("demo"), rows="r", model="m")

    first, free = settings(config), {*analysis.free, *PLACES}
    for path in leaves(config):
        is_free = path in free or path.rpartition(".")[2] in ROW_OPTIONS
        assert (settings(changed_past_the_checks(config, path, "another")) == first) == is_free, path
