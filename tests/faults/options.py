"""Wrong values of options: `python -m tests.faults.options` tries all and prints a table.

Each line of a table is one mistake: the options of a command line, or a call of a function, and what the message must
name. Options that are not given have values that work.
"""

import math
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import nn

import ntk
from analyses import readme
from analyses.claims import __main__ as claims_command
from analyses.core.bootstrap import bootstrap_interval
from analyses.core.errors import run_command
from ntk import adapters, bounds, dynamics, infinite
from propulsion import PropulsionConfig
from propulsion import predict as predict_command
from propulsion import train as train_command
from propulsion.command_line import parsed
from propulsion.data import load_task_data
from propulsion.methods import Method, apply_method
from propulsion.pretrained import load_classifier, load_model
from propulsion.training import TrainingOptions, apply_propulsion, evaluate, predict, train
from tests.analyses.test_every_analysis import ANALYSES
from tests.faults.mistakes import Mistake, Row, command, print_table, quiet, rows, tiny_model

# --- python -m propulsion.train --------------------------------------------------------------------------------------

TRAIN = "--model MODEL --use-cpu --disable-tqdm --max-steps 2 --max-train-samples 8 --max-eval-samples 8"

OF_TRAINING = [
    ("--text-columns text", "--label-column too"),
    ("--data-dir /dev/null --text-columns text --label-column label", "/dev/null"),
    ("--data-dir nowhere --text-columns text --label-column label", "nowhere does not exist"),
    ("--data-dir . --text-columns text --label-column label", "no train file in"),
    ("--task-file nowhere.toml", "cannot read the task file nowhere.toml"),
    ("--task-file /dev/null", "unknown format"),
    ("--task sts2", "sts2.*did you mean.*sst2"),
    ("--task ''", "unknown task ''"),
    ("--task DEMO", "DEMO.*did you mean demo"),
    ("--task demo/", "demo/.*did you mean demo"),
    ("--task $'de\\nmo'", "task"),
    ("--model nowhere", "nowhere"),
    ("--model ''", "model"),
    ("--model .", "cannot load|config.json|model"),
    ("--model /dev/null", "/dev/null"),
    ("--model nothing.gguf", "nothing.gguf does not exist"),
    ("--model bert-base-nothing/", "bert-base-nothing/"),
    ("--model 'a b c'", "a b c"),
    ("--model ../../../..", "\\.\\."),
    ("--data-dir nowhere", "nowhere"),
    ("--data-dir /dev/null", "/dev/null"),
    ("--data-dir ~nobody-of-this-name/data", "nobody-of-this-name"),
    ("--method lorra", "lorra.*did you mean lora"),
    ("--method LORA", "LORA.*did you mean lora"),
    ("--method propulsion:degree=3", "propulsion:degree=3"),
    ("--method ''", "unknown method ''"),
    ("--method lora --method-options r", "'r' is not of the form"),
    ("--method lora --method-options =3", "'=3' is not of the form"),
    ("--method lora --method-options r=two", "r=two"),
    ("--method lora --method-options r=0", "r=0"),
    ("--method lora --method-options r=-3", "r=-3"),
    ("--method lora --method-options r=1.5", "r=1.5"),
    ("--method lora --method-options r=null", "r=None"),
    ("--method lora --method-options lora_alpha=NaN", "lora_alpha"),
    ("--method lora --method-options lora_alpha=Infinity", "lora_alpha"),
    ("--method lora --method-options lora_dropout=7", "lora_dropout of method lora is 7"),
    ("--method lora --method-options lora_dropout=-0.1", "lora_dropout"),
    ("--method lora --method-options target_modules=nothing", "nothing"),
    ("--method lora --method-options 'target_modules=((('", "target_modules"),
    ("--method lora --method-options target_modules=[]", "target_modules"),
    ("--method lora --method-options target_modules=5", "target_modules=5"),
    ("--method lora --method-options lora_alfa=3", "lora_alfa.*did you mean lora_alpha"),
    ("--method lora --method-options task_type=SEQ_CLS", "task_type"),
    ("--method lora --method-options bias=some", "bias"),
    ("--method lora --method-options init_lora_weights=nothing", "init_lora_weights"),
    ("--method lora --method-options layers_to_transform=[99]", "layers_to_transform|\\[99\\]"),
    ("--method adalora --method-options init_r=-1", "init_r=-1"),
    ("--method adalora --method-options tinit=5 tfinal=9", "tinit|total_step"),
    ("--method prompt_tuning --method-options num_virtual_tokens=-1", "num_virtual_tokens of .* is -1"),
    ("--method prompt_tuning --method-options num_virtual_tokens=0", "num_virtual_tokens of .* is 0"),
    ("--method prefix_tuning --method-options num_virtual_tokens=1.5", "num_virtual_tokens=1.5"),
    ("--method p_tuning --method-options encoder_hidden_size=0", "encoder_hidden_size"),
    ("--method vera --method-options r=-1", "r=-1"),
    ("--method loha --method-options r=0", "r=0"),
    ("--method bitfit --method-options r=3", "has no option r"),
    ("--degree 1e30", "degree"),
    ("--degree -1", "degree"),
    ("--degree nan", "degree"),
    ("--degree inf", "degree"),
    ("--degree 0", "degree"),
    ("--degree three", "degree.*three"),
    ("--positions qury", "qury.*did you mean query"),
    ("--positions", "positions"),
    ("--vectors 0", "vectors"),
    ("--vectors -2", "vectors"),
    ("--vectors 1.5", "vectors.*1.5"),
    ("--vector-pooling maen", "maen.*did you mean mean"),
    ("--pooling meen", "meen.*pooling.*did you mean mean"),
    ("--pooling l2", "l2"),
    ("--adapter nowhere", "nowhere"),
    ("--adapter .", "adapter"),
    ("--max-steps -2", "max_steps"),
    ("--max-steps 1e3", "max-steps.*1e3"),
    ("--num-train-epochs 0 --max-steps -1", "num_train_epochs"),
    ("--num-train-epochs nan", "num_train_epochs"),
    ("--num-train-epochs inf", "num_train_epochs"),
    ("--learning-rate 0", "learning_rate"),
    ("--learning-rate -1", "learning_rate"),
    ("--learning-rate nan", "learning_rate"),
    ("--learning-rate inf", "learning_rate"),
    ("--learning-rate fast", "learning-rate.*fast"),
    ("--head-learning-rate 0", "head_learning_rate"),
    ("--rate-multiplier 0", "rate_multiplier"),
    ("--rate-multiplier inf", "rate_multiplier"),
    ("--warmup-steps -1", "warmup_steps"),
    ("--warmup-steps nan", "warmup_steps"),
    ("--warmup-steps inf", "warmup_steps"),
    ("--schedule linaer", "linaer.*did you mean linear"),
    ("--lr-scheduler-type cosine_with_min_lr", "min_lr"),
    ("--lr-scheduler-type warmup_stable_decay", "decay"),
    ("--weight-decay -0.1", "weight_decay"),
    ("--weight-decay nan", "weight_decay"),
    ("--weight-decay inf", "weight_decay"),
    ("--max-grad-norm -1", "max_grad_norm"),
    ("--max-grad-norm nan", "max_grad_norm"),
    ("--train-sampling-strategy group_by_lenght", "did you mean group_by_length"),
    ("--max-length 0", "max_length"),
    ("--max-length 1", "max_length|tokens"),
    ("--seed -1", "seed"),
    ("--seed 4294967296", "seed"),
    ("--seed 1.5", "seed.*1.5"),
    ("--per-device-train-batch-size 0", "per_device_train_batch_size"),
    ("--batch-size -3", "per_device_train_batch_size"),
    ("--per-device-eval-batch-size 0", "per_device_eval_batch_size"),
    ("--gradient-accumulation-steps 0", "gradient_accumulation_steps"),
    ("--generation-num-beams 0", "generation_num_beams"),
    ("--generation-max-length 0", "generation_max_length"),
    ("--max-target-length 0", "max_target_length"),
    ("--max-train-samples 0", "max_train_samples"),
    ("--max-train-samples 999999999", "999,?999,?999|training|rows"),
    ("--max-train-samples 1", "train"),
    ("--max-eval-samples -5", "max_eval_samples"),
    ("--streaming --max-steps -1", "max_steps"),
    ("--streaming", "stream"),
    ("--eval-strategy step", "step.*did you mean steps"),
    ("--eval-strategy steps --eval-steps 0", "eval_steps"),
    ("--save-strategy epochs", "did you mean epoch"),
    ("--save-strategy epoch --eval-strategy steps", "save_strategy"),
    ("--save-steps 0", "save_steps"),
    ("--save-total-limit 0", "save_total_limit"),
    ("--load-best-model-at-end", "load_best_model_at_end"),
    ("--load-best-model-at-end --eval-strategy steps --eval-steps 3 --save-steps 4", "save_steps"),
    ("--metric-for-best-model acuracy", "acuracy.*did you mean accuracy"),
    ("--early-stopping-patience 3", "load_best_model_at_end"),
    ("--early-stopping-patience 0", "early_stopping_patience"),
    ("--logging-steps 0", "logging_steps"),
    ("--report-to tensorbord", "tensorbord.*did you mean tensorboard"),
    ("--report-to none all", "none stands alone"),
    ("--dtype float16", "float16"),
    ("--output-dir /dev/null", "/dev/null"),
    ("--output-dir /proc/run", "/proc"),
    (f"--output-dir {'a' * 300}", "name too long"),
    ("--preset", "preset"),
    ("--preset glue-rte-roberta-bas-all", "did you mean glue-rte-roberta-base-all"),
    ("--sed 3", "did you mean --seed"),
    ("--method lora extra", "extra"),
    ("--max-steps", "max-steps"),
    ("--use-cpu=yes", "yes"),
    ("--training-options adam_beta1=2", "adam_beta1|beta"),
    ("--training-options adam_beta2=-1", "adam_beta2|beta"),
    ("--training-options adam_epsilon=-1", "adam_epsilon|epsilon"),
    ("--training-options adam_epsilonn=1", "did you mean adam_epsilon"),
    ("--training-options adam_beta1=text", "adam_beta1|text|str"),
    ("--training-options push_to_hub=true", "push_to_hub"),
    ("--training-options save_only_model=true", "save_only_model"),
    ("--training-options seed=3", "seed"),
    ("--training-options optim=sgd", "optim"),
    ("--training-options lr_scheduler_kwargs=5", "lr_scheduler_kwargs"),
    ("--training-options 'lr_scheduler_kwargs={\"nothing\": 1}'", "nothing"),
    ("--training-options dataloader_num_workers=-1", "num_workers"),
    ("--training-options logging_strategy=epoch", "logging_strategy"),
    ("--training-options logging_strategy=sometimes", "sometimes"),
    ("--training-options fsdp=nothing", "fsdp|nothing"),
    ("--training-options deepspeed=nothing.json", "deepspeed"),
    ("--training-options label_smoothing_factor=7", "label_smoothing_factor|smoothing"),
    ("--training-options neftune_noise_alpha=-1", "neftune_noise_alpha"),
    ("--training-options max_steps=3", "max_steps"),
    ("--training-options fp16=true bf16_full_eval=true fp16_full_eval=true", "fp16|bf16"),
    ("--training-options eval_delay=text", "eval_delay"),
    ("--training-options accelerator_config=5", "accelerator_config"),
    ("--training-options noequals", "'noequals' is not of the form"),
]  # fmt: skip

