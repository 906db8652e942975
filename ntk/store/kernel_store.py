"""A kernel in a folder, in square tiles of blocks of examples.

    store.json                    what the kernel depends on but for its examples
    keys.json                     the examples: by key, their number and digest
    examples/KEY-BLOCK.safetensors
    tiles/ROW-COLUMN.safetensors  kernel of two blocks of examples, row <= column
    kernel-DIGEST.npy             the tiles put together by `load`

Every file is written beside its place and renamed, so that a tile that is there is complete. Processes share the work
by a lock for each tile, which the system releases when its process ends in any way.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm.auto import tqdm

from ntk.checks import check_count
from ntk.empirical import empirical_ntk
from ntk.functional import ParameterChoice
from ntk.inputs import Batch, Inputs, batch_size, by_name
from ntk.layout import layout_of
from ntk.outputs import Output
from ntk.store import files
from ntk.store.assembly import assembled
from ntk.store.identity import inputs_digest, kernel_identity, tensors_digest

FORMAT = "1"
BLOCK = 512
BUDGET = 1.5e9
_WAIT = 0.1  # seconds between two looks at tiles that other processes compute


@dataclass(frozen=True)
class Block:
    """Consecutive examples of one key.

    Attributes:
        key: their key.
        file: name of their file.
        start: index of the first among all examples of the store.
        n: their number.
        digest: of their content.
    """

    key: str
    file: str
    start: int
    n: int
    digest: str


@dataclass(frozen=True)
class Status:
    """How much of a store is there.

    Attributes:
        examples: number of examples by key, in the order in which they were added.
        complete: number of complete tiles.
        total: number of all tiles.
        size: bytes of the complete tiles.
    """

    examples: dict[str, int]
    complete: int
    total: int
    size: int

    def __str__(self) -> str:
        """One line for each key, and one for the tiles."""
        lines = [f"{key}: {n:,} examples" for key, n in self.examples.items()]
        return "\n".join([*lines, f"{self.complete:,} of {self.total:,} tiles complete, {self.size / 1e6:,.1f} MB"])


def kernel_store(
    path: Path | str,
    model: nn.Module,
    *,
    block: int | None = None,
    params: ParameterChoice = "all",
    output: Output | None = None,
    reduce: str | None = None,
    memory_budget: int | float = BUDGET,
) -> "KernelStore":
    """Open the kernel of a model in a folder, which is made if it is not there.

    Args:
        path: the folder.
        model: as in :func:`ntk.empirical_ntk`.
        block: examples of a block; a tile has block^2 pairs. None for that of the folder, or 512 in a new one.
        params: as in :func:`ntk.empirical_ntk`.
        output: as in :func:`ntk.empirical_ntk`; a function that another process can recognise.
        reduce: as in :func:`ntk.empirical_ntk`.
        memory_budget: bytes for features and kernels of a tile. Bits of tiles depend on it, and on the number of
            threads, since sums are split by them.

    Returns:
        The store. Tiles are those of :func:`ntk.empirical_ntk`, by the same checks.

    Raises:
        ValueError: the folder is that of another kernel, of which the message names what differs; or it is not empty
            and no store.
        OSError: the folder cannot be read or written.

    Example:
        >>> import tempfile
        >>> model, x = torch.nn.Linear(3, 1), torch.randn(5, 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = kernel_store(folder, model, block=2, reduce="trace")
        ...     store.add(x, key="train")
        ...     store.compute()
        ...     store.load().shape
        (5, 5)
    """
    layout_of(reduce)
    if not memory_budget > 0:
        raise ValueError(f"memory_budget, in bytes, must be above 0; got {memory_budget}")
    identity = {"format": FORMAT} | kernel_identity(model, params, output, reduce)
    folder = Path(path).expanduser()
    if block is not None:
        check_count(block, "the block of a store")
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_foreign(folder)  # Before a lock is written into it.
    with _lock(folder / ".lock"):
        if (folder / "store.json").exists():
            block = _check_same(folder, identity, block)
        else:
            _refuse_foreign(folder)
            block = block or BLOCK
            files.write_text(folder / "store.json", json.dumps(identity | {"block": block}, indent=1) + "\n")
        for name in ("examples", "tiles"):
            (folder / name).mkdir(exist_ok=True)
    options: dict[str, Any] = {"params": params, "output": output, "reduce": reduce, "memory_budget": memory_budget}
    return KernelStore(folder, model, block, identity, options)


class KernelStore:
    """A kernel in a folder; made by :func:`kernel_store`."""

    def __init__(self, folder: Path, model: nn.Module, block: int, identity: dict[str, str], options: dict[str, Any]):
        self.path, self.block = folder, block
        self._model, self._identity, self._options = model, identity, options
        self._verified: set[str] = set()

    def add(self, inputs: Inputs, key: str = "train") -> None:
        """Add examples under a key; the same examples under the same key are there already.

        Args:
            inputs: a tensor, a tuple of tensors, or a mapping of batched tensors.
            key: any name.

        Raises:
            ValueError: other examples have this key; an entry is no tensor.
            OSError: they cannot be written.
        """
        inputs = by_name(self._model, inputs)
        n, digest = batch_size(inputs), inputs_digest(inputs)
        with _lock(self.path / ".lock"):
            keys = self._keys()
            number = list(keys).index(key) if key in keys else len(keys)
            if key in keys and keys[key]["digest"] != digest:
                raise ValueError(
                    f"key {key!r} of {self.path} holds {keys[key]['n']} other examples: add these under another key"
                )
            parts = [_part(inputs, n, slice(start, start + self.block)) for start in range(0, n, self.block)]
            for index, part in enumerate(parts):
                path = self.path / "examples" / _name(number, index)
                with files.full_disk(f"{self.path} has no room for examples of {key!r}; free some and add again"):
                    if key not in keys or not _whole(path):
                        files.write(path, part)
            if key not in keys:
                keys[key] = {"n": n, "digest": digest, "blocks": [tensors_digest(part) for part in parts]}
                files.write_text(self.path / "keys.json", json.dumps(keys, indent=1) + "\n")

    def compute(self, *, progress: bool = False) -> None:
        """Compute the tiles that are missing or damaged, beside other processes that do the same.

        A process takes the tiles that no other one computes, and returns when all are complete. Under `torchrun` or
        `accelerate launch`, processes begin at different tiles. A process that dies leaves its tile to the others.

        Raises:
            ValueError: as :func:`ntk.empirical_ntk`; the model has changed since the store was opened; examples are
                damaged.
            MemoryError: as :func:`ntk.empirical_ntk`.
            OSError: a tile cannot be written; complete tiles are kept.
        """
        options = {name: self._options[name] for name in ("params", "output", "reduce")}
        if {"format": FORMAT} | kernel_identity(self._model, **options) != self._identity:
            raise ValueError(
                f"the model has changed since the store {self.path} was opened: open another folder with it"
            )
        blocks = self._blocks()
        pairs = _pairs(blocks)
        rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        first = len(pairs) * rank // world
        with tqdm(total=len(pairs), desc="tiles", disable=None if progress else True, leave=False) as bar:
            while pending := [pair for pair in (*pairs[first:], *pairs[:first]) if not self._complete(blocks, *pair)]:
                bar.update(len(pairs) - len(pending) - bar.n)
                if not sum(self._try(blocks, *pair) for pair in pending):
                    time.sleep(_WAIT)

    def load(self, rows: str | None = None, columns: str | None = None) -> np.ndarray:
        """The kernel, memory-mapped and read-only: ``(n, n, c, c)`` or its reduction, in the order of adding.

        Args:
            rows: the key of the rows; None for all examples.
            columns: the key of the columns; that of the rows if None.

        Raises:
            KeyError: there is no such key.
            ValueError: tiles are missing or damaged.
            OSError: the kernel cannot be written.
        """
        blocks, status = self._blocks(), self.status()
        if status.complete < status.total or not blocks:
            raise ValueError(
                f"{status.total - status.complete} of {status.total} tiles of {self.path} are missing or damaged: call "
                "compute() first" if blocks else f"{self.path} has no examples: add some"
            )  # fmt: skip
        paths = {(i, j): (self._tile(i, j), self._origin(blocks[i], blocks[j])) for i, j in _pairs(blocks)}
        with _lock(self.path / ".assembly.lock"):
            whole = np.load(assembled(self.path, [(b.start, b.n) for b in blocks], paths), mmap_mode="r")
        spans = {
            key: slice(min(b.start for b in blocks if b.key == key), max(b.start + b.n for b in blocks if b.key == key))
            for key in status.examples
        }
        for key in (rows, columns):
            if key is not None and key not in spans:
                raise KeyError(f"{self.path} has no examples of key {key!r}, only {', '.join(map(repr, spans))}")
        chosen = [slice(None) if key is None else spans[key] for key in (rows, columns or rows)]
        return whole[chosen[0], chosen[1]]

    def status(self) -> Status:
        """Examples and complete tiles; each tile is read once, to see that it is not damaged."""
        blocks = self._blocks()
        pairs = _pairs(blocks)
        complete = [pair for pair in pairs if self._complete(blocks, *pair)]
        size = sum(self._tile(*pair).stat().st_size for pair in complete)
        return Status({key: entry["n"] for key, entry in self._keys().items()}, len(complete), len(pairs), size)

    @cached_property
    def _device(self) -> torch.device:
        return next((p.device for p in self._model.parameters()), torch.device("cpu"))

    def _keys(self) -> dict[str, Any]:
        path = self.path / "keys.json"
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError as error:
            raise ValueError(f"{path} is damaged: name another folder") from error

    def _blocks(self) -> list[Block]:
        blocks, total = [], 0
        for number, (key, entry) in enumerate(self._keys().items()):
            for index, digest in enumerate(entry["blocks"]):
                n = min(self.block, entry["n"] - index * self.block)
                blocks.append(Block(key, _name(number, index), total, n, digest))
                total += n
        return blocks

    def _tile(self, i: int, j: int) -> Path:
        return self.path / "tiles" / _name(i, j)

    def _origin(self, rows: Block, columns: Block) -> str:
        """What a tile is computed from: the kernel and the content of its examples."""
        return json.dumps([self._identity, rows.digest, columns.digest], sort_keys=True)

    def _complete(self, blocks: list[Block], i: int, j: int) -> bool:
        path, origin = self._tile(i, j), self._origin(blocks[i], blocks[j])
        known = f"{path.name} {origin}"
        if known not in self._verified and path.exists() and _whole(path, origin):
            self._verified.add(known)
        return known in self._verified and path.exists()

    def _try(self, blocks: list[Block], i: int, j: int) -> bool:
        """Compute a tile unless another process does; whether it is complete now."""
        try:
            with _lock(self._tile(i, j).with_suffix(".lock"), blocking=False):
                for leftover in self.path.glob(f"tiles/.{self._tile(i, j).name}.partial-*"):
                    leftover.unlink()  # of a process that was killed
                if not self._complete(blocks, i, j):
                    kernel = self._kernel(blocks[i], None if i == j else blocks[j])
                    kept = "complete tiles are kept: free some space and call compute() again"
                    with files.full_disk(f"{self.path} has no room for another tile; {kept}"):
                        files.write(self._tile(i, j), {"kernel": kernel}, self._origin(blocks[i], blocks[j]))
        except Timeout:
            return False
        return True

    def _kernel(self, rows: Block, columns: Block | None) -> Tensor:
        others = None if columns is None else self._inputs(columns)
        return empirical_ntk(self._model, self._inputs(rows), others, **self._options)

    def _inputs(self, block: Block) -> Inputs:
        try:
            tensors = files.read(self.path / "examples" / block.file)
        except files.Damaged as error:
            raise ValueError(
                f"{error}: add the same examples again under key {block.key!r}, which repairs it"
            ) from None
        tensors = {name: value.to(self._device) for name, value in tensors.items()}
        return tensors[""] if tensors.keys() == {""} else tensors


def status_of(path: Path | str) -> Status:
    """Examples and complete tiles of a store, without its model.

    Raises:
        ValueError: the folder is no store.
    """
    folder = Path(path).expanduser()
    if not (folder / "store.json").is_file():
        raise ValueError(f"{folder} is no store of a kernel: it has no store.json")
    block, identity = _stored(folder)
    return KernelStore(folder, nn.Module(), block, identity, {}).status()


def check_examples(model: nn.Module, inputs: Any, key: str, options: Mapping[str, Any]) -> None:
    """Compute the kernel of the first of some examples, so that those that cannot be used are not stored.

    Args:
        model: the model.
        inputs: examples, as of `KernelStore.add`.
        key: their key.
        options: of :func:`ntk.empirical_ntk`.

    Raises:
        ValueError: as :func:`ntk.empirical_ntk`; the model fails on the first example.
        MemoryError: as :func:`ntk.empirical_ntk`.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a model, a torch module; got {type(model).__name__}")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        named = by_name(model, inputs)
        first = {name: x.to(device) for name, x in _part(named, batch_size(named), slice(1)).items()}
        empirical_ntk(model, first[""] if first.keys() == {""} else first, **options)
    except NotImplementedError:
        raise
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"the model has no kernel on the examples of {key!r}: {error}") from error


