"""Forward and backward passes of one batch under capture, over the whole model or a segment of it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ntk.capture import Capture, Captured, Place, SegmentEnd, collect
from ntk.functional import call, fresh
from ntk.inputs import Group
from ntk.outputs import Output

Segment = tuple[int, float]  # first mixing operation, and the first not in it
Leaves = dict[str, nn.Parameter]

WHOLE: Segment = (0, float("inf"))


@contextmanager
def requiring_gradients(model: nn.Module, names: Iterable[str]) -> Iterator[Leaves]:
    """The named parameters requiring gradients, and no other; restored afterwards."""
    everything = dict(model.named_parameters())
    before = {name: p.requires_grad for name, p in everything.items()}
    chosen = set(names)
    try:
        for name, p in everything.items():
            p.requires_grad_(name in chosen)
        yield {name: p for name, p in everything.items() if name in chosen}
    finally:
        for name, p in everything.items():
            p.requires_grad_(before[name])


class Pass:
    """Forward and backward passes of one batch over one segment."""

    def __init__(
        self,
        model: nn.Module,
        output: Output | None,
        leaves: Leaves,
        group: Group,
        segment: Segment = WHOLE,
        above: dict[Place, Tensor] | None = None,
        keep_outputs: bool = False,
        observe: Callable[[Capture], AbstractContextManager] | None = None,
    ):
        """Run them.

        Args:
            model: in evaluation mode.
            output: as in :func:`ntk.empirical_ntk`.
            leaves: the parameters to capture.
            group: the batch.
            segment: first mixing operation to record, and the first not to.
            above: for all but the last segment, the gradients ``(c, ...)`` at its cut with the next one.
            keep_outputs: whether to hold the outputs of the operations too.
            observe: makes a context for the forward pass from its capture.
        """
        n = len(group.indices)
        outputs = next(iter(above.values())).shape[0] if above else None
        self.capture = capture = Capture(
            leaves, n, outputs=outputs, segment=segment, keep=frozenset(above or ()), keep_outputs=keep_outputs
        )
        batch = capture.mark(batch_of(group))
        with torch.enable_grad():
            with nullcontext() if observe is None else observe(capture), capture:
                try:
                    values = call(model, output, batch, n)
                except SegmentEnd:
                    values = None
            self.missed = dict(capture.unhandled)
            kept: dict[Place, Tensor] = {}
            if above is None:
                assert values is not None
                capture.outputs = values.shape[1]
                ends = [([values[:, a].sum()], [None]) for a in range(capture.outputs) if values.requires_grad]
            else:
                if len(capture.kept) < len(above):
                    raise NotImplementedError("the forward pass does not repeat itself")
                kept = {place: t for place, t in capture.kept.items() if t.requires_grad}
                ends = [(list(kept.values()), [above[place][a] for place in kept]) for a in range(capture.outputs)]
            del values
            # What was made before the segment and is used after it hands its gradient on.
            passing = {} if above is None else {place: g for place, g in above.items() if place not in kept}
            self._backward(leaves, [end for end in ends if end[0]], passing)
        capture.roots.clear()
        capture.kept.clear()

    def _backward(
        self, leaves: Leaves, ends: list[tuple[list[Tensor], list[Any]]], passing: dict[Place, Tensor]
    ) -> None:
        capture = self.capture
        places = list(capture.cut)
        targets = [*capture.roots, *leaves.values(), *capture.cut.values()]
        self.below: dict[Place, Tensor] = {place: g.clone() for place, g in passing.items()}
        for a, (tensors, gradients) in enumerate(ends):
            capture.output = a
            found = torch.autograd.grad(
                tensors, targets, gradients, retain_graph=a + 1 < len(ends), allow_unused=True
            )[len(capture.roots) :]  # fmt: skip
            for name, gradient in zip(leaves, found, strict=False):
                if gradient is not None and bool((gradient != 0).any()):
                    self.missed.setdefault(name, "a gradient reached it by a way that was not captured")
            for place, gradient in zip(places, found[len(leaves) :], strict=True):
                if gradient is not None:
                    if place not in self.below:
                        self.below[place] = gradient.new_zeros(capture.outputs, *gradient.shape)
                    self.below[place][a] += gradient

    def features(self, leaves: Leaves) -> Iterator[Captured]:
        """The features of the segment's uses; they can be taken once."""
        for found in collect(self.capture.uses, leaves, self.capture.n, self.capture.outputs):
            if found.name not in self.missed:
                yield found


def batch_of(group: Group) -> dict[str, Any]:
    """The group as one batch, of fresh tensors: what is marked on them, or written to them, must not outlive the pass.

    Masks of the group, which are the same for all, get a row for each example.
    """
    return fresh(group.batched | group.repeated())


def length(group: Group) -> int:
    """Length of the group's examples, for estimates only."""
    return max((value.shape[1] for value in group.batched.values() if value.ndim > 1), default=1)
