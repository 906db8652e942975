"""The tables of a result of `analyses.kernel_distance`, for the terminal and for documents."""

from collections.abc import Iterator

from analyses.core.comparison import directions
from analyses.kernel_distance.kernels import ADAPTER, FULL, PAIRS
from analyses.records import STAGES, Block, Result, metric_cell, number, summary_of_blocks

_READABLE = {
    "alignment": "cosine alignment",
    "cka": "centred alignment (CKA)",
    "relative_frobenius": "relative Frobenius distance",
    "relative_frobenius_scaled": "relative Frobenius distance, best scale",
    "mean_absolute": "mean absolute difference",
    "mean_absolute_scaled": "mean absolute difference, best scale",
    "max_absolute": "largest absolute difference",
    "max_absolute_scaled": "largest absolute difference, best scale",
    "best_scale": "best scale",
    "trace_ratio": "trace ratio",
    "k_star": "k* = sqrt(tr K_F / tr K_P(1))",
    "trace": "trace",
    "effective_rank": "effective rank",
}


def finding(result: Result) -> str:
    """How far the kernel of Propulsion is from that of full fine-tuning, before and after training, in one sentence."""
    parts = []
    for stage, when in zip(STAGES, ("before training", "after training")):
        literal, scaled = (
            number(result.metric(name, stage=stage, left=FULL, right=ADAPTER).value)
            for name in ("relative_frobenius", "relative_frobenius_scaled")
        )
        parts.append(f"{literal} {when} ({scaled} once the best single factor multiplies it)")
    subject = "the relative distance of Propulsion's kernel from that of full fine-tuning"
    return f"Found: {subject} is {parts[0]} and {parts[1]}; 0 would be equality."


@summary_of_blocks
def summary(result: Result) -> Iterator[Block]:
    """Tables of each pair and each kernel at both stages, of null models, scores and coverage."""

    def at_both(name: str, left: str, right: str = "") -> list[str]:
        return [metric_cell(result.find(name, stage=stage, left=left, right=right)) for stage in STAGES]

    def directions_at_both(left: str, right: str) -> list[str]:
        found = [result.find("cka", stage=stage, left=left, right=right) for stage in STAGES]
        return [directions(result, f"{stage}.{left}", cka) for stage, cka in zip(STAGES, found, strict=True)]

    stages = ["at initialisation", "after training"]
    for left, right in PAIRS:
        names = dict.fromkeys(m.name for m in result.metrics if (m.left, m.right) == (left, right))
        rows = [[_READABLE[n], *at_both(n, left, right)] for n in names]
        place = list(names).index("cka") + 1
        rows.insert(place, ["random directions with this CKA", *directions_at_both(left, right)])
        yield [f"{left} against {right}", *stages], rows
    others = {right for _, right in PAIRS} | {""}
    nulls = dict.fromkeys(m.right for m in result.metrics if m.left == FULL and m.right not in others)
    yield (
        [f"CKA with {FULL} of", *stages, "random directions at initialisation", "after training"],
        [[right, *at_both("cka", FULL, right), *directions_at_both(FULL, right)] for right in (ADAPTER, *nulls)],
    )
    rows = [
        [row["kernel"], *at_both("trace", row["kernel"]), *at_both("effective_rank", row["kernel"]), number(row["cka"]),
         directions(result, f"{STAGES[0]}.{row['kernel']}", row["cka"])]
        for row in result.tables["drift"]
    ]  # fmt: skip
    yield ["kernel alone", "trace before", "after", "effective rank before", "after", "CKA before/after",
           "random directions"], rows  # fmt: skip
    scores = result.tables["scores"]
    names = [name for name in scores[0] if name != "model"]
    yield ["score on validation", *names], [[row["model"], *(number(row[n]) for n in names)] for row in scores]
    yield ["kernel", "covers"], [[name, words] for name, words in result.coverage.items()]