# --- python -m analyses.NAME -----------------------------------------------------------------------------------------

OF_ANALYSES = [
    ("ablation", "--n-layers 0", "n_layers"),
    ("ablation", "--factor degre", "degre.*did you mean degree"),
    ("ablation", "--reference-degree 0", "reference_degree"),
    ("ablation", "--reference-degree nan", "reference_degree"),
    ("ablation", "--n-train 0", "n_train"),
    ("ablation", "--n-validation -1", "n_validation"),
    ("ablation", "--n-layers 1.5", "n-layers.*1.5"),
    ("ablation", "--seeds 0 0", "seeds"),
    ("ablation", "--seeds -1", "seeds"),
    ("ablation", "--seeds", "seeds"),
    ("ablation", "--device meta", "meta"),
    ("ablation", "--device foo", "foo"),
    ("ablation", "--device cuda:99", "cuda:99"),
    ("ablation", "--task nothing", "nothing"),
    ("ablation", "--task squad", "squad"),
    ("ablation", "--schedule linaer", "did you mean linear"),
    ("ablation", "--degree -3", "degree"),
    ("ablation", "--degree inf", "degree"),
    ("choose", "--candidates lorra", "did you mean lora"),
    ("choose", "--candidates none", "candidate none trains nothing"),
    ("choose", "--candidates", "must be a method"),
    ("choose", "--budget-minutes 0", "budget_minutes"),
    ("choose", "--budget-minutes nan", "budget_minutes"),
    ("choose", "--n-examples -1", "n_examples"),
    ("choose", "--label-column label", "--data-dir|--text-columns"),
    ("complexity", "--n 0", "n must be"),
    ("complexity", "--repeats 0", "repeats"),
    ("complexity", "--tokens -1", "tokens"),
    ("complexity", "--device cuda", "cuda"),
    ("convergence", "--every 0", "every"),
    ("convergence", "--methods", "method"),
    ("convergence", "--methods full full", "methods"),
    ("convergence", "--methods lorra", "did you mean lora"),
    ("convergence", "--methods lora:r=two", "r=two"),
    ("convergence", "--methods lora:r", "'r' is not of the form"),
    ("convergence", "--comparison nowhere", "nowhere"),
    ("default_rates", "--factors 0", "factors"),
    ("default_rates", "--factors inf", "factors"),
    ("default_rates", "--factors -1", "factors"),
    ("default_rates", "--resamples 0", "resamples"),
    ("default_rates", "--tasks demo demo", "tasks"),
    ("default_rates", "--tasks", "task"),
    ("degree_scale", "--widths 0", "widths"),
    ("degree_scale", "--widths", "width"),
    ("degree_scale", "--depths 0", "depths"),
    ("degree_scale", "--draws 0", "draws"),
    ("degree_scale", "--n-examples 0", "n_examples"),
    ("degree_scale", "--models nowhere", "nowhere"),
    ("degree_scale", "--tasks squad", "squad"),
    ("degree_scale", "--pooling maen", "did you mean mean"),
    ("delta_weights", "--methods lora:r=0", "r=0"),
    ("delta_weights", "--methods propulsion:degree=nan", "degree"),
    ("delta_weights", "--comparison .", "result"),
    ("instruction_tuning", "", "model"),
    ("instruction_tuning", "--model MODEL", "BERT|bert|decoder|language model|instruction|hub"),
    ("instruction_tuning", "--model nowhere --max-steps 0", "max_steps"),
    ("instruction_tuning", "--model nowhere", "hub"),
    ("instruction_tuning", "--model nowhere --task demo", "demo"),
    ("instruction_tuning", "--model nowhere --max-length 0", "max_length"),
    ("johnson_lindenstrauss", "--draws 99", "draws"),
    ("johnson_lindenstrauss", "--dimensions 0", "dimensions"),
    ("johnson_lindenstrauss", "--dimensions", "dimensions"),
    ("johnson_lindenstrauss", "--epsilons 0", "epsilons"),
    ("johnson_lindenstrauss", "--epsilons nan", "epsilons"),
    ("johnson_lindenstrauss", "--epsilons", "epsilons"),
    ("johnson_lindenstrauss", "--rhos 1.5", "rhos"),
    ("johnson_lindenstrauss", "--confidence 1", "confidence"),
    ("johnson_lindenstrauss", "--confidence 0", "confidence"),
    ("johnson_lindenstrauss", "--seed -1", "seed"),
    ("kernel_distance", "--n-examples 1", "n_examples"),
    ("kernel_distance", "--memory-budget-gb inf", "memory_budget_gb"),
    ("kernel_distance", "--memory-budget-gb 0", "memory_budget_gb"),
    ("kernel_distance", "--memory-budget-gb nan", "memory_budget_gb"),
    ("kernel_distance", "--memory-budget-gb 1e-9 --model MODEL", "memory-budget-gb"),
    ("kernel_distance", "--n-train 0", "n_train"),
    ("kernel_distance", "--null-draws 0", "null_draws"),
    ("kernel_distance", "--resamples 0", "resamples"),
    ("kernel_distance", "--dtype float16", "float16"),
    ("kernel_distance", "--positions qury", "qury.*did you mean query"),
    ("kernel_distance", "--degree nan", "degree"),
    ("kernel_distance", "--seeds 1 1", "seeds"),
    ("kernel_distance", "--output-dir /dev/null", "/dev/null"),
    ("kernel_distance", f"--output-dir {'a' * 300}", "name too long"),
    ("kernel_distance", "--data-dir nowhere", "nowhere"),
    ("kernel_distance", "--model nowhere", "nowhere"),
    ("kernel_distance", "--n-examples 99999 --model MODEL", "99,?999|examples|rows"),
    ("kernel_drift", "--checkpoints 2", "checkpoints"),
    ("kernel_drift", "--checkpoints -0.5", "checkpoints"),
    ("kernel_drift", "--checkpoints nan", "checkpoints"),
    ("kernel_drift", "--n-jacobians 1", "n_jacobians"),
    ("kernel_drift", "--n-jacobians 99", "n_jacobians"),
    ("kernel_drift", "--width 0", "width"),
    ("kernel_drift", "--methods propulsion:positions=qury", "qury"),
    ("linearized_prediction", "--sizes 3", "sizes"),
    ("linearized_prediction", "--sizes", "size"),
    ("linearized_prediction", "--sizes 99999", "sizes"),
    ("linearized_prediction", "--n-test 0", "n_test"),
    ("linearized_prediction", "--again lora:r=3", "again"),
    ("linearized_prediction", "--head rndom", "did you mean random"),
    ("linearized_prediction", "--words ' good' --head label_words", "words"),
    ("linearized_prediction", "--head label_words --prompt nothing", "text"),
    ("linearized_prediction", "--task mnli", "mnli"),
    ("linearized_prediction", "--permutations 0", "permutations"),
    ("linearized_prediction", "--sign-limit -1", "sign_limit"),
    ("memory", "--rounds 0", "rounds"),
    ("memory", "--methods nothing", "nothing"),
    ("method_comparison", "--rate-extensions -1", "rate_extensions"),
    ("method_comparison", "--tuning-steps 0", "tuning_steps"),
    ("method_comparison", "--chosen-by los", "did you mean loss"),
    ("method_comparison", "--rates-from nowhere", "nowhere"),
    ("method_comparison", "--tasks squad", "squad"),
    ("method_comparison", "--learning-rate 0", "learning_rate"),
    ("parameter_count", "--models GPT-5", "GPT-5"),
    ("parameter_count", "--models roberta-base", "roberta-base.*did you mean RoBERTa-base"),
    ("parameter_count", "--models", "models?"),
    ("peft_kernels", "--ranks 0", "ranks|rank"),
    ("peft_kernels", "--ranks", "ranks"),
    ("peft_kernels", "--head label_word", "did you mean label_words"),
    ("peft_kernels", "--degrees nan", "degrees"),
    ("peft_kernels", "--positions qury", "qury"),
    ("peft_kernels", "--ia3-positions qury", "qury"),
    ("peft_kernels", "--subset 0", "subset"),
    ("peft_kernels", "--vera-rank 0", "vera_rank|rank"),
    ("peft_kernels", "--top 0", "top"),
    ("pooling", "--poolings maen", "did you mean mean"),
    ("pooling", "--poolings mean mean", "poolings"),
    ("pooling", "--n-examples 0", "n_examples"),
    ("spectrum", "--n-examples 3", "n_examples"),
    ("spectrum", "--null-draws 0", "null_draws"),
    ("spectrum", "--convergence nowhere", "nowhere"),
    ("spectrum", "--methods lora lora", "methods"),
    ("spectrum", "--methods prompt_tuning", "prompt_tuning"),
    ("theorem1", "--inputs 1", "inputs"),
    ("theorem1", "--width 1", "width"),
    ("theorem1", "--transformer-widths 0", "transformer_widths|widths"),
    ("theorem1", "--transformer-widths 33", "33"),
    ("theorem1", "--depth 0", "depth"),
    ("width_convergence", "--activations relau", "relau.*did you mean relu"),
    ("width_convergence", "--activations", "activation"),
    ("width_convergence", "--widths 0", "widths"),
    ("width_convergence", "--sigma-w inf", "sigma_w"),
    ("width_convergence", "--sigma-b -1", "sigma_b"),
    ("width_convergence", "--degree 0", "degree"),
    ("width_convergence", "--degree 1e300", "degree|powers"),
    ("width_convergence", "--confidence 1.5", "confidence"),
    ("width_convergence", "--draws 1", "draws"),
    ("width_convergence", "--nothing", "nothing"),
]  # fmt: skip

