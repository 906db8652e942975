"""The paper's claims on training, each with its judge: parameters, cost, speed and scores."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from analyses.claims.claim import (
    EVERYWHERE,
    LAYER,
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
from analyses.claims.learnt import COMPARISONS, if_learnt
from analyses.claims.paired import decided, paired
from analyses.core.intervals import p_value
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
LEARNT_RUNS = "Runs in which full fine-tuning has learnt the task, on a model of the paper's size."
"""What would settle claims on trained models."""


def short(method: str) -> str:
    """A method's name in labels: All and Attn for Propulsion's two variants."""
    return {ALL: "All", ATTN: "Attn"}.get(method, method)


# --- parameters and cost --------------------------------------------------------------------------------------------


@claim(
    "parameter-pair", "355.3M parameters to 0.086M",
    where="Abstract",
    measure="parameters that Propulsion trains in the model of 355.3 million, with the paper's choice of layers",
    threshold=f"0.086 million within {ROUNDING:.1%}; in part within a factor of {NEARLY:g}",
    rule=EVERYWHERE, needs=("parameter_count",),
    settle="It is settled: parameters are counted.", plan_command="",
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
    note = f"the abstract's count is that of {', '.join(named) or 'no model'}"
    yield Evidence(found, outcome, null, note, model=model["model"])


@claim(
    "fewer-than-lora", "Ten times fewer than LoRA",
    where="Abstract and Sec. 1",
    measure="parameters of LoRA / parameters of Propulsion, without heads",
    threshold=f"at least {TIMES_FEWER:g}",
    rule=SOMEWHERE, needs=("complexity",), also=("method_comparison/*",),
    settle="It is settled: parameters are counted.", plan_command="",
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
        model = LAYER if q is ratios[0] else ""
        yield Evidence(q, at_least(q, TIMES_FEWER), Quantity("the same number", 1.0), model=model)


@claim(
    "table4", "Table 4: least space and time",
    where="Sec. 5, Table 4",
    measure="counted parameters, and time of a forward and backward pass relative to the frozen layer's",
    threshold="no more than the best other adapter; counted parameters equal those of the formulas",
    rule=SOMEWHERE, needs=("complexity",),
    settle="Parameters are settled; times want an accelerator.", plan_command="--data-dir glue",
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
        yield Evidence(Quantity(words, own[name]), Outcome.MET if met else Outcome.UNMET, null, detail, model=LAYER)


@claim(
    "memory", "Figure 4: least memory",
    where="Sec. 5, Figure 4",
    measure="peak memory of another adapter / peak memory of Propulsion, medians over rounds [lowest, highest]",
    threshold=f"at least {SAVING:g} in all rounds; in part if above 1 in all rounds",
    rule=SOMEWHERE, needs=("memory",),
    settle="The same runs on a GPU, on a model of the paper's size.",
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
    measure="score averaged over the steps, of All and of Attn, minus that of each other adapter, paired by seed",
    threshold="above 0",
    rule=EVERYWHERE, needs=("convergence",), also=(COMPARISONS,),
    settle=LEARNT_RUNS,
)  # fmt: skip
def convergence(results: Results) -> Iterator[Evidence]:
    """Propulsion converges faster than the other adapters."""
    result = results["convergence"]
    scores = {name.removeprefix("scores."): array.mean(axis=1).tolist() for name, array in result.arrays.items()
              if name.startswith("scores.")}  # fmt: skip
    own, task = _variants(scores), str(result.dataset.get("name"))
    for left in own:
        for right in peft_methods(scores):
            label = f"{short(left)} minus {right}"
            yield if_learnt(
                paired(label, scores[left], scores[right], str(result.dataset.get("metric", ""))), results, task
            )


# --- scores ---------------------------------------------------------------------------------------------------------


@claim(
    "on-par", "On par with full fine-tuning",
    where="Sec. 4, GLUE",
    measure="score of Propulsion (All) minus that of full fine-tuning, paired by seed and row",
    threshold=f"at least -{POINT:g}",
    rule=SOMEWHERE, needs=(COMPARISONS,), settle=LEARNT_RUNS,
)  # fmt: skip
def on_par(results: Results) -> Iterator[Evidence]:
    """Propulsion scores as well as full fine-tuning."""
    for task, result, metric in _compared(results):
        e = _of_comparison(result, task, metric, ALL, "full", f"{task}, {metric}", -POINT)
        of_head = result.metric(metric, stage=f"{task}, difference", left="head", right="full")
        null = quantity("the head alone", of_head)
        full = quantity("full", result.metric(metric, stage=task, left="full"))
        yield if_learnt(replace(e, null=null, detail=f"full {full}"), results, task)


@claim(
    "best-adapter", "Better than other adapters",
    where="Sec. 4",
    measure="score of All, and of Attn, minus that of each other adapter, paired by seed and row",
    threshold="above 0",
    rule=EVERYWHERE, needs=(COMPARISONS,), settle=LEARNT_RUNS,
)  # fmt: skip
def best_adapter(results: Results) -> Iterator[Evidence]:
    """Propulsion scores higher than the other parameter-efficient methods."""
    for task, result, metric in _compared(results):
        methods = [row["method"] for row in result.tables["summary"] if row["task"] == task]
        for left in _variants(methods):
            for right in peft_methods(methods):
                label = f"{task}, {short(left)} minus {right}"
                yield if_learnt(_of_comparison(result, task, metric, left, right, label, 0.0), results, task)


@claim(
    "large-models", "The same on 7B to 13B models",
    where="Sec. 4, reasoning tasks",
    measure="accuracy of generated answers after tuning",
    threshold="above that of the untuned model, on one of these models (not testable on any other)",
    rule=EVERYWHERE, needs=("instruction_tuning",),
    settle="A run on one of the named models, which need a GPU.",
    plan_command="--data-dir glue --language-model LLAMA_7B",
)  # fmt: skip
def large_models(results: Results) -> Iterator[Evidence]:
    """Propulsion also tunes BLOOMz-7B, GPT-J-6B, LLaMA-7B and LLaMA-13B."""
    result = results["instruction_tuning"]
    scores = {m.left: quantity(m.left, m) for m in result.metrics if (m.name, m.stage) == ("accuracy", "trained")}
    name, untuned = result.model["name"], scores["none"]
    own = next(q for label, q in scores.items() if label.startswith("propulsion"))
    asked = any(word in name.lower() for word in ("bloomz-7b", "gpt-j-6b", "llama-7b", "llama-13b"))
    found = replace(own, label=f"{result.dataset['name']}, {name}")
    outcome = above(own, untuned) if asked else Outcome.UNTESTABLE
    yield Evidence(found, outcome, replace(untuned, label="untuned"), model=name.partition(".")[0])


# --- shared ---------------------------------------------------------------------------------------------------------


def peft_methods(methods: Iterable[str]) -> list[str]:
    """The other parameter-efficient methods: all except Propulsion, full fine-tuning and the head alone."""
    return [name for name in methods if name not in ("full", "head") and not name.startswith("propulsion")]


def _compared(results: Results) -> Iterator[tuple[str, Result, str]]:
    """Yield the task, the result and the first metric of every comparison of methods."""
    for result in by_task(results, "method_comparison").values():
        for task in dict.fromkeys(row["task"] for row in result.tables["summary"]):
            yield task, result, next(m.name for m in result.metrics if m.stage == task)


def _variants(methods: Iterable[str]) -> list[str]:
    """The paper's two variants of Propulsion among methods.

    Raises:
        UserError: There is neither.
    """
    found = [name for name in methods if name in (ALL, ATTN)]
    if not found:
        raise UserError(f"the result holds neither {ALL} nor {ATTN}")
    return found


def _of_comparison(result: Result, task: str, metric: str, left: str, right: str, label: str, limit: float) -> Evidence:
    """Evidence on a stored paired difference of two methods: above a limit, or at it."""
    found = quantity(label, result.metric(metric, stage=f"{task}, difference", left=left, right=right))
    key = (task, metric, left, right)
    row = next((row for row in result.tables.get("comparisons", [])
                if (row["task"], row["metric"], row["left"], row["right"]) == key), None)  # fmt: skip
    p = None
    if row is not None and row["error"] is not None:
        p = p_value(found.value, row["error"], math.inf if row["degrees"] is None else row["degrees"], limit)
    return Evidence(found, decided(found, limit), Quantity("no difference", 0.0), p=p)
