"""Options that analyses share: the source of the rows, the encoder, and how its kernels are computed."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from propulsion.data import RowOptions, TaskData
from propulsion.identity import model_content
from propulsion.pretrained import DEFAULT_MODEL_NAME, Pooling, fingerprint, load_classifier, pooling_of
from propulsion.pretrained.options import LoadingOptions


@dataclass(frozen=True)
class DataOptions(LoadingOptions, RowOptions):
    """The source of the rows, how models are loaded, and their device."""

    device: str = "cpu"
    """Torch device, such as cpu or cuda."""


def model_identity(model: str | None, pooling: str, **loading: Any) -> dict[str, str]:
    """Name, pooling and fingerprint (`propulsion.pretrained.fingerprint`) of an encoder, as stored in results.

    Args:
        model: The encoder, as `propulsion.pretrained.load_model` takes it.
        pooling: Its pooling.
        loading: The options of `LoadingOptions`.
    """
    network, _ = load_classifier(model, num_labels=2, pooling=pooling, **loading)
    return {"name": model or DEFAULT_MODEL_NAME, "pooling": pooling_of(network), "fingerprint": fingerprint(network)}


@dataclass(frozen=True)
class EncoderOptions(DataOptions):
    """A pre-trained encoder with a new head."""

    model: str | None = None
    """Name (`python -m propulsion.models` lists them), hub name or folder of a pre-trained model; by default minilm,
    the packaged MiniLM-L6 encoder."""
    pooling: Pooling = "auto"
    """How a classifier pools hidden states: mean; first; pooler, as transformers does; auto, as its checkpoint says."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """Precision of the model."""
        return torch.float32

    def model_identity(self) -> dict[str, str]:
        """Name, pooling and fingerprint of the model, as stored in results."""
        return model_identity(self.model, self.pooling, **self.loading)

    def identity(self, data: TaskData) -> str:
        """Fingerprint of the model that every run starts from."""
        return model_content(*self.start(data, seed=0))

    def start(self, data: TaskData, *, seed: int) -> tuple[Any, Any]:
        """The model before training, with a head drawn from the seed, and its tokenizer."""
        return load_classifier(
            self.model, num_labels=data.task.num_labels, pooling=self.pooling, seed=seed, dtype=self.torch_dtype,
            device=self.device, **self.loading,
        )  # fmt: skip


@dataclass(frozen=True)
class KernelOptions(EncoderOptions):
    """An encoder whose kernels are computed."""

    memory_budget_gb: float | None = None
    """Memory for features and kernels in GB; by default half of what is free."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the model and its kernels."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """Precision of the model and its kernels."""
        return getattr(torch, self.dtype)
