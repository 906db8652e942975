"""The options of training, and which of them must agree for a run to be resumed."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_type_hints

import torch
import tyro
from transformers import SchedulerType, TrainingArguments, get_scheduler
from transformers.integrations import integration_utils

from propulsion.atomic import json_text
from propulsion.data import Limits, OwnTask, RowOptions, TaskData
from propulsion.data.own import ROW_OPTIONS
from propulsion.errors import UserError, did_you_mean, one_line
from propulsion.methods import parse_options
from propulsion.pretrained import Pooling
from propulsion.pretrained.options import LOADING_OPTIONS, LoadingOptions
from propulsion.training.learning_rates import RateChoice, is_rate

Strategy = Literal["no", "steps", "epoch"]


def _formerly(name: str) -> Any:
    """An earlier name of an option, which command lines still accept."""
    return tyro.conf.arg(aliases=[name])


@dataclass(frozen=True)
class TrainingOptions:
    """How a model is trained: by AdamW, with a warm-up and a schedule. Names are those of `TrainingArguments`."""

    max_steps: Annotated[int, _formerly("--steps")] = 200
    """Optimizer steps."""
    per_device_train_batch_size: Annotated[int, _formerly("--batch-size")] = 16
    """Number of rows in a batch."""
    learning_rate: RateChoice = "auto"
    """Learning rate of the method's parameters: a number; auto, measured on a few training batches
    (propulsion.training.measured_rates); or None, a fixed rate by role (propulsion.training.learning_rates)."""
    head_learning_rate: RateChoice = "auto"
    """Learning rate of the head: a number, auto or None, as for learning_rate."""
    rate_multiplier: float = 1.0
    """Factor on every learning rate that is not given as a number."""
    warmup_steps: Annotated[float, _formerly("--warmup-ratio")] = 0.06
    """Steps over which the learning rate rises from 0; below 1, a share of all steps."""
    lr_scheduler_type: Annotated[str, _formerly("--schedule")] = "linear"
    """Schedule after the warm-up, such as linear, cosine or constant_with_warmup."""
    weight_decay: float = 0.01
    """Weight decay of matrices; biases, norms and Propulsion's scales are not decayed."""
    max_grad_norm: float = 1.0
    """Largest norm of the gradient of all parameters, to which a larger one is scaled down; 0 for no limit."""
    train_sampling_strategy: Literal["random", "group_by_length"] = "random"
    """Order of the rows: random, or group_by_length, which batches rows of similar length to save padding."""
    bf16: bool = False
    """Train in bfloat16 mixed precision, which is faster on processors that multiply bfloat16 matrices."""
    max_length: int | None = None
    """Cut inputs to this many tokens; by default, inputs that are too long for the model are an error."""
    seed: int = 0
    """Seed of every random draw: the head, the rows drawn, the data order, dropout."""

    LEAST: ClassVar[dict[str, float]] = {
        "max_steps": 1, "per_device_train_batch_size": 1, "warmup_steps": 0, "weight_decay": 0, "max_grad_norm": 0,
        "max_length": 1, "seed": 0,
    }  # fmt: skip
    """The smallest allowed value of each option that has one."""
    POSITIVE: ClassVar[tuple[str, ...]] = ("rate_multiplier",)
    """Options that must be above 0 and finite."""

    def __post_init__(self) -> None:
        types, hints = {field.name: field for field in dataclasses.fields(self)}, get_type_hints(type(self))
        for name in {**self.LEAST, **dict.fromkeys(self.POSITIVE)}:
            value, field = getattr(self, name), types[name]
            if value is None and type(None) in get_args(hints[name]):
                continue
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"{name} is {value!r}, expected a finite number")
            if name in self.LEAST and value < self.LEAST[name]:
                raise UserError(f"{name} is {value}, expected at least {self.LEAST[name]}")
            if name in self.POSITIVE and value <= 0:
                raise UserError(f"{name} is {value}, expected a number above 0")
            if value % 1 and isinstance(field.default, int) and not isinstance(field.default, bool):
                raise UserError(f"{name} is {value}, expected a whole number")
        for name in ("learning_rate", "head_learning_rate"):
            if not is_rate(getattr(self, name)):
                raise UserError(f"{name} is {getattr(self, name)}, expected a number above 0, auto or None")
        if not self.seed < 2**32:
            raise UserError(f"seed is {self.seed}, expected less than 2**32")
        for name, known in (("lr_scheduler_type", _SCHEDULES), ("train_sampling_strategy", _ORDERS)):
            if (value := getattr(self, name)) not in known:
                raise UserError(
                    f"{name} is {value!r}{did_you_mean(str(value), known)}, expected one of {', '.join(known)}"
                )
        check_schedule(self.lr_scheduler_type, self._schedule_options())

    def _schedule_options(self) -> dict[str, Any]:
        """Further parameters of the schedule."""
        return {}


