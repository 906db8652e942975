"""The paper's claims on training, each with its judge: parameters, cost, speed, scores, and Propulsion's choices."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from analyses.claims.claim import (
    EVERYWHERE,
    SOMEWHERE,
    Evidence,
    Outcome,
    Quantity,
    Results,
    above,
    at_least,
    by_task,
    claim,
    quantity,
)
from analyses.core.intervals import mean_interval
from analyses.records import Result
from propulsion.errors import UserError

ALL, ATTN = "propulsion:positions=all", "propulsion:positions=attn"
PAPER_TOTAL, PAPER_TRAINED = 355.3e6, 0.086e6
ROUNDING = 0.005
"""Relative difference up to which a count agrees with the paper's rounded one."""
NEARLY = 1.5
"""Factor from the paper's count within which a count meets the claim in part."""
TIMES_FEWER = 10.0
POINT = 0.01
"""One point of accuracy or correlation, the largest difference that counts as none."""
SAVING = 1.25
"""Memory of another method over Propulsion's: half of what the paper reports, 26 GB over 17.2 GB."""
Z_RANGE = (0.98, 1.02)
FULL_RANK = 0.9
"""Share of the full rank from which the change of a matrix counts as one of full rank."""
PEAK = "25"


# --- parameters and cost --------------------------------------------------------------------------------------------


@claim(
    "parameter-pair", "355.3M parameters to 0.086M",
    where="Abstract",
    measure="parameters that Propulsion trains in the model of 355.3 million, with the paper's choice of layers",
    threshold=f"0.086 million within {ROUNDING:.1%}; in part within a factor of {NEARLY:g}",
    rule=EVERYWHERE, needs=("parameter_count",),
)  # fmt: skip
def parameter_pair(results: Results) -> Iterator[Evidence]:
    """Propulsion reduces the trained parameters of one model from 355.3 to 0.086 million."""
    rows = results["parameter_count"].tables["counts"]
    model = min(rows, key=lambda row: abs(row["total"] - PAPER_TOTAL))
    named = [f"{row['model']}: {row['everything']:,}" for row in rows
             if abs(row["everything"] / PAPER_TRAINED - 1) < ROUNDING]  # fmt: skip
    factor = model["everything"] / PAPER_TRAINED
    if abs(model["total"] / PAPER_TOTAL - 1) > ROUNDING or factor > NEARLY or factor < 1 / NEARLY:
        outcome = Outcome.UNMET
    else:
        outcome = Outcome.MET if abs(factor - 1) < ROUNDING else Outcome.PARTLY
    found = Quantity(f"trained on {model['model']}, of {model['total']:,}", model["everything"])
    null = Quantity("the abstract's", PAPER_TRAINED)
    yield Evidence(found, outcome, null, f"the abstract's count is that of {', '.join(named) or 'no model'}")


@claim(
    "fewer-than-lora", "Ten times fewer than LoRA",
    where="Abstract and Sec. 1",
    measure="parameters of LoRA / parameters of Propulsion, without heads",
    threshold=f"at least {TIMES_FEWER:g}",
    rule=SOMEWHERE, needs=("complexity",), also=("method_comparison/*",),
)  # fmt: skip
def fewer_than_lora(results: Results) -> Iterator[Evidence]:
    """Propulsion trains over ten times fewer parameters than LoRA."""
    layer = {row["method"]: row["counted"] for row in results["complexity"].tables["methods"]}
    rank = results["complexity"].config["rank"]
    ratios = [Quantity(f"the same layer, rank {rank}", layer["lora"] / layer["propulsion"])]
    for result in list(by_task(results, "method_comparison").values())[:1]:
        trained = {row["method"]: row["trained_parameters"] for row in result.tables["summary"]}
        head = trained.get("head", 0)
        ratios += [
            Quantity(f"peft's LoRA for the model, {name}", (trained["lora"] - head) / (trained[name] - head))
            for name in (ALL, ATTN) if name in trained and "lora" in trained
        ]  # fmt: skip
    for q in ratios:
        yield Evidence(q, at_least(q, TIMES_FEWER), Quantity("the same number", 1.0))


