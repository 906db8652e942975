"""A result of `analyses.peft_kernels` as tables, for the terminal and for documents."""

from functools import partial
from typing import Any

from analyses.peft_kernels.mean_split import PARTS
from analyses.records import STAGES, Result, format_table, interval, number


def summary(result: Result, *, markdown: bool = False) -> str:
    """Methods against full fine-tuning, null models, the split by the mean activation, degrees, and layers."""
    table = partial(format_table, markdown=markdown)
    names = [row["method"] for row in result.tables["methods"]]
    full = names[0]

    def cell(name: str, left: str, right: str = "") -> str:
        found = [m for m in result.metrics if (m.name, m.stage, m.left, m.right) == (name, STAGES[0], left, right)]
        return interval(found[0].value, found[0].low, found[0].high) if found else "-"

    pairs = ("cka", "alignment", "eigenspace_overlap", "trace_ratio", "k_star")
    blocks = [
        table(
            [f"against {full}", "CKA", "cosine alignment", "eigenspace overlap", "trace ratio", "k*"],
            [[name, *(cell(metric, full, name) for metric in pairs)] for name in names[1:]],
        ),
        table(
            ["kernel alone", "trace", "effective rank", "CKA with the labels"],
            [
                [name, cell("trace", name), cell("effective_rank", name), cell("label_cka", name, "labels")]
                for name in names
            ],
        ),
        table(
            [f"null model against {full}", "CKA", "cosine alignment"],
            [[row["null"], cell("cka", full, row["null"]), cell("alignment", full, row["null"])]
             for row in result.tables["nulls"]],
        ),
        table(
            ["CKA with full fine-tuning of linear weights", "Propulsion", "BitFit"],
            [
                [part, *(cell("cka", f"linear: full, {part}", f"linear: {other}")
                         for other in (f"Propulsion, {part}", "BitFit"))]
                for part in PARTS
            ],
        ),
        table(
            ["share of the trace", "common", "residual", "cross terms"],
            [
                [row["kernel"], *(interval(row[part], row[f"{part}_low"], row[f"{part}_high"])
                                  for part in ("common", "residual")), number(row["cross"])]
                for row in result.tables["split"]
            ],
        ),
        table(
            ["degree k", "tr K(k) / tr K(1)", "k²", "distance of K(k) from k² K(1)"],
            [[number(row["degree"]), number(row["trace_ratio"]), number(row["expected"]), f"{row['deviation']:.1e}"]
             for row in result.tables["degree"]],
        ),
        table(
            ["layers", "CKA, full and Propulsion", "Propulsion with whole full", "full with whole full",
             "share of tr full", "share of tr Propulsion"],
            [_layer(row) for row in result.tables["layers"]],
        ),
    ]  # fmt: skip
    blocks += [f"{row['method']} left out: {row['reason']}" for row in result.tables["left_out"]]
    return "\n\n".join(blocks)


def _layer(row: dict[str, Any]) -> list[str]:
    name = row["kind"] if row["block"] is None else f"block {row['block']}, {row['kind']}"
    ckas = (interval(row[c], row[f"{c}_low"], row[f"{c}_high"]) for c in ("cka", "propulsion_cka", "full_cka"))
    return [name, *ckas, number(row["full_share"]), number(row["propulsion_share"])]
