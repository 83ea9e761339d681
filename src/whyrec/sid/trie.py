"""A prefix tree over semantic IDs that says, in a batch, which codes may follow a prefix.

Nodes are numbered breadth first: the root is 0, the children of a node are contiguous and sorted by
code, and the leaves come last, in lexicographic order of their codes. Three int32 arrays then hold
the whole tree (compressed sparse rows):

    first_child [num_internal + 1]   children of node n: first_child[n] up to first_child[n + 1]
    code        [num_nodes]          code on the edge into the node (root: 0)
    item        [num_items]          leaf rank (leaf order) -> item index

The first depths of a big catalogue have few nodes with nearly all codes below each, so that a
lookup table of children [nodes, K] is quicker there than the edge list. From the root downwards
depths get one, derived from the arrays above, while the whole stays within 24 bytes an item. Dense
above and sparse below is the layout of STATIC (youtube/static-constraint-decoding).

Every query is a fixed number of gathers of fixed shape: no Python loop over beams, no host
synchronisation, so it runs on any device and inside a captured CUDA graph. -1 stands for "no such
node" and goes through every query as -1. `eval/bench/trie.py` measures all this.

    trie = Trie.build(codes_NL, level_sizes=(256, 256, 256, 256))
    nodes_B = trie.walk(prefix_BD)
    children_BK = trie.children(nodes_B, level=2)      # -1 where a code may not follow
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MAX_LEVEL_SIZE = 65_536
BYTES_PER_ITEM = 24  # what lookup tables may bring the trie to
_TENSORS = ("first_child", "code", "item")


@dataclass(frozen=True, eq=False)
class Trie:
    """The trie of one catalogue; make it with `Trie.build` or `Trie.load`.

    Attributes:
        level_sizes: number of codes of each level (K by level).
        offsets: the first node of each depth 0 .. L, then the number of nodes.
        fan_outs: the most children that any node of each depth 0 .. L-1 has.
        first_child: int32 [num_internal + 1].
        code: int32 [num_nodes].
        item: int32 [num_items].
        tables: for each depth 0 .. L-1 None, or int32 [nodes of that depth + 1, K]: the child by
            code or -1; the last row, all -1, is that of a dead node.
        starts: for each depth 0 .. L-2 None, or int32 [nodes of that depth + 2]: 0, the rank of the
            first leaf under each node, N.
    """

    level_sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    fan_outs: tuple[int, ...]
    first_child: Tensor
    code: Tensor
    item: Tensor
    tables: tuple[Tensor | None, ...]
    starts: tuple[Tensor | None, ...]

    @classmethod
    def build(cls, codes_NL: Tensor, *, level_sizes: Sequence[int]) -> Trie:
        """Build the trie of N items whose SIDs are the rows of `codes_NL` (any integer type).

        Raises:
            ValueError: no items, a shape that is not [N, L], level sizes outside 1 .. 65,536, a
                code outside its level, or two items with the same SID.

        Example:
            >>> trie = Trie.build(torch.tensor([[1, 0], [0, 2]]), level_sizes=(2, 3))
            >>> trie.mask(torch.tensor([0]), level=0).tolist()
            [[True, True]]
            >>> trie.children(trie.walk(torch.tensor([[0]])), level=1).tolist()
            [[-1, -1, 3]]
        """
        level_sizes = tuple(int(size) for size in level_sizes)
        columns = _checked_columns(codes_NL, level_sizes)
        num_items = len(columns[0])
        order_N = np.lexsort(columns[::-1])  # the last key is the primary one
        columns = [column[order_N] for column in columns]

        # starts[d]: the sorted rows at which the prefix of d codes changes, one for each node of
        # depth d. A row that starts a node also starts one at every greater depth.
        changed_N = np.zeros(num_items, dtype=bool)
        changed_N[0] = True
        starts = [np.zeros(1, dtype=np.int32)]
        codes = [np.zeros(1, dtype=np.int32)]
        first_children = []
        offset = 1
        for column in columns:
            changed_N[1:] |= column[1:] != column[:-1]
            start = np.flatnonzero(changed_N).astype(np.int32)
            first_children.append((offset + np.searchsorted(start, starts[-1])).astype(np.int64))
            starts.append(start)
            codes.append(column[start].astype(np.int32))
            offset += len(start)
        if len(starts[-1]) != num_items:
            row = int(np.flatnonzero(~changed_N)[0])
            first, second = sorted((int(order_N[row - 1]), int(order_N[row])))
            sid = [int(column[row]) for column in columns]
            raise ValueError(
                f"items {first} and {second} have the same SID {sid}; give every item its own SID"
            )
        if offset >= 2**31:
            raise ValueError(
                f"the trie would have {offset} nodes; at most {2**31 - 1} are possible"
            )
        return cls._derive(
            level_sizes,
            torch.from_numpy(np.concatenate([*first_children, [offset]]).astype(np.int32)),
            torch.from_numpy(np.concatenate(codes)),
            torch.from_numpy(order_N.astype(np.int32)),
        )

    @classmethod
    def _derive(
        cls, level_sizes: tuple[int, ...], first_child: Tensor, code: Tensor, item: Tensor
    ) -> Trie:
        """Add to the three arrays (on the CPU) what follows from them."""
        offsets = [0, 1]
        for _ in level_sizes:
            offsets.append(int(first_child[offsets[-1]]))
        fan_outs: list[int] = []
        tables: list[Tensor | None] = []
        spare = BYTES_PER_ITEM * len(item) - first_child.nbytes - code.nbytes - item.nbytes
        for depth, size in enumerate(level_sizes):
            start, end, child_end = offsets[depth : depth + 3]
            counts = first_child[start : end + 1].diff()
            fan_outs.append(int(counts.max()))
            table = None
            if (end - start + 1) * size * 4 <= spare:
                table = torch.full((end - start + 1, size), -1, dtype=torch.int32)
                children = torch.arange(end, child_end, dtype=torch.int32)
                row = torch.arange(end - start).repeat_interleave(counts)
                table.view(-1)[row * size + code[end:child_end]] = children
                spare -= table.nbytes
            tables.append(table)
        starts: list[Tensor | None] = []
        ranks = first_child[offsets[-3] : offsets[-2]] - offsets[-2]  # at depth L - 1
        for depth in range(len(level_sizes) - 2, -1, -1):
            first, stop = offsets[depth : depth + 2]
            ranks = ranks[first_child[first:stop].long() - stop]
            bounded = F.pad(F.pad(ranks, (1, 0)), (0, 1), value=len(item))
            starts.insert(0, bounded if bounded.nbytes <= spare else None)
            spare -= bounded.nbytes if bounded.nbytes <= spare else 0
        return cls(
            *(level_sizes, tuple(offsets), tuple(fan_outs), first_child, code, item),
            *(tuple(tables), tuple(starts)),
        )

    @property
    def num_items(self) -> int:
        return self.item.shape[0]

    @property
    def num_levels(self) -> int:
        return len(self.level_sizes)

    @property
    def num_nodes(self) -> int:
        return self.code.shape[0]

    @property
    def num_internal(self) -> int:
        """Number of nodes with children; the leaf of rank r is node num_internal + r."""
        return self.first_child.shape[0] - 1

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays and tables."""
        derived = (*self.tables, *self.starts)
        tables = sum(table.nbytes for table in derived if table is not None)
        return self.first_child.nbytes + self.code.nbytes + self.item.nbytes + tables

    @property
    def device(self) -> torch.device:
        return self.code.device

    def to(self, device: torch.device | str) -> Trie:
        """The same trie with its arrays on `device`."""
        return replace(
            self,
            first_child=self.first_child.to(device),
            code=self.code.to(device),
            item=self.item.to(device),
            tables=tuple(None if table is None else table.to(device) for table in self.tables),
            starts=tuple(None if start is None else start.to(device) for start in self.starts),
        )

    def children(self, nodes: Tensor, *, level: int) -> Tensor:
        """Child of each node by code: nodes [...] of depth `level` -> int32 [..., K].

        -1 where the code may not follow, and everywhere for a dead node.
        """
        assert 0 <= level < self.num_levels, f"no codes follow depth {level}"
        shape = (*nodes.shape, self.level_sizes[level])
        alive = nodes >= 0
        table = self.tables[level]
        # index_select is several times faster on the CPU than indexing with [].
        if table is not None:
            row = torch.where(alive, nodes - self.offsets[level], table.shape[0] - 1)
            return table.index_select(0, row.flatten()).view(shape)
        # The edges of each node lie on a grid as wide as this depth's greatest fan-out. A node with
        # fewer repeats its last one: to scatter it again changes nothing, so padding needs no place
        # of its own. A dead node borrows the edges of its depth's first node, with -1 for children.
        alive = alive.unsqueeze(-1)
        nodes = torch.where(alive, nodes.unsqueeze(-1), self.offsets[level])
        ramp_W = torch.arange(self.fan_outs[level], dtype=torch.int32, device=nodes.device)
        child = torch.minimum(self.first_child[nodes] + ramp_W, self.first_child[nodes + 1] - 1)
        code = self.code.index_select(0, child.flatten()).view(child.shape)
        children = torch.full(shape, -1, dtype=torch.int32, device=nodes.device)
        return children.scatter_(-1, code.long(), torch.where(alive, child, -1))

    def mask(self, nodes: Tensor, *, level: int) -> Tensor:
        """Codes that may follow: nodes [...] of depth `level` -> bool [..., K]."""
        return self.children(nodes, level=level) >= 0

    def step(self, nodes: Tensor, codes: Tensor, *, level: int | None = None) -> Tensor:
        """Follow one code from each node: nodes [...], codes [...] -> int64 nodes [...], or -1.

        The nodes may be of any depth (nothing follows a leaf), the codes any integers. Nodes that
        are all of depth `level`, or dead, are quicker where that is given.
        """
        if level is None:
            return self._step(nodes, codes, max(self.fan_outs))
        table = self.tables[level]
        if table is None:
            return self._step(nodes, codes, self.fan_outs[level])
        dead, size = table.shape[0] - 1, self.level_sizes[level]
        alive = (nodes >= 0) & (codes >= 0) & (codes < size)
        row = torch.where(alive, nodes - self.offsets[level], dead)
        return table[row, codes.clamp(0, size - 1)].long()

    def _step(self, nodes: Tensor, codes: Tensor, fan_out: int) -> Tensor:
        # Binary search for the last sibling whose code is <= the one asked for.
        inside = (nodes >= 0) & (nodes < self.num_internal)
        parent = torch.where(inside, nodes, 0)
        found = self.first_child[parent].long()
        last = self.first_child[parent + 1].long() - 1
        for bit in reversed(range((fan_out - 1).bit_length())):
            ahead = found + (1 << bit)
            take = (ahead <= last) & (self.code[torch.minimum(ahead, last)] <= codes)
            found = torch.where(take, ahead, found)
        return torch.where(inside & (self.code[found] == codes), found, -1)

    def walk(self, codes: Tensor) -> Tensor:
        """Follow prefixes of D codes from the root: codes [..., D] -> int64 nodes [...], or -1."""
        assert codes.shape[-1] <= self.num_levels, f"an SID has only {self.num_levels} codes"
        nodes = torch.zeros(codes.shape[:-1], dtype=torch.long, device=codes.device)
        for level in range(codes.shape[-1]):
            nodes = self.step(nodes, codes[..., level], level=level)
        return nodes

    def fan_out(self, nodes: Tensor) -> Tensor:
        """Number of children of internal nodes [...]: int32 [...]; 0 for a dead node."""
        parent = torch.where(nodes >= 0, nodes, 0)
        counts = self.first_child[parent + 1] - self.first_child[parent]
        return torch.where(nodes >= 0, counts, 0)

    def leaf_range(self, nodes: Tensor, *, level: int) -> tuple[Tensor, Tensor]:
        """Half-open range of leaf ranks under nodes [...] of depth `level`: int32 low, high [...].

        The range of a dead node (-1) is empty: 0, 0.
        """
        assert 0 <= level <= self.num_levels
        flat = nodes.flatten()
        if level == self.num_levels:
            low = (flat - self.num_internal).clamp_(min=0).int()
            high = (flat - (self.num_internal - 1)).clamp_(min=0).int()
        elif level < len(self.starts) and (starts := self.starts[level]) is not None:
            place = (flat - (self.offsets[level] - 1)).clamp_(min=0)  # a dead node's: 0, then 0
            low, high = starts.index_select(0, place), starts[1:].index_select(0, place)
        else:
            # A dead node starts and ends at the root, so at one place before the leaves or at 0.
            low, high = flat.clamp(min=0), flat + 1
            for _ in range(self.num_levels - level):
                low = self.first_child.index_select(0, low)
                high = self.first_child.index_select(0, high)
            low, high = (end.sub_(self.num_internal).clamp_(min=0) for end in (low, high))
        return low.view(nodes.shape), high.view(nodes.shape)

    def leaf_rank(self, nodes: Tensor) -> Tensor:
        """Ranks, in lexicographic order of SIDs, of leaf nodes [...]: int64 [...], -1 stays -1."""
        return torch.where(nodes >= 0, nodes.long() - self.num_internal, -1)

    def leaf_items(self, nodes: Tensor) -> Tensor:
        """Item indices of leaf nodes [...]: int64 [...], -1 stays -1."""
        rank = self.leaf_rank(nodes)
        return torch.where(rank >= 0, self.item[rank.clamp(min=0)].long(), -1)

    def item_ranks(self) -> Tensor:
        """Leaf rank of each item: int32 [num_items], the inverse of `item`."""
        ranks_N = torch.arange(self.num_items, dtype=torch.int32, device=self.device)
        return torch.empty_like(self.item).scatter_(0, self.item.long(), ranks_N)

    def save(self, path: Path) -> None:
        """Write a safetensors file with the level sizes in its metadata, atomically."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        tensors = {name: getattr(self, name).cpu().contiguous() for name in _TENSORS}
        try:
            save_file(tensors, partial, metadata={"level_sizes": json.dumps(self.level_sizes)})
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Trie:
        """Read a file that `save` wrote, onto the CPU.

        Raises:
            ValueError: the file is not a trie or contradicts itself.
            FileNotFoundError: there is no such file.
        """
        refusal = f"{path} is not a trie file; run `whyrec index` to write it again"
        try:
            with safe_open(path, framework="pt") as file:
                level_sizes = json.loads((file.metadata() or {})["level_sizes"])
                first_child, code, item = (file.get_tensor(name) for name in _TENSORS)
            level_sizes = tuple(int(size) for size in level_sizes)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(refusal) from error
        if not _is_trie(level_sizes, first_child.numpy(), code.numpy(), item.numpy()):
            raise ValueError(refusal)
        return cls._derive(level_sizes, first_child, code, item)


def _checked_columns(codes_NL: Tensor, level_sizes: tuple[int, ...]) -> list[np.ndarray]:
    """The L columns as uint16 [N], which NumPy sorts by radix; ValueError for bad input."""
    codes_NL = torch.as_tensor(codes_NL)
    if not level_sizes or not all(1 <= size <= MAX_LEVEL_SIZE for size in level_sizes):
        raise ValueError(f"level sizes must lie in 1 .. {MAX_LEVEL_SIZE}, not {list(level_sizes)}")
    if codes_NL.ndim != 2 or codes_NL.shape[1] != len(level_sizes):
        raise ValueError(
            f"codes must have shape [items, {len(level_sizes)}], not {list(codes_NL.shape)}"
        )
    if codes_NL.is_floating_point() or codes_NL.dtype == torch.bool:
        raise ValueError(f"codes must be integers, not {codes_NL.dtype}")
    if codes_NL.shape[0] == 0:
        raise ValueError("the catalogue is empty; a trie needs at least one item")
    if codes_NL.shape[0] > math.prod(level_sizes):
        raise ValueError(
            f"{codes_NL.shape[0]} items do not fit into {math.prod(level_sizes)} SIDs; "
            "use more levels or larger ones"
        )
    columns = []
    for level, size in enumerate(level_sizes):
        column = codes_NL[:, level].cpu().numpy()
        if column.min() < 0 or column.max() >= size:
            row = int(np.flatnonzero((column < 0) | (column >= size))[0])
            raise ValueError(
                f"item {row} has code {column[row]} at level {level}, outside 0 .. {size - 1}"
            )
        columns.append(column.astype(np.uint16))
    return columns


def _is_trie(
    level_sizes: tuple[int, ...], first_child: np.ndarray, code: np.ndarray, item: np.ndarray
) -> bool:
    """Whether the arrays are what `build` makes for some catalogue of these level sizes."""
    arrays = (first_child, code, item)
    if any(array.dtype != np.int32 or array.ndim != 1 or len(array) == 0 for array in arrays):
        return False
    num_internal = len(first_child) - 1
    if first_child[0] != 1 or first_child[-1] != len(code) or code[0] != 0:
        return False
    if len(code) != num_internal + len(item) or np.any(np.diff(first_child) < 1):
        return False
    start, end = 0, 1
    for size in level_sizes:
        if end > num_internal:  # leaves above the last level
            return False
        start, end = end, int(first_child[end])
        if code[start:end].min() < 0 or code[start:end].max() >= size:
            return False
    sorted_siblings = np.diff(code) > 0
    sorted_siblings[first_child[:-1] - 1] = True  # between one node's children and the next one's
    if start != num_internal or not sorted_siblings.all():
        return False
    if item.min() < 0 or item.max() >= len(item):
        return False
    return bool(np.bincount(item, minlength=len(item)).all())  # every item once
