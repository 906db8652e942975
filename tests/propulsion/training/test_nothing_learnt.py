"""Runs that have learnt nothing are recognised by their predictions and losses; others are not reported."""

import numpy as np
import pytest

from propulsion.data.tasks import get_task
from propulsion.train import TrainConfig, main
from propulsion.training.nothing_learnt import signs

FALLING = list(np.linspace(0.7, 0.3, 40))
FLAT = list(0.69 + 0.02 * np.random.default_rng(0).standard_normal(40))
FAST = [0.7, 0.69, 0.68, *(0.5 + 0.1 * np.random.default_rng(1).standard_normal(57))]
RISING = list(np.linspace(0.7, 1.3, 40))


@pytest.mark.parametrize(
    ("task", "predictions", "labels", "losses", "expected"),
    [
        ("sst2", [1] * 6, [0, 1] * 3, FALLING, ["of class 1 (positive)", "train longer"]),
        ("sst2", [np.int64(0)] * 6, [0, 1] * 3, [], ["of class 0 (negative)", "train longer"]),
        ("sst2", [0, 1] * 3, [0, 1] * 3, FLAT, ["has not fallen", "train longer"]),
        ("sst2", [1] * 6, [0, 1] * 3, RISING, ["of class 1", "has not fallen", "the loss has risen"]),
        ("sst2", [0, 1] * 3, [0, 1] * 3, FALLING, []),
        ("sst2", [0, 1] * 3, [0, 1] * 3, FAST, []),
        ("sst2", [1] * 6, [1] * 6, FALLING, []),
        ("sst2", [0, 1] * 3, [0, 1] * 3, FLAT[:5], []),
        ("stsb", [2.5, 2.51, 2.49, 2.5], [0.0, 5.0, 2.0, 3.0], FALLING, ["nearly one number: 2.5", "train longer"]),
        ("stsb", [0.5, 4.5, 2.0, 3.0], [0.0, 5.0, 2.0, 3.0], FALLING, []),
        ("conll2003", [["O", "O"], ["O"]], [[0, 1], [0]], FALLING, ["every prediction is 'O'", "train longer"]),
        ("conll2003", [["O", "B-PER"], ["O"]], [[0, 1], [0]], FALLING, []),
        ("squad", ["", ""], [{"text": ["a"]}, {"text": ["b"]}], FALLING, ["every prediction is ''", "train longer"]),
        ("xsum", ["the the", "the the"], ["a", "b"], FALLING, ["every prediction is 'the the'", "train longer"]),
    ],
)  # fmt: skip
def test_signs(task, predictions, labels, losses, expected):
    found = signs(get_task(task), predictions, labels, losses)
    assert len(found) == len(expected)
    assert all(part in text for part, text in zip(expected, found, strict=True))


def test_a_run_says_so_at_its_end(tiny_models, tmp_path, capsys):
    config = TrainConfig(
        model=str(tiny_models["SEQ_CLS"]), method="head", max_steps=12, max_train_samples=8, max_eval_samples=8,
        per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, learning_rate=1e-9, head_learning_rate=1e-9,
        save_strategy="no", output_dir=tmp_path / "run",
    )  # fmt: skip
    main(config)
    assert "nothing seems to have been learnt: " in capsys.readouterr().out
