"""The runs behind the ledger on one further model, with the sizes of docs/claims/plan.md."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from analyses.claims.plan import GROUPED, Earlier, Options, Run, run
from propulsion.data.tasks import get_labelled_task
from propulsion.pretrained.packaged import MODELS

SEEDS = (0, 1, 2)
SEARCHED = ("full", "propulsion:positions=all", "lora")
"""Methods whose learning rate is one of three; the others train at the automatic rates."""
TRAINED: Mapping[str, Options] = {
    "sst2": {"max_steps": 1200, "n_train": 19_200, "n_validation": 872} | GROUPED,
    "rte": {"max_steps": 1200, "n_train": 2490, "n_validation": 277, "max_length": 128} | GROUPED,
    "cola": {"max_steps": 1500, "n_train": 8551, "n_validation": 1043, "per_device_train_batch_size": 32} | GROUPED,
    "stsb": {"max_steps": 1500, "n_train": 5749, "n_validation": 1500},
}
"""How each task is trained; by default `LONG`. The result says whether full fine-tuning had converged."""
LONG: Options = {"max_steps": 1200, "n_train": 8000, "n_validation": 1000}


def model_plan(model: str, tasks: Sequence[str], data_dir: Path | None) -> list[Run]:
    """The runs on a model, in folders below one that has the model's name, kernels before training.

    A language model of a GGUF file has kernels alone, of the scores of label words.

    Args:
        model: Name, hub name or folder of an encoder; name or GGUF file of a language model.
        tasks: GLUE tasks; analyses of one task take the first.
        data_dir: Folder with a folder of each task's data; else the Hugging Face hub.
    """
    first, folder = tasks[0], PurePath(model).name
    source: Options = {"model": model, "data_dir": data_dir}
    seeds: Options = {"seeds": SEEDS}

    def named(name: str, **options: Any) -> Run:
        return run(f"{folder}/{name}", **source | options)

    def rated(name: str, task: str, **options: Any) -> Run:
        return named(name, task=task, comparison=Earlier(f"{folder}/method_comparison/{task}"), **options)

    def trained(task: str) -> Options:
        return TRAINED.get(task, LONG)

    layers = named("decomposition", task=first, n_examples=48, **seeds)
    if model.endswith(".gguf") or (model in MODELS and MODELS[model].gguf):
        return [replace(layers, options={**layers.options, "head": "label_words"})]
    return [
        layers,
        *(named(f"peft_kernels/{task}", task=task, n_examples=256, **seeds) for task in tasks),
        run(f"{folder}/degree_scale", tasks=tuple(tasks), models=(model,), data_dir=data_dir),
        *(named(f"spectrum/{task}", task=task, n_examples=256, **seeds) for task in tasks),
        named("memory", task=first),
        *(named(f"method_comparison/{task}", tasks=(task,), searched=SEARCHED, tuning_steps=600, rate_extensions=0,
                **seeds, **trained(task)) for task in tasks),
        *(named(f"kernel_distance/{task}", task=task, n_examples=256, **seeds, **trained(task)) for task in tasks),
        *(rated(f"kernel_drift/{task}", task, n_examples=256, **seeds, **trained(task)) for task in tasks),
        rated("convergence", first, every=100, **seeds, **trained(first)),
        rated("delta_weights", first, **trained(first)),
        *(rated(f"linearized_prediction/{task}", task, sizes=(32, 128, 512), n_test=128, again=(),
                max_steps=600, **seeds)
          for task in tasks if get_labelled_task(task).num_labels == 2),
        *(named(f"ablation/{factor}", task=first, factor=factor, **seeds, **trained(first))
          for factor in ("degree_fixed_rate", "degree", "positions", "vectors", "init_value")),
    ]  # fmt: skip
