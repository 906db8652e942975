"""Training and evaluation of a classifier or regressor, in full or with any peft adapter, without a run folder."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from peft import PeftModel, TaskType, get_peft_model
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from propulsion.config import PropulsionConfig
from propulsion.data import TaskData, check_inputs
from propulsion.data.kinds import Limits, kind_of
from propulsion.data.kinds.base import columns_of
from propulsion.data.kinds.classification import logits
from propulsion.errors import UserError, one_line
from propulsion.methods import virtual_tokens
from propulsion.training.config import TrainingOptions, training_arguments
from propulsion.training.learning_rates import Rates, model_degree, parameter_groups
from propulsion.training.measured_rates import with_measured
from propulsion.training.trainer import TaskTrainer, isolated_randomness


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training run.

    Attributes:
        losses: Loss of each step's batch, before the step.
        seconds: Wall time.
        trained_parameters: Number of parameters trained.
        learning_rates: Peak learning rate of each trained role (`propulsion.training.learning_rates`).
        rate_reasons: How each rate was chosen, one sentence for each role.
    """

    losses: tuple[float, ...]
    seconds: float
    trained_parameters: int
    learning_rates: dict[str, float]
    rate_reasons: dict[str, str]


def apply_propulsion(
    model: PreTrainedModel, *, degree: float, positions: Sequence[str] = ("all",), train_head: bool = True
) -> PeftModel:
    """Freeze a classifier and add trainable scale vectors to it, in place.

    Args:
        model: A classifier or regressor.
        degree: Exponent k of the scales.
        positions: Which layers carry a scale vector, as in `PropulsionConfig`.
        train_head: Whether the head is trained too; otherwise it keeps its random initial weights.

    Raises:
        UserError: If the degree or a position cannot be used on this model.
    """
    # With a task type, peft trains and saves the head along with the adapter.
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
    config: TrainingOptions,
    *,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingResult:
    """Train the parameters that require gradients, in place. Writes no file.

    The same seed gives bit-equal weights on a CPU with the same number of threads. The model's mode and the global
    random states are restored afterwards.

    Raises:
        UserError: If nothing is trainable, an example is too long, or the loss or a weight stops being finite.
    """
    examples = check_inputs(data, tokenizer, Limits(config.max_length, reserved=virtual_tokens(model)))
    collator = kind_of(data.task).collator(tokenizer, model)
    rates = Rates(config.learning_rate, config.head_learning_rate, config.rate_multiplier)
    size = config.per_device_train_batch_size
    rates = with_measured(model, rates, examples, collator, batch_size=size, seed=config.seed)
    groups = parameter_groups(model, rates=rates, weight_decay=config.weight_decay)
    if not groups:
        raise UserError("the model has no trainable parameter: every requires_grad is False")
    peaks = {group["role"]: group["lr"] for group in groups}
    reasons = {role: rates.of(role, model_degree(model)).reason for role in peaks}
    trained = sum(parameter.numel() for group in groups for parameter in group["params"])
    mode, on_cpu, start = model.training, model.device.type == "cpu", time.perf_counter()
    with (
        isolated_randomness(),
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=config.max_steps, desc="training", unit="step", disable=None if progress else True) as bar,
    ):

        def show(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        arguments = training_arguments(
            config, output_dir=folder, bf16=False, use_cpu=on_cpu, dataloader_pin_memory=not on_cpu, save_strategy="no",
            logging_strategy="no", report_to="none", disable_tqdm=True, label_names=["labels"],
        )  # fmt: skip
        trainer = TaskTrainer(
            model=model, args=arguments, train_dataset=examples, data_collator=collator, rates=rates, on_loss=show,
            autocast=torch.bfloat16 if config.bf16 else None, callbacks=list(callbacks),
        )  # fmt: skip
        trainer.train()
    trainer.check_finite()
    model.zero_grad(set_to_none=True)
    model.train(mode)
    return TrainingResult(tuple(trainer.losses), time.perf_counter() - start, trained, peaks, reasons)


def evaluate(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, data: TaskData, *,
             max_length: int | None = None, batch_size: int = 64) -> dict[str, float]:  # fmt: skip
    """Return the task's metrics on the validation rows."""
    kind, rows = kind_of(data.task), columns_of(data.validation)
    limits = Limits(max_length, batch_size=batch_size, reserved=virtual_tokens(model))
    return kind.measure(data.task, kind.predict(model, tokenizer, data.task, rows, limits), rows)


def predict(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, data: TaskData, *,
            max_length: int | None = None, batch_size: int = 64) -> Float[Tensor, "n c"]:  # fmt: skip
    """Return the logits, or the regression output, of the validation rows, without dropout and on the CPU."""
    limits = Limits(max_length, batch_size=batch_size, reserved=virtual_tokens(model))
    return torch.tensor(logits(model, tokenizer, data.task, columns_of(data.validation), limits), dtype=torch.float32)
