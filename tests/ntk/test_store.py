"""Kernels on disk: the same numbers, tiles that survive everything, and no tile of another kernel."""

import errno
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from filelock import FileLock
from safetensors import SafetensorError
from torch import nn

import ntk
from ntk.store import __main__ as command
from ntk.store import files, identity, kernel_store


def network(seed=0, activation=nn.Tanh):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), activation(), nn.Linear(5, 2)).double()


def rows(n=5, seed=1):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiles(store):
    return {path.name: path.read_bytes() for path in (store.path / "tiles").glob("*.safetensors")}


@pytest.fixture
def computed(monkeypatch):
    """The numbers of rows of the tiles that are computed from here on."""
    counts = []

    def counted(model, inputs, inputs2=None, **options):
        counts.append(len(inputs))
        return ntk.empirical_ntk(model, inputs, inputs2, **options)

    monkeypatch.setattr(sys.modules["ntk.store.kernel_store"], "empirical_ntk", counted)
    return counts


# --- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", [None, "trace", "diagonal", "sum"])
def test_the_kernel_is_that_of_all_examples_at_once(tmp_path, reduce):
    x, y = rows(5), rows(3, seed=2)
    store = kernel_store(tmp_path / "k", network(), block=2, reduce=reduce)
    store.add(x)
    store.add(y, key="test")
    store.compute()
    expected = ntk.empirical_ntk(network(), torch.cat([x, y]), method="jacobian", reduce=reduce).numpy()
    np.testing.assert_allclose(store.load(), expected, rtol=0, atol=1e-12 * abs(expected).max())
    np.testing.assert_array_equal(store.load("test", "train"), store.load()[5:, :5])
    np.testing.assert_array_equal(store.load("test"), store.load()[5:, 5:])
    assert store.status().examples == {"train": 5, "test": 3}
    assert (store.status().complete, store.status().total) == (15, 15)


def test_padded_texts_of_a_transformer_and_chosen_parameters(tmp_path):
    torch.manual_seed(0)
    config = hf.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, vocab_size=30
    )
    model = hf.AutoModelForSequenceClassification.from_config(config).double().eval()
    mask = (torch.arange(6) < torch.tensor([6, 2, 5, 3])[:, None]).long()
    ids = torch.randint(3, 30, (4, 6)) * mask
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": torch.arange(6)[None]}
    options = {"params": lambda name, p: "query" in name, "output": ntk.outputs.margin(), "reduce": "trace"}
    store = kernel_store(tmp_path / "k", model, block=3, **options)
    store.add(batch)
    store.compute()
    expected = ntk.empirical_ntk(model, batch, method="jacobian", **options).numpy()
    np.testing.assert_allclose(store.load(), expected, rtol=0, atol=1e-12 * abs(expected).max())


# --- nothing twice, nothing mixed -----------------------------------------------------------------------------------


def test_a_script_that_runs_again_computes_nothing(tmp_path, computed):
    for _ in range(2):
        store = kernel_store(tmp_path / "k", network(), block=2)
        store.add(rows())
        store.compute()
        first = store.load()
    assert len(computed) == 6
    assert len(first) == 5


def test_appended_examples_need_new_tiles_only(tmp_path, computed):
    store = kernel_store(tmp_path / "k", network(), block=2)
    store.add(rows(4))
    store.compute()
    before, computed[:] = tiles(store), []
    store.load()
    mine = store.path / "kernel-mine.npy"
    mine.write_text("not of the store")
    store.add(rows(3, seed=2), key="more")
    store.compute()
    assert len(computed) == 10 - 3
    assert {name: content for name, content in tiles(store).items() if name in before} == before
    assert store.load().shape == (7, 7, 2, 2)
    assert len(list(store.path.glob("kernel-*.npy"))) == 2
    assert mine.read_text() == "not of the store"


def test_other_examples_of_a_key_are_refused(tmp_path):
    store = kernel_store(tmp_path / "k", network(), block=2)
    store.add(rows())
    with pytest.raises(ValueError, match=r"key 'train' of .* holds 5 other examples"):
        store.add(rows(seed=3))
    with pytest.raises(ValueError, match="entry 'lengths' of inputs is list"):
        store.add({"x": rows(), "lengths": [1] * 5}, key="other")
    assert store.status().examples == {"train": 5}


