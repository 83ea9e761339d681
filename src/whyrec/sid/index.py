"""`whyrec index`: from items and training events to SIDs, trie and report.

    text of an item  ->  embedding of length 1                                   (embed.py)
    words of its title and brand  ->  word vector, optional                      (words.py)
    training events  ->  collaborative vector of length 1, optional              (collaborative.py)
    text ⊕ weight × collaborative  ->  codebooks                                 (quantizers.py)
    nearest codes, made unique  ->  sids.parquet, trie.safetensors               (assign.py)
    training events  ->  who is chosen near whom, covisits.parquet               (covisits.py)

    whyrec index --run runs/ml-100k [--recipe recipes/ml-100k/index.yaml] [--set key=value …]

Embeddings are the same on another machine to within float noise only, so SIDs may differ there.
A released checkpoint therefore carries its own SIDs and codebooks (`checkpoint`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from whyrec.catalog.covisits import CoVisits
from whyrec.catalog.dataset import Dataset, Item, write_table
from whyrec.recipe import recipe_config
from whyrec.sid.assign import LastLevel, assign_new, assign_unique, check_room
from whyrec.sid.collaborative import (
    borrow_from_neighbours,
    collaborative_vectors,
    company_weights,
    fuse,
)
from whyrec.sid.embed import embed_texts, embed_with_backbone, item_text
from whyrec.sid.quantizers import QUANTIZERS, Quantizer, load_quantizer
from whyrec.sid.report import sid_report, summary_lines
from whyrec.sid.trie import Trie
from whyrec.sid.words import with_words, word_vectors
from whyrec.stage import run_stage, write_json

BACKBONE_PREFIX = "backbone:"
LoadBackbone = Callable[[str], tuple[Any, Any]]  # name -> (causal LM, tokenizer)


@dataclass
class IndexRecipe:
    """Settings of `whyrec index`.

    Attributes:
        embedder: "minilm", a sentence-transformers id or folder, or "backbone:NAME".
        quantizer: "residual-kmeans", "balanced-kmeans" or "rqvae".
        level_sizes: codes at each level; an item's SID has one code a level.
        last_level: "nearest" (a code with a meaning, as unique as it takes) or "index" (TIGER:
            numbers the items that share all codes before it).
        words_dim: width of the word vector, which joins the text vector; 0 leaves it out.
        collaborative_dim: width of the collaborative vector; 0 leaves it out.
        collaborative_weight: its length beside the text vector's 1; at least 1 for items that share
            their whole text, which nothing else tells apart.
        window: events between two items that still count as used together.
        iterations: of k-means a level, or passes of RQ-VAE.
        seed: of everything random.
        checkpoint: folder of a released checkpoint whose sids.parquet and codebooks.safetensors
            are taken instead of new ones.
    """

    embedder: str = "minilm"
    quantizer: str = "residual-kmeans"
    level_sizes: tuple[int, ...] = (256, 256, 256, 256)
    last_level: str = "nearest"
    words_dim: int = 0
    collaborative_dim: int = 64
    collaborative_weight: float = 1.0
    window: int = 5
    iterations: int = 50
    seed: int = 0
    checkpoint: str = ""


def index(
    run: Path,
    recipe: IndexRecipe,
    *,
    force: bool = False,
    load_backbone: LoadBackbone | None = None,
) -> None:
    """Write `run/sids` from `run/dataset` and print a short summary.

    Args:
        run: the run folder; `run/dataset` must be there.
        recipe: see `IndexRecipe`.
        force: do it again although nothing has changed.
        load_backbone: `backbone.load.load_backbone`, for an embedder "backbone:NAME".

    Raises:
        ValueError: for a recipe that cannot be, more items than SIDs, or a checkpoint of another
            catalogue.
    """
    _check(recipe)
    if not (run / "dataset" / "items.parquet").exists():
        raise ValueError(
            f"{run / 'dataset'} is missing or incomplete; "
            f"run `whyrec prepare SOURCE --run {run}` first"
        )
    inputs = {"dataset": run / "dataset"}
    if recipe.checkpoint:
        for name in ("sids.parquet", "codebooks.safetensors"):
            inputs[f"checkpoint {name}"] = Path(recipe.checkpoint) / name
    output = run / "sids"

    def build(folder: Path) -> dict:
        report = _build(folder, Dataset.load(run / "dataset"), recipe, load_backbone)
        print(f"index: {output}")
        for line in summary_lines(report):
            print(f"  {line}")
        return report

    run_stage(
        output, build, stage="index", config=recipe_config(recipe), inputs=inputs, force=force
    )


def write_sids(path: Path, item_ids: Sequence[str], codes_NL: Tensor) -> None:
    """Write `sids.parquet`: item_id, codes (list of int32), in the order given."""
    codes = pa.array(codes_NL.tolist(), pa.list_(pa.int32()))
    write_table(path, pa.table({"item_id": pa.array(item_ids, pa.string()), "codes": codes}))


def read_sids(path: Path, item_ids: Sequence[str]) -> Tensor:
    """Codes of a catalogue, codes_NL int64, in the order of `item_ids`.

    Raises:
        ValueError: when the file is no `sids.parquet`, or of other items, or in another order.
    """
    known_ids, codes_NL = _read_sid_table(path)
    if known_ids != list(item_ids):
        raise ValueError(
            f"the SIDs in {path} are not those of this catalogue ({len(known_ids):,} items there, "
            f"{len(item_ids):,} here, or another order); run `whyrec index` again"
        )
    return codes_NL


def encode_new_items(
    items: Sequence[Item],
    taken_codes_NL: Tensor,
    *,
    embeddings: Path,
    codebooks: Path,
    load_backbone: LoadBackbone | None = None,
) -> Tensor:
    """SIDs for items that come after training: codes_ML int64; those already given stay.

    Args:
        items: M new items.
        taken_codes_NL: the SIDs of the catalogue.
        embeddings: its `embeddings.safetensors`, for the embedder's name and, where SIDs are
            partly of words or collaborative, for neighbours to borrow from.
        codebooks: its `codebooks.safetensors`.
        load_backbone: as for `index`.
    """
    quantizer = load_quantizer(codebooks)
    with safe_open(embeddings, framework="pt") as file:
        settings = file.metadata()
        names = {"text_ND", "words_ND", "collaborative_ND"}.intersection(file.keys())
        known = {name: file.get_tensor(name) for name in names}
    new_text_MD = _embed([item_text(i) for i in items], settings["embedder"], load_backbone)

    def borrowed(name: str) -> Tensor | None:
        if name not in known:
            return None
        return borrow_from_neighbours(
            new_text_MD, known_text_ND=known["text_ND"], known_vectors_NC=known[name]
        )

    vectors_MD = fuse(
        with_words(new_text_MD, borrowed("words_ND")),
        borrowed("collaborative_ND"),
        weight=float(settings["collaborative_weight"]),
    )
    last_level: LastLevel = "index" if settings["last_level"] == "index" else "nearest"
    return assign_new(vectors_MD, taken_codes_NL, quantizer, last_level=last_level)


def _check(recipe: IndexRecipe) -> None:
    if recipe.quantizer not in QUANTIZERS:
        known = ", ".join(QUANTIZERS)
        raise ValueError(f"there is no quantizer {recipe.quantizer!r}; choose one of {known}")
    if recipe.last_level not in get_args(LastLevel):
        raise ValueError(f'last_level must be "nearest" or "index", not {recipe.last_level!r}')
    if len(recipe.level_sizes) < 2 or min(recipe.level_sizes) < 1:
        raise ValueError(
            f"level_sizes must be two or more positive numbers, not {list(recipe.level_sizes)}"
        )
    if min(recipe.words_dim, recipe.collaborative_dim, recipe.collaborative_weight) < 0:
        raise ValueError(
            "words_dim, collaborative_dim and collaborative_weight must not be negative"
        )
    if min(recipe.window, recipe.iterations) < 1:
        raise ValueError("window and iterations must be 1 or more")


def _build(
    folder: Path, dataset: Dataset, recipe: IndexRecipe, load_backbone: LoadBackbone | None
) -> dict:
    item_ids = [item.item_id for item in dataset.items]
    if recipe.checkpoint:
        quantizer, codes_NL = _from_checkpoint(Path(recipe.checkpoint), item_ids)
    else:
        check_room(len(item_ids), recipe.level_sizes)  # told before minutes of embedding

    tensors = _item_vectors(dataset, recipe, load_backbone)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vectors_ND = tensors["vectors_ND"].to(device)
    if not recipe.checkpoint:
        quantizer = _fit(vectors_ND, recipe)
        last_level: LastLevel = "index" if recipe.last_level == "index" else "nearest"
        codes_NL = assign_unique(vectors_ND, quantizer, last_level=last_level)
    else:
        _check_width(quantizer, vectors_ND)
    report = sid_report(vectors_ND, codes_NL, quantizer, seed=recipe.seed)

    metadata = {
        "embedder": recipe.embedder,
        "collaborative_weight": str(recipe.collaborative_weight),
        "last_level": recipe.last_level,
    }
    save_file(tensors, folder / "embeddings.safetensors", metadata=metadata)
    quantizer.save(folder / "codebooks.safetensors")
    write_sids(folder / "sids.parquet", item_ids, codes_NL)
    Trie.build(codes_NL, level_sizes=quantizer.level_sizes).save(folder / "trie.safetensors")
    visits = CoVisits.count(dataset.training_sequences(), num_items=len(item_ids))
    visits.save(folder / "covisits.parquet", item_ids=item_ids)
    write_json(folder / "report.json", report)
    return report


def _item_vectors(
    dataset: Dataset, recipe: IndexRecipe, load_backbone: LoadBackbone | None
) -> dict[str, Tensor]:
    texts = [item_text(item) for item in dataset.items]
    tensors = {"text_ND": _embed(texts, recipe.embedder, load_backbone)}
    words_NW = None
    if recipe.words_dim:
        words_NW = word_vectors(dataset.items, dim=recipe.words_dim, seed=recipe.seed)
        tensors["words_ND"] = words_NW
    collaborative_NC = None
    if recipe.collaborative_dim:
        collaborative_NC = collaborative_vectors(
            dataset.training_sequences(),
            num_items=len(texts),
            dim=recipe.collaborative_dim,
            window=recipe.window,
            seed=recipe.seed,
        )
        unseen_N = (collaborative_NC == 0).all(1)
        collaborative_NC[unseen_N] = borrow_from_neighbours(
            tensors["text_ND"][unseen_N],
            known_text_ND=tensors["text_ND"][~unseen_N],
            known_vectors_NC=collaborative_NC[~unseen_N],
        )
        tensors["collaborative_ND"] = collaborative_NC
    weight_N = company_weights(texts, weight=recipe.collaborative_weight)
    # a copy, because a safetensors file may not hold one tensor under two names
    joined_ND = with_words(tensors["text_ND"], words_NW)
    tensors["vectors_ND"] = fuse(joined_ND, collaborative_NC, weight=weight_N).clone()
    return tensors


def _embed(texts: Sequence[str], embedder: str, load_backbone: LoadBackbone | None) -> Tensor:
    if not embedder.startswith(BACKBONE_PREFIX):
        return embed_texts(texts, model=embedder)
    if load_backbone is None:
        raise ValueError(f"embedder {embedder!r} needs a function that loads the backbone")
    model, tokenizer = load_backbone(embedder.removeprefix(BACKBONE_PREFIX))
    if torch.cuda.is_available():
        model = model.to("cuda")
    return embed_with_backbone(texts, model=model, tokenizer=tokenizer)


def _fit(vectors_ND: Tensor, recipe: IndexRecipe) -> Quantizer:
    """Codebooks for all levels; a level that only numbers items has a codebook of zeros."""
    indexed = recipe.last_level == "index"
    sizes = recipe.level_sizes[:-1] if indexed else recipe.level_sizes
    quantizer: Quantizer = QUANTIZERS[recipe.quantizer](
        level_sizes=sizes, iterations=recipe.iterations
    )
    quantizer.fit(vectors_ND, seed=recipe.seed)
    if indexed:
        quantizer.level_sizes = recipe.level_sizes
        width = quantizer.codebooks[0].shape[1]
        quantizer.codebooks.append(torch.zeros(recipe.level_sizes[-1], width))
    return quantizer


def _from_checkpoint(folder: Path, item_ids: list[str]) -> tuple[Quantizer, Tensor]:
    """Codebooks, and SIDs in the order of `item_ids`."""
    known_ids, codes_NL = _read_sid_table(folder / "sids.parquet")
    missing = len(set(item_ids) - set(known_ids))
    surplus = len(set(known_ids) - set(item_ids))
    if missing or surplus:
        raise ValueError(
            f"this checkpoint belongs to another catalogue: {folder} has {len(known_ids):,} items, "
            f"this run {len(item_ids):,}, {missing:,} of which it lacks; index without `checkpoint`"
        )
    quantizer = load_quantizer(folder / "codebooks.safetensors")
    if codes_NL.shape[1] != len(quantizer.level_sizes):
        raise ValueError(
            f"sids.parquet and codebooks.safetensors in {folder} do not belong together"
        )
    row = {item_id: n for n, item_id in enumerate(known_ids)}
    return quantizer, codes_NL[[row[item_id] for item_id in item_ids]]


def _check_width(quantizer: Quantizer, vectors_ND: Tensor) -> None:
    try:
        quantizer.encode(vectors_ND[:1])
    except RuntimeError:
        raise ValueError(
            f"the checkpoint's codebooks do not fit vectors of {vectors_ND.shape[1]} numbers; set "
            "embedder and collaborative_dim as in the recipe that the checkpoint was made with"
        ) from None


def _read_sid_table(path: Path) -> tuple[list[str], Tensor]:
    try:
        table = pq.read_table(path, columns=["item_id", "codes"])
        codes = table["codes"].to_pylist()
        return table["item_id"].to_pylist(), torch.tensor(codes, dtype=torch.int64)
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"cannot read SIDs from {path} ({error}); make it with `whyrec index`"
        ) from error