@claim(
    "table4", "Table 4: least space and time",
    where="Sec. 5, Table 4",
    measure="counted parameters, and time of a forward and backward pass relative to the frozen layer's",
    threshold="no more than for the best other adapter; counted parameters equal those of the formulas",
    rule=SOMEWHERE, needs=("complexity",),
)  # fmt: skip
def table4(results: Results) -> Iterator[Evidence]:
    """Of all adapters, Propulsion needs the fewest parameters and the least time for a layer."""
    rows = {row["method"]: row for row in results["complexity"].tables["methods"]}
    rivals = [row for name, row in rows.items() if name not in ("frozen", "full") and "propulsion" not in name]
    own = rows["propulsion"]
    wrong = [row["method"] for row in rows.values() if row["counted"] != row["parameters"]]
    detail = f"formulas that miscount: {', '.join(wrong) or 'none'}"
    for name, words in (("counted", "parameters"), ("time_ratio", "time over frozen")):
        best = min(rivals, key=lambda row: row[name])
        met = own[name] <= best[name] and not (name == "counted" and wrong)
        null = Quantity(best["method"], best[name])
        yield Evidence(Quantity(words, own[name]), Outcome.MET if met else Outcome.UNMET, null, detail)


@claim(
    "memory", "Figure 4: least memory",
    where="Sec. 5, Figure 4",
    measure="peak memory of another adapter / peak memory of Propulsion, medians over rounds [lowest, highest]",
    threshold=f"at least {SAVING:g}, half of the claimed saving; in part if above 1 in all rounds",
    rule=SOMEWHERE, needs=("memory",),
)  # fmt: skip
def memory(results: Results) -> Iterator[Evidence]:
    """Training takes a third less memory than with other adapters (17.2 GB against 26 GB and more)."""
    peaks: dict[str, list[float]] = {}
    for run in results["memory"].tables["runs"]:
        peaks.setdefault(run["method"], []).append(run["peak_bytes"])
    own = peaks[ALL]
    for name in peft_methods(peaks):
        ratio = np.array(peaks[name]) / np.array(own)
        q = Quantity(name, float(np.median(peaks[name]) / np.median(own)), float(ratio.min()), float(ratio.max()))
        outcome = Outcome.PARTLY if 1 < q.lower < SAVING else at_least(q, SAVING)
        yield Evidence(q, outcome, Quantity("the same memory", 1.0))


@claim(
    "convergence", "Figure 3: fastest to converge",
    where="Sec. 5, Figure 3",
    measure="score averaged over the steps, of the better of All and Attn",
    threshold="an interval above that of each other adapter (over several seeds)",
    rule=EVERYWHERE, needs=("convergence",),
)  # fmt: skip
def convergence(results: Results) -> Iterator[Evidence]:
    """Propulsion converges faster than the other adapters."""
    metrics = results["convergence"].metrics
    yield from _best_of_ours({m.left: quantity(m.left, m) for m in metrics if m.name == "mean score over the steps"})


# --- scores ---------------------------------------------------------------------------------------------------------


@claim(
    "on-par", "On par with full fine-tuning",
    where="Sec. 4, GLUE",
    measure="score of Propulsion (All) minus that of full fine-tuning, paired",
    threshold=f"at least -{POINT:g} with its whole interval; undecided where full fine-tuning is not above the head "
              "alone",
    rule=SOMEWHERE, needs=("method_comparison/*",),
)  # fmt: skip
def on_par(results: Results) -> Iterator[Evidence]:
    """Propulsion scores as well as full fine-tuning."""
    for task, result, metric in _compared(results):
        m = result.metric(metric, stage=f"{task}, difference", left=ALL, right="full")
        q = quantity(f"{task}, {metric}", m)
        full, head = (quantity(name, result.metric(metric, stage=task, left=name)) for name in ("full", "head"))
        learned = above(full, head) == Outcome.MET
        outcome = at_least(q, -POINT) if learned and q.has_interval else Outcome.OPEN
        detail = f"full {full}" + ("" if learned else ", which is not above the head alone")
        null = result.metric(metric, stage=f"{task}, difference", left="head", right="full")
        yield Evidence(q, outcome, quantity("the head alone", null), detail)


@claim(
    "best-adapter", "Better than other adapters",
    where="Sec. 4",
    measure="score of the better of All and Attn, minus that of full fine-tuning",
    threshold="an interval above that of each other adapter",
    rule=EVERYWHERE, needs=("method_comparison/*",),
)  # fmt: skip
def best_adapter(results: Results) -> Iterator[Evidence]:
    """Propulsion scores higher than the other parameter-efficient methods."""
    for task, result, metric in _compared(results):
        own = [m for m in result.metrics if (m.name, m.stage, m.right) == (metric, f"{task}, difference", "full")]
        yield from _best_of_ours({m.left: quantity(m.left, m) for m in own}, f"{task}, ")


