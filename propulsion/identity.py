"""Hashes that identify models, adapters and tokenizers by their content, and not by a name or a path."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

# Fields of a configuration that say where a model came from, and do not change what it computes.
_PROVENANCE = ("_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype")


def weights_identity(weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of the names, shapes, types and all values of tensors, in their order. Reads every byte of them once."""
    digest = hashlib.sha256()
    for name, weight in weights:
        # As bytes, since numpy has no bfloat16.
        values = weight.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if values.numel():
            digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of a tokenizer's vocabulary, rules, special tokens and longest input."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for state in ("truncation", "padding"):  # Settings that remain from the tokenizer's last call.
        vocabulary.pop(state, None)
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return content_identity([type(tokenizer).__name__, vocabulary, special, tokenizer.model_max_length])


def model_content(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that determines a model's outputs: weights with the head, buffers, configuration, tokenizer."""
    config = getattr(model, "config", None)
    settings: dict[str, Any] = {} if config is None else config.to_dict()
    kept = [*model.named_parameters(), *model.named_buffers()]
    return content_identity(
        [type(model).__name__, _without_provenance(settings), weights_identity(kept), tokenizer_identity(tokenizer)]
    )


def _without_provenance(settings: Any) -> Any:
    if not isinstance(settings, dict):
        return settings
    return {name: _without_provenance(value) for name, value in settings.items() if name not in _PROVENANCE}


def content_identity(content: Any) -> str:
    """SHA-256 of content as JSON; what JSON cannot hold enters as its `str`."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
