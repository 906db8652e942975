"""Classification by a causal language model as it is: the logits of two words after a prompt (Malladi et al. 2023).

No head is added, so that nothing is random but the examples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

import ntk
from propulsion.errors import UserError
from propulsion.tasks import Task


@dataclass(frozen=True)
class Prompt:
    """How a row is put to the model.

    Attributes:
        template: text with the task's columns in braces.
        words: what may follow, one word a label, each with the space before it.
    """

    template: str
    words: tuple[str, str]


_FILM = Prompt("{sentence}\nAll in all, the film is", (" terrible", " great"))
PROMPTS: Mapping[str, Prompt] = {"demo": _FILM, "sst2": _FILM}


def prompt_of(task: Task) -> Prompt:
    """The prompt of a task of two classes.

    Raises:
        UserError: it has none.
    """
    if task.name not in PROMPTS:
        raise UserError(f"there are no label words for task {task.name}, only for {', '.join(PROMPTS)}")
    return PROMPTS[task.name]


def encode(rows: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase, task: Task) -> dict[str, Tensor]:
    """The prompts of rows, given by column, as a padded batch of token ids and mask.

    Raises:
        UserError: the task has no prompt, or one is longer than the model takes.
    """
    template = prompt_of(task).template
    columns = [rows[name] for name in task.text_columns]
    texts = [
        template.format(**{name: str(text).strip() for name, text in zip(task.text_columns, row, strict=True)})
        for row in zip(*columns, strict=True)
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt", verbose=False)
    longest = int(batch["attention_mask"].sum(1).max())
    if longest > tokenizer.model_max_length:
        raise UserError(f"a prompt has {longest} tokens, and the model takes {tokenizer.model_max_length}")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def margin(tokenizer: PreTrainedTokenizerBase, task: Task) -> ntk.outputs.Output:
    """The logit of the second label's word minus that of the first at the last real token: ``(n, 1)``.

    Raises:
        UserError: the task has no words, or a word is no single token.
    """
    ids = []
    for word in prompt_of(task).words:
        found = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(found) != 1:
            raise UserError(f"label word {word!r} is {len(found)} tokens of this tokenizer, and must be one")
        ids += found
    words = ntk.outputs.label_words(ids)

    def output(model_output: Any, inputs: Mapping[str, Any]) -> Tensor:
        logits = words(model_output, inputs)
        return logits[:, 1:] - logits[:, :1]

    return output
