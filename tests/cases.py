"""Tiny random models and padded batches, as data: every exactness test runs over these."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    PreTrainedConfig,
    RobertaConfig,
)

VOCABULARY = 50
PAD = 1
_SIZES = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "vocab_size": VOCABULARY,
    "num_labels": 3,
    "pad_token_id": PAD,
}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "bert": lambda: BertConfig(**_SIZES, max_position_embeddings=80),
    "roberta": lambda: RobertaConfig(**_SIZES, max_position_embeddings=82),
    "gpt2": lambda: GPT2Config(
        n_embd=12, n_layer=2, n_head=2, n_positions=80, vocab_size=VOCABULARY, num_labels=3, pad_token_id=PAD,
        bos_token_id=2, eos_token_id=2,
    ),
    "llama": lambda: LlamaConfig(**_SIZES, num_key_value_heads=1, bos_token_id=2, eos_token_id=2),
}  # fmt: skip


def classifier(family: str, attention: str = "eager") -> nn.Module:
    """A float64 classifier whose every parameter is random, biases and norms included, in training mode."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(CONFIGS[family](), attn_implementation=attention)
    return randomized(model.double()).train()


def tied_gpt2() -> nn.Module:
    torch.manual_seed(0)
    return randomized(GPT2LMHeadModel(CONFIGS["gpt2"]()).double())


def randomized(model: nn.Module) -> nn.Module:
    """Moves every parameter off its initial value, so that no term of a kernel vanishes by initialisation."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def batch(
    lengths: tuple[int, ...] = (7, 3, 5, 7), *, side: str = "right", extra: int = 0, seed: int = 2
) -> dict[str, Tensor]:
    """Token ids of the given lengths, padded to the longest plus ``extra``, with their mask."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + extra
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros_like(ids)
    for i, length in enumerate(lengths):
        real = slice(0, length) if side == "right" else slice(width - length, width)
        ids[i, real] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask[i, real] = 1
    return {"input_ids": ids, "attention_mask": mask}


def rows(inputs: dict[str, Tensor], index: slice) -> dict[str, Tensor]:
    return {key: value[index] for key, value in inputs.items()}


def autograd_kernel(
    model: nn.Module,
    inputs,
    inputs2=None,
    *,
    output: Callable | None = None,
    params: Callable[[str, nn.Parameter], bool] = lambda name, p: True,
) -> Tensor:
    """The oracle: one example and one output at a time, by ``torch.autograd.grad``, on the batch as it is padded."""
    chosen = [p for name, p in model.named_parameters() if params(name, p)]
    mode, required = model.training, [p.requires_grad for p in chosen]
    model.eval()
    for p in chosen:
        p.requires_grad_()

    def jacobian(batched) -> Tensor:
        n = len(batched) if isinstance(batched, Tensor) else len(batched["input_ids"])
        examples = []
        for i in range(n):
            one = batched[i : i + 1] if isinstance(batched, Tensor) else rows(batched, slice(i, i + 1))
            result = model(one) if isinstance(one, Tensor) else model(**one)
            values = output(result, one) if output else getattr(result, "logits", result)
            gradients = [
                torch.autograd.grad(v, chosen, retain_graph=True, allow_unused=True, materialize_grads=True)
                for v in values[0]
            ]
            examples.append(torch.stack([torch.cat([g.flatten() for g in gs]) for gs in gradients]))
        return torch.stack(examples)

    left = jacobian(inputs)
    right = left if inputs2 is None else jacobian(inputs2)
    model.train(mode)
    for p, r in zip(chosen, required, strict=True):
        p.requires_grad_(r)
    return torch.einsum("iap,jbp->ijab", left, right)


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())
