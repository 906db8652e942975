"""The training command: resumed bit for bit after a kill, refuses bad options, its adapter loads with plain peft."""

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file, save_file
from task_rows import ROWS, write_rows
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from analyses.core.command_line import default_options, options_of, words
from propulsion.adapters import load_adapter
from propulsion.data import load_task_data
from propulsion.data.kinds import kind_of
from propulsion.data.tasks import get_task
from propulsion.errors import UserError
from propulsion.pretrained import load_classifier
from propulsion.train import TrainConfig, main, parse, run
from propulsion.training import evaluate, manifest, run_folder
from propulsion.training import trainer as trainer_module
from propulsion.training.learning_rates import SCALE_RATE
from propulsion.training.run_folder import RESULT
from tests.faults.runs import Killed, fail_at

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def base_config(tiny_model):
    """Checkpoints and evaluations every two steps, five epochs of four; the model has dropout."""
    return TrainConfig(
        model=str(tiny_model), degree=3, max_steps=20, max_train_samples=16, max_eval_samples=10, save_steps=2,
        per_device_train_batch_size=4, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        use_cpu=True, disable_tqdm=True, seed=3, learning_rate=0.02, head_learning_rate=None,
    )  # fmt: skip


@pytest.fixture
def config(base_config, tmp_path):
    return dataclasses.replace(base_config, output_dir=tmp_path / "run")


def arguments(config):
    """The command line of a configuration."""
    return words(options_of(config), default_options(type(config)))


def weights(folder):
    return load_file(folder / "model" / "adapter_model.safetensors")


def history(result):
    """The logged values without times."""
    return [{k: v for k, v in entry.items() if "runtime" not in k and "second" not in k} for entry in result.history]


def assert_same(result, folder, expected, expected_folder):
    assert result.metrics == expected.metrics
    assert result.steps == expected.steps
    found, wanted = weights(folder), weights(expected_folder)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert history(result) == history(expected)


