"""Models small enough to be made on the spot, one of each architecture that the project names. Plain functions."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

KINDS = ("llama", "mistral", "qwen2", "qwen2-sliding", "qwen3", "gpt2", "opt")
VOCABULARY = 128
CONTEXT = 64

_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 40,  # 2.5 tiles of 16: edge tiles
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_model(
    kind: str = "llama", *, seed: int = 0, layers: int = 2, vocab_size: int = VOCABULARY, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A causal language model of `KINDS` with 2 layers of width 32, in eval mode; weights depend on kind, size and seed only."""
    common = {**_COMMON, "num_hidden_layers": layers, "vocab_size": vocab_size}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "llama":
            model = LlamaForCausalLM(LlamaConfig(**common))
        elif kind == "mistral":
            model = MistralForCausalLM(MistralConfig(**common, sliding_window=8))
        elif kind == "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**common))
        elif kind == "qwen2-sliding":  # first layer full attention, the others sliding: layers get different masks
            model = Qwen2ForCausalLM(Qwen2Config(**common, use_sliding_window=True, sliding_window=8, max_window_layers=1))
        elif kind == "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**common, head_dim=8))
        elif kind == "gpt2":
            model = GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=vocab_size,
                    n_embd=32,
                    n_inner=40,
                    n_layer=layers,
                    n_head=4,
                    n_positions=CONTEXT,
                    bos_token_id=1,
                    eos_token_id=2,
                )
            )
        elif kind == "opt":
            model = OPTForCausalLM(
                OPTConfig(
                    vocab_size=vocab_size,
                    hidden_size=32,
                    word_embed_proj_dim=32,
                    ffn_dim=40,
                    num_hidden_layers=layers,
                    num_attention_heads=4,
                    max_position_embeddings=CONTEXT,
                    pad_token_id=0,
                    bos_token_id=1,
                    eos_token_id=2,
                )
            )
        else:
            raise ValueError(f"kind: found {kind!r}, expected one of {', '.join(KINDS)}")
        _spread(model)
    return model.to(dtype).eval()


def _spread(model: PreTrainedModel) -> None:
    """Make weights and biases as large as in a trained model, so that layers matter and no bias hides behind zeros."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable ASCII character, after <unk> 0, <s> 1 and </s> 2; everything else is <unk>."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "\n": 3} | {chr(32 + i): 4 + i for i in range(95)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=CONTEXT
    )


def tiny_windows(count: int = 8, length: int = 24, *, seed: int = 0) -> torch.Tensor:
    """Random token ids (count, length), int64."""
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def save_dense(folder: Path, *, kind: str = "llama", seed: int = 0, layers: int = 2, **config: object) -> Path:
    """A dense model with `tiny_tokenizer` in a directory; with seed 0 the one that the `tiny_base` of the tests was pruned from.

    Args:
        config: to be changed in the model's configuration behind its making.
    """
    tokenizer = tiny_tokenizer()
    model = tiny_model(kind, seed=seed, layers=layers, vocab_size=len(tokenizer))
    for key, value in config.items():
        setattr(model.config, key, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
