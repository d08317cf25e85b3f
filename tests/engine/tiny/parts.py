"""What tiny pipelines are made of: tokenizers, text encoders and autoencoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTokenizer,
    PreTrainedModel,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Tokenizer,
)

WIDTH = 16
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
LETTERS = [*map(chr, range(33, 127))]
T5 = {"vocab_size": 384, "d_model": WIDTH, "d_kv": 8, "d_ff": 2 * WIDTH, "num_layers": 2, "num_heads": 2}


def bytewise(folder: Path) -> Qwen2TokenizerFast:
    """Bytes as tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL]
    made = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    made.save(str(folder / "tokenizer.json"))
    pad, _, end = SPECIAL
    tokenizer = Qwen2TokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token=pad, eos_token=end, unk_token=pad
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def clip_tokenizer() -> CLIPTokenizer:
    """Letters as tokens."""
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(letter + "</w>" for letter in LETTERS)]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """Letters as tokens."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(letter, -2.0) for letter in ("\u2581", *LETTERS)]
    return T5Tokenizer(vocab=special + letters, extra_ids=0, model_max_length=77)


def clip(kind: type[PreTrainedModel]) -> PreTrainedModel:
    """A text encoder of this class."""
    config = CLIPTextConfig(
        vocab_size=264,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=WIDTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return kind(config)


def qwen3(layers: int) -> Qwen3ForCausalLM:
    """A text encoder."""
    config = Qwen3Config(
        vocab_size=264,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


def autoencoder(**options: Any) -> AutoencoderKL:
    """One latent of four channels for 8 x 8 pixels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **options,
    )
