"""Reading of single weights from the files of a checkpoint, without loading the model."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file


class CheckpointWeights(Mapping[str, Tensor]):
    """Chosen weights of a checkpoint (a local folder or hub name), each read when it is accessed.

    Chosen names that are in no file are left out, since a model may name its weights otherwise than its files do.
    """

    def __init__(self, source: str, names: set[str], **options: Any):
        """Find the files of the weights; options are those of `transformers.utils.cached_file`, such as `subfolder`."""
        self._files = {name: file for name, file in _files_by_weight(source, options).items() if name in names}

    def __getitem__(self, name: str) -> Tensor:
        return _weights(self._files[name])[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._files))

    def __len__(self) -> int:
        return len(self._files)


def _files_by_weight(source: str, options: dict[str, Any]) -> dict[str, Path]:
    def find(name: str) -> Path | None:
        path = cached_file(
            source, name, **options, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        return None if path is None else Path(path)

    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (file := find(single)) is not None:
            return dict.fromkeys(_weights(file), file)
        if (listed := find(index)) is not None:
            shards = json.loads(listed.read_text(encoding="utf-8"))["weight_map"]
            # The shards are beside their index, since the model has been loaded from them.
            return {name: listed.parent / shard for name, shard in shards.items()}
    return {}


def _weights(file: Path) -> dict[str, Tensor]:
    """All weights of a file, mapped to memory: values are read from the disk when they are used."""
    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
