"""The tables of a result of `analyses.peft_kernels`, for the terminal and for documents."""

from collections.abc import Iterator
from typing import Any

from analyses.core.comparison import directions
from analyses.peft_kernels.layers import label_of
from analyses.peft_kernels.mean_split import PARTS
from analyses.records import STAGES, Block, Result, interval, metric_cell, number, summary_of_blocks


@summary_of_blocks
def summary(result: Result) -> Iterator[Block]:
    """Tables of methods and null models against full fine-tuning, of the mean split, of degrees, and of layers."""
    names = [row["method"] for row in result.tables["methods"]]
    full = names[0]

    def cell(name: str, left: str, right: str = "") -> str:
        return metric_cell(result.find(name, stage=STAGES[0], left=left, right=right))

    def bounds(row: dict[str, Any], *columns: str) -> list[str]:
        return [interval(row[c], row[f"{c}_low"], row[f"{c}_high"]) for c in columns]

    def aligned(left: str, right: str) -> list[str]:
        """A CKA and its number of random directions."""
        cka = result.find("cka", stage=STAGES[0], left=left, right=right)
        return [metric_cell(cka), directions(result, f"{STAGES[0]}.{left}", cka)]

    others = ("alignment", "eigenspace_overlap", "trace_ratio", "k_star")
    rows = [[name, *aligned(full, name), *(cell(metric, full, name) for metric in others)] for name in names[1:]]
    yield [f"against {full}", "CKA", "random directions", "cosine alignment", "eigenspace overlap", "trace ratio",
           "k*"], rows  # fmt: skip
    rows = [
        [name, cell("trace", name), cell("effective_rank", name), cell("label_cka", name, "labels")] for name in names
    ]
    yield ["kernel alone", "trace", "effective rank", "CKA with the labels"], rows
    nulls = [row["null"] for row in result.tables["nulls"]]
    rows = [[null, *aligned(full, null), cell("alignment", full, null)] for null in nulls]
    yield [f"null model against {full}", "CKA", "random directions", "cosine alignment"], rows
    rows = [
        [part, *(text for b in (f"Propulsion, {part}", "BitFit")
                 for text in aligned(f"linear: full, {part}", f"linear: {b}"))]
        for part in PARTS
    ]  # fmt: skip
    yield ["CKA with full fine-tuning of linear weights", "Propulsion", "random directions", "BitFit",
           "random directions"], rows  # fmt: skip
    split = result.tables["split"]
    rows = [[row["kernel"], *bounds(row, "common", "residual"), number(row["cross"])] for row in split]
    yield ["share of the trace", "common", "residual", "cross terms"], rows
    rows = [
        [*(number(row[c]) for c in ("degree", "trace_ratio", "expected")), f"{row['deviation']:.1e}"]
        for row in result.tables["degree"]
    ]
    yield ["degree k", "tr K(k) / tr K(1)", "k²", "distance of K(k) from k² K(1)"], rows
    yield ["layers", "CKA, full and Propulsion", "Propulsion with whole full", "full with whole full",
           "share of tr full", "share of tr Propulsion"], [
        [label_of(row["kind"], row["block"]), *bounds(row, "cka", "propulsion_cka", "full_cka"),
         number(row["full_share"]), number(row["propulsion_share"])]
        for row in result.tables["layers"]
    ]  # fmt: skip
    yield from (f"{row['method']} left out: {row['reason']}" for row in result.tables["left_out"])