@pytest.fixture(scope="module")
def uninterrupted(base_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return run(dataclasses.replace(base_config, output_dir=folder)), folder


def test_a_killed_process_ends_with_the_same_bits(config, uninterrupted):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "propulsion.train", *arguments(config)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not (config.output_dir / "checkpoint-4").exists():
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
    assert not (config.output_dir / "result.json").exists()
    assert_same(run(config), config.output_dir, *uninterrupted)


@pytest.mark.parametrize(
    ("owner", "function", "call"),
    [
        (manifest, "publish", 1),  # Everything is written under the partial name.
        (os, "rename", 3),  # Not renamed yet: a new checkpoint, or one that replaces an old one.
        (os, "rename", 4),
        (trainer_module, "remove_checkpoint", 2),  # Both the new and the old checkpoint exist.
        (trainer_module.TaskTrainer, "_save_rng_state", 2),  # Half a checkpoint is written.
        (trainer_module.TaskTrainer, "evaluate", 5),
        (trainer_module.TaskTrainer, "save_model", 10),
        (trainer_module.TaskTrainer, "_load_best_model", 1),
        (trainer_module.TaskTrainer, "evaluate", 11),  # The last evaluation, after training.
        (trainer_module.TaskTrainer, "save_model", 11),  # Saving the trained model.
    ],
)
def test_killed_at_any_moment(config, uninterrupted, monkeypatch, owner, function, call):
    with monkeypatch.context() as patch:
        fail_at(patch, owner, function, call)
        with pytest.raises(Killed):
            run(config)
    names = [path.name for path in config.output_dir.glob("checkpoint-*")]
    for name in names:  # Only complete checkpoints count.
        assert (config.output_dir / name / "trainer_state.json").is_file()
        assert (config.output_dir / name / "optimizer.pt").is_file()
    assert_same(run(config), config.output_dir, *uninterrupted)
    assert not list(config.output_dir.glob(".*"))


def test_a_finished_run_is_not_trained_again(config):
    first = run(config)
    before = (config.output_dir / "result.json").stat().st_mtime_ns
    assert run(config) == first
    assert (config.output_dir / "result.json").stat().st_mtime_ns == before


def test_a_moved_folder_is_resumed(config, uninterrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.TaskTrainer, "_load_best_model", lambda self: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run(config)
    moved = dataclasses.replace(config, output_dir=tmp_path / "elsewhere")
    shutil.move(config.output_dir, moved.output_dir)
    assert_same(run(moved), moved.output_dir, *uninterrupted)


def test_old_checkpoints_go_and_the_best_stays(config):
    result = run(config)
    steps = {int(path.name.split("-")[1]) for path in config.output_dir.glob("checkpoint-*")}
    scores = {entry["step"]: entry["eval_accuracy"] for entry in result.history if "eval_accuracy" in entry}
    best = max(scores.values())
    first_best = min(step for step, value in scores.items() if value == best)
    assert steps == {18, 20, first_best}
    assert result.metrics["accuracy"] == best


def test_early_stopping(config):
    patient = dataclasses.replace(config, early_stopping_patience=1, learning_rate=1e-12, head_learning_rate=1e-12)
    assert run(patient).steps == 4  # The first evaluation is the best; the second is not better.


@pytest.mark.parametrize(("method", "options"), [("full", ()), ("lora", ("r=2",)), ("bitfit", ())])
def test_other_methods_resume_too(config, uninterrupted, method, options, monkeypatch, tmp_path):
    other = dataclasses.replace(config, method=method, method_options=options, learning_rate=None, max_steps=6)
    whole = run(dataclasses.replace(other, output_dir=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.TaskTrainer, "_load_best_model", lambda self: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run(other)
    shutil.rmtree(other.output_dir / "checkpoint-6")
    assert history(run(other))[-1] == history(whole)[-1]


@pytest.mark.parametrize("task", ["sst2", "stsb", "boolq", "conll2003", "squad", "xsum"])
def test_accumulation_and_checkpointing_change_no_gradient(config, tiny_models, tmp_path, task):
    """Losses and norms of gradients are equal, to the rounding of float32 sums in another order."""
    # All rows have the same number of learnt tokens, so that the mean of means is the mean.
    rows = ROWS[task][:1] * 16 if task in ("conll2003", "squad") else (ROWS[task] * 8)[:16]
    plain = dataclasses.replace(
        config, task=task, data_dir=write_rows(tmp_path, task, rows), max_train_samples=None, max_eval_samples=None,
        model=str(tiny_models[kind_of(get_task(task)).task_type]), max_steps=3, per_device_train_batch_size=8,
        max_target_length=6, eval_strategy="no", load_best_model_at_end=False, save_strategy="no", logging_steps=1,
        learning_rate=1e-3, overwrite_output_dir=True,
    )  # fmt: skip
    logged = []
    accumulated = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    for change in ({}, accumulated, {"gradient_checkpointing": True}):
        history = run(dataclasses.replace(plain, **change)).history
        logged.append([(entry["loss"], entry["grad_norm"]) for entry in history if "grad_norm" in entry])
    assert len(logged[0]) == 3
    assert logged[1] == [pytest.approx(pair, rel=1e-3) for pair in logged[0]]
    assert logged[2] == [pytest.approx(pair, rel=1e-3) for pair in logged[0]]


def test_bf16_trains(config):
    assert run(dataclasses.replace(config, bf16=True, max_steps=2)).steps == 2


def test_streamed_rows_train_and_resume(config, tmp_path, monkeypatch):
    rows = "".join(json.dumps({"sentence": f"text {i}", "label": i % 2}) + "\n" for i in range(40))
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(rows)
    streamed = dataclasses.replace(
        config, task="sst2", data_dir=tmp_path, streaming=True, max_train_samples=30, max_steps=6
    )
    whole = run(dataclasses.replace(streamed, output_dir=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.TaskTrainer, "_load_best_model", lambda self: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run(streamed)
    shutil.rmtree(streamed.output_dir / "checkpoint-6")
    assert_same(run(streamed), streamed.output_dir, whole, tmp_path / "whole")


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_run_of_another_configuration_is_refused(config):
    run(dataclasses.replace(config, max_steps=2))
    with pytest.raises(
        UserError, match=r"another configuration \(degree 3 there, 4 here, max_steps 2 there, 20 here\)"
    ):
        run(dataclasses.replace(config, degree=4))
    assert run(dataclasses.replace(config, degree=4, max_steps=1, overwrite_output_dir=True)).steps == 1


def test_a_folder_of_something_else_is_refused(config):
    (config.output_dir / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds something else \(checkpoint-3\)"):
        run(config)


def test_divergence_names_the_step_and_the_last_good_checkpoint(config):
    hopeless = dataclasses.replace(config, learning_rate=1e3, warmup_steps=0, save_steps=1, eval_steps=1, degree=15)
    with pytest.raises(UserError, match=r"training diverged: .* at step \d+.*; lower the learning rate") as caught:
        run(hopeless)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_never_saved(config, monkeypatch):
    original = trainer_module.TaskTrainer._maybe_log_save_evaluate

    def spoil(self, *args, **kwargs):
        if self.state.global_step == 6:
            next(p for p in self.model.parameters() if p.requires_grad).data[:] = float("nan")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module.TaskTrainer, "_maybe_log_save_evaluate", spoil)
    with pytest.raises(UserError, match=r"no longer finite at step 6; the last good checkpoint is .*checkpoint-4;"):
        run(config)
    assert not (config.output_dir / "checkpoint-6").exists()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")]
)
def test_a_full_disk_loses_no_earlier_checkpoint(config, uninterrupted, monkeypatch, error):
    original, calls = torch.save, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) > 5:
            raise error
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(
            UserError, match=r"cannot write .*checkpoint-\d+ is complete: .* resumes from it, once there is space"
        ) as caught:
            run(config)
    assert "\n" not in str(caught.value)
    last = trainer_module.latest_checkpoint(config.output_dir)
    assert last is not None
    assert str(last) in str(caught.value)
    assert_same(run(config), config.output_dir, *uninterrupted)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:20])


def test_a_damaged_checkpoint_is_named(config, tmp_path):
    """A checkpoint that is cut short, or lacks the optimizer's state, is not resumed from."""
    whole = dataclasses.replace(config, output_dir=tmp_path / "whole", max_steps=4)
    run(whole)
    (whole.output_dir / "result.json").unlink()
    shutil.rmtree(whole.output_dir / "checkpoint-4")
    parts = ("optimizer.pt", "scheduler.pt", "adapter_model.safetensors", "trainer_state.json", "rng_state.pth")
    damages = [*((name, cut_short) for name in parts), *((name, Path.unlink) for name in parts[:2])]
    for name, damage in damages:
        folder = tmp_path / "damaged"
        shutil.copytree(whole.output_dir, folder)
        damage(folder / "checkpoint-2" / name)
        with pytest.raises(UserError, match=r"checkpoint-2 is damaged \(.*\): remove it") as caught:
            run(dataclasses.replace(whole, output_dir=folder))
        assert "\n" not in str(caught.value)
        shutil.rmtree(folder)
    assert run(whole).steps == 4
    (whole.output_dir / "result.json").write_text("{")
    with pytest.raises(UserError, match=r"result.json is damaged .*: remove it"):
        run(whole)


def test_a_disk_that_is_full_at_the_end(config, monkeypatch):
    """If the result cannot be written, the command ends with one line; the same command completes the run later."""
    short = dataclasses.replace(config, max_steps=2)

    def full(path, content):
        raise OSError(28, "No space left on device")

    write = manifest.write_json
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write_json", lambda path, *rest: (full if path.name == RESULT else write)(path, *rest))
        with pytest.raises(UserError, match=r"cannot write .*result.json: No space left on device"):
            run(short)
    result = run(short)
    predictions = run_folder.predictions_of(short.output_dir)
    data = load_task_data("demo", n_train=16, n_validation=10, seed=3)
    right = [found == label for found, label in zip(predictions, data.validation["label"], strict=True)]
    assert sum(right) / len(right) == result.metrics["accuracy"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "lorra"}, "unknown method 'lorra' .did you mean lora or .*: the methods are full, bitfit, head"),
        ({"method": "lora", "method_options": ("rank=3",)}, "method lora has no option rank; its options: "),
        ({"method_options": ("r",)}, "option 'r' is not of the form"),
        ({"method": "none"}, "method none trains nothing"),
        ({"report_to": ("nothing_such",)}, "cannot report to 'nothing_such': choose none, all, .*tensorboard"),
        ({"report_to": ("none", "tensorboard")}, "report_to none stands alone"),
        ({"lr_scheduler_type": "square"}, "lr_scheduler_type is 'square', expected one of linear, "),
        ({"training_options": ("adam=1",)}, "TrainingArguments has no field adam"),
        ({"training_options": ("learning_rate=1",)}, "cannot set learning_rate: it has an option of its own"),
        ({"training_options": ("optim=adafactor",)}, "cannot set optim"),
        ({"degree": -1.0}, "degree must be a finite number > 0"),
        ({"adapter": Path("nowhere")}, "nowhere holds no adapter"),
    ],
)  # fmt: skip
def test_unusable_options(config, change, message):
    with pytest.raises(UserError, match=message) as caught:
        run(dataclasses.replace(config, **change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"max_steps": -2}, {"learning_rate": 0.0}, {"num_train_epochs": -1.0}, {"warmup_steps": -1.0},
        {"streaming": True}, {"eval_strategy": "epoch"}, {"early_stopping_patience": 2}, {"save_total_limit": 0},
        {"load_best_model_at_end": True}, {"eval_steps": 0},
    ],
)  # fmt: skip
def test_options_out_of_range(change):
    with pytest.raises(UserError):
        TrainConfig(**change)


