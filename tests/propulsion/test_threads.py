"""Several threads on one model."""

import threading
from types import SimpleNamespace

import torch
from architectures import build, inputs, randomize
from peft import get_peft_model
from torch import nn
from transformers import AutoTokenizer

from propulsion import PropulsionConfig
from propulsion.data.kinds.base import run_batches


def test_two_threads_predict_in_evaluation_mode(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    encoded = {"input_ids": [[5]], "attention_mask": [[1]]}
    entered, done, modes = threading.Event(), threading.Event(), []

    def predict():
        run_batches(model, tokenizer, encoded, 1, ("logits",))

    class Watching(nn.Module):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.frozen = nn.Dropout().eval()

        def forward(self, **batch):
            if threading.current_thread() is second:
                entered.set()
                done.wait(5)  # Until the first thread has restored the modes.
            else:
                second.start()
                entered.wait(0.2)  # The second thread gets no further than its wait for the first.
            modes.append(self.training)
            return SimpleNamespace(logits=torch.zeros(1, 2))

    second, model = threading.Thread(target=predict), Watching()
    predict()
    done.set()
    second.join()
    assert modes == [False, False]
    assert model.training
    assert not model.frozen.training


def test_a_batch_that_mixes_adapters_leaves_other_threads_alone():
    model = get_peft_model(build("bert"), PropulsionConfig(degree=3, positions="all", task_type="SEQ_CLS"))
    model.add_adapter("second", PropulsionConfig(degree=2, positions="mlp", task_type="SEQ_CLS"))
    randomize(model, spread=0.2).eval()
    batch, outputs = inputs("bert"), []
    names = ["second", "default", "__base__"][: len(batch["input_ids"])]
    expected, mixed = model(**batch).logits, model(**batch, adapter_names=names).logits

    def plain():
        outputs.append(model(**batch).logits)

    def meanwhile(*_):
        handle.remove()
        thread = threading.Thread(target=plain)
        thread.start()
        thread.join()

    handle = model.base_model.model.bert.encoder.register_forward_pre_hook(meanwhile)
    assert torch.equal(model(**batch, adapter_names=names).logits, mixed)
    assert torch.equal(outputs[0], expected)


def test_weights_read_in_a_mixed_batch_are_of_the_calling_thread():
    model = get_peft_model(nn.Sequential(nn.Linear(3, 2)), PropulsionConfig(degree=2, target_modules=["0"]))
    randomize(model, spread=0.2).eval()
    layer, read = model.base_model.model[0], []
    expected = layer.weight.detach().clone()
    with model.base_model._enable_peft_forward_hooks(adapter_names=["__base__"]):
        assert not torch.equal(layer.weight, expected)
        thread = threading.Thread(target=lambda: read.append(layer.weight))
        thread.start()
        thread.join()
    assert torch.equal(read[0], expected)
