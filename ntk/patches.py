"""The tangent feature of a convolution's kernel: positions are tokens, and the patches of the input are their inputs.

For a convolution, y[r, t] = sum_{s, k} W[r, s, k] x[s, stride t + dilation k - padding], so that the feature of the
network's output a is sum_t g[a, r, t] patch[t, (s, k)] with g the gradients at y: a sum of outer products, as for a
linear layer. A transposed convolution exchanges the sides, sum_t x[r, t] patch_of_g[t, (s, k)]. The *narrow* side has
one vector for each position, the *wide* one a patch. Patches hold every number up to K times, for K entries of the
kernel along the positions, and are therefore made a few examples or positions at a time, whenever they are multiplied.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from ntk.tokens import Tokens

# Numbers in the patches that are made at once: few enough for a processor's caches.
_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Geometry:
    """Where a kernel lies on its input; one number for each of the d axes of positions.

    Attributes:
        kernel: entries of the kernel.
        stride: from one position to the next.
        dilation: from one entry of the kernel to the next.
        before: zeros before the input.
        after: zeros after it.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def axes(self) -> int:
        """The number d of axes of positions."""
        return len(self.kernel)

    def padded(self, x: Tensor) -> Tensor:
        """The input ``(..., *size)`` with its zeros, contiguous."""
        border = [side for pair in zip(self.before[::-1], self.after[::-1]) for side in pair]
        return F.pad(x, border).contiguous()

    def patches(self, x: Tensor, positions: tuple[int, ...], first: int = 0) -> Tensor:
        """Patches ``(n, C K, m T)`` of a padded, contiguous input ``(n, m, C, *size)``, at T positions.

        ``positions`` are the numbers of positions along each axis, of which those along the first start at ``first``.
        """
        n, m, channels, *_ = x.shape
        of_n, of_m, of_channel, *steps = x.stride()
        shape = n, channels, *self.kernel, m, *positions
        inside = [step * d for step, d in zip(steps, self.dilation)]
        between = [step * s for step, s in zip(steps, self.stride)]
        strides = of_n, of_channel, *inside, of_m, *between
        view = x.as_strided(shape, strides, x.storage_offset() + first * between[0])
        return view.reshape(n, channels * prod(self.kernel), m * prod(positions))


