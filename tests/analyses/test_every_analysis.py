"""What holds of every analysis: one smallest configuration of each, put to the same questions."""

import importlib
import json
import os
import pkgutil
import signal
import traceback
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import pytest
import torch

import analyses
from analyses.core import analysis as core
from analyses.core.analysis import Analysis
from analyses.core.cells import Grid
from analyses.core.errors import MISTAKES
from analyses.records import load_result
from analyses.subjects.training_run import RunConfig
from propulsion.training import TrainingOptions

TRAINING = TrainingOptions(
    max_steps=2, per_device_train_batch_size=4, max_length=32, learning_rate=0.01, head_learning_rate=0.01
)


def runs(model: str) -> RunConfig:
    return RunConfig(model=model, n_train=16, n_validation=12, degree=3, training=TRAINING)


SMALLEST = {
    "ablation": lambda model: {"factor": "layers", "n_layers": 1, "seeds": (0, 1), "run": runs(model)},
    "complexity": lambda model: {"n": 24, "m": 16, "tokens": 8, "rank": 4, "vectors": 3, "repeats": 1},
    "convergence": lambda model: {"methods": ("full", "head"), "seeds": (0,), "run": runs(model)},
    "default_rates": lambda model: {"methods": ("head",), "factors": (3.0,), "resamples": 5, "run": runs(model)},
    "degree_scale": lambda model: {"widths": (32,), "depths": (1,), "draws": 2, "n_examples": 4},
    "delta_weights": lambda model: {"methods": ("full", "propulsion"), "run": runs(model)},
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
        "methods": ("full", "head"), "seeds": (0,), "tuning_steps": 1, "rate_extensions": 0, "resamples": 2,
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
        "n_in": 16, "width": 16, "depth": 2, "draws": 2, "n_examples": 4, "transformer_widths": (16, 32),
        "transformer_draws": 2,
    },
    "width_convergence": lambda model: {"activations": ("relu",), "widths": (16, 32), "draws": 2},
}  # fmt: skip
"""By analysis, the options of its smallest sensible configuration, of a model in a folder."""


def every_analysis() -> dict[str, Analysis]:
    """Every analysis of the package, found and not listed."""
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
            torch.set_num_threads(1)  # A fork has none of the threads that OpenMP started before it.
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
        if self.computed:  # The first cell is finished; the second is computed and not yet written.
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
    assert result.config.keys() == vars(config).keys()
    assert {name: content for name, content in files(cells).items() if name in before} == before
    assert not [path for path in folder.parent.iterdir() if "partial" in path.name]
    assert analysis.summary(result) in capfd.readouterr().out
    assert "\n| " in f"\n{analysis.summary(result, markdown=True)}"


def test_its_figure_is_drawn_again_to_the_same_bytes(asked, tmp_path):
    analysis, _, folder = asked
    figures = {name: content for name, content in files(folder).items() if name not in ("result.json", "kernels.npz")}
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
    for path, value in limits:
        if isinstance(attrgetter(path)(config), tuple):
            value = (value,)
        bad = replace(changed(config, path, value), output_dir=tmp_path / "result")
        with pytest.raises(MISTAKES, match=path.rpartition(".")[2]):
            analysis.publish(bad)
    assert not list(tmp_path.iterdir())


def changed(config, path, value):
    name, _, rest = path.partition(".")
    return replace(config, **{name: changed(getattr(config, name), rest, value) if rest else value})
