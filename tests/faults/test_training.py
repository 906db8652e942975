"""Faults of a training run: kills, a full disk, damage, two processes, options that cannot be used, infinite outputs.

Faults are raised within this process; `python -m tests.faults` kills processes at random moments.
"""

import dataclasses
import errno
import json
import os
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError

from propulsion import train as train_module
from propulsion.errors import Diverged, UserError
from propulsion.train import parse, run
from propulsion.training import run_folder, trainer
from propulsion.training.lock import LOCK, locked
from propulsion.training.trainer import TaskTrainer
from tests.faults.runs import CASES, Killed, configuration, differences, fail_at


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without flushing files to the disk, which no killed process needs, and without cards of models."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda self, folder: None)


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    """The folder of an uninterrupted run of each case, made when it is first asked for."""
    folders = {}

    def folder(case):
        if case not in folders:
            folders[case] = tmp_path_factory.mktemp("whole") / "run"
            run(configuration(tiny_model, folders[case], case))
        return folders[case]

    return folder


@pytest.fixture
def finished(tiny_model, whole, tmp_path):
    """The configuration of a finished run, in a folder that may be changed."""
    shutil.copytree(whole("linear"), tmp_path / "finished")
    return configuration(tiny_model, tmp_path / "finished")


@pytest.fixture
def at_the_end(finished):
    """A run that was killed in its final evaluation."""
    for name in ("result.json", "predictions.json"):
        (finished.output_dir / name).unlink()
    shutil.rmtree(finished.output_dir / "model")
    return finished


# --- kills ----------------------------------------------------------------------------------------------------------

LAST = "the final evaluation"
KILLS = [
    ("constant", LAST),  # Between two logs, and within an epoch.
    ("part of an epoch", LAST),
    ("early stopping", LAST),
    ("early stopping", 4),  # With a patience of 3, of which 2 are used up.
    ("similar lengths", 7),  # In the second epoch.
    ("accumulation", 14),
    ("evaluated at the start", 7),
    ("no logs", 7),
    ("AdaLoRA", 7),
]


@pytest.mark.parametrize(("case", "moment"), KILLS)
def test_a_killed_run_ends_as_if_it_had_not_been_killed(tiny_model, whole, tmp_path, monkeypatch, case, moment):
    config = configuration(tiny_model, tmp_path / "run", case)
    expected = whole(case)
    with monkeypatch.context() as patch:
        if moment == LAST:
            fail_at(patch, train_module, "signs", 1)
        else:
            fail_at(patch, TaskTrainer, "training_step", moment)
        with pytest.raises(Killed):
            run(config)
    assert list(config.output_dir.glob("checkpoint-*"))
    run(config)
    assert differences(config.output_dir, expected) == []


def test_early_stopping_stops_where_its_patience_ends(whole):
    assert run_folder.result_of(whole("early stopping"))["steps"] == 4


