"""FP8 matrix products: y = (a * a_scale) @ (b * b_scale) + bias, operands in float8_e4m3fn with float32 scales.

Shapes: a (M, K), b (K, N), y (M, N). b is best the transposed view of a weight (N, K), as in nn.Linear: fp8 tensor
cores want both operands with K innermost, and a row-major b is transposed into a temporary first.
Scales, told apart by their shapes (one number each; one a row of a and column of b; one for 128 values k of block g):
    tensor, row  y[m, n] = a_scale[m] * b_scale[n] * sum_k a[m, k] * b[k, n] + bias[n]
    block        y[m, n] = sum_g a_scale[m, g] * b_scale[g, n // 128] * sum_{k in g} a[m, k] * b[k, n] + bias[n]
Few rows are bound by the bytes of b (K*N: half of 16 bits), many by 2*M*N*K operations at twice the rate of 16 bits.
Numerics: Hopper's tensor cores keep some 14 bits when they add fp8 products up. fast_accum=True leaves the whole sum
    over K to them; False, and block scales always, add sums of 128 products (at most) up in float32. Scales and bias in
    float32, one rounding at the end. Quantisers: scale = amax / 448 (2^-126 at least), x * (1 / scale) rounded to
    nearest even.

Sources: https://arxiv.org/abs/2209.05433 (the format), https://arxiv.org/abs/2412.19437 (block scales, promoted sums)
"""

import functools
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton on this platform: the twins serve every call
    triton = None

try:  # Triton's lower level, still experimental: only with the releases it was compiled with
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    if not (3, 6) <= tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 10):
        raise ImportError
    _tma_load = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared  # before Triton 3.9
    _tma_store = getattr(hopper.tma, "async_store", None) or hopper.tma.async_copy_shared_to_global
except ImportError:
    gluon = None

# Triton's interpreter runs the kernels on CPU tensors; Triton reads the variable when it decorates a kernel
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
_TINY = 2.0**-126  # the smallest scale: the reciprocal of a smaller one could be inf


def _spread(scale: Tensor, shape: torch.Size) -> Tensor:
    """Scales of blocks of 128, repeated along the last two dimensions until they broadcast to shape."""
    for d in range(-min(scale.ndim, 2), 0):
        if scale.shape[d] == shape[d]:
            continue
        if torch.compiler.is_compiling():
            # By index: Inductor's CPU code gets column // 128 wrong, and can't broadcast a symbolic size of 1
            at = (torch.arange(shape[d], device=scale.device) >> 7).clamp(max=scale.shape[d] - 1)
            scale = scale.index_select(d, at)
        elif scale.shape[d] != 1:
            scale = scale.repeat_interleave(128, d).narrow(d, 0, shape[d])
    return scale


