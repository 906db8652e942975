"""Every option that a message advises is one of the command that prints it."""

import ast
import dataclasses
import re
from functools import cache
from pathlib import Path

import pytest

from analyses.claims.__main__ import Config as ClaimsConfig
from analyses.core.cells import settings_of
from analyses.core.command_line import default_options
from analyses.method_comparison import Config as ComparisonConfig
from analyses.subjects.options import EncoderOptions
from propulsion.data.tasks import get_task
from propulsion.errors import UserError
from propulsion.predict import Config as PredictConfig
from propulsion.pretrained import load_classifier
from propulsion.pretrained.options import LOADING_OPTIONS
from propulsion.train import TrainConfig
from tests.analyses.test_every_analysis import ANALYSES, ENCODERS

ROOT = Path(__file__).parent.parent
PACKAGES = ("ntk", "propulsion", "analyses", "figures")
# Not those of pip, git and accelerate, whose commands the texts name, and not the prefix of a switch.
ADVISED = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*[a-z0-9])")
OTHER_PROGRAMS = {"show-toplevel", "porcelain", "no-deps", "force-reinstall", "use", "fsdp", "help", "no"}
READS_MODELS = [name for name in ANALYSES if ENCODERS.get(name, True)]

NOT_REACHED = {
    "analyses.choose.tables": "it writes a command of propulsion.train",
    "analyses.claims.commands": "it writes commands of analyses",
    "analyses.claims.theory": "it names a command of width_convergence",
    "propulsion.data.tasks": "the message names the commands that have the options",
    "propulsion.training.config": "former names of options, and a message that names propulsion.train",
    "propulsion.training.presets": "presets are of propulsion.train",
}
"""Modules whose options are those of commands that they name."""
ONLY_TRAIN = ("propulsion.train", "propulsion.training.trainer", "propulsion.training.sharding")
"""Modules that speak of the options of `propulsion.train`, which analyses use without them."""
CASES = {
    ("analyses.claims", "analyses.records.folder"): "the runs are commands of their own",
    ("analyses.claims", "propulsion.data.own"): "it takes GLUE tasks alone",
    ("analyses.foresight", "analyses.choose.halving"): "it plans no budget that is too small",
    ("analyses.instruction_tuning", "propulsion.data.own"): "it takes instruction tasks alone",
    ("analyses.instruction_tuning", "propulsion.training.run_folder"): "it says the same in its own options",
    ("analyses.linearized_prediction", "analyses.subjects.cost"): "it names other options to the function",
    ("analyses.theorem1", "propulsion.pretrained.loading"): "its encoder is the packaged one",
    ("propulsion.predict", "propulsion.data.own"): "it reads no labels",
    ("propulsion.predict", "propulsion.training.run_folder"): "it reads the names of files alone",
}
"""Further pairs of a command and a module."""


def _name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


@cache
def tree(module):
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


@cache
def imported(module):
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & FILES.keys()


def reached(command):
    """The modules that a command imports, at its start or later."""
    waiting, found = [command, f"{command}.__main__"], set()
    while waiting:
        module = waiting.pop()
        if module in FILES and module not in found:
            found.add(module)
            waiting += [*imported(module), module.rpartition(".")[0]]
    return found


@cache
def advised(module):
    """The options in the texts of a module, without those in docstrings."""
    docstrings = {id(node.value) for node in ast.walk(tree(module)) if isinstance(node, ast.Expr)}
    texts = [
        node.value for node in ast.walk(tree(module))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]  # fmt: skip
    return {flag for text in texts for flag in ADVISED.findall(text)} - OTHER_PROGRAMS


def options(config):
    names = {field.name for field in dataclasses.fields(config)} | default_options(config).keys()
    flags = {name.replace("_", "-") for name in names}
    return flags | {f"no-{flag}" for flag in flags}


COMMANDS = {f"analyses.{name}": ANALYSES[name].config for name in READS_MODELS} | {
    "analyses.claims": ClaimsConfig,
    "propulsion.predict": PredictConfig,
    "propulsion.train": TrainConfig,
}
"""Every command that reads rows or models, and its configuration."""
OWN = {"propulsion.train": {"preset", "show-presets"}}
"""Options of a command that are in no configuration."""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_every_option_that_its_messages_advise(command):
    mine = options(COMMANDS[command]) | OWN.get(command, set())
    other = {
        module: flags for module in reached(command) if (flags := advised(module) - mine)
        and module not in NOT_REACHED and (command, module) not in CASES
        and not (module in ONLY_TRAIN and command != "propulsion.train")
        and not (module == "analyses.subjects.cost" and "memory-budget-gb" not in mine)
    }  # fmt: skip
    assert other == {}


def test_each_exception_is_of_a_module_that_advises_an_option():
    for module in (*NOT_REACHED, *ONLY_TRAIN, *(module for _, module in CASES)):
        assert advised(module), module
    for command, module in CASES:
        assert module in reached(command)


@pytest.mark.parametrize("name", [name for name in READS_MODELS if name != "theorem1"])
def test_an_analysis_of_a_model_takes_the_options_of_loading(name):
    assert default_options(ANALYSES[name].config).items() >= dict.fromkeys(LOADING_OPTIONS, False).items()


def test_every_model_of_an_analysis_is_loaded_with_these_options():
    loads = {"load_classifier", "load_model", "load_label_words", "load", "model_identity"}
    for module in (name for name in FILES if name.startswith("analyses.") and name != "analyses.theorem1.analysis"):
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                given = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg is None]
                if called in loads and (called != "load" or "readout" in ast.unparse(node.func)) and node.args:
                    assert any("loading" in one for one in given), f"{module}: {ast.unparse(node)}"


@pytest.fixture
def unfitting(tiny_model, tmp_path):
    """A checkpoint whose body lacks its only layer's first matrix."""
    model, tokenizer = load_classifier(tiny_model, num_labels=2)
    weights = model.state_dict()
    lacking = next(name for name in weights if name.endswith("attention.self.query.weight"))
    model.save_pretrained(tmp_path / "model", state_dict={k: v for k, v in weights.items() if k != lacking})
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_an_analysis_loads_weights_that_do_not_fit_where_it_is_asked_to(unfitting):
    with pytest.raises(UserError, match="--allow-unfitting-weights"):
        EncoderOptions(model=unfitting).model_identity()
    with pytest.warns(UserWarning, match="do not fit"):
        EncoderOptions(model=unfitting, allow_unfitting_weights=True).model_identity()


def test_the_options_of_loading_leave_stored_cells_as_they_are():
    def settings(**loading):
        config = ComparisonConfig()
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, **loading))
        return settings_of(config, free=(), task=get_task("demo"), rows="rows", model="model")["config"]

    assert not [name for name in settings() if name.rpartition(".")[2] in LOADING_OPTIONS]
    for name in LOADING_OPTIONS:
        assert settings(**{name: True}) == settings() | {f"run.{name}": True}
