"""A trial: a short run of one candidate on part of the training rows, its measurements, and the evidence they make."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from analyses.choose.evidence import FULL, Start, features_of, kernel_rows, kernel_when_trained, mean_of_last
from analyses.choose.predictors import Evidence
from analyses.core.cells import ARRAYS
from analyses.subjects.batch import labels_of
from analyses.subjects.training_run import RunConfig, training_run
from propulsion.data import TaskData
from propulsion.errors import Diverged, UserError
from propulsion.methods import Method

_KEPT = (
    "scores",
    "validation_loss",
    "losses",
    "trained_parameters",
    "learning_rates",
    "seconds_per_step",
    "peak_bytes",
)


def trial(
    config: RunConfig, part: TaskData, method: Method, *, seed: int, steps: int, rates: Mapping[str, float] | None,
    first: bool, kernel: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Train a candidate for some steps, and measure it.

    Args:
        config: Options of the run.
        part: The rows to train on, and as validation rows the held-out ones (`tuning_split`).
        method: The candidate.
        seed: Seed of the run.
        steps: Optimizer steps.
        rates: Learning rates by role, as an earlier trial returned them; None for those of the configuration.
        first: Whether to measure the gradient at the start and the features after training.
        kernel: Number of training rows of the kernel after training; 0 for none.

    Returns:
        "failed", why the candidate cannot be trained, or ""; "seconds"; unless it failed, what `training_run` returns,
        with `gradient_norm`, `decrement` and `trained` of a first trial, and under `ARRAYS` the logits of the held-out
        rows and what was asked for of "features" and "kernel".
    """
    started = time.perf_counter()
    training = replace(config.training, max_steps=steps)
    if rates is not None:
        training = replace(training, rate_multiplier=1.0, **numbers(rates))
    run = replace(config, training=training)
    start = None
    if first:
        start = Start(part, config.start(part, seed=seed)[1], training.max_length)
    try:
        found = training_run(run, part, method, seed=seed, keep_model=True, keep_logits=True,
                             callbacks=[] if start is None else [start])  # fmt: skip
    except (Diverged, UserError) as error:  # Rows and model are checked already: the method does not go with them.
        return {"failed": str(error), "seconds": time.perf_counter() - started}
    arrays = {"logits": found["logits"]}
    measured: dict[str, Any] = {}
    if start is not None:
        seen = features_of(found["model"], found["tokenizer"], part, part.validation, training.max_length)
        arrays |= {} if seen is None else {"features": seen[0]}
        slopes = {role: rate * start.slopes.get(role, 0.0) for role, rate in found["learning_rates"].items()}
        measured = {"gradient_norm": start.norm, "decrement": sum(slopes.values()), "trained": start.trained}
    if kernel:
        rows = kernel_rows(config, part, found["tokenizer"], kernel)
        after = kernel_when_trained(found["model"], rows)
        arrays |= {} if after is None else {"kernel": after.cpu().numpy()}
    seconds = time.perf_counter() - started
    return {"failed": "", "seconds": seconds, ARRAYS: arrays} | measured | {name: found[name] for name in _KEPT}


def numbers(rates: Mapping[str, float]) -> dict[str, float]:
    """The learning rates of the roles as training options: that of the head, and that of all else."""
    options = {"head_learning_rate" if role == "head" else "learning_rate": rate for role, rate in rates.items()}
    body = options.get("learning_rate", options.get("head_learning_rate"))
    return {} if body is None else {"learning_rate": body} | options


def score_and_loss(trained: Mapping[str, Any]) -> tuple[float, float]:
    """The first score and the loss on the held-out rows of a trial that did not fail; NaN where undefined."""
    score, loss = next(iter(trained["scores"].values())), trained["validation_loss"]
    return (np.nan if score is None else score, np.nan if loss is None else loss)


def evidence_of(
    part: TaskData, first: Mapping[str, Any], kernels: Mapping[str, np.ndarray], candidate: str
) -> Evidence:  # fmt: skip
    """What is known of a candidate after its first trial.

    Args:
        part: The rows of the trial.
        first: The first trial.
        kernels: Arrays of `analyses.choose.evidence.kernels_of`; empty if they are not known.
        candidate: Its name among the kernels.
    """

    def kernel(of: str) -> torch.Tensor | None:
        found = kernels.get(f"kernel.{of}")
        return None if found is None else torch.from_numpy(found)

    score, loss = score_and_loss(first)
    return Evidence(
        trained_parameters=first["trained_parameters"], gradient_norm=first["gradient_norm"],
        decrement=first["decrement"], score=score, loss=loss, training_loss=mean_of_last(first["losses"]),
        features=first[ARRAYS].get("features"), held_out=labels_of(part), kernel=kernel(candidate), full=kernel(FULL),
        outputs=kernels.get("outputs"), labels=kernels.get("labels"), regression=part.task.is_regression,
    )  # fmt: skip