# --- what a run leaves ----------------------------------------------------------------------------------------------


def test_the_adapter_loads_with_plain_peft(config):
    result = run(config)
    model = AutoPeftModelForSequenceClassification.from_pretrained(config.output_dir / "model", num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(config.output_dir / "model")
    tokenizer.model_max_length = 64
    data = load_task_data("demo", n_train=16, n_validation=10, seed=3)
    assert evaluate(model, tokenizer, data) == result.metrics


def test_an_adapter_is_evaluated_and_refused_by_another_model(config, tmp_path):
    result = run(config)
    saved = dataclasses.replace(
        config, adapter=config.output_dir / "model", output_dir=tmp_path / "evaluated", max_steps=0
    )
    assert run(saved).metrics == result.metrics
    other = tmp_path / "other"
    shutil.copytree(config.model, other)
    state = load_file(other / "model.safetensors")
    state["bert.embeddings.word_embeddings.weight"] += 0.1
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="is of another base model: this model has other weights"):
        run(dataclasses.replace(saved, model=str(other), output_dir=tmp_path / "refused"))


def test_a_fully_tuned_model_loads_with_plain_transformers(config):
    result = run(dataclasses.replace(config, method="full", learning_rate=None, max_steps=4))
    model = AutoModelForSequenceClassification.from_pretrained(config.output_dir / "model")
    tokenizer = AutoTokenizer.from_pretrained(config.output_dir / "model")
    data = load_task_data("demo", n_train=16, n_validation=10, seed=3)
    assert evaluate(model, tokenizer, data) == result.metrics


