"""The cells and the result of the analysis: predictions and trained networks, over sizes, methods and seeds."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from analyses.core.analysis import Analysis, Findings, Runs
from analyses.core.cells import Cells
from analyses.core.scales import bounded_mean, scale_of
from analyses.linearized_prediction.cells import kernel_cell, sign_cell, training_cell
from analyses.linearized_prediction.measures import (
    FLOW,
    MAJORITY,
    REGRESSION,
    SIGN,
    START,
    WITH_HEAD,
    Outcome,
    measures,
)
from analyses.linearized_prediction.setting import Config, Setting, setting_of
from analyses.linearized_prediction.tables import summary
from analyses.records import Metric
from analyses.subjects.batch import labels_of
from analyses.subjects.learning_rates import check_origin
from propulsion.identity import model_content
from propulsion.pretrained import fingerprint, pooling_of


def find(config: Config, runs: Runs) -> Findings | None:
    """Compute the missing cells and summarise all; None if some are still missing."""
    setting = setting_of(config)
    model, tokenizer = setting.load(0)
    identity = {
        "name": config.readout.name_of(config.model), "head": config.readout.head,
        "pooling": None if config.readout.in_words else pooling_of(model), "fingerprint": fingerprint(model),
    }  # fmt: skip
    check_origin(config.comparison, setting.data, lambda: identity)
    cells = runs.of(setting.data, model_content(model, tokenizer))
    outcomes = [outcome for seed in config.seeds for outcome in _outcomes(setting, cells, seed)]
    return None if runs.missing else _summarised(setting, outcomes, identity)


def _outcomes(setting: Setting, shared: Cells, seed: int) -> list[Outcome]:
    """One outcome for each size; empty if a cell of this seed is missing."""
    config = setting.config
    small = tuple(size for size in config.sizes if size <= config.sign_limit)
    which = {"methods": setting.methods, "seed": seed}
    cells = [shared.cell(f"kernels.seed{seed}", partial(kernel_cell, setting), sizes=config.sizes, **which)]
    if small:
        cells.append(shared.cell(f"sign-kernels.seed{seed}", partial(sign_cell, setting), sizes=small, **which))
    trained: dict[tuple[str, int, bool], dict[str, Any] | None] = {}
    for size in config.sizes if config.train else ():
        for text in config.methods:
            for again in (False, True) if text in config.again else (False,):
                factor = setting.factors[text]
                name = f"trained.{text}.x{factor:.3g}.n{size}{'.again' if again else ''}.seed{seed}"
                trained[text, size, again] = shared.cell(
                    name, partial(training_cell, setting), method=setting.methods[text], factor=factor, size=size,
                    seed=seed, again=again,
                )  # fmt: skip
    if any(cell is None for cell in (*cells, *trained.values())):
        return []
    return [_outcome(setting, size, seed, [c for c in cells if c is not None], trained) for size in config.sizes]


def _outcome(setting: Setting, size: int, seed: int, cells: list[dict[str, Any]], trained: Mapping) -> Outcome:
    kernels = cells[0]
    found = [entry for cell in cells for entry in cell["predictions"] if entry["size"] == size]
    return Outcome(
        size=size,
        seed=seed,
        labels=labels_of(setting.data),
        f0=np.asarray(kernels["f0"]),
        kernel={(e["predictor"], e["method"]): np.asarray(e["f"]) for e in found},
        strengths={(e["predictor"], e["method"]): e["strength"] for e in found},
        permuted=np.asarray(kernels["permuted"][str(size)]),
        trained={t: np.asarray(c["f"]) for (t, n, again), c in trained.items() if n == size and not again},
        again={t: np.asarray(c["f"]) for (t, n, again), c in trained.items() if n == size and again},
        losses={t: c["last_loss"] for (t, n, again), c in trained.items() if n == size and not again},
    )


def _summarised(setting: Setting, outcomes: list[Outcome], identity: dict[str, Any]) -> Findings:
    config = setting.config
    values: dict[tuple[str, str, str, str], list[float]] = {}
    for outcome in outcomes:
        for key, value in measures(outcome, config.methods, setting.data.task.name).items():
            values.setdefault((*key, f"n={outcome.size}"), []).append(value)
    metrics = []
    for (name, left, right, stage), sample in values.items():
        scale = scale_of(setting.data.task.metrics[0] if name == "score" else name)
        metrics.append(Metric(name, *bounded_mean(sample, scale), "", stage, left, right))
    strengths = [
        {"size": o.size, "seed": o.seed, "predictor": predictor, "method": method, "strength": strength}
        for o in outcomes
        for (predictor, method), strength in o.strengths.items()
        if predictor not in (MAJORITY, START)
    ]
    arrays = {"labels": outcomes[0].labels}
    for o in outcomes:
        arrays[f"f0.seed{o.seed}"] = o.f0
        key = f"n={o.size}.seed{o.seed}"
        arrays |= {f"kernel.{predictor}.{method}.{key}": f for (predictor, method), f in o.kernel.items()}
        arrays |= {f"trained.{method}.{key}": f for method, f in o.trained.items()}
        arrays |= {f"again.{method}.{key}": f for method, f in o.again.items()}
    return Findings(
        metrics=metrics,
        tables={
            "methods": [{"method": text, "rate_factor": setting.factors[text]} for text in config.methods],
            "sizes": [{"size": size} for size in config.sizes],
            "strengths": strengths,
            "losses": [{"size": o.size, "seed": o.seed, "method": t, "last_loss": v}
                       for o in outcomes for t, v in o.losses.items()],
        },
        arrays=arrays, model=identity,
        dataset={"name": config.task, "task": config.task, "metric": setting.data.task.metrics[0],
                 "source": setting.data.source.rsplit("/", 1)[-1], "fingerprint": setting.data.fingerprint},
        coverage=_coverage(setting),
    )  # fmt: skip


def _coverage(setting: Setting) -> dict[str, str]:
    """A description, for each predictor, of the parameters that it covers, or the reason why it was left out."""
    config = setting.config
    headed = not config.readout.in_words
    body = (
        "what the method trains in the backbone, without the head"
        if headed
        else "all that the method trains; adapters leave the readout of the vocabulary alone"
    )
    found = {
        REGRESSION: f"{body}; ridge chosen on folds of the training rows",
        FLOW: f"{body}; squared loss, stopped at a time chosen on folds of the training rows",
        SIGN: "all that is trained, each parameter weighed by its learning rate; "
        f"training sets of at most {config.sign_limit} rows",
        "trained": "networks trained by AdamW on cross-entropy, head included" if headed else
        "networks trained by AdamW on the cross-entropy of the label words",
    }  # fmt: skip
    if headed:
        found[WITH_HEAD] = "all that is trained, the head included, at equal learning rates"
    if not config.train:
        found["trained"] = "left out: no network was trained (--no-train)"
    if not any(size <= config.sign_limit for size in config.sizes):
        found[SIGN] = "left out: every size is above --sign-limit"
    return found


ANALYSIS = Analysis(
    "linearized_prediction", Config, find, summary,
    least={"sizes": 4, "permutations": 1, "n_test": 1, "sign_limit": 0},
    above={"memory_budget_gb": 0},
    # The methods, sizes, seed and factor of a cell are its own, as are the rows and the model.
    free=("data_dir", "model", "methods", "again", "sizes", "seeds", "train", "sign_limit", "comparison",
          "memory_budget_gb"),
    about=lambda config: f"intervals: 95 %, Student's over {len(config.seeds)} seeds",
)  # fmt: skip
run = ANALYSIS.run
