"""Forward and backward passes of one batch under capture, over the whole model or a segment of it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ntk.functional import call, fresh
from ntk.inputs import ENCODER_MASK, Group
from ntk.outputs import Output
from ntk.structured.capture import Capture, Captured, Place, SegmentEnd, collect
from ntk.structured.independence import Independence, follows_torch

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
    """Forward and backward passes of one batch over one segment.

    Attributes:
        capture: what was recorded.
        values: the outputs ``(n, c)``; None for all but the last segment.
        missed: parameter -> why its features are not all there.
        below: where the segment's incoming activations were made -> their gradients ``(c, ...)``.
        mixing: why the examples may have changed one another's outputs or gradients; None if they have not, and for
            all but the last segment, since the forward pass is the same.
        reads: the values of attention masks that the forward pass read.
    """

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
        proof = Independence(n) if n > 1 and above is None else None
        self.capture = capture = Capture(
            leaves, n, outputs=outputs, segment=segment, keep=frozenset(above or ()), keep_outputs=keep_outputs,
            proof=proof,
        )  # fmt: skip
        batch = capture.mark(batch_of(group))
        if proof is not None:
            for key in group.batched:
                proof.mark(batch[key], mask=key.endswith(ENCODER_MASK))
        self.mixing: str | None = None
        self.reads: tuple[Any, ...] = ()
        with torch.enable_grad():
            with nullcontext() if observe is None else observe(capture), capture, proof or nullcontext():
                try:
                    values = call(model, output, batch, n)
                except SegmentEnd:
                    values = None
            self.values = None if values is None else values.detach()
            if proof is not None and values is not None:
                self.reads = tuple(proof.reads)
                self.mixing = proof.why or _mixed(proof, values)
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
        self.mixing = self.mixing or _leaking(capture, group)
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


def _mixed(proof: Independence, values: Tensor) -> str | None:
    """Why the outputs may depend on several examples."""
    if not proof.in_order(values):
        return "its forward pass may mix the examples of a batch"
    if not follows_torch(values):
        return "its backward pass is partly its own, and may mix the examples of a batch"
    return None


def _leaking(capture: Capture, group: Group) -> str | None:
    """Why padding may have a part in the outputs: a gradient at a token that is none of the example's own."""
    mask = group.batched.get(ENCODER_MASK)
    if mask is None or mask.ndim != 2:
        return None
    padding = (mask == 0).flatten()
    for use in capture.uses:
        if use.received is not None:
            for a, gradient in use.received.by_output.items():
                per_token = gradient.ndim == 3 and gradient.shape[:2] == mask.shape
                if per_token and bool((use.received.tokens(a) & padding).any()):
                    return "padding has a part in its outputs"
    return None


def batch_of(group: Group) -> dict[str, Any]:
    """The group as one batch, of fresh tensors: what is marked on them, or written to them, must not outlive the pass.

    Masks of the group, which are the same for all, get a row for each example.
    """
    return fresh(group.batched | group.repeated())


def alone(group: Group, position: int) -> Group:
    """One example of a group as a group of its own, without the padding that :func:`ntk.inputs.pad_together` added."""
    one = group.take(slice(position, position + 1))
    mask = one.batched.get(ENCODER_MASK)
    if mask is None:
        return one
    real = int(mask.sum())
    batched = {key: value[:, :real] for key, value in one.batched.items() if key != ENCODER_MASK}
    return Group(one.indices, batched, one.constant | {ENCODER_MASK: mask[:, :real]})


def length(group: Group) -> int:
    """Length of the group's examples, for estimates only."""
    return max((value.shape[1] for value in group.batched.values() if value.ndim > 1), default=1)