def _refuse_foreign(folder: Path) -> None:
    """Raise ValueError for a folder that is not empty and no store."""
    if not (folder / "store.json").exists():
        foreign = [each.name for each in folder.iterdir() if each.name != ".lock"]
        if foreign:
            raise ValueError(f"{folder} holds {foreign[0]} and is no store of a kernel: name a new or empty folder")


def _stored(folder: Path) -> tuple[int, dict[str, str]]:
    """The block and the identity of the store in a folder."""
    try:
        identity = json.loads((folder / "store.json").read_text(encoding="utf-8"))
        return int(identity.pop("block")), {str(name): str(value) for name, value in identity.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'store.json'} is damaged: name another folder") from error


def _check_same(folder: Path, identity: dict[str, str], block: int | None) -> int:
    """The block of the store in a folder."""
    stored_block, stored = _stored(folder)
    names = [name for name in identity if stored.get(name) != identity[name]]
    if names:
        differing = ", ".join(f"{name} ({stored.get(name)} there, {identity[name]} here)" for name in names)
        raise ValueError(f"{folder} is the store of another kernel, with other {differing}: name another folder")
    if block is not None and block != stored_block:
        raise ValueError(f"{folder} has blocks of {stored_block} examples; got block={block}: leave it out")
    return stored_block


def _part(inputs: Batch, n: int, rows: slice) -> dict[str, Tensor]:
    """The rows of every entry; one with a single row is shared by all examples."""
    entries = {"": inputs} if isinstance(inputs, Tensor) else inputs
    return {name: value[rows] if value.ndim and len(value) == n else value for name, value in entries.items()}


def _pairs(blocks: list[Block]) -> list[tuple[int, int]]:
    """The tiles of a symmetric kernel: rows and columns of blocks, row <= column."""
    return [(i, j) for i in range(len(blocks)) for j in range(i, len(blocks))]


def _name(first: int, second: int) -> str:
    return f"{first:05}-{second:05}.safetensors"


def _whole(path: Path, of: str = "") -> bool:
    with suppress(files.Damaged):
        files.read(path, of)
        return True
    return False


@contextmanager
def _lock(path: Path, *, blocking: bool = True) -> Iterator[None]:
    with FileLock(path, blocking=blocking):
        yield