@claim(
    "large-models", "The same on 7B to 13B models",
    where="Sec. 4, reasoning tasks",
    measure="accuracy of generated answers after tuning",
    threshold="an interval above that of the untuned model, on one of these models (undecided on any other)",
    rule=EVERYWHERE, needs=("instruction_tuning",),
)  # fmt: skip
def large_models(results: Results) -> Iterator[Evidence]:
    """Propulsion also tunes BLOOMz-7B, GPT-J-6B, LLaMA-7B and LLaMA-13B."""
    result = results["instruction_tuning"]
    scores = {m.left: quantity(m.left, m) for m in result.metrics if (m.name, m.stage) == ("accuracy", "trained")}
    name, untuned = result.model["name"], scores["none"]
    own = next(q for label, q in scores.items() if label.startswith("propulsion"))
    asked = any(word in name.lower() for word in ("bloomz-7b", "gpt-j-6b", "llama-7b", "llama-13b"))
    found = replace(own, label=f"{result.dataset['name']}, {name}")
    yield Evidence(found, above(own, untuned) if asked else Outcome.OPEN, replace(untuned, label="untuned"))


# --- choices in Propulsion ------------------------------------------------------------------------------------------


@claim(
    "degree", "Degree: a peak at about 25",
    where="App. E, degree ablation",
    measure=f"score at degree {PEAK} minus that at the lowest and at the highest degree, paired by seed",
    threshold=(
        f"above 0 with its whole interval; not met if below {POINT:g} with its whole interval; runs that diverged "
        "score 0"
    ),
    rule=SOMEWHERE, needs=("ablation/degree_fixed_rate",), also=("ablation/degree",),
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
            q = _difference(f"{PEAK} minus {end}, {rate}", scores[PEAK], scores[end])
            outcome = Outcome.OPEN if not q.has_interval else Outcome.MET if q.lower > 0 else at_least(q, POINT)
            yield Evidence(q, outcome, Quantity("no peak", 0.0))


@claim(
    "positions", "All positions are best",
    where="App. E, positions",
    measure="score of All minus that of each other choice, paired by seed",
    threshold=(
        "above 0 with its whole interval; not met if below 0 with its whole interval; undecided for a choice that is "
        f"not {POINT:g} above the score of always giving the same answer"
    ),
    rule=EVERYWHERE, needs=("ablation/positions",),
)  # fmt: skip
def position_order(results: Results) -> Iterator[Evidence]:
    """Scales on all layers score higher than scales on some layers."""
    result = results["ablation/positions"]
    chance = float(result.dataset.get("chance", -math.inf))
    scores = _settings(result)
    # A choice that still gives one answer for all rows had too few steps: its score does not show what it can reach.
    for label, e in zip((label for label in scores if label != "all"), _best(scores, "all"), strict=True):
        learnt = np.mean(scores[label]) > chance + POINT
        yield e if learnt else replace(e, outcome=Outcome.OPEN, detail="has not learnt")


@claim(
    "pooling", "Average pooling is best",
    where="App. F",
    measure="score of average pooling minus that of each other pooling of as many vectors, paired by seed",
    threshold="above 0 with its whole interval; not met if below 0 with its whole interval",
    rule=EVERYWHERE, needs=("ablation/vectors",),
)  # fmt: skip
def pooling(results: Results) -> Iterator[Evidence]:
    """With several scale vectors in a layer, pooling them by their average scores highest."""
    scores = _settings(results["ablation/vectors"])
    for count in dict.fromkeys(label.split()[0] for label in scores if " " in label):
        yield from _best({label: s for label, s in scores.items() if label.startswith(f"{count} ")}, f"{count} mean")


@claim(
    "initial-value", "Starting at 1 is best",
    where="App. E, initialisation",
    measure="score of starting at 1 minus that of each other start, paired by seed",
    threshold="above 0 with its whole interval; not met if below 0 with its whole interval",
    rule=EVERYWHERE, needs=("ablation/init_value",),
)  # fmt: skip
def init_value(results: Results) -> Iterator[Evidence]:
    """Scales that start at 1 score highest."""
    yield from _best(_settings(results["ablation/init_value"]), "1")


@claim(
    "z-range", "Trained scales stay in 0.98-1.02",
    where="App. E",
    measure="trained scales z of all layers",
    threshold=f"all within {Z_RANGE[0]:g} to {Z_RANGE[1]:g}; in part if the central 90 % are within that range",
    rule=SOMEWHERE, needs=("delta_weights",),
)  # fmt: skip
def z_range(results: Results) -> Iterator[Evidence]:
    """After training all scales lie between 0.98 and 1.02."""
    for row in results["delta_weights"].tables["methods"]:
        if "z q0" not in row:
            continue
        low, start, middle, end, high = (row[f"z {name}"] for name in ("q0", "q0.05", "q0.5", "q0.95", "q1"))
        all_inside, most_inside = (Z_RANGE[0] <= a and b <= Z_RANGE[1] for a, b in ((low, high), (start, end)))
        outcome = Outcome.MET if all_inside else Outcome.PARTLY if most_inside else Outcome.UNMET
        found = Quantity(f"median [lowest, highest], {row['method']}", middle, low, high)
        yield Evidence(found, outcome, Quantity("untrained", 1.0), f"central 90 % from {start:.4f} to {end:.4f}")


@claim(
    "table6", "Table 6: a full-rank change",
    where="Table 6",
    measure="rank of the change / full rank, median over matrices [lowest, highest]",
    threshold=f"at least {FULL_RANK:g} for every matrix; in part if only for the median",
    rule=SOMEWHERE, needs=("delta_weights",),
)  # fmt: skip
def delta_rank(results: Results) -> Iterator[Evidence]:
    """Propulsion changes a matrix by scaling its rows, W ∘ Z, and this change is not of low rank."""
    found = {m.left: quantity(m.left, m) for m in results["delta_weights"].metrics if m.name == "rank_share"}
    lora = next((q for name, q in found.items() if name.startswith("lora")), None)
    for q in (q for name, q in found.items() if name in (ALL, ATTN)):
        most = Outcome.PARTLY if q.value >= FULL_RANK else Outcome.UNMET
        yield Evidence(q, Outcome.MET if q.lower >= FULL_RANK else most, lora)


# --- shared ---------------------------------------------------------------------------------------------------------


def peft_methods(methods: Iterable[str]) -> list[str]:
    """The other parameter-efficient methods: all except Propulsion, full fine-tuning and the head alone."""
    return [name for name in methods if name not in ("full", "head") and not name.startswith("propulsion")]


def _compared(results: Results) -> Iterator[tuple[str, Result, str]]:
    """Yield the task, the result and the first metric of every comparison of methods."""
    for result in by_task(results, "method_comparison").values():
        for task in dict.fromkeys(row["task"] for row in result.tables["summary"]):
            yield task, result, next(m.name for m in result.metrics if m.stage == task)


def _best_of_ours(found: dict[str, Quantity], prefix: str = "") -> Iterator[Evidence]:
    """Evidence on the better of the paper's two variants, the one that favours the claim, against each rival."""
    variants = [q for name, q in found.items() if name in (ALL, ATTN)]
    if not variants:
        raise UserError(f"the result holds neither {ALL} nor {ATTN}")
    own = max(variants, key=lambda q: q.value)
    for rival in (found[name] for name in peft_methods(found)):
        outcome = above(own, rival) if own.has_interval and rival.has_interval else Outcome.OPEN
        yield Evidence(replace(own, label=f"{prefix}{own.label}"), outcome, rival)


def _settings(result: Result) -> dict[str, list[float]]:
    """Scores of all seeds by setting; 0 for a run that diverged."""
    return {row["setting"]: [score or 0.0 for score in row["scores"]] for row in result.tables["settings"]}


def _difference(label: str, own: list[float], other: list[float]) -> Quantity:
    """Mean over seeds of own - other, with Student's interval."""
    value, low, high = mean_interval(np.subtract(own, other).tolist())
    return Quantity(label, value, *(None if math.isnan(end) else end for end in (low, high)))


def _best(scores: dict[str, list[float]], own: str) -> Iterator[Evidence]:
    """Evidence that a setting scores above each other one, from the intervals of the paired differences."""
    for other in scores:
        if other == own:
            continue
        q, nothing = _difference(f"{own} minus {other}", scores[own], scores[other]), Quantity("no difference", 0.0)
        yield Evidence(q, above(q, nothing) if q.has_interval else Outcome.OPEN, nothing)
