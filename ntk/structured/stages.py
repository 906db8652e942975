"""Tangent features of all examples, batch by batch, for computations that do not contract them to a kernel.

:func:`gathered` makes the same choices as :func:`ntk.structured.kernels.layer_kernels`. Parameters whose features are
captured and checked on batches form the first stage; those that need one example at a time the second; the reference
takes the others, in a stage whose features are whole Jacobians.
"""

import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from ntk import reference
from ntk.counts import BY_REFERENCE, PASSES, note
from ntk.features import Dense, Feature, in_dtype
from ntk.functional import Parameters, first_line, requiring_gradients
from ntk.inputs import tiles
from ntk.request import Request
from ntk.structured.capture import WHOLE
from ntk.structured.memory import bytes_per_token
from ntk.structured.passes import run
from ntk.structured.targets import parameter_kernels
from ntk.structured.verification import Plan, batches, check_alone, check_batch, check_together
from ntk.structured.work import slow_parameters

logger = logging.getLogger(__name__)

ROWS, COLUMNS = 0, 1
"""The two batches of a kernel; a symmetric one has rows alone."""


@dataclass(frozen=True)
class FeatureBatch:
    """The features of some examples.

    Attributes:
        side: `ROWS` or `COLUMNS`.
        index: ``(b,)``, the positions of the examples on that side.
        features: parameter name -> the features of its uses, which add up; none for a parameter that is not used.
    """

    side: int
    index: Tensor
    features: dict[str, list[Feature]]


@dataclass(frozen=True)
class Captured:
    """Parameters whose features forward and backward passes of a batch leave."""

    request: Request
    names: list[str]
    plan: Plan
    dtype: torch.dtype

    @property
    def outputs(self) -> int:
        """Number of outputs c."""
        return self.plan.outputs

    @property
    def held(self) -> float:
        """Bytes of the features of all examples."""
        groups = [*self.request.rows, *self.request.columns]
        return sum(len(g.indices) * self._features_of(g.length) for g in groups)

    def least(self) -> float:
        """Bytes of the activations and features of the longest example."""
        longest = max(g.length for g in (*self.request.rows, *self.request.columns))
        return longest * bytes_per_token(self.plan.costs, WHOLE) + self._features_of(longest)

    def batches(
        self, room: float, *, side: int | None = None, check: bool = False
    ) -> Generator[FeatureBatch, None, None]:
        """Yield the features of each batch, computed within ``room`` bytes beside those that the caller keeps.

        With ``check``, each batch is shown to give every example what it gives alone; later passes repeat the same
        batches if ``room`` is the same. ``side`` confines them to one of the two batches of a kernel.

        Raises:
            NotImplementedError: with ``check``, another stage has to take the parameters.
        """
        longest = max(g.length for g in (*self.request.rows, *self.request.columns))
        most = max(longest, int(longest * room / max(1.0, self.least())))
        sides = (self.request.rows, self.request.columns)
        chosen = [
            (which, batch)
            for which, groups in enumerate(sides)
            if side in (None, which)
            for batch in batches(self.plan, groups, most)
        ]
        largest = max((len(batch.indices) for _, batch in chosen), default=0)
        note(PASSES, "batches", len(chosen))
        with requiring_gradients(self.request.model, self.names) as leaves:
            targets = parameter_kernels(leaves, summed=True)
            for which, batch in chosen:
                is_largest = len(batch.indices) == largest
                largest += is_largest  # one of them is enough
                try:
                    done = run(self.request, leaves, batch, {}, prove=check)
                    if check:
                        check_batch(self.request, leaves, targets, self.plan, done, batch, largest=is_largest)
                except (NotImplementedError, MemoryError, torch.OutOfMemoryError):
                    raise
                except Exception as error:
                    raise NotImplementedError(first_line(error)) from error
                if done.missed:
                    raise NotImplementedError(f"some examples use {min(done.missed)} in a way that others do not")
                features: dict[str, list[Feature]] = {}
                for captured in done.features():
                    features.setdefault(captured.name, []).append(in_dtype(captured.feature, self.dtype))
                yield FeatureBatch(which, torch.tensor(batch.indices, device=self.plan.device), features)

    def _features_of(self, length: int) -> float:
        return sum(cost.per_token * length + cost.per_example for cost in self.plan.costs)


