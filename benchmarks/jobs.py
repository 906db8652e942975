"""The measured jobs as data: a model, a batch, and the computations that are timed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from benchmarks.networks import LSTMClassifier, depthwise, resnet18
from ntk import adapters
from propulsion.data import load_task_data, tokenize
from propulsion.pretrained import load_classifier

GIGABYTE = 2**30
TOKENS = 32  # SST-2 sentences are padded or cut to this many tokens.
TILE = 32  # Number of examples whose torch.func Jacobians are in memory at a time.

WIDEST = 4096  # Layers of the benchmarked models have at most this many inputs and outputs.


def random_matrix(rows: int, columns: int, seed: int) -> Tensor:
    """A frozen random projection that VeRA's layers share."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5


ATTENTION = ["query", "key", "value", "attention.output.dense"]
ADAPTERS = {
    "BitFit": adapters.BitFit(),
    "LayerNorm tuning": adapters.NormTuning(),
    "Propulsion": adapters.Propulsion(),
    "Propulsion, k = 15": adapters.Propulsion(degree=15),
    "Propulsion, attention": adapters.Propulsion(modules=ATTENTION),
    "(IA)3": adapters.IA3(["key", "value"], feedforward=r".*layer\.\d+\.output\.dense"),
    "LoRA, rank 1": adapters.LoRA(rank=1),
    "LoRA, rank 8": adapters.LoRA(rank=8),
    "DoRA, rank 8": adapters.DoRA(rank=8, seed=1),
    "VeRA, rank 256": adapters.VeRA(random_matrix(256, WIDEST, 0), random_matrix(WIDEST, 256, 1)),
    "LoHa, rank 8": adapters.LoHa(rank=8),
    "random subset": adapters.RandomSubset(count=1024),
}


@dataclass(frozen=True)
class Target:
    """The target of a measure: at most ``ratio`` times the time of the measure ``against``, and ``peak`` bytes."""

    measure: str
    against: str
    ratio: float
    peak: float | None = None


@dataclass(frozen=True)
class Job:
    """A model on a batch.

    Attributes:
        title: Its name in the table.
        load: Function from number of examples, data folder and device to the model and the batch.
        examples: Number of examples.
        measures: Names of the computations that are timed.
        targets: Targets for their time and memory.
        memory_budget: Bytes for the kernel's features, without the model; None for the library's default.
        repeats: Timed calls in each process after the first.
        rounds: Processes for each measure; the measures take turns.
        agree_on: Examples on which kernels are compared with torch.func's before anything is timed.
        tile: Number of examples whose torch.func Jacobians are in memory at a time.
    """

    title: str
    load: Callable[..., tuple[Any, dict[str, Tensor]]]
    examples: int
    measures: tuple[str, ...]
    targets: tuple[Target, ...]
    memory_budget: float | None = None
    repeats: int = 3
    rounds: int = 3
    agree_on: int = 8
    tile: int = TILE

    @property
    def adapted(self) -> bool:
        """Whether methods of fine-tuning are among the measures."""
        return not {"adapters", "Propulsion"}.isdisjoint(self.measures)


def minilm(examples: int, data_dir: Path | None, device: str) -> tuple[Any, dict[str, Tensor]]:
    """MiniLM-L6 with a head of two outputs, on the first sentences of SST-2's training set, padded to 32 tokens."""
    data = load_task_data("sst2", data_dir=data_dir)
    model, tokenizer = load_classifier(num_labels=2, device=device)
    rows = tokenize(data.train.select(range(examples)), tokenizer, data.task, TOKENS)
    columns = {name: rows[name] for name in rows.column_names if name != "labels"}
    batch = tokenizer.pad(columns, padding="max_length", max_length=TOKENS, return_tensors="pt")
    return model, {name: value.to(device) for name, value in batch.items()}


