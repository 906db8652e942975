"""Train a model on a task with any method: `python -m propulsion.train --task sst2 --method propulsion`.

Options have the names of `transformers.TrainingArguments`. The same command resumes a run that was killed at any
moment, and ends with the same weights, bit for bit on a CPU. `accelerate launch -m propulsion.train ...` trains on
several devices. The output folder holds:

    run.json          the configuration, data and base model, with which a resumed run must agree
    rates.json        the measured learning rates and how they were chosen; a resumed run reads them
    files.json        hashes of the files that the run wrote; it removes no other files
    checkpoint-N      a checkpoint, from which the run can be resumed
    model             the trained model or adapter, with its tokenizer; transformers or peft loads it
    predictions.json  one prediction for every validation row
    result.json       metrics, losses, learning rates, number of trained parameters, times
"""

import contextlib
import dataclasses
import math
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm
from transformers import EarlyStoppingCallback, TrainingArguments

from propulsion.adapters import load_adapter, name_labels
from propulsion.checksums import check_sums
from propulsion.command_line import parsed
from propulsion.data import check_inputs, load_task_data, with_own_task
from propulsion.data.kinds import kind_of
from propulsion.data.tasks import Task, get_task
from propulsion.errors import (
    Interrupted,
    UserError,
    WriteError,
    did_you_mean,
    full_disk,
    library_errors,
    one_line,
    run_command,
)
from propulsion.identity import model_content, weights_identity
from propulsion.methods import Method, apply_method, check_options, parse_options, trainable_parameters, virtual_tokens
from propulsion.pretrained import fingerprint, load_model, pooling_of
from propulsion.training import run_folder
from propulsion.training.checkpoints import latest_checkpoint
from propulsion.training.config import TrainConfig, check_reporting, identity, training_arguments
from propulsion.training.evaluation import Evaluation
from propulsion.training.learning_rates import Rates, RoleRate, describe_rates, model_degree, parameter_groups
from propulsion.training.lock import locked
from propulsion.training.measured_rates import with_measured
from propulsion.training.nothing_learnt import signs
from propulsion.training.presets import PRESETS, describe, get_preset
from propulsion.training.rehearsal import rehearse
from propulsion.training.sharding import check_sharding, prepare_sharding
from propulsion.training.trainer import WITHOUT_OVERWRITE, TaskTrainer, isolated_randomness
from propulsion.user_files import absolute


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
        metrics: The task's metrics on the validation rows.
        steps: Optimizer steps taken.
        trained_parameters: Number of parameters trained.
        learning_rates: Peak learning rate of every trained role (`propulsion.training.learning_rates`).
        rate_reasons: How each rate was chosen, one sentence for each role.
        signs_of_failure: Signs that nothing was learnt, with the remedy; empty if there are none.
        history: The entries of the log.
        seconds: Wall time of the call that finished the run.
        output_dir: The run's folder.
        pooling: Pooling of a classifier ("mean", "first", or transformers' own, "pooler"); None for other tasks.
        extended_at: Steps after which the run was made longer; later steps follow the schedule of the longer run.
    """

    metrics: dict[str, float]
    steps: int
    trained_parameters: int
    learning_rates: dict[str, float]
    history: list[dict[str, Any]]
    seconds: float
    output_dir: str
    pooling: str | None = None
    extended_at: tuple[int, ...] = ()
    rate_reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    signs_of_failure: list[str] = dataclasses.field(default_factory=list)


_SHUFFLED = 1000  # Size of the buffer in which streamed rows are shuffled.

# Fields of transformers.TrainingArguments that cannot be set: the optimizer is AdamW with rates by role, the columns
# and their order are the task's, and a resumed run continues as if it had not been stopped.
_FIXED = frozenset(
    {"optim", "optim_args", "optim_target_modules", "data_seed", "greater_is_better", "label_names",
     "remove_unused_columns", "ignore_data_skip", "restore_callback_states_from_checkpoint"}
)  # fmt: skip


def run(config: TrainConfig) -> TrainResult:
    """Train as configured, from the last checkpoint if there is one, and evaluate.

    If the run is finished, its stored result is returned. With more steps or epochs, a run that is finished or was
    stopped continues from its last checkpoint, with the learning rates of the longer schedule.

    Raises:
        UserError: The options, data or model cannot be used, the folder holds another run or foreign files, training
            diverged, or the disk is full.
        Interrupted: The process was interrupted; the message says what is kept.
    """
    config = with_own_task(config)
    output = absolute(config.output_dir)
    try:
        return _run(config, output, get_task(config.task))
    except Exception as error:
        reason = full_disk(error)
        if reason is None and not isinstance(error, WriteError):
            raise
        words = str(error) if isinstance(error, UserError) else f"cannot write: {reason}"
        space = ", once there is space" if reason else ""
        raise UserError(f"{words}; {_how_to_go_on(config, output)}{space}") from error


def _run(config: TrainConfig, output: Path, task: Task) -> TrainResult:
    check_reporting(config.report_to)
    check_options(_method(config))
    sharded = prepare_sharding() and config.max_steps != 0
    state = PartialState(cpu=config.on_cpu)
    if state.is_main_process:
        run_folder.check_folder(output, overwrite=config.overwrite_output_dir)
    if not sharded:
        rehearse(_arguments(config, output, task))
    for saved in (config.adapter, config.model):
        if saved is not None:
            check_sums(saved)
    with locked(output) if state.is_main_process else contextlib.nullcontext():
        return _train(config, output, task, state, sharded)


def _train(config: TrainConfig, output: Path, task: Task, state: PartialState, sharded: bool) -> TrainResult:
    started = time.perf_counter()
    data = load_task_data(
        config.task, data_dir=config.data_dir, n_train=config.max_train_samples, n_validation=config.max_eval_samples,
        seed=config.seed, streaming=config.streaming,
    )  # fmt: skip
    # A model that is to be sharded may be too large for any single device.
    device = torch.device("cpu") if config.on_cpu or sharded else torch.device(str(state.device))
    kind = kind_of(task)
    model, tokenizer = load_model(
        config.model, task_type=kind.task_type, num_labels=task.num_labels, pooling=config.pooling, seed=config.seed,
        device=device, dtype=getattr(torch, config.dtype), **config.loading,
    )  # fmt: skip
    if kind.task_type in ("SEQ_CLS", "TOKEN_CLS") and task.label_names:
        name_labels(model.config, task.label_names)
    base, content = fingerprint(model), model_content(model, tokenizer)
    model = _adapted(config, model, kind.task_type)
    limits = dataclasses.replace(config.limits, reserved=virtual_tokens(model))
    # All rows are checked before anything is written.
    encoded = check_inputs(data, tokenizer, limits, cached=True, streamed=_streamed_rows(config, state))
    adapter = None if config.adapter is None else weights_identity(model.named_parameters())
    same = identity(config, data, content, adapter)
    folder = run_folder.folder_state(output, same, overwrite=config.overwrite_output_dir)
    if folder.finished is not None:
        if state.is_main_process:
            print(
                f"{output} is finished already at step {folder.finished['steps']}, nothing was trained: more steps "
                "train it further, another output folder starts anew",
                flush=True,
            )
        stored: dict[str, Any] = folder.finished | {"extended_at": folder.extended_at}
        return TrainResult(**stored)
    rates, stored_rates = Rates(config.learning_rate, config.head_learning_rate, config.rate_multiplier), None
    if config.max_steps != 0:
        if not trainable_parameters(model):
            raise UserError(f"method {config.method} trains nothing: choose another one, or max_steps 0 to evaluate")
        stored_rates = None if folder.replaces or not rates.automatic else run_folder.rates_of(output)
        rates = _measured(config, rates, stored_rates, model, encoded, kind.collator(tokenizer, model))
        if state.is_main_process:
            groups = parameter_groups(model, rates=rates, weight_decay=config.weight_decay)
            print(describe_rates(model, groups, rates), flush=True)
    with isolated_randomness():
        evaluation = Evaluation(model, tokenizer, data, limits)
        _check_best(config, evaluation)
        trainer = _trainer(config, output, evaluation, encoded, rates)
        note = check_sharding(trainer, model) if sharded else None
        if note is not None and state.is_main_process:
            print(note, flush=True)
        # Nothing in the folder has been changed yet: options that cannot be used do not destroy an earlier run.
        state.wait_for_everyone()
        if state.is_main_process:
            run_folder.claim(output, same, folder)
            if rates.measured and stored_rates is None:
                run_folder.store_rates(output, rates.measured)
        state.wait_for_everyone()
        try:
            result = _carry_out(config, trainer, evaluation, rates, folder, started)
            run_folder.save_model(trainer, output / run_folder.MODEL, tokenizer, base)
            if state.is_main_process:
                run_folder.finish(output, dataclasses.asdict(result), evaluation.predictions)
            state.wait_for_everyone()
        except KeyboardInterrupt as error:
            raise Interrupted(_how_to_go_on(config, output)) from error
    return result


def _carry_out(
    config: TrainConfig, trainer: TaskTrainer, evaluation: Evaluation, rates: Rates, folder: run_folder.FolderState,
    started: float,
) -> TrainResult:  # fmt: skip
    """Train, from the last checkpoint if there is one, and evaluate."""
    output, main_process = Path(str(trainer.args.output_dir)), PartialState().is_main_process
    if config.max_steps != 0:
        checkpoint = latest_checkpoint(output)
        if checkpoint is not None and main_process:
            longer = "; the learning rates from here on are those of the longer schedule" if folder.extended_at else ""
            print(f"resuming from {checkpoint}{longer}", flush=True)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.check_finite()
    metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    used, failure = {}, []
    if config.max_steps != 0:
        groups, degree = parameter_groups(trainer.network, rates=rates, weight_decay=0.0), model_degree(trainer.network)
        used = {group["role"]: rates.of(group["role"], degree) for group in groups}
        failure = signs(evaluation.data.task, evaluation.predictions, evaluation.labels(), _losses(trainer))
    return TrainResult(
        metrics=metrics, steps=trainer.state.global_step, trained_parameters=trainable_parameters(trainer.network),
        learning_rates={role: rate.rate for role, rate in used.items()},
        rate_reasons={role: rate.reason for role, rate in used.items()}, signs_of_failure=failure,
        history=trainer.state.log_history, seconds=time.perf_counter() - started, output_dir=str(config.output_dir),
        pooling=pooling_of(trainer.network) if kind_of(get_task(config.task)).task_type == "SEQ_CLS" else None,
        extended_at=folder.extended_at,
    )  # fmt: skip


def _check_best(config: TrainConfig, evaluation: Evaluation) -> None:
    """Make sure, before the first step, that `metric_for_best_model` is one of the metrics."""
    if config.metric_for_best_model is not None:
        best, names = config.metric_for_best_model.removeprefix("eval_"), evaluation.names()
        if best not in names:
            close = did_you_mean(best, names)
            raise UserError(f"metric_for_best_model is {best}{close}, expected one of {', '.join(names)}")


def _how_to_go_on(config: TrainConfig, output: Path) -> str:
    checkpoint = latest_checkpoint(output)
    again = f"the same command{WITHOUT_OVERWRITE if config.overwrite_output_dir else ''}"
    if checkpoint is None:
        steps = f" (one every {config.save_steps:g} steps)" if config.save_strategy == "steps" else ""
        return f"{output} has no checkpoint yet{steps}: {again} starts from the first step"
    return f"{checkpoint} is complete: {again} resumes from it"


def _streamed_rows(config: TrainConfig, state: PartialState) -> int:
    """The largest number of streamed rows that training reads; 0 if epochs set the length of the run."""
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * state.num_processes
    return config.max_steps * batch + _SHUFFLED if config.max_steps > 0 else 0


def _adapted(config: TrainConfig, model: Any, task_type: str) -> Any:
    if config.adapter is not None:
        return load_adapter(model, config.adapter, trainable=config.max_steps != 0)
    return apply_method(model, _method(config), task_type=task_type, seed=config.seed)


def _method(config: TrainConfig) -> Method:
    """The method with its options, of which some have options of their own in the configuration."""
    options = parse_options(config.method_options)
    if config.method == "propulsion":
        degree = get_task(config.task).degree if config.degree is None else config.degree
        layers = {} if "target_modules" in options else {"positions": list(config.positions)}
        own = {"degree": degree, **layers, "vectors": config.vectors, "pooling": config.vector_pooling}
        options = own | options
    if config.method == "adalora" and config.max_steps > 0:
        options = {"total_step": config.max_steps} | options
    return Method(config.method, options)


def _measured(
    config: TrainConfig, rates: Rates, stored: dict[str, RoleRate] | None, model: Any, encoded: Any, collator: Any
) -> Rates:
    """The rates, of which the automatic ones are those stored in the folder, or are measured by the main process."""
    if stored is not None:
        return dataclasses.replace(rates, measured=stored)
    measured = [rates]
    if PartialState().is_main_process:
        size = config.per_device_train_batch_size
        measured = [with_measured(model, rates, encoded, collator, batch_size=size, seed=config.seed)]
    return broadcast_object_list(measured)[0]


def _losses(trainer: TaskTrainer) -> list[float]:
    """The training loss of every step if this call took all of them or none was logged; otherwise the logged ones."""
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer.losses if len(trainer.losses) == trainer.state.global_step or not logged else logged


def _trainer(config: TrainConfig, output: Path, evaluation: Evaluation, encoded: Any, rates: Rates) -> TaskTrainer:
    model, tokenizer, data = evaluation.model, evaluation.tokenizer, evaluation.data
    kind = kind_of(data.task)
    if isinstance(encoded, datasets.IterableDataset):
        encoded = encoded.shuffle(seed=config.seed, buffer_size=_SHUFFLED)
    patience = config.early_stopping_patience
    callbacks = [] if patience is None else [EarlyStoppingCallback(patience)]
    arguments = _arguments(config, output, data.task)
    try:
        return TaskTrainer(
            model=model, args=arguments, train_dataset=encoded, eval_dataset=data.validation,
            data_collator=kind.collator(tokenizer, model), rates=rates, score=evaluation, keep=config.save_total_limit,
            loss_by_token=kind.task_type == "CAUSAL_LM", callbacks=callbacks,
        )  # fmt: skip
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"options that do not go together: {one_line(error)}") from error


def _arguments(config: TrainConfig, output: Path, task: Task) -> TrainingArguments:
    named = {field.name for field in dataclasses.fields(TrainingArguments)}
    best = config.metric_for_best_model or task.metrics[0]
    more = parse_options(config.training_options)
    if unknown := sorted(more.keys() - named):
        close = did_you_mean(unknown[0], named)
        raise UserError(f"transformers.TrainingArguments has no field {', '.join(unknown)}{close}")
    if given := sorted(more.keys() & ({field.name for field in dataclasses.fields(config)} | _FIXED)):
        raise UserError(f"training_options cannot set {given[0]}: it has an option of its own here, or is fixed")
    _check_further(more)
    values = {
        "output_dir": str(output),
        "report_to": list(config.report_to),
        "metric_for_best_model": f"eval_{best.removeprefix('eval_')}",
        "greater_is_better": True,
        "save_total_limit": None,  # `TaskTrainer` removes old checkpoints.
        "use_cpu": config.on_cpu,  # Without it, processes without accelerators would not find each other.
        "dataloader_pin_memory": not config.on_cpu and torch.cuda.is_available(),
        "label_names": ["labels"] if task.kind != "question_answering" else ["start_positions", "end_positions"],
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if config.gradient_checkpointing else None,
        "ddp_find_unused_parameters": False,
        "restore_callback_states_from_checkpoint": True,  # Such as the patience of early stopping.
    }
    with library_errors(f"options that do not go together ({', '.join(config.training_options)})" if more else
                        "options that do not go together"):  # fmt: skip
        return training_arguments(config, **(values | more))


def _check_further(more: Mapping[str, Any]) -> None:
    """Check the values of further training options that transformers takes unchecked."""
    if more.get("save_only_model"):
        raise UserError("save_only_model cannot be set: no run could be resumed from its checkpoints")
    known = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    for name, value in more.items():
        kind, types = type(known[name].default), re.findall(r"\w+", str(known[name].type))
        # A number in the place of a file's name would be taken for a file that this process has open, and close it.
        if type(value) in (int, float) and not {"bool", "int", "float"}.intersection(types):
            raise UserError(
                f"training option {name} is {value!r}, which must not be a number: it is of type {known[name].type}"
            )
        if kind in (bool, int, float) and not isinstance(value, bool if kind is bool else int | float):
            raise UserError(
                f"training option {name} is {value!r}, expected {'true or false' if kind is bool else 'a number'}"
            )
    for name, limit in (("neftune_noise_alpha", math.inf), ("label_smoothing_factor", 1)):
        value = more.get(name)
        if value is not None and not (isinstance(value, int | float) and 0 <= value < limit):
            raise UserError(f"training option {name} is {value!r}, expected at least 0{' and below 1' * (limit == 1)}")


def main(config: TrainConfig) -> None:
    """Run, and print a table of the result."""
    result = run(config)
    if PartialState().is_main_process:
        width = max(map(len, (*result.metrics, "trained parameters")))
        print(f"\n{'trained parameters':{width}}  {result.trained_parameters:,}")
        print(f"{'steps':{width}}  {result.steps:,}")
        for name, value in result.metrics.items():
            print(f"{name:{width}}  {value:.4f}")
        if result.signs_of_failure:
            print("\nnothing seems to have been learnt: " + "; ".join(result.signs_of_failure))
        print(f"\nmodel, checkpoints and result.json are in {result.output_dir}")


def parse(arguments: list[str]) -> TrainConfig:
    """The configuration of a command line, whose options override those of its ``--preset NAME``, if any.

    Raises:
        UserError: An option is unknown, or has no value or one that cannot be used.
    """
    default = TrainConfig()
    if "--preset" in arguments:
        at = arguments.index("--preset")
        if at + 1 == len(arguments):
            raise UserError("--preset needs a name: --show-presets lists them")
        default = dataclasses.replace(default, **get_preset(arguments[at + 1]).options)
        arguments = arguments[:at] + arguments[at + 2 :]
    return parsed(TrainConfig, prog="python -m propulsion.train", description=_HELP, args=arguments, default=default)


_HELP = f"""{__doc__}

--preset NAME starts from one of the paper's experiments, and other options override it; --show-presets prints them.
"""


def command() -> None:
    """Run the command line."""
    arguments = sys.argv[1:]
    if "--show-presets" in arguments:
        print("\n\n".join(describe(preset) for preset in PRESETS.values()))
        return
    main(parse(arguments))


if __name__ == "__main__":
    tqdm.monitor_interval = 0  # No monitor thread, which would delay the end of the process.
    run_command(command)
