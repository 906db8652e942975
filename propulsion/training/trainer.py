"""`transformers.Trainer` with learning rates by role, a stop at divergence, and checkpoints that are never incomplete.

A checkpoint is written beside its destination and renamed when it is complete, so that `checkpoint-N` is complete even
after a kill or on a full disk. Older checkpoints are removed afterwards; each is renamed before it is deleted.
Evaluation does not change the random states, so that a resumed run draws the same numbers as one that was not stopped.
Beside what `transformers.Trainer` stores, a checkpoint holds the rest of the state of the loop (`PROGRESS`), so that a
resumed run also logs the same numbers and stops at the same step.
"""

import contextlib
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from propulsion.adapters import name_base
from propulsion.errors import Diverged, NotFinite, UserError, WriteError, first_line, full_disk
from propulsion.methods import all_ranks, rank_state, restore_rank_state, update_ranks
from propulsion.training.checkpoints import (
    STAGING,
    checkpoints,
    clear_leftovers,
    damaged,
    latest_checkpoint,
    reading,
    remove_checkpoint,
)
from propulsion.training.learning_rates import Rates, parameter_groups
from propulsion.training.manifest import Manifest

PROGRESS = "progress"
"""File of a checkpoint, for each process: losses not yet logged, and the random state at the start of the epoch."""
REMEDY = "lower the learning rate, or lengthen the warm-up"
WITHOUT_OVERWRITE = ", without --overwrite-output-dir"