OF_OTHER_COMMANDS = [
    ("claims", "--tasks sts2", "sts2"),
    ("claims", "--tasks", "task"),
    ("claims", "--tasks demo demo", "demo"),
    ("claims", "--only nothing", "nothing"),
    ("claims", "--load nowhere", "nowhere"),
    ("claims", "--load . --quick", "--quick"),
    ("claims", "--language-model nowhere.gguf", "nowhere.gguf"),
    ("claims", "--data-dir nowhere --tasks sst2", "nowhere"),
    ("claims", "--quick --output-dir /dev/null", "/dev/null"),
    ("claims", "--quik", "did you mean --quick"),
    ("predict", "nowhere --data-dir .", "nowhere is no folder|no train file"),
    ("predict", "MODEL", "give --data-dir"),
    ("predict", "MODEL --data-dir nowhere", "nowhere does not exist"),
    ("predict", "MODEL --data-dir . --output out.xls", "out.xls is of an unknown format"),
    ("predict", "--data-dir .", "model-folder|MODEL-FOLDER|required"),
    ("readme", "nowhere", "nowhere"),
    ("readme", "", "Folder that contains READMEs"),
    ("readme", ".", "no result"),
]

# --- functions -------------------------------------------------------------------------------------------------------

K = torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, 0.3], [0.1, 0.3, 3.0]], dtype=torch.float64)
X = torch.tensor([[1.0, 0.2], [0.3, -0.7], [0.5, 0.5]], dtype=torch.float64)
Y = torch.tensor([[1.0], [0.0], [-1.0]], dtype=torch.float64)
UNIT = torch.tensor([1.0, 0.0], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 0])
F0 = torch.zeros(3, 2, dtype=torch.float64)
NET = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def mlp(x: Any = X, x2: Any = None, **changes: Any) -> Any:
    return infinite.mlp_kernels(x, x2, **{"depth": 2, "activation": "relu", "sigma_w": 1.0, "sigma_b": 0.0} | changes)


