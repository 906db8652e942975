"""The cells of `analyses.linearized_prediction`: predictions of kernels, and trained networks."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import concatenate_datasets
from torch import Tensor

import ntk
from analyses.linearized_prediction import predictors as predictions
from analyses.linearized_prediction.measures import (
    FLOW,
    HIDDEN,
    MAJORITY,
    REGRESSION,
    SIGN,
    START,
    WITH_HEAD,
)
from analyses.linearized_prediction.setting import Setting
from analyses.subjects.batch import model_inputs
from analyses.subjects.cost import memory_budget
from analyses.subjects.trained_methods import HEAD, Tangents, check_influence, tangents, with_head
from analyses.subjects.training_run import RunConfig, training_run
from propulsion.methods import Method
from propulsion.training import predict

_ANOTHER_ORDER = 1000  # Added to the seed when a network is trained again.


@dataclass(frozen=True)
class Start:
    """The model before training, its inputs (training rows of one seed, then held-out rows), and its outputs `f0`."""

    model: Any
    inputs: dict[str, Tensor]
    tangents: Tangents
    f0: Tensor


def start_of(setting: Setting, methods: Mapping[str, Method], size: int, seed: int) -> Start:
    """Load the model before training, with the tangents of every method and its outputs on all rows."""
    config, data, length = setting.config, setting.data, setting.config.training.max_length
    model, tokenizer = setting.load(seed)
    rows = concatenate_datasets([setting.rows(size, seed), data.validation])
    found = tangents(model, methods, task_type=setting.task_type, seed=seed, degree=data.task.degree)
    logits = predict(model, tokenizer, replace(data, validation=rows), max_length=length).double()
    inputs = model_inputs(rows, tokenizer, data.task, max_length=length, device=config.device)
    return Start(model, inputs, found, logits[:, 1] - logits[:, 0])


def _rows(kernel: Tensor, size: int, largest: int) -> Tensor:
    """The kernel ``(rows, rows)`` of the first `size` training rows and all new rows, from that of the largest set."""
    keep = torch.tensor([*range(size), *range(largest, len(kernel))])
    return kernel[keep][:, keep]


def kernel_cell(
    setting: Setting, *, methods: Mapping[str, Method], sizes: tuple[int, ...], seed: int
) -> dict[str, Any]:
    """Compute tangent kernels once over all rows, and their predictions at every size."""
    started, config = time.time(), setting.config
    largest = max(sizes)
    start = start_of(setting, methods, largest, seed)
    with memory_budget(config.memory_budget_gb, "--sizes, --n-test") as budget:
        pieces = ntk.adapter_kernels(
            start.model, start.inputs, start.tangents.methods, output=ntk.outputs.margin(), reduce="trace",
            memory_budget=budget, progress=True,
        )  # fmt: skip
    pieces = {name: kernel.cpu() for name, kernel in pieces.items()}
    check_influence(pieces)
    jobs = {(predictor, text): pieces[text] for predictor in (REGRESSION, FLOW) for text in methods}
    if HEAD in pieces:
        both = with_head(pieces, list(methods))
        jobs |= {(WITH_HEAD, text): both[text] for text in methods if text != HEAD}
        jobs[REGRESSION, HEAD] = pieces[HEAD]
    jobs[REGRESSION, HIDDEN] = ntk.hidden_state_kernel(start.model, start.inputs).detach().cpu()
    found, permuted, first = [], {}, next(iter(methods))
    for size in sizes:
        y, f0, chosen = setting.targets(size, seed), _first(start.f0, size, largest), {}
        for (predictor, name), kernel in jobs.items():
            function = predictions.flow if predictor == FLOW else predictions.regression
            f, chosen[predictor, name] = predictions.predict(function, _rows(kernel, size, largest), y, f0, seed=seed)
            found.append(_entry(size, predictor, name, f, chosen[predictor, name]))
        permuted[size] = predictions.permuted_predictions(
            _rows(pieces[first], size, largest), y, f0, chosen[REGRESSION, first], draws=config.permutations, seed=seed
        ).tolist()
        share = float((y > 0).double().mean())
        majority = torch.full((len(setting.data.validation),), 1.0 if share > 0.5 else -1.0, dtype=torch.float64)
        found.append(_entry(size, MAJORITY, "", majority, share))
        found.append(_entry(size, START, "", f0[size:], 0.0))
    return {
        "f0": start.f0[largest:].tolist(),
        "predictions": found,
        "permuted": permuted,
        "traces": {name: float(kernel.double().trace()) for name, kernel in pieces.items()},
        "seconds": time.time() - started,
    }


def _first(values: Tensor, size: int, largest: int) -> Tensor:
    return torch.cat([values[:size], values[largest:]])


def _entry(size: int, predictor: str, method: str, f: Tensor, strength: float) -> dict[str, Any]:
    return {"size": size, "predictor": predictor, "method": method, "f": f.tolist(), "strength": strength}


def sign_cell(setting: Setting, *, methods: Mapping[str, Method], sizes: tuple[int, ...], seed: int) -> dict[str, Any]:
    """Compute predictions of the sign-gradient kernels of all trained parameters, weighted by their learning rates."""
    started, config, largest = time.time(), setting.config, max(sizes)
    start = start_of(setting, methods, largest, seed)
    with memory_budget(config.memory_budget_gb, "--sign-limit, --n-test") as budget:
        pieces = ntk.sign_gradient_kernels(
            start.model, start.inputs, start.tangents.methods, output=ntk.outputs.margin(), memory_budget=budget,
            progress=True,
        )  # fmt: skip
    traced = {name: ntk.reduce_outputs(kernel, "trace").cpu() for name, kernel in pieces.items()}
    kernels = with_head(traced, list(methods), start.tangents.rates)
    found = []
    for size in sizes:
        y, f0 = setting.targets(size, seed), _first(start.f0, size, largest)
        for text, kernel in kernels.items():
            rows = _rows(kernel, size, largest)
            found.append(
                _entry(size, SIGN, text, *predictions.predict(predictions.sign_regression, rows, y, f0, seed=seed))
            )
    return {"predictions": found, "seconds": time.time() - started}


def training_cell(
    setting: Setting, *, method: Method, factor: float, size: int, seed: int, again: bool
) -> dict[str, Any]:
    """Train a network by a method on the training rows, from the model that the kernels are of."""
    config = setting.config
    run_config = RunConfig(training=config.training, device=config.device)
    data = replace(setting.data, train=setting.rows(size, seed))
    found = training_run(
        run_config, data, method, seed=seed + (_ANOTHER_ORDER if again else 0),
        rate_multiplier=factor, keep_logits=True, load=lambda: setting.load(seed),
        task_type=setting.task_type,
    )  # fmt: skip
    logits, kept = found["logits"], ("scores", "learning_rates", "seconds_per_step", "trained_parameters")
    return {name: found[name] for name in kept} | {
        "f": (logits[:, 1] - logits[:, 0]).tolist(),
        "last_loss": float(np.mean(found["losses"][-10:])),
    }