@dataclass(frozen=True)
class Patches:
    """The feature of a convolution's kernel, one group.

    Attributes:
        x: ``(n, m, C, *size)``, the inputs; m is the number of inputs of one example.
        g: ``(n, c, m, R, *size')``, the gradients at the outputs.
        geometry: of the kernel on the wide side.
        transposed: whether the convolution is a transposed one: the wide side is then g and not x.
        by_channel: whether the channels of the wide side take the place of the parameter's rows, with entries in an
            order of their own. A slice of them takes a slice of the patches, while every slice of the rows would need
            all patches again.
        most: numbers in the patches that are made at once, if fewer than would be fast.
    """

    x: Tensor
    g: Tensor
    geometry: Geometry
    transposed: bool = False
    by_channel: bool = False
    most: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(n, c)."""
        return self.g.shape[0], self.g.shape[1]

    @property
    def like(self) -> Tensor:
        """A tensor of this dtype and device."""
        return self.g

    @property
    def positions(self) -> tuple[int, ...]:
        """The numbers of positions of one input along each axis."""
        return tuple((self.x if self.transposed else self.g).shape[-self.geometry.axes :])

    @property
    def channels(self) -> int:
        """C, of the wide side."""
        return (self.g if self.transposed else self.x).shape[-self.geometry.axes - 1]

    @property
    def narrow_channels(self) -> int:
        """R, of the narrow side."""
        return (self.x if self.transposed else self.g).shape[-self.geometry.axes - 1]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(N, r, s), with N positions of all examples, the size r of a gradient and s of an input."""
        tokens, patch = self.x.shape[:2].numel() * prod(self.positions), self.channels * prod(self.geometry.kernel)
        r, s = (patch, self.narrow_channels) if self.transposed else (self.narrow_channels, patch)
        return tokens, r, s

    @cached_property
    def tokens(self) -> Tokens:
        """The example of each position."""
        n, each = len(self.x), self.x.shape[1] * prod(self.positions)
        return Tokens(n, torch.arange(n, device=self.g.device).repeat_interleave(each))

    def of(self, outputs: slice) -> "Patches":
        """The feature of some of the outputs."""
        return replace(self, g=self.g[:, outputs])

    def write(self, rows: slice, out: Tensor, *, add: bool = False) -> None:
        """Put the rows of the feature into ``out``, ``(n, c, rows, width)``, or add them to it."""
        if self.by_channel:
            n, c = self.shape
            self._fill(slice(0, self.narrow_channels), rows, out.view(n, c, self.narrow_channels, -1), add)
        else:
            self._fill(rows, slice(0, self.channels), out, add)

    def write_groups(self, groups: int, out: Tensor) -> None:
        """Put the features of a convolution in groups into ``out``, ``(n, c, groups, R / groups, C K / groups)``."""
        for examples, first, narrow, wide in self._products(slice(0, self.channels)):
            left, right = narrow.unflatten(2, (groups, -1)), wide.unflatten(2, (groups, -1))
            if self.transposed:
                product = left @ right.mT
            else:
                rows = left.transpose(1, 2).flatten(2, 3) @ right[:, 0].mT
                product = rows.unflatten(2, (out.shape[1], -1)).transpose(1, 2)
            out[examples] = product if first == 0 else out[examples] + product

    def _fill(self, rows: slice, channels: slice, out: Tensor, add: bool) -> None:
        """Put some rows of the narrow side times some channels of the wide one into ``(n, c, rows, channels K)``."""
        for examples, first, narrow, wide in self._products(channels):
            left, target, beta = narrow[..., rows, :], out[examples], int(add or first > 0)
            if self.transposed:  # one output after the other
                for a in range(out.shape[1]):
                    torch.baddbmm(target[:, a], left[:, 0], wide[:, a].mT, beta=beta, out=target[:, a])
            else:
                whole = target.flatten(1, 2)
                torch.baddbmm(whole, left.flatten(1, 2), wide[:, 0].mT, beta=beta, out=whole)

    def active_rows(self, count: int) -> Tensor:
        """A mask ``(count,)`` of the rows that are not zero for every example."""
        side = self.g if self.transposed == self.by_channel else self.x
        return (side != 0).movedim(-self.geometry.axes - 1, 0).flatten(1).any(dim=1)

    def between(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Tokens start..stop-1: inputs ``(N, s)`` and gradients ``(c, N, r)``, one of them patches."""
        each = self.x.shape[1] * prod(self.positions)
        first, last = start // each, -(-stop // each)
        part = replace(self, x=self.x[first:last], g=self.g[first:last])
        _, _, *sides = zip(*part._products(slice(0, self.channels), cut=False))
        narrow, wide = map(torch.cat, sides)
        x, g = (narrow, wide) if self.transposed else (wide, narrow)
        inside = slice(start - first * each, stop - first * each)
        return x.mT.flatten(0, 2)[inside], g.mT.transpose(0, 1).flatten(1, 2)[:, inside]

    def summed(self, weights: Tensor) -> "Patches":
        """The feature of one output, the sum of the outputs with these weights ``(n, c)``."""
        return replace(self, g=torch.einsum("nc...,nc->n...", self.g, weights.to(self.g.dtype))[:, None])

    def _products(self, channels: slice, *, cut: bool = True) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
        """Yield examples, a first position, the narrow side ``(n, 1 or c, R, T)`` and the wide one, channels K for R.

        Their products over T, added up over what is yielded for the same examples, are the feature. Without ``cut``,
        all positions of an example come together.
        """
        inputs = self.x[:, None].to(self.g.dtype)
        wide, narrow = (self.g, inputs) if self.transposed else (inputs, self.g)
        wide = wide[:, :, :, channels]
        n, heads, m, count = wide.shape[:4]
        positions = self.positions
        at_once = min(_AT_ONCE, self.most or _AT_ONCE)
        each = max(1, heads * m * count * prod(self.geometry.kernel) * prod(positions))
        size = max(1, at_once // each)
        step = max(1, positions[0] * at_once // each) if cut else positions[0]
        for i in range(0, n, size):
            examples = slice(i, min(i + size, n))
            padded = self.geometry.padded(wide[examples]).flatten(0, 1)
            for first in range(0, positions[0], step):
                some = min(step, positions[0] - first), *positions[1:]
                patches = self.geometry.patches(padded, some, first).unflatten(0, (-1, heads))
                yield examples, first, narrow[examples].narrow(4, first, some[0]).movedim(2, 3).flatten(3), patches