class TaskTrainer(Trainer):
    """A `transformers.Trainer` for any kind of task and any method."""

    def __init__(
        self,
        *args: Any,
        rates: Rates,
        score: Callable[[], dict[str, float]] | None = None,
        on_loss: Callable[[float], object] | None = None,
        keep: int | None = None,
        loss_by_token: bool = False,
        autocast: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        """Make a trainer.

        Args:
            *args: As for `transformers.Trainer`.
            rates: Learning rates by role.
            score: Computes the task's metrics of the model.
            on_loss: Called with the loss of every batch.
            keep: Number of newest checkpoints to keep, with the best; all if None.
            loss_by_token: Whether the model divides its loss by the number of tokens in all accumulated batches.
            autocast: Precision of the training loss. Unlike the trainer's own `bf16`, it does not hold for calls of the
                model by callbacks and after training.
            **kwargs: As for `transformers.Trainer`.
        """
        super().__init__(*args, **kwargs)
        # transformers assumes that every model whose forward takes keyword arguments divides by that number, and then
        # does not average over accumulated batches; but classifiers and taggers ignore the argument.
        self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs and loss_by_token
        self.losses: list[float] = []
        self._rates, self._score, self._on_loss, self._keep = rates, score, on_loss, keep
        self._autocast = autocast
        self._staging: str | None = None
        self._started, self._epoch_start = 0.0, torch.get_rng_state()
        self._ranks: dict[str, Any] = {}
        self._resumed: dict[str, Any] | None = None
        self.add_callback(_RankUpdates())
        self.add_callback(_Beginning(self._restore_progress))
        self.remove_callback(PrinterCallback)

    @property
    def network(self) -> nn.Module:
        """The model that is trained."""
        assert self.model is not None
        return self.model  # pyright: ignore[reportReturnType]

    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with the rate and decay of every parameter's role (`propulsion.training.learning_rates`)."""
        if self.optimizer is None:
            network = self.network if model is None else model
            groups = parameter_groups(network, rates=self._rates, weight_decay=self.args.weight_decay)
            self.optimizer = adamw(groups, self.args)
        return self.optimizer

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> contextlib.AbstractContextManager:
        """The context in which the training loss is computed."""
        if self._autocast is None:
            return super().autocast_smart_context_manager(cache_enabled)
        return torch.autocast(self.args.device.type, self._autocast)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the model or the adapter, to a checkpoint or as the result of the training."""
        super()._save(output_dir, state_dict)
        if isinstance(self.model, PeftModel):
            name_base(Path(output_dir or str(self.args.output_dir)), self.model)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take one batch.

        Raises:
            Diverged: Its loss is not finite.
        """
        loss = super().training_step(*args, **kwargs)
        value = float(loss)
        self.losses.append(value)
        if not np.isfinite(value):
            raise self._divergence(f"the loss is {value}", self.state.global_step + 1)
        if self._on_loss is not None:
            self._on_loss(value)
        return loss

    def check_finite(self) -> None:
        """Check that the weights are finite, since no loss shows the effect of the last step.

        Raises:
            Diverged: One is not finite.
        """
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                raise self._divergence(f"{name} is no longer finite", self.state.global_step)

    def _divergence(self, what: str, step: int) -> Diverged:
        last = latest_checkpoint(self._folder()) if self.args.save_strategy != "no" else None
        kept = f"; the last good checkpoint is {last}" if last else ""
        return Diverged(f"training diverged: {what} at step {step}{kept}; {REMEDY}")

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Compute and log the task's metrics.

        Raises:
            Diverged: An output of the model is not finite.
        """
        assert self._score is not None
        if self.state.global_step:
            self.check_finite()
        with isolated_randomness():
            try:
                scores = self._score()
            except NotFinite as error:
                if not self.state.global_step:
                    raise
                raise self._divergence(str(error), self.state.global_step) from error
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(dict(metrics))  # A copy, since logging adds the epoch.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_finite()
        folder = self._folder()
        staging, name = folder / STAGING, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            if self.args.should_save:
                clear_leftovers(folder)
            self.accelerator.wait_for_everyone()
            self._staging = str(staging)
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(folder / name)
            self._ranks = rank_state(self.network)
            with all_ranks(self.network):
                super()._save_checkpoint(model, trial)
            if self.state.best_global_step:  # transformers has recorded the path before the rename.
                self.state.best_model_checkpoint = str(self._best())
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._publish(staging / name, folder / name)
            self.accelerator.wait_for_everyone()
        except Exception as error:
            is_of_disk = isinstance(error, (OSError, SafetensorError)) or full_disk(error) is not None
            if isinstance(error, UserError) or not is_of_disk:
                raise
            shutil.rmtree(staging, ignore_errors=True)
            raise WriteError(f"cannot write {folder / name} ({full_disk(error) or first_line(error)})") from error
        finally:
            self._staging = None

    def _publish(self, written: Path, destination: Path) -> None:
        self.state.save_to_json(str(written / "trainer_state.json"))
        manifest = Manifest(destination.parent)
        if destination.exists():
            if others := manifest.not_own(destination):
                raise UserError(f"{others[0]} is in the way, and this run did not write it: move it away")
            remove_checkpoint(destination)
        manifest.publish(written, destination)
        written.parent.rmdir()
        if self._keep is not None:
            best = Path(self.state.best_model_checkpoint or "")
            for old in checkpoints(destination.parent)[: -self._keep]:
                # A checkpoint that holds a file of somebody else's is kept.
                if old.name != best.name and not manifest.not_own(old):
                    remove_checkpoint(old)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        started = super()._init_training_state(*args, **kwargs)
        if self.state.global_step:  # The run is resumed, and has been evaluated at its start.
            self.args.eval_on_start = False
        # The folder may have been moved since: the best checkpoint is found by its step.
        if self.state.best_global_step:
            best = self._best()
            if self.args.load_best_model_at_end and not best.is_dir():
                raise UserError(f"{best}, the best checkpoint so far, is missing: put it back, or start anew")
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        return started

    def _restore_progress(self) -> None:
        """Restore the state of the loop that transformers does not store; called when the loop begins."""
        progress = self._resumed or {}
        self._started = time.time() - progress.get("seconds", 0.0)
        if progress:
            self._tr_loss.fill_(progress["loss"])
            self._total_loss_scalar = progress["total_loss"]
            self._globalstep_last_logged = progress["logged_at"]
            self._initial_global_step = 0
            self.losses[:] = progress["losses"].tolist()
            restore_rank_state(self.network, progress["ranks"])

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        progress = {
            "seconds": time.time() - self._started, "loss": self._tr_loss.item(), "total_loss": self._total_loss_scalar,
            "logged_at": self._globalstep_last_logged, "losses": torch.tensor(self.losses, dtype=torch.float64),
            "epoch_start": self._epoch_start, "ranks": self._ranks,
        }  # fmt: skip
        torch.save(progress, Path(output_dir) / f"{PROGRESS}_{self.args.process_index}.pt")

    def _progress_of(self, checkpoint: Path) -> dict[str, Any] | None:
        """The stored progress of this process; None for a checkpoint of an earlier version, which has none."""
        files = sorted(checkpoint.glob(f"{PROGRESS}_*.pt"))
        if files and len(files) != self.args.world_size:
            raise UserError(
                f"{checkpoint} was written by {len(files)} processes, and this run has {self.args.world_size}: resume "
                "it with as many"
            )
        file = checkpoint / f"{PROGRESS}_{self.args.process_index}.pt"
        return torch.load(file, weights_only=True) if files else None

    def _is_at_end(self) -> bool:
        """Whether a run that is resumed has already taken its last step."""
        patience = [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        stopped = any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in patience)
        return stopped or self.state.global_step >= self.state.max_steps

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        checkpoint, epoch = kwargs["resume_from_checkpoint"], kwargs["epoch"]
        if checkpoint is not None and epoch == kwargs["epochs_trained"]:
            if self._is_at_end():  # transformers looks for the end only after a step.
                self.control.should_training_stop = True
                return
            if not kwargs["steps_trained_in_current_epoch"]:
                self._load_rng_state(checkpoint)
            elif self._resumed is not None:
                # Samplers may draw the order of rows from the global random state.
                torch.set_rng_state(self._resumed["epoch_start"])
        self._epoch_start = torch.get_rng_state()
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: float, start_time: float) -> Any:
        return super()._finalize_training(trial, num_train_samples, self._started)  # The seconds of all calls.

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        # Otherwise an evaluation between two checkpoints could be the best one without being stored.
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return is_best

    def _load_best_model(self) -> None:
        self._check_whole(self._best())
        with reading(self._best()), all_ranks(self.network):
            super()._load_best_model()
        restore_rank_state(self.network, (self._progress_of(self._best()) or {"ranks": {}})["ranks"])

    def _check_whole(self, checkpoint: Path) -> None:
        """Check that a checkpoint has all files with the content that was written."""
        damage = Manifest(checkpoint.parent).damaged(checkpoint) if self.args.should_save else None
        if damage is not None:
            raise damaged(checkpoint, damage)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self._check_whole(folder)
        with reading(folder):
            TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
            # Without these files transformers would resume with a new optimizer.
            needed = (SCHEDULER_NAME,) if self.is_fsdp_enabled else (SCHEDULER_NAME, OPTIMIZER_NAME)
            if lacking := [name for name in needed if not (folder / name).exists()]:
                raise ValueError(f"{lacking[0]} is missing")
            self._resumed = self._progress_of(folder)
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and isinstance(self.lr_scheduler, LambdaLR) and self.optimizer is not None:
            # The checkpoint holds the rates of its run's schedule; a run that was made longer has another schedule.
            schedule = self.lr_scheduler
            factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
            for group, base, factor in zip(self.optimizer.param_groups, schedule.base_lrs, factors, strict=True):
                group["lr"] = base * factor
            schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # These are logged.

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _best(self) -> Path:
        return self._folder() / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"


def adamw(groups: list[dict[str, Any]], arguments: TrainingArguments) -> torch.optim.AdamW:
    """AdamW over groups of parameters, fused as in transformers."""
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    return torch.optim.AdamW(groups, betas=betas, eps=arguments.adam_epsilon, fused=True)


class _Beginning(TrainerCallback):
    """Calls a function when the loop begins, after `transformers.Trainer` has set the loop's own state."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._call()


class _RankUpdates(TrainerCallback):
    """Calls `update_ranks` after every step of the optimizer."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        update_ranks(kwargs.get("model"), state.global_step)


@contextlib.contextmanager
def isolated_randomness() -> Iterator[None]:
    """Restore the global random states, which training seeds for dropout and the order of rows, after the block."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
