"""Training and evaluating a classifier or regressor, whole or through any peft adapter."""

import contextlib
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float
from peft import PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from propulsion.config import PropulsionConfig
from propulsion.data import TaskData, tokenize
from propulsion.errors import UserError, one_line
from propulsion.optim import Rates, parameter_groups
from propulsion.tasks import METRICS


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained: AdamW with a warm-up and a schedule."""

    steps: int = 200
    """Optimizer steps."""
    batch_size: int = 16
    """Examples per step."""
    learning_rate: float | None = None
    """Learning rate of the weights or the adapter; by default the rule of propulsion.optim."""
    head_learning_rate: float | None = None
    """Learning rate of the head; by default the rule of propulsion.optim."""
    rate_multiplier: float = 1.0
    """Factor on every learning rate that is not given."""
    warmup_ratio: float = 0.06
    """Share of the steps over which the learning rate rises from 0."""
    schedule: str = "linear"
    """Schedule after the warm-up, such as linear, cosine or constant_with_warmup."""
    weight_decay: float = 0.01
    """Weight decay of matrices; biases, norms and Propulsion's scales have none."""
    max_grad_norm: float = 1.0
    """Gradients longer than this, all parameters together, are shortened to it; 0 for no limit."""
    max_length: int | None = None
    """Cut examples to this many tokens; without it, longer ones than the model takes are an error."""
    seed: int = 0
    """Seed of every random draw: the head, the rows drawn, the data order, dropout."""

    def __post_init__(self) -> None:
        checks = {
            "steps": self.steps >= 1,
            "batch_size": self.batch_size >= 1,
            "learning_rate": self.learning_rate is None or 0 < self.learning_rate < float("inf"),
            "head_learning_rate": self.head_learning_rate is None or 0 < self.head_learning_rate < float("inf"),
            "rate_multiplier": 0 < self.rate_multiplier < float("inf"),
            "warmup_ratio": 0 <= self.warmup_ratio < 1,
            "weight_decay": self.weight_decay >= 0,
            "max_grad_norm": self.max_grad_norm >= 0,
            "seed": 0 <= self.seed < 2**32,
        }
        for name, good in checks.items():
            if not good:
                raise UserError(f"{name} is {getattr(self, name)}, which is out of range")


@dataclass(frozen=True)
class TrainingResult:
    """What a training run did.

    Attributes:
        losses: Loss of each step's batch, before the step.
        seconds: Wall time.
        trained_parameters: Number of parameters trained.
        learning_rates: Peak learning rate of each role trained (see `propulsion.optim`).
    """

    losses: tuple[float, ...]
    seconds: float
    trained_parameters: int
    learning_rates: dict[str, float]


def apply_propulsion(
    model: PreTrainedModel, *, degree: float, positions: Sequence[str] = ("all",), train_head: bool = True
) -> PeftModel:
    """Freeze a classifier and give it scale vectors to train, in place.

    Args:
        model: A classifier or regressor.
        degree: Exponent k of the scales.
        positions: Which layers carry a scale vector, as in `PropulsionConfig`.
        train_head: Whether the head is trained too. It starts at random, so without it the scales must fit a random
            readout.

    Raises:
        UserError: If the degree or a position cannot be used on this model.
    """
    # The task type is what makes peft train, and save, the head beside the adapter.
    task_type = TaskType.SEQ_CLS if train_head else None
    try:
        config = PropulsionConfig(degree=degree, positions=list(positions), task_type=task_type)
        return get_peft_model(model, config)  # pyright: ignore[reportReturnType]
    except ValueError as error:
        raise UserError(one_line(error)) from error