def test_a_saved_model_answers_by_the_names_of_labels(config, tmp_path):
    names = {0: "negative", 1: "positive"}
    folder = config.output_dir / "model"
    run(dataclasses.replace(config, method="full", learning_rate=None, max_steps=1))
    assert pipeline("text-classification", model=str(folder))("a fine film")[0]["label"] in names.values()
    adapted = dataclasses.replace(config, max_steps=1, output_dir=tmp_path / "adapted")
    run(adapted)
    base, tokenizer = load_classifier(config.model, num_labels=2)
    assert base.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    model = load_adapter(base, adapted.output_dir / "model")
    assert (model.config.id2label, model.config.label2id) == (names, {"negative": 0, "positive": 1})
    answer = pipeline("text-classification", model=model, tokenizer=tokenizer)("a fine film")
    assert answer[0]["label"] in names.values()


def test_tags_and_numbers_are_named_or_not(tmp_path, tiny_models):
    tagger = TrainConfig(
        task="wikiann", model=str(tiny_models["TOKEN_CLS"]), data_dir=write_rows(tmp_path, "wikiann"), max_steps=1,
        method="head", use_cpu=True, disable_tqdm=True, output_dir=tmp_path / "tags",
    )  # fmt: skip
    run(tagger)
    saved = AutoConfig.from_pretrained(tagger.output_dir / "model")
    assert saved.id2label[1] == "B-PER"
    assert len(saved.id2label) == 7


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_pooling_is_kept_with_what_was_trained(config, tmp_path, method):
    pooled = dataclasses.replace(config, method=method, learning_rate=None, max_steps=1, pooling="mean")
    assert run(pooled).pooling == "mean"
    folder = config.output_dir / "model"
    assert "pools by mean" in (folder / "README.md").read_text(encoding="utf-8")
    if method == "lora":
        assert json.loads((folder / "base_model.json").read_text(encoding="utf-8"))["pooling"] == "mean"
        again = dataclasses.replace(pooled, adapter=folder, max_steps=0, output_dir=tmp_path / "again")
        with pytest.raises(UserError, match="was trained with pooling mean, and the model has pooler"):
            run(dataclasses.replace(again, pooling="pooler"))
    else:
        again = dataclasses.replace(
            pooled, model=str(folder), max_steps=0, output_dir=tmp_path / "again", pooling="auto"
        )
    assert run(again).metrics == run(pooled).metrics
    with pytest.raises(UserError, match="holds a run of another configuration"):
        run(dataclasses.replace(pooled, pooling="first"))


