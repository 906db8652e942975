"""Cost of a training step, by method: `python -m benchmarks.steps`.

All methods adapt the same linear layers. Each runs in processes of its own, in turn; ratios are taken within a round.
Results go to `docs/benchmarks/steps.{json,md}`, where a model that is measured anew replaces its earlier result.
"""

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf
import tyro
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from analyses.results import environment
from analyses.tables import format_table, number
from benchmarks.measure import peak_bytes, synchronize
from propulsion import PropulsionConfig
from propulsion.errors import UserError, run_command
from propulsion.pretrained import load_classifier

MEGABYTE = 2**20
WARM_UP, STEPS = 2, 7


@dataclass(frozen=True)
class Model:
    """A classifier and a batch for it.

    Attributes:
        title: what the table calls it.
        load: it, from a device.
        targets: the linear layers that every method adapts, as a regular expression.
        shape: (examples, tokens) of the batch, without padding.
    """

    title: str
    load: Callable[[str], Any]
    targets: str
    shape: tuple[int, int]


def llama(device: str) -> Any:
    """A Llama of 135M parameters (the sizes of SmolLM2-135M) with random weights."""
    config = hf.LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
        vocab_size=49152, max_position_embeddings=2048, num_labels=2, pad_token_id=0,
    )  # fmt: skip
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
        "Llama of 135M, 4 x 128 tokens", llama, r".*layers\.\d+\..*_proj", (4, 128)
    ),
}  # fmt: skip


def bitfit(model: Any, targets: str) -> Any:
    """Biases of the layers; added where there are none, as LLaMA-style models have none."""
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
    """Measure the cost of training steps."""

    models: list[str] = field(default_factory=lambda: list(MODELS))
    """Any of minilm, llama-135m."""
    rounds: int = 3
    """Processes of each method, in turn."""
    device: str = "cpu"
    """Where models run."""
    output_dir: Path = Path("docs/benchmarks")
    """Where results go."""
    child: str | None = None
    """Measure one method of one model in this process, and print one line of JSON."""


def main(config: Config) -> None:
    """Measure all methods and write the table."""
    for name in config.models:
        if name not in MODELS:
            raise UserError(f"no model {name!r}; there are {', '.join(MODELS)}")
    if config.child is not None:
        print(json.dumps(measure(MODELS[config.models[0]], config.child, config.device)))
        return
    config.output_dir.mkdir(parents=True, exist_ok=True)
    path = config.output_dir / ("steps.json" if config.device == "cpu" else f"steps-{config.device}.json")
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for model in config.models:
        runs: dict[str, list[dict]] = {method: [] for method in METHODS}
        for _ in range(config.rounds):
            for method in METHODS:
                runs[method].append(child(model, method, config.device))
        print(format_table(HEADER, rows(model, runs)), flush=True)
        found[model] = {"runs": runs, "rounds": config.rounds, "device": config.device, "environment": environment()}
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    measured = {model: found[model]["runs"] for model in MODELS if model in found}
    table = format_table(HEADER, [row for m, runs in measured.items() for row in rows(m, runs)], markdown=True)
    path.with_suffix(".md").write_text(TEXT.format(table=table, json=path.name, steps=STEPS), encoding="utf-8")


TEXT = """# Cost of a training step

Written by `python -m benchmarks.steps`; `{json}` holds all runs and their environment.

One step of AdamW in float32, every method on the same linear layers of the blocks. *Kept* is what autograd holds
between the forward and the backward pass, parameters aside, tensor by tensor; *peak* is of the whole process, which
loads the model and takes the steps. Times are medians of {steps} steps in a process, ratios those of one round, and
both then medians over the rounds.

{table}

- **Propulsion** is the default: it keeps a layer's scaled output for the gradient of z, and writes it over the unscaled
  one ([`propulsion/lean.py`](../../propulsion/lean.py)). With `lean=False` autograd keeps the unscaled output, as in
  (IA)3: where an activation or the attention keeps the scaled one too, that is two tensors for one.
- **BitFit** shows what every method keeps: a bias needs nothing of its layer for its gradient. A scale needs a number
  for each output and token; it comes down to BitFit only in layers whose output something else keeps, as activations
  do. Attention with dropout, and rotary embeddings, keep copies of what they read, and what goes into a residual sum is
  kept by nobody. So the aim of the least memory of all is met but for BitFit, which no scale can undercut.
- **LoRA** needs its layer's input, which several layers may share, and which nothing else keeps where the weights are
  frozen.
- Not taken: to keep the input and form the unscaled output again in the backward pass. It needs no special case at
  z = 0, but a third matrix product, and keeps more where a layer narrows (the last of a feed-forward block) or where
  its output is kept anyway (the first). What goes into a residual sum is also the difference of the sums around it,
  which are kept; but a difference cancels, and would not be exact.
- Tried, and no faster: scaling the weight instead of the output, sums over blocks of tokens that fit a cache, and
  `torch.linalg.vecdot`. Writing into memory that is already there is what saves time.
"""


def child(model: str, method: str, device: str) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.steps", "--models", model, "--child", method, "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(spec: Model, method: str, device: str) -> dict[str, Any]:
    """Seconds of a step, bytes kept for the backward pass, peak bytes, trained parameters."""
    model = METHODS[method](spec.load(device), spec.targets).train()
    torch.manual_seed(0)
    ids = torch.randint(5, 1000, spec.shape, device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = torch.randint(2, spec.shape[:1], device=device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0)
    seconds = []
    for _ in range(WARM_UP + STEPS):
        synchronize()
        start = time.perf_counter()
        torch.nn.functional.cross_entropy(model(**batch).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        seconds.append(time.perf_counter() - start)
    peak = peak_bytes()
    return {"seconds": statistics.median(seconds[WARM_UP:]), "kept": kept_bytes(model, batch), "peak_bytes": peak,
            "parameters": sum(p.numel() for p in trained)}  # fmt: skip


def kept_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes of the distinct tensors that autograd holds at the end of a forward pass, parameters and batch aside."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *batch.values())}
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        output = model(**batch).logits
    total = sum(sizes.values())
    del output
    return total


HEADER = ("model and method", "parameters", "step, s", "over (IA)3", "kept, MB", "over (IA)3", "peak, MB")


def rows(model: str, runs: dict[str, list[dict]]) -> list[list[str]]:
    """One row a method."""
    found = [[f"**{MODELS[model].title}**", *[""] * (len(HEADER) - 1)]]
    for method, of_method in runs.items():
        pairs = list(zip(of_method, runs["(IA)3"], strict=True))
        time_ratio, kept_ratio = (statistics.median(a[key] / b[key] for a, b in pairs) for key in ("seconds", "kept"))
        found.append([
            method, f"{of_method[0]['parameters']:,}", number(statistics.median(r["seconds"] for r in of_method)),
            number(time_ratio), number(of_method[0]["kept"] / MEGABYTE), number(kept_ratio),
            number(statistics.median(r["peak_bytes"] for r in of_method) / MEGABYTE),
        ])  # fmt: skip
    return found


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Config, prog="python -m benchmarks.steps", description=__doc__)))
