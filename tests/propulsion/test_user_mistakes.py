"""Mistakes in options, paths and files are one line with a remedy, and similar names are suggested."""

import dataclasses
import json
import shutil

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from propulsion import PropulsionConfig
from propulsion.adapters import load_adapter
from propulsion.data.tasks import get_task
from propulsion.errors import UserError, library_errors, run_command
from propulsion.methods import Method, apply_method
from propulsion.pretrained import check_pooling, load_classifier
from propulsion.train import TrainConfig, run
from propulsion.training.config import check_reporting
from propulsion.training.presets import get_preset
from propulsion.user_files import read_json

LONG = "a" * 300


def refused(call, message):
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.fixture
def checkpoint(tiny_model, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tiny_model, tmp_path / "checkpoint")


@pytest.mark.parametrize("content", ["[]", "null", "5", '"text"', "{", "[" * 100_000, "\x00"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_files_of_a_model_that_hold_no_object(checkpoint, name, content):
    (checkpoint / name).write_text(content)
    refused(lambda: load_classifier(checkpoint, num_labels=2), f"{name} is damaged: ")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"num_hidden_layers": "six"},
            "'num_hidden_layers': TypeError: Field 'num_hidden_layers' expected int, got str",
        ),
        ({"id2label": 5}, "cannot load a model from folder .*TypeError"),
        ({"dtype": "float99"}, "cannot load a model from folder .*float99"),
        ({"model_type": ["bert"]}, "cannot load a model from folder"),
        ({"hidden_act": "nothing"}, "cannot load the weights of .*KeyError: 'nothing'"),
        ({"num_attention_heads": 0}, "cannot load the weights of .*ZeroDivisionError"),
    ],
)
def test_values_of_a_model_that_make_no_sense(checkpoint, values, message):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | values))
    refused(lambda: load_classifier(checkpoint, num_labels=2), message)


@pytest.mark.parametrize("content", ["[]", "{}", "5", '{"model": {}}'])
def test_a_tokenizer_that_is_none(checkpoint, content):
    (checkpoint / "tokenizer.json").write_text(content)
    (checkpoint / "vocab.txt").unlink(missing_ok=True)
    refused(lambda: load_classifier(checkpoint, num_labels=2), "cannot load a tokenizer of")


@pytest.mark.parametrize("modes", [5, {"mean": True}])
def test_a_pooling_that_is_no_name(checkpoint, modes):
    (checkpoint / "modules.json").write_text(json.dumps([{"type": "x.Pooling", "path": "1_Pooling"}]))
    (checkpoint / "1_Pooling").mkdir()
    (checkpoint / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": modes}))
    refused(lambda: load_classifier(checkpoint, num_labels=2), "pooling_mode is .*, expected text or a list")


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    """A model and a folder of its saved adapter, with a record of the model."""
    model, _ = load_classifier(tiny_model, num_labels=2)
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")).save_pretrained(folder)
    (folder / "base_model.json").write_text('{"fingerprint": "another"}')
    return folder


ADAPTER_DAMAGE = {
    "adapter_config.json is damaged: expected an object": ("adapter_config.json", "[]"),
    "adapter_config.json is damaged: it has no peft_type": ("adapter_config.json", "{}"),
    "the adapter in .* does not fit this model; .*'NOTHING'": ("adapter_config.json", '{"peft_type": "NOTHING"}'),
    "base_model.json is damaged: it has no fingerprint": ("base_model.json", "{}"),
    "base_model.json is damaged: expected an object": ("base_model.json", "[]"),
    "the adapter in .* does not fit this model; .*(eserializ|header)": ("adapter_model.safetensors", "[]"),
}


@pytest.mark.parametrize("message", ADAPTER_DAMAGE)
def test_damaged_files_of_an_adapter(saved, tiny_model, tmp_path, message):
    folder = shutil.copytree(saved, tmp_path / "adapter")
    (folder / "base_model.json").unlink()
    name, content = ADAPTER_DAMAGE[message]
    (folder / name).write_text(content)
    refused(lambda: load_adapter(load_classifier(tiny_model, num_labels=2)[0], folder), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: {n: v for n, v in w.items() if "classifier" not in n},
            "does not fit this model.*(lacks|KeyError).*classifier",
        ),
        (lambda w: {n: v for n, v in w.items() if "lora_B" not in n}, "does not fit this model: it lacks .*lora_B"),
        (
            lambda w: w | {"base_model.model.other": next(iter(w.values()))},
            "there is no place for base_model.model.other",
        ),
        (lambda w: {n: v / 0 for n, v in w.items()}, "is damaged: .* holds values that are not finite"),
    ],
)
def test_weights_of_an_adapter_that_do_not_fit(saved, tiny_model, tmp_path, change, message):
    folder = shutil.copytree(saved, tmp_path / "adapter")
    (folder / "base_model.json").unlink()
    file = folder / "adapter_model.safetensors"
    save_file({n: v.contiguous().clone() for n, v in change(load_file(file)).items()}, file)
    refused(lambda: load_adapter(load_classifier(tiny_model, num_labels=2)[0], folder), message)


