"""Shared fixtures: tiny random models, the packaged tokenizer, a small run folder.

The tiny catalogue has a planted pattern: item n is always followed by item n + 1, so that a model
that learns anything at all ranks the next item first.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # an unknown name must fail at once, network or not
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from whyrec.backbone.extend import extend_vocabulary
from whyrec.backbone.load import packaged_backbone
from whyrec.catalog.dataset import Dataset, Item
from whyrec.catalog.prepare import PrepareRecipe, prepare
from whyrec.decode.model_folder import Settings, save_model_folder
from whyrec.prompting.encoder import PromptEncoder
from whyrec.sid import index as index_module
from whyrec.sid.index import IndexRecipe, index
from whyrec.sid.trie import Trie
from whyrec.sid.vocabulary import SidVocabulary

torch.set_num_threads(1)

ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
NUM_ITEMS, NUM_USERS, LEVEL_SIZES = 30, 24, (4, 4, 4)


def make_model(
    kind: str = "llama", *, vocab_size: int, tied: bool = True, seed: int = 0, **settings: Any
) -> PreTrainedModel:
    """A tiny random model with grouped heads, of weights large enough to tell tokens apart."""
    config_class, model_class = ARCHITECTURES[kind]
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = config_class(vocab_size=vocab_size, tie_word_embeddings=tied, **(sizes | settings))
    torch.manual_seed(seed)
    return model_class(config).eval()


def make_codes(level_sizes: tuple[int, ...], *, num_items: int, seed: int) -> Tensor:
    """Codes [N, L] of a random catalogue; fewer items where the space is smaller."""
    space = int(np.prod(level_sizes))
    chosen = np.random.default_rng(seed).permutation(space)[:num_items]
    return torch.from_numpy(np.stack(np.unravel_index(chosen, level_sizes), axis=1))


def make_vocabulary(level_sizes: tuple[int, ...], *, first: int = 8) -> SidVocabulary:
    """SID tokens behind `first` text tokens, without a tokenizer."""
    offsets = tuple(first + sum(level_sizes[:level]) for level in range(len(level_sizes)))
    return SidVocabulary(level_sizes, offsets, begin=1, end=2)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """The packaged SmolLM2 tokenizer; copy it before changing it."""
    return AutoTokenizer.from_pretrained(packaged_backbone())


@pytest.fixture(scope="session")
def make_backbone(
    tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A function that writes a tiny random backbone with the packaged tokenizer."""

    def make(kind: str = "llama", **settings: Any) -> Path:
        folder = tmp_path_factory.mktemp("backbones") / "tiny"
        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "head_dim": 8,
            "initializer_range": 0.1,
        } | settings
        model = make_model(kind, vocab_size=len(tokenizer), **(sizes | settings))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def backbone(make_backbone: Callable[..., Path]) -> Path:
    """A tiny Llama with tied head."""
    return make_backbone()


def text_vectors(texts: list[str], **_: object) -> Tensor:
    """Unit vectors that depend on the text alone, in place of a language model's."""
    generators = [torch.Generator().manual_seed(sum(map(ord, text))) for text in texts]
    vectors_ND = torch.stack([torch.randn(8, generator=g) for g in generators])
    return torch.nn.functional.normalize(vectors_ND, dim=1)


