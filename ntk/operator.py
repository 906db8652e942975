"""The tangent kernel as a linear operator: products with vectors, without the matrix."""

from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from ntk.dynamics.products import solved
from ntk.functional import ParameterChoice, Parameters, evaluation, fresh, nonfinite_cause, select_parameters, versions
from ntk.inputs import Inputs, batch_size, by_name
from ntk.outputs import Output
from ntk.reference import accumulation_dtype, at_least, gigabytes
from ntk.request import Request
from ntk.structured.memory import IN_PROGRESS
from ntk.structured.products import (
    Block,
    add_kernel_product,
    add_transposed_product,
    product,
    renumbered,
    squared_norms,
)
from ntk.structured.stages import COLUMNS, ROWS, FeatureBatch, Stage, gathered
from ntk.structured.work import warn_of_slow_parameters


class NTKOperator(LinearOperator):
    """The empirical tangent kernel ``(n1 c, n2 c)`` by its products with vectors, a scipy ``LinearOperator``.

        (K v)[i, a] = < d f_a(x_i)/d theta, sum_jb v[j, b] d f_b(x'_j)/d theta >

    Rows and columns are those of :func:`ntk.flatten`, in which outputs vary faster than examples. The features are
    those of :func:`ntk.empirical_ntk`, after the same checks, so a product is exact up to rounding. scipy's ``eigsh``,
    ``lobpcg`` and ``cg`` take the operator. It needs no forward-mode derivatives, which many models' attention lacks.

    | ``mode``     | keeps                        | a product runs                                         |
    |--------------|------------------------------|--------------------------------------------------------|
    | ``"held"``   | the features of all examples | no model: it multiplies the features                   |
    | ``"stream"`` | the model and the inputs     | the model's passes twice, batch by batch: for J^T V,   |
    |              |                              | and for J times it                                     |

    In both modes all batches run once at the start, to check them and for the diagonal. Blocks of vectors,
    ``operator @ V``, cost less a vector than one vector does.

    Attributes:
        n: number of examples of the rows and of the columns.
        outputs: c.
        mode: ``"held"`` or ``"stream"``.
        held: bytes of the features that are kept.

    Example:
        >>> model = torch.nn.Linear(3, 2, bias=False).double()
        >>> x = torch.eye(3, dtype=torch.float64)[:2]
        >>> K = NTKOperator(model, x)
        >>> K.shape, K.trace(), (K @ np.ones(4)).tolist()
        ((4, 4), 4.0, [1.0, 1.0, 1.0, 1.0])
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        inputs2: Inputs | None = None,
        *,
        params: ParameterChoice = "all",
        output: Output | None = None,
        mode: str = "held",
        memory_budget: int | float | None = None,
    ):
        """Compute and check the features of every example.

        Args:
            model: as in :func:`ntk.empirical_ntk`. With ``"stream"`` it must not change while the operator is in use.
            inputs: n1 examples, the rows.
            inputs2: n2 examples, the columns; None for the symmetric kernel.
            params: as in :func:`ntk.empirical_ntk`.
            output: as in :func:`ntk.empirical_ntk`.
            mode: ``"held"`` or ``"stream"``.
            memory_budget: bytes for features and the batch in progress and, with ``"stream"``, for vectors as large as
                the parameters; None for half of the free memory.

        Raises:
            ValueError: as :func:`ntk.empirical_ntk`; an unknown mode.
            MemoryError: ``memory_budget`` is too small; the message says what is needed, and what to do.
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}; got {mode!r}")
        params_chosen = select_parameters(model, params)
        inputs, inputs2 = by_name(model, inputs), None if inputs2 is None else by_name(model, inputs2)
        dtype = accumulation_dtype(params_chosen)
        self._symmetric = inputs2 is None
        self.n = batch_size(inputs), batch_size(inputs if inputs2 is None else inputs2)
        self.mode = mode
        if mode == "stream":  # products need the inputs as they are now
            inputs, inputs2 = fresh(inputs), fresh(inputs2)
        request = Request(model, inputs, inputs2, output, None, memory_budget, False)
        device = next(iter(params_chosen.values())).device
        budget = request.budget(device)
        source = MODES[mode](request, params_chosen, dtype, budget)
        with evaluation(model, inputs, inputs2):
            source.collect()
        warn_of_slow_parameters(request.slow, request.reference, request.examples, stacklevel=2)
        norms = source.norms
        if not all(bool(torch.isfinite(side).all()) for side in norms):
            raise ValueError(f"the kernel holds NaN or infinite values: {nonfinite_cause(model, inputs)}")
        self.outputs = norms[ROWS].shape[1]
        self._source, self._device, self._torch_dtype = source, device, dtype
        shape = self.n[0] * self.outputs, self.n[1] * self.outputs
        super().__init__(np.dtype(str(dtype).removeprefix("torch.")), shape)

    @property
    def held(self) -> int:
        """Bytes of the features that are kept."""
        return int(self._source.held)

    def diagonal(self) -> Float[np.ndarray, "rows"]:
        """The diagonal, exactly: the squared norm of each feature.

        Raises:
            ValueError: the kernel of two batches.
        """
        self._square("diagonal")
        return self._source.norms[ROWS].flatten().cpu().numpy()

    def trace(self) -> float:
        """The trace, exactly; raises as :meth:`diagonal`."""
        return float(self.diagonal().sum(dtype=np.float64))

    def eigsh(self, k: int) -> tuple[Float[np.ndarray, "k"], Float[np.ndarray, "rows k"]]:
        """The k largest eigenvalues, ascending, and their eigenvectors, by scipy's ``eigsh`` (ARPACK).

        Raises:
            ValueError: the kernel of two batches, which has none; k is not between 1 and rows - 1.
        """
        rows = self._square("eigenvalues")
        if not 1 <= k < rows:
            raise ValueError(f"k must be between 1 and {rows - 1}, the rows less 1; got {k}")
        start = np.random.default_rng(0).standard_normal(rows).astype(self.dtype)
        return eigsh(self, k=k, v0=start)  # pyright: ignore[reportReturnType]

    def solve(
        self, b: Float[np.ndarray, "rows ..."], *, ridge: float, tolerance: float = 1e-8, products: int = 500
    ) -> Float[np.ndarray, "rows ..."]:
        """(K + ridge I)^-1 b, with a residual of at most ``tolerance`` |b| for each column of b.

        Raises:
            ValueError: the kernel of two batches; a ridge that is not above 0, which makes the result depend on the
                smallest eigenvalues, and products do not show these.
            ArithmeticError: the tolerance is not reached with so many ``products``.
        """
        rows = self._square("solution")
        if not 0 < ridge < np.inf:
            raise ValueError(f"ridge must be above 0 and finite; got {ridge}")
        return solved(self, b.reshape(rows, -1).astype(np.float64), ridge, tolerance, products)[0].reshape(b.shape)

    def _square(self, what: str) -> int:
        if not self._symmetric:
            raise ValueError(f"the kernel of two batches has no {what}: make the operator of one batch, inputs2=None")
        return self.shape[0]

    def _matmat(self, X: np.ndarray) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._times(X, transposed=False)

    def _rmatmat(self, X: np.ndarray) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._times(X, transposed=True)

    def _rmatvec(self, x: np.ndarray) -> np.ndarray:
        return self._rmatmat(x.reshape(-1, 1)).reshape(-1)

    def _adjoint(self) -> LinearOperator:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self if self._symmetric else super()._adjoint()

    def _times(self, X: np.ndarray, *, transposed: bool) -> np.ndarray:
        if np.iscomplexobj(X):
            real, imaginary = (self._times(part, transposed=transposed) for part in (np.real(X), np.imag(X)))
            return real + 1j * imaginary
        V = torch.from_numpy(np.array(X, dtype=self.dtype, order="C")).to(self._device)
        n1, n2 = self.n[::-1] if transposed else self.n
        with torch.inference_mode(False), torch.no_grad():
            result = self._source.multiply(V.view(n2, self.outputs, -1), transposed=transposed)
        return result.view(n1 * self.outputs, -1).cpu().numpy()


