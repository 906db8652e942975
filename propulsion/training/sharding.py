"""Fully sharded training (FSDP), as accelerate's launcher asks for it by environment variables."""

import os
from collections.abc import Sequence

from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import Trainer

from propulsion.errors import UserError

USE, VERSION, EFFICIENT = "ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_CPU_RAM_EFFICIENT_LOADING"


def prepare_sharding() -> bool:
    """Whether the run is to be sharded; if so, make every process load the weights.

    The launcher's own default leaves weights to the first process, and the others without any: they could neither be
    told from those of another model, nor begin a method that looks at them.

    Raises:
        UserError: Version 1 of FSDP, which makes one flat parameter of many: learning rates go by parameter here.
    """
    if not parse_flag_from_env(USE):
        return False
    if os.environ.get(VERSION, "1") != "2":
        raise UserError("sharded training needs version 2 of FSDP: accelerate launch --use_fsdp --fsdp_version 2")
    os.environ[EFFICIENT] = "false"
    return True


def check_sharding(trainer: Trainer, model: nn.Module) -> str | None:
    """What the user should know before a run that `prepare_sharding` found is to be sharded; None if all is well.

    Raises:
        UserError: Trained parameters of several dtypes, which FSDP cannot gather together.
    """
    if not trainer.is_fsdp_enabled:
        return "accelerate shards over accelerators alone: here every process holds the whole model"
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad})
    if len(dtypes) > 1 and trainer.accelerator.mixed_precision == "no":
        raise UserError(f"sharded training of parameters in {' and '.join(dtypes)} needs mixed precision: pass --bf16")
    return None


def equal_share(count: int, processes: int, index: int) -> Sequence[int]:
    """Rows of one process: as many for each, the last row again where they do not come out even.

    Sharded models run in step, so that a process with fewer batches would leave the others waiting. One share after the
    other, cut to `count`, are the rows in their order.

    >>> [equal_share(5, 2, index) for index in range(2)]
    [[0, 1, 2], [3, 4, 4]]
    """
    size = -(-count // processes)
    return [min(row, count - 1) for row in range(index * size, (index + 1) * size)]
