"""The paper's claims on theory, each with its judge: Theorem 1, its two properties, Figures 6 and 7."""

from collections.abc import Iterator
from dataclasses import replace

import torch

import ntk
from analyses import decomposition
from analyses.claims.claim import (
    DEFAULT_MODEL,
    EVERYWHERE,
    RANDOM,
    SOMEWHERE,
    Evidence,
    Outcome,
    Quantity,
    Results,
    above,
    all_of,
    at_least,
    at_most,
    by_task,
    claim,
    model_of,
    quantity,
)
from analyses.claims.learnt import COMPARISONS, if_learnt
from analyses.core.comparison import directions
from analyses.kernel_distance.kernels import ADAPTER, FULL
from analyses.records import STAGES, Metric, Result
from propulsion.errors import UserError

CLOSE = 0.1
"""Relative distance up to which two kernels, Jacobians or outputs count as nearly equal."""
ALIGNED = 0.9
"""Centred alignment (CKA) from which two kernels count as equal up to a factor."""
EXACT = 1e-6
"""Relative distance up to which a closed form and a quadrature of the same limit are equal."""
APART = 1e-3
"""Relative distance above which two limits differ."""
MISSES = 0.01
"""Share of cells that may exceed a bound by chance, at the confidence level of their intervals."""
SLOPES = (-0.6, -0.4)
"""Slopes of log error over log width that count as 1/sqrt(width)."""
FACTOR = 1.5
"""Two degrees within this factor count as the same."""

AGREEING = 0.9
"""Share of held-out examples with the same prediction from which two predictors count as equal."""
AGREE = f"at least {AGREEING:g}, and above the agreement expected for independent errors"
DEGREE = 15.0
"""The degree of tasks for which the paper gives none: the default of its code."""

INITIAL, TRAINED = STAGES
HOMOGENEOUS = ("linear", "relu", "leaky_relu")
# Cases of analyses.theorem1 that meet the corrected theorem's conditions, and those that lack one of them.
COVERED = ("linear", "ReLU", "leaky ReLU", "ReLU, biases trained")
DROPPED = ("ReLU, not on the input", "GELU", "erf", "residual ReLU")
NOTHING = Quantity("a kernel of zeros", 1.0)
SUMMED = (decomposition.FULL, decomposition.SCALES)
"""The names of the two kernels in results of analyses.decomposition, summed over the linear layers."""
# The null models that agree only by chance. A Gaussian sketch is not one of them, since it is made of the gradient.
CHANCE = ("random subset", "Propulsion, examples permuted")
AMONG_METHODS = ("full fine-tuning", "Propulsion")
"""The names of the two kernels in results of analyses.peft_kernels."""


# --- Theorem 1 ------------------------------------------------------------------------------------------------------


@claim(
    "theorem1-literal", "Theorem 1, as written",
    where="Sec. 3 and App. A, Theorem 1",
    measure="‖K_F − K_P‖ / ‖K_F‖ at initialisation",
    threshold=f"at most {CLOSE:g}",
    rule=EVERYWHERE, needs=("kernel_distance/*|decomposition|theorem1",),
    settle="One number above the threshold settles it. Further models tell how general that is.",
)  # fmt: skip
def theorem1_literal(results: Results) -> Iterator[Evidence]:
    """The tangent kernels of full fine-tuning and of Propulsion are nearly equal, K_F ≈ K_P."""
    distances = by_task(results, "kernel_distance")
    for task, result in distances.items():
        distance = _of_both(result, "relative_frobenius", INITIAL)
        yield _close(quantity(f"{task}, degree {result.config['degree']:g}", distance), NOTHING)
    layers = results.get("decomposition")
    if layers is not None and layers.config["task"] not in distances:
        full, scales = (torch.from_numpy(layers.arrays[f"{INITIAL}.{part}"]) for part in SUMMED)
        label = f"{layers.config['task']}, linear layers, degree 1"
        yield _close(Quantity(label, ntk.kernel_distance(full, scales)), NOTHING, "one seed")
    for name, case in _cases(results.get("theorem1")).items():
        if case["compared"] == "limit":
            yield replace(_close(Quantity(f"limit, {name}", case["literal"]), NOTHING), model=RANDOM)


