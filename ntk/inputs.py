"""Splitting of batches into examples: padding is removed, and examples of one shape are grouped.

An example consists of its real tokens. Leading and trailing padding is cut off before the model runs, and positions
count from the first real token, so a kernel cannot depend on the amount of padding, on its side, or on the other
examples of the batch. Only entries whose names say that they hold one column for each token (`TOKENS`) are cut, since
an entry of the same width may hold something else. If an entry of two or more axes has an unknown name, or no entry
holds tokens, the examples keep their padding, and the model gets it with its mask, as in an ordinary call.

Hugging Face models fail under ``vmap`` because their mask code branches on the *values* of the attention mask. Examples
are therefore grouped by shape and by mask, and a group's mask is an ordinary tensor, never a batched one.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_leaves

Inputs = Mapping[str, Any] | Tensor | tuple[Tensor, ...]
"""A mapping of batched tensors by the names of the model's arguments, a tensor, or a tuple in the arguments' order."""

Batch = Mapping[str, Any] | Tensor
"""The same without tuples, which :func:`by_name` replaces."""

# The entries that say which encoder or decoder tokens are real.
ENCODER_MASK, DECODER_MASK = "attention_mask", "decoder_attention_mask"
# Entries with one column for each token, in addition to masks and integer labels; "decoder_" may precede the name.
# Samples of audio (``input_values``) count as tokens if they have the shape of the mask.
TOKENS = ("input_ids", "inputs_embeds", "input_values", "token_type_ids", "position_ids", "special_tokens_mask")
# The beginnings of the names of entries that hold no tokens.
_NOT_TOKENS = ("pixel_", "input_features")


@dataclass(frozen=True)
class Group:
    """Examples of one shape, ready for ``vmap``.

    Attributes:
        indices: positions of the examples in the batch.
        batched: entries that differ from example to example, ``(g, ...)`` for g examples.
        constant: entries shared by the group as the model takes them (masks of batch 1, flags).
        listed: names of the constant entries that are lists, tuples or arrays of one element for each example; they
            have length 1, since the group's examples share the element.
    """

    indices: list[int]
    batched: dict[str, Tensor]
    constant: dict[str, Any]
    listed: frozenset[str] = frozenset()

    def example(self, position: int) -> dict[str, Any]:
        """The ``position``-th example as the model takes it: a batch of one."""
        return {key: value[position : position + 1] for key, value in self.batched.items()} | self.constant

    def take(self, positions: slice) -> "Group":
        """The part of the group at ``positions``."""
        batched = {key: value[positions] for key, value in self.batched.items()}
        return replace(self, indices=self.indices[positions], batched=batched)

    def alone(self, position: int) -> "Group":
        """One example as a group of its own, without the padding that :func:`pad_together` added."""
        one = self.take(slice(position, position + 1))
        mask = one.batched.get(ENCODER_MASK)
        if mask is None:
            return one
        real = int(mask.sum())
        batched = {key: value[:, :real] for key, value in one.batched.items() if key != ENCODER_MASK}
        return Group(one.indices, batched, one.constant | {ENCODER_MASK: mask[:, :real]})

    @property
    def length(self) -> int:
        """The length of the group's examples in tokens, for estimates only."""
        return max((value.shape[1] for value in self.batched.values() if value.ndim > 1), default=1)

    def repeated(self) -> dict[str, Any]:
        """The constant entries for the whole group: masks and lists with one row or element for each example."""
        n, repeated = len(self.indices), {}
        for key, value in self.constant.items():
            if isinstance(value, Tensor) and value.ndim and len(value) == 1:
                value = value.expand(n, *value.shape[1:])
            elif key in self.listed:
                value = np.repeat(value, n, axis=0) if isinstance(value, np.ndarray) else value * n
            repeated[key] = value
        return repeated


