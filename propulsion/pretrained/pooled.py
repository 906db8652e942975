"""A classifier of any architecture: a body, a pooling of its hidden states, dropout, and a linear head.

transformers' own classifiers read a body in the way of its family (BERT's through a pooler), whatever the checkpoint
was trained for. This one reads the mean of the tokens' hidden states, or the first.

This file is copied beside the models that it saves, so that transformers alone can load them
(``trust_remote_code=True``). It therefore imports nothing of this package. Where `propulsion` is imported,
`AutoModelForSequenceClassification` knows the class, and no such flag is needed.
"""

import inspect
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    PreTrainedConfig,
    PreTrainedModel,
)  # fmt: skip
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.modeling_outputs import SequenceClassifierOutput

POOLED = ("mean", "first")
"""The poolings that `PooledClassifier` has."""

_LABELS = ("id2label", "label2id", "problem_type")
# Names of the dropout before a classifier's last layer in families' configurations, the most specific first.
_DROPOUTS = ("classifier_dropout", "classifier_dropout_prob", "seq_classif_dropout", "cls_dropout",
             "hidden_dropout_prob")  # fmt: skip


class PooledConfig(PreTrainedConfig):
    """The saved configuration of a `PooledClassifier`: that of its body, and the pooling.

    It has a model type of its own, so that it is not loaded as a plain model of the body's family, which has other
    outputs. Labels, given here or in the body's configuration, are set in both.

    Args:
        body_config: Configuration of the body, or its values with its ``model_type``.
        pooling: "mean" or "first".
        **kwargs: As for `PreTrainedConfig`; ``num_labels`` and labels replace those of the body's configuration.

    Raises:
        ValueError: There is no such pooling, or the body is of an unknown type.
    """

    model_type = "pooled-classifier"

    def __init__(self, body_config: PreTrainedConfig | dict | None = None, pooling: str = "mean", **kwargs: Any):
        if pooling not in POOLED:
            raise ValueError(f"pooling is {pooling!r}, expected one of {', '.join(POOLED)}")
        if isinstance(body_config, dict):
            values = dict(body_config)
            family = values.pop("model_type", None)
            if family not in CONFIG_MAPPING:
                raise ValueError(f"body_config is of model_type {family!r}, which transformers does not have")
            body_config = CONFIG_MAPPING[family].from_dict(values)
        body = CONFIG_MAPPING["bert"]() if body_config is None else body_config
        given = {name for name in (*_LABELS, "num_labels") if kwargs.get(name) is not None}
        if not given & {"num_labels", "id2label"}:
            kwargs |= {name: getattr(body, name) for name in ("id2label", "label2id")}
        if "problem_type" not in given:
            kwargs["problem_type"] = body.problem_type
        super().__init__(**kwargs)
        for name in _LABELS:
            setattr(body, name, getattr(self, name))
        self.body_config, self.pooling = body, pooling