@claim(
    "theorem1-corrected", "Theorem 1, corrected",
    where="Our correction of Sec. 3 (docs/theory.md, Theorem 5)",
    measure="‖K_F − K_P / k²‖ / ‖K_F‖ in the limit, with K_F of the weights alone from closed forms and K_P by "
            "numerical integration; slopes of log error over log width",
    threshold=(
        f"at most {EXACT:g} where the conditions hold, more than {APART:g} where one does not; interval of the slope "
        f"inside {SLOPES[0]:g} to {SLOPES[1]:g}"
    ),
    rule=EVERYWHERE, needs=("theorem1", "width_convergence"),
    settle="More random networks of each width narrow the intervals of the slopes.",
    plan_command="python -m analyses.width_convergence --draws 192",
)  # fmt: skip
def theorem1_corrected(results: Results) -> Iterator[Evidence]:
    """With positively homogeneous activations and scales on the input and on every hidden layer, at infinite width,
    Propulsion's kernel is k² times the kernel of full fine-tuning of the weights.

    The errors of finite networks fall as 1/sqrt(width).
    """
    if not {"theorem1", "width_convergence"} <= results.keys():
        return
    cases, widths = _cases(results["theorem1"]), results["width_convergence"]
    least = Quantity("closest case that lacks a condition", min(cases[name]["corrected"] for name in DROPPED))
    for name in COVERED:
        q = Quantity(f"limit, {name}", cases[name]["corrected"])
        yield Evidence(q, at_most(q, EXACT), least, model=RANDOM)
    yield Evidence(least, Outcome.MET if least.value > APART else Outcome.UNMET, model=RANDOM)
    for m in widths.metrics:
        activation, _, parametrization = m.right.partition(", ")
        if m.name == "slope" and activation in HOMOGENEOUS and parametrization == "ntk":
            slope = quantity(f"slope, {m.left}, {activation}", m)
            inside = all_of(at_least(slope, SLOPES[0]), at_most(slope, SLOPES[1]))
            yield Evidence(slope, inside, Quantity("1/sqrt(width)", -0.5), model=RANDOM)


@claim(
    "theorem1-scale", "Theorem 1, up to scale",
    where="Our reading of Sec. 3 in standard parametrisation",
    measure="CKA of K_F and K_P at initialisation; beside it the number m of random directions that would align as "
            "well",
    threshold=f"at least {ALIGNED:g}, and above the best null model (a random subset of as many weights, or permuted "
              "examples)",
    rule=SOMEWHERE, needs=("kernel_distance/*|peft_kernels/*",),
    settle="More models of other families and sizes.",
)  # fmt: skip
def theorem1_up_to_scale(results: Results) -> Iterator[Evidence]:
    """At initialisation the two kernels of a pre-trained model are equal up to a factor."""
    distances = by_task(results, "kernel_distance")
    for task, result in distances.items():
        yield _aligned(result, task, INITIAL)
    # The same kernels, where nothing was trained.
    for task, result in by_task(results, "peft_kernels").items():
        if task not in distances:
            yield replace(_aligned(result, task, INITIAL, AMONG_METHODS), model=model_of(result))


