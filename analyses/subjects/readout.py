"""The outputs of a classifier: those of a new head, or the logits of label words of a language model.

A language model classifies without a head: it reads a prompt, and its outputs are the logits, after the prompt's last
token, of one word for each class. Since pre-training has trained these logits, fine-tuning does not start from a random
head (Malladi et al. 2023, sec. 3). The model is trained and evaluated like any classifier, without new parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import MODEL_FOR_MASKED_LM_MAPPING
from transformers.modeling_outputs import SequenceClassifierOutput

from ntk.outputs import label_words
from propulsion.data import TaskData
from propulsion.errors import UserError
from propulsion.pretrained import (
    DEFAULT_MODEL_NAME,
    MODELS,
    Pooling,
    find_config,
    load_classifier,
    load_model,
)

LANGUAGE_MODEL = "smollm2-135m"
"""The packaged language model that label words are read from if no other is named."""
TASK_TYPE = "CAUSAL_LM"
_PLACE = "{text}"


@dataclass(frozen=True)
class Readout:
    """A new head drawn from the seed, or label words."""

    head: Literal["random", "label_words"] = "random"
    """A classifier's new head, or the logits of label words of a causal language model, which has no head to train."""
    words: tuple[str, str] = (" terrible", " great")
    """Label words of classes 0 and 1, one token each, with the space before them."""
    prompt: str = "{text} It was"
    """Prompt of a language model, with {text} where the row's text goes."""
    pooling: Pooling = "auto"
    """How a new head pools hidden states: mean; first; pooler, as transformers does; auto, as its checkpoint says."""

    @property
    def in_words(self) -> bool:
        """Whether the outputs are logits of label words."""
        return self.head == "label_words"

    @property
    def task_type(self) -> str:
        """peft's name of the task."""
        return TASK_TYPE if self.in_words else "SEQ_CLS"

    def rows(self, data: TaskData) -> TaskData:
        """The rows as the model reads them: with label words, each text within the prompt.

        Raises:
            UserError: The task is not of one text and two classes, or the prompt has no place for the text.
        """
        return prompted(data, self.prompt) if self.in_words else data

    def load(
        self, model: str | None, *, num_labels: int, seed: int, dtype: torch.dtype = torch.float32,
        device: str = "cpu", **loading: Any,
    ) -> tuple[Any, Any]:  # fmt: skip
        """Load the model before training, and its tokenizer; `loading` are the options of `LoadingOptions`.

        Raises:
            UserError: The model cannot be loaded, is no causal language model, or a word is not one token of its own.
        """
        if self.in_words:
            if self.pooling not in ("auto", "pooler"):
                raise UserError(f"pooling {self.pooling} is for a new head; label words are read after the last token")
            return load_label_words(model, self.words, seed=seed, dtype=dtype, device=device, **loading)
        return load_classifier(
            model, num_labels=num_labels, pooling=self.pooling, seed=seed, dtype=dtype, device=device, **loading
        )

    def name_of(self, model: str | None) -> str:
        """Name of the model: the last part of a local path, the name on the hub, or that of the packaged model."""
        if model is not None:
            return Path(model).name if Path(model).exists() else model
        return packaged_model().stem if self.in_words else DEFAULT_MODEL_NAME


def packaged_model() -> Path:
    """The GGUF file of the packaged language model.

    Raises:
        UserError: The package is not installed.
    """
    model = MODELS[LANGUAGE_MODEL]
    if model.missing():
        raise UserError(f"label words need a language model: name one by --model, or install one by {model.pip()}")
    return model.path()


def prompted(data: TaskData, prompt: str) -> TaskData:
    """The same rows with each text put into a prompt.

    Raises:
        UserError: The task is not of one text and two classes, or the prompt has no place for the text.
    """
    task = data.task
    if len(task.text_columns) != 1 or task.num_labels != 2:
        raise UserError(f"label words take tasks of one text and two classes; {task.name} is of another form")
    if _PLACE not in prompt:
        raise UserError(f"the prompt {prompt!r} has no {_PLACE}, where the text goes")
    column = task.text_columns[0]

    def put(rows: Dataset) -> Dataset:
        texts = [prompt.replace(_PLACE, text.strip()) for text in rows[column]]
        return Dataset.from_dict(rows[:] | {column: texts}, features=rows.features)

    train, validation = put(data.train), put(data.validation)
    origins = tuple(replace(o, rows=train if o.rows is data.train else validation) for o in data.origins)
    return replace(data, train=train, validation=validation, origins=origins)


def load_label_words(
    model: Path | str | None, words: Sequence[str], *, seed: int = 0, dtype: torch.dtype = torch.float32,
    device: str = "cpu", **loading: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """Load a language model whose outputs are the logits of words, one for each label in order, and its tokenizer.

    The options `loading` are those of `LoadingOptions`.

    Raises:
        UserError: The model cannot be loaded, does not continue texts, or a word is not one token of its own.
    """
    source = packaged_model() if model is None else model
    config = find_config(source, TASK_TYPE, trust_remote_code=loading.get("trust_remote_code", False))
    # transformers loads encoders as causal language models too, although they were not trained to continue a text.
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise UserError(f"label words need a causal language model; {source} is an encoder ({config.model_type})")
    network, tokenizer = load_model(source, task_type=TASK_TYPE, seed=seed, dtype=dtype, device=device, **loading)
    ids = [tokenizer.encode(word, add_special_tokens=False) for word in words]
    for word, tokens in zip(words, ids, strict=True):
        if len(tokens) != 1:
            raise UserError(f"label word {word!r} is {len(tokens)} tokens of this model; it must be one")
    if len({tokens[0] for tokens in ids}) < len(ids):
        raise UserError(f"the label words {', '.join(map(repr, words))} are not different tokens of this model")
    return answering(network, [tokens[0] for tokens in ids]), tokenizer


def answering(model: Any, ids: Sequence[int]) -> Any:
    """Change a causal language model in place so that it returns the logits ``(n, c)`` of c tokens after each row."""
    output = label_words(ids)

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> SequenceClassifierOutput:
        # Called through the class, so that a copy of the model does not call the model that it was copied from.
        options = {name: value for name, value in options.items() if name in ("output_hidden_states", "inputs_embeds")}
        found = type(self).forward(
            self, input_ids=input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True, **options
        )
        logits = output(found, {"attention_mask": attention_mask})
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=found.hidden_states)  # pyright: ignore[reportArgumentType]

    model.forward = MethodType(forward, model)
    return model
