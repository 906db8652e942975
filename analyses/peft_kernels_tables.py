"""A result of `analyses.peft_kernels` as tables, for the terminal and for documents."""

from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from analyses.common_component import PARTS
from analyses.results import STAGES, Result, load_result
from analyses.tables import format_table, interval, number
from propulsion.errors import run_command


def summary(result: Result, *, markdown: bool = False) -> str:
    """Methods against full fine-tuning, null models, and the split by the mean activation."""
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
            [[row["kernel"], *(number(row[part]) for part in ("common", "residual", "cross"))]
             for row in result.tables["split"]],
        ),
    ]  # fmt: skip
    return "\n\n".join(blocks)


def main(results: Annotated[tuple[Path, ...], tyro.conf.Positional]) -> None:
    """Print the tables of stored results, in Markdown.

    Args:
        results: Result folders, as written by python -m analyses.peft_kernels.
    """
    for folder in results:
        result = load_result(folder, analysis="peft_kernels")
        print(f"## {result.dataset['name']}\n\n{summary(result, markdown=True)}\n")


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main, prog="python -m analyses.peft_kernels_tables"))