@claim(
    "wide-limit", "The gap closes with the width",
    where="Sec. 3, Theorem 1 (large width d)",
    measure="‖K_P / k² − K_F‖ / ‖K_F‖ of the layers that have scales, in the limit, by activation",
    threshold=f"at most {CLOSE:g}",
    rule=SOMEWHERE, needs=("width_convergence",),
    settle="It is settled by closed forms: docs/theory.md says for which activations the gap vanishes.",
    plan_command="",
)  # fmt: skip
def wide_gap(results: Results) -> Iterator[Evidence]:
    """The difference of the two kernels vanishes as the width of networks grows."""
    rows = [row for row in results["width_convergence"].tables["widths"] if row["parametrization"] == "ntk"]
    widest = max(row["width"] for row in rows)
    for row in (row for row in rows if row["width"] == widest):
        networks = Quantity(f"networks of width {widest:g}", row["gap"])
        yield replace(_close(Quantity(row["activation"], row["gap_of_the_limits"]), networks), model=RANDOM)


@claim(
    "jl-bound", "Johnson-Lindenstrauss bound",
    where="Sec. 3, Theorem 1 (the bound)",
    measure="share of cells (dimension, error, angle) in which the whole interval of the drawn probability exceeds "
            "the bound",
    threshold=f"at most {MISSES:g}",
    rule=EVERYWHERE, needs=("johnson_lindenstrauss",),
    settle="It is settled: the bound is proved, and the draws confirm it.", plan_command="",
)  # fmt: skip
def jl_bound(results: Results) -> Iterator[Evidence]:
    """One random layer preserves inner products with the stated probability."""
    counts = {m.name: m.value for m in results["johnson_lindenstrauss"].metrics}
    share = Quantity("share of cells above the bound", counts["cells_above_bound"] / counts["cells"])
    exact = Quantity("share that misses the exact tail", counts["cells_beside_exact_tail"] / counts["cells"])
    times = counts["median_bound_over_exact"]
    sharp = f"where it is below 1, the bound is {times:,.0f} times the exact tail (median)"
    yield Evidence(share, at_most(share, MISSES), exact, sharp, model=RANDOM)


LEARNT_RUNS = "Runs in which full fine-tuning has learnt the task, on a model of the paper's size."
"""What would settle a claim on trained models."""

# --- trained models ---------------------------------------------------------------------------------------------------


@claim(
    "linearisation", "Linearisation",
    where="App. A, first property",
    measure="distance of the trained outputs from the linearised ones, relative to the change of the outputs",
    threshold=f"at most {CLOSE:g}",
    rule=SOMEWHERE, needs=("kernel_drift/*",), also=(COMPARISONS,), settle=LEARNT_RUNS,
)  # fmt: skip
def linearisation(results: Results) -> Iterator[Evidence]:
    """The outputs of fine-tuned networks equal their first-order expansion around the pre-trained weights."""
    yield from _per_method(results, "linearisation_error")


@claim(
    "fixed-features", "Fixed features",
    where="App. A, second property",
    measure="‖K_t − K_0‖ / ‖K_0‖ after training",
    threshold=f"at most {CLOSE:g}",
    rule=SOMEWHERE, needs=("kernel_drift/*|kernel_distance/*",), settle=LEARNT_RUNS,
    also=("kernel_drift/*", "kernel_distance/*", COMPARISONS),
)  # fmt: skip
def fixed_features(results: Results) -> Iterator[Evidence]:
    """Fine-tuning does not change the gradients, and so not the kernels."""
    yield from _per_method(results, "relative_kernel_drift")
    names = {FULL: "full", ADAPTER: "propulsion"}
    for task, result in by_task(results, "kernel_distance").items():
        if f"kernel_drift/{task}" in results:
            continue
        for row in result.tables["drift"]:
            if row["kernel"] in names:
                q = Quantity(f"{task}, {names[row['kernel']]}", row["relative_frobenius"])
                yield if_learnt(_close(q, detail=f"CKA with the start {row['cka']:.3f}"), results, task)