def by_name(model: nn.Module, inputs: Inputs) -> Batch:
    """A tuple of positional arguments as a mapping by the names of ``model.forward``'s arguments; others as they are.

    Raises:
        ValueError: the tuple is empty, has more entries than ``forward`` has named arguments, or holds what is no
            tensor.
    """
    if not isinstance(inputs, tuple):
        return inputs
    if not inputs or not all(isinstance(t, Tensor) for t in inputs):
        kinds = ", ".join(type(t).__name__ for t in inputs) or "nothing"
        raise ValueError(f"a tuple of inputs must hold the tensors that the model takes, in their order; got {kinds}")
    taken = [p for p in inspect.signature(model.forward).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    if len(taken) < len(inputs):
        raise ValueError(
            f"inputs is a tuple of {len(inputs)} tensors, and {type(model).__name__}.forward has {len(taken)} named "
            "arguments: give a tensor, or a mapping from names to tensors"
        )
    return {p.name: t for p, t in zip(taken, inputs)}


def batch_size(inputs: Inputs) -> int:
    """Number of examples n: the largest first dimension, since entries such as position ids may have batch size 1.

    Raises:
        ValueError: no batched tensor, an empty batch, or first dimensions other than n and 1.
        TypeError: neither a tensor nor a mapping.
    """
    if isinstance(inputs, Tensor):
        if inputs.ndim == 0 or len(inputs) == 0:
            raise ValueError(f"inputs must hold at least one example; got a tensor of shape {tuple(inputs.shape)}")
        return len(inputs)
    if not isinstance(inputs, Mapping):
        raise TypeError(
            "inputs must be a tensor, a tuple of tensors or a mapping of batched tensors (a tokenizer's output); "
            f"got {type(inputs).__name__}"
        )
    lengths = {key: len(value) for key, value in inputs.items() if isinstance(value, Tensor) and value.ndim > 0}
    if not lengths:
        raise ValueError(
            "inputs holds no batched tensor; tokenize with return_tensors='pt' "
            f"(entries: {', '.join(inputs) or 'none'})"
        )
    n = max(lengths.values())
    wrong = {key: length for key, length in lengths.items() if length not in (1, n)}
    if n == 0 or wrong:
        raise ValueError(f"the tensors of inputs must share their first dimension (or have 1); got {lengths}")
    return n


def check_devices(model: nn.Module, batches: Iterable[Inputs | None]) -> None:
    """Check that batches are on the model's device; a model on several devices is not checked.

    Raises:
        ValueError: a tensor is on another device than the parameters.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type == "meta":  # offloaded weights are on "meta"
        return
    (device,) = devices
    for batch in batches:
        for name, value in (batch if isinstance(batch, Mapping) else {"inputs": batch}).items():
            if isinstance(value, Tensor) and value.device != device:
                raise ValueError(
                    f"expected inputs on the model's device, {device}; {name} is on {value.device}: "
                    f"move it there by .to({str(device)!r})"
                )


def check_finite(batches: Iterable[Inputs | None]) -> None:
    """Check that the numbers of all examples are finite; an additive mask may hold zeros and minus infinity.

    Raises:
        ValueError: an entry holds NaN or infinite values; the message names it and the first such row.
    """
    for batch in batches:
        for name, value in (batch if isinstance(batch, Mapping) else {"": batch}).items():
            numbers = _numbers(value)
            if numbers is None or bool((good := torch.isfinite(numbers)).all()):
                continue
            if not numbers.is_complex() and bool(((numbers == 0) | (numbers == -torch.inf)).all()):
                continue
            first = int((~good.reshape(len(good), -1) if good.ndim else ~good.reshape(1, 1)).any(dim=1).nonzero()[0])
            raise ValueError(
                f"the inputs{f' ({name})' if name else ''} hold NaN or infinite values, first in row {first}"
            )


def _numbers(value: Any) -> Tensor | None:
    """Floating-point numbers of a tensor, an array or a list; None for anything else."""
    if isinstance(value, list | tuple | np.ndarray):
        try:
            value = torch.as_tensor(np.asarray(value, dtype=np.float64))
        except (TypeError, ValueError):  # words, or lists of different lengths
            return None
    if not isinstance(value, Tensor) or value.is_meta or not (value.is_floating_point() or value.is_complex()):
        return None
    return value.detach() if value.layout == torch.strided else value.detach().to_dense()


def group_examples(inputs: Batch, *, encoder_decoder: bool = False) -> list[Group]:
    """Cut the padding off every example and group the examples that can run together.

    Args:
        inputs: one tensor ``(n, ...)``, or a mapping with an optional 2-D ``attention_mask`` of zeros and ones.
        encoder_decoder: the labels belong to the decoder's tokens, not to the encoder's.

    Lists, tuples and arrays of length n hold one element for each example; anything else that is not a tensor is the
    same for all examples.

    Returns:
        Groups that cover 0..n-1 once, in order of first appearance.

    Raises:
        ValueError: as :func:`batch_size`; a mask without any real token, with values other than 0 and 1, or of another
            shape than its tokens; a container that cannot be split into examples.
    """
    n = batch_size(inputs)
    if isinstance(inputs, Tensor):
        return [Group(list(range(n)), {"": inputs}, {})]
    listed = frozenset(
        key for key, value in inputs.items() if not isinstance(value, Tensor) and _by_example(key, value, n)
    )
    spans: dict[str, list[slice]] = {}
    for name in (ENCODER_MASK, DECODER_MASK):
        mask = inputs.get(name)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            # On the processor, since Python reads each example's padding, and every read waits for an accelerator.
            real = _real_spans(inputs, name, mask.cpu(), n)
            spans |= dict.fromkeys(_entries_to_cut(inputs, name, mask.shape[1], encoder_decoder), real)
    examples = [_example(inputs, i, n, listed, spans) for i in range(n)]
    together: dict[tuple, list[int]] = {}
    for index, (batched, constant) in enumerate(examples):
        shapes = tuple((key, value.dtype, value.shape[1:]) for key, value in batched.items())
        contents = tuple((key, _content(value)) for key, value in constant.items())
        together.setdefault((shapes, contents), []).append(index)
    return [
        Group(
            indices,
            {key: torch.cat([examples[i][0][key] for i in indices]) for key in examples[indices[0]][0]},
            examples[indices[0]][1],
            listed,
        )
        for indices in together.values()
    ]


def _by_example(key: str, value: Any, n: int) -> bool:
    """Whether an entry that is not a tensor holds one element for each example: a list, tuple or array of length n.

    Raises:
        ValueError: the entry cannot be split into examples: an array of another length, a table, a set, tensors
            or arrays of n rows inside of a list or mapping.
    """
    is_array = isinstance(value, np.ndarray)
    if isinstance(value, str | bytes) or not isinstance(value, Sized) or (is_array and not value.ndim):
        return False
    inner = [t for t in tree_leaves(value) if isinstance(t, Tensor | np.ndarray) and t.ndim and t is not value]
    is_list = is_array or isinstance(value, list | tuple | range)
    rows = is_list and len(value) == n
    if any(len(t) == n > 1 for t in inner) or (inner and not rows):
        raise ValueError(
            f"inputs[{key!r}] holds tensors or arrays inside of a {type(value).__name__}, and it is not known which "
            "of them belongs to which example: give each as an entry of its own"
        )
    if is_array and len(value) not in (1, n):
        raise ValueError(
            f"inputs[{key!r}] is an array of {len(value)} rows, and there are {n} examples: give one row an example, "
            "or a list if all examples share it"
        )
    # A mapping of settings holds nothing that could be one element for each example.
    settings = isinstance(value, Mapping) and not any(
        isinstance(v, Sized) and not isinstance(v, str | bytes) and len(v) == n for v in value.values()
    )
    if not is_list and not settings:
        raise ValueError(
            f"inputs[{key!r}] is a {type(value).__name__}, which cannot be split into examples: give a tensor, an array"
            " or a list"
        )
    return rows


def _example(
    inputs: Mapping[str, Any], i: int, n: int, listed: frozenset[str], spans: Mapping[str, list[slice]]
) -> tuple[dict, dict]:
    """The batched and the constant entries of example ``i``; those in ``spans`` are cut."""
    batched, constant = {}, {}
    for key, value in inputs.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            own = value[i : i + 1] if key in listed else value
            constant[key] = list(own) if isinstance(own, range) else own
            continue
        row = value[i : i + 1] if len(value) == n else value
        row = row[:, spans[key][i]] if key in spans else row
        (constant if key.endswith(ENCODER_MASK) else batched)[key] = row
    return batched, constant


def _holds_tokens(key: str, value: Tensor, width: int) -> bool | None:
    """Whether an entry has one column for each of ``width`` tokens; None if its name does not tell."""
    name = key.removeprefix("decoder_")
    fits = value.ndim >= 2 and value.shape[1] == width
    if value.ndim < 2 or name.startswith(_NOT_TOKENS):
        return False
    if name.endswith(ENCODER_MASK) or name == "input_values":
        return fits and value.ndim == 2
    if name == "labels":
        return fits and value.ndim == 2 and not value.is_floating_point()
    return fits if name in TOKENS else None


def _entries_to_cut(inputs: Mapping[str, Any], mask: str, width: int, encoder_decoder: bool) -> list[str]:
    """The names of the mask and of the entries that hold its tokens, which can be cut to the real tokens.

    Empty if no other entry holds tokens, or if some entry on the mask's side may or may not hold them.
    """
    holds = {}
    for key, value in inputs.items():
        of_decoder = key.startswith("decoder_") or (encoder_decoder and key == "labels")
        if isinstance(value, Tensor) and value.ndim and of_decoder == (mask == DECODER_MASK):
            holds[key] = _holds_tokens(key, value, width)
    entries = [key for key in holds if holds[key]]
    other = any(not key.endswith(ENCODER_MASK) and key != "labels" for key in entries)
    return entries if other and None not in holds.values() else []


def _real_spans(inputs: Mapping[str, Any], name: str, mask: Tensor, n: int) -> list[slice]:
    """Slices from the first to the last real token of each example, by the 2-D mask of this name."""
    tokens = inputs.get("decoder_input_ids" if name == DECODER_MASK else "input_ids")
    if isinstance(tokens, Tensor) and tokens.shape[1:2] != mask.shape[1:2]:
        raise ValueError(f"{name} {tuple(mask.shape)} does not fit the token ids {tuple(tokens.shape)}")
    spans = []
    for i in range(n):
        row = mask[i if len(mask) > 1 else 0]
        if not ((row == 0) | (row == 1)).all():
            raise ValueError(f"a 2-D {name} must hold zeros and ones; example {i} holds {row.unique().tolist()[:4]}")
        real = row.nonzero()
        if len(real) == 0:
            raise ValueError(f"example {i} has no real token: its {name} is zero everywhere")
        spans.append(slice(int(real[0]), int(real[-1]) + 1))
    return spans


def _content(value: Any) -> Any:
    """A hashable key of a constant: the content of tensors, arrays, lists and numbers; other objects' identity."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, tuple(value.flatten().tolist())
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, tuple(map(_content, value.flatten().tolist()))
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_content, value))
    return (type(value), value) if isinstance(value, str | bytes | int | float | complex) else id(value)


