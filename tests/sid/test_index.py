"""`whyrec index` on a small run folder: what it writes, when it refuses, checkpoints, new items."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from whyrec.catalog.dataset import Dataset, Item, read_items, write_items, write_table
from whyrec.recipe import load_recipe
from whyrec.sid import index as index_module
from whyrec.sid.index import IndexRecipe, encode_new_items, index, read_sids, write_sids
from whyrec.sid.quantizers import load_quantizer
from whyrec.sid.trie import Trie

NUM_ITEMS = 40
SMALL = {"level_sizes": (4, 4, 4), "collaborative_dim": 6, "iterations": 5}


def make_dataset(run, *, num_items=NUM_ITEMS):
    """Users walk along the catalogue; the last item is only ever somebody's test item."""
    rng = np.random.default_rng(0)
    ids = [f"item{n:03d}" for n in range(num_items)]
    kinds = ["red lipstick", "power drill", "garden hose", "shampoo"]
    items = [Item(i, f"{kinds[n % 4]} no. {n}", "", (kinds[n % 4],)) for n, i in enumerate(ids)]
    events = []
    for user in range(30):
        picks = [*rng.integers(0, num_items - 1, 7).tolist(), num_items - 1]
        splits = ["train"] * 6 + ["valid", "test"]
        for position, (pick, split) in enumerate(zip(picks, splits, strict=True)):
            events.append((f"u{user:02d}", ids[pick], position, position, split))
    user, item, time, position, split = (list(column) for column in zip(*events, strict=True))
    folder = run / "dataset"
    folder.mkdir(parents=True)
    write_items(folder / "items.parquet", items)
    write_table(
        folder / "interactions.parquet",
        pa.table(
            {
                "user_id": user,
                "item_id": item,
                "timestamp": pa.array(time, pa.int64()),
                "position": pa.array(position, pa.int32()),
            }
        ),
    )
    write_table(
        folder / "splits.parquet",
        pa.table({"user_id": user, "position": pa.array(position, pa.int32()), "split": split}),
    )
    return Dataset.load(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "small"
    dataset = make_dataset(run)
    index(run, IndexRecipe(**SMALL))
    return run, dataset


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the dataset alone."""
    shutil.copytree(finished[0] / "dataset", tmp_path / "run" / "dataset")
    return tmp_path / "run"


def item_ids(dataset):
    return [item.item_id for item in dataset.items]


def test_the_folder_holds_all_that_later_stages_read(finished):
    run, dataset = finished
    sids = run / "sids"
    codes_NL = read_sids(sids / "sids.parquet", item_ids(dataset))
    assert codes_NL.shape == (NUM_ITEMS, 3) and codes_NL.dtype == torch.int64
    assert len(torch.unique(codes_NL, dim=0)) == NUM_ITEMS
    trie = Trie.load(sids / "trie.safetensors")
    assert tuple(trie.level_sizes) == (4, 4, 4) and trie.num_items == NUM_ITEMS
    assert trie.leaf_items(trie.walk(codes_NL)).tolist() == list(range(NUM_ITEMS))
    tensors = load_file(sids / "embeddings.safetensors")
    assert tensors["text_ND"].shape == (NUM_ITEMS, 384)
    assert tensors["collaborative_ND"].shape == (NUM_ITEMS, 6)
    expected = torch.cat([tensors["text_ND"], tensors["collaborative_ND"]], dim=1)
    assert torch.equal(tensors["vectors_ND"], expected)
    # the last item has no training event: it borrows its vector
    assert tensors["collaborative_ND"][-1].norm() == pytest.approx(1, abs=1e-4)
    quantizer = load_quantizer(sids / "codebooks.safetensors")
    assert [tuple(c.shape) for c in quantizer.codebooks] == [(4, 390)] * 3
    report = json.loads((sids / "report.json").read_text())
    stage = json.loads((sids / "stage.json").read_text())
    assert stage["summary"] == report and report["items"] == NUM_ITEMS


def test_the_report_counts_what_it_says(finished):
    run, dataset = finished
    codes = read_sids(run / "sids" / "sids.parquet", item_ids(dataset)).numpy()
    report = json.loads((run / "sids" / "report.json").read_text())
    prefixes = [tuple(row[:2]) for row in codes.tolist()]
    shared = sum(prefixes.count(prefix) > 1 for prefix in prefixes)
    assert report["collision_rate"] == pytest.approx(shared / NUM_ITEMS, abs=1e-4)
    assert report["codes_used"] == [len(set(codes[:, level])) for level in range(3)]
    assert report["items_per_cell"]["max"] == max(prefixes.count(p) for p in prefixes)
    assert all(0 < value <= 1 for value in report["entropy"])
    assert 0 <= report["neighbours_kept"] <= 1 and 0 < report["reconstruction_error"] < 1
    assert 0 <= report["spilled"] <= NUM_ITEMS and len(report["spilled_by_level"]) == 3


def test_unchanged_is_not_done_again_and_force_gives_the_same(finished, capsys):
    run, _ = finished
    before = (run / "sids" / "sids.parquet").read_bytes()
    index(run, IndexRecipe(**SMALL))
    assert "unchanged" in capsys.readouterr().err
    index(run, IndexRecipe(**SMALL), force=True)
    assert "40 items in 64 SIDs" in capsys.readouterr().out
    assert (run / "sids" / "sids.parquet").read_bytes() == before


@pytest.fixture
def random_vectors(monkeypatch):
    """Vectors that depend on the text alone, without the minutes of a language model."""

    def embed(texts, *, model="minilm", **_):
        generators = [torch.Generator().manual_seed(sum(map(ord, text))) for text in texts]
        return torch.nn.functional.normalize(
            torch.stack([torch.randn(8, generator=g) for g in generators]), dim=1
        )

    monkeypatch.setattr(index_module, "embed_texts", embed)


@pytest.mark.parametrize("quantizer", ["residual-kmeans", "balanced-kmeans", "rqvae"])
@pytest.mark.parametrize("last_level", ["nearest", "index"])
def test_every_quantizer_and_last_level(run, random_vectors, quantizer, last_level):
    recipe = IndexRecipe(**SMALL, quantizer=quantizer, last_level=last_level)
    index(run, recipe)
    dataset = Dataset.load(run / "dataset")
    codes_NL = read_sids(run / "sids" / "sids.parquet", item_ids(dataset))
    assert len(torch.unique(codes_NL, dim=0)) == NUM_ITEMS
    loaded = load_quantizer(run / "sids" / "codebooks.safetensors")
    assert loaded.level_sizes == (4, 4, 4) and len(loaded.codebooks) == 3
    if last_level == "index":
        assert not loaded.codebooks[-1].any()
    new = encode_new_items(
        [Item("new1", "green lipstick"), Item("new2", "green lipstick")],
        codes_NL,
        embeddings=run / "sids" / "embeddings.safetensors",
        codebooks=run / "sids" / "codebooks.safetensors",
    )
    assert len(torch.unique(torch.cat([codes_NL, new]), dim=0)) == NUM_ITEMS + 2


def test_text_alone(run, random_vectors):
    index(run, IndexRecipe(level_sizes=(8, 8), collaborative_dim=0))
    tensors = load_file(run / "sids" / "embeddings.safetensors")
    assert set(tensors) == {"text_ND", "vectors_ND"}
    assert torch.equal(tensors["text_ND"], tensors["vectors_ND"])


def test_company_tells_items_without_text_apart(run):
    """At weight 0 company is in no vector, but where all items are called the same it is all."""
    recipe = IndexRecipe(**SMALL, collaborative_weight=0.0)
    index(run, recipe)
    told = load_file(run / "sids" / "embeddings.safetensors")["vectors_ND"]
    assert not told[:, -SMALL["collaborative_dim"] :].any()
    items = read_items(run / "dataset" / "items.parquet")
    write_items(run / "dataset" / "items.parquet", [Item(i.item_id, "", "", (), "") for i in items])
    index(run, recipe)
    tensors = load_file(run / "sids" / "embeddings.safetensors")
    assert len(tensors["text_ND"].unique(dim=0)) == 1
    company = tensors["vectors_ND"][:, -SMALL["collaborative_dim"] :]
    assert torch.equal(company, tensors["collaborative_ND"]) and len(company.unique(dim=0)) > 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level_sizes": (3, 3, 3)}, "40 items do not fit into the 27 SIDs"),
        ({"quantizer": "pq"}, "no quantizer 'pq'; choose one of residual-kmeans"),
        ({"last_level": "last"}, "last_level must be"),
        ({"level_sizes": (256,)}, "two or more"),
        ({"collaborative_weight": -1.0}, "must not be negative"),
        ({"words_dim": -1}, "must not be negative"),
        ({"window": 0}, "window and iterations must be 1 or more"),
        ({"embedder": "backbone:x"}, "needs a function that loads the backbone"),
    ],
)
def test_a_recipe_that_cannot_be(run, random_vectors, change, message):
    with pytest.raises(ValueError, match=message):
        index(run, IndexRecipe(**(SMALL | change)))
    assert not (run / "sids").exists()


def test_recipe_from_yaml(tmp_path):
    (tmp_path / "index.yaml").write_text("level_sizes: [32, 16]\nquantizer: rqvae\n")
    recipe = load_recipe(IndexRecipe, tmp_path / "index.yaml", ["window=3"])
    assert recipe == IndexRecipe(level_sizes=(32, 16), quantizer="rqvae", window=3)


def test_a_failed_index_leaves_the_old_one(finished, monkeypatch):
    run, _ = finished
    before = (run / "sids" / "sids.parquet").read_bytes()

    def full_disk(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(index_module, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        index(run, IndexRecipe(**SMALL), force=True)
    assert (run / "sids" / "sids.parquet").read_bytes() == before


def checkpoint_of(run, folder):
    folder.mkdir()
    for name in ("sids.parquet", "codebooks.safetensors"):
        shutil.copy(run / "sids" / name, folder / name)
    return folder


def test_a_checkpoint_brings_its_own_sids(finished, run, tmp_path):
    checkpoint = checkpoint_of(finished[0], tmp_path / "checkpoint")
    ids = item_ids(finished[1])
    released = read_sids(checkpoint / "sids.parquet", ids)
    # the order of the checkpoint's rows is its own affair
    released = released.flip(1)
    write_sids(checkpoint / "sids.parquet", ids[::-1], released.flip(0))
    index(run, IndexRecipe(**SMALL, checkpoint=str(checkpoint)))
    assert torch.equal(read_sids(run / "sids" / "sids.parquet", ids), released)
    trie = Trie.load(run / "sids" / "trie.safetensors")
    assert trie.leaf_items(trie.walk(released)).tolist() == list(range(NUM_ITEMS))


def test_a_checkpoint_of_another_catalogue(finished, tmp_path, random_vectors):
    checkpoint = checkpoint_of(finished[0], tmp_path / "checkpoint")
    other = tmp_path / "other"
    make_dataset(other, num_items=45)
    with pytest.raises(
        ValueError, match=r"belongs to another catalogue: .* has 40 items, this run 45, 5 of which"
    ):
        index(other, IndexRecipe(**SMALL, checkpoint=str(checkpoint)))
    assert not (other / "sids").exists()


def test_a_checkpoint_made_from_other_vectors(finished, run, tmp_path, random_vectors):
    checkpoint = checkpoint_of(finished[0], tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="do not fit vectors of 14 numbers"):
        index(run, IndexRecipe(**SMALL, checkpoint=str(checkpoint)))


def test_a_checkpoint_that_is_not_there(run, tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint sids\.parquet at .* does not exist"):
        index(run, IndexRecipe(**SMALL, checkpoint=str(tmp_path / "nothing")))


def test_sids_of_another_order_or_file_are_refused(finished, tmp_path):
    run, dataset = finished
    ids = item_ids(dataset)
    with pytest.raises(ValueError, match="not those of this catalogue"):
        read_sids(run / "sids" / "sids.parquet", ids[::-1])
    with pytest.raises(ValueError, match="cannot read SIDs"):
        read_sids(run / "dataset" / "items.parquet", ids)
    (tmp_path / "sids.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="cannot read SIDs"):
        read_sids(tmp_path / "sids.parquet", ids)


def new_shampoo(sids, codes_NL):
    return encode_new_items(
        [Item("new", "shampoo no. 3", "", ("shampoo",))],
        codes_NL,
        embeddings=sids / "embeddings.safetensors",
        codebooks=sids / "codebooks.safetensors",
    )


def test_new_items_of_a_kind_join_their_kind(finished):
    run, dataset = finished
    sids = run / "sids"
    codes_NL = read_sids(sids / "sids.parquet", item_ids(dataset))
    new = new_shampoo(sids, codes_NL)
    assert new.shape == (1, 3)
    assert len(torch.unique(torch.cat([codes_NL, new]), dim=0)) == NUM_ITEMS + 1


def test_words_join_the_text_and_new_items_borrow_them(run):
    index(run, IndexRecipe(**SMALL, words_dim=5))
    sids, dataset = run / "sids", Dataset.load(run / "dataset")
    tensors = load_file(sids / "embeddings.safetensors")
    assert tensors["words_ND"].shape == (NUM_ITEMS, 5)
    assert tensors["vectors_ND"].shape == (NUM_ITEMS, 384 + 5 + 6)
    joined_ND = torch.cat([tensors["text_ND"], 4 / 3 * tensors["words_ND"]], dim=1) * 0.6
    assert torch.allclose(tensors["vectors_ND"][:, :389], joined_ND, atol=1e-6)
    codes_NL = read_sids(sids / "sids.parquet", item_ids(dataset))
    new = new_shampoo(sids, codes_NL)
    shampoos = {tuple(codes_NL[n, :1].tolist()) for n in range(3, NUM_ITEMS, 4)}
    assert tuple(new[0, :1].tolist()) in shampoos


def test_embedding_with_a_backbone(run, random_vectors, monkeypatch):
    asked = []

    def embed(texts, *, model, tokenizer):
        asked.append((model, tokenizer))
        return index_module.embed_texts(texts)

    monkeypatch.setattr(index_module, "embed_with_backbone", embed)

    class Model:
        def to(self, device):
            return self

    model = Model()
    recipe = IndexRecipe(**SMALL, embedder="backbone:tiny")
    index(run, recipe, load_backbone=lambda name: (model, name))
    assert asked == [(model, "tiny")]
