"""Saved adapters, with a record of the base model that each belongs to."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME
from peft.utils.save_and_load import load_peft_weights

from propulsion.atomic import write_json
from propulsion.checksums import check_sums
from propulsion.errors import UserError, explained, library_errors, listed
from propulsion.pretrained import fingerprint, pooling_of
from propulsion.pretrained.packaged import packaged, shown
from propulsion.user_files import expanded, read_json

BASE_FILE = "base_model.json"


def save_base(folder: Path, base: str, config: Any = None, pooling: str = "pooler") -> None:
    """Write a file beside an adapter with its base model's `fingerprint`, names of labels, and pooling."""
    labels = {"label_names": names} if (names := label_names(config)) else {}
    write_json(folder / BASE_FILE, {"fingerprint": base, "pooling": pooling} | labels)


def name_labels(config: Any, names: Sequence[str]) -> None:
    """Set the names of a model's labels, which `transformers.pipeline` returns, in its configuration."""
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}


def label_names(config: Any) -> list[str]:
    """Names of a model's labels in order; empty if they are transformers' defaults LABEL_0, LABEL_1, ..."""
    names = [name for _, name in sorted((getattr(config, "id2label", None) or {}).items())]
    return [] if names == [f"LABEL_{i}" for i in range(len(names))] else names


def name_base(folder: Path, model: Any) -> None:
    """Name a packaged base model as the Hugging Face hub does, in what peft wrote beside its adapter.

    peft writes the folder from which the base model was loaded, which on another machine is elsewhere.
    """
    source = model.get_base_model().name_or_path
    base = packaged(shown(source))
    if base is None:
        return
    for name in (CONFIG_NAME, "README.md"):
        if (path := folder / name).is_file():
            text = path.read_text(encoding="utf-8")
            for written in (source, json.dumps(source)[1:-1]):
                text = text.replace(written, base.hub)
            path.write_text(text, encoding="utf-8")


def explain_loading(folder: Path, model: Any) -> None:
    """Write into a saved model's README.md how to load it, if transformers or peft alone cannot."""
    pooling = pooling_of(model)
    if pooling == "pooler":
        return
    if isinstance(model, PeftModel):
        labels, base = model.config.num_labels, shown(model.get_base_model().name_or_path)  # pyright: ignore
        code = (
            "from pathlib import Path\nfrom propulsion.adapters import load_adapter\n"
            "from propulsion.pretrained import load_classifier\n\n"
            f'model, tokenizer = load_classifier("{base}", num_labels={labels}, pooling="{pooling}")\n'
            'model = load_adapter(model, Path("THIS FOLDER"))'
        )
        words = "With transformers' own classifier of the base model, this adapter would give other outputs."
    else:
        code = (
            "import propulsion  # or pass trust_remote_code=True below\n"
            "from transformers import AutoModelForSequenceClassification\n\n"
            'model = AutoModelForSequenceClassification.from_pretrained("THIS FOLDER")'
        )
        words = "Its class is in pooled.py."
    readme = folder / "README.md"
    before = f"{readme.read_text(encoding='utf-8').rstrip()}\n\n" if readme.exists() else ""
    text = f"{before}# How to load it\n\nA classifier that pools by {pooling}. {words}\n\n```python\n{code}\n```\n"
    readme.write_text(text, encoding="utf-8")


def load_adapter(model: Any, folder: Path, *, trainable: bool = False) -> Any:
    """Put a saved adapter on its base model.

    Args:
        model: The base model, with the head of the task.
        folder: A folder that `propulsion.train` or peft's `save_pretrained` wrote.
        trainable: Whether the adapter is to be trained further.

    Returns:
        The model with the adapter and its names of labels.

    Raises:
        UserError: The folder holds no adapter, an adapter of another base model, or files that are damaged: other than
            their checksums, or weights that are not finite, or not those that the adapter has on this model.
    """
    folder = expanded(folder)
    check_sums(folder)
    with explained(f"read the folder {folder}"):
        if not (folder / CONFIG_NAME).is_file():
            raise UserError(f"{folder} holds no adapter: it has no {CONFIG_NAME}")
        record = folder / BASE_FILE
        known = read_json(record, needed="fingerprint") if record.is_file() else {}
    read_json(folder / CONFIG_NAME, needed="peft_type")
    if known and (trained := known.get("pooling", "pooler")) != (here := pooling_of(model)):
        raise UserError(f"the adapter in {folder} was trained with pooling {trained}, and the model has {here}")
    if known and fingerprint(model) != known["fingerprint"]:
        raise UserError(f"the adapter in {folder} is of another base model: this model has other weights")
    with library_errors(
        f"the adapter in {folder} does not fit this model; it is damaged, or may be of another base model"
    ):
        weights = load_peft_weights(str(folder), device="cpu")
        loaded = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
        _check_weights(loaded, weights, folder)
    if len(names := known.get("label_names", ())) == getattr(model.config, "num_labels", None):
        name_labels(model.config, names)
    return loaded


def _check_weights(model: PeftModel, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Check that the weights of a saved adapter are finite, and that they are all that the adapter has on this model.

    peft keeps the random start of weights that the file lacks, and ignores those that it does not know.
    """
    if damaged := [name for name, weight in weights.items() if not torch.isfinite(weight).all()]:
        raise UserError(f"the adapter in {folder} is damaged: {damaged[0]} holds values that are not finite")
    # Weights of the base model's embeddings may be saved with an adapter, or not.
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    allowed = get_peft_model_state_dict(model, save_embedding_layers=True)
    absent, unknown = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - allowed.keys())
    problems = [f"it lacks {listed(absent)}"] if absent else []
    if unknown:
        problems.append(f"there is no place for {listed(unknown)}")
    if problems:
        raise UserError(f"the adapter in {folder} does not fit this model: {'; '.join(problems)}")
