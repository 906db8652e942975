"""`PropulsionConfig` and its registration with peft."""

import copy
import importlib
import json
import pickle
import subprocess
import sys

import peft
import pytest
from peft import PeftConfig, mapping
from peft.utils import PeftType

import propulsion
from propulsion import PropulsionConfig, PropulsionModel, registration


def test_nothing_chosen_means_every_position_and_the_papers_degree():
    config = PropulsionConfig()
    assert (config.degree, config.positions, config.target_modules) == (15, "all", None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"degree": 0}, "degree must be a finite number > 0"),
        ({"degree": -3}, "degree"),
        ({"degree": float("nan")}, "degree"),
        ({"degree": float("inf")}, "degree"),
        ({"degree": True}, "degree"),
        ({"degree": "15"}, "degree"),
        ({"degree": 10**400}, "degree"),
        ({"degree_pattern": {"query": 0}}, "degree must be a finite number > 0, got 0"),
        ({"degree_pattern": ["query"]}, "degree_pattern maps names of modules to degrees"),
        ({"init_value": float("nan")}, "init_value must be a finite number"),
        ({"init_noise": -1.0}, "init_noise is a standard deviation"),
        ({"vectors": 0}, "vectors must be a whole number >= 1"),
        ({"vectors": 2.5}, "vectors must be a whole number >= 1"),
        ({"vectors": 2, "init_value": 0.0}, "several vectors need an init_value > 0"),
        ({"pooling": "sum"}, "pooling must be one of"),
        ({"lean": "yes"}, "lean must be True, False or None"),
        ({"positions": 5}, "positions must be one or several"),
        ({"target_modules": 5}, "target_modules must be a list of names or one regular expression"),
        ({"target_modules": "(query"}, "target_modules must be a valid regular expression"),
        ({"exclude_modules": "*query"}, "exclude_modules must be a valid regular expression"),
        ({"positions": "attn", "target_modules": ["query"]}, "target_modules or positions, got both"),
        ({"positions": "attention"}, "positions must be one or several"),
        ({"positions": []}, "positions must be one or several"),
        ({"positions": ["attn", "attention"]}, "positions must be one or several"),
        ({"target_modules": []}, "at least one target module"),
        ({"bias": "lora_only"}, "bias must be one of"),
        ({"layers_pattern": "layer"}, "layers_pattern needs layers_to_transform"),
        ({"layers_to_transform": [0], "target_modules": ".*query"}, "layers_to_transform works with"),
    ],
)
def test_nonsense_is_refused(fields, message, no_shape_checks):
    with pytest.raises(ValueError, match=message):
        PropulsionConfig(**fields)


def test_one_module_to_save_is_a_list_of_one(no_shape_checks):
    assert PropulsionConfig(modules_to_save="classifier").modules_to_save == ["classifier"]


def test_an_integral_degree_becomes_an_integer():
    assert type(PropulsionConfig(degree=15.0).degree) is int
    assert PropulsionConfig(degree=1.5).degree == 1.5


@pytest.mark.parametrize(
    "config",
    [
        PropulsionConfig(degree=2.5, positions=["attn", "mlp"], layers_to_transform=[0, 3]),
        PropulsionConfig(target_modules=["query"], exclude_modules=["pooler"], modules_to_save=["classifier"]),
        PropulsionConfig(task_type="SEQ_CLS", bias="propulsion_only"),
    ],
    ids=["positions", "targets", "task"],
)
def test_a_config_survives_saving_copying_and_pickling(config, tmp_path):
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_the_enum_member_is_a_member():
    member = PeftType("PROPULSION")
    assert member is PeftType["PROPULSION"] is PropulsionConfig().peft_type
    assert list(PeftType).count(member) == 1
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert json.loads(json.dumps(member)) == "PROPULSION"


def test_importing_again_changes_nothing():
    member, size = PropulsionConfig().peft_type, len(PeftType)
    importlib.reload(registration)
    importlib.reload(propulsion)
    assert len(PeftType) == size
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[member] is PropulsionConfig
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[member] is PropulsionModel
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING[member] == "propulsion_"


def test_reimported_classes_replace_the_old_ones():
    # This needs another process, since the classes of this one are in use.
    code = """
import sys, propulsion
from peft import mapping
for name in [n for n in sys.modules if n.split(".")[0] == "propulsion"]:
    del sys.modules[name]
import propulsion as again
assert again.PropulsionConfig is not propulsion.PropulsionConfig
assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["PROPULSION"] is again.PropulsionConfig
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_config_unpickles_where_propulsion_was_not_imported(tmp_path):
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(PropulsionConfig(degree=7)))
    code = "import pickle, sys; assert pickle.load(open(sys.argv[1], 'rb')).degree == 7"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "config.pickle")], check=True)


def test_another_method_of_this_name_is_refused(monkeypatch):
    other = type("OtherConfig", (), {})
    monkeypatch.setitem(mapping.PEFT_TYPE_TO_CONFIG_MAPPING, registration.PROPULSION, other)
    with pytest.raises(RuntimeError, match="already has a method 'propulsion'"):
        registration.register(PropulsionConfig, PropulsionModel)


def test_a_registry_of_another_shape_is_reported(monkeypatch):
    monkeypatch.delattr(mapping, "PEFT_TYPE_TO_PREFIX_MAPPING")
    with pytest.raises(RuntimeError, match=f"peft {peft.__version__} does not let Propulsion register"):
        registration.register(PropulsionConfig, PropulsionModel)


def test_an_enum_of_another_shape_is_reported(monkeypatch):
    monkeypatch.setattr(registration, "PeftType", type("PeftType", (str,), {"__members__": {}}))
    with pytest.raises(RuntimeError, match=r"the enum peft.utils.peft_types.PeftType is not as expected"):
        registration._add_member("PROPULSION")
