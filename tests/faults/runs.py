"""Tiny training runs of which every part is compared: weights, metrics, history, predictions, number of steps."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from propulsion.train import TrainConfig
from propulsion.training.run_folder import MODEL, PREDICTIONS, RESULT

CASES: dict[str, dict[str, Any]] = {
    "linear": {},
    "constant": {"lr_scheduler_type": "constant", "max_steps": 7},
    "cosine": {"lr_scheduler_type": "cosine"},
    "polynomial": {"lr_scheduler_type": "polynomial"},
    "inverse square root": {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 2},
    "cosine with restarts": {"lr_scheduler_type": "cosine_with_restarts"},
    "cosine with a least rate": {
        "lr_scheduler_type": "cosine_with_min_lr", "training_options": ('lr_scheduler_kwargs={"min_lr": 1e-4}',),
    },
    "warm-up, stable, decay": {
        "lr_scheduler_type": "warmup_stable_decay", "training_options": ('lr_scheduler_kwargs={"num_decay_steps": 3}',),
    },
    "rate reduced on a plateau": {
        "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1, "warmup_steps": 0,
        "training_options": ('lr_scheduler_kwargs={"mode": "max", "patience": 0}',),
    },
    "part of an epoch": {"max_steps": -1, "num_train_epochs": 1.5},
    "saved by epochs": {"max_steps": -1, "num_train_epochs": 2.5, "save_strategy": "epoch", "eval_strategy": "epoch"},
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "max_steps": 5},
    "similar lengths": {"train_sampling_strategy": "group_by_length"},
    "best model": {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True},
    "early stopping": {
        "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "early_stopping_patience": 3,
        "learning_rate": 1e-12, "head_learning_rate": 1e-12, "max_steps": 12,
    },
    "evaluated at the start": {"eval_strategy": "steps", "eval_steps": 3, "training_options": ("eval_on_start=true",)},
    "no logs": {"logging_steps": 1000},
    "AdaLoRA": {
        "method": "adalora", "degree": None, "save_steps": 2,
        "method_options": ("init_r=4", "target_r=2", "tinit=1", "tfinal=2", "deltaT=1"),
    },
    "all weights": {"method": "full", "degree": None},
}  # fmt: skip
"""Changes of the configuration, by what they are about."""


def configuration(model: Path, output: Path, case: str = "linear", **changes: Any) -> TrainConfig:
    """Eight steps, two epochs, with a checkpoint every four steps and a log every three; the model has dropout."""
    options = {
        "model": str(model), "degree": 3, "max_steps": 8, "max_train_samples": 16, "max_eval_samples": 8,
        "save_steps": 4, "logging_steps": 3, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True,
        "learning_rate": 0.02, "head_learning_rate": 0.01, "seed": 3, "output_dir": output,
    }  # fmt: skip
    return TrainConfig(**(options | CASES[case] | changes))


def outcome(output: Path) -> dict[str, Any]:
    """All that a finished run holds, apart from times and its own path."""
    result = json.loads((output / RESULT).read_text())
    history = [{k: v for k, v in entry.items() if not _is_time(k)} for entry in result.pop("history")]
    kept = {name: value for name, value in result.items() if name not in ("seconds", "output_dir")}
    return kept | {"history": history, "predictions": json.loads((output / PREDICTIONS).read_text())}


def _is_time(name: str) -> bool:
    return "runtime" in name or "per_second" in name


def differences(output: Path, expected: Path) -> list[str]:
    """The names of what differs between two finished runs; empty if they are the same, bit for bit."""
    one, other = outcome(output), outcome(expected)
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    for file in (path.name for path in (expected / MODEL).glob("*.safetensors")):
        found, wanted = load_file(output / MODEL / file), load_file(expected / MODEL / file)
        same = found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
        names += [] if same else [file]
    return names


class Killed(BaseException):
    """Nothing catches it."""


def fail_at(patch, owner, function, call, error=Killed):
    """Make one call of a function, counted from 1, raise an error."""
    original, calls = getattr(owner, function), []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise error
        return original(*args, **kwargs)

    patch.setattr(owner, function, failing)
