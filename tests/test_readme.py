"""The README's examples run, with a tiny model as the reader's model."""

import re
from pathlib import Path

import pytest
import torch
from cases import randomized
from peft import get_peft_model
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from propulsion import PropulsionConfig
from propulsion.pretrained import default_model_folder

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def tiny() -> BertForSequenceClassification:
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    return randomized(BertForSequenceClassification(config))


def test_there_are_examples():
    assert len(EXAMPLES) == 4


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.splitlines()[0])
def test_an_example_runs(example):
    torch.manual_seed(0)
    names = {
        "model": tiny(),
        "peft_model": get_peft_model(tiny(), PropulsionConfig(task_type="SEQ_CLS")),
        "tokenizer": AutoTokenizer.from_pretrained(default_model_folder()),
        "sentences": ["good", "not so good"],
    }
    if "inputs = " not in example:
        names["inputs"] = names["tokenizer"](names["sentences"], padding=True, return_tensors="pt")
    exec(compile(example, str(README), "exec"), names)
