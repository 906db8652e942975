"""Random features whose inner products are unbiased for the tangent kernel, with standard errors of its entries."""

import math
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import t as student
from torch import Tensor, nn

from ntk.bounds import dimension_needed
from ntk.checks import check_count
from ntk.functional import ParameterChoice, Parameters, evaluation, nonfinite_cause, select_parameters
from ntk.inputs import Batch, Inputs, batch_size, by_name
from ntk.outputs import Output
from ntk.reference import accumulation_dtype, at_least, gigabytes
from ntk.request import Request
from ntk.store.identity import tensors_digest
from ntk.structured.memory import IN_PROGRESS
from ntk.structured.sketching import ParameterSketch
from ntk.structured.stages import Stage, gathered
from ntk.structured.work import warn_of_slow_parameters

# Independent draws that share the dimension; their spread gives the standard errors, with one degree of freedom fewer.
REPLICATES = 16
# Examples and dimension of the sketch that measures the variance before a dimension is planned.
_PILOT, _PILOT_DIMENSION = 8, 1024


@dataclass(frozen=True)
class Plan:
    """How a dimension was chosen. A plan, not a bound: the ratio is measured on few examples.

    Attributes:
        epsilon: error of an entry, relative to sqrt(K[i, i] K[j, j]).
        confidence: probability that the error of an entry is below ``epsilon``.
        gaussian: dimension that Gaussian directions need at least, for the largest variance (rho = 1).
        ratio: variance of this sketch's entries relative to Gaussian directions', in a pilot.
    """

    epsilon: float
    confidence: float
    gaussian: int
    ratio: float

    @property
    def dimension(self) -> int:
        """The dimension, a multiple of `REPLICATES`."""
        return REPLICATES * math.ceil(self.gaussian * self.ratio / REPLICATES)


@dataclass(frozen=True)
class SketchedNTK:
    """Features of n examples whose inner products estimate the tangent kernel.

    Attributes:
        features: ``(n, c, k)``; sketches of the same model, parameters, dimension and seed can be multiplied.
        key: what two sketches must share: dimension, seed, names and shapes of the parameters, and the weights, as a
            digest. That they are of the same output is not checked.
        plan: how the dimension was chosen, if it was.
    """

    features: Float[Tensor, "n c k"]
    key: tuple
    plan: Plan | None = None

    def kernel(self, other: "SketchedNTK | None" = None) -> Float[Tensor, "n1 n2 c c"]:
        """The unbiased estimate of :func:`ntk.empirical_ntk`, or of the kernel of two batches; n1 n2 c^2 k products."""
        return torch.einsum("iak,jbk->ijab", self.features, self._columns(other))

    def standard_errors(self, other: "SketchedNTK | None" = None) -> Float[Tensor, "n1 n2 c c"]:
        """The standard error of each entry of :meth:`kernel`, from `REPLICATES` independent draws.

        All entries share the draws, so their errors depend on one another.
        """
        left, right = (f.unflatten(2, (REPLICATES, -1)) for f in (self.features, self._columns(other)))
        mean = self.kernel(other)
        squares = torch.zeros_like(mean)
        for draw in range(REPLICATES):
            estimate = torch.einsum("iak,jbk->ijab", left[:, :, draw], right[:, :, draw]) * REPLICATES
            squares += (estimate - mean) ** 2
        return (squares / (REPLICATES * (REPLICATES - 1))).sqrt()

    def interval(
        self, other: "SketchedNTK | None" = None, *, confidence: float = 0.95
    ) -> tuple[Float[Tensor, "n1 n2 c c"], Float[Tensor, "n1 n2 c c"]]:
        """Student's interval of each entry of the kernel, one by one: kernel -+ quantile x standard error."""
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must lie between 0 and 1; got {confidence}")
        width = float(student.ppf((1 + confidence) / 2, REPLICATES - 1)) * self.standard_errors(other)
        return self.kernel(other) - width, self.kernel(other) + width

    def _columns(self, other: "SketchedNTK | None") -> Tensor:
        if other is not None and other.key != self.key:
            raise ValueError(
                "expected sketches of the same weights and parameters with the same dimension and seed, whose inner "
                f"products estimate a kernel; got {_words(self.key)} and {_words(other.key)}"
            )
        return self.features if other is None else other.features


