"""Train a model on a task by any method: `python -m propulsion.train --task sst2 --method propulsion`.

Options have the names of `transformers.TrainingArguments`. The same command resumes a run that was killed, at any
moment, and ends with the same weights, to the last bit on a CPU. `accelerate launch -m propulsion.train ...` trains on
several devices. The output folder holds:

    run.json       the configuration, data and base model; what a checkpoint must agree with
    checkpoint-N   to resume from
    model          what was trained, with its tokenizer: loads by plain peft, or by transformers if the method has no
                   adapter
    predictions    one for every validation row drawn, in predictions.json
    result.json    metrics, losses, learning rates, trained parameters, times
"""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import tyro
from accelerate import PartialState
from tqdm import tqdm
from transformers import EarlyStoppingCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from propulsion.adapters import load_adapter
from propulsion.data import TaskData, load_task_data, tokenize_cached
from propulsion.errors import UserError, one_line, run_command
from propulsion.evaluation import Evaluation
from propulsion.methods import Method, apply_method, check_name, parse_options, trainable_parameters
from propulsion.optim import Rates, describe_rates, parameter_groups
from propulsion.presets import PRESETS, describe, get_preset
from propulsion.pretrained import fingerprint, load_model
from propulsion.reporting import check_reporting
from propulsion.run_folder import claim, finish, result_of, save_model
from propulsion.sharding import check_sharding, prepare_sharding
from propulsion.task_kinds import Limits, kind_of
from propulsion.tasks import get_task
from propulsion.trainer import TaskTrainer, isolated_randomness, latest_checkpoint

