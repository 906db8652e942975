"""The tables of a result of `analyses.linearized_prediction`, for the terminal and for documents."""

from collections.abc import Iterator

from analyses.linearized_prediction.measures import NULL_KERNELS, PREDICTORS, prefix_of
from analyses.records import Block, Result, metric_cell, summary_of_blocks


@summary_of_blocks
def summary(result: Result) -> Iterator[Block]:
    """Tables of scores, of networks against their kernels' predictions, and of methods against each other.

    A predictor has the same name in all of them: KIND of a method, or null: KIND if it does not depend on the method.
    """
    methods = [row["method"] for row in result.tables["methods"]]
    sizes = [row["size"] for row in result.tables["sizes"]]
    found = {(m.name, m.left, m.right, m.stage): m for m in result.metrics}

    def cells(name: str, left: str, right: str = "", beside: str = "") -> list[str]:
        each = []
        for size in sizes:
            metric = found.get((name, left, right, f"n={size}"))
            other = found.get((beside, left, right, f"n={size}"))
            each.append(metric_cell(metric) + (f" ({other.value:.3f})" if metric and other else ""))
        return each

    def lefts(name: str) -> list[tuple[str, str]]:
        return list(dict.fromkeys((m.left, m.right) for m in result.metrics if m.name == name))

    head = [f"n = {size}" for size in sizes]
    kinds = ["trained", *PREDICTORS.values(), "null"]
    ordered = sorted(lefts("score"), key=lambda pair: kinds.index(pair[0].partition(":")[0]))
    scores = [[left, *cells("score", left)] for left, _ in ordered]
    yield [f"{result.dataset['name']}, {result.dataset['metric']}", *head], scores
    for name, beside, title in (
        ("prediction_agreement", "independent_errors_agreement", "agreement (of independent errors)"),
        ("logit_correlation", "logit_correlation_within_classes", "correlation of logits (within classes)"),
    ):
        if pairs := lefts(name):
            rows = [[f"{left} against {_predictor(right)}", *cells(name, left, right, beside)] for left, right in pairs]
            yield [f"network against predictor: {title}", *head], rows
    rows = []
    for kind in ("trained", *PREDICTORS.values()):
        prefix = prefix_of(kind)
        for left, right in lefts(f"{prefix}agreement"):
            beside = f"{prefix}independent_errors_agreement"
            other = f"null: {right}" if right in NULL_KERNELS and right not in methods else right
            rows.append([f"{kind}: {left} against {other}", *cells(f"{prefix}agreement", left, right, beside)])
    if rows:
        yield ["between methods: agreement (of independent errors)", *head], rows


def _predictor(name: str) -> str:
    """A predictor of a network: its method's own, under the name that scores have, or a null."""
    return f"its {PREDICTORS[name]}" if name in PREDICTORS else f"null: {name}"
