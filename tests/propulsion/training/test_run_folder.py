"""The folder of a run: which files a run removes or refuses, and how it is resumed, extended and interrupted."""

import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from task_rows import write_rows
from transformers import TrainerCallback

from propulsion import train as train_module
from propulsion.data.kinds import kind_of
from propulsion.data.tasks import get_task
from propulsion.errors import Interrupted, Terminated, UserError, run_command
from propulsion.train import TrainConfig, run
from propulsion.training import manifest as manifest_module
from propulsion.training import run_folder
from propulsion.training.manifest import MANIFEST, Manifest
from tests.faults.runs import Killed, fail_at


@pytest.fixture(scope="module")
def base_config(tiny_model):
    return TrainConfig(
        model=str(tiny_model), degree=3, max_steps=4, max_train_samples=16, max_eval_samples=8, save_steps=2,
        per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, logging_steps=1, learning_rate=0.02,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(base_config, tmp_path_factory):
    """A finished run of four steps; tests that change it copy it."""
    config = dataclasses.replace(base_config, output_dir=tmp_path_factory.mktemp("finished") / "run")
    return config, run(config)


@pytest.fixture
def config(finished, tmp_path):
    shutil.copytree(finished[0].output_dir, tmp_path / "run")
    return dataclasses.replace(finished[0], output_dir=tmp_path / "run")


def tree(folder):
    """The content of every file, by path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def forbid_loading(monkeypatch):
    monkeypatch.setattr(train_module, "load_task_data", lambda *a, **o: pytest.fail("started"))


# --- what is removed ------------------------------------------------------------------------------------------------


def test_only_what_the_run_wrote_is_removed(config, tmp_path, capsys):
    """A copied run counts as the run, since files are known by content. The user's other files, data and links stay."""
    output, outside = config.output_dir, tmp_path / "outside"
    outside.mkdir()
    (outside / "kept.txt").write_text("of somebody else")
    (output / "notes.txt").write_text("mine")
    (output / "data").mkdir()
    write_rows(output / "data", "sst2")
    (output / "link").symlink_to(outside)
    own = {name: data for name, data in tree(output).items() if name in ("notes.txt", "data/train.jsonl")}
    # The output folder is the run's own folder, and the data are in it.
    other = dataclasses.replace(
        config, task="sst2", data_dir=output / "data", max_train_samples=None, max_eval_samples=None, max_steps=2,
        overwrite_output_dir=True,
    )  # fmt: skip
    assert run(other).steps == 2
    found = tree(output)
    assert own.items() <= found.items()
    assert (outside / "kept.txt").read_text() == "of somebody else"
    assert (output / "link").is_symlink()
    assert not (output / "checkpoint-4").exists()
    assert "kept, since it did not write them: data, link, notes.txt" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["model/notes.txt", "checkpoint-2/notes.txt", "result.json", "model/config.json"])
def test_a_users_file_within_what_is_to_be_replaced_is_refused(config, place):
    """If a user's file was added or changed in a folder that the run would replace, nothing is removed."""
    (config.output_dir / place).write_text("mine")
    before = tree(config.output_dir)
    with pytest.raises(UserError, match=rf"{place} is not as the run .* wrote it, and would be lost") as caught:
        run(dataclasses.replace(config, degree=4, overwrite_output_dir=True))
    assert "\n" not in str(caught.value)
    assert tree(config.output_dir) == before


def test_a_link_in_place_of_a_checkpoint_is_not_followed(config, tmp_path):
    moved = tmp_path / "large disk"
    shutil.move(config.output_dir / "checkpoint-2", moved)
    (config.output_dir / "checkpoint-2").symlink_to(moved)
    with pytest.raises(UserError, match="checkpoint-2 is not as the run"):
        run(dataclasses.replace(config, overwrite_output_dir=True))
    assert (moved / "trainer_state.json").is_file()
    # A longer run, which removes old checkpoints, keeps it.
    assert run(dataclasses.replace(config, max_steps=8, save_total_limit=1)).steps == 8
    assert (moved / "trainer_state.json").is_file()
    assert not (config.output_dir / "checkpoint-4").exists()


def test_old_checkpoints_with_a_users_file_in_them_stay(config):
    (config.output_dir / "checkpoint-2" / "notes.txt").write_text("the best so far")
    run(dataclasses.replace(config, max_steps=6, save_total_limit=1))
    names = {path.name for path in config.output_dir.glob("checkpoint-*")}
    assert names == {"checkpoint-2", "checkpoint-6"}
    assert (config.output_dir / "checkpoint-2" / "notes.txt").exists()