def tiles(groups: Sequence[Group], size: int) -> list[list[Group]]:
    """Cut groups into tiles of at most ``size`` examples; the last one may be smaller."""
    result: list[list[Group]] = []
    room = 0
    for group in groups:
        start = 0
        while start < len(group.indices):
            if room == 0:
                result.append([])
                room = size
            stop = min(start + room, len(group.indices))
            result[-1].append(group.take(slice(start, stop)))
            room -= stop - start
            start = stop
    return result


def one_by_one(groups: Sequence[Group]) -> list[Group]:
    """Groups of one example each, in the order of the batch."""
    return sorted((one for (one,) in tiles(groups, 1)), key=lambda one: one.indices)


# Entries that can be padded on the right, and the values to pad with (None for the padding token).
_FILL = {"input_ids": None, "token_type_ids": 0, "position_ids": 0}


def padding_token(model: Any) -> int | None:
    """The padding token id of a Hugging Face encoder or decoder; None for other models, or without one."""
    config = getattr(model, "config", None)
    padding = getattr(config, "pad_token_id", None)
    known = isinstance(padding, int) and padding >= 0 and not getattr(config, "is_encoder_decoder", False)
    return padding if known else None


def pad_together(groups: Sequence[Group], padding: int, *, overhead: float = float("inf")) -> list[Group]:
    """Join groups of different lengths by padding on the right, so that fewer, larger batches run.

    Args:
        groups: as :func:`group_examples` returns them.
        padding: token id to fill with.
        overhead: fixed cost of a batch, in tokens. The groups are joined at the least total cost; with an infinite
            overhead, into as few batches as possible.

    Returns:
        Groups whose mask is batched where lengths differ. Groups with other entries than token ids, or with zeros
        between ones in their mask, are returned unchanged.
    """
    plain = [g for g in groups if _is_plain(g)]
    kinds: dict[tuple, list[Group]] = {}
    for g in plain:
        kinds.setdefault((tuple(g.batched), tuple(v.dtype for v in g.batched.values())), []).append(g)
    joined = [batch for same in kinds.values() for batch in _join(same, padding, overhead)]
    return joined + [g for g in groups if not _is_plain(g)]