def residual(x: Any = X, **changes: Any) -> Any:
    return infinite.residual_kernels(x, **{"depth": 2, "activation": "relu", "sigma_w": 1.0} | changes)


OF_KERNELS: list[tuple[str, Callable[[], object], str]] = [
    ("distance, kind", lambda: ntk.kernel_distance(K, K, kind="relativ"), "relativ"),
    ("distance, shapes", lambda: ntk.kernel_distance(K, K[:2, :2]), "shape|\\(2, 2\\)"),
    ("distance, list", lambda: ntk.kernel_distance([[1.0]], K), "tensor"),
    ("distance from zero", lambda: ntk.kernel_distance(0 * K, K), "zero"),
    ("cka of a constant", lambda: ntk.cka(torch.ones(3, 3), K), "constant"),
    ("alignment with zero", lambda: ntk.kernel_alignment(0 * K, K), "zero"),
    ("best scale to zero", lambda: ntk.best_scale(K, 0 * K), "zero"),
    ("trace ratio of zero", lambda: ntk.trace_ratio(K, 0 * K), "trace 0"),
    ("trace of a rectangle", lambda: ntk.trace(K[:2]), "square|shape|\\(2, 3\\)"),
    ("spectrum of an asymmetric matrix", lambda: ntk.spectrum(K + torch.triu(K)), "symmetric"),
    ("spectrum of a scalar", lambda: ntk.spectrum(torch.tensor(1.0)), "square|shape|\\(\\)"),
    ("spectrum of nothing", lambda: ntk.spectrum(torch.zeros(0, 0)), "square"),
    ("angles, k = 0", lambda: ntk.principal_angles(K, K, 0), "0"),
    ("angles, k = 4", lambda: ntk.principal_angles(K, K, 4), "4"),
    ("angles, k = 1.5", lambda: ntk.principal_angles(K, K, 1.5), "1.5"),
    ("overlap, k = -1", lambda: ntk.eigenspace_overlap(K, K, -1), "-1"),
    ("overlap of ties", lambda: ntk.eigenspace_overlap(torch.eye(3), K, 1), "equal up to rounding"),
    ("matching degree, negative", lambda: ntk.matching_degree(K, -K), "negative"),
    ("effective rank of zero", lambda: ntk.effective_rank(0 * K), "zero"),
    ("sketch, m = 0", lambda: ntk.gaussian_sketch(K, 0, generator=generator()), "0"),
    ("sketch, m = 2.5", lambda: ntk.gaussian_sketch(K, 2.5, generator=generator()), "2.5"),
    ("reduce, kind", lambda: ntk.reduce_outputs(K[..., None, None], "trce"), "trce"),
    ("reduce, shape", lambda: ntk.reduce_outputs(K, "trace"), "shape|\\(3, 3\\)|outputs"),
    ("ntk, reduce", lambda: ntk.empirical_ntk(NET, X, reduce="nothing"), "nothing"),
    ("ntk, budget 0", lambda: ntk.empirical_ntk(NET, X, memory_budget=0), "memory_budget"),
    ("ntk, budget NaN", lambda: ntk.empirical_ntk(NET, X, memory_budget=math.nan), "memory_budget"),
    ("ntk, budget inf", lambda: ntk.empirical_ntk(NET, X, memory_budget=math.inf), "memory_budget"),
    ("ntk, no parameter", lambda: ntk.empirical_ntk(NET, X, params=lambda name, p: False), "parameter"),
    ("ntk, method", lambda: ntk.empirical_ntk(NET, X, method="fast"), "fast"),
    ("ntk, no example", lambda: ntk.empirical_ntk(NET, X[:0]), "example"),
    ("ntk, dtype", lambda: ntk.empirical_ntk(NET, X.float()), "dtype|float"),
    ("ntk, width", lambda: ntk.empirical_ntk(NET, torch.ones(3, 5).double()), "5|shape"),
    (
        "adapters, no such module",
        lambda: ntk.adapter_kernels(NET, X, {"a": adapters.LoRA(modules="nothing")}),
        "nothing",
    ),
    ("LoRA, rank 0", lambda: adapters.LoRA(rank=0), "rank"),
    ("LoRA, rank 1.5", lambda: adapters.LoRA(rank=1.5), "rank"),
    ("LoRA, alpha NaN", lambda: adapters.LoRA(alpha=math.nan), "alpha"),
    ("Propulsion, degree inf", lambda: adapters.Propulsion(degree=math.inf), "degree"),
    ("RandomSubset, 0", lambda: adapters.RandomSubset(0), "count"),
    ("variance, d = 0", lambda: bounds.variance(0, 0.5), "at least 1"),
    ("variance, rho = 2", lambda: bounds.variance(3, 2.0), "rho|2"),
    ("variance, rho NaN", lambda: bounds.variance(3, math.nan), "rho|nan"),
    ("tail, d = -1", lambda: bounds.tail(-1, 0.5, 0.5), "at least 1"),
    ("tail, d = 1.5", lambda: bounds.tail(1.5, 0.5, 0.5), "1.5"),
    ("tail, epsilon -1", lambda: bounds.tail(3, -1.0, 0.5), "epsilon|-1"),
    ("tail, epsilon NaN", lambda: bounds.tail(3, math.nan, 0.5), "epsilon|nan"),
    ("dimension, epsilon 0", lambda: bounds.dimension_needed(0.0, 0.9), "epsilon|0"),
    ("dimension, confidence 1", lambda: bounds.dimension_needed(0.1, 1.0), "1"),
    ("dimension, confidence NaN", lambda: bounds.dimension_needed(0.1, math.nan), "nan"),
    ("interval, -1 of 3", lambda: bounds.clopper_pearson(-1, 3), "-1"),
    ("interval, 4 of 3", lambda: bounds.clopper_pearson(4, 3), "4"),
    ("kernel variance, d = 0", lambda: bounds.kernel_variance(K, 0), "at least 1"),
    ("simulate, draws 0", lambda: bounds.simulate(UNIT, UNIT, 3, draws=0, generator=generator()), "draws"),
    ("simulate, shapes", lambda: bounds.simulate(K[0], K[1][:2], 3, draws=2, generator=generator()), "shape|\\(2,\\)"),
    ("regression, ridge -1", lambda: dynamics.kernel_regression(K, Y, ridge=-1), "ridge"),
    ("regression, ridge NaN", lambda: dynamics.kernel_regression(K, Y, ridge=math.nan), "ridge"),
    ("regression, two targets", lambda: dynamics.kernel_regression(K, Y[:2]), "3 examples"),
    (
        "regression, singular",
        lambda: dynamics.kernel_regression(torch.ones(3, 3), Y, cross=torch.ones(1, 3)),
        "singular",
    ),
    ("regression, cross of 2", lambda: dynamics.kernel_regression(K, Y, cross=K[:, :2]), "3 rows"),
    ("regression, negative kernel", lambda: dynamics.kernel_regression(-K, Y), "positive semi-definite"),
    ("flow, no times", lambda: dynamics.gradient_flow(K, Y, times=[]), "times"),
    ("flow, time -1", lambda: dynamics.gradient_flow(K, Y, times=[-1.0]), "times"),
    ("flow, time inf", lambda: dynamics.gradient_flow(K, Y, times=[math.inf]), "times"),
    (
        "cross-entropy, label 0.7",
        lambda: dynamics.cross_entropy_flow(K, torch.tensor([0.7, 0, 1]), F0, times=[1.0]),
        "integer",
    ),
    ("cross-entropy, label 2", lambda: dynamics.cross_entropy_flow(K, LABELS + 1, F0, times=[1.0]), "from 0 to 1"),
    (
        "cross-entropy, tolerance 0",
        lambda: dynamics.cross_entropy_flow(K, LABELS, F0, times=[1.0], tolerance=0),
        "tolerance",
    ),
    (
        "cross-entropy, tolerance NaN",
        lambda: dynamics.cross_entropy_flow(K, LABELS, F0, times=[1.0], tolerance=math.nan),
        "tolerance",
    ),
    (
        "sign regression, ridge -1",
        lambda: ntk.sign_gradient_regression(K, Y[:, 0], Y[:, 0], cross=K, initial_cross=Y[:, 0], ridge=-1),
        "ridge",
    ),
    ("relative drift from zero", lambda: dynamics.relative_drift(K, 0 * K), "is 0"),
    ("linearisation of no change", lambda: dynamics.linearization_error(K, K, K), "did not move"),
    ("mlp, depth -1", lambda: mlp(depth=-1), "depth"),
    ("mlp, depth 1.5", lambda: mlp(depth=1.5), "depth"),
    ("mlp, activation", lambda: mlp(activation="relau"), "relau"),
    ("mlp, sigma_w 0", lambda: mlp(sigma_w=0.0), "sigma_w"),
    ("mlp, sigma_w NaN", lambda: mlp(sigma_w=math.nan), "sigma_w"),
    ("mlp, sigma_b -1", lambda: mlp(sigma_b=-1.0), "sigma_b"),
    ("mlp, degree NaN", lambda: mlp(degree=math.nan), "degree"),
    ("mlp, one input of another size", lambda: mlp(X, X[:, :1]), "columns"),
    ("mlp, no input", lambda: mlp(X[:0]), "empty|at least|input"),
    ("mlp, NaN input", lambda: mlp(X * math.nan), "NaN"),
    ("mlp, exp", lambda: mlp(activation=infinite.from_function(torch.exp), sigma_w=6.0), "not finite"),
    ("residual, branch_scale NaN", lambda: residual(branch_scale=math.nan), "branch_scale"),
    ("residual, depth 0", lambda: residual(depth=0), "depth"),
    ("from_function, no function", lambda: infinite.from_function("tanh"), "tanh|function|callable"),
    ("leaky_relu, NaN", lambda: infinite.leaky_relu(math.nan), "nan|finite"),
]