def test_the_store_of_another_kernel_is_refused(tmp_path):
    kernel_store(tmp_path / "k", network(), block=2, reduce="trace")
    changed = network()
    with torch.no_grad():
        changed[0].bias[0] += 1e-12
    first = {"params": lambda name, p: name.startswith("0")}
    for what, model, options in (
        ("weights", changed, {}),
        ("structure", network(activation=nn.GELU), {}),
        ("parameters", network(), first),
        ("output", network(), {"output": ntk.outputs.margin()}),
        ("reduce", network(), {"reduce": None}),
    ):
        with pytest.raises(ValueError, match=f"store of another kernel, with other {what} "):
            kernel_store(tmp_path / "k", model, **{"reduce": "trace", **options})
    with pytest.raises(ValueError, match="has blocks of 2 examples; got block=3"):
        kernel_store(tmp_path / "k", network(), block=3, reduce="trace")
    assert kernel_store(tmp_path / "k", network(), reduce="trace").block == 2


def test_a_model_that_changes_meanwhile_is_refused(tmp_path):
    model = network()
    store = kernel_store(tmp_path / "k", model, block=2)
    store.add(rows())
    with torch.no_grad():
        model[2].weight *= 2
    with pytest.raises(ValueError, match="the model has changed since"):
        store.compute()
    assert not tiles(store)


def test_folders_that_are_no_stores(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"holds thesis.tex and is no store"):
        kernel_store(tmp_path, network())
    assert (tmp_path / "thesis.tex").read_text() == "mine"
    (tmp_path / "k").mkdir()
    for content in ("[]", "1", '{"format": "1"}', "{"):
        (tmp_path / "k" / "store.json").write_text(content)
        with pytest.raises(ValueError, match=r"store.json is damaged"):
            kernel_store(tmp_path / "k", network())


def scaled(by):
    return lambda model_output, inputs: model_output * by


def test_output_functions_are_told_apart_by_content():
    class Same:
        def __call__(self, model_output, inputs):
            return model_output

    def text(output):
        return identity.kernel_identity(network(), "all", output, None)["output"]

    words = ntk.outputs.label_words
    assert text(words([3, 4])) == text(words([3, 4])) != text(words([4, 3]))
    assert text(ntk.outputs.loss) != text(ntk.outputs.logits)
    first, second = (functools.partial(ntk.outputs.summed_outputs, each) for each in (ntk.outputs.loss, None))
    assert text(first) != text(second)
    scale = {value: (lambda out, _, value=value: out * value) for value in (1.0, 2.0)}
    assert text(scale[1.0]) != text(scale[2.0])
    assert text(scaled(torch.ones(1))) != text(scaled(torch.zeros(1)))
    with pytest.raises(ValueError, match="cannot be recognised in another process"):
        text(Same())


# --- damage, kills, full disks, several processes -------------------------------------------------------------------


def test_every_damaged_tile_is_computed_again(tmp_path):
    whole = kernel_store(tmp_path / "whole", network(), block=2, reduce="trace")
    whole.add(rows())
    whole.compute()
    bits = tiles(whole)
    path = whole.path / "tiles" / "00000-00001.safetensors"
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        again = kernel_store(whole.path, network(), reduce="trace")
        if again.status().complete == 6:
            # Spaces that pad the header, and the digest's own name, say nothing of the numbers.
            blocks = again._blocks()
            of = again._origin(blocks[0], blocks[1])
            assert torch.equal(files.read(path, of)["kernel"], again._kernel(again._blocks()[0], again._blocks()[1]))
    for damaged in (content[:-1], content[:20], b"", content + b"\0"):
        path.write_bytes(damaged)
        again = kernel_store(whole.path, network(), reduce="trace")
        with pytest.raises(ValueError, match=r"1 of 6 tiles of .* are missing or damaged: call compute"):
            again.load()
        again.compute()
        assert tiles(again) == bits


def test_a_tile_of_other_examples_or_of_another_kernel_is_computed_again(tmp_path, computed):
    def store(name, seed, examples):
        found = kernel_store(tmp_path / name, network(seed), block=2)
        found.add(examples)
        found.compute()
        return found

    first = store("first", 0, rows(4))
    expected = first.load().copy()
    foreign = tiles(store("weights", 1, rows(4))), tiles(store("rows", 0, rows(4, seed=9)))
    for name in tiles(first):
        for content in (*(each[name] for each in foreign), tiles(first)["00000-00000.safetensors"]):
            if content == tiles(first)[name]:
                continue
            (first.path / "tiles" / name).write_bytes(content)
            again = kernel_store(first.path, network(), block=2)
            assert again.status().complete == 2
            again.compute()
            np.testing.assert_array_equal(again.load(), expected)
    (first.path / "keys.json").unlink()
    again = kernel_store(first.path, network(), block=2)
    again.add(rows(4, seed=9))
    assert again.status().complete == 0


