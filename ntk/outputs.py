"""Functions ``(model_output, inputs) -> (n, c)`` that choose the network outputs whose kernel is computed.

Pass one as ``output=``. Each works on a padded batch and on a batch of one unpadded example. Row i must depend on
example i alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Output = Callable[[Any, Any], Tensor]


def logits(model_output: Any, inputs: Any = None) -> Float[Tensor, "n c"]:
    """The default: a classifier's logits, or the tensor that a plain module returns.

    Raises:
        ValueError: the model has no logits (no head), or has logits per token (a language model).
    """
    value = model_output if isinstance(model_output, Tensor) else getattr(model_output, "logits", None)
    if value is None:
        raise ValueError(
            f"the model returns {type(model_output).__name__}, which has no logits: load it with a classifier head "
            "(AutoModelForSequenceClassification) or pass output=, a function (model_output, inputs) -> (n, c)"
        )
    if value.ndim == 1:
        return value[:, None]
    if value.ndim != 2:
        raise ValueError(
            f"the model has outputs per token, shape {tuple(value.shape)}; their kernel would have "
            f"{value[0].numel()} outputs an example. Pass output=, for instance ntk.outputs.label_words(ids), "
            "ntk.outputs.sum_of_logits or ntk.outputs.loss"
        )
    return value


def last_token_logits(model_output: Any, inputs: Mapping[str, Any]) -> Float[Tensor, "n v"]:
    """Logits ``(n, v)`` over the vocabulary at each example's last real token, which predict the next token."""
    per_token = model_output.logits
    if per_token.ndim != 3:
        raise ValueError(f"expected logits per token, (n, t, v); got shape {tuple(per_token.shape)}")
    mask = inputs.get("attention_mask")
    if mask is None:
        return per_token[:, -1]
    # Positions grow along the real tokens and padding counts 0, so the largest is the last real token.
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1)
    return per_token.gather(1, last[:, None, None].expand(-1, 1, per_token.shape[2])).squeeze(1)


def label_words(token_ids: Sequence[int]) -> Output:
    """The logits of chosen words at the last real token of a causal language model: ``(n, len(token_ids))``.

    Turns a language model into a classifier without a head (Malladi et al. 2023, sec. 3).

    Raises:
        ValueError: ``token_ids`` is empty or holds an id twice.
    """
    ids = list(token_ids)
    if not ids or len(set(ids)) != len(ids):
        raise ValueError(f"label_words takes distinct token ids, one a class; got {ids}")
    return lambda model_output, inputs: last_token_logits(model_output, inputs)[:, ids]


def classes(indices: Sequence[int]) -> Output:
    """The logits of chosen classes of a classifier: ``(n, len(indices))``."""
    chosen = list(indices)
    if not chosen:
        raise ValueError("classes takes at least one class index")
    return lambda model_output, inputs: logits(model_output)[:, chosen]


def margin(positive: int = 1, negative: int = 0) -> Output:
    """The difference of two classes' logits, ``(n, 1)``."""

    def output(model_output: Any, inputs: Any) -> Tensor:
        values = logits(model_output)
        return values[:, positive : positive + 1] - values[:, negative : negative + 1]

    return output


def sum_of_logits(model_output: Any, inputs: Any = None) -> Float[Tensor, "n 1"]:
    """The sum of a classifier's logits, or of a language model's at the last real token: ``(n, 1)``."""
    per_token = not isinstance(model_output, Tensor) and model_output.logits.ndim == 3
    values = last_token_logits(model_output, inputs) if per_token else logits(model_output)
    return values.sum(dim=1, keepdim=True)


def summed_outputs(output: Output | None) -> Output:
    """The sum over the c outputs of another function, or of :func:`logits` if None: ``(n, 1)``."""

    def summed(model_output: Any, inputs: Any) -> Any:
        value = (output or logits)(model_output, inputs)
        # The caller raises for any other shape than (n, c).
        return value.sum(dim=1, keepdim=True) if isinstance(value, Tensor) and value.ndim == 2 else value

    return summed


def loss(model_output: Any, inputs: Mapping[str, Any]) -> Float[Tensor, "n 1"]:
    """Each example's loss against ``inputs["labels"]``, ``(n, 1)``.

    Integer labels ``(n,)``: cross-entropy. Floating labels ``(n,)`` or ``(n, c)``: mean squared error over outputs.
    Integer labels ``(n, t)`` with logits ``(n, t, v)``: the mean next-token cross-entropy, where -100 is ignored.

    Raises:
        ValueError: no labels.
    """
    if not isinstance(inputs, Mapping) or inputs.get("labels") is None:
        raise ValueError('ntk.outputs.loss needs inputs["labels"]')
    labels = inputs["labels"]
    if labels.ndim == 2 and not labels.is_floating_point():
        scores, targets = model_output.logits[:, :-1].transpose(1, 2), labels[:, 1:]
        per_token = F.cross_entropy(scores, targets, reduction="none", ignore_index=-100)
        return (per_token.sum(1) / (targets != -100).sum(1)).unsqueeze(1)
    scores = logits(model_output)
    if labels.is_floating_point():
        return ((scores - labels.reshape(scores.shape)) ** 2).mean(dim=1, keepdim=True)
    return F.cross_entropy(scores, labels, reduction="none").unsqueeze(1)
