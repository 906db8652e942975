"""One tiny model for each architecture family, and a function that moves an adapted model's scales away from 1."""

import torch
import transformers as hf
from torch import Tensor, nn

WIDTH, HIDDEN, VOCABULARY = 8, 12, 30
_SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": HIDDEN,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
_GPT = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 40, "pad_token_id": 0}
_BART_SIZES = {
    f"{side}_{what}": size
    for side in ("encoder", "decoder")
    for what, size in {"layers": 2, "attention_heads": 2, "ffn_dim": HIDDEN}.items()
}

CLASSIFIER, CAUSAL, SEQ2SEQ = (
    hf.AutoModelForSequenceClassification,
    hf.AutoModelForCausalLM,
    hf.AutoModelForSeq2SeqLM,
)

# family: (model class, config, number of modules at (attn, attention_output, mlp), whether attention is fused).
# Mixtral has no modules at mlp: its experts are stacked in one parameter.
FAMILIES = {
    "bert": (CLASSIFIER, lambda: hf.BertConfig(**_SIZES), (6, 2, 4), False),
    "roberta": (CLASSIFIER, lambda: hf.RobertaConfig(**_SIZES), (6, 2, 4), False),
    "mpnet": (CLASSIFIER, lambda: hf.MPNetConfig(**_SIZES), (6, 2, 4), False),
    "modernbert": (CLASSIFIER, lambda: hf.ModernBertConfig(**_SIZES), (2, 2, 4), True),
    "electra": (CLASSIFIER, lambda: hf.ElectraConfig(**_SIZES, embedding_size=4), (6, 2, 4), False),
    "distilbert": (
        CLASSIFIER,
        lambda: hf.DistilBertConfig(
            dim=WIDTH, n_layers=2, n_heads=2, hidden_dim=HIDDEN, vocab_size=VOCABULARY, max_position_embeddings=40
        ),
        (6, 2, 4),
        False,
    ),
    "albert": (CLASSIFIER, lambda: hf.AlbertConfig(**_SIZES, embedding_size=4), (3, 1, 2), False),
    "deberta": (
        CLASSIFIER,
        lambda: hf.DebertaConfig(
            **_SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=8
        ),
        (2, 2, 4),
        True,
    ),
    "deberta-v2": (
        CLASSIFIER,
        lambda: hf.DebertaV2Config(
            **_SIZES,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            position_buckets=8,
            share_att_key=True,
            position_biased_input=False,
            type_vocab_size=0,
        ),
        (6, 2, 4),
        False,
    ),
    "gpt2": (CAUSAL, lambda: hf.GPT2Config(**_GPT, bos_token_id=1, eos_token_id=2), (2, 2, 4), True),
    "llama": (CAUSAL, lambda: hf.LlamaConfig(**_SIZES), (6, 2, 6), False),
    **{
        name: (CAUSAL, lambda config=config, more=more: config(**_SIZES, num_key_value_heads=1, **more), counts, False)
        for name, config, more, counts in [
            ("mistral", hf.MistralConfig, {}, (6, 2, 6)),
            ("qwen2", hf.Qwen2Config, {}, (6, 2, 6)),
            ("qwen3", hf.Qwen3Config, {"head_dim": 4}, (6, 2, 6)),
            ("gemma2", hf.Gemma2Config, {"head_dim": 4}, (6, 2, 6)),
            ("gemma3", hf.Gemma3TextConfig, {"head_dim": 4}, (6, 2, 6)),
            ("mixtral", hf.MixtralConfig, {"num_local_experts": 2, "num_experts_per_tok": 2}, (6, 2, 0)),
        ]
    },
    "phi": (CAUSAL, lambda: hf.PhiConfig(**_SIZES), (6, 2, 4), False),
    "phi3": (CAUSAL, lambda: hf.Phi3Config(**_SIZES), (2, 2, 4), True),
    "gptj": (CAUSAL, lambda: hf.GPTJConfig(**_GPT, rotary_dim=2, bos_token_id=1, eos_token_id=2), (6, 2, 4), False),
    "gpt_neox": (CAUSAL, lambda: hf.GPTNeoXConfig(**_SIZES), (2, 2, 4), True),
    "falcon": (
        CAUSAL,
        lambda: hf.FalconConfig(
            hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCABULARY, pad_token_id=0
        ),
        (2, 2, 4),
        True,
    ),
    "bloom": (
        CAUSAL,
        lambda: hf.BloomConfig(hidden_size=WIDTH, n_layer=2, n_head=2, vocab_size=VOCABULARY, pad_token_id=0),
        (2, 2, 4),
        True,
    ),
    "opt": (
        CAUSAL,
        lambda: hf.OPTConfig(
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=HIDDEN,
            vocab_size=VOCABULARY,
            max_position_embeddings=40,
            word_embed_proj_dim=4,
        ),
        (6, 2, 4),
        False,
    ),
    "t5": (
        SEQ2SEQ,
        lambda: hf.T5Config(
            d_model=WIDTH, d_kv=4, num_layers=2, num_heads=2, d_ff=HIDDEN, vocab_size=VOCABULARY, pad_token_id=0
        ),
        (18, 6, 8),
        False,
    ),
    "bart": (
        SEQ2SEQ,
        lambda: hf.BartConfig(d_model=WIDTH, vocab_size=VOCABULARY, max_position_embeddings=40, **_BART_SIZES),
        (18, 6, 8),
        False,
    ),
}


def build(family: str) -> nn.Module:
    """A float64 model in evaluation mode; parameters are drawn from N(0, 0.3^2), so that every part has an effect."""
    auto, config, _, _ = FAMILIES[family]
    torch.manual_seed(0)
    # Other implementations of mixtures of experts do not support float64.
    options = {"experts_implementation": "eager"} if family == "mixtral" else {}
    model = auto.from_config(config(), attn_implementation="eager", **options).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


def inputs(family: str) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"decoder_input_ids": ids.flip(1)} if FAMILIES[family][0] is SEQ2SEQ else {})


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def scales(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".propulsion_z." in name}


def randomize(model: nn.Module, spread: float = 0.3) -> nn.Module:
    """Move every z away from 1, more than training does, so that a wrong power or axis is noticed."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for z in scales(model).values():
            z.copy_(1 + spread * torch.randn(z.shape, generator=generator, dtype=z.dtype))
    return model
