"""RMSNorm and RoPE in one pass: what a query or key goes through between its projection and attention.

    n = x / sqrt(mean(x^2) + eps) * (offset + weight)         over the whole row (OLMo 2) or each head (Qwen 3, Gemma 3)
    (y0, y1) = (n0 * cos - n1 * sin, n1 * cos + n0 * sin)     for each pair of each head, as in rope.py

    fused_rmsnorm_rope:  x (B, S, H * D) -> the same shape
    fused_qk_norm_rope:  packed qkv (B, S, (Hq + 2 * Hk) * D) -> q, k, v: q and k normed by head and rotated, v a view

Cost. Memory-bound: each row is read once and written once, 2 * itemsize bytes an element (backward 3: x and dy in, dx
out), in one launch; the tables' rows are shared by all heads. Two separate kernels move twice as much.
Numerics. float32 from the norm through the rotation, one rounding, at the end. The backward pass recomputes the norm
from x in its single pass; the weights' gradients are sums in float32, one for each program, without atomics.
Sources: Zhang and Sennrich, https://arxiv.org/abs/1910.07467; Su et al., https://arxiv.org/abs/2104.09864; the
attention of Qwen 3, Gemma 3 and OLMo 2 in https://github.com/huggingface/transformers.
"""

import math
import operator
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the twins serve every call
    triton = None

