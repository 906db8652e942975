"""Lists of the tokens of a batch whose gradients are not zero, with the example of each token.

Padding has gradient zero, and so have most tokens in a classifier's last block. Such tokens add nothing to a feature,
so they are dropped as gradients arrive. All later steps work on N tokens of n examples, in the examples' order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tokens:
    """N tokens of n examples, in the examples' order.

    Attributes:
        n: number of examples.
        owner: the example that each token belongs to, ascending.
        positions: indices of these tokens among all tokens of the batch; None if they are all tokens.
    """

    n: int
    owner: Int[Tensor, "N"]
    positions: Int[Tensor, "N"] | None = None

    @cached_property
    def counts(self) -> list[int]:
        """Number of tokens of each example."""
        return torch.bincount(self.owner, minlength=self.n).tolist()

    @cached_property
    def most(self) -> int:
        """Number of tokens of the longest example, at least 1."""
        return max(1, *self.counts)

    @cached_property
    def equal(self) -> bool:
        """Whether all examples have the same number of tokens, at least one."""
        return min(self.counts) == self.most

    @cached_property
    def slots(self) -> Int[Tensor, "N"]:
        """The index of each token after padding every example to the longest."""
        starts = torch.tensor([0, *self.counts[:-1]], device=self.owner.device).cumsum(0)
        return torch.arange(len(self.owner), device=self.owner.device) + (self.owner * self.most - starts[self.owner])

    def one_hot(self, like: Tensor) -> Float[Tensor, "n N"]:
        """Matrix with 1 where a token belongs to an example and 0 elsewhere."""
        held = self.__dict__.setdefault("_one_hot", {})
        key = (like.dtype, like.device)
        if key not in held:
            numbers = torch.arange(self.n, device=self.owner.device)
            held[key] = (numbers[:, None] == self.owner).to(like.dtype)
        return held[key]

    def pick(self, values: Shaped[Tensor, "... T d"]) -> Shaped[Tensor, "... N d"]:
        """The values at these tokens, selected from values at all tokens of the batch."""
        return values if self.positions is None else values.index_select(-2, self.positions)

    def sums(self, values: Float[Tensor, "... N d"]) -> Float[Tensor, "... n d"]:
        """The sum over each example's tokens."""
        if self.equal:
            return values.unflatten(-2, (self.n, -1)).sum(dim=-2)
        return self.one_hot(values) @ values

    def padded(self, values: Shaped[Tensor, "... N d"]) -> Shaped[Tensor, "... n most d"]:
        """The values by example, padded with zeros after the tokens of shorter examples."""
        if self.equal:
            return values.unflatten(-2, (self.n, -1))
        room = values.new_zeros(*values.shape[:-2], self.n * self.most, values.shape[-1])
        return room.index_copy_(-2, self.slots, values).unflatten(-2, (self.n, -1))


def not_zero(g: Float[Tensor, "... d"]) -> Bool[Tensor, "T"]:
    """A mask of the tokens, along all axes except the last, that are not zero; NaN counts as not zero."""
    g = g.reshape(-1, g.shape[-1])
    if not g.numel():
        return torch.zeros(len(g), dtype=torch.bool, device=g.device)
    return (g.amax(dim=-1) != 0) | (g.amin(dim=-1) != 0)


class Packing:
    """Makes the :class:`Tokens` of a batch from masks.

    Equal masks give the same object, and values at these tokens are picked once from each tensor.
    """

    def __init__(self, n: int):
        """For a batch of n examples."""
        self.n = n
        self._patterns: dict[tuple[int, bytes], Tokens] = {}
        self._last: tuple[Tensor, Tokens, Tensor] | None = None

    def tokens(self, real: Bool[Tensor, "T"]) -> Tokens:
        """The tokens at which a mask of all T tokens is true."""
        pattern = (len(real), real.cpu().numpy().tobytes())
        if pattern not in self._patterns:
            owner = torch.arange(self.n, device=real.device).repeat_interleave(len(real) // self.n)
            positions = None if bool(real.all()) else real.nonzero().flatten()
            owner = owner if positions is None else owner[positions]
            self._patterns[pattern] = Tokens(self.n, owner, positions)
        return self._patterns[pattern]

    def inputs(self, x: Float[Tensor, "T s"], tokens: Tokens) -> Float[Tensor, "N s"]:
        """An operation's input at these tokens, kept for the next call, which often has the same input."""
        last = self._last
        if last is None or last[0].data_ptr() != x.data_ptr() or last[0].shape != x.shape or last[1] is not tokens:
            last = self._last = (x, tokens, tokens.pick(x))
        return last[2]


class Gradients:
    """The gradients of all network outputs at one operation's output ``(n m, ...)``, in the layouts that rules use."""

    def __init__(
        self, by_output: Mapping[int, Tensor], c: int, packing: Packing, real: Mapping[int, Tensor] | None = None
    ):
        """Take the gradients ``(n m, ...)``, at least one, by the index of their output; the others are zero.

        ``real`` holds masks of the tokens that are not zero, for the outputs for which they are known.
        """
        self._by_output, self._c, self._packing, self._real = by_output, c, packing, real or {}
        like = next(iter(by_output.values()))
        self.n, self.shape = packing.n, like.shape
        self.dtype = torch.promote_types(like.dtype, torch.float32)

    @cached_property
    def whole(self) -> Float[Tensor, "n c m ..."]:
        """All gradients, zeros included, with the axes of the batch."""
        like = next(iter(self._by_output.values()))
        shape = self.n, self._c, self.shape[0] // self.n, *self.shape[1:]
        value = torch.empty(shape, dtype=self.dtype, device=like.device)
        for a in range(self._c):
            g = self._by_output.get(a)
            value[:, a] = 0 if g is None else g.unflatten(0, (self.n, -1))
        return value

    @cached_property
    def tokens(self) -> Tokens:
        """The tokens, indices of all axes except the last, at which any gradient is not zero."""
        masks = (self._real[a] if a in self._real else not_zero(g) for a, g in self._by_output.items())
        return self._packing.tokens(reduce(torch.logical_or, masks))

    @cached_property
    def packed(self) -> Float[Tensor, "c N r"]:
        """All gradients at ``tokens``."""
        like, positions = next(iter(self._by_output.values())), self.tokens.positions
        value = like.new_empty(self._c, len(self.tokens.owner), self.shape[-1], dtype=self.dtype)
        for a in range(self._c):
            g = self._by_output.get(a)
            if g is None:
                value[a] = 0
            elif positions is None or g.dtype != self.dtype:
                value[a] = self.tokens.pick(g.reshape(-1, self.shape[-1]))
            else:
                torch.index_select(g.reshape(-1, self.shape[-1]), 0, positions, out=value[a])
        return value

    def inputs(self, x: Tensor) -> Float[Tensor, "N s"]:
        """The operation's input or output ``(n m, ..., s)`` at ``tokens``."""
        return self._packing.inputs(x.reshape(-1, x.shape[-1]), self.tokens)
