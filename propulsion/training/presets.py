"""The paper's experiments as options of `propulsion.train`, and where the paper and its notebooks disagree.

The paper (Kowsher et al. 2024) gives degrees and models. Its public notebooks give learning rates, epochs and batches,
for GLUE alone, all with AdamW and a cosine schedule with 500 steps of warm-up. Options that neither gives keep the
defaults of `propulsion.train`.

Two things differ on purpose: the head is trained, which most notebooks leave at its random start; and biases are not
trained, while the notebooks train those of replaced layers.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from propulsion.data.tasks import TASKS, get_task
from propulsion.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Preset:
    """The options of one experiment of the paper.

    Attributes:
        name: Name on the command line.
        options: Fields of `propulsion.train.TrainConfig`.
        notes: Where the options come from, and where the sources disagree.
    """

    name: str
    options: Mapping[str, Any]
    notes: str


@dataclass(frozen=True)
class _Notebook:
    """The options of a public notebook of the paper, and notes on it."""

    degree: float
    learning_rate: float
    epochs: float
    batch: int
    decay: float = 0.0
    more: str = ""
    warmup: int = 500


# "The notebook trains twice": its training cell was run a second time; the epochs here are those of one run.
_NOTEBOOKS = {
    "rte": _Notebook(55, 2e-4, 30, 32),
    "cola": _Notebook(55, 1e-4, 7, 32, more="The notebook trains twice."),
    "mnli": _Notebook(35, 1e-4, 3, 32, 5e-4),
    "mrpc": _Notebook(55, 1e-4, 10, 32, 0.01),
    "qnli": _Notebook(55, 1e-4, 3, 32),
    "qqp": _Notebook(55, 1e-4, 2, 32, more="The notebook trains twice."),
    "stsb": _Notebook(55, 2e-5, 10, 16, more="The notebook trains twice, and the head too."),
    "sst2": _Notebook(5, 2e-4, 3, 32, more="The notebook trains biases too.", warmup=100),
}
_NO_RATE = (
    "Neither the paper nor its notebooks give a learning rate, epochs or batch: they are this project's defaults."
)
_LANGUAGE_MODELS = {"bloomz-7b": "bigscience/bloomz-7b1", "gpt-j-6b": "EleutherAI/gpt-j-6b",
                    "llama-7b": "huggyllama/llama-7b", "llama-13b": "huggyllama/llama-13b"}  # fmt: skip
_CLASSIFIERS = {"bloom": "bigscience/bloom-7b1", "llama2": "meta-llama/Llama-2-7b-hf", "falcon": "tiiuae/falcon-7b",
                "mistral": "mistralai/Mistral-7B-v0.1", "phi-2": "microsoft/phi-2"}  # fmt: skip


def _glue(task: str, size: str, positions: str) -> Preset:
    book, paper = _NOTEBOOKS[task], get_task(task).degree
    options = {
        "task": task, "model": f"FacebookAI/roberta-{size}", "method": "propulsion", "degree": paper,
        "positions": (positions,), "learning_rate": book.learning_rate, "num_train_epochs": book.epochs,
        "per_device_train_batch_size": book.batch, "weight_decay": book.decay, "lr_scheduler_type": "cosine",
        "warmup_steps": book.warmup, "max_length": 512 if task == "rte" else 128,
    }  # fmt: skip
    degree = f"Degree: {paper:g} in the paper, {book.degree:g} in the notebook." if paper != book.degree else ""
    source = "Learning rate, epochs, batch, decay and warm-up of the notebook (RoBERTa-base, all positions)."
    if size == "large" or positions != "all":
        source += " There is none for this variant."
    return Preset(
        f"glue-{task}-roberta-{size}-{positions}", options, " ".join(filter(None, (degree, source, book.more)))
    )


def _other(name: str, task: str, model: str, notes: str = "", **options: Any) -> Preset:
    degree = get_task(task).degree
    return Preset(name, {"task": task, "model": model, "method": "propulsion", "degree": degree, **options},
                  f"{notes} {_NO_RATE}".strip())  # fmt: skip


_PRESETS = (
    *(_glue(task, size, positions) for size in ("base", "large") for positions in ("all", "attn")
      for task in _NOTEBOOKS),
    *(_other(f"{task}-deberta-v3-base", task, "microsoft/deberta-v3-base", max_length=384)
      for task in ("squad", "squad_v2")),
    *(_other(f"{task}-bart-large", task, "facebook/bart-large", max_length=1024, max_target_length=128)
      for task in ("xsum", "cnn_dailymail")),
    *(_other(f"{task}-{short}", task, model, "Trained and evaluated as instructions.", max_target_length=256)
      for short, model in _LANGUAGE_MODELS.items()
      for task, entry in TASKS.items() if entry.kind == "instruction" and task != "sst2_instruction"),
    *(_other(f"{task}-{short}", task, model, "The paper gives no degree for this task and model.")
      for short, model in _CLASSIFIERS.items()
      for task in ("conll2003", "ncbi_disease", "wikiann", "rte", "mrpc", "snli", "sst2")),
)  # fmt: skip
PRESETS: dict[str, Preset] = {preset.name: preset for preset in _PRESETS}


def get_preset(name: str) -> Preset:
    """Return a preset by name.

    Raises:
        UserError: There is no such preset; the message says how to list them.
    """
    if name not in PRESETS:
        close = [known for known in PRESETS if name.split("-")[0] in known][:6]
        raise UserError(
            f"unknown preset {name!r}{did_you_mean(name, PRESETS)}: --show-presets lists them"
            f"{', such as ' * bool(close)}{', '.join(close)}"
        )
    return PRESETS[name]


def describe(preset: Preset) -> str:
    """A preset as a command, with its notes."""
    words = []
    for name, value in preset.options.items():
        values = value if isinstance(value, tuple) else (value,)
        shown = " ".join(v if isinstance(v, str) else json.dumps(v) for v in values)
        words.append(f"--{name.replace('_', '-')} {shown}")
    return f"{preset.name}\n  {' '.join(words)}\n  {preset.notes}"
