"""Child processes that end with the process that started them, however that one ends."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux' prctl


def run_python(words: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run this Python with these arguments, and wait for it.

    An interrupt or SIGTERM of this process ends the child. On Linux, where the kernel can do it, so does SIGKILL.

    Args:
        words: Arguments of the interpreter.
        options: Options of `subprocess.run`.
    """
    with_parent = partial(_end_with_parent, os.getpid()) if sys.platform == "linux" else None
    return subprocess.run([sys.executable, *words], check=False, preexec_fn=with_parent, **options)


def _end_with_parent(parent: int) -> None:
    """Ask the kernel to end this process with its parent; called in the child before the program starts."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:  # The parent ended before the kernel was asked.
        os.kill(os.getpid(), signal.SIGTERM)
