"""Recurrent layers, step by step, so that one pass leaves the gradients of all steps.

torch computes a whole layer in one operation, whose gradients at the steps nothing shows. Here the products with the
inputs are taken for all steps at once, and the recurrence runs step by step as it is defined:

    LSTM: a = U x + b + W h, c' = f c + i g, h' = o tanh(c'), with i, f, o = sigmoid(a), g = tanh(a)
    GRU:  r, z = sigmoid(U x + b + W h + d), n = tanh(U x + b + r (W h + d)), h' = (1 - z) n + z h
    RNN:  h' = tanh or relu(U x + b + W h)

and with a projection h' = P (o tanh(c')). The gradients at the terms of these sums, over all steps, are those at the
outputs of matrix products whose inputs are x, h and o tanh(c'): the steps are tokens.

Cost: the multiplications of torch's own operation, and about ten small operations for each step.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ntk.features import Dense, Outer, formed
from ntk.structured.dependence import Dependence
from ntk.structured.independence import Independence
from ntk.structured.rule import Unsuitable, Uses
from ntk.structured.rules import summed
from ntk.tokens import Gradients

Record = Callable[[Uses, Tensor], Tensor]
"""Records uses whose gradients arrive at a tensor ``(n m, t, d)``, and returns the tensor to go on with."""

State = tuple[Tensor, ...]
"""h, and for an LSTM c, each ``(n m, h)``."""

LAYERS = {torch.lstm: "lstm", torch.gru: "gru", torch.rnn_tanh: "tanh", torch.rnn_relu: "relu"}
CELLS = {torch.lstm_cell: "lstm", torch.gru_cell: "gru", torch.rnn_tanh_cell: "tanh", torch.rnn_relu_cell: "relu"}


@dataclass
class _Weights:
    """The weights of one layer in one direction; biases and the projection may be missing."""

    inputs: Tensor
    states: Tensor
    input_bias: Tensor | None = None
    state_bias: Tensor | None = None
    projection: Tensor | None = None

    @property
    def detached(self) -> "_Weights":
        """The same without gradients."""
        return _Weights(*(None if w is None else w.detach() for w in vars(self).values()))  # pyright: ignore[reportArgumentType]


@dataclass
class _Steps:
    """What the steps were given and made, ``(n m, ...)`` each.

    Attributes:
        before: h before each step.
        after: h after it.
        unprojected: o tanh(c') of it.
    """

    before: list[Tensor] = field(default_factory=list)
    after: list[Tensor] = field(default_factory=list)
    unprojected: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Unrolled:
    """Calls recurrent layers and cells step by step.

    Attributes:
        dependence: what the tensors of the pass depend on.
        record: records the uses of weights.
        proof: follows the examples; None if there is one example, or if that has been shown before.
    """

    dependence: Dependence
    record: Record
    proof: Independence | None

    def __call__(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """What a function of `LAYERS` or `CELLS` returns.

        Raises:
            Unsuitable: before anything is recorded; the call is not of a form that is known here.
        """
        if kwargs:
            raise Unsuitable("its options are given by name")
        return self._cell(func, *args) if func in CELLS else self._layers(func, args)

    def _cell(self, func: Any, x: Tensor, before: Any, inputs: Tensor, states: Tensor, *biases: Tensor | None) -> Any:
        """One step of one layer."""
        given = _states(before)
        self._check(x[:, None], given)
        _, after = self._direction(CELLS[func], x[:, None], given, _Weights(inputs, states, *biases))
        return after if func is torch.lstm_cell else after[0]

    def _layers(self, func: Any, args: tuple) -> Any:
        """All layers in all directions."""
        packed = isinstance(args[3], (tuple, list))
        if packed:
            x, sizes, before, flat, biased, layers, dropout, train, both = args
            if self.dependence.n > 1 or bool((sizes != 1).any()):
                raise Unsuitable("packed sequences run one at a time")
            x, first = x[None], True
        else:
            x, before, flat, biased, layers, dropout, train, both, first = args
            x = x if first else x.transpose(0, 1)
        if train and dropout:
            raise Unsuitable("it draws random numbers")
        states = _states(before)
        self._check(x, states)
        found: list[State] = []
        for weights in _by_layer(flat, layers, biased, 2 if both else 1):
            sides = []
            for backwards, own in enumerate(weights):
                given = tuple(s[len(found)] for s in states)
                y, after = self._direction(LAYERS[func], x.flip(1) if backwards else x, given, own)
                sides.append(y.flip(1) if backwards else y)
                found.append(after)
            x = torch.cat(sides, dim=-1) if both else sides[0]
        y = x[0] if packed else x if first else x.transpose(0, 1)
        return y, *(torch.stack(each) for each in zip(*found))

    def _check(self, x: Tensor, states: State) -> None:
        ordered = self.proof is None or self.proof.why is not None or self.proof.in_order(x)
        if x.ndim != 3 or len(x) % self.dependence.n or not ordered:
            raise Unsuitable("its batch is not that of the examples")
        if any(self.dependence.is_derived(s) for s in (x, *states)):
            raise Unsuitable("its first state, or its input, depends on parameters alone")

    def _direction(self, kind: str, x: Tensor, state: State, weights: _Weights) -> tuple[Tensor, State]:
        """h after each step ``(n m, t, h)``, and the last state, of one layer in one direction."""
        steps, own = _Steps(), weights.detached
        bias = own.input_bias
        if kind != "gru" and bias is not None and own.state_bias is not None:
            bias = bias + own.state_bias
        terms = F.linear(x, own.inputs, bias)
        terms = self.record(self._affine(weights.inputs, weights.input_bias, lambda: x), terms)
        of_states = self._affine(weights.states, weights.state_bias, lambda: torch.stack(steps.before, dim=1))
        late = shifts = None
        if kind == "gru":
            late = self.record(of_states, _repeated(own.state_bias, terms, terms.shape[2]))
        else:
            terms = self.record(of_states, terms)
        if weights.projection is not None:
            of_projection = self._affine(weights.projection, None, lambda: torch.stack(steps.unprojected, dim=1))
            shifts = self.record(of_projection, _repeated(None, terms, len(weights.projection)))
        aside = nullcontext(lambda t: None) if self.proof is None else self.proof.aside([terms, *state])
        with aside as made:
            state = _run(kind, terms, late, shifts, state, own, steps)
            y = torch.stack(steps.after, dim=1)
            for t in (y, *state):
                made(t)
        return y, state

    def _affine(self, weight: Tensor, bias: Tensor | None, inputs: Callable[[], Tensor]) -> Uses:
        """The uses of a matrix and a bias; the matrix multiplies what ``inputs`` returns, ``(n m, t, d)``."""

        def outer(g: Gradients) -> Outer:
            return Outer(g.inputs(inputs().detach()), g.packed, g.tokens)

        def dense(g: Gradients) -> Dense:
            return formed(outer(g), weight.shape)

        uses: Uses = []
        if self.dependence.is_derived(weight):
            uses.append((weight, outer if self.dependence.is_parameter(weight) else dense))
        if bias is not None and self.dependence.is_derived(bias):
            uses.append((bias, partial(summed, bias.shape)))
        return uses


def _states(before: Any) -> State:
    return tuple(before) if isinstance(before, (tuple, list)) else (before,)


def _by_layer(flat: Sequence[Tensor], layers: int, biased: bool, directions: int) -> list[list[_Weights]]:
    """The weights of each layer, in each direction."""
    each = len(flat) // (layers * directions)
    found = []
    for i in range(0, len(flat), each):
        inputs, states, *others = flat[i : i + each]
        biases, projection = (others[:2], others[2:]) if biased else ([None, None], others)
        found.append(_Weights(inputs, states, biases[0], biases[1], projection[0] if projection else None))
    return [found[i : i + directions] for i in range(0, len(found), directions)]


def _repeated(vector: Tensor | None, like: Tensor, width: int) -> Tensor:
    """A vector, or zeros, for each step ``(n m, t, width)``."""
    zeros = like.new_zeros(*like.shape[:2], width)
    return zeros if vector is None else zeros + vector


def _run(
    kind: str, terms: Tensor, late: Tensor | None, shifts: Tensor | None, state: State, weights: _Weights, steps: _Steps
) -> State:
    """Take all steps, from the terms of the inputs ``(n m, t, d)``, and return the last state."""
    matrix, projection = weights.states.T, weights.projection
    late_terms = () if late is None else late.unbind(1)
    shift = () if shifts is None else shifts.unbind(1)
    for i, term in enumerate(terms.unbind(1)):
        steps.before.append(state[0].detach())
        if kind == "lstm":
            gates = torch.addmm(term, state[0], matrix)
            entry, forget, _, leaving = gates.sigmoid().chunk(4, dim=1)
            memory = forget * state[1] + entry * gates.chunk(4, dim=1)[2].tanh()
            h = leaving * memory.tanh()
            if projection is not None:
                steps.unprojected.append(h.detach())
                h = torch.addmm(shift[i], h, projection.T)
            state = h, memory
        elif kind == "gru":
            r, z, new = term.chunk(3, dim=1)
            late_r, late_z, late_new = torch.addmm(late_terms[i], state[0], matrix).chunk(3, dim=1)
            new = (new + (r + late_r).sigmoid() * late_new).tanh()
            state = (new + (z + late_z).sigmoid() * (state[0] - new),)
        else:
            state = (getattr(torch.addmm(term, state[0], matrix), kind)(),)
        steps.after.append(state[0])
    return state