def train(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TaskData,
    config: TrainingConfig,
    *,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingResult:
    """Train, in place, the parameters that require gradients. Writes no file.

    The same seed gives bit-equal weights on the CPU with the same number of threads. The model's mode and the global
    random states are left as they were.

    Raises:
        UserError: If nothing is trainable, an example is too long, or the loss or a weight stops being finite.
    """
    examples = tokenize(data.train, tokenizer, data.task, config.max_length)
    rates = Rates(config.learning_rate, config.head_learning_rate, config.rate_multiplier)
    groups = parameter_groups(model, rates=rates, weight_decay=config.weight_decay)
    if not groups:
        raise UserError("the model has no trainable parameter: every requires_grad is False")
    peaks = {group["role"]: group["lr"] for group in groups}
    trained = sum(parameter.numel() for group in groups for parameter in group["params"])
    mode, start = model.training, time.perf_counter()
    with (
        _isolated_randomness(),
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=config.steps, desc="training", unit="step", disable=None if progress else True) as bar,
    ):
        trainer = _Trainer(
            model=model,
            args=_arguments(model, config, folder),
            train_dataset=examples,
            data_collator=DataCollatorWithPadding(tokenizer),
            optimizers=(torch.optim.AdamW(groups), None),
            bar=bar,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    _check_finite(model)
    model.zero_grad(set_to_none=True)
    model.train(mode)
    return TrainingResult(tuple(trainer.losses), time.perf_counter() - start, trained, peaks)


def evaluate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TaskData,
    *,
    max_length: int | None = None,
    batch_size: int = 64,
) -> dict[str, float]:
    """Return the task's metrics on the validation rows."""
    outputs = predict(model, tokenizer, data, max_length=max_length, batch_size=batch_size)
    scores = outputs.double().numpy()
    predictions = scores[:, 0] if data.task.is_regression else scores.argmax(axis=1)
    labels = np.asarray(data.validation["label"])
    return {name: METRICS[name](predictions, labels) for name in data.task.metrics}


@torch.no_grad()
def predict(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TaskData,
    *,
    max_length: int | None = None,
    batch_size: int = 64,
) -> Float[Tensor, "n c"]:
    """Return the logits, or the regression output, of the validation rows, without dropout and on the CPU."""
    rows = tokenize(data.validation, tokenizer, data.task, max_length).remove_columns("labels")
    mode = model.training
    model.eval()
    try:
        loader = _loader(rows, tokenizer, batch_size)
        return torch.cat([model(**batch.to(model.device)).logits.cpu() for batch in loader])
    finally:
        model.train(mode)


def _loader(rows: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> DataLoader[Any]:
    collate = DataCollatorWithPadding(tokenizer)
    # A generator of its own: without one a loader, even an unshuffled one, draws from the global one.
    generator = torch.Generator()
    return DataLoader(rows, batch_size=batch_size, collate_fn=collate, generator=generator)  # pyright: ignore[reportArgumentType]


class _Trainer(Trainer):
    """The Hugging Face loop, recording every loss and stopping at the first that is not finite."""

    def __init__(self, *args: Any, bar: tqdm, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []
        self._bar = bar

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        value = float(loss)
        self.losses.append(value)
        if not np.isfinite(value):
            raise UserError(f"training diverged: the loss is {value} at step {len(self.losses)}; {_REMEDY}")
        self._bar.set_postfix(loss=f"{value:.3f}", refresh=False)
        self._bar.update()
        return loss


_REMEDY = "lower the learning rate, or raise warmup_ratio"


def _arguments(model: PreTrainedModel | PeftModel, config: TrainingConfig, folder: str) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        warmup_steps=config.warmup_ratio,
        lr_scheduler_type=config.schedule,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=model.device.type != "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # Else the trainer would split over all devices and multiply the batch size.
    return arguments


def _check_finite(model: nn.Module) -> None:
    # The last step's damage shows in no loss.
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise UserError(f"training diverged: {name} is no longer finite at the last step; {_REMEDY}")


@contextlib.contextmanager
def _isolated_randomness() -> Iterator[None]:
    """Give back the global random states, which the trainer seeds for dropout and the data order."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