@dataclass
class _Source:
    """Where products come from.

    Attributes:
        norms: the squared norms of the features ``(n, c)`` of rows and of columns.
        held: bytes of the features of all examples that are kept.
        stages: the parameters by how their features are computed.
    """

    request: Request
    params: Parameters
    dtype: torch.dtype
    budget: float
    norms: list[Tensor] = field(default_factory=list)
    held: float = 0.0
    stages: list[Stage] = field(default_factory=list)

    def collect(self) -> None:
        """Run all batches of all stages once, with their checks."""
        done = gathered(self.request, self.params, self.gather)
        self.stages = [stage for stage, _ in done]
        self.norms = [torch.stack(sides).sum(dim=0) for sides in zip(*(norms for _, norms in done), strict=True)]

    def gather(self, stage: Stage) -> list[Tensor]:
        """Run all batches of one stage, and return the squared norms of its features."""
        raise NotImplementedError

    def multiply(self, V: Float[Tensor, "n2 c k"], *, transposed: bool) -> Float[Tensor, "n1 c k"]:
        """K V, or K^T V."""
        raise NotImplementedError

    def zeros(self, side: int, outputs: int, k: int | None = None) -> Tensor:
        """For each example of a side, and for each output (and each vector), a zero."""
        groups = (self.request.rows, self.request.columns)[side]
        size = (sum(len(g.indices) for g in groups), outputs, *([] if k is None else [k]))
        return torch.zeros(size, dtype=self.dtype, device=next(iter(self.params.values())).device)

    def add_norms(self, norms: list[Tensor], batch: FeatureBatch) -> None:
        """Add the squared norms of a batch's features."""
        for name, features in batch.features.items():
            norms[batch.side][batch.index] += squared_norms(features, self.params[name].shape)

    @property
    def _sides(self) -> range:
        return range(1 if self.request.inputs2 is None else 2)