def check_schedule(name: str, options: Mapping[str, Any]) -> None:
    """Check that a schedule of the learning rate can be made.

    Raises:
        UserError: It needs parameters that are not given, or has none of these names.
    """
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        get_scheduler(name, optimizer, 1, 2, dict(options))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"lr_scheduler_type {name} cannot be used: {one_line(error)} (propulsion.train takes its parameters as "
            "--training-options lr_scheduler_kwargs={...})"
        ) from error


def check_reporting(report_to: Sequence[str]) -> None:
    """Make sure that every reporter is installed.

    Raises:
        UserError: One is not installed, or there is no such reporter.
    """
    known = sorted(integration_utils.INTEGRATION_TO_CALLBACK)
    for name in report_to:
        if name in ("none", "all"):
            if len(report_to) > 1:
                raise UserError(f"report_to {name} stands alone: give it, or names of reporters")
        elif name not in known:
            raise UserError(
                f"cannot report to {name!r}{did_you_mean(name, known)}: choose none, all, {', '.join(known)}"
            )
        # For a reporter without such a function in transformers, the reporter's own callback raises.
        elif not getattr(integration_utils, f"is_{name}_available", lambda: True)():
            raise UserError(f"cannot report to {name}: it is not installed here (pip install {name})")


_SCHEDULES = tuple(schedule.value for schedule in SchedulerType)
_ORDERS = ("random", "group_by_length")


def training_arguments(options: TrainingOptions, **values: Any) -> TrainingArguments:
    """`transformers.TrainingArguments` with the options of the same name, and with further values by name."""
    names = {field.name for field in dataclasses.fields(TrainingArguments)} - {"learning_rate"}
    named = {name: value for name, value in vars(options).items() if name in names}
    arguments = TrainingArguments(**(named | {"data_seed": options.seed, "remove_unused_columns": False} | values))
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # Otherwise the trainer would use all devices; a launcher starts one process for each.
    return arguments


@dataclass(frozen=True)
class Subject(LoadingOptions, RowOptions):
    """Which model is trained, by which method, on which task."""

    task: str = "demo"
    """Name of the task; an unknown name lists all of them."""
    model: str | None = None
    """Name (`python -m propulsion.models` lists them), hub name, folder or GGUF file of a pre-trained model; by default
    minilm, the packaged MiniLM-L6 encoder."""
    pooling: Pooling = "auto"
    """What a classifier's head reads: mean or first of the tokens' last hidden states; pooler, the input of
    transformers' own classifier; or auto, the pooling that the checkpoint declares."""
    method: str = "propulsion"
    """Method: propulsion, full, bitfit, head, none, or any method of peft in lower case."""
    method_options: tuple[str, ...] = ()
    """Fields of the method's peft configuration, each as NAME=VALUE, such as r=8 target_modules=query+value."""
    degree: float | None = None
    """Propulsion's degree k; by default the paper's for the task."""
    positions: tuple[str, ...] = ("all",)
    """Layers that Propulsion scales: all, attn, query, key, value, attention_output, mlp, embedding, norm."""
    vectors: int = 1
    """Number of Propulsion's vectors in each layer, which are pooled."""
    vector_pooling: str = "mean"
    """How several vectors are pooled: mean, max, min or l2."""
    adapter: Path | None = None
    """Folder of a saved adapter of the same base model to start from, with its own method and options."""


