"""Fully sharded training (FSDP), which accelerate's launcher requests by environment variables."""

import os
from collections.abc import Sequence

from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import Trainer

from propulsion.errors import UserError

USE, VERSION, EFFICIENT = "ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_CPU_RAM_EFFICIENT_LOADING"


def prepare_sharding() -> bool:
    """Return whether the run is to be sharded; if so, make every process load the weights.

    By the launcher's default only the first process loads weights; but every process needs them, to identify the model
    and for methods that read them.

    Raises:
        UserError: Version 1 of FSDP is requested. It flattens parameters, but learning rates differ by parameter.
    """
    if not parse_flag_from_env(USE):
        return False
    if os.environ.get(VERSION, "1") != "2":
        raise UserError("sharded training needs version 2 of FSDP: accelerate launch --use_fsdp --fsdp_version 2")
    os.environ[EFFICIENT] = "false"
    return True


def check_sharding(trainer: Trainer, model: nn.Module) -> str | None:
    """Return a note for the user before a run that is to be sharded; None if there is nothing to say.

    Raises:
        UserError: The trained parameters have several dtypes, which FSDP cannot gather together.
    """
    if not trainer.is_fsdp_enabled:
        return "accelerate shards over accelerators alone: here every process holds the whole model"
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad})
    if len(dtypes) > 1 and trainer.accelerator.mixed_precision == "no":
        raise UserError(f"sharded training of parameters in {' and '.join(dtypes)} needs mixed precision: pass --bf16")
    return None


def equal_share(count: int, processes: int, index: int) -> Sequence[int]:
    """The rows of one process, equally many for each process: the last row is repeated if the count does not divide.

    Shares are equal since the processes of a sharded model wait for each other at every batch. All shares in order, cut
    to `count`, are the rows in order.

    >>> [equal_share(5, 2, index) for index in range(2)]
    [[0, 1, 2], [3, 4, 4]]
    """
    size = -(-count // processes)
    return [min(row, count - 1) for row in range(index * size, (index + 1) * size)]
