"""What a kernel will take, by parameter, before it is computed."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from ntk.functional import ParameterChoice, evaluation, first_line, requiring_gradients, select_parameters
from ntk.inputs import Inputs
from ntk.outputs import Output
from ntk.reference import alone
from ntk.request import Request
from ntk.structured.contraction import FORMED, Sizes
from ntk.structured.targets import parameter_kernels
from ntk.structured.verification import Plan, check_alone, check_together
from ntk.structured.work import Work

BY_RULE, BY_EXAMPLE, BY_REFERENCE, UNUSED = "rule", "example by example", "reference", "not used"


@dataclass(frozen=True)
class ParameterCost:
    """How the kernel of one parameter is computed.

    Attributes:
        name: of the parameter.
        shape: of the parameter.
        operations: functions of torch that use it -> number of uses in a forward pass; empty for the reference.
        way: "rule"; "example by example", if an operation has no rule for this use; "reference", by Jacobians of the
            whole model; "not used", if no output depends on the parameter.
        why: the reason, unless the way is "rule".
        contraction: "formed features" or "pairs of tokens".
        held: bytes of the features of all examples; of the Jacobians for the reference.
        multiplications: of the contraction over all pairs of examples and outputs in the kernel's layout, without its
            symmetry.
    """

    name: str
    shape: tuple[int, ...]
    operations: dict[str, int]
    way: str
    why: str
    contraction: str
    held: int
    multiplications: float


@dataclass(frozen=True)
class Explanation:
    """What the kernel of a model on a batch will take.

    ``print`` shows it as a table.

    Attributes:
        rows: one for each parameter, in the model's order.
        examples: n, of rows and columns together.
        outputs: c.
        one_at_a_time: why each example runs alone; None if the examples run together.
    """

    rows: tuple[ParameterCost, ...]
    examples: int
    outputs: int
    one_at_a_time: str | None

    def __str__(self) -> str:
        header = ("parameter", "shape", "operations", "way", "contraction", "MB", "multiplications")
        cells = [header, *(_cells(row) for row in self.rows)]
        held, count = (sum(getattr(row, key) for row in self.rows) for key in ("held", "multiplications"))
        cells.append(("total", "", "", "", "", f"{held / 1e6:,.1f}", f"{count:.1e}"))
        widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in cells]
        lines.insert(1, "  ".join("-" * width for width in widths))
        run = "together" if self.one_at_a_time is None else f"one at a time: {self.one_at_a_time}"
        lines += ["", f"{self.examples} examples, {self.outputs} outputs; the examples run {run}"]
        reasons: dict[str, list[str]] = {}
        for row in self.rows:
            if row.why:
                reasons.setdefault(f"{row.way}: {row.why}", []).append(row.name)
        lines += [f"{reason}: {', '.join(names)}" for reason, names in reasons.items()]
        return "\n".join(lines)


def _cells(row: ParameterCost) -> tuple[str, ...]:
    operations = ", ".join(
        name.removeprefix("torch.").removeprefix("nn.functional.") + (f" x {times}" if times > 1 else "")
        for name, times in row.operations.items()
    )
    numbers = f"{row.held / 1e6:,.1f}", f"{row.multiplications:.1e}"
    return row.name, " x ".join(map(str, row.shape)), operations, row.way, row.contraction, *numbers


def explain(
    model: nn.Module,
    inputs: Inputs,
    inputs2: Inputs | None = None,
    *,
    params: ParameterChoice = "all",
    output: Output | None = None,
    reduce: str | None = None,
) -> Explanation:
    """How :func:`ntk.empirical_ntk` with these arguments computes each parameter's part, and what that takes.

    The model runs on one or two examples, as at the beginning of every computation, and no kernel is computed. Sizes
    are those of these examples, scaled to all. That a larger batch mixes its examples shows only when it runs.

    Args:
        model: as in :func:`ntk.empirical_ntk`, with the other arguments.
        inputs: the rows.
        inputs2: the columns.
        params: the parameters.
        output: the outputs.
        reduce: what becomes of the output axes.

    Raises:
        ValueError: as :func:`ntk.empirical_ntk`.

    Example:
        >>> print(explain(torch.nn.Linear(3, 2), torch.eye(3)))
        parameter  shape  operations  way   contraction      MB   multiplications
        ---------  -----  ----------  ----  ---------------  ---  ---------------
        weight     2 x 3  linear      rule  formed features  0.0  2.5e+02
        bias       2      linear      rule  formed features  0.0  7.2e+01
        total                                                0.0  3.2e+02
        <BLANKLINE>
        3 examples, 2 outputs; the examples run together
    """
    request = Request(model, inputs, inputs2, output, reduce, None, False)
    chosen = select_parameters(model, params)
    with evaluation(model, request.inputs, request.inputs2):
        with torch.enable_grad(), requiring_gradients(model, ()):
            c = len(alone(model, request.output, request.rows[0], 0))  # raises for what is the caller's mistake
        uncaptured = dict.fromkeys(chosen, "")
        costs: dict[str, ParameterCost] = {}
        one_at_a_time: str | None = None
        for check in (check_together, check_alone):
            try:
                with requiring_gradients(model, uncaptured) as leaves:
                    plan = check(request, leaves, parameter_kernels(chosen, summed=True))
            except Exception as error:  # the reference may work where the capture fails
                uncaptured = dict.fromkeys(uncaptured, first_line(error))
                break
            captured = uncaptured.keys() - plan.uncaptured.keys()
            costs |= {name: _by_capture(name, chosen[name].shape, request, plan) for name in captured}
            if captured and plan.largest == 1 and request.examples > 1:
                one_at_a_time = min(uncaptured.values()) or "the model refuses several examples at once"
            uncaptured = plan.uncaptured
            if not uncaptured:
                break
        for name, why in uncaptured.items():
            p, sizes = chosen[name], Sizes(request.examples, c, 0, 0, 0, chosen[name].numel())
            costs[name] = ParameterCost(
                name, tuple(p.shape), {}, BY_REFERENCE, why, FORMED, request.examples * c * p.nbytes,
                sizes.formed(request.layout),
            )  # fmt: skip
    return Explanation(tuple(costs[name] for name in chosen), request.examples, c, one_at_a_time)


def _by_capture(name: str, shape: torch.Size, request: Request, plan: Plan) -> ParameterCost:
    """The cost of a parameter that the structured way takes, from what a comparison of a few examples showed."""
    works = [work for work in plan.works if work.name == name]
    if not works:
        return ParameterCost(name, tuple(shape), {}, UNUSED, "no output depends on it", FORMED, 0, 0.0)
    assert plan.checked is not None
    lengths = [sum(len(g.indices) * g.length for g in groups) for groups in (_all(request), plan.checked[1])]
    more = {True: lengths[0] / lengths[1], False: request.examples / works[0].n}  # by token, and by example
    sizes = Sizes(
        request.examples, plan.outputs, sum(work.tokens for work in works) * more[True], works[0].rows,
        works[0].columns, _elements(works, shape, more[True]),
    )  # fmt: skip
    if any(not work.tokens for work in works):
        sizes = Sizes(request.examples, plan.outputs, 0, 0, 0, shape.numel())
    slow = next((work for work in works if work.slow is not None), None)
    way = sizes.way(request.layout)
    return ParameterCost(
        name, tuple(shape), dict(Counter(work.operation for work in works)), BY_RULE if slow is None else BY_EXAMPLE,
        "" if slow is None else f"{slow.operation}: {slow.slow}", way,
        int(sum(work.held * more[bool(work.tokens)] for work in works)), sizes.multiplications(request.layout, way),
    )  # fmt: skip


def _elements(works: list[Work], shape: torch.Size, more: float) -> int:
    """The elements that are contracted: of an embedding, those of the rows that were read."""
    if any(work.columns or not work.tokens for work in works):
        return shape.numel()
    return int(min(shape[0], sum(work.tokens for work in works) * more)) * works[0].rows


def _all(request: Request) -> list:
    return [*request.rows, *request.columns]