def model_and_rows() -> tuple[Any, Any, Any]:
    model, tokenizer = load_classifier(made() / "model", num_labels=2)
    return model, tokenizer, load_task_data("demo", n_train=8, n_validation=8)


def fitted(**changes: Any) -> object:
    model, tokenizer, data = model_and_rows()
    return train(
        model, tokenizer, data, TrainingOptions(**{"max_steps": 1, "learning_rate": 1e-3} | changes), progress=False
    )


def broken(model: Any) -> Any:
    with torch.no_grad():
        model.classifier.bias[0] = math.nan
    return model


OF_FUNCTIONS: list[tuple[str, Callable[[], object], str]] = [
    ("TrainingOptions, max_steps 0", lambda: TrainingOptions(max_steps=0), "max_steps"),
    ("TrainingOptions, seed text", lambda: TrainingOptions(seed="three"), "seed"),
    ("TrainingOptions, rate text", lambda: TrainingOptions(learning_rate="fast"), "learning_rate"),
    ("TrainingOptions, schedule", lambda: TrainingOptions(lr_scheduler_type="lineer"), "did you mean linear"),
    ("TrainingOptions, schedule 5", lambda: TrainingOptions(lr_scheduler_type=5), "lr_scheduler_type"),
    ("TrainingOptions, weight_decay None", lambda: TrainingOptions(weight_decay=None), "weight_decay"),
    ("TrainingOptions, max_steps 1.5", lambda: TrainingOptions(max_steps=1.5), "max_steps"),
    ("train, too long", lambda: fitted(max_length=1), "max_length|tokens"),
    ("train, rate 1e30", lambda: fitted(learning_rate=1e30, max_steps=3), "finite|diverged"),
    ("predict, batch 0", lambda: predict(*model_and_rows(), batch_size=0), "batch_size"),
    ("predict, batch -1", lambda: predict(*model_and_rows(), batch_size=-1), "batch_size"),
    ("predict, length 0", lambda: predict(*model_and_rows(), max_length=0), "max_length"),
    ("evaluate, batch 0", lambda: evaluate(*model_and_rows(), batch_size=0), "batch_size"),
    ("evaluate, length -1", lambda: evaluate(*model_and_rows(), max_length=-1), "max_length"),
    ("evaluate, NaN weights", lambda: evaluate(broken(model_and_rows()[0]), *model_and_rows()[1:]), "classifier.bias"),
    ("apply_propulsion, degree NaN", lambda: apply_propulsion(model_and_rows()[0], degree=math.nan), "degree"),
    (
        "apply_propulsion, positions",
        lambda: apply_propulsion(model_and_rows()[0], degree=3, positions=["qury"]),
        "did you mean query",
    ),
    (
        "apply_propulsion, text",
        lambda: apply_propulsion(model_and_rows()[0], degree=3, positions="query"),
        "positions|'q'",
    ),
    (
        "apply_method, task type",
        lambda: apply_method(model_and_rows()[0], Method("lora"), task_type="SEQ_CLSS"),
        "SEQ_CLSS",
    ),
    (
        "apply_method, name",
        lambda: apply_method(model_and_rows()[0], Method("lorra"), task_type="SEQ_CLS"),
        "did you mean lora",
    ),
    ("load_model, task type", lambda: load_model(made() / "model", task_type="CLS"), "CLS"),
    (
        "load_model, pooling",
        lambda: load_classifier(made() / "model", num_labels=2, pooling="maen"),
        "did you mean mean",
    ),
    ("load_model, no labels", lambda: load_classifier(made() / "model", num_labels=0), "num_labels"),
    ("load_model, -1 labels", lambda: load_classifier(made() / "model", num_labels=-1), "num_labels"),
    ("load_model, device", lambda: load_classifier(made() / "model", num_labels=2, device="foo"), "foo"),
    ("load_task_data, task", lambda: load_task_data("dmo"), "did you mean demo"),
    ("load_task_data, no rows", lambda: load_task_data("demo", n_train=0), "0"),
    ("load_task_data, -3 rows", lambda: load_task_data("demo", n_validation=-3), "-3"),
    ("load_task_data, one row", lambda: load_task_data("demo", n_train=1), "1"),
    ("load_task_data, seed -1", lambda: load_task_data("demo", n_train=4, seed=-1), "seed"),
]


