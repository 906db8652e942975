"""The paper's claims on Propulsion's choices and on what it changes, each with its judge."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from analyses.claims.claim import EVERYWHERE, SOMEWHERE, Evidence, Outcome, Quantity, Results, claim, quantity
from analyses.claims.learnt import COMPARISONS, if_learnt
from analyses.claims.paired import paired
from analyses.claims.training import ALL, ATTN, LEARNT_RUNS
from analyses.core.intervals import IDENTITY, mean_interval
from analyses.core.scales import SCALES
from analyses.records import Result

Z_RANGE = (0.98, 1.02)
FULL_RANK = 0.9
"""Share of the full rank from which the change of a matrix counts as one of full rank."""
PEAK = "25"
MORE_SEEDS = "More seeds, and runs long enough that every choice learns, on a model of the paper's size."
"""What would settle claims on the choices in Propulsion."""


@claim(
    "degree", "Degree: a peak at about 25",
    where="App. E, degree ablation",
    measure=f"score at degree {PEAK} minus that at the lowest and at the highest degree, paired by seed",
    threshold="above 0; runs that diverged score 0",
    rule=SOMEWHERE, needs=("ablation/degree_fixed_rate",), also=("ablation/degree",), settle=MORE_SEEDS,
)  # fmt: skip
def degree_optimum(results: Results) -> Iterator[Evidence]:
    """Accuracy peaks at a degree of about 25 and falls afterwards."""
    words = {"ablation/degree_fixed_rate": "one rate for all", "ablation/degree": "rate divided by the degree"}
    for name, rate in words.items():
        if name not in results:
            continue
        scores = _settings(results[name])
        ends = sorted((label for label in scores if label != PEAK), key=float)
        for end in (ends[0], ends[-1]):
            yield from _best(results[name], scores, PEAK, [end], f", {rate}", "no peak")


@claim(
    "positions", "All positions are best",
    where="App. E, positions",
    measure="score of All minus that of each other choice, paired by seed",
    threshold="above 0",
    rule=EVERYWHERE, needs=("ablation/positions",), settle=MORE_SEEDS,
)  # fmt: skip
def position_order(results: Results) -> Iterator[Evidence]:
    """Scales on all layers score higher than scales on some layers."""
    result = results["ablation/positions"]
    scores = _settings(result)
    yield from _best(result, scores, "all", [label for label in scores if label != "all"])


@claim(
    "pooling", "Average pooling is best",
    where="App. F",
    measure="score of average pooling minus that of each other pooling of as many vectors, paired by seed",
    threshold="above 0",
    rule=EVERYWHERE, needs=("ablation/vectors",), settle=MORE_SEEDS,
)  # fmt: skip
def pooling(results: Results) -> Iterator[Evidence]:
    """With several scale vectors in a layer, pooling them by their average scores highest."""
    result = results["ablation/vectors"]
    scores = _settings(result)
    for count in dict.fromkeys(label.split()[0] for label in scores if " " in label):
        own = f"{count} mean"
        yield from _best(result, scores, own, [x for x in scores if x.startswith(f"{count} ") and x != own])


@claim(
    "initial-value", "Starting at 1 is best",
    where="App. E, initialisation",
    measure="score of starting at 1 minus that of each other start, paired by seed",
    threshold="above 0",
    rule=EVERYWHERE, needs=("ablation/init_value",), settle=MORE_SEEDS,
)  # fmt: skip
def init_value(results: Results) -> Iterator[Evidence]:
    """Scales that start at 1 score highest."""
    scores = _settings(results["ablation/init_value"])
    yield from _best(results["ablation/init_value"], scores, "1", [label for label in scores if label != "1"])


@claim(
    "z-range", "Trained scales stay in 0.98-1.02",
    where="App. E",
    measure="trained scales z of all layers",
    threshold=f"all within {Z_RANGE[0]:g} to {Z_RANGE[1]:g}; in part if the central 90 % are",
    rule=SOMEWHERE, needs=("delta_weights",), also=(COMPARISONS,), settle=LEARNT_RUNS,
)  # fmt: skip
def z_range(results: Results) -> Iterator[Evidence]:
    """After training all scales lie between 0.98 and 1.02."""
    task = str(results["delta_weights"].dataset.get("name"))
    for row in results["delta_weights"].tables["methods"]:
        if "z q0" not in row:
            continue
        low, start, middle, end, high = (row[f"z {name}"] for name in ("q0", "q0.05", "q0.5", "q0.95", "q1"))
        all_inside, most_inside = (Z_RANGE[0] <= a and b <= Z_RANGE[1] for a, b in ((low, high), (start, end)))
        outcome = Outcome.MET if all_inside else Outcome.PARTLY if most_inside else Outcome.UNMET
        found = Quantity(f"median [lowest, highest], {row['method']}", middle, low, high)
        e = Evidence(found, outcome, Quantity("untrained", 1.0), f"central 90 % from {start:.4f} to {end:.4f}")
        yield if_learnt(e, results, task)


@claim(
    "table6", "Table 6: a full-rank change",
    where="Table 6",
    measure="rank of the change / full rank, median over matrices [lowest, highest]",
    threshold=f"at least {FULL_RANK:g} for every matrix; in part if only for the median",
    rule=SOMEWHERE, needs=("delta_weights",), also=(COMPARISONS,), settle=LEARNT_RUNS,
)  # fmt: skip
def delta_rank(results: Results) -> Iterator[Evidence]:
    """Propulsion changes a matrix by scaling its rows, W ∘ Z, and this change is not of low rank."""
    found = {m.left: quantity(m.left, m) for m in results["delta_weights"].metrics if m.name == "rank_share"}
    lora = next((q for name, q in found.items() if name.startswith("lora")), None)
    for q in (q for name, q in found.items() if name in (ALL, ATTN)):
        most = Outcome.PARTLY if q.value >= FULL_RANK else Outcome.UNMET
        e = Evidence(q, Outcome.MET if q.lower >= FULL_RANK else most, lora)
        yield if_learnt(e, results, str(results["delta_weights"].dataset.get("name")))


# --- shared ---------------------------------------------------------------------------------------------------------


def _settings(result: Result) -> dict[str, list[float]]:
    """Scores of all seeds by setting; 0 for a run that diverged."""
    return {row["setting"]: [score or 0.0 for score in row["scores"]] for row in result.tables["settings"]}


def _best(
    result: Result, scores: dict[str, list[float]], own: str, others: Sequence[str], more: str = "",
    null: str = "no difference",
) -> Iterator[Evidence]:  # fmt: skip
    """Evidence that a setting scores above others, from paired differences by seed.

    A difference is not testable if the runs of one setting are not above the best single answer, since they may have
    had too few steps; runs that diverged count as they are.
    """
    metric, chance, diverged = str(result.dataset.get("metric", "")), result.dataset.get("chance"), {}
    for row in result.tables["settings"]:
        diverged[row["setting"]] = any(score is None for score in row["scores"])
    for other in others:
        e = paired(f"{own} minus {other}{more}", scores[own], scores[other], metric)
        e = replace(e, null=Quantity(null, 0.0))
        idle = [
            x for x in (own, other) if chance is not None and not diverged[x] and not _above(scores[x], chance, metric)
        ]
        if idle:
            note = f"{' and '.join(idle)} not above the best single answer, {chance:.3f}"
            e = replace(e, outcome=Outcome.UNTESTABLE, detail=note)
        yield e


def _above(scores: Sequence[float], chance: float, metric: str) -> bool:
    """Whether a setting's mean is above the best single answer by its interval over seeds; of one seed, at all."""
    value, low, _ = mean_interval(scores, SCALES.get(metric, IDENTITY))
    return (value if math.isnan(low) else low) > chance