@pytest.mark.parametrize(
    "spec", ["propulsion", "lora:r=2", "ia3:target_modules=query+,feedforward_modules=query+", "prompt_tuning",
             "prefix_tuning", "p_tuning", "adalora", "vera:r=2", "ln_tuning", "vblora:num_vectors=4,vector_length=8",
             "trainable_tokens:token_indices=[5]", "lora:r=2,target_modules=query+word_embeddings"],
)  # fmt: skip
def test_every_kind_of_adapter_that_is_whole_loads(tiny_models, tmp_path, spec):
    folder = tiny_models["SEQ_CLS"]
    model, _ = load_classifier(folder, num_labels=2)
    if "trainable_tokens" in spec or "vblora" in spec:
        spec += ",target_modules=" + ("word_embeddings+" if "tokens" in spec else "query+")
    apply_method(model, Method.parse(spec), task_type="SEQ_CLS").save_pretrained(tmp_path)
    load_adapter(load_classifier(folder, num_labels=2)[0], tmp_path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "prompt_tuning:num_virtual_tokens=-1",
            "num_virtual_tokens of method prompt_tuning is -1, .*negative",
        ),
        ("prefix_tuning:num_virtual_tokens=1.5", "method prefix_tuning, with num_virtual_tokens=1.5, cannot"),
        ("lora:target_modules=(((", r"method lora, with target_modules=\(\(\(, .*missing \)"),
        ("ia3:target_modules=(((,feedforward_modules=x", "method ia3, with .*missing"),
        ("propulsion:target_modules=(((", "target_modules must be a valid regular expression"),
        ("propulsion:degree=1e30", "degree must be at most 1,000,000, got 1e.30"),
        ("propulsion:degree=1e38", "degree must be at most"),
        ("lora:r=two", "method lora, with r=two, cannot"),
        ("lora:lora_dropout=7", "lora_dropout of method lora is 7, .*probability"),
    ],
)
def test_options_that_a_method_cannot_use(tiny_model, spec, message):
    model, _ = load_classifier(tiny_model, num_labels=2)
    refused(lambda: apply_method(model, Method.parse(spec), task_type="SEQ_CLS"), message)


@pytest.fixture
def config(tiny_model, tmp_path):
    return TrainConfig(model=str(tiny_model), max_steps=1, use_cpu=True, disable_tqdm=True, max_train_samples=8,
                       max_eval_samples=6, output_dir=tmp_path / "run")  # fmt: skip