OF_CONFIGURATIONS: list[tuple[str, Callable[[], object], str]] = [
    ("PropulsionConfig, degree", lambda: PropulsionConfig(degree=1e30), "degree"),
    ("PropulsionConfig, degree text", lambda: PropulsionConfig(degree="three"), "degree"),
    ("PropulsionConfig, vectors", lambda: PropulsionConfig(vectors=0), "vectors"),
    ("PropulsionConfig, vectors 1.5", lambda: PropulsionConfig(vectors=1.5), "vectors"),
    ("PropulsionConfig, bias", lambda: PropulsionConfig(bias="non"), "did you mean none"),
    ("PropulsionConfig, pattern", lambda: PropulsionConfig(target_modules="((("), "target_modules"),
    ("bootstrap, no kernel", lambda: bootstrap_interval(ntk.trace, [], resamples=3, seed=0), "kernels"),
]  # fmt: skip
"""Calls that raise ValueError, as peft's configurations do."""


@cache
def _temporary() -> Any:
    folder = tempfile.TemporaryDirectory()
    tiny_model(Path(folder.name) / "model")
    return folder


def made() -> Path:
    """A folder with the model that options work on."""
    return Path(_temporary().name)


def _words(text: str) -> list[str]:
    return [str(made() / "model") if word == "MODEL" else word for word in shlex.split(text)]