def test_an_adapter_of_another_size_is_refused(config, tiny_models, tmp_path):
    run(dataclasses.replace(config, max_steps=1))
    (config.output_dir / "model" / "base_model.json").unlink()  # Adapters saved by plain peft lack this file.
    other = dataclasses.replace(config, adapter=config.output_dir / "model", output_dir=tmp_path / "other", max_steps=0,
                                task="mnli", data_dir=write_rows(tmp_path, "mnli"), max_train_samples=None,
                                max_eval_samples=None)  # fmt: skip
    expected = r"may be of another base model: Error.s. in loading .*: size mismatch for .*classifier.* \(and 1 more\)"
    with pytest.raises(UserError, match=expected) as caught:
        run(other)
    assert "\n" not in str(caught.value)


def test_rates_follow_the_degree(config):
    assert run(dataclasses.replace(config, learning_rate=None, max_steps=1)).learning_rates["scale"] == SCALE_RATE / 3


def test_the_command_prints_its_rule_and_a_table(config, capsys):
    main(dataclasses.replace(config, learning_rate=None, max_steps=2))
    printed = capsys.readouterr().out
    assert "0.02 / degree 3" in printed
    assert "weight decay 0\n" in printed
    assert "trained parameters" in printed
    assert "accuracy" in printed


def test_presets_are_overridden_by_options():
    found = parse(["--preset", "glue-rte-roberta-base-attn", "--degree", "7", "--max-steps", "3"])
    assert (found.task, found.positions, found.degree, found.max_steps) == ("rte", ("attn",), 7.0, 3)
    assert found.learning_rate == 2e-4
    with pytest.raises(UserError, match="unknown preset 'glue'"):
        parse(["--preset", "glue"])


def test_a_preset_runs_on_another_model_with_one_word_changed():
    # The paper's model and mpnet-base are of one size; all other options stay those of the paper.
    paper = parse(["--preset", "glue-sst2-roberta-base-all"])
    ours = parse(["--preset", "glue-sst2-roberta-base-all", "--model", "mpnet-base"])
    assert (paper.model, ours.model) == ("FacebookAI/roberta-base", "mpnet-base")
    assert dataclasses.replace(ours, model=paper.model) == paper


