"""What two models, adapters or tokenizers are known to be the same by: their content, and never a name or a place."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

# Of a configuration: where a model came from and what wrote it, which change nothing that it computes.
_PROVENANCE = ("_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype")


def weights_identity(weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of the names, shapes, types and all values of tensors, in their order. Reads every byte of them once."""
    digest = hashlib.sha256()
    for name, weight in weights:
        # As bytes, since numpy knows no bfloat16.
        values = weight.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if values.numel():
            digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of how a tokenizer cuts text: its vocabulary, rules, special tokens and longest input."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for state in ("truncation", "padding"):  # Left there by the last call, whatever it was.
        vocabulary.pop(state, None)
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return _digest([type(tokenizer).__name__, vocabulary, special, tokenizer.model_max_length])


def model_content(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that a model computes by: every weight and buffer, its head too, configuration and tokenizer."""
    config = getattr(model, "config", None)
    settings: dict[str, Any] = {} if config is None else config.to_dict()
    kept = [*model.named_parameters(), *model.named_buffers()]
    return _digest(
        [type(model).__name__, _without_provenance(settings), weights_identity(kept), tokenizer_identity(tokenizer)]
    )


def _without_provenance(settings: Any) -> Any:
    if not isinstance(settings, dict):
        return settings
    return {name: _without_provenance(value) for name, value in settings.items() if name not in _PROVENANCE}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
