"""A result of `analyses.kernel_distance` as tables, for the terminal and for documents."""

from functools import partial

from analyses.kernel_distance.kernels import ADAPTER, FULL, PAIRS
from analyses.records import STAGES, Result, format_table, interval, number

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


def summary(result: Result, *, markdown: bool = False) -> str:
    """The result as tables: each pair and each kernel at both stages, null models, scores, coverage."""

    def cell(name: str, stage: str, left: str, right: str = "") -> str:
        found = [m for m in result.metrics if (m.name, m.stage, m.left, m.right) == (name, stage, left, right)]
        return interval(found[0].value, found[0].low, found[0].high) if found else "-"

    def rows_of(left: str, right: str) -> list[list[str]]:
        names = dict.fromkeys(m.name for m in result.metrics if (m.left, m.right) == (left, right))
        return [[_READABLE[name], *(cell(name, stage, left, right) for stage in STAGES)] for name in names]

    stages = ["at initialisation", "after training"]
    table = partial(format_table, markdown=markdown)
    blocks = [table([f"{left} against {right}", *stages], rows_of(left, right)) for left, right in PAIRS]
    nulls = dict.fromkeys(
        m.right for m in result.metrics if m.left == FULL and m.right not in {r for _, r in PAIRS} | {""}
    )
    rivals = [ADAPTER, *nulls]
    rows = [[right, *(cell("cka", stage, FULL, right) for stage in STAGES)] for right in rivals]
    blocks.append(table([f"CKA with {FULL} of", *stages], rows))
    alone = [(name, stage) for name in ("trace", "effective_rank") for stage in STAGES]
    rows = [[row["kernel"], *(cell(name, stage, row["kernel"]) for name, stage in alone), number(row["cka"])]
            for row in result.tables["drift"]]  # fmt: skip
    head = ["kernel alone", "trace before", "after", "effective rank before", "after", "CKA before/after"]
    blocks.append(table(head, rows))
    scores = result.tables["scores"]
    names = [name for name in scores[0] if name != "model"]
    blocks.append(
        table(["score on validation", *names], [[row["model"], *(number(row[n]) for n in names)] for row in scores])
    )
    blocks.append(table(["kernel", "covers"], [[name, words] for name, words in result.coverage.items()]))
    return "\n\n".join(blocks)