@pytest.mark.parametrize("family", ["MPNet", "Roberta"])
@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_a_preset_starts_trains_and_ends_on_a_model_of_either_family(family, task, tiny_model, tmp_path):
    """The option --model is the one word that changes; steps are few, and rows the test's own."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
             "max_position_embeddings": 140, "vocab_size": len(tokenizer),
             "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    network = getattr(transformers, f"{family}ForSequenceClassification")
    torch.manual_seed(0)
    network(getattr(transformers, f"{family}Config")(**sizes)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows").mkdir()
    for split in ("train", "validation"):
        texts = [{"sentence": f"row {i}", "label": i % 2} if task == "sst2" else
                 {"sentence1": f"row {i}", "sentence2": f"line {i}", "label": 0.5 * i} for i in range(8)]  # fmt: skip
        lines = "\n".join(map(json.dumps, texts))
        (tmp_path / "rows" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    options = ["--preset", f"glue-{task}-roberta-base-all", "--model", str(tmp_path / "model"), "--data-dir",
             str(tmp_path / "rows"), "--max-steps", "2", "--output-dir", str(tmp_path / "run")]  # fmt: skip
    result = run(parse(options))
    assert max(entry["step"] for entry in result.history) == 2
    scales = [value for name, value in weights(tmp_path / "run").items() if "propulsion" in name]
    assert scales
    assert all(bool(torch.isfinite(value).all()) for value in scales)
    config = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text("utf-8"))
    assert (config["degree"], config["peft_type"]) == (get_task(task).degree, "PROPULSION")


def test_tensorboard_has_what_was_logged(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(dataclasses.replace(config, max_steps=4, logging_steps=1, report_to=("tensorboard",)))
    found: dict[str, dict[int, float]] = {"train/loss": {}, "eval/accuracy": {}}
    for path in (config.output_dir / "runs").rglob("events.*"):
        events = EventAccumulator(str(path)).Reload()
        for tag in set(events.Tags()["scalars"]) & set(found):
            found[tag] |= {event.step: event.value for event in events.Scalars(tag)}
    for tag, name in {"train/loss": "loss", "eval/accuracy": "eval_accuracy"}.items():
        logged = {entry["step"]: entry[name] for entry in result.history if name in entry}
        assert found[tag] == pytest.approx(logged)
        assert len(logged) == {"loss": 4, "eval_accuracy": 2}[name]


@pytest.mark.parametrize("reporter", ["tensorboard", "wandb"])
def test_a_missing_reporter_is_one_line(config, monkeypatch, reporter):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in _HIDDEN else find(name, *a))
    with pytest.raises(UserError, match=rf"^cannot report to {reporter}: it is not installed here \(pip install"):
        run(dataclasses.replace(config, report_to=(reporter,)))
    assert not config.output_dir.exists()


_HIDDEN = ("tensorboard", "tensorboardX", "wandb")

# --- several processes ----------------------------------------------------------------------------------------------


LAUNCHERS = {
    "data parallel": ("--multi_gpu", "-m", "propulsion.train"),
    "sharded": ("--use_fsdp", "--fsdp_version", "2", str(Path(__file__).with_name("shard_on_cpus.py"))),
}


@pytest.fixture(scope="module")
def one_process(base_config, tiny_models, tmp_path_factory):
    """The run that launched runs are compared with; it has an odd number of rows to evaluate and no dropout."""
    config = dataclasses.replace(
        base_config, model=str(tiny_models["SEQ_CLS"]), max_steps=6, learning_rate=1e-3, max_eval_samples=11,
        output_dir=tmp_path_factory.mktemp("one"),
    )  # fmt: skip
    return config, run(config)


@pytest.mark.parametrize("kind", LAUNCHERS)
def test_two_processes_reach_the_result_of_one(one_process, tmp_path, kind):
    """Each process has half of the batch; results are equal up to float32 rounding, since sums have another order."""
    one, expected = one_process
    two = dataclasses.replace(one, per_device_train_batch_size=2, output_dir=tmp_path / "two", use_cpu=False)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # A configuration of accelerate on this machine must not change the launch.
    environment["HF_HOME"] = str(tmp_path)
    command = [*launcher, *LAUNCHERS[kind], *arguments(two)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("trained parameters") == done.stdout.count("scale: ") == 1  # Only one process prints.
    found = json.loads((two.output_dir / "result.json").read_text())
    assert found["metrics"] == pytest.approx(expected.metrics)
    wanted, found = weights(one.output_dir), weights(two.output_dir)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)
    assert (two.output_dir / "checkpoint-6" / "pytorch_model_fsdp_0").is_dir() == (kind == "sharded")


def test_flat_parameters_are_refused(config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="needs version 2 of FSDP"):
        run(config)