def _train(text: str, folder: Path) -> None:
    words = [*_words(TRAIN), "--output-dir", "run", *_words(text)]
    command(lambda: run_command(lambda: train_command.main(train_command.parse(words))), ())


def _analyse(name: str, text: str, folder: Path) -> None:
    command(
        lambda: ANALYSES[name].command("help"),
        [*("--output-dir", "result") * ("--output-dir" not in text), *_words(text)],
    )


def _other(name: str, text: str, folder: Path) -> None:
    module = {"claims": claims_command, "predict": predict_command, "readme": readme}[name]
    command(lambda: run_command(lambda: module.main(parsed(module.Config, prog=name, description=""))), _words(text))


def mistakes() -> Iterator[Mistake]:
    """All mistakes of this module."""
    for text, names in OF_TRAINING:
        yield Mistake("options of propulsion.train", text, partial(_train, text), names)
    for name, text, names in OF_ANALYSES:
        yield Mistake("options of analyses", f"{name} {text}", partial(_analyse, name, text), names)
    for name, text, names in OF_OTHER_COMMANDS:
        yield Mistake("options of other commands", f"{name} {text}", partial(_other, name, text), names)
    for name, call, names in OF_FUNCTIONS:
        yield Mistake("arguments of propulsion", name, lambda _, call=call: call(), names)
    for name, call, names in OF_CONFIGURATIONS:
        yield Mistake("arguments of propulsion", name, lambda _, call=call: call(), names, (ValueError,))
    errors = (ValueError, TypeError, ArithmeticError, MemoryError, NotImplementedError)
    for name, call, names in OF_KERNELS:
        yield Mistake("arguments of ntk", name, lambda _, call=call: call(), names, errors)


def run() -> list[Row]:
    """Try all mistakes, and count them by kind."""
    with quiet(), tempfile.TemporaryDirectory() as folder:
        return rows(list(mistakes()), Path(folder))


if __name__ == "__main__":
    sys.exit(bool(print_table(run())))