@dataclass(frozen=True)
class Reference:
    """Parameters whose features are Jacobians, each example's compared with ordinary gradients when it first runs."""

    request: Request
    params: Parameters
    dtype: torch.dtype
    looping: list[reference.JacobianFunction] = field(default_factory=list)

    @cached_property
    def outputs(self) -> int:
        """Number of outputs c."""
        with torch.enable_grad(), requiring_gradients(self.request.model, ()):
            return len(reference.alone(self.request.model, self.request.output, self.request.rows[0], 0))

    @property
    def held(self) -> float:
        """Bytes of the Jacobians of all examples."""
        n = sum(len(g.indices) for g in (*self.request.rows, *self.request.columns))
        return n * self.outputs * self.dtype.itemsize * sum(p.numel() for p in self.params.values())

    def least(self) -> float:
        """Bytes of one example's Jacobian, and of a copy of it."""
        itemsize = max(self.dtype.itemsize, *(p.dtype.itemsize for p in self.params.values()))
        return 2 * self.outputs * itemsize * sum(p.numel() for p in self.params.values())

    def batches(
        self, room: float, *, side: int | None = None, check: bool = False
    ) -> Generator[FeatureBatch, None, None]:
        """Yield the Jacobians of each tile of examples, with the arguments of :meth:`Captured.batches`."""
        if not self.looping:
            self.looping.append(reference.jacobian_function(self.request.model, self.request.output))
            for name in self.params:
                note(BY_REFERENCE, name)
        size = max(1, int(room // self.least()))
        for which, groups in enumerate((self.request.rows, self.request.columns)):
            for tile in tiles(groups, size) if side in (None, which) else []:
                index, values = self.looping[0](self.params, tile, check=check)
                yield FeatureBatch(which, index, {name: [Dense(v.to(self.dtype))] for name, v in values.items()})


Stage = Captured | Reference
"""Parameters whose features are computed in the same way."""

Result = TypeVar("Result")


def gathered(request: Request, params: Parameters, gather: Callable[[Stage], Result]) -> list[tuple[Stage, Result]]:
    """What ``gather`` makes of each stage; it goes through all batches of the stage once, with ``check``.

    If it raises NotImplementedError, its result is dropped and the next stage takes the parameters. The features of all
    stages together are those of all parameters. Call it within :func:`ntk.functional.evaluation`.
    """
    done: list[tuple[Stage, Result]] = []
    dtype = reference.accumulation_dtype(params)
    uncaptured = dict.fromkeys(params, "")
    for check in (check_together, check_alone):
        try:
            with requiring_gradients(request.model, uncaptured) as leaves:
                plan = check(request, leaves, parameter_kernels(leaves, summed=True))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a mistake of the caller's is an error of the reference too
            logger.info("not captured: all parameters (%s)", first_line(error))
            uncaptured = dict.fromkeys(uncaptured, first_line(error))
            break
        names = [name for name in uncaptured if name not in plan.uncaptured]
        left = {name: why for name, why in plan.uncaptured.items() if name in uncaptured}
        if names:
            stage = Captured(request, names, plan, dtype)
            try:
                done.append((stage, gather(stage)))
                request.slow.update(slow_parameters(work for work in plan.works if work.name in names))
            except NotImplementedError as error:
                left = dict.fromkeys(uncaptured, str(error))
        uncaptured = left
        if not uncaptured:
            return done
        logger.info("not captured: %s", "; ".join(f"{name} ({why})" for name, why in uncaptured.items()))
    request.reference.update(uncaptured)
    logger.info("by the reference instead: %s", ", ".join(uncaptured))
    stage = Reference(request, {name: params[name] for name in uncaptured}, dtype)
    return [*done, (stage, gather(stage))]
