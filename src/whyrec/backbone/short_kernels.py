"""Triton kernels of attention inside short documents (`short_attention.py` says what they compute).

A program holds one tile of B tokens. Documents lie end to end, so the keys that a tile's queries
see run from the start of its first token's document to the tile's end, and the queries that see its
keys from its start to the end of its last token's document: a row's tokens alone say where to
loop. Gradients of queries and of keys and values come from a kernel each, whose programs own their
tiles: nobody else writes there, so there are no atomics, and every run gives the same bits.

Heads are read in halves, as the rotation (Su et al. 2021, arXiv 2104.09864, in the half-split form
of Llama) pairs element e with e + E/2.

Dimensions: T tokens, B tokens of a tile, N = H + 2 J heads (queries, keys, values), E head size.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(heads_ptr, head, tokens_B, T, N: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr):  # fmt: skip  # noqa: E501
    """Elements FIRST … FIRST + WIDTH of one head of a tile; zeros beyond the row."""
    offsets = (tokens_B[:, None] * N + head) * E + FIRST + tl.arange(0, WIDTH)[None, :]
    return tl.load(heads_ptr + offsets, mask=tokens_B[:, None] < T, other=0.0)


@triton.jit
def _load_turned(heads_ptr, cos_ptr, sin_ptr, head, tokens_B, T, N: tl.constexpr, E: tl.constexpr, ROTATED: tl.constexpr):  # fmt: skip  # noqa: E501
    """Both halves of a query or key head, rotated to their positions."""
    HALF: tl.constexpr = E // 2
    low = _load(heads_ptr, head, tokens_B, T, N, 0, HALF, E)
    high = _load(heads_ptr, head, tokens_B, T, N, HALF, HALF, E)
    if ROTATED:  # no early return: the compiler would look at what comes behind it all the same
        cos = _load(cos_ptr, 0, tokens_B, T, 1, 0, HALF, E).to(tl.float32)
        sin = _load(sin_ptr, 0, tokens_B, T, 1, 0, HALF, E).to(tl.float32)
        turned_low = (low * cos - high * sin).to(low.dtype)
        high = (high * cos + low * sin).to(low.dtype)
        low = turned_low
    return low, high


@triton.jit
def _store_turned_back(grads_ptr, cos_ptr, sin_ptr, head, tokens_B, low, high, T, N: tl.constexpr, E: tl.constexpr, ROTATED: tl.constexpr):  # fmt: skip  # noqa: E501
    """Write the gradient of a head from that of its rotated halves: the inverse rotation."""
    HALF: tl.constexpr = E // 2
    if ROTATED:
        cos = _load(cos_ptr, 0, tokens_B, T, 1, 0, HALF, E).to(tl.float32)
        sin = _load(sin_ptr, 0, tokens_B, T, 1, 0, HALF, E).to(tl.float32)
        plain_low = low * cos + high * sin
        high = high * cos - low * sin
        low = plain_low
    offsets = (tokens_B[:, None] * N + head) * E + tl.arange(0, HALF)[None, :]
    kind = grads_ptr.dtype.element_ty
    tl.store(grads_ptr + offsets, low.to(kind), mask=tokens_B[:, None] < T)
    tl.store(grads_ptr + offsets + HALF, high.to(kind), mask=tokens_B[:, None] < T)


@triton.jit
def _dot(a, b, sum=None):
    return tl.dot(a, b, sum, input_precision="ieee")


@triton.jit
def _scores(q_low, q_high, k_low, k_high, queries_B, keys_B, first_B, scale):
    """Base-2 scores [queries, keys]; -inf outside of the query's document and after it."""
    scores = _dot(q_high, tl.trans(k_high), _dot(q_low, tl.trans(k_low))) * (scale * LOG2_E)
    seen = (keys_B[None, :] >= first_B[:, None]) & (keys_B[None, :] <= queries_B[:, None])
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def forward_kernel(
    heads_ptr, cos_ptr, sin_ptr, bounds_ptr, out_ptr, lse_ptr, T, scale,
    H: tl.constexpr, J: tl.constexpr, E: tl.constexpr, B: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: softmax over its keys, kept online (Dao 2023)."""
    N: tl.constexpr = H + 2 * J
    head = tl.program_id(0)
    begin = tl.program_id(1) * B
    key_head = H + head // (H // J)
    value_head = key_head + J
    queries_B = begin + tl.arange(0, B)
    # Rows beyond T see zeros beyond T: finite, and not stored.
    first_B = tl.load(bounds_ptr + queries_B, mask=queries_B < T, other=T)
    q_low, q_high = _load_turned(heads_ptr, cos_ptr, sin_ptr, head, queries_B, T, N, E, ROTATED)
    # The tile itself comes first: there every query sees a key, itself, and the maximum is finite.
    k_low, k_high = _load_turned(heads_ptr, cos_ptr, sin_ptr, key_head, queries_B, T, N, E, ROTATED)
    scores = _scores(q_low, q_high, k_low, k_high, queries_B, queries_B, first_B, scale)
    top_B = tl.max(scores, 1)
    weights = tl.exp2(scores - top_B[:, None])
    total_B = tl.sum(weights, 1)
    value = _load(heads_ptr, value_head, queries_B, T, N, 0, E, E)
    out = _dot(weights.to(value.dtype), value)
    for start in range(tl.load(bounds_ptr + begin) // B * B, begin, B):
        keys_B = start + tl.arange(0, B)
        k_low, k_high = _load_turned(
            heads_ptr, cos_ptr, sin_ptr, key_head, keys_B, T, N, E, ROTATED
        )
        scores = _scores(q_low, q_high, k_low, k_high, queries_B, keys_B, first_B, scale)
        new_top_B = tl.maximum(top_B, tl.max(scores, 1))
        shrink_B = tl.exp2(top_B - new_top_B)
        weights = tl.exp2(scores - new_top_B[:, None])
        total_B = total_B * shrink_B + tl.sum(weights, 1)
        value = _load(heads_ptr, value_head, keys_B, T, N, 0, E, E)
        out = _dot(weights.to(value.dtype), value, out * shrink_B[:, None])
        top_B = new_top_B
    offsets = (queries_B[:, None] * H + head) * E + tl.arange(0, E)[None, :]
    out = (out / total_B[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, out, mask=queries_B[:, None] < T)
    tl.store(lse_ptr + head * T + queries_B, top_B + tl.log2(total_B), mask=queries_B < T)


@triton.jit
def _load_outcome(out_ptr, d_out_ptr, lse_ptr, head, queries_B, T, H: tl.constexpr, E: tl.constexpr):  # fmt: skip  # noqa: E501
    """Gradient of the output, its product with the output, and the log-sum-exp of the scores."""
    d_out = _load(d_out_ptr, head, queries_B, T, H, 0, E, E)
    out = _load(out_ptr, head, queries_B, T, H, 0, E, E)
    delta_B = tl.sum(d_out.to(tl.float32) * out.to(tl.float32), 1)
    return d_out, delta_B, tl.load(lse_ptr + head * T + queries_B, mask=queries_B < T, other=0.0)


@triton.jit
def query_gradient_kernel(
    heads_ptr, cos_ptr, sin_ptr, bounds_ptr, out_ptr, lse_ptr, d_out_ptr, grads_ptr, delta_ptr,
    T, scale,
    H: tl.constexpr, J: tl.constexpr, E: tl.constexpr, B: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries of one head; leaves the products with the output behind."""
    N: tl.constexpr = H + 2 * J
    head = tl.program_id(0)
    begin = tl.program_id(1) * B
    key_head = H + head // (H // J)
    value_head = key_head + J
    own_B = begin + tl.arange(0, B)
    first_B = tl.load(bounds_ptr + own_B, mask=own_B < T, other=T)
    q_low, q_high = _load_turned(heads_ptr, cos_ptr, sin_ptr, head, own_B, T, N, E, ROTATED)
    d_out, delta_B, lse_B = _load_outcome(out_ptr, d_out_ptr, lse_ptr, head, own_B, T, H, E)
    tl.store(delta_ptr + head * T + own_B, delta_B, mask=own_B < T)
    dq_low = tl.zeros((B, E // 2), tl.float32)
    dq_high = tl.zeros((B, E // 2), tl.float32)
    for start in range(tl.load(bounds_ptr + begin) // B * B, begin + B, B):
        keys_B = start + tl.arange(0, B)
        k_low, k_high = _load_turned(
            heads_ptr, cos_ptr, sin_ptr, key_head, keys_B, T, N, E, ROTATED
        )
        value = _load(heads_ptr, value_head, keys_B, T, N, 0, E, E)
        scores = _scores(q_low, q_high, k_low, k_high, own_B, keys_B, first_B, scale)
        weights = tl.exp2(scores - lse_B[:, None])
        d_scores = weights * (_dot(d_out, tl.trans(value)) - delta_B[:, None])
        d_scores = d_scores.to(value.dtype)
        dq_low = _dot(d_scores, k_low, dq_low)
        dq_high = _dot(d_scores, k_high, dq_high)
    _store_turned_back(
        grads_ptr, cos_ptr, sin_ptr, head, own_B, dq_low * scale, dq_high * scale, T, N, E, ROTATED
    )


@triton.jit
def key_gradient_kernel(
    heads_ptr, cos_ptr, sin_ptr, bounds_ptr, out_ptr, lse_ptr, d_out_ptr, grads_ptr, delta_ptr,
    T, scale,
    H: tl.constexpr, J: tl.constexpr, E: tl.constexpr, B: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values of one head."""
    N: tl.constexpr = H + 2 * J
    key_head = H + tl.program_id(0)
    value_head = key_head + J
    begin = tl.program_id(1) * B
    own_B = begin + tl.arange(0, B)
    stop = tl.load(bounds_ptr + T + tl.minimum(begin + B, T) - 1)
    k_low, k_high = _load_turned(heads_ptr, cos_ptr, sin_ptr, key_head, own_B, T, N, E, ROTATED)
    value = _load(heads_ptr, value_head, own_B, T, N, 0, E, E)
    kind = value.dtype
    dk_low = tl.zeros((B, E // 2), tl.float32)
    dk_high = tl.zeros((B, E // 2), tl.float32)
    dv = tl.zeros((B, E), tl.float32)
    for member in range(H // J):
        head = tl.program_id(0) * (H // J) + member
        for start in range(begin, stop, B):
            queries_B = start + tl.arange(0, B)
            inside_B = queries_B < T
            first_B = tl.load(bounds_ptr + queries_B, mask=inside_B, other=T)
            q_low, q_high = _load_turned(
                heads_ptr, cos_ptr, sin_ptr, head, queries_B, T, N, E, ROTATED
            )
            d_out = _load(d_out_ptr, head, queries_B, T, H, 0, E, E)
            lse_B = tl.load(lse_ptr + head * T + queries_B, mask=inside_B, other=0.0)
            delta_B = tl.load(delta_ptr + head * T + queries_B, mask=inside_B, other=0.0)
            # Keys by queries: what comes out of one product goes into the next as it is.
            scores = _dot(k_high, tl.trans(q_high), _dot(k_low, tl.trans(q_low)))
            seen = (own_B[:, None] >= first_B[None, :]) & (own_B[:, None] <= queries_B[None, :])
            weights = tl.exp2(scores * (scale * LOG2_E) - lse_B[None, :])
            weights = tl.where(seen, weights, 0.0)
            d_scores = weights * (_dot(value, tl.trans(d_out)) - delta_B[None, :])
            d_scores = d_scores.to(kind)
            dv = _dot(weights.to(kind), d_out, dv)
            dk_low = _dot(d_scores, q_low, dk_low)
            dk_high = _dot(d_scores, q_high, dk_high)
    _store_turned_back(
        grads_ptr, cos_ptr, sin_ptr, key_head, own_B, dk_low * scale, dk_high * scale,
        T, N, E, ROTATED,
    )  # fmt: skip
    offsets = (own_B[:, None] * N + value_head) * E + tl.arange(0, E)[None, :]
    tl.store(grads_ptr + offsets, dv.to(grads_ptr.dtype.element_ty), mask=own_B[:, None] < T)
