"""Measure the cost of a training step, by method: `python -m benchmarks.steps`.

All methods adapt the same linear layers. Memory is measured in one process for each method. Times are measured in one
process, where the methods take turns and ratios are taken within a turn. Results are written to
`docs/benchmarks/steps.{json,md}`, where a new measurement of a model replaces the earlier one.
"""

import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from analyses.records import environment, format_table, number
from benchmarks.measure import in_own_process, peak, synchronize, write_document, write_json
from propulsion import PropulsionConfig
from propulsion.command_line import parsed
from propulsion.errors import UserError, run_command
from propulsion.pretrained import load_classifier

MEGABYTE = 2**20
WARM_UP = 2
BASELINE = "(IA)3"


@dataclass(frozen=True)
class Model:
    """A classifier and a batch for it.

    Attributes:
        title: Its name in the table.
        load: Function from a device to the model.
        targets: Regular expression for the linear layers that every method adapts.
        shape: (examples, tokens) of the batch, without padding.
    """

    title: str
    load: Callable[[str], Any]
    targets: str
    shape: tuple[int, int]


SMALL_LLAMA = hf.LlamaConfig(  # The sizes of SmolLM2-135M.
    hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
    vocab_size=49152, max_position_embeddings=2048, num_labels=2, pad_token_id=0,
)  # fmt: skip
LLAMA = hf.LlamaConfig(  # The sizes of Llama-3.2-1B.
    hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, intermediate_size=8192,
    vocab_size=128256, max_position_embeddings=2048, num_labels=2, pad_token_id=0,
)  # fmt: skip


def llama(config: hf.LlamaConfig, device: str) -> Any:
    """A classifier of these sizes with random weights."""
    with torch.device(device):
        torch.manual_seed(0)
        return hf.LlamaForSequenceClassification(config)


MODELS = {
    "minilm": Model(
        "MiniLM-L6, 32 x 64 tokens",
        lambda device: load_classifier(num_labels=2, device=device)[0],
        r".*layer\.\d+\..*(query|key|value|dense)",
        (32, 64),
    ),
    "llama-135m": Model(
        "Llama of 135M, 4 x 128 tokens", partial(llama, SMALL_LLAMA), r".*layers\.\d+\..*_proj", (4, 128)
    ),
    "llama-1b": Model(
        "Llama of 1.2B, 8 x 512 tokens", partial(llama, LLAMA), r".*layers\.\d+\..*_proj", (8, 512)
    ),
}  # fmt: skip


def bitfit(model: Any, targets: str) -> Any:
    """The model with only the layers' biases trained; layers without one, as in LLaMA-style models, get a zero bias."""
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and re.fullmatch(targets, name):
            if module.bias is None:
                module.bias = nn.Parameter(torch.zeros(module.out_features, device=module.weight.device))
            module.bias.requires_grad_(True)
    return model


METHODS: dict[str, Callable[[Any, str], Any]] = {
    "Propulsion": lambda m, t: get_peft_model(m, PropulsionConfig(target_modules=t)),
    "Propulsion, lean=False": lambda m, t: get_peft_model(m, PropulsionConfig(target_modules=t, lean=False)),
    "(IA)3": lambda m, t: get_peft_model(m, IA3Config(target_modules=t, feedforward_modules=[])),
    "LoRA, rank 8": lambda m, t: get_peft_model(m, LoraConfig(target_modules=t, r=8)),
    "BitFit": bitfit,
    "full": lambda m, t: m.requires_grad_(True),
}


@dataclass(frozen=True)
class Config:
    """Options of the command."""

    models: list[str] = field(default_factory=lambda: ["minilm", "llama-135m"])
    """Models to measure: any of minilm, llama-135m and, for a GPU, llama-1b."""
    turns: int = 12
    """Timed steps of each method."""
    times: bool = True
    """Time steps; otherwise only memory is measured."""
    device: str = "cpu"
    """Torch device, such as cpu or cuda."""
    output_dir: Path = Path("docs/benchmarks")
    """Folder of the results."""
    child: str | None = None
    """Measure the memory of this method, or with "times" the times of all, here, and print one line of JSON."""


