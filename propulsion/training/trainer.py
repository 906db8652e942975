"""`transformers.Trainer` with learning rates by role, a stop at divergence, and checkpoints that are never incomplete.

A checkpoint is written beside its destination and renamed when it is complete, so that `checkpoint-N` is complete even
after a kill or on a full disk. Older checkpoints are removed afterwards; each is renamed before it is deleted.
Evaluation does not change the random states, so that a resumed run draws the same numbers as one that was not stopped.
"""

import contextlib
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from propulsion.errors import Diverged, NotFinite, UserError, first_line
from propulsion.methods import update_ranks
from propulsion.training.checkpoints import (
    STAGING,
    checkpoints,
    clear_leftovers,
    latest_checkpoint,
    reading,
    remove_checkpoint,
)
from propulsion.training.learning_rates import Rates, parameter_groups
from propulsion.training.manifest import Manifest

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
        self.add_callback(_RankUpdates())
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
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            # Fused, as in transformers.
            self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=self.args.adam_epsilon, fused=True)
        return self.optimizer

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> contextlib.AbstractContextManager:
        """The context in which the training loss is computed."""
        if self._autocast is None:
            return super().autocast_smart_context_manager(cache_enabled)
        return torch.autocast(self.args.device.type, self._autocast)

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
        """Compute and log the task's metrics."""
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
            super()._save_checkpoint(model, trial)
            if self.state.best_global_step:  # transformers has recorded the path before the rename.
                self.state.best_model_checkpoint = str(self._best())
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._publish(staging / name, folder / name)
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and "writ" not in str(error):
                raise  # Not an error of the disk.
            shutil.rmtree(staging, ignore_errors=True)
            last = latest_checkpoint(folder)
            kept = f"the last complete one is {last}" if last else "there is none before it"
            raise UserError(
                f"cannot write {folder / name} ({first_line(error)}); {kept}: free some space and run the same "
                f"command to go on{WITHOUT_OVERWRITE}"
            ) from error
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
        # The folder may have been moved since: the best checkpoint is found by its step.
        if self.state.best_global_step:
            best = self._best()
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        return started

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        with reading(folder):
            TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
            # Without these files transformers would resume with a new optimizer.
            needed = (SCHEDULER_NAME,) if self.is_fsdp_enabled else (SCHEDULER_NAME, OPTIMIZER_NAME)
            if lacking := [name for name in needed if not (folder / name).exists()]:
                raise ValueError(f"{lacking[0]} is missing")
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