def test_the_best_evaluation_is_kept_between_two_checkpoints(tiny_model, tmp_path, monkeypatch):
    """The second evaluation is the best one, at step 2; checkpoints are due at steps 4 and 8."""
    config = configuration(
        tiny_model, tmp_path / "run", eval_strategy="steps", eval_steps=2, save_steps=4, load_best_model_at_end=True
    )
    scores = iter([0.9, 0.5, 0.5, 0.5])
    original = TaskTrainer.evaluate

    def scored(self, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(self, "_score", lambda: {"accuracy": next(scores)})
            return original(self, *args, **kwargs)

    loaded = []
    with monkeypatch.context() as patch:
        patch.setattr(TaskTrainer, "evaluate", scored)
        patch.setattr(TaskTrainer, "_load_best_model", lambda self: loaded.append(self._best().name) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(config)
    assert loaded == ["checkpoint-2"]
    assert (config.output_dir / "checkpoint-2").is_dir()
    # Without it the run would end with other weights.
    shutil.rmtree(config.output_dir / "checkpoint-2")
    with pytest.raises(UserError, match=r"checkpoint-2, the best checkpoint so far, is missing"):
        run(config)


# --- damage ---------------------------------------------------------------------------------------------------------


def flip_a_bit(path):
    """Change one bit; size and time stay."""
    times, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture(scope="module")
def loading(tiny_model, whole, tmp_path_factory):
    """A trainer that is about to resume a run, and the run's folder, which must be left as it is."""
    folder = tmp_path_factory.mktemp("loading") / "run"
    shutil.copytree(whole("linear"), folder)
    (folder / "result.json").unlink()
    kept = []

    def stop(self, **kwargs):
        kept.append(self)
        raise Killed

    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(TaskTrainer, "train", stop)
        with pytest.raises(Killed):
            run(configuration(tiny_model, folder))
    return kept[0], folder / "checkpoint-8"


@pytest.mark.parametrize("damage", [flip_a_bit, os.remove])
@pytest.mark.parametrize("name", [
    "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "progress_0.pt",
])  # fmt: skip
def test_a_damaged_checkpoint_is_not_used(loading, name, damage):
    resuming, checkpoint = loading
    content, times = (checkpoint / name).read_bytes(), (checkpoint / name).stat()
    damage(checkpoint / name)
    with pytest.raises(UserError, match=rf"checkpoint-8 is damaged \(checkpoint-8/{name} is .*\): remove it") as caught:
        TaskTrainer.__mro__[1].train(resuming, resume_from_checkpoint=str(checkpoint))
    assert "\n" not in str(caught.value)
    assert resuming.losses == []
    (checkpoint / name).write_bytes(content)
    os.utime(checkpoint / name, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_without_the_damaged_checkpoint_the_run_ends_the_same(at_the_end, whole):
    shutil.rmtree(at_the_end.output_dir / "checkpoint-8")
    run(at_the_end)
    assert differences(at_the_end.output_dir, whole("linear")) == []


def test_a_damaged_result_is_not_used(finished, whole):
    output = finished.output_dir
    identity = json.loads((output / "run.json").read_text())
    for name in ("model/adapter_model.safetensors", "predictions.json", "result.json"):
        content = (output / name).read_bytes()
        (output / name).write_bytes(content.replace(b"steps", b"Steps") if name == "result.json" else content[:-1])
        words = {
            "result.json": r"result.json is damaged \(result.json is not as it was written, by files.json\): remove it",
        }.get(name, f"holds a finished run, but {name} is not as it was written, by files.json: put it back")
        with pytest.raises(UserError, match=words):
            run_folder.folder_state(output, identity, overwrite=False)
        (output / name).write_bytes(content)
    shutil.rmtree(output / "model")
    with pytest.raises(UserError, match=r"but model/\S+ is missing.* remove model and result.json, and"):
        run(finished)
    (output / "result.json").unlink()
    run(finished)
    assert differences(output, whole("linear")) == []


def test_a_damaged_adapter_starts_no_other_run(finished, tmp_path):
    model = finished.output_dir / "model"
    flip_a_bit(model / "adapter_model.safetensors")
    other = dataclasses.replace(finished, adapter=model, output_dir=tmp_path / "other", max_steps=0)
    with pytest.raises(UserError, match=r"model is damaged \(model/adapter_model.safetensors is not as it was written"):
        run(other)


def test_a_checkpoint_of_several_processes_is_resumed_by_as_many(at_the_end):
    manifest = run_folder.Manifest(at_the_end.output_dir)
    checkpoint = at_the_end.output_dir / "checkpoint-8"
    shutil.copy(checkpoint / "progress_0.pt", checkpoint / "progress_1.pt")
    manifest.record({"checkpoint-8/progress_1.pt": checkpoint / "progress_1.pt"})
    with pytest.raises(UserError, match="was written by 2 processes, and this run has 1: resume it with as many"):
        run(at_the_end)


# --- a full disk ----------------------------------------------------------------------------------------------------

NO_SPACE = "No space left on device"
FULL = {
    "rows": (train_module, "check_inputs", OSError(errno.ENOSPC, NO_SPACE)),
    "weights of a checkpoint": (trainer.Trainer, "save_model", SafetensorError(f"I/O error: {NO_SPACE} (os error 28)")),
    "optimizer": (torch, "save", RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/1")),
    "quota": (torch, "save", OSError(errno.EDQUOT, "Disk quota exceeded")),
    "list of files": (trainer.Manifest, "_write", OSError(errno.ENOSPC, NO_SPACE)),
    # A class of its own is not exported by tokenizers.
    "tokenizer": (train_module.run_folder, "explain_loading", Exception(f"{NO_SPACE} (os error 28)")),
    "result": (run_folder, "finish", OSError(errno.ENOSPC, NO_SPACE)),
}


@pytest.mark.parametrize("kind", FULL)
def test_a_full_disk_is_one_line_and_loses_nothing(tiny_model, whole, tmp_path, monkeypatch, kind):
    config = configuration(tiny_model, tmp_path / "run")
    owner, function, error = FULL[kind]
    with monkeypatch.context() as patch:
        fail_at(patch, owner, function, 1, error)
        with pytest.raises(UserError, match=r"cannot (write|use).*once there is space$") as caught:
            run(config)
    words = str(caught.value)
    assert "\n" not in words
    checkpoints = sorted(config.output_dir.glob("checkpoint-*"))
    assert (f"{checkpoints[-1]} is complete: the same command resumes" if checkpoints else "starts from the") in words
    assert not any((config.output_dir / name).exists() for name in ("result.json", ".model.partial", LOCK))
    if kind in ("optimizer", "tokenizer"):
        run(config)
        assert differences(config.output_dir, whole("linear")) == []


# --- two processes --------------------------------------------------------------------------------------------------


def test_a_second_process_is_told_who_holds_the_folder(finished, tmp_path):
    for folder in (finished.output_dir, tmp_path / "new"):
        with (
            locked(folder),
            pytest.raises(UserError, match=rf"is in use by process {os.getpid()} on .*: wait") as caught,
        ):
            run(dataclasses.replace(finished, output_dir=folder))
        assert "space" not in str(caught.value)
    assert not (tmp_path / "new").exists()
    assert run(finished).steps == 8


def test_the_lock_of_a_killed_process_stops_nobody(finished):
    (finished.output_dir / LOCK).write_text("process 1 on elsewhere")
    assert run(finished).steps == 8
    assert not (finished.output_dir / LOCK).exists()


# --- options --------------------------------------------------------------------------------------------------------

UNUSABLE = {
    "linear": ({"lr_scheduler_type": "linaer"}, "did you mean linear"),
    "a schedule that needs more": ({"lr_scheduler_type": "cosine_with_min_lr"}, "cosine_with_min_lr cannot be used"),
    "adam": ({"training_options": ("adam_beta1=2",)}, "Invalid beta parameter"),
    "hub": ({"training_options": ("push_to_hub=true",)}, "push_to_hub cannot be used here"),
    "workers": ({"training_options": ("dataloader_num_workers=-1",)}, "num_workers"),
    "strategy": ({"training_options": ("logging_strategy=sometimes",)}, "sometimes"),
    "logs by epochs": ({"training_options": ("logging_strategy=epoch",)}, "needs save_strategy epoch or no"),
    "rows skipped": ({"training_options": ("ignore_data_skip=true",)}, "cannot set ignore_data_skip"),
    "a field": ({"training_options": ("adam_betta1=0.9",)}, r"no field adam_betta1 \(did you mean adam_beta1"),
    "a reporter": ({"report_to": ("tensorbord",)}, "did you mean tensorboard"),
    "a method": ({"method": "lorra"}, "unknown method 'lorra'.*did you mean"),
    "an option of a method": ({"method": "lora", "method_options": ("lora_alhpa=3",)}, "did you mean lora_alpha"),
    "a value of an option": ({"vector_pooling": "median"}, "cannot be used here.*median"),
    "a degree": ({"degree": -1.0}, "degree must be"),
    "a length": ({"max_length": 0}, "max_length is 0, expected at least 1"),
    "rows": ({"max_train_samples": 0}, "max_train_samples is 0, expected at least 1"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_options_are_told_before_data_is_read(tiny_model, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(train_module, "load_task_data", lambda *a, **o: pytest.fail("read"))
    change, message = UNUSABLE[kind]
    with pytest.raises(UserError, match=message) as caught:
        run(dataclasses.replace(configuration(tiny_model, tmp_path / "run"), **change))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_command_line_tells_of_a_misspelt_schedule():
    with pytest.raises(UserError, match="did you mean linear"):
        parse(["--lr-scheduler-type", "linaer"])


# --- outputs that are not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1e30])
def test_a_run_with_infinite_outputs_is_never_scored(tiny_model, tmp_path, rate):
    config = configuration(
        tiny_model, tmp_path / "run", learning_rate=rate, head_learning_rate=rate, max_steps=1, warmup_steps=0,
        lr_scheduler_type="constant", save_strategy="no",
    )  # fmt: skip
    with pytest.raises(Diverged, match=r"outputs are not finite .* at step 1; lower the learning rate"):
        run(config)
    assert not (config.output_dir / "result.json").exists()


def test_every_case_of_the_long_part_is_a_configuration(tiny_model, tmp_path):
    assert {configuration(tiny_model, tmp_path, case).seed for case in CASES} == {3}