def quantize_fp8_torch(x: Tensor, granularity: str = "tensor") -> tuple[Tensor, Tensor]:
    """Twin of quantize_fp8."""
    x = x.detach() if x.dtype == torch.float64 else x.detach().float()
    finite = x.isfinite()
    magnitude = torch.where(finite, x.abs(), 0.0)
    if granularity in ("block", "block2d"):
        rows = 128 if granularity == "block2d" else 1
        if x.numel():
            pooled = F.max_pool2d(magnitude.reshape(1, -1, x.shape[-1]), (rows, 128), ceil_mode=True)[0]
        else:
            pooled = x.new_zeros(-(-x.shape[:-1].numel() // rows), -(-x.shape[-1] // 128))
        # as torch._scaled_mm wants them: 1 x 128 blocks with a contiguous column, 128 x 128 with a contiguous row
        amax = pooled if rows == 128 else pooled.t().contiguous().t()
        amax = amax.view(*x.shape[:-1], amax.shape[1]) if x.ndim != 2 else amax
    elif granularity == "row":
        amax = magnitude.amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    else:
        amax = magnitude.amax() if x.numel() else x.new_zeros(())
    scale = amax / torch.full_like(amax, _FP8_MAX)  # by a number, CUDA would multiply with its rounded reciprocal
    scale = torch.where(amax == 0, 1.0, scale.clamp(_TINY, torch.finfo(torch.float32).max)).float()
    q = (x * _spread(scale.reciprocal(), x.shape)).clamp(-_FP8_MAX, _FP8_MAX)  # float64 may exceed any float32 scale
    q = torch.where(finite, q, torch.nan)
    return q.to(_FP8).contiguous(), scale


def fp8_gemm_torch(
    a: Tensor, b: Tensor, a_scale: Tensor | None = None, b_scale: Tensor | None = None,
    output_dtype: torch.dtype = torch.float16, bias: Tensor | None = None, *, fast_accum: bool = True,
) -> Tensor:  # fmt: skip
    """Twin of fp8_gemm."""
    if not a.is_meta and torch.is_autocast_enabled(a.device.type):  # it would take the product to 16 bits
        with torch.autocast(a.device.type, enabled=False):
            return fp8_gemm_torch(a, b, a_scale, b_scale, output_dtype, bias, fast_accum=fast_accum)
    blocks = _has_blocks(a, b, a_scale, b_scale)
    if a_scale is None:
        a, a_scale = quantize_fp8_torch(a, "block" if blocks else "row")
    if b_scale is None:
        b, b_scale = (t.t() for t in quantize_fp8_torch(b.t(), "block2d" if blocks else "row"))
    wide = torch.promote_types(output_dtype, torch.float32)
    if blocks:
        y = dequantize_fp8(a, a_scale, wide) @ dequantize_fp8(b, b_scale, wide)
    else:
        y = (a.to(wide) @ b.to(wide)) * a_scale.to(wide) * b_scale.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(output_dtype)


if triton is not None:
    _ASM = tl.constexpr(not _INTERPRET)

    @triton.jit
    def _finite(x):
        """x in float32, NaN for Inf (Inf * 0 is NaN): maxima pass NaN over, and fp8 keeps it."""
        x = x.to(tl.float32)
        return x * 0.0 + x

    @triton.jit
    def _scale_of(amax):
        return tl.where(amax > 0.0, tl.maximum(tl.div_rn(amax, 448.0), 1.1754943508222875e-38), 1.0)  # 2^-126

    @triton.jit(do_not_specialize=["M"])
    def _quantize_rows_kernel(x_ptr, q_ptr, scale_ptr, stride_xm, M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
        rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + rows[:, None] * stride_xm + cols[None, :]
        q_ptrs = q_ptr + rows[:, None] * K + cols[None, :]
        mask = (rows[:, None] < M) & (cols[None, :] < K)
        x = _finite(tl.load(x_ptrs, mask=mask, other=0.0))
        amax = tl.max(tl.abs(x), 1)
        for k in range(BLOCK_K, K, BLOCK_K):  # rows longer than a block: read twice, the second time from a cache
            mask_k = (rows[:, None] < M) & (cols[None, :] < K - k)
            amax = tl.maximum(amax, tl.max(tl.abs(_finite(tl.load(x_ptrs + k, mask=mask_k, other=0.0))), 1))
        scale = _scale_of(amax)
        inverse = tl.div_rn(1.0, scale)[:, None]
        tl.store(scale_ptr + rows, scale, mask=rows < M)
        tl.store(q_ptrs, (x * inverse).to(tl.float8e4nv), mask=mask)
        for k in range(BLOCK_K, K, BLOCK_K):
            mask_k = (rows[:, None] < M) & (cols[None, :] < K - k)
            x = _finite(tl.load(x_ptrs + k, mask=mask_k, other=0.0))
            tl.store(q_ptrs + k, (x * inverse).to(tl.float8e4nv), mask=mask_k)

    @triton.jit(do_not_specialize=["M"])
    def _quantize_blocks_kernel(
        x_ptr, q_ptr, scale_ptr, stride_xm, stride_sm, stride_sk, M, K, SQUARE: tl.constexpr, BLOCK_M: tl.constexpr
    ):
        """One tile of BLOCK_M x 128: a scale for each of its rows, or one for all (SQUARE, BLOCK_M 128)."""
        blocks = tl.cdiv(K, 128)
        block_m, block_k = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0) % blocks
        rows, cols = block_m * BLOCK_M + tl.arange(0, BLOCK_M), block_k * 128 + tl.arange(0, 128)
        mask = (rows[:, None] < M) & (cols[None, :] < K)
        x = _finite(tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0))
        amax = tl.max(tl.abs(x), 1)
        if SQUARE:
            scale = _scale_of(tl.max(amax, 0))
            tl.store(scale_ptr + block_m * stride_sm + block_k * stride_sk, scale)
            x *= tl.div_rn(1.0, scale)
        else:
            scale = _scale_of(amax)
            tl.store(scale_ptr + rows * stride_sm + block_k * stride_sk, scale, mask=rows < M)
            x *= tl.div_rn(1.0, scale)[:, None]
        tl.store(q_ptr + rows[:, None] * K + cols[None, :], x.to(tl.float8e4nv), mask=mask)

    @triton.jit
    def _amax_kernel(x_ptr, amax_ptr, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        tile = ROWS * BLOCK
        offs = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        amax = tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(tl.program_id(0).to(tl.int64) * tile, numel, tile * tl.num_programs(0)):
            if start + tile <= numel:  # 5 % faster without a mask
                x = tl.load(x_ptr + start + offs)
            else:
                x = tl.load(x_ptr + start + offs, mask=offs < numel - start, other=0.0)
            amax = tl.maximum(amax, tl.max(tl.abs(_finite(x)), 0))  # over ROWS: within a thread
        tl.store(amax_ptr + tl.program_id(0), tl.max(amax, 0))

    @triton.jit
    def _quantize_tensor_kernel(x_ptr, q_ptr, amax_ptr, scale_ptr, numel, PARTS: tl.constexpr, BLOCK: tl.constexpr):
        # from the end: what _amax_kernel read last is in L2 still
        offs = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = _finite(tl.load(x_ptr + offs, mask=offs < numel, other=0.0))
        scale = _scale_of(tl.max(tl.load(amax_ptr + tl.arange(0, PARTS)), 0))
        tl.store(scale_ptr, scale, mask=tl.program_id(0) == 0)
        tl.store(q_ptr + offs, (x * tl.div_rn(1.0, scale)).to(tl.float8e4nv), mask=offs < numel)

    @triton.jit
    def _widen(q):
        """fp8 to float16 by bits, exact: sign and exponent shifted into place, and 2^8 for the biases' difference."""
        q = q.to(tl.int16)
        bits = tl.where((q & 0x7F) == 0x7F, 0x7E00, ((q & 0x80) << 8) | ((q & 0x7F) << 7))
        return bits.to(tl.int16).to(tl.float16, bitcast=True) * 256.0

    @triton.jit
    def _gemv_kernel(
        a_ptr, w_ptr, a_scale_ptr, w_scale_ptr, bias_ptr, y_ptr, N, K, stride_wn, stride_ask, stride_wsn, stride_wsk,
        BLOCKS: tl.constexpr, ROW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """One row of a, multiplied and summed in float32, no tensor cores. BLOCK_N divides 128, and 128 BLOCK_K.

        ROW > 0: a is float, ROW its length rounded up to a power of 2, and each program quantises it for itself.
        """
        QUANTIZE: tl.constexpr = ROW > 0
        n = tl.program_id(0) * BLOCK_N
        offs_n, offs_k = n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        w_ptrs = w_ptr + (offs_n % N).to(tl.int64)[:, None] * stride_wn + offs_k[None, :]
        if QUANTIZE and not BLOCKS:
            row = tl.arange(0, ROW)
            a_scale = _scale_of(tl.max(tl.abs(_finite(tl.load(a_ptr + row, mask=row < K, other=0.0))), 0))
        elif not BLOCKS:
            a_scale = tl.load(a_scale_ptr)
        acc = tl.zeros((BLOCK_N, BLOCK_K // 16), tl.float32)
        for k in range(0, K, BLOCK_K):
            w = tl.load(w_ptrs + k, mask=offs_k[None, :] < K - k, other=0.0, eviction_policy="evict_first")
            a = tl.load(a_ptr + k + offs_k, mask=offs_k < K - k, other=0.0)
            if w_ptr.dtype.element_ty == tl.uint8:
                w, a = _widen(w), _widen(a)
            if QUANTIZE:
                a = _finite(a)
            if BLOCKS:
                a = tl.reshape(a, (BLOCK_K // 128, 128))
                block = k // 128 + tl.arange(0, BLOCK_K // 128)
                if QUANTIZE:
                    scale = _scale_of(tl.max(tl.abs(a), 1))
                    a = (a * tl.div_rn(1.0, scale)[:, None]).to(tl.float8e4nv)
                else:
                    scale = tl.load(a_scale_ptr + block * stride_ask, mask=block * 128 < K, other=0.0)
                w_scale_ptrs = w_scale_ptr + n // 128 * stride_wsn + block * stride_wsk
                scale *= tl.load(w_scale_ptrs, mask=block * 128 < K, other=0.0)
                a = tl.reshape(a.to(tl.float32) * scale[:, None], (BLOCK_K,))
            elif QUANTIZE:
                a = (a * tl.div_rn(1.0, a_scale)).to(tl.float8e4nv)
            # each thread's 16 values at once: half the registers. 18.8 us at 4096 x 14336 (H200); kept apart, 20.1
            products = w.to(tl.float32) * a.to(tl.float32)[None, :]
            acc += tl.sum(tl.reshape(products, (BLOCK_N, BLOCK_K // 16, 16)), 2)
        y = tl.sum(acc, 1)
        if not BLOCKS:
            y *= a_scale * tl.load(w_scale_ptr + offs_n * stride_wsn, mask=offs_n < N, other=0.0)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
        tl.store(y_ptr + offs_n, y.to(y_ptr.dtype.element_ty), mask=offs_n < N)

    @triton.jit(do_not_specialize=["M"])
    def _gemm_kernel(
        a_ptr, w_ptr, a_scale_ptr, w_scale_ptr, bias_ptr, y_ptr, M, N, K, stride_am, stride_wn,
        stride_asm, stride_ask, stride_wsn, stride_wsk,
        BLOCKS: tl.constexpr, PROMOTE: tl.constexpr, IEEE: tl.constexpr, EVEN_K: tl.constexpr, SPLIT: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """One tile of y, held transposed: the weight's rows fill the 64 that a tensor core takes, however few a has.

        With SPLIT > 1 that many programs share a tile, each with every SPLITth step of K, and y is (SPLIT, M, N).
        """
        tiles_m = tl.cdiv(M, BLOCK_M)
        part, tile = tl.program_id(0) % SPLIT, tl.program_id(0) // SPLIT
        m, n = tile % tiles_m * BLOCK_M, tile // tiles_m * BLOCK_N
        offs_m, offs_n, offs_k = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        # rows past the end wrap around: whole vectors are loaded without a mask and dropped at the store
        w_ptrs = w_ptr + (offs_n % N).to(tl.int64)[:, None] * stride_wn + offs_k[None, :]
        a_ptrs = a_ptr + (offs_m % M).to(tl.int64)[None, :] * stride_am + offs_k[:, None]
        a_scale_ptrs = a_scale_ptr + (offs_m % M).to(tl.int64) * stride_asm
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        # num_stages at the loop has the scales fetched as far ahead as a and w: M = 8 at 14336 x 4096 29 us, else 57
        for k in tl.range(part * BLOCK_K, K, SPLIT * BLOCK_K, num_stages=STAGES):
            if BLOCKS:  # BLOCK_N divides 128: one scale of w serves the tile
                scale = tl.load(a_scale_ptrs + k // 128 * stride_ask)
                scale *= tl.load(w_scale_ptr + n // 128 * stride_wsn + k // 128 * stride_wsk)
            if EVEN_K:
                w, a = tl.load(w_ptrs + k), tl.load(a_ptrs + k)
            else:
                w = tl.load(w_ptrs + k, mask=offs_k[None, :] < K - k, other=0.0)
                a = tl.load(a_ptrs + k, mask=offs_k[:, None] < K - k, other=0.0)
            if w_ptr.dtype.element_ty == tl.uint8:  # no fp8 tensor cores
                w, a = _widen(w), _widen(a)
            if IEEE:  # nor 16-bit ones that Triton serves (sm_75)
                acc_k = tl.dot(w.to(tl.float32), a.to(tl.float32), input_precision="ieee")
            elif PROMOTE:
                acc_k = tl.dot(w, a)
            else:
                acc = tl.dot(w, a, acc)
            if BLOCKS:
                acc += acc_k * scale[None, :]
            elif PROMOTE or IEEE:
                acc += acc_k
        if not BLOCKS:
            acc = acc * tl.load(a_scale_ptrs)[None, :] * tl.load(w_scale_ptr + offs_n % N * stride_wsn)[:, None]
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + offs_n, mask=offs_n < N).to(tl.float32)[:, None]
        y_ptrs = y_ptr + (part.to(tl.int64) * M + offs_m)[None, :] * N + offs_n[:, None]
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(offs_m[None, :] < M) & (offs_n[:, None] < N))

    @triton.jit(do_not_specialize=["M"])
    def _add_parts_kernel(parts_ptr, bias_ptr, y_ptr, M, N, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr):
        """parts (SPLIT, M, N) summed, and the bias."""
        tiles_n = tl.cdiv(N, BLOCK_N)
        row = tl.program_id(0).to(tl.int64) // tiles_n
        cols = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_N,), tl.float32)
        for part in tl.static_range(SPLIT):
            acc += tl.load(parts_ptr + (part * M + row) * N + cols, mask=cols < N)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + cols, mask=cols < N).to(tl.float32)
        tl.store(y_ptr + row * N + cols, acc.to(y_ptr.dtype.element_ty), mask=cols < N)

    @triton.jit
    def _add_scaled(acc, x, scale):
        if _ASM:  # asm stays in its place: after the start of the next product registers would run out
            args = [x, tl.broadcast_to(scale[:, None], x.shape), acc]
            # pure: else torch.compile assumes that it writes every tensor; the machine code is the same
            return tl.inline_asm_elementwise(
                "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", args, dtype=tl.float32, is_pure=True, pack=1
            )
        return acc + x * scale[:, None]

    @triton.jit(do_not_specialize=["M"])
    def _gemm_tma_kernel(
        a_desc, w_desc, y_desc, a_scale_ptr, w_scale_ptr, bias_ptr, M, N, K,
        stride_asm, stride_ask, stride_wsn, stride_wsk, BLOCKS: tl.constexpr, PROMOTE: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """Aligned operands: each program walks over its share of the tiles of y.

        Promoting needs a second set of sums. The tile goes in two halves of rows then, so that the set is only half a
        tile: 128 + 64 registers a thread, and one half is added up while the tensor cores are at the other.
        """
        GROUP_M: tl.constexpr = 16  # tiles go down 16 rows of tiles before the next column: a and w are re-read from L2
        ROWS: tl.constexpr = BLOCK_M // 2 if PROMOTE else BLOCK_M
        tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=not BLOCKS):
            first_m = tile // (GROUP_M * tiles_n) * GROUP_M
            group_m = min(tiles_m - first_m, GROUP_M)
            m = (first_m + tile % (GROUP_M * tiles_n) % group_m) * BLOCK_M
            # TMA is slow on rows past the end: the last tile moves up and computes some of its neighbour's rows again
            m = tl.maximum(tl.minimum(m, M - BLOCK_M), 0)
            n = tile % (GROUP_M * tiles_n) // group_m * BLOCK_N
            acc = tl.zeros((ROWS, BLOCK_N), tl.float32)
            low = tl.zeros((ROWS, BLOCK_N), tl.float32)
            if BLOCKS:  # BLOCK_N divides 128: one scale of w serves the tile
                offs = tl.minimum(m + tl.arange(0, ROWS), M - 1) * stride_asm
                offs_low = tl.minimum(m + ROWS + tl.arange(0, ROWS), M - 1) * stride_asm
                w_scale_ptrs = w_scale_ptr + n // 128 * stride_wsn
                scale, scale_low = tl.load(a_scale_ptr + offs), tl.load(a_scale_ptr + offs_low)
                w_scale = tl.load(w_scale_ptrs)
            for k in range(0, K, BLOCK_K):
                if BLOCKS:  # the next step's, which so have a whole step to arrive
                    block = min(k // 128 + 1, (K - 1) // 128)
                    next_w = tl.load(w_scale_ptrs + block * stride_wsk)
                    next_scale = tl.load(a_scale_ptr + block * stride_ask + offs)
                    next_low = tl.load(a_scale_ptr + block * stride_ask + offs_low)
                a = a_desc.load([m, k])  # loads in a row share one barrier: 1 to 3 %
                if PROMOTE and not BLOCKS:
                    a_low = a_desc.load([m + ROWS, k])
                w = w_desc.load([n, k]).T
                if BLOCKS:
                    acc = _add_scaled(acc, tl.dot(a, w), scale * w_scale)
                    # awaited only here, it keeps the next product behind the sum. 4096 x 14336, M = 2048, us (H200):
                    # 211; as multiply and add after a common wait 261, as a multiply-add 393 (spills)
                    a_low = a_desc.load([m + ROWS, k])
                    low = _add_scaled(low, tl.dot(a_low, w), scale_low * w_scale)
                    scale, scale_low, w_scale = next_scale, next_low, next_w
                elif PROMOTE:
                    acc += tl.dot(a, w)
                    low += tl.dot(a_low, w)
                else:
                    acc = tl.dot(a, w, acc)
            for half in tl.static_range(2 if PROMOTE else 1):
                y = low if half else acc
                offs_m, offs_n = m + half * ROWS + tl.arange(0, ROWS), n + tl.arange(0, BLOCK_N)
                if not BLOCKS:
                    a_scale = tl.load(a_scale_ptr + offs_m * stride_asm, mask=offs_m < M)
                    y = y * a_scale[:, None] * tl.load(w_scale_ptr + offs_n * stride_wsn, mask=offs_n < N)[None, :]
                if bias_ptr is not None:
                    y += tl.load(bias_ptr + offs_n, mask=offs_n < N).to(tl.float32)[None, :]
                # stored by halves of the columns: half the shared memory, which goes to one more stage of loads
                left, right = tl.split(tl.permute(tl.reshape(y, (ROWS, 2, BLOCK_N // 2)), (0, 2, 1)))
                y_desc.store([m + half * ROWS, n], left.to(y_desc.dtype))
                y_desc.store([m + half * ROWS, n + BLOCK_N // 2], right.to(y_desc.dtype))


if gluon is not None:

    @gluon.jit
    def _place(tile, tiles_m, tiles_n):
        """The row and the column of a tile."""
        GROUP_M: gl.constexpr = 16  # as in _gemm_tma_kernel
        first_m = tile // (GROUP_M * tiles_n) * GROUP_M
        group_m = gl.minimum(tiles_m - first_m, GROUP_M)
        tile %= GROUP_M * tiles_n
        return first_m + tile % group_m, tile // group_m

    @gluon.jit
    def _row(m, group, GROUPS: gl.constexpr, M):
        """A group's first; past the end moved up, as in _gemm_tma_kernel. TMA reads scales from multiples of 4 on."""
        return gl.maximum(gl.minimum((m * GROUPS + group) * 64, gl.cdiv(M, 4) * 4 - 64), 0)

    @gluon.jit
    def _load_tiles(a_desc, w_desc, scale_desc, buffers, sizes, BLOCKS: gl.constexpr):
        tiles_m, tiles_n, M, N, K = sizes
        a_bufs, w_bufs, scale_bufs, y_bufs, full, empty = buffers
        STAGES: gl.constexpr = w_bufs.shape[0]
        GROUPS: gl.constexpr = a_bufs.shape[0] // STAGES
        step = 0
        for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
            m, n = _place(tile, tiles_m, tiles_n)
            for k in range(0, K, 128):
                stage = step % STAGES
                ready = full.index(stage)
                hopper.mbarrier.wait(empty.index(stage), step // STAGES & 1 ^ 1)
                hopper.mbarrier.expect(ready, (64 * GROUPS + 128) * 128 + (256 * GROUPS if BLOCKS else 0))
                for group in gl.static_range(GROUPS):
                    row = _row(m, group, GROUPS, M)
                    _tma_load(a_desc, [row, k], ready, a_bufs.index(stage * GROUPS + group))
                    if BLOCKS:
                        _tma_load(scale_desc, [k // 128, row], ready, scale_bufs.index(stage * GROUPS + group))
                _tma_load(w_desc, [n * 128, k], ready, w_bufs.index(stage))
                step += 1

    @gluon.jit
    def _multiply_tiles(group, tensors, strides, buffers, sizes, BLOCKS: gl.constexpr, HAS_BIAS: gl.constexpr):
        y_desc, a_scale, w_scale_ptr, bias_ptr = tensors
        tiles_m, tiles_n, M, N, K = sizes
        a_bufs, w_bufs, scale_bufs, y_bufs, full, empty = buffers
        STAGES: gl.constexpr = w_bufs.shape[0]
        GROUPS: gl.constexpr = a_bufs.shape[0] // STAGES
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
        y_buf, step = y_bufs.index(group), 0
        zeros = gl.zeros([64, 128], gl.float32, layout)
        for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
            m, n = _place(tile, tiles_m, tiles_n)
            acc = gl.zeros([64, 128], gl.float32, layout)
            for k in range(0, K, 128):
                stage = step % STAGES
                hopper.mbarrier.wait(full.index(stage), step // STAGES & 1)
                a, w = a_bufs.index(stage * GROUPS + group), w_bufs.index(stage).permute((1, 0))
                low = hopper.warpgroup_mma(a, w, zeros, use_acc=False, is_async=True)
                if BLOCKS:
                    scale = gl.load(w_scale_ptr + n * strides[1] + k // 128 * strides[2])
                    scale = scale_bufs.index(stage * GROUPS + group).permute((1, 0)).load(layout) * scale
                low = hopper.warpgroup_mma_wait(0, deps=(low,))
                hopper.mbarrier.arrive(empty.index(stage), count=1)
                acc += low * scale if BLOCKS else low
                step += 1
            row, col = _row(m, group, GROUPS, M), n * 128
            offs_m = row + gl.arange(0, 64, gl.SliceLayout(1, layout))
            offs_n = col + gl.arange(0, 128, gl.SliceLayout(0, layout))
            if not BLOCKS:
                acc *= gl.expand_dims(gl.load(a_scale + offs_m * strides[0], mask=offs_m < M, other=0.0), 1)
                acc *= gl.expand_dims(gl.load(w_scale_ptr + offs_n * strides[1], mask=offs_n < N, other=0.0), 0)
            if HAS_BIAS:
                acc += gl.expand_dims(gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(gl.float32), 0)
            halves = gl.split(gl.permute(gl.reshape(acc, [64, 2, 64]), (0, 2, 1)))
            for half in gl.static_range(2):
                hopper.tma.store_wait(0)
                y_buf.store(halves[half].to(y_desc.dtype))
                hopper.fence_async_shared()
                _tma_store(y_desc, [row, col + half * 64], y_buf)
        hopper.tma.store_wait(0)

    @gluon.jit(do_not_specialize=["M"])
    def _gemm_groups_kernel(
        a_desc, w_desc, y_desc, a_scale, w_scale_ptr, bias_ptr, M, N, K, stride_asm, stride_wsn, stride_wsk,
        BLOCKS: gl.constexpr, HAS_BIAS: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        """_gemm_tma_kernel's promoted products, bit for bit, with its warps apart: one warp loads, and groups of four
        multiply 64 rows of a each: while one adds its sums up in float32, the tensor cores serve the others.

        a_scale: a pointer, or a descriptor of blocks' scales (ceil(K/128), M), which come with the operands."""
        a_bufs = gl.allocate_shared_memory(a_desc.dtype, [STAGES * GROUPS, 64, 128], a_desc.layout)
        w_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES, 128, 128], w_desc.layout)
        y_bufs = gl.allocate_shared_memory(y_desc.dtype, [GROUPS, 64, 64], y_desc.layout)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
        scale_bufs = full  # without BLOCKS a stand-in that nothing reads
        if BLOCKS:
            scale_bufs = gl.allocate_shared_memory(gl.float32, [STAGES * GROUPS, 1, 64], a_scale.layout)
        for stage in gl.static_range(STAGES):
            hopper.mbarrier.init(full.index(stage), count=1)
            hopper.mbarrier.init(empty.index(stage), count=GROUPS)
        hopper.fence_async_shared()
        buffers = a_bufs, w_bufs, scale_bufs, y_bufs, full, empty
        sizes = gl.cdiv(M, 64 * GROUPS), gl.cdiv(N, 128), M, N, K
        tensors, strides = (y_desc, a_scale, w_scale_ptr, bias_ptr), (stride_asm, stride_wsn, stride_wsk)
        if GROUPS == 2:
            gl.warp_specialize([
                (_multiply_tiles, (0, tensors, strides, buffers, sizes, BLOCKS, HAS_BIAS)),
                (_multiply_tiles, (1, tensors, strides, buffers, sizes, BLOCKS, HAS_BIAS)),
                (_load_tiles, (a_desc, w_desc, a_scale, buffers, sizes, BLOCKS)),
            ], [4, 1], [232, 40])  # fmt: skip
        else:
            gl.warp_specialize([
                (_multiply_tiles, (0, tensors, strides, buffers, sizes, BLOCKS, HAS_BIAS)),
                (_multiply_tiles, (1, tensors, strides, buffers, sizes, BLOCKS, HAS_BIAS)),
                (_multiply_tiles, (2, tensors, strides, buffers, sizes, BLOCKS, HAS_BIAS)),
                (_load_tiles, (a_desc, w_desc, a_scale, buffers, sizes, BLOCKS)),
            ], [4, 4, 1], [160, 160, 32])  # fmt: skip


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
    kinds = [
        t if t is None else (t.base.dtype, *t.block_shape) if type(t).__name__ == "TensorDescriptor" else
        t.dtype if t.data_ptr() % 16 == 0 else (t.dtype,) for t in tensors
    ]  # fmt: skip
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


def _properties(index: int) -> tuple[tuple[int, int], int]:
    return torch.cuda.get_device_capability(index), torch.cuda.get_device_properties(index).multi_processor_count


_properties_cached = functools.cache(_properties)


def _gpu(t: Tensor) -> tuple[tuple[int, int], int]:
    """Compute capability and number of SMs; (0, 0) where Triton has no e4m3 tensor cores (interpreter, AMD)."""
    if not t.is_cuda or torch.version.hip is not None:
        return (0, 0), 0
    return (_properties if torch.compiler.is_compiling() else _properties_cached)(t.get_device())


def _check_float(name, t):
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if not t.is_floating_point() or t.element_size() == 1:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {t.dtype}")


def quantize_fp8(x: Tensor, granularity: str = "tensor") -> tuple[Tensor, Tensor]:
    """x * (1 / scale) in float8_e4m3fn, so that x is nearly fp8 * scale.

    scale = amax / 448 in float32, 2^-126 at least (1 for an all-zero slice).

    Args:
        x: (..., K), fp32/fp16/bf16. granularity: one scale for "tensor"; each "row" of K; each "block" of 128 values of
            a row; each "block2d" of 128 x 128 (x two-dimensional).
    Returns:
        fp8 of x's shape, and the scale: (); (..., 1); (..., ceil(K/128)), its rows innermost in memory, as
        torch._scaled_mm has them; (ceil(M/128), ceil(K/128)). No gradient. amax is over finite values; NaN and Inf
        (which the format lacks) become NaN, alone. Raises: ValueError, TypeError.
    """
    _check_float("x", x)
    if granularity not in ("tensor", "row", "block", "block2d"):
        raise ValueError(f'granularity must be "tensor", "row", "block" or "block2d", got {granularity!r}')
    if x.ndim == 0 and granularity != "tensor" or x.ndim != 2 and granularity == "block2d":
        shape = "(M, K)" if granularity == "block2d" else "(..., K)"
        raise ValueError(f"x must have shape {shape}, got {tuple(x.shape)}")
    # the interpreter rounds to fp8 wrongly; below compute capability 8.9 there is no e4m3 to store
    if not _kernel_serves(x) or not x.numel() or _INTERPRET or _gpu(x)[0] < (8, 9):
        return quantize_fp8_torch(x, granularity)
    if x.is_cuda and not torch.compiler.is_compiling() and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):  # Triton launches on the current device, not on x's
            return quantize_fp8(x, granularity)
    return _quantize_fp8_triton(x.detach() if x.requires_grad else x, granularity)


def _quantize_fp8_triton(x: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    K = x.shape[-1] if x.ndim else 1
    rows = x if x.ndim == 2 else x.reshape(-1, K)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    M, blocks, numel = rows.shape[0], -(-K // 128), x.numel()
    q = torch.empty(x.shape, dtype=_FP8, device=x.device)
    if granularity == "tensor":
        scale = torch.empty((), dtype=torch.float32, device=x.device)
        # bit_length would make a constant of numel, so that torch.compile compiles anew for each
        parts = 1024 if torch.compiler.is_compiling() else min(1 << (-(-numel // 8192) - 1).bit_length(), 1024)
        amax = torch.empty(parts, dtype=torch.float32, device=x.device)
        rows = rows.contiguous()
        _enqueue(_amax_kernel, parts, (rows, amax), (numel, 8, 1024), num_warps=4)
        _enqueue(_quantize_tensor_kernel, -(-numel // 4096), (rows, q, amax, scale), (numel, parts, 4096), num_warps=4)
    elif granularity == "row":
        scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
        # us at 8192 x 4096: 26.4, the copy rate allows 23.6; at 8192 x 14336 90, in shorter steps 104 and more (H200)
        block_k = min(1 << (K - 1).bit_length(), 16384)
        block_m = max(1, 2048 // block_k)
        scalars = rows.stride(0), M, K, block_m, block_k
        warps = block_k * block_m // 1024
        _enqueue(_quantize_rows_kernel, -(-M // block_m), (rows, q, scale), scalars, num_warps=warps)
    else:
        square = granularity == "block2d"
        block_m = 128 if square else 32
        shape = (-(-M // 128), blocks) if square else (blocks, M)
        scale = torch.empty(shape, dtype=torch.float32, device=x.device)
        scale = scale if square else scale.t()
        scalars = rows.stride(0), *scale.stride(), M, K, square, block_m
        _enqueue(_quantize_blocks_kernel, -(-M // block_m) * blocks, (rows, q, scale), scalars, num_warps=4)
        scale = scale if x.ndim == 2 else scale.view(*x.shape[:-1], blocks)
    return q, scale


def dequantize_fp8(x_fp8: Tensor, scale: Tensor, dtype: torch.dtype = torch.float16) -> Tensor:
    """x_fp8 * scale in float32, rounded to dtype once. A dimension of scale is 1, x_fp8's, or a 128th of that."""
    if getattr(x_fp8, "dtype", None) != _FP8:
        raise TypeError(f"x_fp8 must be a float8_e4m3fn tensor, got {getattr(x_fp8, 'dtype', type(x_fp8))}")
    dtypes = getattr(scale, "dtype", type(scale)), dtype
    if not all(isinstance(t, torch.dtype) and t.is_floating_point and t.itemsize > 1 for t in dtypes):
        raise TypeError(f"scale and dtype must be float16, bfloat16, float32 or float64, got {dtypes[0]} and {dtype}")
    if x_fp8.device != scale.device:
        raise ValueError(f"scale must be on {x_fp8.device}, got {scale.device}")
    sizes = enumerate(zip(scale.shape[::-1], x_fp8.shape[::-1]))
    if scale.ndim > x_fp8.ndim or any(s != n and s != 1 and (s != -(-n // 128) or i > 1) for i, (s, n) in sizes):
        raise ValueError(f"scale must fit {tuple(x_fp8.shape)} or its blocks of 128, got {tuple(scale.shape)}")
    wide = torch.promote_types(dtype, torch.float32)
    return (x_fp8.to(wide) * _spread(scale, x_fp8.shape).to(wide)).to(dtype)


def _has_blocks(a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None) -> bool:
    """Whether the scales are blocks'. None, the scale of an operand to be quantised, goes with any."""
    (M, K), N = a.shape, b.shape[1]
    rows = a_scale is None or a_scale.shape == (M, 1) or (a_scale.numel() == 1 and a_scale.ndim <= 2)
    if rows and (b_scale is None or b_scale.shape == (1, N) or (b_scale.numel() == 1 and b_scale.ndim <= 2)):
        return False
    k, n = -(-K // 128), -(-N // 128)
    if (a_scale is None or a_scale.shape == (M, k)) and (b_scale is None or b_scale.shape == (k, n)):
        return True
    got = " and ".join("None" if s is None else str(tuple(s.shape)) for s in (a_scale, b_scale))
    raise ValueError(
        f"a_scale and b_scale must each have one element or shapes {(M, 1)} and {(1, N)}; or, for blocks, both "
        f"{(M, k)} and {(k, n)}; got {got}"
    )


def _aligned(t: Tensor) -> bool:
    """Whether a TMA descriptor takes t. Traced tensors have no address: contiguous ones are taken as aligned."""
    start = not t.is_contiguous() if torch.compiler.is_compiling() else t.data_ptr() % 16
    return not start and 0 < t.stride(0) and t.stride(0) * t.element_size() % 16 == 0


def _tiles(M: int, N: int, block_m: int, block_n: int) -> int:
    return -(-M // block_m) * -(-N // block_n)


def _rule_rows(M: int) -> int:
    """The M that the launch rules go by: for a symbol one of a few numbers, as torch.compile recompiles for each that
    they tell apart, and gives up after eight."""
    if not torch.compiler.is_compiling() or torch.fx.experimental.symbolic_shapes.has_static_value(M):
        return M
    for rows in (16, 64, 128, 256, 768):
        if M <= rows:
            return rows
    return 4096


def _fp8_gemm_triton(a, b, a_scale, b_scale, dtype, bias, fast_accum, blocks) -> Tensor:
    """a (M, K), b (K, N) in fp8, none empty, on the current device. One row of a may be float and have no scale: it is
    quantised as it is read."""
    (M, K), N = a.shape, b.shape[1]
    y = a.new_empty(M, N, dtype=dtype)
    a, b = a if a.stride(1) == 1 else a.contiguous(), b if b.stride(0) == 1 else b.t().contiguous().t()
    bias = bias if bias is None else bias.contiguous()
    capability, sms = _gpu(a)
    widen = capability < (8, 9)  # no fp8 tensor cores
    quantize = a_scale is None
    strides = (  # a single scale is read by every row: stride 0
        0 if quantize or a_scale.numel() == 1 else a_scale.stride(0),
        a_scale.stride(1) if blocks and not quantize else 0,
        0 if b_scale.numel() == 1 else b_scale.stride(1), b_scale.stride(0) if blocks else 0,
    )  # fmt: skip
    promote = blocks or not fast_accum
    if widen:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    if M == 1:
        # us at 4096 x 14336 (H200): 19.0, where to read b takes 17.0; with the quantisation 19.7, in two launches 20.3.
        # No more programs than the SMs hold at once: 16384 x 6144 28.8, with 4 columns of b a program 32.7
        row = 1 << (K - 1).bit_length() if quantize else 0
        many = N > 32 * sms and capability < (12, 0)  # for sm_120 Triton 3.9 would spill 40 bytes of the larger blocks
        if quantize and blocks:
            block_n, block_k, warps = 8, 1024, 4
        elif many and (K < 3072 or (quantize and N > 72 * sms and K <= 6144)):
            block_n, block_k, warps = 8, 512, 2  # 2560 x 9728 9.7, with the quantisation 10.5; else 11.6, 14.2
        else:
            block_n, block_k, warps = (8, 1024, 4) if many and N <= 72 * sms else (4, 2048, 4)
        scalars = N, K, b.stride(1), *strides[1:], blocks, row, block_n, block_k
        _enqueue(_gemv_kernel, -(-N // block_n), (a, b, a_scale, b_scale, bias, y), scalars, num_warps=warps)
        return y
    rows = _rule_rows(M)
    on_hopper = capability[0] == 9
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 64 else 128
    tiles = _tiles(rows, N, block_m, 64)
    split = _parts(tiles, K, sms) if on_hopper else 1
    if not promote and (K < 7168 or split < (4 if rows <= 64 else 3)):
        split = 1  # fast sums gain less: us at 7168 x 2048, M = 8: 8.4, whole 9.8; at 8192 x 8192 25, whole 24
    if rows > 64 and on_hopper and _aligned(a) and _aligned(w := b.t()) and N * y.element_size() % 16 == 0:
        if gluon is not None and promote and not (_INTERPRET or torch.compiler.is_compiling()):  # no Gluon there
            if groups := _rule_groups(M, N, y.element_size(), blocks, sms):
                _launch_groups(a, w, y, a_scale, b_scale, bias, strides, blocks, groups, sms)
                return y
        if tiles > 2 * sms or not (promote or split > 1):
            _launch_tma(a, w, y, a_scale, b_scale, bias, strides, blocks, promote, sms)
            return y
    ieee = (0, 0) < capability < (8, 0)  # nor 16-bit tensor cores that Triton serves
    if ieee:
        block_m, block_n, block_k, warps, stages = 32 if rows > 16 else 16, 64, 128 if blocks else 32, 4, 2
    elif rows <= 64:  # what counts is bytes in flight: some 50 to 100 kB for each of the 2 or 3 programs on an SM
        block_n, block_k, warps = 64, 128, 4
        stages = 6 if capability[0] in (9, 10) else 3  # most others have 100 kB or less
        if N <= 64 * sms:
            if not (widen or promote) and split == 1:
                block_k = 256  # us, M = 16: 8.4 and not 10.1 at 4096 x 4096
            elif stages == 6 and rows <= 32 and split == 1:
                stages = 8  # us, block scales, M = 16: 11.6 and not 12.6 at 4096 x 6144
        elif stages == 6:  # all tiles at once, up to four on an SM. us, M = 64: 3584 x 18944 26.6, with six stages 30.5
            stages = 6 if N <= 128 * sms else 4 if N <= 192 * sms else 3 if N <= 256 * sms or rows > 16 else 8
            if blocks and rows > 32 and on_hopper:  # sm_100 would spill. 5120 x 13824 27.7, by 64 columns 29.1
                block_n, stages = 128, max(stages, 4)
    elif split > 1:
        block_n, block_k, warps, stages = 64, 128, 4, 4
    elif on_hopper and promote:
        # Small tiles give work to each SM. us, block scales, at 14336 x 4096, M = 100, 512: 42, 65, by 128 x 128 82, 81
        block_m, stages = (64, 6) if _tiles(rows, N, 64, 64) <= sms else (128, 6 if tiles <= sms else 4)
        block_n, block_k, warps = 64, 128, 4
    else:
        block_m, block_n, block_k, warps, stages = (64, 64, 128, 8, 2) if blocks else (128, 128, 64, 8, 3)
    even_k = bool(K % block_k == 0)  # not a symbol of torch.compile's
    scalars = (
        M, N, K, a.stride(0), b.stride(1), *strides, blocks, promote, ieee, even_k, split,
        block_m, block_n, block_k, stages
    )  # fmt: skip
    out = y if split == 1 else y.new_empty(split, M, N, dtype=torch.float32)
    tensors = a, b, a_scale, b_scale, bias if split == 1 else None, out
    _enqueue(_gemm_kernel, _tiles(M, N, block_m, block_n) * split, tensors, scalars, num_warps=warps, num_stages=stages)
    if split > 1:
        _enqueue(_add_parts_kernel, M * -(-N // 1024), (out, bias, y), (M, N, split, 1024), num_warps=4)
    return y


def _parts(tiles: int, K: int, sms: int) -> int:
    """How many programs share a tile of few rows, so that each SM has two; their sums are then added up."""
    # us, block scales, 14336 x 4096, M = 16, 64: 22.9, 26.8, whole 29.0, 41.2; 7168 x 2048 9.0, 10.6, whole 14.1, 21.8
    for parts in (6, 4, 3, 2):
        if parts * tiles <= 2 * sms and K >= parts * max(1400, 36 * tiles if parts == 2 else 0):
            return parts
    return 1


def _launch_tma(a, w, y, a_scale, b_scale, bias, strides, blocks, promote, sms) -> None:
    (M, K), N = a.shape, w.shape[0]
    if promote:  # two programs on an SM: one adds its sums up while the tensor cores serve the other
        block_m, block_n, warps, stages, per_sm = 128, 128, 4, 3, 2
    else:
        # The tile whose rounds take least: each so many ns for 128 of K and at its end (H200). us against those of one
        # fixed rule: M = 256 at 3584 x 18944 37, 46; M = 512 at 14336 x 4096 42, 49
        rows, per_sm, least = _rule_rows(M), 1, None
        for tile, step, end in (
            ((128, 256, 8, 3 if y.element_size() == 4 else 4), 670, 2200),
            ((128, 128, 4, 6), 350, 1300),
            ((64, 128, 4, 7), 250, 1200),
        ):
            time = -(-_tiles(rows, N, *tile[:2]) // sms) * (-(-K // 128) * step + end)
            if least is None or time < least:
                (block_m, block_n, warps, stages), least = tile, time
    half = block_m // 2 if promote else block_m
    programs = _tiles(M, N, block_m, block_n)
    if not blocks:  # block scales' programs take one tile each: 2 % faster
        programs = min(per_sm * sms, programs)
    tensors = (
        TensorDescriptor.from_tensor(a, [half, 128]),
        TensorDescriptor.from_tensor(w, [block_n, 128]),
        TensorDescriptor.from_tensor(y, [half, block_n // 2]),
        a_scale, b_scale, bias,
    )  # fmt: skip
    scalars = M, N, K, *strides, blocks, promote, block_m, block_n, 128
    _enqueue(_gemm_tma_kernel, programs, tensors, scalars, num_warps=warps, num_stages=stages)


def _rule_groups(M: int, N: int, out_bytes: int, blocks: bool, sms: int) -> int:
    """How many groups of warps share a tile of a promoted product, 64 rows of 128 columns each; 0: other kernels."""
    # At 4096 x 14336, M = 384, 8192: 1.08, 1.02 of _scaled_mm's speed, by _gemm_tma_kernel 0.78, 0.90 (H200). Blocks,
    # M = 128, 8192: 0.95, 1.03 and 0.89, 0.90
    two, three = (_tiles(M, N, 64 * groups, 128) for groups in (2, 3))
    if 2 * two <= sms:
        return 0
    # what their rounds of tiles take, and those of _gemm_tma_kernel's two programs on an SM
    times = {2: -(-two // sms) * 157}
    if out_bytes == 2:  # with float32 to write three run out of registers
        times[3] = -(-three // sms) * (196 if blocks else 218)
    if blocks:
        times[0] = -(-two // (2 * sms)) * 300
    return min(times, key=times.get)


@functools.cache
def _layout(bits: int, swizzle: int = 128):
    """Shared memory as TMA writes it and the tensor cores read it; 2.4 us to build."""
    return gl.NVMMASharedLayout(swizzle, bits, 2)


def _launch_groups(a, w, y, a_scale, b_scale, bias, strides, blocks, groups, sms) -> None:
    (M, K), N = a.shape, w.shape[0]
    stage = (64 * groups + 128) * 128 + (256 * groups if blocks else 0)
    stages = (232000 - 64 * 64 * groups * y.element_size()) // stage  # what shared memory holds
    if blocks and not (a_scale.stride(0) == 1 and _aligned(a_scale.t())):
        # TMA wants rows innermost, in fours. us at 14336 x 4096, M = 1500: 137 with this copy, by other kernels 203
        a_scale = F.pad(a_scale.t(), (0, -M % 4)).contiguous().t()
    tensors = (
        GluonDescriptor.from_tensor(a, [64, 128], _layout(8)),
        GluonDescriptor.from_tensor(w, [128, 128], _layout(8)),
        GluonDescriptor.from_tensor(y, [64, 64], _layout(8 * y.element_size())),
        GluonDescriptor.from_tensor(a_scale.t(), [1, 64], _layout(32, 0)) if blocks else a_scale,
        b_scale, b_scale if bias is None else bias,
    )  # fmt: skip
    stride_asm = 1 if blocks else strides[0]
    scalars = M, N, K, stride_asm, strides[2], strides[3], blocks, bias is not None, groups, stages
    _enqueue(_gemm_groups_kernel, min(sms, _tiles(M, N, 64 * groups, 128)), tensors, scalars, num_warps=4)


def _product(a, b, a_scale, b_scale, dtype, bias, fast_accum, blocks) -> Tensor:
    """fp8_gemm of checked fp8 operands; dtype may be float64 too."""
    serves = dtype != torch.float64 and _kernel_serves(a, b, a_scale, b_scale, bias)
    if not serves or not a.numel() or not b.numel():
        return fp8_gemm_torch(a, b, a_scale, b_scale, dtype, bias, fast_accum=fast_accum)
    if a.is_cuda and not torch.compiler.is_compiling() and a.get_device() != torch.cuda.current_device():
        with torch.cuda.device(a.device):  # Triton launches on the current device, not on a's
            return _product(a, b, a_scale, b_scale, dtype, bias, fast_accum, blocks)
    return _fp8_gemm_triton(a, b, a_scale, b_scale, dtype, bias, fast_accum, blocks)


def fp8_gemm(
    a: Tensor, b: Tensor, a_scale: Tensor | None = None, b_scale: Tensor | None = None,
    output_dtype: torch.dtype = torch.float16, bias: Tensor | None = None, *, fast_accum: bool = True,
) -> Tensor:  # fmt: skip
    """(a * a_scale) @ (b * b_scale) + bias, in output_dtype.

    Args:
        a: (M, K). b: (K, N), fastest as the transposed view of a weight (N, K). Each float8_e4m3fn with its scale, or
            float without: quantised by row (b: by column), or by block where the other operand's scale is a block's.
        a_scale, b_scale: float32, one number each or (M, 1) and (1, N); or blocks, (M, ceil(K/128)) and
            (ceil(K/128), ceil(N/128)).
        output_dtype: float16, bfloat16 or float32. bias: (N,) float or None.
        fast_accum: False: sums of 128 products at most are left to the tensor cores' short accumulators.
    Returns:
        (M, N). Not differentiable: FP8Linear is. Raises: ValueError, TypeError.
    """
    for name, t in (("a", a), ("b", b)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"a and b must have shapes (M, K) and (K, N), got {tuple(a.shape)} and {tuple(b.shape)}")
    for name, t, scale in (("a", a, a_scale), ("b", b, b_scale)):
        quantised = t.dtype == _FP8
        if not quantised and (not t.is_floating_point() or t.element_size() == 1):
            raise TypeError(f"{name} must be float8_e4m3fn, or float32, float16 or bfloat16, got {t.dtype}")
        if quantised != (scale is not None):
            none = f"None: {name} is {t.dtype} and is quantised here"
            given = f"given where {name} is float8_e4m3fn, got None"
            raise ValueError(f"{name}_scale must be {given if quantised else none}")
        if scale is not None and getattr(scale, "dtype", None) != torch.float32:
            raise TypeError(f"{name}_scale must be a float32 tensor, got {getattr(scale, 'dtype', type(scale))}")
    if output_dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"output_dtype must be float16, bfloat16 or float32, got {output_dtype}")
    if bias is not None:
        _check_float("bias", bias)
        if bias.shape != (b.shape[1],):
            raise ValueError(f"bias must have shape {(b.shape[1],)}, got {tuple(bias.shape)}")
    device = a.device
    for name, t in (("b", b), ("a_scale", a_scale), ("b_scale", b_scale), ("bias", bias)):
        if t is not None and t.device != device:
            raise ValueError(f"{name} must be on a's device {device}, got {t.device}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (a, b, a_scale, b_scale, bias)):
        raise ValueError("fp8_gemm is not differentiable, got an input that requires grad: use FP8Linear, or no_grad")
    blocks = _has_blocks(a, b, a_scale, b_scale)
    if a_scale is None:
        a, a_scale = quantize_fp8(a, "block" if blocks else "row")
    if b_scale is None:
        b, b_scale = (t.t() for t in quantize_fp8(b.t(), "block2d" if blocks else "row"))
    return _product(a, b, a_scale, b_scale, output_dtype, bias, fast_accum, blocks)


class _FP8Linear(torch.autograd.Function):
    """x (M, K), the master weight (N, K) or None, and b (K, N), its fp8 form, with b's scale."""

    @staticmethod
    def forward(ctx, x, weight, bias, b, b_scale, granularity):
        kept = (b, b_scale) if weight is None else (weight, None)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_weight else None, *(kept if needs_x else (None, None)))
        ctx.weight_dtype, ctx.bias_dtype = (None if t is None else t.dtype for t in (weight, bias))
        return _linear(x, b, b_scale, bias, granularity)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ (weight.to(grad.dtype) if scale is None else dequantize_fp8(weight, scale, grad.dtype).t())
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.t() @ x).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None


def _linear(x, b, b_scale, bias, granularity) -> Tensor:
    M, K = x.shape
    if _kernel_serves(x) and M == 1 and K <= 16384 and not _INTERPRET and _gpu(x)[0] >= (8, 9):
        a, a_scale = x, None  # quantised in the product's own launch: the host's time of a call 26 us, else 54 (H200)
    else:
        a, a_scale = quantize_fp8(x, granularity)
    return _product(a, b, a_scale, b_scale, x.dtype, bias, True, granularity == "block")


# Storage of a kept weight -> how many optimizer steps may have written it. Fused ones bump no tensor's version, nor
# does the broadcast that ends ZeroRedundancyOptimizer's.
_steps = None


def _steps_of(storage) -> int:
    global _steps
    if _steps is None:
        register_optimizer_step_post_hook(_count_step)
        _steps = {}
    return _steps.setdefault(storage._cdata, 0)


def _count_step(optimizer, args, kwargs):
    if torch.compiler.is_compiling():  # it would compile the step anew for each count
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            if type(p) in (Tensor, nn.Parameter) and p.layout == torch.strided:  # _cached_weight keeps no others
                storage = p.untyped_storage()._cdata
                if storage in _steps:
                    _steps[storage] += 1


class _Cache(tuple):
    """Turns None when copied (nn.utils.parametrize copies the whole __dict__) or pickled."""

    def __reduce__(self):
        return type(None), ()


class FP8Linear(nn.Module):
    """nn.Linear whose product runs in fp8: x and weight are quantised, sums are float32, gradients are PyTorch's own
    products with the master weight, in x's dtype.

    granularity: "tensor" and "row": one scale for all, or for each row of x and of the weight; "block": 1 x 128 for x,
    128 x 128 for the weight. A training weight is quantised in every forward. Elsewhere its fp8 copy is kept until the
    weight changes. It is quantised in every call when compiled or captured in a CUDA graph, and while another tensor,
    whose writes may go unrecorded, shares its storage (`weight.data = buffer`, a state_dict that is held). For
    inference from_linear drops the master weight, and only x is quantised.
    """

    _cache = None  # (what tells the weight's state, its storage held weakly, (fp8, scale), stream, event)

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, granularity: str = "row", *,
        device=None, dtype=None
    ):  # fmt: skip
        super().__init__()
        if granularity not in ("tensor", "row", "block"):
            raise ValueError(f'granularity must be "tensor", "row" or "block", got {granularity!r}')
        if in_features < 0 or out_features < 0:
            raise ValueError(f"in_features and out_features must not be negative, got {in_features} and {out_features}")
        self.in_features, self.out_features, self.granularity = in_features, out_features, granularity
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As nn.Linear's."""
        bound = self.in_features**-0.5 if self.in_features else 0.0
        for p in self.parameters():
            nn.init.uniform_(p, -bound, bound)

    @classmethod
    def from_linear(cls, linear: nn.Linear, granularity: str = "row") -> "FP8Linear":
        """For inference: the fp8 weight alone (buffers weight_fp8 and weight_scale), half the memory. A bias parameter
        is taken over as it is; gradients to x and bias go through the dequantised weight."""
        weight = getattr(linear, "weight", None)
        floats = isinstance(weight, Tensor) and weight.is_floating_point()
        if not floats or weight.ndim != 2 or not hasattr(linear, "in_features"):
            raise TypeError(f"linear must be an nn.Linear with a float weight, got {type(linear).__name__}")
        new = cls(0, 0, False, granularity, device="meta")
        new.in_features, new.out_features = linear.in_features, linear.out_features
        bias = linear.bias  # a parametrised or pruned one is a plain tensor
        new.weight, new.bias = None, bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        with torch.inference_mode(False):  # its tensors could not be saved for a backward
            b, b_scale = new._quantize(weight)
            new.register_buffer("weight_fp8", b.t())
            new.register_buffer("weight_scale", b_scale.t())
        return new.train(linear.training)

    def _quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """b and b_scale, as fp8_gemm wants them."""
        q, scale = quantize_fp8(weight, "block2d" if self.granularity == "block" else self.granularity)
        return q.t(), scale.t()

    def requantize(self) -> None:
        """Call it after writes that PyTorch does not record: by a method of `weight.data` (`weight.data.mul_()`,
        `weight.data += d`), by some collectives (torch.distributed.broadcast, all_reduce), by numpy() or DLPack."""
        self._cache = None

    def _cached_weight(self, w: Tensor) -> tuple[Tensor, Tensor]:
        if (
            torch.compiler.is_compiling() or type(w) not in (Tensor, nn.Parameter) or w.is_inference()
            or torch._C._functorch.peek_interpreter_stack() is not None  # what it wraps serves within it alone
            or torch.jit.is_tracing() or (w.is_cuda and torch.cuda.is_current_stream_capturing())
        ):  # fmt: skip
            return self._quantize(w)
        storage = w.untyped_storage()
        if torch._C._storage_Use_Count(storage._cdata) > 2:  # w, storage, and a tensor whose writes may go unseen
            self._cache = None
            return self._quantize(w)
        state = storage._cdata, w.data_ptr(), w._version, w.dtype, w.shape, w.stride(), self.granularity
        state += (_steps_of(storage),)
        stream = torch._C._cuda_getCurrentRawStream(w.get_device()) if w.is_cuda else None  # 3 us less than a Stream
        cache = self._cache
        if cache is None or cache[0] != state:
            quantized = self._quantize(w)
            if type(quantized[0]) is not Tensor:  # FakeTensorMode's
                return quantized
            event = torch.cuda.current_stream(w.device).record_event() if w.is_cuda else None
            # the weak reference keeps the storage's address from being given to another one
            self._cache = cache = _Cache((state, StorageWeakRef(storage), quantized, stream, event))
        elif stream != cache[3]:  # filled on another stream, perhaps a moment ago
            stream = torch.cuda.current_stream(w.device)
            stream.wait_event(cache[4])
            for t in cache[2]:
                t.record_stream(stream)
        return cache[2]

    def __getstate__(self):  # torch.load(weights_only=True) takes no type(None)
        return {**self.__dict__, "_cache": None}

    def __setattr__(self, name, value):
        if name == "weight":  # FSDP2 refills the gathered weight without a trace, but sets it anew each time
            self._cache = None
        super().__setattr__(name, value)

    def _apply(self, fn, recurse=True):
        kept = {name: self._buffers[name] for name in ("weight_fp8", "weight_scale") if name in self._buffers}
        super()._apply(fn, recurse)
        for name, was in kept.items():
            if self._buffers[name].dtype != was.dtype:  # fn casts: take only its move to another device
                self._buffers[name] = was.to(self._buffers[name].device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        _check_float("x", x)
        weight, bias = self.weight, self.bias
        w, scale = (self.weight_fp8, self.weight_scale) if weight is None else (weight, None)
        if weight is None and (w.dtype != _FP8 or scale.dtype != torch.float32):
            got = f"{w.dtype} and {scale.dtype}"
            raise TypeError(f"weight_fp8 and weight_scale must be float8_e4m3fn and float32, got {got}")
        N, K, device = self.out_features, self.in_features, w.device  # numbers, where torch.compile has symbols
        if w.shape != (N, K):  # it was replaced
            if w.ndim != 2:
                raise ValueError(f"weight must have shape (N, K), got {tuple(w.shape)}")
            N, K = w.shape
        if x.ndim == 0 or x.shape[-1] != K:
            raise ValueError(f"x must have shape (..., {K}), got {tuple(x.shape)}")
        if bias is not None and bias.shape != (N,):
            raise ValueError(f"bias must have shape {(N,)}, got {tuple(bias.shape)}")
        for name, t in (("x", x), ("bias", bias)):
            if t is not None and t.device != device:
                raise ValueError(f"{name} must be on the weight's device {device}, got {t.device}")
        if device.type != "meta" and torch.is_autocast_enabled(device.type):
            if x.dtype != torch.float64:
                x = x.to(torch.get_autocast_dtype(device.type))
            with torch.autocast(device.type, enabled=False):
                return self.forward(x)
        training = torch.is_grad_enabled()
        weight_trains = training and weight is not None and weight.requires_grad
        if weight is None:
            quantized = w.t(), scale.t()
        elif weight_trains:
            quantized = self._quantize(weight)
        else:
            quantized = self._cached_weight(weight)
        # when compiled, 2-D x is reshaped, too, so that K is a number: a symbol fails in training (torch 2.11, dynamic)
        as_is = x.ndim == 2 and not torch.compiler.is_compiling()
        rows = x if as_is else x.reshape(-1 if K else x.shape[:-1].numel(), K)
        trains = weight_trains or training and (x.requires_grad or bias is not None and bias.requires_grad)
        if trains and not torch.jit.is_tracing():  # which would record the Function, not what it does
            y = _FP8Linear.apply(rows, weight, bias, *quantized, self.granularity)
        else:
            y = _linear(rows, *quantized, bias, self.granularity)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], N)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"granularity={self.granularity!r}" + (", inference only" if self.weight is None else "")
        )