@dataclass(frozen=True)
class TrainConfig(TrainingOptions, Subject):
    """One training run."""

    max_steps: int = -1
    """Optimizer steps; -1 trains for num_train_epochs, 0 only evaluates."""
    output_dir: Path = Path("results/train")
    """Folder of the run."""
    overwrite_output_dir: bool = False
    """Start anew: remove what an earlier run wrote into the folder, and keep other files."""
    num_train_epochs: float = 3.0
    """Passes over the training rows."""
    per_device_eval_batch_size: int = 64
    """Number of rows in a batch of evaluation."""
    gradient_accumulation_steps: int = 1
    """Number of batches whose gradients are averaged for an optimizer step."""
    max_target_length: int = 64
    """Cut target summaries to this many tokens, and generate at most as many."""
    generation_max_length: int | None = None
    """Largest number of tokens to generate; by default max_target_length."""
    generation_num_beams: int = 1
    """Number of beams of the beam search for generated text; 1 is greedy decoding."""
    max_train_samples: int | None = None
    """Number of training rows, drawn by the seed; by default all."""
    max_eval_samples: int | None = None
    """Number of validation rows, drawn by the seed; by default all."""
    streaming: bool = False
    """Read training rows as they are needed, without keeping all in memory; needs max_steps."""
    eval_strategy: Strategy = "no"
    """When to evaluate during training."""
    eval_steps: int = 500
    """Steps between evaluations."""
    save_strategy: Strategy = "steps"
    """When to write checkpoints."""
    save_steps: int = 500
    """Steps between checkpoints."""
    save_total_limit: int | None = 2
    """Number of newest checkpoints to keep; the best is kept too."""
    load_best_model_at_end: bool = False
    """Take the checkpoint with the best evaluation as the final model."""
    metric_for_best_model: str | None = None
    """Metric that decides which checkpoint is best; by default the task's first."""
    early_stopping_patience: int | None = None
    """Stop after this many evaluations without an improvement."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which needs less memory and more time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the pre-trained weights; Propulsion's scales are float32 over either."""
    torch_compile: bool = False
    """Compile the model."""
    use_cpu: bool = False
    """Use no accelerator."""
    logging_steps: int = 50
    """Steps between reports of the loss."""
    report_to: tuple[str, ...] = ("none",)
    """Where losses and metrics are reported: tensorboard (event files in OUTPUT_DIR/runs), wandb, ..."""
    disable_tqdm: bool = False
    """Show no progress bar."""
    training_options: tuple[str, ...] = ()
    """Any other fields of transformers.TrainingArguments, each as NAME=VALUE."""

    LEAST: ClassVar[dict[str, float]] = TrainingOptions.LEAST | {
        "max_steps": -1, "per_device_eval_batch_size": 1, "eval_steps": 1, "gradient_accumulation_steps": 1,
        "save_steps": 1, "logging_steps": 1, "max_target_length": 1, "generation_num_beams": 1, "save_total_limit": 1,
        "generation_max_length": 1, "max_train_samples": 1, "max_eval_samples": 1,
    }  # fmt: skip
    POSITIVE: ClassVar[tuple[str, ...]] = ("rate_multiplier", "num_train_epochs", "early_stopping_patience")

    def __post_init__(self) -> None:
        super().__post_init__()
        further = parse_options(self.training_options)
        if further.get("logging_strategy") == "epoch" and self.save_strategy == "steps":
            # A run resumed from a checkpoint at the last step of an epoch would miss the log at its end.
            raise UserError("logging_strategy epoch needs save_strategy epoch or no")
        if self.streaming and self.max_steps < 0:
            raise UserError("the number of streamed rows is not known: give max_steps")
        if "epoch" in (self.eval_strategy, self.save_strategy) and self.eval_strategy != self.save_strategy != "no":
            # A run resumed from a checkpoint would miss an evaluation between it and the next step.
            raise UserError("eval_strategy and save_strategy must be the same where one of them is epoch")
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            raise UserError("early_stopping_patience needs load_best_model_at_end")
        if self.load_best_model_at_end and (self.eval_strategy == "no" or self.eval_strategy != self.save_strategy):
            raise UserError("load_best_model_at_end needs the same eval_strategy and save_strategy, steps or epoch")
        if self.load_best_model_at_end and self.eval_strategy == "steps" and self.save_steps % self.eval_steps:
            raise UserError("load_best_model_at_end needs save_steps to be a multiple of eval_steps")

    def _schedule_options(self) -> dict[str, Any]:
        options = parse_options(self.training_options).get("lr_scheduler_kwargs") or {}
        if not isinstance(options, dict):
            raise UserError(f'lr_scheduler_kwargs is {options!r}, expected JSON such as {{"min_lr": 1e-5}}')
        return options

    @property
    def on_cpu(self) -> bool:
        """Whether the run uses no accelerator."""
        return self.use_cpu or not torch.accelerator.is_available()

    @property
    def limits(self) -> Limits:
        """Lengths and batch size of evaluation."""
        return Limits(
            self.max_length, self.max_target_length, self.per_device_eval_batch_size, self.generation_max_length,
            self.generation_num_beams,
        )  # fmt: skip


# Fields that records of older versions lack. They are recorded only if they differ from their defaults, so that runs of
# older versions can be resumed.
_NEWER = ("generation_max_length", "generation_num_beams", "rate_multiplier", "train_sampling_strategy")

# Fields that may differ when a run is resumed: they do not change the weights, or name what is recorded by its content.
_FREE = frozenset(
    {"output_dir", "overwrite_output_dir", "save_total_limit", "report_to", "disable_tqdm", "logging_steps", "data_dir",
     "per_device_eval_batch_size", "model", "adapter", *LOADING_OPTIONS, *ROW_OPTIONS}
)  # fmt: skip


def identity(config: TrainConfig, data: TaskData, base: str, adapter: str | None) -> dict[str, Any]:
    """The configuration, rows and weights that two runs must have in common for one to resume the other, as JSON.

    `base` identifies the model's content (`propulsion.identity.model_content`), and `adapter` the weights of the
    adapter that it starts from; None without one.
    """
    unused = {name for name in _NEWER if getattr(config, name) == getattr(TrainConfig, name)}
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE | unused}
    if isinstance(task := data.task, OwnTask):  # Known by its columns and labels, whatever its file is called.
        fields["task"] = {"text_columns": task.text_columns, "label_column": task.label_column,
                          "label_names": task.label_names, "label_range": task.label_range,
                          "metrics": task.metrics}  # fmt: skip
    return json.loads(json_text(fields | {"rows": data.fingerprint, "base_model": base, "adapter": adapter}))
