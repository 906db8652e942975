"""Forward and backward passes of one batch under capture, over the whole model or a segment of it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntk.features import Dense, Lookup, Outer
from ntk.functional import Leaves, batch_of, call
from ntk.inputs import ENCODER_MASK, Group
from ntk.request import Request
from ntk.structured.calls import BiasReads, watched
from ntk.structured.capture import WHOLE, Capture, Segment, SegmentEnd
from ntk.structured.dependence import Captured, Origin, Use
from ntk.structured.independence import Independence, follows_torch
from ntk.structured.targets import WatchedLayers
from ntk.tokens import Packing


@dataclass
class Pass:
    """What the forward and backward passes of one batch over one segment leave.

    Attributes:
        leaves: the parameters that were captured.
        capture: what was recorded.
        values: the outputs ``(n, c)``; None for all segments except the last.
        missed: parameter -> why its features are not all there.
        below: where the segment's incoming activations were made -> their gradients ``(c, ...)``.
        mixing: why the examples may have changed one another's outputs or gradients; None if they have not, and for
            all segments except the last, since the forward pass is the same.
        reads: the values of attention masks that the forward pass read.
    """

    leaves: Leaves
    capture: Capture
    values: Tensor | None
    missed: dict[str, str]
    below: dict[Origin, Tensor]
    mixing: str | None
    reads: tuple[Any, ...]

    def features(self) -> Iterator[Captured]:
        """Yield each feature of the segment's uses once, and free it."""
        c, uses, packing = self.capture.outputs, self.capture.uses, Packing(self.capture.dependence.n)
        while uses:
            for captured in _features(uses.pop(), self.leaves, c, packing):
                if captured.name not in self.missed:
                    yield captured


def run(
    request: Request,
    leaves: Leaves,
    group: Group,
    layers: WatchedLayers,
    segment: Segment = WHOLE,
    above: dict[Origin, Tensor] | None = None,
    observe: Callable[[Capture], AbstractContextManager] | None = None,
    *,
    prove: bool = True,
) -> Pass:
    """Run the passes of one batch, and capture the mixing operations of a segment.

    The calls of ``layers`` are watched, and their outputs held for adapters beside them. All segments except the last
    need ``above``, the gradients ``(c, ...)`` at the cut with the next one. ``observe`` makes a context for the forward
    pass from its capture. A pass that repeats one in which the examples were shown not to change one another does not
    need to ``prove`` it again.
    """
    n = len(group.indices)
    proof = Independence(n) if prove and n > 1 and above is None else None
    outputs = next(iter(above.values())).shape[0] if above else 0
    capture = Capture(
        leaves, n, outputs=outputs, segment=segment, keep=frozenset(above or ()), keep_outputs=bool(layers), proof=proof
    )
    batch = capture.mark(batch_of(group))
    if proof is not None:
        for key in group.batched:
            proof.mark(batch[key], mask=key.endswith(ENCODER_MASK))
    with torch.enable_grad():
        observed = nullcontext() if observe is None else observe(capture)
        biases = BiasReads(capture, layers)
        with observed, watched(capture, layers), capture, biases if layers else nullcontext(), proof or nullcontext():
            try:
                values = call(request.model, request.output, batch, n)
            except SegmentEnd:
                values = None
        mixing, reads = None, ()
        if proof is not None and values is not None:
            mixing, reads = proof.why, tuple(proof.reads)
            if mixing is None and not proof.in_order(values):
                mixing = "its forward pass may mix the examples of a batch"
            elif mixing is None and not follows_torch(values):
                mixing = "its backward pass is partly its own, and may mix the examples of a batch"
        missed = capture.unhandled | {layers[name][1]: BiasReads.WHY for name in biases.layers}
        if above is None:
            assert values is not None
            capture.outputs = values.shape[1]
            ends = [([values[:, a].sum()], [None]) for a in range(capture.outputs) if values.requires_grad]
            below = {}
        else:
            if len(capture.kept) < len(above):
                raise NotImplementedError("the forward pass does not repeat itself")
            kept = {origin: t for origin, t in capture.kept.items() if t.requires_grad}
            ends = [
                (list(kept.values()), [above[origin][a] for origin in kept]) for a in range(capture.outputs) if kept
            ]
            # What was made before the segment and is used after it hands its gradient on.
            below = {origin: g.clone() for origin, g in above.items() if origin not in kept}
        values = None if values is None else values.detach()
        _backward(capture, leaves, ends, missed, below)
    capture.roots.clear()
    capture.kept.clear()
    return Pass(leaves, capture, values, missed, below, mixing or _leaking(capture, group), reads)


def _backward(
    capture: Capture,
    leaves: Leaves,
    ends: list[tuple[list[Tensor], list[Any]]],
    missed: dict[str, str],
    below: dict[Origin, Tensor],
) -> None:
    """Run one backward pass for each output; add to what was missed, and to the gradients below."""
    targets = [*leaves.values(), *capture.cut.values(), *capture.roots]
    for a, (tensors, gradients) in enumerate(ends):
        capture.output = a
        again = a + 1 < len(ends)
        received = torch.autograd.grad(tensors, targets, gradients, retain_graph=again, allow_unused=True)
        for name, gradient in zip(leaves, received):
            if gradient is not None and bool((gradient != 0).any()):
                missed.setdefault(name, "a gradient reached it by a way that was not captured")
        for origin, gradient in zip(capture.cut, received[len(leaves) :]):
            if gradient is not None:
                if origin not in below:
                    below[origin] = gradient.new_zeros(capture.outputs, *gradient.shape)
                below[origin][a] += gradient


def _features(use: Use, leaves: Leaves, c: int, packing: Packing) -> Iterator[Captured]:
    """The features that a use left; the feature of a derived tensor is pulled back to its parameters."""
    gradients = use.received.all(c, packing) if use.received else None
    if gradients is None:
        return
    feature = use.feature(gradients)
    use.received = None
    if use.derived is None:
        output = None
        if use.output is not None and use.output._version == use.version and isinstance(feature, (Outer, Lookup)):
            output = gradients.tokens.pick(use.output.reshape(-1, use.output.shape[-1]))
        yield Captured(next(iter(use.names)), use, feature, output)
        return
    assert isinstance(feature, Dense)
    names = sorted(use.names)
    values = feature.value.flatten(0, 1)
    pulled = torch.autograd.grad(
        use.derived, [leaves[name] for name in names], values.to(use.derived.dtype),
        is_grads_batched=True, retain_graph=True, allow_unused=True,
    )  # fmt: skip
    for name, value in zip(names, pulled, strict=True):
        if value is not None:
            yield Captured(name, use, Dense(value.unflatten(0, (packing.n, c))))


def _leaking(capture: Capture, group: Group) -> str | None:
    """Why the outputs may depend on padding: a gradient arrives at a padding token."""
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