@claim(
    "figure6", "Figure 6: trained kernels agree",
    where="App. B, Figure 6",
    measure="‖K_F − K_P‖ / ‖K_F‖ of the trained models",
    threshold=f"at most {CLOSE:g}; in part if the CKA is at least {ALIGNED:g} and above that of the best null model",
    rule=SOMEWHERE, needs=("kernel_distance/*",), also=(COMPARISONS,), settle=LEARNT_RUNS,
)  # fmt: skip
def figure6(results: Results) -> Iterator[Evidence]:
    """The kernels of a fully fine-tuned model and of a model trained by Propulsion are nearly equal."""
    for task, result in by_task(results, "kernel_distance").items():
        aligned = _aligned(result, "CKA", TRAINED)
        assert aligned.null is not None
        detail = f"CKA {aligned.found}, {aligned.detail}, {aligned.null.label} {aligned.null}"
        found = _close(quantity(task, _of_both(result, "relative_frobenius", TRAINED)), NOTHING, detail)
        in_part = found.outcome != Outcome.MET and aligned.outcome == Outcome.MET
        yield if_learnt(replace(found, outcome=Outcome.PARTLY) if in_part else found, results, task)


@claim(
    "figure7", "Figure 7: Jacobians do not change",
    where="App. C, Figure 7",
    measure="‖J_t − J_0‖ / ‖J_0‖ after training",
    threshold=f"at most {CLOSE:g}",
    rule=SOMEWHERE, needs=("kernel_drift/*",), also=(COMPARISONS,), settle=LEARNT_RUNS,
)  # fmt: skip
def figure7(results: Results) -> Iterator[Evidence]:
    """The Jacobian of a trained model is close to that at initialisation."""
    yield from _per_method(results, "relative_jacobian_drift")


@claim(
    "kernel-predicts", "The kernel predicts training",
    where="Sec. 3 and App. A (the NTK regime), our test",
    measure="share of held-out examples for which the network and gradient flow with its kernel predict the same "
            "class, at the largest training set",
    threshold=AGREE,
    rule=SOMEWHERE, needs=("linearized_prediction/*",), also=(COMPARISONS,), settle=LEARNT_RUNS,
)  # fmt: skip
def kernel_predicts(results: Results) -> Iterator[Evidence]:
    """A fine-tuned network makes the predictions of its kernel at initialisation."""
    for task, result in by_task(results, "linearized_prediction").items():
        for method in dict.fromkeys(m.left for m in result.metrics if m.name == "prediction_agreement"):
            if (name := method.split(":")[0]) in ("full", "propulsion"):
                found = _agreement(result, f"{task}, {name}", "prediction_agreement", method, "gradient flow")
                yield if_learnt(found, results, task)


@claim(
    "same-predictions", "Both kernels predict the same",
    where="Sec. 3, the purpose of Theorem 1, our test",
    measure="share of held-out examples for which regression with K_F and with K_P, or the two trained networks, "
            "predict the same class",
    threshold=AGREE,
    rule=SOMEWHERE, needs=("linearized_prediction/*",), also=(COMPARISONS,), settle=LEARNT_RUNS,
)  # fmt: skip
def same_predictions(results: Results) -> Iterator[Evidence]:
    """Since the kernels agree, Propulsion makes the same predictions as full fine-tuning."""
    for task, result in by_task(results, "linearized_prediction").items():
        for name, words in (("kernel_agreement", "kernels"), ("trained_agreement", "networks")):
            rights = [m.right for m in result.metrics if m.name == name and m.right.startswith("propulsion")]
            for right in rights[:1]:
                found = _agreement(result, f"{task}, {words}", name, "full", right)
                yield found if name == "kernel_agreement" else if_learnt(found, results, task)


# --- the degree -------------------------------------------------------------------------------------------------------


