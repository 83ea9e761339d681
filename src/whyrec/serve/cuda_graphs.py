"""A whole beam as one CUDA graph: prefill, selections and decodes, launched at once.

On a GPU a beam is a thousand small kernels, and launching them one by one takes longer than they
run. Shapes are fixed for a bucket (users, prompt slots, width, intervals) and the search asks the
device nothing when it is not compact, so that all of it is captured once and replayed: inputs are
copied into static buffers, one launch, results are copied out. Batches are padded up to the next
bucket; a bucket is captured when it is first asked for, or beforehand with `warm_up`.

All graphs share one memory pool, as only one of them runs at a time; the greatest bucket's
activations and keys decide what it takes (for a 135M model, 64 users, 160 slots and width 50: about
1 GB), which lies outside what vLLM profiles: lower `--gpu-memory-utilization` accordingly.

On other devices the same function runs uncaptured, which is how it is tested.

Dimensions: U users, P prompt slots, W beams, X intervals of permitted items.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whyrec.decode.beam import BeamDecoder, Beams
from whyrec.decode.permitted import Permitted, Rule
from whyrec.decode.prefill import Prefilled
from whyrec.decode.tree_attention import KeyValueStore

USERS = (1, 2, 4, 8, 16, 32, 64)
SLOTS_STEP = 32  # prompts are padded up to a multiple
MAX_SLOTS = 1_024  # longer prompts run uncaptured
INTERVALS = (128, 512, 4_096)  # the first holds 50 prepared prefixes less a usual history
ALIGN = 8  # attention kernels want a multiple of so many keys
MAX_GRAPHS = 48


@dataclass(frozen=True)
class Bucket:
    """Fixed shapes: users, prompt slots, beam width, intervals of permitted items."""

    users: int
    slots: int
    width: int
    intervals: int

    def holds(self, other: "Bucket") -> bool:
        """Whether a batch of another bucket may be padded up to this one."""
        return self.width == other.width and all(
            getattr(self, name) >= getattr(other, name) for name in ("users", "slots", "intervals")
        )


@dataclass
class Buffers:
    """Where a graph finds its inputs and leaves its results."""

    ids_UP: Tensor
    lengths_U: Tensor
    permitted: Permitted
    beams: Beams | None = None


def fixed_beam(decoder: BeamDecoder, buffers: Buffers, *, width: int) -> Beams:
    """One beam search with fixed shapes and no question to the host.

    Args:
        decoder: the search.
        buffers: prompts padded on the right, their lengths and what may come.
        width: W.
    """
    num_users, num_slots = buffers.ids_UP.shape
    device, num_levels = buffers.ids_UP.device, decoder.trie.num_levels
    capacity = -(-(num_slots + width * (num_levels - 1)) // ALIGN) * ALIGN
    store = KeyValueStore(buffers.lengths_U, num_slots, capacity=capacity, align=ALIGN)
    positions_UP = torch.arange(num_slots, device=device).repeat(num_users, 1)
    hidden_UPD = decoder.tree.run(buffers.ids_UP, positions_UT=positions_UP, store=store)
    users = torch.arange(num_users, device=device)
    prefilled = Prefilled.of(store, hidden_UPD[users, buffers.lengths_U - 1])
    return decoder.search(prefilled, width=width, permitted=buffers.permitted, compact=False)


class GraphedBeams:
    """Beams of one decoder by bucket.

    Args:
        decoder: of one catalogue: its trie's memory is part of the graphs.
        capture: make CUDA graphs; by default on a CUDA device.
    """

    def __init__(self, decoder: BeamDecoder, *, capture: bool | None = None) -> None:
        self.decoder = decoder
        self._captures = decoder.device.type == "cuda" if capture is None else capture
        self._buffers: dict[Bucket, Buffers] = {}
        self._graphs: dict[Bucket, Callable[[], None]] = {}
        self._pool: Any = None
        self._stream: Any = None

    @torch.inference_mode()
    def __call__(
        self, prompts: Sequence[Sequence[int]], *, width: int, rules: Sequence[Rule]
    ) -> Beams:
        """Beams of a batch; the result is a copy.

        Args:
            prompts: token ids.
            width: W.
            rules: what each user may be given.
        """
        if len(prompts) > USERS[-1]:
            parts = [
                self(prompts[at : at + USERS[-1]], width=width, rules=rules[at : at + USERS[-1]])
                for at in range(0, len(prompts), USERS[-1])
            ]
            return Beams(
                torch.cat([part.items_UW for part in parts]),
                torch.cat([part.scores_UW for part in parts]),
            )
        permitted = self.decoder.permitted_on_host(rules)
        bucket = self._bucket(prompts, width=width, intervals=permitted.most)
        if bucket is None:
            searched = self.decoder.prefill(prompts, width=width)
            permitted = permitted.to(self.decoder.device)
            return self.decoder.search(searched, width=width, permitted=permitted)
        buffers = self._ready(bucket)
        ids_UP = np.zeros((bucket.users, bucket.slots), dtype=np.int64)
        lengths_U = np.ones(bucket.users, dtype=np.int64)
        for user, prompt in enumerate(prompts):
            ids_UP[user, : len(prompt)] = prompt
            lengths_U[user] = len(prompt)
        buffers.ids_UP.copy_(torch.from_numpy(ids_UP))
        buffers.lengths_U.copy_(torch.from_numpy(lengths_U))
        buffers.permitted.copy_(
            permitted.widened(bucket.users, bucket.intervals, num_items=self.decoder.trie.num_items)
        )
        self._graphs[bucket]()
        assert buffers.beams is not None
        found = slice(0, len(prompts))
        return Beams(buffers.beams.items_UW[found].clone(), buffers.beams.scores_UW[found].clone())

    def warm_up(self, users: Sequence[int], *, prompt_tokens: int, width: int) -> None:
        """Capture buckets before they are asked for."""
        for count in users:
            self([[0] * prompt_tokens] * count, width=width, rules=[Rule()] * count)

    def _users(self, count: int) -> int:
        return next(size for size in USERS if size >= count)

    def _bucket(
        self, prompts: Sequence[Sequence[int]], *, width: int, intervals: int
    ) -> Bucket | None:
        """The bucket of a batch; None for what no graph is made for."""
        longest = max(len(prompt) for prompt in prompts)
        slots = -(-longest // SLOTS_STEP) * SLOTS_STEP
        room = next((size for size in INTERVALS if size >= intervals), None)
        if slots > MAX_SLOTS or room is None:
            return None
        bucket = Bucket(self._users(len(prompts)), slots, width, room)
        if bucket in self._graphs or len(self._graphs) < MAX_GRAPHS:
            return bucket
        # No more are made: a greater one that is there costs less than launching kernel by kernel.
        greater = [one for one in self._graphs if one.holds(bucket)]
        return min(greater, key=lambda one: one.users * (one.slots + width), default=None)

    def _ready(self, bucket: Bucket) -> Buffers:
        """The buffers of a bucket, captured if it is new."""
        if bucket in self._buffers:
            return self._buffers[bucket]
        device = self.decoder.device
        permitted = self.decoder.permitted([Rule()] * bucket.users, intervals=bucket.intervals)
        buffers = Buffers(
            torch.zeros(bucket.users, bucket.slots, dtype=torch.long, device=device),
            torch.ones(bucket.users, dtype=torch.long, device=device),
            permitted,
        )

        def run() -> None:
            buffers.beams = fixed_beam(self.decoder, buffers, width=bucket.width)

        self._graphs[bucket] = self._capture(run) if self._captures else run
        self._buffers[bucket] = buffers
        return buffers

    def _capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """A CUDA graph of one run."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()  # one for all: matrix products keep memory for each
        with _communication() as shared:
            # Under tensor parallelism collectives are captured on the stream that they gave.
            stream = self._stream if shared is None else shared.stream
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # kernels are chosen and compiled before the capture
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
            ):
                run()
        return graph.replay


def _communication() -> Any:
    """What lets collectives of tensor parallelism be captured; None on one device."""
    if "vllm" not in sys.modules:  # a Hugging Face model
        return nullcontext(None)
    from vllm.distributed import parallel_state

    if (
        not parallel_state.model_parallel_is_initialized()
        or parallel_state.get_tensor_model_parallel_world_size() == 1
    ):
        return nullcontext(None)
    return parallel_state.graph_capture(device=torch.device("cuda", torch.cuda.current_device()))