# Triton's interpreter runs the kernels on CPU tensors; Triton reads the variable when it decorates a kernel
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def fused_rmsnorm_rope_torch(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6, num_heads: int | None = None, *,
    offset: float = 0.0, interleaved: bool = False, position_ids: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Twin of fused_rmsnorm_rope."""
    D = _head_dim(x, weight, cos, num_heads)
    wide = torch.promote_types(x.dtype, torch.float32)
    n = x.to(wide) if weight.shape[0] == x.shape[-1] else x.to(wide).unflatten(-1, (x.shape[-1] // D, D))
    n = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + eps) * (offset + weight.to(wide))
    n = n.reshape(*x.shape[:-1], x.shape[-1] // D, D)
    # Of full-width tables, whose halves are equal, the first is read
    cos, sin = ((t.squeeze(2) if t.dim() == 4 else t).narrow(-1, 0, D // 2) for t in (cos, sin))
    if position_ids is None:
        cos, sin = (t.narrow(-2, 0, x.shape[1]) for t in (cos, sin))
    else:  # one more row, of NaN, stands for every position outside the tables
        inside = (position_ids >= 0) & (position_ids < cos.shape[0])
        index = torch.where(inside, position_ids, cos.shape[0]).long()
        cos, sin = (F.embedding(index, F.pad(t, (0, 0, 0, 1), value=math.nan)) for t in (cos, sin))
    cos, sin = (t.unsqueeze(-2).to(wide) for t in (cos, sin))
    n0, n1 = n.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else n.chunk(2, dim=-1)
    y = torch.stack((n0 * cos - n1 * sin, n1 * cos + n0 * sin), dim=-1 if interleaved else -2)
    return y.reshape(x.shape).to(x.dtype).contiguous()


def fused_qk_norm_rope_torch(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, *, num_heads: int, num_kv_heads: int,
    eps: float = 1e-6, offset: float = 0.0, interleaved: bool = False, position_ids: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Twin of fused_qk_norm_rope."""
    D, options = q_weight.shape[0], {"offset": offset, "interleaved": interleaved, "position_ids": position_ids}
    q, k, v = qkv.split((num_heads * D, num_kv_heads * D, num_kv_heads * D), dim=-1)
    q = fused_rmsnorm_rope_torch(q, q_weight, cos, sin, eps, num_heads, **options)
    k = fused_rmsnorm_rope_torch(k, k_weight, cos, sin, eps, num_kv_heads, **options)
    return tuple(t.unflatten(-1, (-1, D)) for t in (q, k, v))


def _count(n, name):
    """n; NumPy's integers as int."""
    if not isinstance(n, (int, torch.SymInt)):
        if not hasattr(n, "__index__"):
            raise TypeError(f"{name} must be an integer, got {n!r}")
        n = operator.index(n)
    if n < 1:
        raise ValueError(f"{name} must be positive, got {n}")
    return n


def _check_tensors(**tensors):
    like, floats = None, (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for name, t in tensors.items():
        if t is None and name == "position_ids":
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.dtype not in floats and name != "position_ids":
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {t.dtype}")
        like = like or (name, t.device)
        if t.device != like[1]:
            raise ValueError(f"{name} must be on {like[0]}'s device {like[1]}, got {t.device}")


def _head_dim(x, weight, cos, num_heads):
    if num_heads:
        return x.shape[-1] // num_heads
    return (0, *cos.shape)[-1] if weight.shape[0] == x.shape[-1] else weight.shape[0]


if triton is not None:

    @triton.jit
    def _load_pairs(rows, mask, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, POLICY: tl.constexpr):
        """Both entries of each pair of the rows (t, h, 1), float32."""
        if INTERLEAVED:  # a row is read as it lies and taken apart in registers: loads stay 16 bytes wide
            cols = tl.arange(0, 2 * HALF)[None, None, :]
            x = tl.load(rows + cols, mask & (cols < D), 0.0, eviction_policy=POLICY).to(tl.float32)
            x0, x1 = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], HALF, 2)))
        else:
            cols = tl.arange(0, HALF)[None, None, :]
            inside = mask & (cols < D // 2)
            x0 = tl.load(rows + cols, inside, 0.0, eviction_policy=POLICY).to(tl.float32)
            x1 = tl.load(rows + D // 2 + cols, inside, 0.0, eviction_policy=POLICY).to(tl.float32)
        return x0, x1

    @triton.jit
    def _store_pairs(rows, y0, y1, mask, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
        if INTERLEAVED:
            cols = tl.arange(0, 2 * HALF)[None, None, :]
            y = tl.reshape(tl.join(y0, y1), (y0.shape[0], y0.shape[1], 2 * HALF))
            tl.store(rows + cols, y, mask & (cols < D))
        else:
            cols = tl.arange(0, HALF)[None, None, :]
            tl.store(rows + cols, y0, mask & (cols < D // 2))
            tl.store(rows + D // 2 + cols, y1, mask & (cols < D // 2))

    @triton.jit
    def _tokens(first, tokens, S, stride_xb, stride_xs, BLOCK_T: tl.constexpr):
        """Of BLOCK_T tokens (t, 1, 1): number, whether it is there and where its row of x starts."""
        token = first + tl.arange(0, BLOCK_T)[:, None, None]
        x_at = (token // S).to(tl.int64) * stride_xb + (token % S).to(tl.int64) * stride_xs
        return token, token < tokens, x_at

    # Not part of _tokens: if a function returns a store's address, torch.compile assumes that all its tensors are
    # written, and copies them
    @triton.jit
    def _load_tables(
        token, mask, cos_ptr, sin_ptr, position_ptr, stride_cb, stride_cs, stride_pb, S, rows,
        D: tl.constexpr, HALF: tl.constexpr
    ):  # fmt: skip
        """cos and sin (t, 1, HALF) of the tokens."""
        b, s = (token // S).to(tl.int64), (token % S).to(tl.int64)
        cols = tl.arange(0, HALF)[None, None, :]
        at, known = b * stride_cb + s * stride_cs, mask
        if position_ptr is not None:
            position = tl.load(position_ptr + b * stride_pb + s, mask, 0).to(tl.int64)
            at, known = position * stride_cs, (position >= 0) & (position < rows)
        cos = tl.load(cos_ptr + at + cols, mask & known & (cols < D // 2), 0.0).to(tl.float32)
        sin = tl.load(sin_ptr + at + cols, mask & known & (cols < D // 2), 0.0).to(tl.float32)
        if position_ptr is not None:
            cos = tl.where(known | (mask == 0), cos, float("nan"))  # a position outside the tables
        return cos, sin

    @triton.jit
    def _load_weights(
        w_ptr, heads, H, offset, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, WHOLE: tl.constexpr
    ):  # fmt: skip
        w_ptr += heads * (D if WHOLE else 0)
        w0, w1 = _load_pairs(w_ptr, heads < H if WHOLE else heads >= 0, D, HALF, INTERLEAVED, "")
        return w0 + tl.cast(offset, tl.float32), w1 + tl.cast(offset, tl.float32)

    @triton.jit
    def _sum(a, WHOLE: tl.constexpr):
        """Over each head (t, h, 1), or over all of a token's (t, 1, 1)."""
        s = tl.sum(a, axis=2, keep_dims=True)
        return tl.sum(s, axis=1, keep_dims=True) if WHOLE else s

    @triton.jit
    def _turn(n0, n1, cos, sin):
        # By fma: which product the compiler fuses may depend on the strides, and so would a row's bits
        return tl.fma(n0, cos, -(n1 * sin)), tl.fma(n1, cos, n0 * sin)

    # k and its weight are None for one tensor alone. Token counts are not specialised: a new one never recompiles
    @triton.jit(do_not_specialize=["tokens", "S", "rows", "stride_pb"])
    def _norm_rope_fwd_kernel(
        x_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, position_ptr,
        stride_xb, stride_xs, stride_cb, stride_cs, stride_pb, tokens, S, rows, eps, offset,
        Hq: tl.constexpr, Hk: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, WHOLE: tl.constexpr,
        INTERLEAVED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr
    ):  # fmt: skip
        """BLOCK_T tokens of BLOCK_H heads each, or of all heads (WHOLE); the blocks of k follow those of q."""
        blocks_q = 1 if WHOLE else tl.cdiv(Hq, BLOCK_H)
        blocks = blocks_q + tl.cdiv(Hk, BLOCK_H)
        block = tl.program_id(0) % blocks
        token, mask, x_at = _tokens(tl.program_id(0) // blocks * BLOCK_T, tokens, S, stride_xb, stride_xs, BLOCK_T)
        cos, sin = _load_tables(
            token, mask, cos_ptr, sin_ptr, position_ptr, stride_cb, stride_cs, stride_pb, S, rows, D, HALF
        )
        for part in tl.static_range(1 if k_ptr is None else 2):  # each compiled for its own number of heads
            first = blocks_q if part == 1 else 0
            if (block >= first) & (block < (blocks if part == 1 else blocks_q)):
                H = Hk if part == 1 else Hq
                x_row = x_ptr + x_at + (Hq * D if part == 1 else 0)
                y_row = (k_ptr if part == 1 else q_ptr) + token.to(tl.int64) * H * D
                w_ptr = k_weight_ptr if part == 1 else q_weight_ptr
                heads = (block - first) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :, None]
                x0, x1 = _load_pairs(x_row + heads * D, mask & (heads < H), D, HALF, INTERLEAVED, "")
                w0, w1 = _load_weights(w_ptr, heads, H, offset, D, HALF, INTERLEAVED, WHOLE)
                squares = tl.fma(x0, x0, x1 * x1)
                # Of a long row (WHOLE) the first heads stay in registers, the others are read again, from L1
                for start in range(BLOCK_H, H if WHOLE else 0, BLOCK_H):
                    at = start + heads
                    a0, a1 = _load_pairs(x_row + at * D, mask & (at < H), D, HALF, INTERLEAVED, "evict_last")
                    squares = tl.fma(a0, a0, tl.fma(a1, a1, squares))
                rstd = tl.rsqrt(_sum(squares, WHOLE) / (H * D if WHOLE else D) + tl.cast(eps, tl.float32))
                y0, y1 = _turn(x0 * rstd * w0, x1 * rstd * w1, cos, sin)
                _store_pairs(y_row + heads * D, y0, y1, mask & (heads < H), D, HALF, INTERLEAVED)
                for start in range(BLOCK_H, H if WHOLE else 0, BLOCK_H):
                    at = start + heads
                    x0, x1 = _load_pairs(x_row + at * D, mask & (at < H), D, HALF, INTERLEAVED, "evict_first")
                    w0, w1 = _load_weights(w_ptr, at, H, offset, D, HALF, INTERLEAVED, WHOLE)
                    y0, y1 = _turn(x0 * rstd * w0, x1 * rstd * w1, cos, sin)
                    _store_pairs(y_row + at * D, y0, y1, mask & (at < H), D, HALF, INTERLEAVED)

    # dx and the partial sums dw (programs_q + programs_k, D or H * D) may be None where nothing asks for them
    @triton.jit(do_not_specialize=["tokens", "S", "rows", "stride_pb", "programs_q", "programs_k"])
    def _norm_rope_bwd_kernel(
        x_ptr, dq_ptr, dk_ptr, dv_ptr, dx_ptr, q_weight_ptr, k_weight_ptr, dw_ptr, cos_ptr, sin_ptr, position_ptr,
        stride_xb, stride_xs, stride_cb, stride_cs, stride_pb, programs_q, programs_k, tokens, S, rows, Hq, Hk, eps,
        offset, D: tl.constexpr, HALF: tl.constexpr, WHOLE: tl.constexpr,
        INTERLEAVED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr
    ):  # fmt: skip
        """The first programs_q programs walk over the tiles of q, programs_k over those of k, the others copy dv."""
        program = tl.program_id(0)
        heads = tl.arange(0, BLOCK_H)[None, :, None]
        width = (Hq + 2 * Hk) * D  # of dx
        if program >= programs_q + programs_k:
            if dv_ptr is not None:
                first, programs = program - programs_q - programs_k, tl.num_programs(0) - programs_q - programs_k
                blocks = tl.cdiv(Hk, BLOCK_H)
                for tile in tl.range(first, tl.cdiv(tokens, BLOCK_T) * blocks, programs, num_stages=STAGES):
                    token = (tile // blocks * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]).to(tl.int64)
                    at = tile % blocks * BLOCK_H + heads
                    mask = (token < tokens) & (at < Hk)
                    v0, v1 = _load_pairs(dv_ptr + (token * Hk + at) * D, mask, D, HALF, INTERLEAVED, "")
                    _store_pairs(dx_ptr + token * width + (Hq + Hk + at) * D, v0, v1, mask, D, HALF, INTERLEAVED)
        else:
            dy_ptr, w_ptr, H, before, first, programs = dq_ptr, q_weight_ptr, Hq, 0, program, programs_q
            if k_weight_ptr is not None:
                of_k = program >= programs_q
                dy_ptr, w_ptr = tl.where(of_k, dk_ptr, dq_ptr), tl.where(of_k, k_weight_ptr, q_weight_ptr)
                H, before = tl.where(of_k, Hk, Hq), tl.where(of_k, Hq * D, 0)
                first, programs = tl.where(of_k, program - programs_q, program), tl.where(of_k, programs_k, programs_q)
            blocks = 1 if WHOLE else tl.cdiv(H, BLOCK_H)
            N = H * D if WHOLE else D
            if dw_ptr is not None:
                dw_ptr += program.to(tl.int64) * N
            dw0 = tl.zeros((BLOCK_T, BLOCK_H, HALF), tl.float32)
            dw1 = tl.zeros((BLOCK_T, BLOCK_H, HALF), tl.float32)
            # Heads of up to 128 share one row of weights: 148 us at 16384 tokens of 32 and 8, with a row each 157. For
            # longer ones a row each is better: 112 us with 8 and 4 heads of 256, sharing one 144 (larger tiles)
            one = tl.arange(0, 1)[None, :, None]
            of = heads if WHOLE or HALF > 64 else one
            w0, w1 = _load_weights(w_ptr, of, H, offset, D, HALF, INTERLEAVED, WHOLE)
            for tile in tl.range(first, tl.cdiv(tokens, BLOCK_T) * blocks, programs, num_stages=STAGES):
                token, mask, x_at = _tokens(tile // blocks * BLOCK_T, tokens, S, stride_xb, stride_xs, BLOCK_T)
                cos, sin = _load_tables(
                    token, mask, cos_ptr, sin_ptr, position_ptr, stride_cb, stride_cs, stride_pb, S, rows, D, HALF
                )
                token = token.to(tl.int64)
                at = (tile % blocks * BLOCK_H + heads) * D
                mask &= tile % blocks * BLOCK_H + heads < H
                x0, x1 = _load_pairs(x_ptr + x_at + before + at, mask, D, HALF, INTERLEAVED, "")
                dy0, dy1 = _load_pairs(dy_ptr + token * H * D + at, mask, D, HALF, INTERLEAVED, "")
                n0, n1 = _turn(dy0, dy1, cos, -sin)  # the gradient of the norm, g that before the weight
                g0, g1 = n0 * w0, n1 * w1
                rstd = tl.rsqrt(_sum(x0 * x0 + x1 * x1, WHOLE) / N + tl.cast(eps, tl.float32))
                rstd = tl.where(mask, rstd, 0.0)  # beyond the heads it would be inf where eps is 0
                mean = _sum(g0 * x0 + g1 * x1, WHOLE) / N * rstd * rstd
                if dx_ptr is not None:
                    dx0, dx1 = rstd * (g0 - x0 * mean), rstd * (g1 - x1 * mean)
                    _store_pairs(dx_ptr + token * width + before + at, dx0, dx1, mask, D, HALF, INTERLEAVED)
                dw0 += n0 * (x0 * rstd)
                dw1 += n1 * (x1 * rstd)
            if dw_ptr is not None:
                dw0, dw1 = tl.sum(dw0, axis=0, keep_dims=True), tl.sum(dw1, axis=0, keep_dims=True)
                if WHOLE:
                    _store_pairs(dw_ptr + heads * D, dw0, dw1, heads < H, D, HALF, INTERLEAVED)
                else:
                    dw0, dw1 = tl.sum(dw0, axis=1, keep_dims=True), tl.sum(dw1, axis=1, keep_dims=True)
                    _store_pairs(dw_ptr + one, dw0, dw1, one == 0, D, HALF, INTERLEAVED)

    @triton.jit(do_not_specialize=["rows"])
    def _sum_kernel(parts_ptr, out_ptr, rows, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        """parts (rows, N) summed over its rows."""
        cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, rows, BLOCK_M):
            at = start + tl.arange(0, BLOCK_M)[:, None]
            sums += tl.load(parts_ptr + at.to(tl.int64) * N + cols, (at < rows) & (cols < N), 0.0)
        tl.store(out_ptr + cols, tl.sum(sums, axis=0, keep_dims=True), cols < N)


_compiled = {}  # compiled kernels, by all that they may depend on


def _enqueue(kernel, programs, tensors, scalars, **options):
    """kernel[(programs,)](*tensors, *scalars, **options), which costs the host 6 us instead of 12 (H200).

    Triton spends the other half on looking the compiled kernel up. Here it is kept under everything that Triton may
    specialise on, and launched as torch.compile's own code does. A scalar that is no constexpr must keep its type.
    """
    if (
        torch.compiler.is_compiling() or _INTERPRET or torch.version.cuda is None  # AMD: the key would need more
        or getattr(hook := triton.knobs.runtime.launch_enter_hook, "calls", hook)  # a profiler listens
    ):  # fmt: skip
        kernel[(programs,)](*tensors, *scalars, **options)
        return
    device = torch._C._cuda_getDevice()
    kinds = [t if t is None else t.dtype if t.data_ptr() % 16 == 0 else (t.dtype,) for t in tensors]
    key = id(kernel), device, scalars, *options.items(), *kinds  # id: the kernel's own hash takes a lock
    kept = _compiled.get(key)
    if kept is None:
        if len(_compiled) >= 1024:  # each new row count is a new key
            _compiled.clear()
        _compiled[key] = kernel[(programs,)](*tensors, *scalars, **options)
    else:
        stream = torch._C._cuda_getCurrentRawStream(device)  # the three None: launch metadata and hooks
        kept.run(programs, 1, 1, stream, kept.function, kept.packed_metadata, None, None, None, *tensors, *scalars)


def _kernel_serves(*tensors) -> bool:
    """True where the kernel can take these tensors: plain ones (no FakeTensor or DTensor) on a GPU, not float64 and,
    under torch.compile, without data-dependent sizes."""
    compiling = torch.compiler.is_compiling()
    if triton is None or (compiling and not (torch.cuda.is_available() or torch.xpu.is_available())):
        return False
    if not compiling and (
        torch.autograd.forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.jit.is_tracing()
    ):  # fmt: skip
        return False  # forward-mode derivatives, torch.func, vmap and torch.jit.trace go through the twins
    for t in tensors:
        if t is not None and (
            type(t) not in (Tensor, nn.Parameter) or t.dtype == torch.float64  # `is` fails in torch 2.8's dynamo
            or not (t.is_cuda or t.is_xpu or (_INTERPRET and t.is_cpu and not compiling))
            or (compiling and torch.fx.experimental.symbolic_shapes.guard_or_true(t.numel() == 0))
        ):  # fmt: skip
            return False
    return True


def _sum_rows(parts, dtype):
    """One small launch: PyTorch's sum and cast take 5.5 us for 132x4096 on an H200, this 3.6."""
    rows, N = parts.shape
    out = parts.new_empty(N, dtype=dtype)
    BLOCK_M = 64 if N <= 8192 else 16  # wide parts are few
    _enqueue(_sum_kernel, -(-N * BLOCK_M // 2048), (parts, out), (rows, N, BLOCK_M, 2048 // BLOCK_M), num_warps=8)
    return out


def _forward_tile(H, D, HALF, whole):
    """BLOCK_T, BLOCK_H, warps: some heads of some tokens, or a token's whole row."""
    if not whole:  # one warp needs no barrier: 68.7 us at 16384 tokens of 32 x 128 (H200), four with 32 heads 70.5
        rows = max(512 // HALF, min(8, 4096 // HALF), 1)
        BLOCK_H = min(1 << (H - 1).bit_length(), rows)
        # one token where heads are long: 8.9 us at 4096 tokens of 4 x 256, with two 10.4
        BLOCK_T = rows // BLOCK_H if HALF <= 64 else 1
        return BLOCK_T, BLOCK_H, min(max(BLOCK_T * BLOCK_H * HALF // 512, 1), 16)
    # Half a row at a time, 2048 columns at most: 69.1 us at 16384 tokens of 32 x 128, interleaved, all of it at once
    # 72.5. Fewer warps where D is no power of 2: 51.7 us at 32 x 80, else 57.0
    BLOCK_H = max(min((1 << H.bit_length()) >> 2, 1024 // HALF), 1)
    return 1, BLOCK_H, min(max(BLOCK_H * HALF // (256 if D == 2 * HALF else 512), 1), 16)


def _backward_tile(H, Hk, HALF, whole):
    """BLOCK_T, BLOCK_H, warps, programs an SM: 106 us at 16384 tokens of 32 x 128 whole, 105 by the head, floor 95."""
    if whole:  # a row in one piece: beyond 16384 columns registers spill, six times slower
        heads = 1 << (H - 1).bit_length()
        num_warps = min(max(heads * HALF // 256, 1), 8 if heads * HALF <= 4096 else 16)
        return 1, heads, num_warps, max(4096 // (heads * HALF), 1)
    # No more heads than k has: 43 us at 16384 tokens of 8 and 1 heads of 128, in fours 73. Long heads in smaller tiles:
    # 138 us with 16 and 2 heads of 256; four times as large, by four warps, 201
    BLOCK_H = min(1 << ((Hk or H) - 1).bit_length(), 8 if HALF <= 64 else 4)
    pairs, num_warps, programs = (2048, 4, 2) if HALF <= 64 else (512, 2, 6)
    return max(pairs // (BLOCK_H * HALF), 1), BLOCK_H, num_warps, programs


def _strides(x, cos, position_ids):
    """stride_xb, stride_xs, stride_cb, stride_cs, stride_pb and the tables' rows; 0 is the stride of what all share."""
    at = 0 if cos.dim() == 2 else 1
    stride_cb = cos.stride(0) if at and cos.shape[0] > 1 else 0
    many = position_ids is not None and position_ids.dim() == 2 and position_ids.shape[0] > 1
    return x.stride(0), x.stride(1), stride_cb, cos.stride(at), position_ids.shape[1] if many else 0, cos.shape[at]


def _laid_out(x, q_weight, k_weight, cos, sin, position_ids):
    """The same values as the kernels read them: columns adjacent, cos and sin alike, the rest dense."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    if cos.stride(-1) != 1 or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    k_weight, position_ids = (t if t is None else t.contiguous() for t in (k_weight, position_ids))
    return x, q_weight.contiguous(), k_weight, cos, sin, position_ids


def _forward(x, q_weight, k_weight, cos, sin, position_ids, Hq, Hk, D, eps, offset, interleaved):
    """The normed and rotated x (B, S, Hq * D), or with k_weight q, k and v of the packed x."""
    B, S, _ = x.shape
    q = x.new_empty(x.shape if k_weight is None else (B, S, Hq, D))
    k = None if k_weight is None else x.new_empty(B, S, Hk, D)
    whole = k is None and q_weight.shape[0] == Hq * D
    HALF = 1 << (D // 2 - 1).bit_length()
    BLOCK_T, BLOCK_H, num_warps = _forward_tile(Hq, D, HALF, whole)
    blocks = 1 if whole else -(-Hq // BLOCK_H) + -(-Hk // BLOCK_H)
    *strides, rows = _strides(x, cos, position_ids)
    scalars = *strides, B * S, S, rows, eps, offset, Hq, Hk, D, HALF, whole, interleaved, BLOCK_T, BLOCK_H
    tensors = x, q, k, q_weight, k_weight, cos, sin, position_ids
    _enqueue(_norm_rope_fwd_kernel, -(-B * S // BLOCK_T) * blocks, tensors, scalars, num_warps=num_warps)
    return q if k is None else (q, k, x[..., (Hq + Hk) * D :].unflatten(-1, (Hk, D)))


class _NormRoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, q_weight, k_weight, cos, sin, position_ids, *options):
        ctx.save_for_backward(x, q_weight, k_weight, cos, sin, position_ids)
        ctx.options = options
        outs = _forward(x, q_weight, k_weight, cos, sin, position_ids, *options)
        if k_weight is not None and not ctx.needs_input_grad[0]:
            needed = *ctx.needs_input_grad[1:3], False
            ctx.mark_non_differentiable(*(out for out, need in zip(outs, needed) if not need))
        return outs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        x, q_weight, k_weight, cos, sin, position_ids = _laid_out(*ctx.saved_tensors)  # a hook may have changed strides
        need_x, need_q, need_k = ctx.needs_input_grad[:3]
        Hq, Hk, D, eps, offset, interleaved = ctx.options
        dq, dk, dv = ([g.contiguous() for g in grads] + [None, None])[:3]
        (B, S, _), N, HALF = x.shape, q_weight.shape[0], 1 << (D // 2 - 1).bit_length()
        dx, whole = x.new_empty(x.shape) if need_x else None, Hk == 0 and N == Hq * D
        BLOCK_T, BLOCK_H, num_warps, per_processor = _backward_tile(Hq, Hk, HALF, whole)
        processors, room = 4, 0
        if x.is_cuda:
            properties = torch.cuda.get_device_properties(x.device)
            processors, room = properties.multi_processor_count, properties.shared_memory_per_block_optin or 65536
        stages = min(3, max((room - 16384) // (4 * BLOCK_T * BLOCK_H * HALF * x.element_size()), 0) + 1)
        # q, k and v get programs by their heads, together no more than run at once: 163 us at 16384 tokens of 32 and 8
        # heads; when those that copy dv had to wait for the others 219
        programs, parts = per_processor * processors, (Hq, Hk, Hk if need_x else 0)
        programs_q, programs_k, programs_v = (
            min(-(-B * S // BLOCK_T) * (1 if whole else -(-H // BLOCK_H)), max(programs * H // sum(parts), min(H, 1)))
            for H in parts
        )  # fmt: skip
        dw = x.new_empty(programs_q + programs_k, N, dtype=torch.float32) if need_q or need_k else None
        *strides, rows = _strides(x, cos, position_ids)
        sizes = programs_q, programs_k, B * S, S, rows, Hq, Hk
        scalars = *strides, *sizes, eps, offset, D, HALF, whole, interleaved, BLOCK_T, BLOCK_H, stages
        tensors = x, dq, dk, dv if need_x else None, dx, q_weight, k_weight, dw, cos, sin, position_ids
        _enqueue(_norm_rope_bwd_kernel, programs_q + programs_k + programs_v, tensors, scalars, num_warps=num_warps)
        dq_weight = _sum_rows(dw[:programs_q], q_weight.dtype) if need_q else None
        dk_weight = _sum_rows(dw[programs_q:], k_weight.dtype) if need_k else None
        return dx, dq_weight, dk_weight, *[None] * (3 + len(ctx.options))


def _dispatch(x, q_weight, k_weight, cos, sin, position_ids, Hq, Hk, D, eps, offset, interleaved):
    """Both functions, k_weight None and Hk 0 for one tensor: the tables' checks, then the kernel where it serves."""
    B, S, shape, dims = *x.shape[:2], tuple(cos.shape), cos.dim()
    if not (dims == 2 or (dims == 3 and (shape[0] == 1 or shape[0] == B)) or (dims == 4 and shape[0] == shape[2] == 1)):
        raise ValueError(f"cos must be (S, W), ({B}, S, W), (1, S, W) or (1, S, 1, W), got shape {shape}")
    if sin.shape != cos.shape:
        raise ValueError(f"sin must have cos's shape {shape}, got {tuple(sin.shape)}")
    widths, rows = (D,) if dims == 4 else (D // 2, D), shape[0 if dims == 2 else 1]
    if not any(shape[-1] == w for w in widths):  # `in` fails on the symbols that torch.compile makes of sizes
        raise ValueError(f"cos must be {' or '.join(map(str, widths))} wide for head_dim {D}, got {shape[-1]}")
    if position_ids is None:
        if rows < S:
            raise ValueError(f"cos must have at least {S} rows, one for each position, got {rows}")
    elif position_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"position_ids must be int32 or int64, got {position_ids.dtype}")
    elif dims != 2:
        raise ValueError(f"position_ids must go with tables of two dimensions, got cos of shape {shape}")
    elif (ids := position_ids.shape)[-1:] != (S,) or len(ids) > 2 or (len(ids) == 2 and ids[0] != 1 and ids[0] != B):
        raise ValueError(f"position_ids must be ({S},) or ({B}, {S}), got shape {tuple(ids)}")
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        # To the dtype that autocast gives F.rms_norm: float32 in newer releases on CUDA
        x = x.to(F.rms_norm(x.new_empty(()).expand(0, 1), (1,)).dtype)
    learned = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
    if learned or not _kernel_serves(x, q_weight, k_weight, cos, sin, position_ids) or not x.numel():
        options = {"offset": offset, "interleaved": interleaved, "position_ids": position_ids}
        if k_weight is None:
            return fused_rmsnorm_rope_torch(x, q_weight, cos, sin, eps, Hq, **options)
        options |= {"eps": eps, "num_heads": Hq, "num_kv_heads": Hk}
        return fused_qk_norm_rope_torch(x, q_weight, k_weight, cos, sin, **options)
    if x.is_cuda and not torch.compiler.is_compiling() and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):  # Triton launches on the current device, not on x's
            return _dispatch(x, q_weight, k_weight, cos, sin, position_ids, Hq, Hk, D, eps, offset, interleaved)
    if k_weight is not None and k_weight.dtype != q_weight.dtype:  # the kernel chooses between two pointers of one type
        q_weight, k_weight = q_weight.float(), k_weight.float()
    args = *_laid_out(x, q_weight, k_weight, cos, sin, position_ids), Hq, Hk, D, float(eps), float(offset), interleaved
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:3]):
        return _NormRoPE.apply(*args)
    return _forward(*args)


def fused_rmsnorm_rope(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6, num_heads: int | None = None, *,
    offset: float = 0.0, interleaved: bool = False, position_ids: Tensor | None = None
) -> Tensor:  # fmt: skip
    """rmsnorm of x, then each head rotated, in one launch; the result has x's shape and dtype. Differentiable in x and
    weight; tables that ask for a gradient get it from the twin.

    Args:
        x: (B, S, H * D), float16, bfloat16 or float32, any strides
        weight: (H * D,): norm over the whole row (OLMo 2); (D,): norm of each head (Qwen 3, Gemma 3); any float dtype
        cos, sin: (S, D/2) or (B, S, D/2); or D wide, the halves repeated (only the first is read), (1, S, 1, D) among
            them; any float dtype; more than S rows serve the positions 0 to S - 1
        num_heads: H. Without it D is the length of a weight shorter than the row, else (one head too) the tables'
            width: half-wide ones need it there
        offset: added to the weight in float32; Gemma's is 1
        interleaved: pairs (2i, 2i + 1) instead of (i, i + D/2)
        position_ids: (S,) or (B, S), int32 or int64: the rows of two-dimensional tables to use, NaN outside them

    Raises: ValueError for shapes and devices that do not fit; TypeError for dtypes.
    """
    _check_tensors(x=x, weight=weight, cos=cos, sin=sin, position_ids=position_ids)
    if x.dim() != 3:
        raise ValueError(f"x must be (B, S, H * D), got shape {tuple(x.shape)}")
    if weight.dim() != 1 or not weight.shape[0]:
        raise ValueError(f"weight must be (H * D,) or (D,), got shape {tuple(weight.shape)}")
    num_heads = num_heads if num_heads is None else _count(num_heads, "num_heads")
    width, D = x.shape[-1], _head_dim(x, weight, cos, num_heads)
    if D < 2 or D % 2 or (num_heads or width // D) * D != width:
        if num_heads is not None:
            raise ValueError(f"num_heads must divide x's width {width} into even head_dims, got {num_heads}")
        name, shape = ("cos", cos.shape) if weight.shape[0] == width else ("weight", weight.shape)
        raise ValueError(f"{name} must have an even width that divides x's {width}, got shape {tuple(shape)}")
    if weight.shape[0] != D and weight.shape[0] != width:
        raise ValueError(f"weight must have shape ({width},) or ({D},), got {tuple(weight.shape)}")
    return _dispatch(x, weight, None, cos, sin, position_ids, width // D, 0, D, eps, offset, interleaved)


def fused_qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, *, num_heads: int, num_kv_heads: int,
    eps: float = 1e-6, offset: float = 0.0, interleaved: bool = False, position_ids: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Packed qkv -> q (B, S, Hq, D), k and v (B, S, Hk, D): each head of q and k normed and rotated, in one launch, v a
    view of qkv. Differentiable in qkv and the weights; tables that ask for a gradient get it from the twin.

    Args:
        qkv: (B, S, (Hq + 2 * Hk) * D), float16, bfloat16 or float32, any strides
        q_weight, k_weight: (D,), any float dtype
        num_heads, num_kv_heads: Hq and Hk
        cos, sin, offset, interleaved, position_ids: as in fused_rmsnorm_rope

    Raises: as fused_rmsnorm_rope.
    """
    _check_tensors(qkv=qkv, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin, position_ids=position_ids)
    if q_weight.dim() != 1 or q_weight.shape[0] < 2 or q_weight.shape[0] % 2:
        raise ValueError(f"q_weight must be (D,) of an even head_dim D, got shape {tuple(q_weight.shape)}")
    if k_weight.shape != q_weight.shape:
        raise ValueError(f"k_weight must have q_weight's shape {tuple(q_weight.shape)}, got {tuple(k_weight.shape)}")
    num_heads, num_kv_heads = _count(num_heads, "num_heads"), _count(num_kv_heads, "num_kv_heads")
    D = q_weight.shape[0]
    width = (num_heads + 2 * num_kv_heads) * D
    if qkv.dim() != 3 or qkv.shape[-1] != width:
        raise ValueError(f"qkv must be (B, S, {width}), got shape {tuple(qkv.shape)}")
    q, k, v = _dispatch(
        qkv, q_weight, k_weight, cos, sin, position_ids, num_heads, num_kv_heads, D, eps, offset, interleaved
    )
    if v.dtype != qkv.dtype or qkv.stride(-1) != 1:  # autocast, or the kernel, has read a copy
        v = qkv[..., -num_kv_heads * D :].unflatten(-1, (num_kv_heads, D))
    return q, k, v


class _Norm(nn.Module):
    """One norm's weight, which starts at 1 - offset."""

    def __init__(self, dim, offset, device, dtype):
        super().__init__()
        self.offset = offset
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1 - self.offset)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, offset={self.offset}"


class FusedRMSNormRoPE(_Norm):
    """fused_rmsnorm_rope with its weight: (hidden_dim,), or with per_head=True (head_dim,)."""

    def __init__(
        self, hidden_dim: int, head_dim: int, eps: float = 1e-6, *, per_head: bool = False, offset: float = 0.0,
        device=None, dtype=None
    ):  # fmt: skip
        hidden_dim, head_dim = _count(hidden_dim, "hidden_dim"), _count(head_dim, "head_dim")
        if head_dim % 2 or hidden_dim % head_dim:
            raise ValueError(f"head_dim must be even and divide hidden_dim {hidden_dim}, got {head_dim}")
        super().__init__(head_dim if per_head else hidden_dim, offset, device, dtype)
        self.hidden_dim, self.head_dim, self.eps, self.per_head = hidden_dim, head_dim, eps, per_head

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None) -> Tensor:
        if isinstance(x, Tensor) and x.shape[-1:] != (self.hidden_dim,):
            raise ValueError(f"x must be (B, S, {self.hidden_dim}), got shape {tuple(x.shape)}")
        options = {"offset": self.offset, "position_ids": position_ids}
        return fused_rmsnorm_rope(x, self.weight, cos, sin, self.eps, self.hidden_dim // self.head_dim, **options)

    def extra_repr(self) -> str:
        options = f"eps={self.eps}, per_head={self.per_head}, offset={self.offset}"
        return f"{self.hidden_dim}, head_dim={self.head_dim}, {options}"


class FusedQKNormRoPE(nn.Module):
    """fused_qk_norm_rope with q_norm.weight and k_norm.weight: those of a Qwen 3 or (offset=1) Gemma 3 attention."""

    def __init__(
        self, head_dim: int, num_heads: int, num_kv_heads: int, eps: float = 1e-6, *, offset: float = 0.0,
        interleaved: bool = False, device=None, dtype=None
    ):  # fmt: skip
        super().__init__()
        self.head_dim = head_dim = _count(head_dim, "head_dim")
        if head_dim % 2:
            raise ValueError(f"head_dim must be a positive even number, got {head_dim}")
        heads = {"num_heads": _count(num_heads, "num_heads"), "num_kv_heads": _count(num_kv_heads, "num_kv_heads")}
        self.options = {**heads, "eps": eps, "offset": offset, "interleaved": interleaved}
        self.q_norm = _Norm(head_dim, offset, device, dtype)
        self.k_norm = _Norm(head_dim, offset, device, dtype)

    def forward(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = self.q_norm.weight, self.k_norm.weight
        return fused_qk_norm_rope(qkv, *weights, cos, sin, position_ids=position_ids, **self.options)

    def extra_repr(self) -> str:
        return ", ".join([f"{self.head_dim}", *(f"{name}={value}" for name, value in self.options.items())])
