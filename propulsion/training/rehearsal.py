"""A check of training options before data is read, by one step of a tiny model."""

import copy
import tempfile
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from propulsion.errors import UserError, first_line
from propulsion.training.trainer import adamw, isolated_randomness

# What needs the real model or rows, writes files, or takes long.
_LEFT_OUT: dict[str, Any] = {
    "max_steps": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "eval_strategy": "no",
    "save_strategy": "no", "logging_strategy": "no", "load_best_model_at_end": False, "eval_on_start": False,
    "report_to": [], "disable_tqdm": True, "torch_compile": False, "gradient_checkpointing": False,
    "activation_checkpointing": False, "neftune_noise_alpha": None, "train_sampling_strategy": "random",
    "push_to_hub": False, "label_smoothing_factor": 0.0,
}  # fmt: skip

_STEPS = 1000  # Length of the schedule; some schedules divide by the number of steps after the warm-up.


def rehearse(arguments: TrainingArguments) -> None:
    """Train a linear model of four weights for one step with the arguments of a run.

    Raises:
        UserError: The arguments cannot be used.
    """
    if arguments.push_to_hub:
        try:
            HfApi(token=arguments.hub_token).whoami()
        except Exception as error:  # Errors of the network, of the hub, or of its offline mode.
            raise UserError(f"push_to_hub cannot be used here: {first_line(error)}") from error
    if arguments.world_size > 1 or arguments.deepspeed:
        return  # The processes would wait for each other.
    tiny = copy.copy(arguments)
    for name, value in _LEFT_OUT.items():
        setattr(tiny, name, value)
    rows = [{"x": torch.ones(2), "labels": torch.tensor(0)}]
    try:
        with isolated_randomness(), tempfile.TemporaryDirectory() as folder:
            tiny.output_dir = folder
            model = _Tiny()
            trainer = _Rehearsal(model, tiny, train_dataset=rows)  # pyright: ignore[reportArgumentType]
            trainer.create_optimizer_and_scheduler(num_training_steps=_STEPS)
            trainer.current_gradient_accumulation_steps = 1
            # Not `train`, which also collects garbage, and that takes longer than all the rest.
            trainer.training_step(model, next(iter(trainer.get_train_dataloader())))
            trainer.optimizer.step()
    except Exception as error:
        raise UserError(f"these training options cannot be used: {first_line(error)}") from error


class _Rehearsal(Trainer):
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        assert self.model is not None
        groups = [{"params": list(self.model.parameters()), "lr": 1e-3, "weight_decay": self.args.weight_decay}]
        self.optimizer = adamw(groups, self.args)
        return self.optimizer


class _Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layer(x)
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return loss | {"logits": logits}