class PooledClassifier(PreTrainedModel):
    """A classifier or regressor on the mean, or the first, of the last hidden states of a body.

    The body has the name that its family gives it ("bert", "distilbert", ...), without its pooler, and `config` is the
    body's: for adapters and other tools this is a model of the family with another head. Padding is ignored.

    Args:
        config: Configuration of the body, and the pooling.
        body: A body of that configuration, whose pooler is removed; a new one if None.

    Raises:
        ValueError: The body is an encoder-decoder without an encoder class of its own.
    """

    config_class = PooledConfig
    supports_gradient_checkpointing = True
    # The body is made first, and checks which implementation of attention it supports.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: PooledConfig, body: PreTrainedModel | None = None):
        body_config = config.body_config
        if body is None:
            # `from_pretrained` sets the chosen implementation of attention on the whole configuration.
            if (attention := getattr(config, "_attn_implementation_internal", None)) is not None:
                body_config._attn_implementation = attention
            # Code that a checkpoint brings for its body is not run.
            body = body_class(body_config).from_config(body_config, trust_remote_code=False)
            assert body is not None
        else:
            for module in body.modules():
                module._is_hf_initialized = True  # pyright: ignore[reportArgumentType]  # So that `post_init` does not draw its weights again.
        super().__init__(body.config)
        self.pooling = config.pooling
        self.num_labels = int(body.config.num_labels or 0)
        self.supports_gradient_checkpointing = body.supports_gradient_checkpointing
        self.base_model_prefix = body.base_model_prefix or "body"
        _remove_pooler(body)
        setattr(self, self.base_model_prefix, body)
        # Families with another name for the width map it to this one.
        width: int = body.config.hidden_size  # pyright: ignore[reportAttributeAccessIssue]
        dropouts = (getattr(body.config, name, None) for name in _DROPOUTS)
        dropout = nn.Dropout(float(next((value for value in dropouts if value is not None), 0.0)))
        # The weight's name is not that of the families' one-layer heads, so that loading an adapter with this head onto
        # one of their models gives a warning.
        self.classifier = nn.Sequential(OrderedDict(dropout=dropout, out_proj=nn.Linear(width, self.num_labels)))
        inputs = inspect.signature(body.forward).parameters
        self._takes_past, self._takes_cache = "past_key_values" in inputs, "use_cache" in inputs
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Any = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple:
        """Outputs ``(n, c)`` of examples, and the loss if there are labels, as transformers' classifiers.

        Raises:
            ValueError: The mask or the body's states do not have one entry for each token.
        """
        if past_key_values is not None:
            if not self._takes_past:
                raise ValueError(f"{self.base_model_prefix} takes no past_key_values")
            kwargs["past_key_values"] = past_key_values
        if self._takes_cache:
            kwargs.setdefault("use_cache", False)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        outputs = self.base_model(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, return_dict=True, **kwargs
        )
        states = outputs.last_hidden_state
        if attention_mask is not None and past_key_values is not None:
            attention_mask = attention_mask[:, -states.shape[1] :]  # The mask covers the past too.
        logits = self.classifier(pool(states, attention_mask, self.pooling))
        loss: Any = None
        if labels is not None:
            loss = ForSequenceClassificationLoss(labels=labels, pooled_logits=logits, config=self.config)
        kept = {name: outputs.get(name) for name in ("hidden_states", "attentions")}
        output = SequenceClassifierOutput(loss=loss, logits=logits, **kept)
        return output.to_tuple() if return_dict is False else output

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, with a `PooledConfig` and this file."""
        body_config = self.config
        self.config = PooledConfig(body_config=body_config, pooling=self.pooling)
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.config = body_config


def pool(states: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """The mean, or the first, of each example's real tokens.

    Args:
        states: ``(n, t, h)``.
        attention_mask: ``(n, t)``, 1 for real tokens; all are real without it.
        pooling: "mean" or "first".

    Returns:
        ``(n, h)``; 0 for an example without a real token.

    Raises:
        ValueError: The shapes do not agree.
    """
    if states.ndim != 3 or (attention_mask is not None and attention_mask.shape != states.shape[:2]):
        mask = "" if attention_mask is None else f" and a mask of shape {tuple(attention_mask.shape)}"
        raise ValueError(
            f"expected hidden states (n, t, h) and a mask (n, t), got states of shape {tuple(states.shape)}{mask}"
        )
    # In half precision a sum over many tokens is not accurate.
    dtype = torch.promote_types(states.dtype, torch.float32)
    if attention_mask is None:
        real = torch.ones(states.shape[:2], dtype=dtype, device=states.device)
    else:
        real = (attention_mask != 0).to(dtype)
    if pooling == "first":
        real = real * (real.cumsum(dim=1) == 1)
    weights = real / real.sum(dim=1, keepdim=True).clamp(min=1)
    return (states * weights.unsqueeze(-1)).sum(dim=1).to(states.dtype)


def body_class(config: PreTrainedConfig) -> Any:
    """The Auto class of transformers that makes a body with one hidden state for every token of a text.

    Raises:
        ValueError: The model is an encoder-decoder without an encoder class of its own.
    """
    if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        return AutoModelForTextEncoding
    if config.is_encoder_decoder:
        raise ValueError(
            f"models of type {config.model_type!r} are encoder-decoders, whose states belong to no token of the text"
        )
    return AutoModel


def _remove_pooler(body: Any) -> None:
    """Remove the pooler, whose output is not used: its weights would be counted and never trained."""
    if getattr(body, "pooler", None) is None:
        return
    # Bodies that can be made without a pooler skip it if it is None; others call it always.
    optional = "add_pooling_layer" in inspect.signature(type(body).__init__).parameters
    body.pooler = None if optional else nn.Identity()


PooledConfig.register_for_auto_class()
PooledClassifier.register_for_auto_class("AutoModelForSequenceClassification")
AutoConfig.register(PooledConfig.model_type, PooledConfig, exist_ok=True)
AutoModelForSequenceClassification.register(PooledConfig, PooledClassifier, exist_ok=True)