def roberta_large(examples: int, data_dir: Path | None, device: str) -> tuple[Any, dict[str, Tensor]]:
    """RoBERTa-large (355M) with random weights, on random tokens, 64 each, none of them padding."""
    config = hf.RobertaConfig(
        vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        max_position_embeddings=514, type_vocab_size=1, num_labels=2, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = hf.RobertaForSequenceClassification(config).eval()
        ids = torch.randint(4, 50265, (examples, 64))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def network(make: Callable[[], nn.Module], *shape: int) -> Callable[..., tuple[nn.Module, dict[str, Tensor]]]:
    """A function that makes a network with random weights, and random inputs of this shape."""

    def load(examples: int, data_dir: Path | None, device: str) -> tuple[nn.Module, dict[str, Tensor]]:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            return make().eval(), {"input": torch.randn(examples, *shape)}

    return load


def group_norm(channels: int) -> nn.Module:
    """A norm over groups of an eighth of the channels."""
    return nn.GroupNorm(8, channels)


BESIDE = Target("adapters", "full", 1.25)
JOBS = {
    "minilm-32": Job(
        "MiniLM-L6, 32 SST-2 sentences", minilm, 32, ("full", "adapters", "bare", "torch.func"),
        (Target("full", "torch.func", 1 / 25, 1.5 * GIGABYTE), BESIDE),
    ),
    "minilm-128": Job(
        "MiniLM-L6, 128 SST-2 sentences", minilm, 128, ("full", "adapters", "bare", "torch.func"),
        (Target("full", "torch.func", 1 / 25, 2.5 * GIGABYTE), BESIDE), memory_budget=1.5 * GIGABYTE,
        repeats=2, rounds=1,
    ),
    "minilm-1024": Job(
        "MiniLM-L6, 1,024 SST-2 sentences", minilm, 1024, ("Propulsion", "bare"),
        (Target("Propulsion", "bare", 1.3),), repeats=0, rounds=2,
    ),
    "roberta-large-64": Job(
        "RoBERTa-large, 64 x 64 tokens", roberta_large, 64, ("full", "adapters", "bare"),
        (Target("full", "bare", 2.0, 8 * GIGABYTE), BESIDE), memory_budget=5.5 * GIGABYTE,
        repeats=0, rounds=1, agree_on=2,
    ),
    "roberta-large-256": Job(
        "RoBERTa-large, 256 x 64 tokens", roberta_large, 256, ("full", "adapters", "bare"), (BESIDE,),
        repeats=0, rounds=1, agree_on=2,
    ),
    "resnet18-gn-32": Job(
        "ResNet-18 with GroupNorm, 32 images of 32 x 32", network(lambda: resnet18(group_norm), 3, 32, 32), 32,
        ("full", "bare"), (Target("full", "bare", 2.0),), repeats=2, rounds=1, agree_on=2,
    ),
    "resnet18-bn-32": Job(
        "ResNet-18 with BatchNorm, 32 images of 32 x 32", network(lambda: resnet18(nn.BatchNorm2d), 3, 32, 32), 32,
        ("full", "bare"), (Target("full", "bare", 2.0),), repeats=2, rounds=1, agree_on=2,
    ),
    "resnet18-gn-8": Job(
        "ResNet-18 with GroupNorm, 8 images of 32 x 32", network(lambda: resnet18(group_norm), 3, 32, 32), 8,
        ("full", "bare", "torch.func"), (Target("full", "torch.func", 1 / 10),), repeats=1, rounds=1, agree_on=2,
        tile=4,
    ),
    "depthwise-32": Job(
        "Depthwise network, 32 images of 32 x 32", network(depthwise, 3, 32, 32), 32, ("full", "bare", "torch.func"),
        (Target("full", "bare", 2.0), Target("full", "torch.func", 1 / 10)), repeats=2, rounds=1, agree_on=2,
    ),
    "lstm-32": Job(
        "LSTM, 32 sequences of 50 steps", network(LSTMClassifier, 50, 64), 32, ("full", "bare", "jacobian"),
        (Target("full", "bare", 2.5),), repeats=2, rounds=1, agree_on=2,
    ),
}  # fmt: skip
