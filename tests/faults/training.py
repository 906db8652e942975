"""Kill training runs at random moments, resume them, and compare them with runs that were not killed.

`python -m tests.faults.training` takes some minutes; `--help` lists its options. Each run is a process of its own. It
gets SIGKILL or SIGTERM at a random moment, or a limit on the size of its files, up to three times in a row; then it
runs to its end. It has survived if weights, metrics, history, predictions and the number of steps are those of the
uninterrupted run, bit for bit.
"""

import argparse
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import config as datasets_config
from datasets import disable_progress_bars
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from propulsion.errors import run_command
from propulsion.pretrained import default_model_folder
from propulsion.train import TrainConfig, main
from tests.faults.runs import CASES, configuration, differences

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM}
FULL_DISK = "full disk"


def tiny_model(folder: Path) -> Path:
    """Save a one-layer random BERT with the demo model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(default_model_folder())
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertForSequenceClassification(
        BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def child(config: TrainConfig, errors: Path, largest_file: int | None) -> None:
    """Run the command in a process of its own; `largest_file`, in bytes, stands for the space on its disk."""
    for stream, path in ((sys.stdout, os.devnull), (sys.stderr, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    run_command(lambda: main(config))


def start(config: TrainConfig, errors: Path, largest_file: int | None = None) -> multiprocessing.Process:
    """Start a run. The process is forked, so that it need not import torch again."""
    process = multiprocessing.get_context("fork").Process(target=child, args=(config, errors, largest_file))
    process.start()
    return process  # pyright: ignore[reportReturnType]


def survives(config: TrainConfig, expected: Path, kind: str, seconds: float, draw: random.Random) -> str:
    """Interrupt a run up to three times, let it end, and return what went wrong; empty if it has survived."""
    errors = config.output_dir.with_suffix(".err")
    for _ in range(draw.randint(1, 3)):
        process = start(config, errors, draw.randint(500, 90_000) if kind == FULL_DISK else None)
        if kind != FULL_DISK:
            process.join(draw.uniform(0, seconds))
            if process.is_alive():
                os.kill(process.pid, SIGNALS[kind])
        process.join()
        words = errors.read_text()
        if "Traceback" in words:
            return f"it did not end in one line, but with:\n{words}"
        if process.exitcode not in (0, 2 if kind == FULL_DISK else -9, -15, 143):
            return f"exit code {process.exitcode}: {words.strip()}"
    process = start(config, errors)
    process.join()
    if process.exitcode:
        return f"exit code {process.exitcode} at the end: {errors.read_text().strip()}"
    return ", ".join(differences(config.output_dir, expected))


def command() -> int:
    """Print a table of all cases, and return 1 if a run has not survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="runs of each case and each fault (default 3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (default 0)")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="cases (default all)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    draw, failures = random.Random(options.seed), []
    kinds = (*SIGNALS, FULL_DISK)
    print(f"survived / tried, seed {options.seed}\n{'':28}" + "".join(f"{kind:>12}" for kind in kinds), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        datasets_config.HF_DATASETS_CACHE = place / "cache"
        model = tiny_model(place / "model")
        for case in options.cases:
            expected, started = place / "whole", time.perf_counter()
            process = start(configuration(model, expected, case), place / "whole.err")
            process.join()
            assert process.exitcode == 0, (place / "whole.err").read_text()
            seconds = time.perf_counter() - started
            row = f"{case:28}"
            for kind in kinds:
                survived = 0
                for number in range(options.runs):
                    output = place / f"run-{number}"
                    problem = survives(configuration(model, output, case), expected, kind, seconds, draw)
                    survived += not problem
                    if problem:
                        failures.append(f"{case}, {kind}: {problem}")
                        print(failures[-1], flush=True)
                    shutil.rmtree(output, ignore_errors=True)
                row += f"{f'{survived} / {options.runs}':>12}"
            print(row, flush=True)
            shutil.rmtree(expected)
    print(f"\n{len(failures)} did not survive")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(command())
