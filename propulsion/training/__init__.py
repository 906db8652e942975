"""Training: options, learning rates, the training loop, checkpoints, and the folder of a run."""

from propulsion.training.config import TrainConfig, TrainingOptions
from propulsion.training.fit import TrainingResult, apply_propulsion, evaluate, predict, train
from propulsion.training.learning_rates import Rates, parameter_groups

TrainingConfig = TrainingOptions
"""The former name of `TrainingOptions`."""

__all__ = [
    "Rates", "TrainConfig", "TrainingConfig", "TrainingOptions", "TrainingResult", "apply_propulsion", "evaluate",
    "parameter_groups", "predict", "train",
]  # fmt: skip