def _is_plain(group: Group) -> bool:
    mask = group.constant.get(ENCODER_MASK)
    whole = isinstance(mask, Tensor) and mask.ndim == 2 and len(group.constant) == 1 and bool(mask.all())
    fits = all(key in _FILL and value.ndim == 2 for key, value in group.batched.items())
    return whole and fits and "input_ids" in group.batched


def _join(groups: list[Group], padding: int, overhead: float) -> list[Group]:
    """Join groups of similar length at the least cost: cost(k) = min_j cost(j) + cost of a batch of groups j..k-1."""
    ordered = sorted(groups, key=lambda g: g.batched["input_ids"].shape[1])
    lengths = [g.batched["input_ids"].shape[1] for g in ordered]
    sizes = [len(g.indices) for g in ordered]
    unit = 1e12 if overhead == float("inf") else overhead
    best: list[tuple[float, int]] = [(0.0, 0)]
    for stop in range(1, len(ordered) + 1):
        options = []
        count = 0
        for start in reversed(range(stop)):
            count += sizes[start]
            options.append((best[start][0] + unit + count * lengths[stop - 1], start))
        best.append(min(options))
    cuts = [len(ordered)]
    while cuts[-1] > 0:
        cuts.append(best[cuts[-1]][1])
    return [_padded(ordered[start:stop], padding) for stop, start in pairwise(cuts)]


def _padded(groups: list[Group], padding: int) -> Group:
    if len(groups) == 1:
        return groups[0]

    def joined(tensors: Iterable[Tensor], value: int) -> Tensor:
        return pad_sequence([row for t in tensors for row in t], batch_first=True, padding_value=value)

    batched = {
        key: joined((g.batched[key] for g in groups), padding if fill is None else fill)
        for key, fill in _FILL.items()
        if key in groups[0].batched
    }
    batched[ENCODER_MASK] = joined((g.constant[ENCODER_MASK].expand(len(g.indices), -1) for g in groups), 0)
    return Group([i for g in groups for i in g.indices], batched, {})