@claim(
    "degree-scale", "The degree matches the kernels",
    where="Our reading of App. E (docs/theory.md)",
    measure=f"k* / the paper's degree for the task ({DEGREE:g} where it gives none)",
    threshold=f"1/{FACTOR:g} to {FACTOR:g}",
    rule=SOMEWHERE, needs=("degree_scale",),
    settle="It is settled for these models: k* hardly depends on the task. Further models tell how general that is.",
)  # fmt: skip
def degree_matches_sizes(results: Results) -> Iterator[Evidence]:
    """The degrees that train best give both kernels the same trace: k* = sqrt(tr K_F / tr K_P(1))."""
    for row in results["degree_scale"].tables["ratios"]:
        if row["kind"] == "pre-trained":
            degree = row["paper_degree"] or DEGREE
            q = Quantity(row["model"], *(row[name] / degree for name in ("matching_degree", "low", "high")))
            inside = all_of(at_least(q, 1 / FACTOR), at_most(q, FACTOR))
            model, _, task = row["model"].rpartition(", ")
            null = Quantity("k* if the weights were random", row["expected"] / degree)
            yield Evidence(replace(q, label=task), inside, null, model=DEFAULT_MODEL if model == "MiniLM-L6" else model)


# --- shared ---------------------------------------------------------------------------------------------------------


def _close(found: Quantity, null: Quantity | None = None, detail: str = "") -> Evidence:
    """Evidence that is met if a relative distance is at most `CLOSE`."""
    return Evidence(found, at_most(found, CLOSE), null, detail)


def _of_both(result: Result, name: str, stage: str) -> Metric:
    """A metric of the kernels of full fine-tuning and of Propulsion."""
    return result.metric(name, stage=stage, left=FULL, right=ADAPTER)


def _cases(result: Result | None) -> dict[str, dict]:
    return {row["case"]: row for row in result.tables["cases"]} if result else {}


def _aligned(result: Result, label: str, stage: str, names: tuple[str, str] = (FULL, ADAPTER)) -> Evidence:
    """Evidence on the CKA of the two kernels, by their names, with the best null model of `CHANCE` as baseline."""
    full, adapter = names
    metric = result.metric("cka", stage=stage, left=full, right=adapter)
    found = quantity(label, metric)
    nulls = [quantity(m.right, m) for m in result.metrics if (m.name, m.stage, m.left) == ("cka", stage, full)
             and m.right.startswith(CHANCE)]  # fmt: skip
    if not nulls:
        raise UserError("the result holds no null model that agrees only by chance")
    null = max(nulls, key=lambda q: q.value)
    outcome = all_of(at_least(found, ALIGNED), above(found, null))
    m = directions(result, f"{stage}.{full}", metric)
    return Evidence(found, outcome, null, "" if m == "-" else f"m = {m} random directions")


def _per_method(results: Results, name: str) -> Iterator[Evidence]:
    """Evidence on a metric of full fine-tuning and of Propulsion after training, with the lowest null as baseline."""
    for task, result in by_task(results, "kernel_drift").items():
        trained = [m for m in result.metrics if m.stage == TRAINED]
        for m in trained:
            method = m.left.split(":")[0]
            if m.name == name and method in ("full", "propulsion"):
                nulls = [quantity(n.right, n) for n in trained if n.name == f"null_{name}" and n.left == m.left]
                found = _close(quantity(f"{task}, {method}", m), min(nulls, key=lambda n: n.value, default=None))
                yield if_learnt(found, results, task)


def _agreement(result: Result, label: str, name: str, left: str, right: str) -> Evidence:
    """Evidence on the agreement of two predictors at the largest training set; the baseline is independent errors."""
    sizes = [row["size"] for row in result.tables["sizes"]]
    stage = f"n={max(sizes)}"
    q = quantity(f"{label}, {stage}", result.metric(name, stage=stage, left=left, right=right))
    chance = name.replace("prediction_", "").replace("agreement", "independent_errors_agreement")
    null = quantity("independent errors", result.metric(chance, stage=stage, left=left, right=right))
    # Two predictors that always give one class agree as often as independent errors would, which leaves it undecided.
    outcome = all_of(at_least(q, AGREEING), above(q, null)) if q.has_interval else Outcome.OPEN
    return Evidence(q, outcome, null, model=model_of(result))