def sketched_ntk(
    model: nn.Module,
    inputs: Inputs,
    *,
    dimension: int | None = None,
    epsilon: float | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    params: ParameterChoice = "all",
    output: Output | None = None,
    memory_budget: int | float | None = None,
) -> SketchedNTK:
    """Random features of each example, k numbers an output, whose inner products are unbiased for the kernel.

    A large matrix has the TensorSketch of its tokens, g (x) a, which is never formed; other parameters have the
    CountSketch of their features (:mod:`ntk.structured.sketching`). The hashes of parameters are independent, and all
    sketches add up in one buffer. They depend on ``seed`` and the parameters' names alone, so that sketches of other
    examples, made by another call, go with these. The dimension is shared by `REPLICATES` independent draws.

    Args:
        model: as in :func:`ntk.empirical_ntk`, whose checks are made here too.
        inputs: n examples, as there.
        dimension: k, a multiple of `REPLICATES`. An entry's standard error falls with 1 / sqrt(k).
        epsilon: instead of a dimension, the error wanted of an entry, relative to sqrt(K[i, i] K[j, j]). The dimension
            is that of Gaussian directions (:func:`ntk.bounds.dimension_needed`), times the ratio of variances in a
            sketch of the first examples: a plan, not a bound.
        confidence: probability of an error below ``epsilon``, for one entry.
        seed: of the hashes.
        params: as in :func:`ntk.empirical_ntk`.
        output: as there.
        memory_budget: bytes for the features of the batch in progress, and the sketch; None for half of the free
            memory.

    Cost: the passes of :func:`ntk.empirical_ntk`, and for each token of a large matrix (c + 1) (r + s) `REPLICATES`
    additions and (c + 1) k log k for the transforms. Memory n c k.

    Raises:
        ValueError: as :func:`ntk.empirical_ntk`; not one of ``dimension`` and ``epsilon``, or one out of range.
        MemoryError: ``memory_budget`` is too small for the sketch and one example.

    Example:
        >>> model = torch.nn.Linear(3, 2, bias=False).double()
        >>> x = torch.eye(3, dtype=torch.float64)
        >>> sketch = sketched_ntk(model, x, dimension=4096)
        >>> sketch.features.shape, sketch.kernel()[0, 0].round().tolist()
        (torch.Size([3, 2, 4096]), [[1.0, 0.0], [0.0, 1.0]])
    """
    if (dimension is None) == (epsilon is None):
        raise ValueError(f"give one of dimension= and epsilon=; got {dimension} and {epsilon}")
    chosen, inputs = select_parameters(model, params), by_name(model, inputs)
    make = partial(_sketched, model, chosen=chosen, seed=seed, output=output, memory_budget=memory_budget)
    if epsilon is None:
        assert dimension is not None
        return make(inputs, dimension=_checked(dimension))
    plan = _planned(make(_first(inputs, _PILOT), dimension=_PILOT_DIMENSION), epsilon, confidence)
    found = make(inputs, dimension=plan.dimension)
    return SketchedNTK(found.features, found.key, plan)


def _sketched(
    model: nn.Module,
    inputs: Inputs,
    *,
    dimension: int,
    chosen: Parameters,
    seed: int,
    output: Output | None,
    memory_budget: int | float | None,
) -> SketchedNTK:
    request = Request(model, inputs, None, output, None, memory_budget, False)
    dtype = accumulation_dtype(chosen)
    like = torch.empty((), dtype=dtype, device=next(iter(chosen.values())).device)
    budget, n, width = request.budget(like.device), batch_size(inputs), dimension // REPLICATES
    sketches: dict[str, ParameterSketch] = {}

    def gather(stage: Stage) -> Tensor:
        # One sum for each stage, and for the batch in progress as large a one again, with its Fourier transform.
        size = n * stage.outputs * dimension * dtype.itemsize
        least = 4 * size + stage.least() / IN_PROGRESS
        if least > budget:
            raise MemoryError(
                f"the sketch and one example need at least {at_least(least)} but memory_budget is "
                f"{gigabytes(budget)}: take a smaller dimension, fewer examples or outputs, or raise memory_budget"
            )
        total = like.new_zeros(n, stage.outputs, REPLICATES, width)
        with closing(stage.batches(IN_PROGRESS * (budget - 4 * size), check=True)) as batches:
            for batch in batches:
                buckets = like.new_zeros(len(batch.index), stage.outputs, REPLICATES, width)
                waves = torch.fft.rfft(buckets, dim=3)
                for name, features in batch.features.items():
                    if name not in sketches:
                        sketches[name] = ParameterSketch.drawn(name, chosen[name].shape, seed, REPLICATES, width, like)
                    sketches[name].add(features, waves, buckets)
                total[batch.index] += buckets + torch.fft.irfft(waves, n=width, dim=3)
        return total

    with evaluation(model, request.inputs):
        totals = [total for _, total in gathered(request, chosen, gather)]
    warn_of_slow_parameters(request.slow, request.reference, request.examples, stacklevel=3)
    features = torch.stack(totals).sum(dim=0).flatten(2) / math.sqrt(REPLICATES)
    if not bool(torch.isfinite(features).all()):
        raise ValueError(f"the sketch holds NaN or infinite values: {nonfinite_cause(model, request.inputs)}")
    names = tuple((name, tuple(p.shape)) for name, p in chosen.items())
    weights = tensors_digest({**dict(model.named_parameters()), **dict(model.named_buffers())})
    return SketchedNTK(features, (dimension, seed, names, weights))


def _checked(dimension: int) -> int:
    check_count(dimension, "dimension")
    if dimension % REPLICATES or dimension < 2 * REPLICATES:
        nearest = max(2, round(dimension / REPLICATES)) * REPLICATES
        raise ValueError(
            f"dimension must be a multiple of {REPLICATES}, the number of independent draws, and at least "
            f"{2 * REPLICATES}; got {dimension}: take {nearest}"
        )
    return int(dimension)


def _planned(pilot: SketchedNTK, epsilon: float, confidence: float) -> Plan:
    """The dimension of Gaussian directions, times how much more the pilot's entries vary."""
    gaussian = dimension_needed(epsilon, confidence, rho=1)
    K, errors = pilot.kernel(), pilot.standard_errors()
    own = torch.einsum("iiaa->ia", K)
    expected = (own[:, None, :, None] * own[None, :, None, :] + K**2).mean() / pilot.key[0]
    return Plan(epsilon, confidence, gaussian, max(1.0, float((errors**2).mean() / expected)) if expected else 1.0)


def _first(inputs: Batch, count: int) -> Batch:
    """The first examples of a batch."""
    if isinstance(inputs, Tensor):
        return inputs[:count]
    n = batch_size(inputs)
    held = Tensor | np.ndarray | list | tuple | range
    return {
        key: value[:count] if isinstance(value, held) and getattr(value, "ndim", 1) and len(value) == n else value
        for key, value in inputs.items()
    }


def _words(key: tuple) -> str:
    return f"dimension {key[0]}, seed {key[1]}, {len(key[2])} parameters and weights {key[3][:8]}"
