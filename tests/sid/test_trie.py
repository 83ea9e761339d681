"""The trie against brute force over random catalogues, and the faults that it must refuse."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from whyrec.sid.trie import BYTES_PER_ITEM, Trie

torch.set_num_threads(1)
examples = settings(max_examples=40, deadline=None)


@st.composite
def catalogues(draw):
    """(SIDs as a list of distinct tuples in random order, level sizes)."""
    level_sizes = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=5)))
    space = int(np.prod(level_sizes))
    # A dense catalogue gets lookup tables, a sparse one none: both kinds must come up.
    count = draw(st.integers(1, min(space, 300)))
    seed = draw(st.integers(0, 2**32 - 1))
    numbers = np.random.default_rng(seed).choice(space, size=count, replace=False)
    sids = np.stack(np.unravel_index(numbers, level_sizes), axis=1)
    return [tuple(map(int, sid)) for sid in sids], level_sizes


def build(sids, level_sizes):
    return Trie.build(torch.tensor(sids), level_sizes=level_sizes)


def prefixes(sids, depth):
    return sorted({sid[:depth] for sid in sids})


def walk(trie, rows, depth):
    return trie.walk(torch.tensor(rows, dtype=torch.long).reshape(len(rows), depth))


def same(first, second):
    assert first.level_sizes == second.level_sizes
    assert first.offsets == second.offsets and first.fan_outs == second.fan_outs
    for name in ("first_child", "code", "item"):
        assert getattr(first, name).dtype == torch.int32
        assert torch.equal(getattr(first, name), getattr(second, name))
    for one, other in zip(first.tables, second.tables, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@examples
@given(catalogues())
def test_children_mask_and_step_are_the_legal_codes(catalogue):
    sids, level_sizes = catalogue
    trie = build(sids, level_sizes)
    seen = {0}
    for level, size in enumerate(level_sizes):
        rows = prefixes(sids, level)
        nodes_B = walk(trie, rows, level)
        children_BK = trie.children(nodes_B, level=level)
        assert children_BK.dtype == torch.int32 and children_BK.shape == (len(rows), size)
        legal = prefixes(sids, level + 1)
        node = dict(zip(legal, walk(trie, legal, level + 1).tolist(), strict=True))
        expected_BK = [[node.get((*row, code), -1) for code in range(size)] for row in rows]
        assert children_BK.tolist() == expected_BK
        mask_BK = trie.mask(nodes_B, level=level)
        assert mask_BK.dtype == torch.bool
        assert torch.equal(mask_BK, children_BK >= 0)
        stepped_BK = trie.step(nodes_B[:, None], torch.arange(size))
        assert torch.equal(stepped_BK, children_BK)
        fresh = children_BK[children_BK >= 0].tolist()
        assert len(fresh) == len(set(fresh)) == len(legal) and not seen & set(fresh)
        seen |= set(fresh)
    assert seen == set(range(trie.num_nodes))  # every node reachable, once


@examples
@given(catalogues())
def test_walk_reaches_every_item_and_nothing_else(catalogue):
    sids, level_sizes = catalogue
    trie = build(sids, level_sizes)
    leaves_N = walk(trie, sids, len(level_sizes))
    assert trie.leaf_items(leaves_N).tolist() == list(range(len(sids)))
    assert torch.equal(trie.leaf_rank(leaves_N), trie.item_ranks().long())
    everything = list(product(*map(range, level_sizes)))[:2000]
    known = {sid: index for index, sid in enumerate(sids)}
    items = trie.leaf_items(walk(trie, everything, len(level_sizes)))
    assert items.tolist() == [known.get(sid, -1) for sid in everything]


@examples
@given(catalogues(), st.data())
def test_walk_of_any_codes(catalogue, data):
    sids, level_sizes = catalogue
    trie = build(sids, level_sizes)
    depth = data.draw(st.integers(0, len(level_sizes)))
    code = st.sampled_from([-(2**40), -1, 0, 1, 2, 8, 9, 70_000, 2**40])
    rows = data.draw(st.lists(st.tuples(*[code] * depth), min_size=1, max_size=20))
    alive = walk(trie, rows, depth) >= 0
    assert alive.tolist() == [row in set(prefixes(sids, depth)) for row in rows]


@examples
@given(catalogues())
def test_leaf_ranges_hold_the_items_below_a_prefix(catalogue):
    sids, level_sizes = catalogue
    trie = build(sids, level_sizes)
    in_order = sorted(range(len(sids)), key=lambda index: sids[index])
    assert trie.item.tolist() == in_order  # leaves in lexicographic order
    assert trie.item_ranks()[trie.item.long()].tolist() == list(range(len(sids)))
    for depth in range(len(level_sizes) + 1):
        rows = prefixes(sids, depth)
        low_B, high_B = trie.leaf_range(walk(trie, rows, depth), level=depth)
        for row, low, high in zip(rows, low_B.tolist(), high_B.tolist(), strict=True):
            below = {index for index, sid in enumerate(sids) if sid[:depth] == row}
            assert set(in_order[low:high]) == below and high - low == len(below)


@examples
@given(catalogues())
def test_dead_nodes_stay_dead_beside_living_ones(catalogue):
    sids, level_sizes = catalogue
    trie = build(sids, level_sizes)
    for level, size in enumerate(level_sizes):
        node = int(walk(trie, [sids[0][:level]], level)[0])
        nodes = torch.tensor([[-1, node], [node, -1]])
        for dtype in (torch.int32, torch.int64):
            children = trie.children(nodes.to(dtype), level=level)
            assert children.shape == (2, 2, size)
            assert torch.equal(children >= 0, trie.mask(nodes.to(dtype), level=level))
            assert children[0, 0].tolist() == children[1, 1].tolist() == [-1] * size
            assert torch.equal(children[0, 1], children[1, 0]) and children[0, 1].max() >= 0
            stepped = trie.step(nodes.to(dtype), torch.full((2, 2), sids[0][level]))
            assert stepped[0, 0] == stepped[1, 1] == -1 and stepped[0, 1] >= 0
        low, high = trie.leaf_range(nodes, level=level)
        assert low[0, 0] == high[0, 0] == 0 and high[0, 1] > low[0, 1]
    leaf = walk(trie, sids[:1], len(level_sizes))
    assert trie.step(leaf, torch.zeros(1, dtype=torch.long)).tolist() == [-1]
    dead = torch.tensor([-1])
    assert trie.leaf_rank(dead).tolist() == trie.leaf_items(dead).tolist() == [-1]
    low, high = trie.leaf_range(dead, level=len(level_sizes))
    assert (low.tolist(), high.tolist()) == ([0], [0])


@examples
@given(catalogues(), st.randoms())
def test_order_of_items_changes_only_their_indices(catalogue, random):
    sids, level_sizes = catalogue
    order = list(range(len(sids)))
    random.shuffle(order)
    first = build(sids, level_sizes)
    second = build([sids[index] for index in order], level_sizes)
    assert torch.equal(first.first_child, second.first_child)
    assert torch.equal(first.code, second.code)
    assert first.item.tolist() == [order[index] for index in second.item.tolist()]


@examples
@given(catalogues())
def test_saved_trie_comes_back_equal(tmp_path_factory, catalogue):
    trie = build(*catalogue)
    path = tmp_path_factory.mktemp("trie") / "trie.safetensors"
    trie.save(path)
    loaded = Trie.load(path)
    build([(0,)], (1,)).save(path)  # a new file in its place leaves the loaded trie alone
    same(trie, loaded)
    assert [entry.name for entry in path.parent.iterdir()] == ["trie.safetensors"]
    same(trie, trie.to("cpu"))


@examples
@given(catalogues())
def test_lookup_tables_keep_to_their_budget(catalogue):
    trie = build(*catalogue)
    without = trie.first_child.nbytes + trie.code.nbytes + trie.item.nbytes
    assert trie.nbytes <= max(without, BYTES_PER_ITEM * trie.num_items)


def test_both_layouts_are_exercised():
    sids = list(product(range(4), range(4), range(4), range(4)))
    assert all(table is not None for table in build(sids, (4, 4, 4, 4)).tables)
    assert all(table is None for table in build(sids[::60], (4, 4, 4, 4)).tables)


@pytest.mark.parametrize("step", [1, 60])
def test_queries_have_fixed_shapes_and_never_ask_the_device(step):
    # Tensors on the meta device have no values: any host synchronisation or shape that depends on
    # data fails there, and so does any tensor made on the wrong device.
    trie = build(list(product(range(4), range(4), range(4), range(4)))[::step], (4, 4, 4, 4))
    trie = trie.to("meta")
    nodes = torch.empty((2, 3), dtype=torch.long, device="meta")
    for level in range(4):
        assert trie.children(nodes, level=level).shape == (2, 3, 4)
        assert trie.mask(nodes, level=level).shape == (2, 3, 4)
        assert [bound.shape for bound in trie.leaf_range(nodes, level=level)] == [(2, 3)] * 2
    assert trie.step(nodes, nodes).shape == (*trie.walk(nodes).shape, 3) == (2, 3)
    assert trie.leaf_items(nodes).device.type == "meta" and trie.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_type_builds(dtype):
    sids = [[3, 1], [0, 2], [3, 0]]
    same(build(sids, (4, 3)), Trie.build(torch.tensor(sids, dtype=dtype), level_sizes=[4, 3]))


def test_levels_of_65536_codes_beyond_a_64_bit_key():
    generator = np.random.default_rng(0)
    sids = np.unique(generator.integers(0, 65_536, size=(500, 8)) // 65_535 * 65_535, axis=0)
    sids = np.concatenate([sids, generator.integers(1, 65_535, size=(500, 8))])
    level_sizes = (65_536,) * 8
    trie = build(sids.tolist(), level_sizes)
    assert trie.leaf_items(trie.walk(torch.from_numpy(sids))).tolist() == list(range(len(sids)))
    legal = trie.mask(torch.tensor([0]), level=0)[0].nonzero()[:, 0].tolist()
    assert legal == sorted(set(sids[:, 0].tolist()))


def test_duplicate_sids_are_refused_with_their_rows():
    sids = [[0, 1], [2, 2], [1, 0], [2, 2], [0, 0]]
    with pytest.raises(ValueError, match=r"items 1 and 3 have the same SID \[2, 2\]"):
        build(sids, (3, 3))


@pytest.mark.parametrize(
    ("codes", "level_sizes", "message"),
    [
        ([[0, 3]], (3, 3), r"item 0 has code 3 at level 1, outside 0 \.\. 2"),
        ([[0, 0], [-1, 0]], (3, 3), "item 1 has code -1 at level 0"),
        ([[65_536, 0]], (65_536, 1), "code 65536 at level 0"),
        ([[0, 0, 0]], (3, 3), r"shape \[items, 2\], not \[1, 3\]"),
        ([0, 1], (3, 3), r"not \[2\]"),
        ([[0.0, 1.0]], (3, 3), "must be integers"),
        (np.zeros((0, 2), dtype=np.int64), (3, 3), "empty"),
        ([[0], [0], [0]], (2,), "3 items do not fit into 2 SIDs"),
        ([[0]], (65_537,), "level sizes"),
        ([[0]], (0,), "level sizes"),
        (np.zeros((1, 0), dtype=np.int64), (), "level sizes"),
    ],
)
def test_bad_codes_are_refused(codes, level_sizes, message):
    with pytest.raises(ValueError, match=message):
        Trie.build(torch.as_tensor(codes), level_sizes=level_sizes)


def saved(path: Path) -> dict[str, torch.Tensor]:
    build([[0, 1], [2, 2], [1, 0], [2, 0], [0, 0]], (3, 3)).save(path)
    # A loaded tensor may still be the file's memory, which the tests overwrite.
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("first_child", 0, 0),
        ("first_child", -1, 99),
        ("first_child", 2, 99),
        ("first_child", 2, 4),  # not increasing
        ("code", 0, 1),
        ("code", 1, 3),  # outside its level
        ("code", 1, -1),
        ("code", 2, 0),  # siblings out of order
        ("item", 0, 3),  # not a permutation
        ("item", 0, -1),
        ("item", 0, 5),
        ("item", 0, 2**31 - 1),
    ],
)
def test_damaged_arrays_are_refused(tmp_path, name, place, value):
    path = tmp_path / "trie.safetensors"
    tensors = saved(path)
    assert tensors[name][place] != value
    tensors[name][place] = value
    save_file(tensors, path, metadata={"level_sizes": "[3, 3]"})
    with pytest.raises(ValueError, match="is not a trie file"):
        Trie.load(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "trie.safetensors"
    tensors = saved(path)
    whole = path.read_bytes()

    def refuse():
        with pytest.raises(ValueError, match="is not a trie file"):
            Trie.load(path)

    for content in (b"", b"not a trie", whole[:-4], whole[:20]):
        path.write_bytes(content)
        refuse()
    bad_metadata = ({}, {"level_sizes": "x"}, {"level_sizes": "7"}, {"level_sizes": "[]"})
    wrong_sizes = ({"level_sizes": "[3]"}, {"level_sizes": "[3, 3, 3]"}, {"level_sizes": "[2, 3]"})
    for metadata in (*bad_metadata, *wrong_sizes):
        save_file(tensors, path, metadata=metadata)
        refuse()
    save_file({"weight": torch.zeros(2)}, path, metadata={"level_sizes": "[3, 3]"})
    refuse()
    floats = {name: tensor.float() for name, tensor in tensors.items()}
    save_file(floats, path, metadata={"level_sizes": "[3, 3]"})
    refuse()
    empty = {name: tensor[:0] for name, tensor in tensors.items()}
    save_file(empty, path, metadata={"level_sizes": "[3, 3]"})
    refuse()
    with pytest.raises(FileNotFoundError):
        Trie.load(tmp_path / "absent.safetensors")


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "trie.safetensors"
    saved(path)
    before = path.read_bytes()

    def full_disk(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("whyrec.sid.trie.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        build([[0, 0]], (1, 1)).save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