@dataclass
class _Held(_Source):
    """Keeps the features."""

    blocks: dict[str, tuple[list[Block], list[Block]]] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)

    def collect(self) -> None:
        """Run all batches; an embedding's rows that no example reads are left out of its table."""
        super().collect()
        for name, sides in self.blocks.items():
            both, self.shapes[name] = renumbered([*sides[ROWS], *sides[COLUMNS]], self.params[name].shape)
            self.blocks[name] = both[: len(sides[ROWS])], both[len(sides[ROWS]) :]
        self.stages.clear()

    def gather(self, stage: Stage) -> list[Tensor]:
        """Keep the features of a stage; none if the stage cannot be completed."""
        needed = self.held + stage.held
        least = needed + stage.least() / IN_PROGRESS
        if least > self.budget:
            raise MemoryError(
                f"the features of all examples need at least {at_least(least)} but memory_budget is "
                f"{gigabytes(self.budget)}: take mode='stream', fewer examples, outputs or parameters (params=), or "
                "raise memory_budget"
            )
        norms = [self.zeros(side, stage.outputs) for side in self._sides]
        blocks: dict[str, tuple[list[Block], list[Block]]] = {}
        with closing(stage.batches(IN_PROGRESS * (self.budget - needed), check=True)) as batches:
            for batch in batches:
                self.add_norms(norms, batch)
                for name, features in batch.features.items():
                    blocks.setdefault(name, ([], []))[batch.side].append((batch.index, features))
        self.held = needed
        self.blocks |= blocks
        return norms

    def multiply(self, V: Float[Tensor, "n2 c k"], *, transposed: bool) -> Float[Tensor, "n1 c k"]:
        """K V, or K^T V, parameter by parameter."""
        symmetric = self.request.inputs2 is None
        out = self.zeros(COLUMNS if transposed and not symmetric else ROWS, *V.shape[1:])
        for name, sides in self.blocks.items():
            rows, columns = sides[::-1] if transposed and not symmetric else sides
            add_kernel_product(rows, None if symmetric else columns, self.shapes[name], V, out)
        return out


