"""The whole kernel as one memory-mapped file, put together from its tiles."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ntk.layout import mirrored
from ntk.store import files
from ntk.store.identity import tensors_digest

_NAME = re.compile(r"kernel-[0-9a-f]{16}\.npy")


def assembled(
    folder: Path, blocks: Sequence[tuple[int, int]], tiles: Mapping[tuple[int, int], tuple[Path, str]]
) -> Path:
    """The path of the whole kernel, whose name is a digest of its tiles; it is made if it is not there.

    Files of earlier kernels, before examples were added, are removed.

    Args:
        folder: of the store.
        blocks: first example and number of examples of each block.
        tiles: the file of each pair of blocks, row <= column, and what it is computed from.

    Raises:
        Damaged: a tile is missing or damaged.
        OSError: the file cannot be written.
    """
    digests = {str(pair): torch.tensor(list(files.digest_of(path).encode())) for pair, (path, _) in tiles.items()}
    whole = folder / f"kernel-{tensors_digest(digests)[:16]}.npy"
    if whole.exists():
        return whole
    n, partial = sum(count for _, count in blocks), files.beside(whole)
    try:
        with files.full_disk(f"{folder} has no room for the whole kernel; its tiles are kept"):
            kernel = None
            for (i, j), (path, of) in tiles.items():
                tile = files.read(path, of)["kernel"]
                if kernel is None:
                    shape = (n, n, *tile.shape[2:])
                    kernel = np.lib.format.open_memmap(partial, "w+", tile.numpy().dtype, shape)
                rows, columns = (slice(start, start + count) for start, count in (blocks[i], blocks[j]))
                kernel[rows, columns] = tile.numpy()
                if i != j:
                    kernel[columns, rows] = mirrored(tile).numpy()
            assert kernel is not None
            kernel.flush()
            del kernel
            files.publish(partial, whole)
    finally:
        partial.unlink(missing_ok=True)
    for older in folder.glob("kernel-*.npy"):
        if older != whole and _NAME.fullmatch(older.name):
            older.unlink()
    return whole