def make_run(run: Path, *, num_items: int = NUM_ITEMS, shift: int = 1) -> Path:
    """A run folder with `dataset` and `sids`: item n is followed by item n + shift, round a ring.

    Every user has 10 to 13 events, of which the last two are test and valid.
    """
    raw = run.with_name(f"{run.name}-raw")
    raw.mkdir(parents=True)
    names = [f"item{n:03d}" for n in range(num_items)]
    with (raw / "sequential_data.txt").open("w") as file:
        for user in range(NUM_USERS):
            walk = [names[(user * 7 + shift * step) % num_items] for step in range(10 + user % 4)]
            file.write(" ".join([f"u{user:02d}", *walk]) + "\n")
    with (raw / "items.jsonl").open("w") as file:
        for n, name in enumerate(names):
            row = {"item_id": name, "title": f"Film {n}", "categories": [f"Genre {n % 5}"]}
            file.write(json.dumps(row) + "\n")
    prepare(run, PrepareRecipe(source=str(raw), format="sequences", k_core=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "embed_texts", text_vectors)
        index(run, IndexRecipe(level_sizes=LEVEL_SIZES, collaborative_dim=0, iterations=5))
    return run


@pytest.fixture(scope="session")
def prepared_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished `dataset` and `sids`; not to be changed."""
    return make_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="session")
def released_run() -> Path:
    """The run folder of the released checkpoint, which `make aligned` makes; not to be changed."""
    run = Path(__file__).resolve().parents[1] / "runs" / "ml-100k"
    if not (run / "model" / "aligned").exists():
        reason = "there is no runs/ml-100k: make aligned"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return run


@pytest.fixture
def run(prepared_run: Path, tmp_path: Path) -> Path:
    """A copy of the run folder that a test may change."""
    shutil.copytree(prepared_run, tmp_path / "run")
    return tmp_path / "run"


@dataclass(frozen=True, repr=False)  # hypothesis prints what it was given
class Extended:
    """The tiny run's catalogue bound to an extended tiny backbone."""

    dataset: Dataset
    codes_NL: Tensor
    trie: Trie
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vocabulary: SidVocabulary
    encoder: PromptEncoder


@pytest.fixture(scope="session")
def extended(prepared_run: Path, tokenizer: PreTrainedTokenizerBase) -> Extended:
    """Catalogue, extended model and encoder; not to be changed."""
    dataset = Dataset.load(prepared_run / "dataset")
    item_ids = [item.item_id for item in dataset.items]
    codes_NL = index_module.read_sids(prepared_run / "sids" / "sids.parquet", item_ids)
    trie = Trie.load(prepared_run / "sids" / "trie.safetensors")
    tokenizer = copy.deepcopy(tokenizer)
    model = make_model(vocab_size=len(tokenizer))
    vocabulary = extend_vocabulary(model, tokenizer, level_sizes=LEVEL_SIZES)
    encoder = PromptEncoder(tokenizer, vocabulary=vocabulary, codes_NL=codes_NL.tolist())
    return Extended(dataset, codes_NL, trie, model, tokenizer, vocabulary, encoder)


def save_model(folder: Path, run: Path, extended: Extended, *, max_history: int = 8) -> Path:
    """A model folder of random weights for a run whose SIDs have `LEVEL_SIZES`."""
    save_model_folder(
        folder,
        model=copy.deepcopy(extended.model),
        tokenizer=extended.tokenizer,
        settings=Settings("aligned", "tiny", list(LEVEL_SIZES), max_history),
        dataset_folder=run / "dataset",
        sids_folder=run / "sids",
    )
    return folder


@pytest.fixture(scope="session")
def saved_model(
    prepared_run: Path, extended: Extended, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny run's model folder; not to be changed."""
    return save_model(tmp_path_factory.mktemp("models") / "aligned", prepared_run, extended)


@pytest.fixture
def model_folder(saved_model: Path, tmp_path: Path) -> Path:
    """A copy of the model folder that a test may change."""
    return Path(shutil.copytree(saved_model, tmp_path / "model"))


@pytest.fixture(scope="session")
def walks() -> Dataset:
    """Every item leads to one other, so that transitions say everything and popularity nothing."""
    rng = np.random.default_rng(0)
    after = np.roll(np.arange(NUM_ITEMS), 7)
    sequences = []
    for length in rng.integers(4, 25, 120):
        walk = [int(rng.integers(NUM_ITEMS))]
        while len(walk) < length:
            walk.append(int(after[walk[-1]]))
        sequences.append(np.array(walk, np.int32))
    return Dataset(
        [Item(f"i{n}") for n in range(NUM_ITEMS)],
        [f"u{n}" for n in range(len(sequences))],
        sequences,
        [np.array([0] * (len(s) - 2) + [1, 2], np.int8) for s in sequences],
    )


def in_two_processes(*program: str) -> None:
    """Run a program in two CPU processes; `accelerate launch` can do so through MPI only."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *program], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