@dataclass
class _Streamed(_Source):
    """Computes the features again for each product: once for J^T V, and once for J times it."""

    state: dict[str, tuple] = field(default_factory=dict)

    def collect(self) -> None:
        """Run all batches, and note the state of the model."""
        super().collect()
        self.state = _state(self.request.model)

    def gather(self, stage: Stage) -> list[Tensor]:
        """Run the batches of a stage with their checks."""
        least = stage.least() / IN_PROGRESS + self._vector
        if least > self.budget:
            raise MemoryError(
                f"one example and a vector of the parameters' size need at least {at_least(least)} but memory_budget "
                f"is {gigabytes(self.budget)}: take shorter examples, fewer outputs or parameters (params=), or raise "
                "memory_budget"
            )
        norms = [self.zeros(side, stage.outputs) for side in self._sides]
        with closing(stage.batches(self._room, check=True)) as batches:
            for batch in batches:
                self.add_norms(norms, batch)
        return norms

    def multiply(self, V: Float[Tensor, "n2 c k"], *, transposed: bool) -> Float[Tensor, "n1 c k"]:
        """K V, or K^T V, as many vectors at a time as fit in memory."""
        model, symmetric = self.request.model, self.request.inputs2 is None
        if changed := [name for name, value in _state(model).items() if self.state.get(name) != value]:
            raise ValueError(
                f"the model's {changed[0]} has changed since the operator was made: make a new operator, or take "
                "mode='held', which keeps the features of the model as it was"
            )
        left, right = (ROWS, ROWS) if symmetric else (COLUMNS, ROWS) if transposed else (ROWS, COLUMNS)
        out = self.zeros(left, *V.shape[1:])
        k = V.shape[2]
        most = max(1, int((self.budget - self._room / IN_PROGRESS) // self._vector))
        with evaluation(model, self.request.inputs, self.request.inputs2):
            for some in (slice(start, start + most) for start in range(0, k, most)):
                self._add(V[:, :, some].contiguous(), out[:, :, some], left, right)
        self.state = _state(model)
        return out

    def _add(self, V: Tensor, out: Tensor, left: int, right: int) -> None:
        for stage in self.stages:
            U = {}
            with closing(stage.batches(self._room, side=right)) as batches:
                for batch in batches:
                    for name, features in batch.features.items():
                        if name not in U:
                            U[name] = V.new_zeros(V.shape[2], *self.params[name].shape)
                        add_transposed_product(features, V[batch.index], U[name])
            with closing(stage.batches(self._room, side=left)) as batches:
                for batch in batches:
                    for name in batch.features.keys() & U.keys():
                        out.index_add_(0, batch.index, product(batch.features[name], U[name]))

    @property
    def _vector(self) -> float:
        """Bytes of a vector on the parameters' side."""
        return sum(p.numel() for p in self.params.values()) * self.dtype.itemsize

    @property
    def _room(self) -> float:
        """Bytes for a batch in progress: half of what a vector leaves, or less by the share for its temporaries."""
        return IN_PROGRESS * max(self.budget / 2, self.budget - 16 * self._vector)


MODES: dict[str, type[_Source]] = {"held": _Held, "stream": _Streamed}


def _state(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """What a change of a parameter or buffer changes."""
    addresses = {name: t.data_ptr() for name, t in (*model.named_parameters(), *model.named_buffers())}
    return {name: (version, addresses[name]) for name, version in versions(model).items()}