FOREIGN = {
    "files": {"thesis.tex": "ten years"},
    "a foreign run.json": {"run.json": '{"of": "another program"}', "data/rows.csv": "1,2"},
    "an older run.json": {"run.json": '{"rows": "abc", "base_model": "def"}'},
    "a foreign list": {"run.json": "{}", MANIFEST: '{"files": ["run.json"]}'},
    "a forged list": {"run.json": "{}", MANIFEST: json.dumps({
        "format": 1, "written by": "propulsion.train",
        "files": {"../outside.txt": {"bytes": 4, "modified": 1, "sha256": ""}},
    })},
    "a hidden folder": {".partial-checkpoint/work.txt": "mine"},
    "a model": {"model/config.json": "{}"},
}  # fmt: skip


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_that_is_no_run_is_refused_before_anything_starts(base_config, tmp_path, monkeypatch, kind, overwrite):
    output = tmp_path / "folder"
    (tmp_path / "outside.txt").write_text("mine")
    for name, text in FOREIGN[kind].items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(text)
    before = tree(tmp_path)
    forbid_loading(monkeypatch)
    with pytest.raises(UserError, match=r"holds (something else|files that no run is known to have written)") as caught:
        run(dataclasses.replace(base_config, output_dir=output, overwrite_output_dir=overwrite))
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("place", ["home", "here", "data", "file"])
def test_folders_that_hold_other_things(base_config, tmp_path, monkeypatch, place):
    """The home folder, the current folder, a folder that contains the data, and a file."""
    (tmp_path / "data").mkdir()
    data = write_rows(tmp_path / "data", "sst2")
    (tmp_path / "file").write_text("text")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    output = {"home": Path("~"), "here": Path(), "data": data, "file": tmp_path / "file"}[place]
    before = tree(tmp_path)
    forbid_loading(monkeypatch)
    with pytest.raises(UserError, match=r"holds something else|is a file"):
        run(dataclasses.replace(base_config, data_dir=data, output_dir=output, overwrite_output_dir=True))
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "change", [{"lr_scheduler_type": "square"}, {"method": "lorra"}, {"max_train_samples": 10**6}, {"model": "nowhere"}]
)
def test_options_that_cannot_be_used_lose_no_earlier_run(config, change):
    before = tree(config.output_dir)
    with pytest.raises(UserError):
        run(dataclasses.replace(config, overwrite_output_dir=True, **change))
    assert tree(config.output_dir) == before


def test_a_run_that_lost_its_record_is_refused(config):
    (config.output_dir / "run.json").unlink()
    with pytest.raises(UserError, match=r"has checkpoint-2 but no run.json"):
        run(config)
    assert run(dataclasses.replace(config, max_steps=2, overwrite_output_dir=True)).steps == 2


def test_a_file_is_owned_by_its_content(tmp_path):
    manifest = Manifest(tmp_path)
    manifest.start()
    manifest.write_json(tmp_path / "a.json", {"x": 1})
    assert manifest.own() == [tmp_path / "a.json"]
    os.utime(tmp_path / "a.json", (1, 1))  # The copy has another modification time.
    assert manifest.not_own(tmp_path / "a.json") == []
    (tmp_path / "a.json").write_text((tmp_path / "a.json").read_text().replace("1", "2"))
    assert manifest.not_own(tmp_path / "a.json") == [tmp_path / "a.json"]
    assert manifest.own() == []


def test_a_list_that_is_not_as_it_was_written_is_no_list(tmp_path):
    manifest = Manifest(tmp_path)
    manifest.start()
    manifest.write_json(tmp_path / "a.json", {"x": 1})
    text = (tmp_path / MANIFEST).read_text()
    assert manifest.exists
    for old, new in (('"bytes": ', '"bytes": 1'), ("a.json", "b.json"), ('"format": 1', '"format": 3'), ("train", "t")):
        (tmp_path / MANIFEST).write_text(text.replace(old, new))
        assert not manifest.exists
        with pytest.raises(UserError, match=rf"{MANIFEST} that is damaged or of another program"):
            run_folder.check_folder(tmp_path, overwrite=False)