def main(config: Config) -> None:
    """Measure all methods and write the table."""
    for name in config.models:
        if name not in MODELS:
            raise UserError(f"no model {name!r}; there are {', '.join(MODELS)}")
    if config.child is not None:
        spec = MODELS[config.models[0]]
        times = config.child == "times"
        print(json.dumps(seconds(spec, config) if times else memory(spec, config.child, config.device)))
        return
    config.output_dir.mkdir(parents=True, exist_ok=True)
    path = config.output_dir / ("steps.json" if config.device == "cpu" else f"steps-{config.device}.json")
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for model in config.models:
        found[model] = {
            "seconds": child(model, "times", config) if config.times else {},
            "memory": {method: child(model, method, config) for method in METHODS},
            "device": config.device,
            "environment": environment(),
        }
        write_json(path, found)
        print(format_table(HEADER, rows(model, found[model])), flush=True)
    table = format_table(HEADER, [row for m in MODELS if m in found for row in rows(m, found[m])], markdown=True)
    on = "" if config.device == "cpu" else f", {config.device}"
    write_document(path.with_suffix(".md"), "steps.md.jinja", on=on, table=table, json=path.name)


def child(model: str, what: str, config: Config) -> dict[str, Any]:
    """Run one measurement in its own process."""
    turns = str(config.turns)
    return in_own_process("steps", "--models", model, "--child", what, "--device", config.device, "--turns", turns)


def training(spec: Model, method: str, device: str) -> tuple[nn.Module, dict[str, Tensor], Callable[[], None]]:
    """A model, a batch, and a function that takes one training step."""
    model = METHODS[method](spec.load(device), spec.targets).train()
    torch.manual_seed(0)
    ids = torch.randint(5, 1000, spec.shape, device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = torch.randint(2, spec.shape[:1], device=device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0)

    def step() -> None:
        torch.nn.functional.cross_entropy(model(**batch).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize()

    return model, batch, step


def seconds(spec: Model, config: Config) -> dict[str, list[float]]:
    """Seconds of a step for every turn, by method; each turn begins with another method."""
    steps = {method: training(spec, method, config.device)[2] for method in METHODS}
    found: dict[str, list[float]] = {method: [] for method in METHODS}
    order = list(METHODS)
    for turn in range(WARM_UP + config.turns):
        for method in order[turn % len(order) :] + order[: turn % len(order)]:
            start = time.perf_counter()
            steps[method]()
            found[method].append(time.perf_counter() - start)
    return {method: times[WARM_UP:] for method, times in found.items()}


def memory(spec: Model, method: str, device: str) -> dict[str, int]:
    """Number of trained parameters, bytes that autograd keeps for the backward pass, and peak bytes."""
    model, batch, step = training(spec, method, device)
    for _ in range(2):
        step()
    peak_bytes = peak()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"parameters": parameters, "kept": kept_bytes(model, batch), "peak_bytes": peak_bytes}


def kept_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes of the distinct tensors that autograd keeps after a forward pass, without parameters and the batch."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *batch.values())}
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        model(**batch)
    return sum(sizes.values())


def time_cells(found: dict[str, list[float]], method: str) -> tuple[str, str]:
    """Median time of a step, and median and quartiles of its ratio to the baseline's; dashes if not timed."""
    if not found:
        return "-", "-"
    ratios = [a / b for a, b in zip(found[method], found[BASELINE], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    spread = "" if method == BASELINE else f" ({low:.2f} to {high:.2f})"
    return number(statistics.median(found[method])), f"{middle:.2f}{spread}"


HEADER = ("model and method", "parameters", "step, s", "over (IA)3", "kept, MB", "over (IA)3", "peak, MB")


def rows(model: str, found: dict[str, Any]) -> list[list[str]]:
    """One row for each method."""
    lines = [[f"**{MODELS[model].title}**", *[""] * (len(HEADER) - 1)]]
    for method, of_method in found["memory"].items():
        lines.append([
            method, f"{of_method['parameters']:,}", *time_cells(found["seconds"], method),
            number(of_method["kept"] / MEGABYTE), f"{of_method['kept'] / found['memory'][BASELINE]['kept']:.2f}",
            number(of_method["peak_bytes"] / MEGABYTE),
        ])  # fmt: skip
    return lines


if __name__ == "__main__":
    run_command(lambda: main(parsed(Config, prog="python -m benchmarks.steps", description=__doc__)))
