"""The software and the machine of a run, with which a reader can explain small numerical differences between runs."""

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

_LIBRARIES = ("torch", "transformers", "peft", "numpy", "scipy")
_CODE = ("analyses", "figures", "ntk", "propulsion", "pyproject.toml")


def environment() -> dict[str, Any]:
    """Describe the software and the machine of this run.

    Returns:
        Versions of Python and of the libraries (None if not installed), platform, thread count and accelerator (None
        where torch is not loaded), and the commit of the code with whether it had uncommitted changes (both None
        outside a git checkout).
    """
    torch = sys.modules.get("torch")
    commit, dirty = _commit(Path(__file__).resolve().parents[2])
    return {
        "propulsion_ntk": _version("propulsion-ntk"),
        "python": platform.python_version(),
        **{name: _version(name) for name in _LIBRARIES},
        "platform": platform.platform(),
        "threads": torch.get_num_threads() if torch else None,
        "accelerator": torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None,
        "commit": commit,
        "dirty": dirty,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(root: Path) -> tuple[str | None, bool | None]:
    top = _git(root, "rev-parse", "--show-toplevel")
    # A virtual environment often lies inside some other repository, whose commit says nothing about this code.
    if top is None or Path(top).resolve() != root:
        return None, None
    changes = _git(root, "status", "--porcelain", "--", *_CODE)
    return _git(root, "rev-parse", "HEAD"), None if changes is None else bool(changes)


def _git(root: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