def test_a_file_is_whole_when_its_replacement_is_killed(tmp_path, monkeypatch):
    """Between the list and the file, of which the list comes first."""
    manifest = Manifest(tmp_path)
    manifest.start()
    manifest.write_json(tmp_path / "run.json", {"x": 1})
    with monkeypatch.context() as patch:
        fail_at(patch, manifest_module, "write_json", 2)
        with pytest.raises(Killed):
            manifest.write_json(tmp_path / "run.json", {"x": 10})
    assert manifest.damaged(tmp_path / "run.json") is None
    assert manifest.not_own(tmp_path / "run.json") == []
    manifest.write_json(tmp_path / "run.json", {"x": 10})
    assert manifest.damaged(tmp_path / "run.json") is None
    (tmp_path / "run.json").write_text((tmp_path / "run.json").read_text().replace("1", "3"))
    assert manifest.damaged(tmp_path / "run.json") == "run.json is not as it was written, by files.json"


def test_files_are_strict_json(tmp_path):
    """Which has no word for what is not finite; a metric that is undefined is so again when it is read."""
    manifest = Manifest(tmp_path)
    manifest.start()
    content = {"metrics": {"pearson": math.nan, "mse": 0.5}, "history": [{"loss": math.inf}], "pair": (1.0, -math.inf)}
    manifest.write_json(tmp_path / "result.json", content)
    strict = json.loads((tmp_path / "result.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert strict["history"] == [{"loss": None}]
    assert strict["pair"] == [1.0, None]
    found = run_folder.result_of(tmp_path)
    assert found is not None
    assert math.isnan(found["metrics"].pop("pearson"))
    assert found["metrics"] == {"mse": 0.5}


def test_a_run_stores_no_path_that_was_not_typed(config, monkeypatch):
    monkeypatch.chdir(config.output_dir.parent)
    found = run(dataclasses.replace(config, output_dir=Path("run"), max_steps=5))
    assert found.steps == 5
    for path in config.output_dir.glob("*.json"):
        assert str(config.output_dir.parent) not in path.read_text(), path


# --- identity by content --------------------------------------------------------------------------------------------


def changed_weights(source, destination, name, rows):
    shutil.copytree(source, destination)
    state = load_file(destination / "model.safetensors")
    state[name][rows] += 0.1
    save_file(state, destination / "model.safetensors", metadata={"format": "pt"})
    return destination


def test_a_model_is_known_by_its_weights_and_not_by_its_folder(config, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(config.model, moved)
    assert run(dataclasses.replace(config, model=str(moved))).steps == 4
    # One number among many changes, which a sample of the values would miss.
    shutil.rmtree(moved)
    changed_weights(config.model, moved, "bert.embeddings.word_embeddings.weight", (7, 3))
    with pytest.raises(UserError, match=r"another configuration \(base_model"):
        run(dataclasses.replace(config, model=str(moved)))


def test_an_adapter_is_known_by_its_weights(config, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(config.output_dir / "model", adapter)
    further = dataclasses.replace(config, adapter=adapter, output_dir=tmp_path / "further", max_steps=0)
    run(further)
    state = load_file(adapter / "adapter_model.safetensors")
    save_file({name: value + 1 for name, value in state.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"adapter_model.safetensors is not as it was written, by files.sha256"):
        run(further)
    (adapter / "files.sha256").unlink()
    with pytest.raises(UserError, match=r"another configuration \(adapter"):
        run(further)


# --- before the first step, finished, longer ------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["sst2", "stsb", "conll2003", "squad", "xsum", "boolq"])
def test_what_is_best_is_checked_before_the_first_step(base_config, tiny_models, tmp_path, monkeypatch, task):
    config = dataclasses.replace(
        base_config, task=task, data_dir=write_rows(tmp_path, task), max_train_samples=None, max_eval_samples=None,
        model=str(tiny_models[kind_of(get_task(task)).task_type]), eval_strategy="steps", eval_steps=2, degree=3,
        metric_for_best_model="loss", output_dir=tmp_path / "run",
    )  # fmt: skip
    monkeypatch.setattr(train_module.TaskTrainer, "train", lambda *a, **o: pytest.fail("trained"))
    monkeypatch.setattr(train_module.TaskTrainer, "evaluate", lambda *a, **o: pytest.fail("evaluated"))
    for best in (False, True):
        with pytest.raises(
            UserError, match=rf"metric_for_best_model is loss, expected one of .*{get_task(task).metrics[0]}"
        ):
            run(dataclasses.replace(config, load_best_model_at_end=best))
    assert not list((tmp_path / "run").glob("*"))


def test_a_finished_run_says_that_nothing_was_trained(config, finished, capsys):
    before = tree(config.output_dir)
    train_module.main(config)
    printed = capsys.readouterr().out
    assert "finished already" in printed
    assert "nothing was trained" in printed
    assert tree(config.output_dir) == before


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_a_longer_run_goes_on_from_the_last_checkpoint(config, tmp_path, schedule, capsys, monkeypatch):
    """From step 5 on it has the rates of a run of eight steps; with a constant rate it equals that run bit for bit."""
    config = dataclasses.replace(config, lr_scheduler_type=schedule, warmup_steps=0, save_total_limit=None)
    config = dataclasses.replace(config, output_dir=tmp_path / "longer")
    used, step = [], train_module.TaskTrainer.training_step

    def watched(self, *args, **kwargs):
        used.append(self.optimizer.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(train_module.TaskTrainer, "training_step", watched)
    first = run(config)
    longer = dataclasses.replace(config, max_steps=8)
    found = run(longer)
    assert (first.steps, found.steps, found.extended_at) == (4, 8, (4,))
    assert "resuming from" in capsys.readouterr().out
    whole = dataclasses.replace(longer, output_dir=tmp_path / "whole")
    expected = run(whole)
    assert used[4:8] == used[8 + 4 :]  # Rates of the longer run from step 5 on, and of the run of eight steps.
    assert len(used) == 8 + 8
    weights = [load_file(c.output_dir / "model" / "adapter_model.safetensors") for c in (longer, whole)]
    same = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert same == (schedule == "constant")
    if schedule == "constant":
        assert found.metrics == expected.metrics
    # Results of the shorter run are kept; the longer run is now the finished one and cannot be made shorter.
    assert json.loads((config.output_dir / "result-4.json").read_text())["steps"] == 4
    assert run(longer) == found
    with pytest.raises(UserError, match=r"another configuration \(max_steps 8 there, 4 here\)"):
        run(config)


def test_more_epochs_go_on_too(config, tmp_path):
    epochs = dataclasses.replace(config, max_steps=-1, num_train_epochs=1.0, output_dir=tmp_path / "epochs")
    assert run(epochs).steps == 4
    assert run(dataclasses.replace(epochs, num_train_epochs=2.0)).steps == 8
    assert run(dataclasses.replace(epochs, max_steps=9, num_train_epochs=2.0)).extended_at == (4, 8)
    with pytest.raises(UserError, match="another configuration"):
        run(dataclasses.replace(epochs, num_train_epochs=1.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"save_strategy": "no"}, "without a checkpoint"), ({"method": "adalora", "degree": None}, "adalora plans")],
)
def test_runs_that_cannot_be_made_longer(config, tmp_path, change, message):
    config = dataclasses.replace(config, output_dir=tmp_path / "other", max_steps=2, **change)
    run(config)
    before = tree(config.output_dir)
    with pytest.raises(UserError, match=message):
        run(dataclasses.replace(config, max_steps=4))
    assert tree(config.output_dir) == before


# --- interrupted ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "step", "overwrite"),
    [(KeyboardInterrupt, 1, False), (KeyboardInterrupt, 3, False), (Terminated, 3, True)],
)
def test_an_interrupt_says_what_is_there(base_config, tmp_path, monkeypatch, capsys, error, step, overwrite):
    config = dataclasses.replace(base_config, output_dir=tmp_path / "run", overwrite_output_dir=overwrite)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise error

    make = train_module._trainer

    def stopping(*args):
        trainer = make(*args)
        trainer.add_callback(Stop)
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "_trainer", stopping)
        with pytest.raises(SystemExit) as caught:
            run_command(lambda: train_module.main(config))
    assert caught.value.code == (130 if error is KeyboardInterrupt else 143)
    words = capsys.readouterr().err
    if step == 1:
        assert "has no checkpoint yet (one every 2 steps)" in words
    else:
        assert f"{config.output_dir / 'checkpoint-2'} is complete: the same command" in words
    assert ("without --overwrite-output-dir" in words) == overwrite
    assert words.count("\n") == 1
    assert run(dataclasses.replace(config, overwrite_output_dir=False)).steps == 4


def test_an_interrupt_is_still_one_to_those_who_catch_it():
    assert issubclass(Interrupted, KeyboardInterrupt)


def test_sigterm_ends_a_command_in_one_line(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: signal.raise_signal(signal.SIGTERM))
    assert (caught.value.code, capsys.readouterr().err) == (128 + signal.SIGTERM, "terminated\n")
    assert signal.getsignal(signal.SIGTERM) == before
