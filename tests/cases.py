"""Tiny random models and padded batches, as data: every exactness test runs over these."""

from collections.abc import Callable, Iterator

import torch
import transformers as hf
from torch import Tensor, nn

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
_SHORT = _SIZES | {"max_position_embeddings": 82}
_ENDS = {"bos_token_id": 2, "eos_token_id": 2}
_GROUPED = _SIZES | _ENDS | {"num_key_value_heads": 1}
_HEADS = _GROUPED | {"head_dim": 6}
_GPT = _ENDS | {
    "n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 80, "vocab_size": VOCABULARY, "num_labels": 3,
    "pad_token_id": PAD,
}  # fmt: skip
_FEW = {key: _SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")}
_LABELS = _ENDS | {"num_labels": 3, "pad_token_id": PAD}
_SIDES = {
    f"{side}_{what}": size
    for side in ("encoder", "decoder")
    for what, size in {"layers": 2, "attention_heads": 2, "ffn_dim": 20}.items()
}

MAMBA = {"hidden_size": 12, "vocab_size": VOCABULARY, "pad_token_id": PAD, "num_labels": 3, "num_hidden_layers": 2}

# Every family of text models that the fast kernel is tested on, as classifiers.
FAMILIES: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "bert": lambda: hf.BertConfig(**_SHORT),
    "roberta": lambda: hf.RobertaConfig(**_SHORT),
    "gpt2": lambda: hf.GPT2Config(**_GPT),
    "llama": lambda: hf.LlamaConfig(**_GROUPED),
    "distilbert": lambda: hf.DistilBertConfig(
        dim=12, n_layers=2, n_heads=2, hidden_dim=20, vocab_size=VOCABULARY, max_position_embeddings=80, num_labels=3,
        pad_token_id=PAD,
    ),
    "electra": lambda: hf.ElectraConfig(**_SHORT, embedding_size=8),
    "albert": lambda: hf.AlbertConfig(**_SHORT, embedding_size=8),
    "deberta-v2": lambda: hf.DebertaV2Config(
        **_SHORT, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8, share_att_key=True,
        position_biased_input=False, type_vocab_size=0,
    ),
    "gptj": lambda: hf.GPTJConfig(**_GPT, rotary_dim=4),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_SIZES),
    "mistral": lambda: hf.MistralConfig(**_GROUPED),
    "qwen2": lambda: hf.Qwen2Config(**_GROUPED),
    "qwen3": lambda: hf.Qwen3Config(**_HEADS),
    "gemma2": lambda: hf.Gemma2Config(**_HEADS),
    "gemma3": lambda: hf.Gemma3TextConfig(**_HEADS),
    "phi": lambda: hf.PhiConfig(**_SIZES, **_ENDS, partial_rotary_factor=0.67),
    "falcon": lambda: hf.FalconConfig(**_FEW, **_LABELS),
    "bloom": lambda: hf.BloomConfig(hidden_size=12, n_layer=2, n_head=2, vocab_size=VOCABULARY, **_LABELS),
    "opt": lambda: hf.OPTConfig(
        **_FEW, **_LABELS, ffn_dim=20, max_position_embeddings=80, word_embed_proj_dim=8,
    ),
    "mixtral": lambda: hf.MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "t5": lambda: hf.T5Config(
        d_model=12, d_kv=6, num_layers=2, num_heads=2, d_ff=20, vocab_size=VOCABULARY, num_labels=3, pad_token_id=PAD,
        decoder_start_token_id=PAD, eos_token_id=2,
    ),
    "bart": lambda: hf.BartConfig(
        **_SIDES, d_model=12, vocab_size=VOCABULARY, max_position_embeddings=80, num_labels=3, pad_token_id=PAD,
        bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
    ),
}  # fmt: skip
# Families that the slow reference is tested on.
CONFIGS = {family: FAMILIES[family] for family in ("bert", "roberta", "gpt2", "llama")}
# Families whose classifier reads out at the end-of-text token.
READ_AT_END = ("t5", "bart")


def classifier(family: str, attention: str = "eager") -> nn.Module:
    """A float64 classifier whose every parameter is random, biases and norms included, in training mode."""
    torch.manual_seed(0)
    # Other implementations of mixtures of experts do not support float64.
    options = {"experts_implementation": "eager"} if family == "mixtral" else {}
    model = hf.AutoModelForSequenceClassification.from_config(
        FAMILIES[family](), attn_implementation=attention, **options
    )
    return randomized(model.double()).train()


def tied_gpt2() -> nn.Module:
    torch.manual_seed(0)
    return randomized(hf.GPT2LMHeadModel(CONFIGS["gpt2"]()).double())


class Mamba(nn.Module):
    """A linear readout of the mean of Mamba's states, since transformers has no Mamba classifier."""

    def __init__(self):
        super().__init__()
        self.body, self.out = hf.MambaModel(hf.MambaConfig(**MAMBA, state_size=4, time_step_rank=3)), nn.Linear(12, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.body(input_ids, use_cache=False)[0].mean(dim=1))


def randomized(model: nn.Module) -> nn.Module:
    """Change every parameter from its initial value, so that no term of a kernel is zero by initialisation."""
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


def batch_for(family: str, lengths: tuple[int, ...] = (7, 3, 5, 7), **kwargs) -> dict[str, Tensor]:
    """A batch whose examples end with the token that the family's classifier reads."""
    inputs = batch(lengths, **kwargs)
    if family in READ_AT_END:
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            ids[mask.nonzero()[-1]] = 2
    return inputs


def rows(inputs: dict[str, Tensor], index: slice) -> dict[str, Tensor]:
    return {key: value[index] for key, value in inputs.items()}


def each_alone(inputs: dict[str, Tensor] | Tensor) -> Iterator[dict[str, Tensor] | Tensor]:
    """Every example as a batch of one, without padding."""
    if isinstance(inputs, Tensor):
        yield from inputs.split(1)
        return
    for i in range(len(next(iter(inputs.values())))):
        one = {key: value[i : i + 1] for key, value in inputs.items()}
        if "attention_mask" in one:
            one = {key: value[:, : int(one["attention_mask"].sum())] for key, value in one.items()}
        yield one


def autograd_kernel(
    model: nn.Module,
    inputs,
    inputs2=None,
    *,
    output: Callable | None = None,
    params: Callable[[str, nn.Parameter], bool] = lambda name, p: True,
) -> Tensor:
    """Reference kernel by ``torch.autograd.grad``, one example and one output at a time, on the padded batch."""
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