Strategy = Literal["no", "steps", "epoch"]


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    task: str = "demo"
    """Task; an unknown name lists them all."""
    data_dir: Path | None = None
    """Folder with train and validation files in the hub's columns; without it, the Hugging Face hub."""
    model: str | None = None
    """Hub name, folder or GGUF file of a pre-trained model; by default the packaged MiniLM-L6 encoder."""
    method: str = "propulsion"
    """full, bitfit, head, none, or any peft method in lower case."""
    method_options: tuple[str, ...] = ()
    """Fields of the method's peft configuration, each as NAME=VALUE, such as r=8 target_modules=query+value."""
    degree: float | None = None
    """Propulsion's degree k; by default the paper's for the task."""
    positions: tuple[str, ...] = ("all",)
    """Layers that Propulsion scales: all, attn, query, key, value, attention_output, mlp, embedding, norm."""
    vectors: int = 1
    """Propulsion's vectors a layer, pooled."""
    pooling: str = "mean"
    """How several vectors are pooled: mean, max, min or l2."""
    adapter: Path | None = None
    """Start from this saved adapter, which must be of the same base model; the method's options are its own."""
    output_dir: Path = Path("results/train")
    """Folder of the run."""
    overwrite_output_dir: bool = False
    """Start anew, and remove what is in the folder."""
    max_steps: int = -1
    """Optimizer steps; -1 goes by epochs, 0 evaluates only."""
    num_train_epochs: float = 3.0
    """Passes over the training rows."""
    per_device_train_batch_size: int = 16
    """Rows of a batch."""
    per_device_eval_batch_size: int = 64
    """Rows of a batch in evaluation."""
    gradient_accumulation_steps: int = 1
    """Batches of an optimizer step."""
    learning_rate: float | None = None
    """Learning rate of what the method trains, as it is; by default the rule that is printed at the start."""
    head_learning_rate: float | None = None
    """Learning rate of the head; by default the rule's."""
    lr_scheduler_type: str = "linear"
    """Schedule after the warm-up."""
    warmup_steps: float = 0.06
    """Steps over which the learning rate rises from 0; below 1, their share."""
    weight_decay: float = 0.01
    """Weight decay of matrices; biases, norms and Propulsion's scales have none."""
    max_grad_norm: float = 1.0
    """Longer gradients are shortened to this; 0 for no limit."""
    max_length: int | None = None
    """Cut inputs to this many tokens."""
    max_target_length: int = 64
    """Cut summaries to this many tokens; generate no more."""
    generation_max_length: int | None = None
    """Generate no more tokens than this; by default max_target_length."""
    generation_num_beams: int = 1
    """Beams of the search for generated text; 1 is greedy."""
    max_train_samples: int | None = None
    """Training rows, drawn by the seed."""
    max_eval_samples: int | None = None
    """Validation rows, drawn by the seed."""
    streaming: bool = False
    """Read training rows as they are needed, and hold none; needs max_steps."""
    eval_strategy: Strategy = "no"
    """When to evaluate before the end."""
    eval_steps: int = 500
    """Steps between evaluations."""
    save_strategy: Strategy = "steps"
    """When to write checkpoints."""
    save_steps: int = 500
    """Steps between checkpoints."""
    save_total_limit: int | None = 2
    """Checkpoints to keep, the best beside them."""
    load_best_model_at_end: bool = False
    """End with the checkpoint of the best evaluation."""
    metric_for_best_model: str | None = None
    """What is best; by default the task's first metric."""
    early_stopping_patience: int | None = None
    """Stop after this many evaluations without a better one."""
    gradient_checkpointing: bool = False
    """Less memory, more time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the pre-trained weights; Propulsion's scales are float32 over either."""
    bf16: bool = False
    """Train in mixed precision, bfloat16."""
    torch_compile: bool = False
    """Compile the model."""
    use_cpu: bool = False
    """Use no accelerator."""
    logging_steps: int = 50
    """Steps between reports of the loss."""
    report_to: tuple[str, ...] = ("none",)
    """Where losses and metrics are reported: tensorboard, wandb, ...; event files of TensorBoard are in runs."""
    disable_tqdm: bool = False
    """No progress bar."""
    seed: int = 0
    """Seed of every random draw: the head, the rows drawn, the data order, dropout."""
    training_options: tuple[str, ...] = ()
    """Any other fields of transformers.TrainingArguments, each as NAME=VALUE."""

    def __post_init__(self) -> None:
        least = {"max_steps": -1, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "eval_steps": 1,
                 "gradient_accumulation_steps": 1, "save_steps": 1, "logging_steps": 1, "seed": 0, "warmup_steps": 0,
                 "weight_decay": 0, "max_grad_norm": 0, "max_target_length": 1,
                 "generation_num_beams": 1}  # fmt: skip
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise UserError(f"{name} is {getattr(self, name)}, expected at least {low}")
        for name in ("learning_rate", "head_learning_rate", "num_train_epochs", "early_stopping_patience"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{name} is {value}, expected a number above 0")
        for name in ("save_total_limit", "generation_max_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}, expected at least 1")
        if self.streaming and self.max_steps < 0:
            raise UserError("streamed rows have no end that is known: give max_steps")
        if "epoch" in (self.eval_strategy, self.save_strategy) and self.eval_strategy != self.save_strategy != "no":
            # An evaluation between a checkpoint and the next step would be lost to a run resumed from there.
            raise UserError("eval_strategy and save_strategy must be the same where one of them is epoch")
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            raise UserError("early_stopping_patience needs load_best_model_at_end")
        if self.load_best_model_at_end and (self.eval_strategy == "no" or self.eval_strategy != self.save_strategy):
            raise UserError("load_best_model_at_end needs the same eval_strategy and save_strategy, steps or epoch")
        if self.load_best_model_at_end and self.eval_strategy == "steps" and self.save_steps % self.eval_steps:
            raise UserError("load_best_model_at_end needs save_steps to be a multiple of eval_steps")

    @property
    def on_cpu(self) -> bool:
        """Whether this machine's run uses no accelerator."""
        return self.use_cpu or not torch.accelerator.is_available()

    @property
    def limits(self) -> Limits:
        """Lengths and batch size of evaluation."""
        return Limits(
            self.max_length, self.max_target_length, self.per_device_eval_batch_size, self.generation_max_length,
            self.generation_num_beams,
        )  # fmt: skip


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with.

    Attributes:
        metrics: The task's metrics on the validation rows.
        steps: Optimizer steps taken.
        trained_parameters: Number of parameters trained.
        learning_rates: Peak learning rate of every role trained (`propulsion.optim`).
        history: What was logged on the way.
        seconds: Wall time of the last call.
        output_dir: The run's folder.
    """

    metrics: dict[str, float]
    steps: int
    trained_parameters: int
    learning_rates: dict[str, float]
    history: list[dict[str, Any]]
    seconds: float
    output_dir: str


# Fields of transformers.TrainingArguments that would be ignored, or break what a run relies on: the optimizer is AdamW
# with rates by role, the columns and their order are the task's.
_FIXED = frozenset(
    {"optim", "optim_args", "optim_target_modules", "data_seed", "greater_is_better", "label_names",
     "remove_unused_columns"}
)  # fmt: skip

# Fields that older records do not have: recorded where they are used, so that older runs go on.
_YOUNGER = ("generation_max_length", "generation_num_beams")

# Fields that may differ when a run is resumed: they change no weight.
_FREE = frozenset(
    {"output_dir", "overwrite_output_dir", "save_total_limit", "report_to", "disable_tqdm", "logging_steps", "data_dir",
     "per_device_eval_batch_size"}
)  # fmt: skip


def run(config: TrainConfig) -> TrainResult:
    """Train as configured, from the last checkpoint where there is one, and evaluate.

    Raises:
        UserError: Unusable options, data or model; the folder is of another run; training diverged; a full disk.
    """
    started = time.perf_counter()
    output = config.output_dir.expanduser().resolve()
    task = get_task(config.task)
    check_reporting(config.report_to)
    sharded = prepare_sharding() and config.max_steps != 0
    state = PartialState(cpu=config.on_cpu)
    data = load_task_data(
        config.task, data_dir=config.data_dir, n_train=config.max_train_samples, n_validation=config.max_eval_samples,
        seed=config.seed, streaming=config.streaming,
    )  # fmt: skip
    # A model to be sharded may fit no single device.
    device = torch.device("cpu") if config.on_cpu or sharded else torch.device(str(state.device))
    kind = kind_of(task)
    model, tokenizer = load_model(
        config.model, task_type=kind.task_type, num_labels=task.num_labels, seed=config.seed, device=device,
        dtype=getattr(torch, config.dtype),
    )  # fmt: skip
    base = fingerprint(model)
    model = _adapted(config, model, kind.task_type)
    identity = _identity(config, data, base)
    with state.main_process_first():
        if state.is_main_process:
            claim(output, identity, overwrite=config.overwrite_output_dir)
    if (finished := result_of(output)) is not None:
        return TrainResult(**finished)
    groups = parameter_groups(model, rates=_rates(config), weight_decay=config.weight_decay)
    if not groups and config.max_steps != 0:
        raise UserError(f"method {config.method} trains nothing: choose another one, or max_steps 0 to evaluate")
    if state.is_main_process:
        print(describe_rates(model, groups), flush=True)
    with isolated_randomness():
        evaluation = Evaluation(model, tokenizer, data, config.limits)
        trainer = _trainer(config, output, evaluation)
        note = check_sharding(trainer, model) if sharded else None
        if note is not None and state.is_main_process:
            print(note, flush=True)
        if config.max_steps != 0:
            checkpoint = latest_checkpoint(output)
            if checkpoint is not None and state.is_main_process:
                print(f"going on from {checkpoint}", flush=True)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            trainer.check_finite()
        metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    save_model(trainer, output / "model", tokenizer, base)
    result = TrainResult(
        metrics=metrics,
        steps=trainer.state.global_step,
        trained_parameters=trainable_parameters(model),
        learning_rates={group["role"]: group["lr"] for group in groups},
        history=trainer.state.log_history,
        seconds=time.perf_counter() - started,
        output_dir=str(output),
    )
    if state.is_main_process:
        finish(output, dataclasses.asdict(result), evaluation.predictions)
    state.wait_for_everyone()
    return result


def _adapted(config: TrainConfig, model: Any, task_type: str) -> Any:
    check_name(config.method)
    if config.adapter is not None:
        return load_adapter(model, config.adapter, trainable=config.max_steps != 0)
    options = parse_options(config.method_options)
    if config.method == "propulsion":
        degree = get_task(config.task).degree if config.degree is None else config.degree
        layers = {} if "target_modules" in options else {"positions": list(config.positions)}
        own = {"degree": degree, **layers, "vectors": config.vectors, "pooling": config.pooling}
        options = own | options
    if config.method == "adalora" and config.max_steps > 0:
        options = {"total_step": config.max_steps} | options
    return apply_method(model, Method(config.method, options), task_type=task_type, seed=config.seed)


def _rates(config: TrainConfig) -> Rates:
    return Rates(config.learning_rate, config.head_learning_rate)


def _trainer(config: TrainConfig, output: Path, evaluation: Evaluation) -> TaskTrainer:
    model, tokenizer, data = evaluation.model, evaluation.tokenizer, evaluation.data
    kind = kind_of(data.task)
    encoded = tokenize_cached(data, tokenizer, config.limits)
    if isinstance(encoded, datasets.IterableDataset):
        encoded = encoded.shuffle(seed=config.seed, buffer_size=1000)
    callbacks: list[Any] = []
    if config.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(config.early_stopping_patience))
    arguments = _arguments(config, output, data)
    try:
        trainer = TaskTrainer(
            model=model,
            args=arguments,
            train_dataset=encoded,
            eval_dataset=data.validation,
            data_collator=kind.collator(tokenizer, model),
            rates=_rates(config),
            score=evaluation,
            keep=config.save_total_limit,
            loss_by_token=kind.task_type == "CAUSAL_LM",
            callbacks=callbacks,
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"options that do not go together: {one_line(error)}") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(config: TrainConfig, output: Path, data: TaskData) -> TrainingArguments:
    named = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {name: value for name, value in vars(config).items() if name in named and name != "learning_rate"}
    best = config.metric_for_best_model or data.task.metrics[0]
    more = parse_options(config.training_options)
    if unknown := sorted(more.keys() - named):
        raise UserError(f"transformers.TrainingArguments has no field {', '.join(unknown)}")
    if given := sorted(more.keys() & ({field.name for field in dataclasses.fields(config)} | _FIXED)):
        raise UserError(f"training_options cannot set {given[0]}: it has an option of its own here, or is fixed")
    values = own | {
        "output_dir": str(output),
        "report_to": list(config.report_to),
        "data_seed": config.seed,
        "metric_for_best_model": f"eval_{best.removeprefix('eval_')}",
        "greater_is_better": True,
        "save_total_limit": None,  # The trainer below removes old checkpoints itself, safely.
        "use_cpu": config.on_cpu,  # Said, or processes on a machine without accelerators would not find each other.
        "dataloader_pin_memory": not config.on_cpu and torch.cuda.is_available(),
        "remove_unused_columns": False,
        "label_names": ["labels"] if data.task.kind != "question_answering" else ["start_positions", "end_positions"],
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if config.gradient_checkpointing else None,
        "ddp_find_unused_parameters": False,
    }
    try:
        arguments = TrainingArguments(**(values | more))
    except (ValueError, ImportError, TypeError) as error:
        raise UserError(f"options that do not go together: {one_line(error)}") from error
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # Else the trainer would split over all devices; several are a launcher's business.
    return arguments


def _identity(config: TrainConfig, data: TaskData, base: str) -> dict[str, Any]:
    """What two runs must have in common for one to go on where the other stopped."""
    unused = {name for name in _YOUNGER if getattr(config, name) == getattr(TrainConfig, name)}
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE | unused}
    fields = {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}
    return json.loads(json.dumps(fields | {"rows": data.fingerprint, "base_model": base}))


# --- the command ----------------------------------------------------------------------------------------------------


def main(config: TrainConfig) -> None:
    """Run, and print the final table."""
    result = run(config)
    if PartialState().is_main_process:
        width = max(map(len, (*result.metrics, "trained parameters")))
        print(f"\n{'trained parameters':{width}}  {result.trained_parameters:,}")
        print(f"{'steps':{width}}  {result.steps:,}")
        for name, value in result.metrics.items():
            print(f"{name:{width}}  {value:.4f}")
        print(f"\nmodel, checkpoints and result.json in {result.output_dir}")


def parse(arguments: list[str]) -> TrainConfig:
    """Options of the command line, over those of ``--preset NAME`` if it is given."""
    default = TrainConfig()
    if "--preset" in arguments:
        at = arguments.index("--preset")
        if at + 1 == len(arguments):
            raise UserError("--preset needs a name: --show-presets lists them")
        default = dataclasses.replace(default, **get_preset(arguments[at + 1]).options)
        arguments = arguments[:at] + arguments[at + 2 :]
    return tyro.cli(TrainConfig, prog="python -m propulsion.train", description=_HELP, args=arguments, default=default)


_HELP = f"""{__doc__}

--preset NAME starts from one of the paper's experiments, and other options override it; --show-presets prints them.
"""


def command() -> None:
    """The command line."""
    arguments = sys.argv[1:]
    if "--show-presets" in arguments:
        print("\n\n".join(describe(preset) for preset in PRESETS.values()))
        return
    main(parse(arguments))


if __name__ == "__main__":
    tqdm.monitor_interval = 0  # No thread of its own: a run's end waits for nothing.
    run_command(command)