@pytest.mark.parametrize("kind", ["name too long", "a link to itself", "no such user"])
@pytest.mark.parametrize("option", ["model", "data_dir", "adapter", "output_dir"])
def test_paths_that_lead_nowhere(config, tmp_path, option, kind, capsys, monkeypatch):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    path = {"name too long": tmp_path / LONG, "a link to itself": tmp_path / "loop", "no such user": "~nobody-here/x"}
    value = str(path[kind]) if option == "model" else type(tmp_path)(path[kind])
    monkeypatch.chdir(tmp_path)
    if (option, kind) == ("output_dir", "no such user"):
        value = value / LONG  # Otherwise a folder of this name, as in shells.
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: run(dataclasses.replace(config, **{option: value})))
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert path[kind] if isinstance(path[kind], str) else path[kind].name in line


def test_what_a_library_raises_is_one_line_and_the_rest_passes():
    for error, reason in (
        (KeyError("name"), "KeyError: 'name'"),
        (ValueError("why\nmore"), "why"),
        (ValueError(), "Value"),
    ):
        with pytest.raises(UserError, match=f"it failed: {reason}"), library_errors("it failed"):
            raise error
    for error in (UserError("a mistake"), MemoryError(), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, library_errors("it failed"):
            raise error
        assert caught.value is error


def test_errors_of_the_file_system_are_one_line_and_others_keep_their_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: (tmp_path / LONG).read_text())
    assert caught.value.code == 2
    assert capsys.readouterr().err.strip() == f"error: cannot use {tmp_path / LONG}: File name too long"
    with pytest.raises(FileNotFoundError):
        run_command(lambda: (tmp_path / "own").read_text())


def test_json_of_another_form(tmp_path):
    (tmp_path / "a.json").write_text('{"b": 1}')
    assert read_json(tmp_path / "a.json", needed="b") == {"b": 1}
    refused(lambda: read_json(tmp_path / "a.json", list), "expected a list of JSON, got dict")
    refused(lambda: read_json(tmp_path / "a.json", needed="c"), "a.json is damaged: it has no c")
    refused(lambda: read_json(tmp_path / "b.json"), "cannot read .*b.json: No such file")


@pytest.mark.parametrize(
    ("call", "suggestion"),
    [
        (lambda: get_task("sts2"), r"unknown task 'sts2' \(did you mean .*sst2.*\?\): the tasks are"),
        (lambda: get_task("cola1"), r"\(did you mean cola\?\)"),
        (lambda: Method.parse("propulson"), r"unknown method 'propulson' \(did you mean propulsion\?\)"),
        (lambda: Method.parse("adlora"), r"\(did you mean adalora"),
        (lambda: check_pooling("meen"), r"pooling is 'meen' \(did you mean mean\?\)"),
        (lambda: TrainConfig(lr_scheduler_type="lineer"), r"'lineer' \(did you mean linear\?\), expected one of"),
        (lambda: get_preset("glue-rte-roberta-bas-all"), r"\(did you mean glue-rte-roberta-base-all"),
        (lambda: check_reporting(["tensorbord"]), r"'tensorbord' \(did you mean tensorboard\?\)"),
        (lambda: PropulsionConfig(positions="qury"), r"'qury' \(did you mean query\?\)"),
        (lambda: PropulsionConfig(pooling="maen"), r"'maen' \(did you mean mean\?\)"),
        (lambda: PropulsionConfig(bias="non"), r"'non' \(did you mean none\?\)"),
    ],
)  # fmt: skip
def test_similar_values_are_suggested(call, suggestion):
    with pytest.raises(ValueError, match=suggestion):
        call()


def test_nothing_is_suggested_where_nothing_is_similar():
    with pytest.raises(UserError, match="unknown task 'xyzzy': the tasks are"):
        get_task("xyzzy")


def test_options_of_methods_and_training_are_suggested(config, tiny_model):
    model, _ = load_classifier(tiny_model, num_labels=2)
    refused(
        lambda: apply_method(model, Method("lora", {"lora_alfa": 1}), task_type="SEQ_CLS"), "did you mean lora_alpha"
    )
    bad = dataclasses.replace(
        config, learning_rate=None, head_learning_rate=None, training_options=("adam_epsilonn=1",)
    )
    refused(lambda: run(bad), r"has no field adam_epsilonn \(did you mean adam_epsilon\?\)")