def test_damaged_examples_are_named_and_repaired(tmp_path):
    store = kernel_store(tmp_path / "k", network(), block=2)
    store.add(rows())
    path = store.path / "examples" / "00000-00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-3] + b"abc")
    with pytest.raises(
        ValueError, match="other bytes than were written: add the same examples again under key 'train'"
    ):
        store.compute()
    store.add(rows())
    assert path.read_bytes() == content
    store.compute()
    assert len(store.load()) == 5


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_keeps_what_is_complete(tmp_path, monkeypatch, error):
    store = kernel_store(tmp_path / "k", network(), block=2)
    store.add(rows())
    save, written = files.save_file, []

    def full(tensors, path, metadata):
        if len(written) == 2:
            Path(path).write_bytes(b"half")
            raise error
        written.append(path)
        save(tensors, path, metadata)

    with monkeypatch.context() as disk:
        disk.setattr(files, "save_file", full)
        with pytest.raises(OSError, match="complete tiles are kept: free some space and call compute"):
            store.compute()
    assert len(tiles(store)) == 2
    assert not list(store.path.rglob("*partial*"))
    store.compute()
    assert store.status().complete == 6


def test_a_tile_of_another_process_is_left_to_it_until_it_dies(tmp_path, computed):
    store = kernel_store(tmp_path / "k", network(), block=2)
    store.add(rows())
    other = FileLock(store.path / "tiles" / "00000-00000.lock")
    other.acquire()
    worker = threading.Thread(target=store.compute)
    worker.start()
    while len(computed) < 5:
        time.sleep(0.01)
    time.sleep(0.3)
    assert worker.is_alive()
    assert len(computed) == 5
    assert len(tiles(store)) == 5
    other.release()
    worker.join()
    assert len(computed) == 6
    assert len(store.load()) == 5


def test_processes_begin_at_different_tiles(tmp_path, monkeypatch):
    begun = []
    store = kernel_store(tmp_path / "k", network(), block=1)
    store.add(rows(4))

    def begin(blocks, i, j):
        begun.append((i, j))
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "_try", begin)
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        with pytest.raises(KeyboardInterrupt):
            store.compute()
    assert len(set(begun)) == 3


SCRIPT = """
import time, torch
from torch import nn
class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    def forward(self, x):
        time.sleep(0.05)
        return self.layers(x)
def model(): return Slow()
def rows(): return torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
"""


def test_killed_and_shared_work_gives_equal_bits(tmp_path):
    """Two processes share the tiles; one is killed while it computes, and the other ends with all of them."""
    (tmp_path / "my_kernel.py").write_text(SCRIPT)
    arguments = ["--model", "my_kernel:model", "--inputs", "train=my_kernel:rows", "--block", "2", "--reduce", "trace"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "PYTHONPATH": os.pathsep.join(sys.path)}

    def start(folder, rank):
        own = environment | {"RANK": str(rank)}
        words = [sys.executable, "-m", "ntk.store", folder, *arguments]
        return subprocess.Popen(words, cwd=tmp_path, env=own, stdout=subprocess.PIPE, text=True)

    first, second = start("shared", 0), start("shared", 1)
    while len(list(tmp_path.glob("shared/tiles/*.safetensors"))) < 3:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    output, _ = second.communicate()
    assert second.returncode == 0
    assert "21 of 21 tiles complete" in output
    alone = start("alone", 0)
    alone.communicate()
    shared, whole = (
        {path.name: path.read_bytes() for path in tmp_path.glob(f"{folder}/tiles/*.safetensors")}
        for folder in ("shared", "alone")
    )
    assert len(whole) == 21
    assert shared == whole


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_kernel_here.py").write_text(SCRIPT.replace("0.05", "0"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["ntk.store", *arguments])
        command.main()
        return capsys.readouterr().out

    words = ["k", "--model", "my_kernel_here:model", "--inputs", "train=my_kernel_here:rows"]
    assert "train: 12 examples\n1 of 1 tiles complete" in call(*words)
    assert "1 of 1 tiles complete" in call("k")
    for mistake, message in (
        (["nowhere"], "nowhere is no store of a kernel"),
        (["k", "--inputs", "a=b:c"], "--inputs needs --model"),
        (["k", "--model", "my_kernel_here"], "expected MODULE:FUNCTION, such as my_kernel:model; got 'my_kernel_here'"),
        (["k", "--model", "no_such:model"], "No module named 'no_such'"),
        (["k", "--model", "my_kernel_here:modle"], "has no attribute 'modle'"),
        ([*words[:3], "--inputs", "my_kernel_here:rows"], "expected KEY=MODULE:FUNCTION"),
        ([*words, "--reduce", "trace"], "store of another kernel, with other reduce"),
    ):
        with pytest.raises(SystemExit) as stop:
            call(*mistake)
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert not (tmp_path / "nowhere").exists()
