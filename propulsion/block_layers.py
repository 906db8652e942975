"""Attention and feed-forward layers of any transformer, found by how its blocks are built.

An attention module is one whose children are linear layers named as query, key and value, or as the three in one. Its
output projection stands beside them, or is or lies in a module `output` beside it. The feed-forward layers are the
other linear layers of the numbered block that holds an attention module, without those that choose experts, and the
layers of the same names in blocks without attention.
"""

import re
from collections.abc import Iterator, Mapping

from torch import nn
from transformers.pytorch_utils import Conv1D

# What architectures call these layers, in lower case.
_ROLES = {
    role: {form.format(stem) for stem in (role[0], role) for form in (
        "{}", "{}_proj", "{}_lin", "{}_linear", "linear_{}", "to_{}", "{}_layer", "w{}", "{}_net")}
    for role in ("query", "key", "value")
}  # fmt: skip
_FUSED = {"qkv", "qkv_proj", "wqkv", "c_attn", "query_key_value", "in_proj", "qkv_net", "att_proj"}
_OUTPUT = {"o", "wo", "o_proj", "out", "out_proj", "out_lin", "dense", "c_proj", "to_out", "linear_out", "attn_out"}
_ROUTERS = {"router", "gate"}


def block_layers(candidates: Mapping[str, nn.Module]) -> dict[str, set[str]]:
    """The names of the modules at each position, from every module by name; without the positions that have none.

    A module that computes query, key and value in one is at "attn" alone.
    """
    found: dict[str, set[str]] = {p: set() for p in ("query", "key", "value", "attn", "attention_output", "mlp")}
    linear = {name for name, module in candidates.items() if _is_linear(module)}
    inside: set[str] = set()
    for parent in candidates:
        children = {name for name in linear if _parent(name) == parent}
        by_role = {role: {c for c in children if _last(c) in names} for role, names in _ROLES.items()}
        # Mamba's `in_proj` is no attention.
        fused = {c for c in children if _last(c) in _FUSED and _of_attention(c)}
        if all(len(named) == 1 for named in by_role.values()):
            for role, named in by_role.items():
                found[role] |= named
            found["attn"] |= set.union(*by_role.values())
        elif len(fused) == 1:
            found["attn"] |= fused
        else:
            continue
        beside = f"{_parent(parent)}.output"
        output = {c for c in children if _last(c) in _OUTPUT} or {n for n in linear if beside in (n, _parent(n))}
        found["attention_output"] |= output
        inside |= children | output
    others = {name for name in linear - inside if _last(name) not in _ROUTERS and not _of_attention(name)}
    beside_attention: set[str] = set()
    for name in found["attn"]:
        beside_attention |= next((own for block in _blocks(name) if (own := _within(block, others))), set())
    # In hybrid models, blocks without attention have feed-forward layers too.
    numberless = {_numberless(name) for name in beside_attention}
    found["mlp"] = {name for name in others if _numberless(name) in numberless}
    return {position: names for position, names in found.items() if names}


def _of_attention(name: str) -> bool:
    return any(word in name.lower() for word in ("attn", "attention"))


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, of torch, of GPT-2's kind or of a library of quantised layers."""
    return isinstance(module, (nn.Linear, Conv1D)) or all(hasattr(module, f"{end}_features") for end in ("in", "out"))


def _blocks(name: str) -> Iterator[str]:
    """The numbered modules that a module lies in, the innermost first: "block.0.layer.1", "block.0"."""
    segments = name.split(".")
    yield from (".".join(segments[:i]) for i in range(len(segments) - 1, 0, -1) if segments[i - 1].isdigit())


def _within(block: str, names: set[str]) -> set[str]:
    return {name for name in names if name.startswith(f"{block}.")}


def _numberless(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "", f".{name}")


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _last(name: str) -> str:
    return name.rpartition(".")[2].lower()
