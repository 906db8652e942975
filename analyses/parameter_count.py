"""How many parameters does Propulsion train in the paper's models? They are counted from the architectures alone.

No weight is loaded: models are built on torch's meta device from their published sizes. "every Linear and Embedding"
counts the modules that the paper's code replaces by default, including heads and modules that are never used; "all" is
this project's position "all" without a trained head, which leaves out modules that the model neither calls nor reads.

The paper's abstract compares "355.3 million" with "0.086 million" (Kowsher et al. 2024). The first is all of
RoBERTa-large, the second is Propulsion on RoBERTa-base, a different model.

    python -m analyses.parameter_count
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import nn
from transformers.pytorch_utils import Conv1D

from analyses.core.analysis import Analysis, Findings, Output
from analyses.records import Block, Metric, Result, summary_of_blocks
from propulsion.errors import UserError, did_you_mean
from propulsion.positions import resolve

COST = "seconds"


def _built(architecture: str, **sizes: Any) -> nn.Module:
    """A model of transformers, by the name of its class and the sizes of its configuration."""
    make = getattr(hf, architecture)
    return make(make.config_class(**sizes))


_ROBERTA = partial(
    _built, "RobertaForSequenceClassification", vocab_size=50265, max_position_embeddings=514, type_vocab_size=1,
    num_labels=2,
)  # fmt: skip
_LLAMA = partial(_built, "LlamaForCausalLM", vocab_size=32000)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "RoBERTa-base": partial(
        _ROBERTA, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
    ),
    "RoBERTa-large": partial(
        _ROBERTA, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "DeBERTaV3-base": partial(
        _built, "DebertaV2ForQuestionAnswering", vocab_size=128100, hidden_size=768, num_hidden_layers=12,
        num_attention_heads=12, intermediate_size=3072, max_position_embeddings=512, type_vocab_size=0,
        relative_attention=True, position_buckets=256, pos_att_type=["p2c", "c2p"], share_att_key=True,
        norm_rel_ebd="layer_norm", position_biased_input=False,
    ),
    "BART-large": partial(
        _built, "BartForConditionalGeneration", vocab_size=50265, d_model=1024, encoder_layers=12, decoder_layers=12,
        encoder_ffn_dim=4096, decoder_ffn_dim=4096, encoder_attention_heads=16, decoder_attention_heads=16,
    ),
    "LLaMA-7B": partial(
        _LLAMA, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008
    ),
    "LLaMA-13B": partial(
        _LLAMA, hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, intermediate_size=13824
    ),
    "BLOOMz-7B1": partial(_built, "BloomForCausalLM", vocab_size=250880, hidden_size=4096, n_layer=30, n_head=32),
    "GPT-J-6B": partial(_built, "GPTJForCausalLM", vocab_size=50400, n_embd=4096, n_layer=28, n_head=16),
}  # fmt: skip
COUNTS = {
    "everything": "every Linear and Embedding",
    "all": "all, live, without head",
    "blocks": "block Linears",
    "attn": "query, key, value",
    "total": "whole model",
}


@dataclass(frozen=True)
class Config(Output):
    """Options of the analysis."""

    models: tuple[str, ...] = tuple(MODELS)
    """Names of the models."""


def counts(model: nn.Module) -> dict[str, int]:
    """Number of scales for each choice of layers, with one vector per layer, and of the model's distinct parameters."""
    sizes = {name: size for name, module in model.named_modules() if (size := width(module)) is not None}
    linears = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    in_blocks = {name for name in linears if any(part.isdigit() for part in name.split("."))}
    body = f"{getattr(model, 'base_model_prefix', '')}."
    return {
        "everything": sum(sizes.values()),
        "all": sum(sizes[name] for name in resolve(model, "all") if name.startswith(body)),
        "blocks": sum(sizes[name] for name in in_blocks),
        "attn": sum(sizes[name] for name in resolve(model, "attn")),
        "total": sum(parameter.numel() for parameter in model.parameters()),
    }


def width(module: nn.Module) -> int | None:
    """Output features of a layer, the length of its z; None if it is neither linear nor an embedding."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, Conv1D):
        return module.nf
    return module.embedding_dim if isinstance(module, nn.Embedding) else None


def find(config: Config) -> Findings:
    """Count the parameters of every model."""
    rows: list[dict[str, Any]] = []
    for name in config.models:
        with torch.device("meta"):
            rows.append({"model": name} | counts(MODELS[name]()))
    metrics = [
        Metric(count, float(row[count]), None, None, "parameters", "initialisation", row["model"], "")
        for row in rows
        for count in COUNTS
    ]
    return Findings(
        metrics, tables={"counts": rows}, model={"name": ", ".join(config.models)}, dataset={"name": "none"}
    )


def _check(config: Config) -> None:
    if not config.models:
        raise UserError(f"models must name one at least of {', '.join(MODELS)}")
    if unknown := [name for name in config.models if name not in MODELS]:
        close = did_you_mean(unknown[0], MODELS)
        raise UserError(f"no model {', '.join(unknown)}{close}; there are {', '.join(MODELS)}")


@summary_of_blocks
def summary(result: Result) -> Iterator[Block]:
    """One row for each model."""
    rows = [[row["model"], *(f"{row[count]:,}" for count in COUNTS)] for row in result.tables["counts"]]
    yield ["model", *COUNTS.values()], rows


ANALYSIS = Analysis("parameter_count", Config, find, summary, check=_check)
run = ANALYSIS.run

if __name__ == "__main__":
    ANALYSIS.command(__doc__)
