"""INT8 matrix products: y = x @ (weight_int8 * scale).T + bias, one scale per output channel.

x (..., K) float, weight (N, K) int8 as in nn.Linear, scale (N,) float32, y (..., N) in x.dtype.

W8A16 (weights int8, activations as they are): y[m, n] = scale[n] * sum_k x[m, k] * w[n, k] + bias[n].
    Few rows are bound by the weight's N*K bytes, half of 16 bits': it is widened in registers (exactly), from which
    Hopper's tensor cores take the left operand. Many rows by 2*M*N*K operations: there the weight is widened before.
W8A8 (activations int8 too): xq = round(x / sx), sx[m] = amax|x[m]| / 127, in one kernel of 3*M*K bytes, then
    y[m, n] = sx[m] * scale[n] * sum_k xq[m, k] * w[n, k] + bias[n] on the int8 tensor cores: twice the rate of 16 bits.
Numerics: sums in float32 of IEEE products (no TF32), or in int32 and exact; scale and bias in float32; one rounding at
    the end. The gradient to x goes through the weight dequantised to the gradient's dtype, as in eager PyTorch.

Sources: https://arxiv.org/abs/2208.07339 (LLM.int8), https://arxiv.org/abs/2211.10438 (SmoothQuant: W8A8)
"""

import functools
import os

import torch
from torch import Tensor, nn

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
_OLD_TRITON = triton is not None and tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 6)


def quantize_symmetric_torch(tensor: Tensor, bits: int = 8, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """Twin of quantize_symmetric."""
    qmax = 2 ** (bits - 1) - 1
    x = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
    reduce = torch.amax if (x.numel() if dim is None else x.shape[dim]) else torch.sum  # amax of nothing raises
    amax = reduce(x.abs()) if dim is None else reduce(x.abs(), dim, keepdim=True)
    scale = amax / torch.full_like(amax, qmax)  # CUDA multiplies by a Python number's reciprocal: not correctly rounded
    if x.dtype == torch.float64:  # finite values get a finite scale, even beyond float32
        scale = torch.where(amax.isinf(), amax, scale.clamp(max=torch.finfo(torch.float32).max)).float()
    scale = torch.where(scale == 0, 1.0, scale)
    return (x / scale).round().clamp(-qmax, qmax).to(torch.int8).contiguous(), scale


def int8_gemm_torch(
    x: Tensor, weight_int8: Tensor, scale: Tensor, bias: Tensor | None = None, *, quantize_activations: bool = False
) -> Tensor:
    """Twin of int8_gemm, both modes."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # it would take the product to 16 bits
        with torch.autocast(x.device.type, enabled=False):
            return int8_gemm_torch(x, weight_int8, scale, bias, quantize_activations=quantize_activations)
    wide = torch.promote_types(x.dtype, torch.float32)
    # in W8A8 its values are 0 (NaN for NaN and inf: so is their row), and its gradient passes straight through round
    straight = x - x.detach() if quantize_activations else x
    y = (straight.to(wide) @ weight_int8.to(wide).T) * scale.to(wide)
    if quantize_activations:
        xq, x_scale = quantize_symmetric_torch(x, dim=-1)
        exact = torch.float32 if x.is_mps else torch.float64  # float64 holds any such sum; Apple's GPUs have none
        y = y + (xq.to(exact) @ weight_int8.to(exact).T).to(wide) * x_scale * scale
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype)


if triton is not None:
    _DIVIDE = tl.constexpr(_INTERPRET)  # the interpreter's fma rounds twice before Triton 3.9

    @triton.jit
    def _nearest(x, scale, QMAX: tl.constexpr):
        """x / scale correctly rounded, then to the nearest int8, ties to even."""
        up = tl.where(scale < 1e-20, 1.2676506002282294e30, 1.0)  # 2^100: the corrections below would underflow
        x, scale = x * up, scale * up
        if _DIVIDE:
            v = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
        else:  # the quotient by the scale's inverse, and once corrected: us for 8192 x 4096 (H200) 28.4, by division 33
            inverse = tl.div_rn(1.0, scale)
            v = x * inverse
            v = tl.fma(tl.fma(-v, scale, x), inverse, v)
        v = tl.minimum(tl.maximum(v, -QMAX), QMAX)  # a subnormal scale is coarse: the quotient may exceed QMAX
        return (v + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)  # + 1.5 * 2^23: the integer is in the low bits

    @triton.jit
    def _widen(w, dtype: tl.constexpr):
        """int8 to a float type, exact, by bits: converting instructions run at an eighth of the rate."""
        u = w.to(tl.uint8, bitcast=True)
        if dtype == tl.float32:  # 2^23 + 128 + w, and the first two taken off
            return (u.to(tl.int32) ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0
        elif dtype == tl.float16:  # 1024 + 128 + w
            return (u.to(tl.int16) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
        else:  # Triton's own cast to bfloat16 goes by bits already
            return w.to(dtype)

    @triton.jit
    def _finish(acc, x_scale_ptr, scale_ptr, bias_ptr, offs_m, offs_n, M, N):
        y = acc.to(tl.float32)
        if x_scale_ptr is not None:
            y *= tl.load(x_scale_ptr + offs_m, mask=offs_m < M)
        y *= tl.load(scale_ptr + offs_n, mask=offs_n < N)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + offs_n, mask=offs_n < N).to(tl.float32)
        return y

    @triton.jit
    def _store_transposed(acc, x_scale_ptr, scale_ptr, bias_ptr, y_ptr, offs_m, offs_n, M, N, FINISH: tl.constexpr):
        if FINISH:
            acc = _finish(acc, x_scale_ptr, scale_ptr, bias_ptr, offs_m[None, :], offs_n[:, None], M, N)
        y_ptrs = y_ptr + offs_m.to(tl.int64)[None, :] * N + offs_n[:, None]
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(offs_m[None, :] < M) & (offs_n[:, None] < N))

    @triton.jit
    def _in_order(t):
        """The columns of every 64 of t's rows, (t, j, h, i) of 4 x 4 x 2 x 2, as (j, h, t, i): see _gemm_kernel."""
        rows: tl.constexpr = t.shape[0]
        columns: tl.constexpr = t.shape[1]
        t = tl.permute(tl.reshape(t, (rows, columns // 64, 4, 4, 2, 2)), (0, 1, 3, 4, 2, 5))
        return tl.reshape(t, (rows, columns))

    @triton.jit
    def _magnitude(x):
        """Bits that order as magnitudes do, NaN above all. Of 8192 x 14336 in bfloat16, us: 86, by float32 96."""
        if x.dtype == tl.float32:
            return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        else:
            return x.to(tl.int16, bitcast=True) & 0x7FFF

    @triton.jit
    def _scale_of(magnitude, dtype: tl.constexpr, QMAX: tl.constexpr):
        scale = tl.div_rn(magnitude.to(dtype, bitcast=True).to(tl.float32), QMAX)
        return tl.where(scale == 0.0, 1.0, scale)

    @triton.jit(do_not_specialize=["M"])
    def _quantize_rows_kernel(
        x_ptr, q_ptr, scale_ptr, stride_xm, M, K,
        QMAX: tl.constexpr, LONG: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        rows, cols = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + rows[:, None] * stride_xm + cols[None, :]
        q_ptrs = q_ptr + rows[:, None] * K + cols[None, :]
        mask = (rows[:, None] < M) & (cols[None, :] < K)
        x = tl.load(x_ptrs, mask=mask, other=0.0)
        amax = tl.max(_magnitude(x), 1)
        if LONG:  # a row is more than a block: read twice, the second time mostly from L2
            for k in range(BLOCK_K, K, BLOCK_K):
                mask_k = (rows[:, None] < M) & (cols[None, :] < K - k)
                amax = tl.maximum(amax, tl.max(_magnitude(tl.load(x_ptrs + k, mask=mask_k, other=0.0)), 1))
        scale = _scale_of(amax.to(_magnitude(x).dtype), x.dtype, QMAX)
        tl.store(scale_ptr + rows, scale, mask=rows < M)
        scale = scale[:, None]
        tl.store(q_ptrs, _nearest(x.to(tl.float32), scale, QMAX), mask=mask)
        if LONG:
            for k in range(BLOCK_K, K, BLOCK_K):
                mask_k = (rows[:, None] < M) & (cols[None, :] < K - k)
                x_k = tl.load(x_ptrs + k, mask=mask_k, other=0.0)
                tl.store(q_ptrs + k, _nearest(x_k.to(tl.float32), scale, QMAX), mask=mask_k)

    @triton.jit
    def _quantize_flat_kernel(x_ptr, q_ptr, scale_ptr, numel, QMAX: tl.constexpr, BLOCK: tl.constexpr):
        offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs, mask=offs < numel, other=0.0).to(tl.float32)
        tl.store(q_ptr + offs, _nearest(x, tl.load(scale_ptr), QMAX), mask=offs < numel)

    @triton.jit(do_not_specialize=["M"])
    def _cast_rows_kernel(
        x_ptr, scale_ptr, out_ptr, stride_xm, M, K, stride_om, PERMUTED: tl.constexpr, BLOCK_K: tl.constexpr
    ):
        """Rows in another type, times a scale each, or with their columns in the order that _gemm_kernel wants."""
        blocks = tl.cdiv(stride_om, BLOCK_K)
        row = tl.program_id(0).to(tl.int64) // blocks
        cols = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * stride_xm + cols, mask=cols < tl.where(row < M, K, 0), other=0)
        if scale_ptr is not None:
            x = x.to(tl.float32) * tl.load(scale_ptr + row)
        if PERMUTED:
            x = tl.reshape(_in_order(x[None, :]), (BLOCK_K,))
        tl.store(out_ptr + row * stride_om + cols, x.to(out_ptr.dtype.element_ty), mask=cols < stride_om)

    @triton.jit
    def _one_row_kernel(
        x_ptr, w_ptr, x_scale_ptr, scale_ptr, bias_ptr, y_ptr, N, K, stride_wn,
        ROW: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """y = x @ w.T for one row of x: plain products and sums, since a tensor core would waste 15 of its 16 rows.

        ROW > 0 (W8A8): x is float, ROW its length rounded up to a power of 2, and each program quantises it for itself.
        """
        QUANTIZE: tl.constexpr = ROW > 0
        W8A8: tl.constexpr = QUANTIZE or x_scale_ptr is not None
        offs_n, offs_k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        w_ptrs = w_ptr + (offs_n % N).to(tl.int64)[:, None] * stride_wn + offs_k[None, :]
        # each thread's 16 values are summed at once: 20.1 us at (4096, 14336), kept apart 21.3 (H200)
        acc = tl.zeros((BLOCK_N, BLOCK_K // 16), tl.int32 if W8A8 else tl.float32)
        if QUANTIZE:
            row = tl.arange(0, ROW)
            magnitude = _magnitude(tl.load(x_ptr + row, mask=row < K, other=0.0))
            x_scale = _scale_of(tl.max(magnitude, 0).to(magnitude.dtype), x_ptr.dtype.element_ty, 127)
        for k in range(0, K, BLOCK_K):
            if EVEN_K:
                w, x = tl.load(w_ptrs + k, eviction_policy="evict_first"), tl.load(x_ptr + k + offs_k)
            else:
                w = tl.load(w_ptrs + k, mask=offs_k[None, :] < K - k, other=0, eviction_policy="evict_first")
                x = tl.load(x_ptr + k + offs_k, mask=offs_k < K - k, other=0)
            if QUANTIZE:
                x = _nearest(x.to(tl.float32), x_scale, 127)
            if W8A8:
                products = w.to(tl.int32) * x.to(tl.int32)[None, :]
            else:
                products = _widen(w, tl.float32) * x.to(tl.float32)[None, :]
            acc += tl.sum(tl.reshape(products, (BLOCK_N, BLOCK_K // 16, 16)), 2)
        y = tl.sum(acc, 1).to(tl.float32)
        if QUANTIZE:
            y *= x_scale
        y = _finish(y, x_scale_ptr, scale_ptr, bias_ptr, 0, offs_n, 1, N)
        tl.store(y_ptr + offs_n, y.to(y_ptr.dtype.element_ty), mask=offs_n < N)

    @triton.jit(do_not_specialize=["M"])
    def _gemm_kernel(
        x_ptr, more_x_ptr, w_ptr, x_scale_ptr, scale_ptr, bias_ptr, y_ptr, M, N, K, stride_xm, stride_wn,
        IEEE: tl.constexpr, PERMUTED: tl.constexpr, EVEN_K: tl.constexpr, FEW: tl.constexpr, SPLIT: tl.constexpr,
        BLOCK_M: tl.constexpr, MORE_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """One tile of y, held transposed: the weight is the left operand. x int8 (with its scales) or float.

        With SPLIT > 1 that many programs share a tile, each with every SPLITth step of K, and y is (SPLIT, M, N).
        PERMUTED, for Hopper: the thread that reads 16 bytes (t) of 64 of a weight's row has 4 x 2 pairs (j, h) of the
        left operand, of columns far apart; so x comes with its columns in that order (1) or is put into it here (2).
        Both are descriptors then. MORE_M rows of x, beyond a power of two, share a widened weight with the BLOCK_M.
        """
        W8A8: tl.constexpr = x_scale_ptr is not None
        part, tile = tl.program_id(0) % SPLIT, tl.program_id(0) // SPLIT
        tiles_m = tl.cdiv(M, BLOCK_M + MORE_M)
        m, n = tile % tiles_m * (BLOCK_M + MORE_M), tile // tiles_m * BLOCK_N
        offs_m, offs_n, offs_k = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        if not PERMUTED:
            # Rows past the end wrap around: whole vectors, no mask; the store drops them. FEW rows would be read many
            # times over, so they have a mask: 23 us at (4096, 14336), M = 4, and not 29
            w_ptrs = w_ptr + (offs_n % N).to(tl.int64)[:, None] * stride_wn + offs_k[None, :]
            x_ptrs = x_ptr + (offs_m % M).to(tl.int64)[None, :] * stride_xm + offs_k[:, None]
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if W8A8 else tl.float32)
        if MORE_M:
            more = tl.zeros((BLOCK_N, MORE_M), tl.float32)
        for k in range(part * BLOCK_K, K, SPLIT * BLOCK_K):
            if PERMUTED:
                w, x = w_ptr.load([n, k]), x_ptr.load([m, k])
            else:
                w = tl.load(w_ptrs + k) if EVEN_K else tl.load(w_ptrs + k, mask=offs_k[None, :] < K - k, other=0)
                if EVEN_K and not FEW:
                    x = tl.load(x_ptrs + k)
                elif EVEN_K:
                    x = tl.load(x_ptrs + k, mask=offs_m[None, :] < M, other=0)
                else:
                    x = tl.load(x_ptrs + k, mask=(offs_k[:, None] < K - k) & (offs_m[None, :] < M), other=0)
            if W8A8:
                acc = tl.dot(w, x, acc, out_dtype=tl.int32)
            elif PERMUTED:
                w, x = _in_order(_widen(w, x.dtype)), _in_order(x) if PERMUTED == 2 else x
                # k < K always holds, but makes each step use the sums, so that Triton waits for the tensor cores: 3.6
                # would overwrite w's registers while they still read them, and results would vary.
                if MORE_M:
                    more = tl.where(k < K, tl.dot(w, more_x_ptr.load([m + BLOCK_M, k]).T, more), 0.0)
                acc = tl.where(k < K, tl.dot(w, x.T, acc), 0.0)
            else:
                # Sums of BLOCK_K products, then their sum: in float32 a fifth of one long chain's error at K = 4096.
                # The last argument has no other effect here than to keep Triton from fusing the sum into a chain.
                dtype: tl.constexpr = tl.float32 if IEEE else x.dtype
                acc += tl.dot(_widen(w, dtype), x.to(dtype), input_precision="ieee", max_num_imprecise_acc=BLOCK_K)
        y_ptr += part.to(tl.int64) * M * N
        _store_transposed(acc, x_scale_ptr, scale_ptr, bias_ptr, y_ptr, offs_m, offs_n, M, N, SPLIT == 1)
        if MORE_M:
            offs_m = m + BLOCK_M + tl.arange(0, MORE_M)
            _store_transposed(more, x_scale_ptr, scale_ptr, bias_ptr, y_ptr, offs_m, offs_n, M, N, SPLIT == 1)

    @triton.jit(do_not_specialize=["M"])
    def _add_parts_kernel(
        parts_ptr, x_scale_ptr, scale_ptr, bias_ptr, y_ptr, M, N, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr
    ):
        tiles_n = tl.cdiv(N, BLOCK_N)
        row = tl.program_id(0).to(tl.int64) // tiles_n
        cols = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_N,), parts_ptr.dtype.element_ty)
        for part in tl.static_range(SPLIT):
            acc += tl.load(parts_ptr + (part * M + row) * N + cols, mask=cols < N)
        y = _finish(acc, x_scale_ptr, scale_ptr, bias_ptr, row, cols, M, N)
        tl.store(y_ptr + row * N + cols, y.to(y_ptr.dtype.element_ty), mask=cols < N)

    @triton.jit(do_not_specialize=["M"])
    def _sliced_gemm_kernel(
        x_ptr, w_ptr, x_scale_ptr, scale_ptr, bias_ptr, y_ptr, M, N, K, stride_xm, stride_wn,
        EVEN_K: tl.constexpr, FEW: tl.constexpr, SLICES: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """_gemm_kernel for few rows and channels: a program's warps share out a step of K and not a tile of y."""
        W8A8: tl.constexpr = x_scale_ptr is not None
        offs_m, offs_n = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_wk = tl.arange(0, SLICES)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
        offs_xk = tl.arange(0, SLICES)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :, None]
        w_ptrs = w_ptr + (offs_n % N).to(tl.int64)[None, :, None] * stride_wn + offs_wk
        x_ptrs = x_ptr + (offs_m % M).to(tl.int64)[None, None, :] * stride_xm + offs_xk
        acc = tl.zeros((SLICES, BLOCK_N, BLOCK_M), tl.int32 if W8A8 else tl.float32)
        for k in range(0, K, SLICES * BLOCK_K):
            w = tl.load(w_ptrs + k) if EVEN_K else tl.load(w_ptrs + k, mask=offs_wk < K - k, other=0)
            if EVEN_K and not FEW:
                x = tl.load(x_ptrs + k)
            elif EVEN_K:
                x = tl.load(x_ptrs + k, mask=offs_m[None, None, :] < M, other=0)
            else:
                x = tl.load(x_ptrs + k, mask=(offs_xk < K - k) & (offs_m[None, None, :] < M), other=0)
            acc = tl.dot(w if W8A8 else _widen(w, x.dtype), x, acc, out_dtype=acc.dtype)
        _store_transposed(tl.sum(acc, 0), x_scale_ptr, scale_ptr, bias_ptr, y_ptr, offs_m, offs_n, M, N, True)

    @triton.jit(do_not_specialize=["M"])
    def _gemm_tma_kernel(
        x_desc, w_desc, y_desc, x_scale_ptr, scale_ptr, bias_ptr, M, N, K,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """y = x @ w.T for many rows, both of one type: as many programs as there are SMs walk over the tiles."""
        GROUP_M: tl.constexpr = 8  # tiles go down 8 rows of tiles before the next column: x and w are re-read from L2
        tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
            first_m = tile // (GROUP_M * tiles_n) * GROUP_M
            group_m = min(tiles_m - first_m, GROUP_M)
            m = (first_m + tile % (GROUP_M * tiles_n) % group_m) * BLOCK_M
            # TMA is slow on rows past the end: the last tile moves up and computes some of its neighbour's rows again
            m = tl.maximum(tl.minimum(m, M - BLOCK_M), 0)
            n = tile % (GROUP_M * tiles_n) // group_m * BLOCK_N
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32 if x_scale_ptr is None else tl.int32)
            for k in range(0, K, BLOCK_K):
                acc = tl.dot(x_desc.load([m, k]), w_desc.load([n, k]).T, acc, out_dtype=acc.dtype)
            offs_m, offs_n = m + tl.arange(0, BLOCK_M)[:, None], n + tl.arange(0, BLOCK_N)[None, :]
            y = _finish(acc, x_scale_ptr, scale_ptr, bias_ptr, offs_m, offs_n, M, N)
            # stored in two halves: half the shared memory, which goes to one more stage of loads
            left, right = tl.split(tl.permute(tl.reshape(y, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
            y_desc.store([m, n], left.to(y_desc.dtype))
            y_desc.store([m, n + BLOCK_N // 2], right.to(y_desc.dtype))


if gluon is not None:

    @gluon.jit
    def _place(turn, sizes):
        """The part of K, the row and the column of a program's next tile."""
        tiles_m, tiles_n, parts, N, K = sizes
        GROUP_M: gl.constexpr = 8  # as in _gemm_tma_kernel
        tile = turn // parts
        first_m = tile // (GROUP_M * tiles_n) * GROUP_M
        group_m = gl.minimum(tiles_m - first_m, GROUP_M)
        tile %= GROUP_M * tiles_n
        return turn % parts, first_m + tile % group_m, tile // group_m

    @gluon.jit
    def _load_tiles(x_desc, more_x_desc, w_desc, buffers, sizes, MORE_M: gl.constexpr):
        x_bufs, more_x_bufs, w_bufs, y_bufs, full, empty = buffers
        tiles_m, tiles_n, parts, N, K = sizes
        STAGES: gl.constexpr = x_bufs.shape[0]
        GROUPS: gl.constexpr = w_bufs.shape[0] // STAGES
        BLOCK_M: gl.constexpr = x_bufs.shape[1]
        step = 0
        for turn in range(gl.program_id(0), tiles_m * tiles_n * parts, gl.num_programs(0)):
            part, m, n = _place(turn, sizes)
            for k in range(part * 64, part * 64 + gl.cdiv(K - part * 64, 128 * parts) * 128 * parts, 64 * parts):
                stage = step % STAGES
                hopper.mbarrier.wait(empty.index(stage), step // STAGES & 1 ^ 1)
                ready = full.index(stage)
                hopper.mbarrier.expect(ready, (2 * (BLOCK_M + MORE_M) + 64 * GROUPS) * 64)
                for group in gl.static_range(GROUPS):
                    _tma_load(w_desc, [(n * GROUPS + group) * 64, k], ready, w_bufs.index(stage * GROUPS + group))
                row = m * (BLOCK_M + MORE_M)
                _tma_load(x_desc, [row, k], ready, x_bufs.index(stage))
                if MORE_M:
                    _tma_load(more_x_desc, [row + BLOCK_M, k], ready, more_x_bufs.index(stage))
                step += 1

    @gluon.jit
    def _widen_tile(w_buf, dtype: gl.constexpr, layout: gl.constexpr):
        """64 x 64 of the weight, in the registers from which a product reads: columns in _gemm_kernel's order."""
        in_bytes: gl.constexpr = gl.DistributedLinearLayout(  # a thread reads 16 in a row
            [[0, 1], [0, 2], [0, 4], [0, 8], [8, 0]], [[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]],
            [], [64, 64],
        )  # fmt: skip
        w = w_buf.load(in_bytes)
        if dtype == gl.float16:  # by bits, as in _widen
            w = (w.to(gl.uint8, bitcast=True).to(gl.int16) ^ 0x6480).to(gl.float16, bitcast=True) - 1152.0
        w = gl.permute(gl.reshape(w.to(dtype), (64, 4, 4, 2, 2)), (0, 2, 3, 1, 4))
        return gl.convert_layout(gl.reshape(w, (64, 64)), gl.DotOperandLayout(0, layout, 2), assert_trivial=True)

    @gluon.jit
    def _finish_tile(acc, scale_ptr, bias_ptr, col, N, layout: gl.constexpr, HAS_BIAS: gl.constexpr):
        offs_n = col + gl.arange(0, 64, gl.SliceLayout(1, layout))
        acc *= gl.expand_dims(gl.load(scale_ptr + offs_n, mask=offs_n < N, other=0.0), 1)
        if HAS_BIAS:
            acc += gl.expand_dims(gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(gl.float32), 1)
        return acc

    @gluon.jit
    def _store_tile(acc, y_desc, y_buf, row, col, ROWS: gl.constexpr):
        """acc (64 channels, ROWS), 64 rows after the other."""
        if ROWS > 64:
            first, second = gl.split(gl.permute(gl.reshape(acc, [64, 2, ROWS // 2]), (0, 2, 1)))
            _store_tile(first, y_desc, y_buf, row, col, ROWS // 2)
            _store_tile(second, y_desc, y_buf, row + ROWS // 2, col, ROWS // 2)
        else:
            hopper.tma.store_wait(0)
            y_buf.permute((1, 0)).store(acc.to(y_desc.dtype))
            hopper.fence_async_shared()
            _tma_store(y_desc, [row, col], y_buf)

    @gluon.jit
    def _multiply_tiles(
        group, y_desc, scale_ptr, bias_ptr, buffers, sizes, MORE_M: gl.constexpr, HAS_BIAS: gl.constexpr,
        FINISH: gl.constexpr,
    ):  # fmt: skip
        x_bufs, more_x_bufs, w_bufs, y_bufs, full, empty = buffers
        tiles_m, tiles_n, parts, N, K = sizes
        STAGES: gl.constexpr = x_bufs.shape[0]
        GROUPS: gl.constexpr = w_bufs.shape[0] // STAGES
        BLOCK_M: gl.constexpr = x_bufs.shape[1]
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
        more_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
        operand: gl.constexpr = gl.DotOperandLayout(0, more_layout, 2)
        y_buf, step = y_bufs.index(group), 0
        for turn in range(gl.program_id(0), tiles_m * tiles_n * parts, gl.num_programs(0)):
            part, m, n = _place(turn, sizes)
            acc = gl.zeros([64, BLOCK_M], gl.float32, layout)
            more_acc = gl.zeros([64, 64], gl.float32, more_layout)
            for _ in range(gl.cdiv(K - part * 64, 128 * parts)):  # two steps at once: half of the waiting
                first, second = step % STAGES, (step + 1) % STAGES
                hopper.mbarrier.wait(full.index(first), step // STAGES & 1)
                w = _widen_tile(w_bufs.index(first * GROUPS + group), x_bufs.dtype, layout)
                hopper.mbarrier.wait(full.index(second), (step + 1) // STAGES & 1)
                next_w = _widen_tile(w_bufs.index(second * GROUPS + group), x_bufs.dtype, layout)
                sums = hopper.warpgroup_mma(w, x_bufs.index(first).permute((1, 0)), acc, is_async=True)
                sums = hopper.warpgroup_mma(next_w, x_bufs.index(second).permute((1, 0)), sums, is_async=True)
                if MORE_M:
                    more_w = gl.convert_layout(w, operand, assert_trivial=True)
                    more_next_w = gl.convert_layout(next_w, operand, assert_trivial=True)
                    x, next_x = more_x_bufs.index(first).permute((1, 0)), more_x_bufs.index(second).permute((1, 0))
                    more = hopper.warpgroup_mma(more_w, x, more_acc, is_async=True)
                    more = hopper.warpgroup_mma(more_next_w, next_x, more, is_async=True)
                    deps = sums, more, w, next_w, more_w, more_next_w
                    acc, more_acc, w, next_w, more_w, more_next_w = hopper.warpgroup_mma_wait(0, deps=deps)
                else:
                    acc, w, next_w = hopper.warpgroup_mma_wait(0, deps=(sums, w, next_w))
                hopper.mbarrier.arrive(empty.index(first), count=1)
                hopper.mbarrier.arrive(empty.index(second), count=1)
                step += 2
            row, col = (part * tiles_m + m) * (BLOCK_M + MORE_M), (n * GROUPS + group) * 64
            if FINISH:
                acc = _finish_tile(acc, scale_ptr, bias_ptr, col, N, layout, HAS_BIAS)
            _store_tile(acc, y_desc, y_buf, row, col, BLOCK_M)
            if MORE_M:
                if FINISH:
                    more_acc = _finish_tile(more_acc, scale_ptr, bias_ptr, col, N, more_layout, HAS_BIAS)
                _store_tile(more_acc, y_desc, y_buf, row + BLOCK_M, col, MORE_M)
        hopper.tma.store_wait(0)

    @gluon.jit(do_not_specialize=["M", "parts"])
    def _gemm_groups_kernel(
        x_desc, more_x_desc, w_desc, y_desc, scale_ptr, bias_ptr, M, N, K, parts, HAS_BIAS: gl.constexpr,
        FINISH: gl.constexpr, GROUPS: gl.constexpr, BLOCK_M: gl.constexpr, MORE_M: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        """_gemm_kernel's PERMUTED products with the warps apart: one loads, and groups of four each widen 64 rows of
        the weight and multiply them, so that one group's widening hides behind another's products.

        As many programs as there are SMs walk over the tiles, or over each's parts of K: then y is (parts, rows, N).
        """
        x_bufs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, 64], x_desc.layout)
        w_bufs = gl.allocate_shared_memory(gl.int8, [STAGES * GROUPS, 64, 64], w_desc.layout)
        y_bufs = gl.allocate_shared_memory(y_desc.dtype, [GROUPS, 64, 64], y_desc.layout)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            hopper.mbarrier.init(full.index(stage), count=1)
            hopper.mbarrier.init(empty.index(stage), count=GROUPS)
        hopper.fence_async_shared()
        more_x_bufs = x_bufs  # unused
        if MORE_M:
            more_x_bufs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, MORE_M, 64], x_desc.layout)
        buffers = x_bufs, more_x_bufs, w_bufs, y_bufs, full, empty
        sizes = gl.cdiv(M, BLOCK_M + MORE_M), gl.cdiv(N, 64 * GROUPS), parts, N, K
        if GROUPS == 2:
            gl.warp_specialize([
                (_multiply_tiles, (0, y_desc, scale_ptr, bias_ptr, buffers, sizes, MORE_M, HAS_BIAS, FINISH)),
                (_multiply_tiles, (1, y_desc, scale_ptr, bias_ptr, buffers, sizes, MORE_M, HAS_BIAS, FINISH)),
                (_load_tiles, (x_desc, more_x_desc, w_desc, buffers, sizes, MORE_M)),
            ], [4, 1], [232, 40])  # fmt: skip
        else:
            gl.warp_specialize([
                (_multiply_tiles, (0, y_desc, scale_ptr, bias_ptr, buffers, sizes, MORE_M, HAS_BIAS, FINISH)),
                (_multiply_tiles, (1, y_desc, scale_ptr, bias_ptr, buffers, sizes, MORE_M, HAS_BIAS, FINISH)),
                (_multiply_tiles, (2, y_desc, scale_ptr, bias_ptr, buffers, sizes, MORE_M, HAS_BIAS, FINISH)),
                (_load_tiles, (x_desc, more_x_desc, w_desc, buffers, sizes, MORE_M)),
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


def _one_of(values, n):
    """The value that equals n, or None: a number even where torch.compile traces n as a symbol."""
    for value in values:
        if value == n:
            return value
    return None


def _check_float(name, t):
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if not t.is_floating_point() or t.element_size() == 1:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {t.dtype}")


def quantize_symmetric(tensor: Tensor, bits: int = 8, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """The nearest int8 multiples of a scale per slice: scale = amax / (2^(bits-1) - 1), ties to even.

    Args:
        tensor: any shape, float. bits: 2 to 8. dim: the dimension that one scale serves; None: one scale for all.
    Returns:
        int8 of tensor's shape and the float32 scale, in which `dim` has size 1 (None: a scalar); an all-zero slice
        has scale 1. No gradient. Non-finite values are not looked for: their slice dequantises to NaN or Inf.
    """
    _check_float("tensor", tensor)
    if (known_bits := _one_of(range(2, 9), bits)) is None:
        raise ValueError(f"bits must be 2 to 8, got {bits!r}")
    integer = torch.compiler.is_compiling() or hasattr(dim, "__index__")
    known_dim = _one_of(range(-tensor.ndim, tensor.ndim), dim) if integer else None
    if dim is not None and known_dim is None:
        raise ValueError(f"dim must be a dimension of tensor {tuple(tensor.shape)} or None, got {dim!r}")
    bits, dim = known_bits, known_dim
    if not _kernel_serves(tensor) or not tensor.numel():
        return quantize_symmetric_torch(tensor, bits, dim)
    if tensor.is_cuda and not torch.compiler.is_compiling() and tensor.get_device() != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):  # Triton launches on the current device, not on tensor's
            return quantize_symmetric(tensor, bits, dim)
    tensor, qmax = tensor.detach(), 2 ** (bits - 1) - 1
    if dim is None:  # two passes: the scale by PyTorch, then the quotients
        x = tensor.contiguous()
        amax = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32)
        scale = amax / torch.full_like(amax, qmax)
        scale = torch.where(scale == 0, 1.0, scale)
        q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        _enqueue(_quantize_flat_kernel, -(-x.numel() // 4096), (x, q, scale), (x.numel(), qmax, 4096), num_warps=4)
        return q, scale
    rows = tensor.movedim(dim, -1)
    q, scale = _quantize_rows(rows.reshape(-1, rows.shape[-1]), qmax)
    q, scale = q.view(rows.shape).movedim(-1, dim), scale.view(*rows.shape[:-1], 1).movedim(-1, dim)
    return q.contiguous(), scale.contiguous()


def _row_block(K: int) -> int:
    """How many columns of a row are read at once: all, up to 16384."""
    block = 128
    while block < min(K, 16384):
        block *= 2
    return block


def _quantize_rows(x: Tensor, qmax: int = 127) -> tuple[Tensor, Tensor]:
    M, K = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    q, scale = x.new_empty(M, K, dtype=torch.int8), x.new_empty(M, dtype=torch.float32)
    block_k = _row_block(K)
    block_m = max(1, 2048 // block_k)
    # us (H200): 8192 x 4096 27.3, a copy of as many bytes 25.4. Few long rows want more warps: 32 x 8960 2.8, with four
    # 3.8 (4096 x 8960 43, with four 38)
    warps = 8 if K > 4096 and M <= 128 else 4
    scalars = x.stride(0), M, K, qmax, bool(K > block_k), block_m, block_k
    _enqueue(_quantize_rows_kernel, -(-M // block_m), (x, q, scale), scalars, num_warps=warps)
    return q, scale


def quantize_weight_per_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (N, K) and the float32 scale (N,) of a weight (N, K): what int8_gemm takes."""
    _check_float("weight", weight)
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape (N, K), got {tuple(weight.shape)}")
    quantized, scale = quantize_symmetric(weight, dim=1)
    return quantized, scale.squeeze(1)


def dequantize(quantized: Tensor, scale: Tensor, dtype: torch.dtype = torch.float16) -> Tensor:
    """quantized * scale in float32, rounded once. A scale (N,) goes with the rows of (N, K), any other broadcasts."""
    if getattr(quantized, "dtype", None) != torch.int8:
        raise TypeError(f"quantized must be an int8 tensor, got {getattr(quantized, 'dtype', type(quantized))}")
    dtypes = getattr(scale, "dtype", type(scale)), dtype
    if not all(isinstance(t, torch.dtype) and t.is_floating_point and t.itemsize > 1 for t in dtypes):
        raise TypeError(f"scale and dtype must be float16, bfloat16, float32 or float64, got {dtypes[0]} and {dtype}")
    if quantized.device != scale.device:
        raise ValueError(f"scale must be on {quantized.device}, got {scale.device}")
    given, learned = tuple(scale.shape), scale.requires_grad and torch.is_grad_enabled()
    if scale.ndim == 1 and quantized.ndim == 2:
        scale = scale.unsqueeze(1)
    if scale.ndim > quantized.ndim or any(s != n and s != 1 for s, n in zip(scale.shape[::-1], quantized.shape[::-1])):
        raise ValueError(f"scale must broadcast to {tuple(quantized.shape)}, got {given}")
    rows = quantized.ndim == 2 and scale.shape == (quantized.shape[0], 1) and not learned
    if not rows or dtype == torch.float64 or not _kernel_serves(quantized, scale) or not quantized.numel():
        wide = torch.promote_types(dtype, torch.float32)
        return (quantized.to(wide) * scale.to(wide)).to(dtype)
    if quantized.is_cuda and not torch.compiler.is_compiling() and scale.get_device() != torch.cuda.current_device():
        with torch.cuda.device(quantized.device):  # Triton launches on the current device, not on quantized's
            return dequantize(quantized, scale, dtype)
    return _cast_rows(quantized, dtype, scale.contiguous())


def _cast_rows(x: Tensor, dtype: torch.dtype, scale: Tensor | None = None, permuted: int = 0) -> Tensor:
    """x in dtype. permuted: with its columns in _gemm_kernel's order, and rows of zeros up to a multiple of it: where
    TMA has to fill them in, 300 rows of x take longer than 512."""
    M, K = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty((-(-M // permuted) * permuted, -(-K // 64) * 64) if permuted else (M, K), dtype=dtype)
    rows, columns = out.shape
    scalars = x.stride(0), M, K, columns, bool(permuted), 2048
    _enqueue(_cast_rows_kernel, rows * -(-columns // 2048), (x, scale, out), scalars, num_warps=4)
    return out


def _properties(index: int) -> tuple[tuple[int, int], int]:
    return torch.cuda.get_device_capability(index), torch.cuda.get_device_properties(index).multi_processor_count


_properties_cached = functools.cache(_properties)


def _gpu(x: Tensor) -> tuple[tuple[int, int], int]:
    """Compute capability and number of SMs. Others than NVIDIA's multiply int8 too and have no TMA, as sm_80."""
    if not x.is_cuda or torch.version.hip is not None:
        return (8, 0), 100
    return (_properties if torch.compiler.is_compiling() else _properties_cached)(x.get_device())


def _rule_rows(M: int) -> int:
    """The M that the launch rules go by: for a symbol one of a few numbers, as torch.compile recompiles for each that
    they tell apart, and gives up after eight."""
    if not torch.compiler.is_compiling() or torch.fx.experimental.symbolic_shapes.has_static_value(M):
        return M
    for rows in (16, 64, 128, 256, 768):
        if M <= rows:
            return rows
    return 4096


def _int8_gemm_triton(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, w8a8: bool) -> Tensor:
    """x (M, K) and weight (N, K), none empty, on the current device."""
    (M, K), N = x.shape, weight.shape[0]
    y = x.new_empty(M, N)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    x = x if x.stride(1) == 1 else x.contiguous()
    scale, bias = scale.contiguous(), bias if bias is None else bias.contiguous()
    capability, sms = _gpu(x)
    if M == 1:
        _int8_gemm_row(x, weight, scale, bias, y, w8a8, sms)
        return y
    x, x_scale = _quantize_rows(x) if w8a8 else (x, None)
    rows, ieee = _rule_rows(M), not w8a8 and (x.dtype == torch.float32 or capability < (8, 0))
    # Parts of K do better there. us, M = 128: (8192, 1024) 18, by groups 25; (2048, 2048) 10.3 and 12.4
    small = rows <= 256 and (N < 2048 or bool(_small_parts(rows, N, K, sms)))
    if (
        gluon is not None and capability[0] == 9 and 64 < rows <= max(1536, N // 4) and N % 8 == 0
        and not (w8a8 or ieee or small)
        and not (_INTERPRET or torch.compiler.is_compiling())  # no Gluon there
    ):  # fmt: skip
        _int8_gemm_groups(x, weight, scale, bias, y, sms)
        return y
    memory = capability[0] in (9, 10)  # 227 kB of shared memory on an SM, most others 100
    # us at (4096, 14336), W8A16 by _gemm_kernel and with the weight widened before: M = 512 104, 134; M = 1024 227, 212
    many = rows > 64 and -(-rows // 64) * -(-N // 128) > sms if w8a8 else rows > 768 and not ieee
    if memory and many and N * y.element_size() % 16 == 0:
        _int8_gemm_tma(x, weight, x_scale, scale, bias, y, capability, sms)
        return y
    if rows <= 16 and N <= 64 * sms and not ieee:
        # us at (14336, 4096), M = 16: 24.4, unsliced 29.6. Three stages leave room for a third program on an SM:
        # (8192, 8192) 25.9, four 29.9. Behind a mask five hide more: (14336, 4096), M = 4: 24.2, four 26.3. Beside many
        # programs it pays up to 8 rows: (28672, 8192), M = 8: 70, without 83
        few = rows <= (0 if N <= 16 * sms else 4 if N <= 32 * sms or w8a8 else 8)
        if memory and not w8a8 and N <= 16 * sms:  # (8192, 1024) 9.0, in two slices 11.9
            slices, stages = 4, 3
        else:
            slices, stages = 2, 2 if not memory else 3 if N > 32 * sms else 5 if w8a8 or few else 4
        scalars = M, N, K, x.stride(0), weight.stride(0), bool(K % (256 * slices) == 0), few, slices, 16, 16, 256
        tensors = x, weight, x_scale, scale, bias, y
        _enqueue(_sliced_gemm_kernel, -(-N // 16), tensors, scalars, num_warps=slices, num_stages=stages)
        return y
    tile, permuted, split, warps, stages = _tile(rows, N, K, w8a8, ieee, capability, sms)
    block_m, more_m, block_n, block_k = tile
    strides, more_x = (x.stride(0), weight.stride(0)), None
    if permuted:
        x = _for_tma(x) if permuted == 2 else _cast_rows(x, x.dtype, permuted=block_m + more_m)
        more_x = TensorDescriptor.from_tensor(x, [more_m, block_k]) if more_m else None
        x = TensorDescriptor.from_tensor(x, [block_m, block_k])
        weight = TensorDescriptor.from_tensor(_for_tma(weight), [block_n, block_k])
    out = y if split == 1 else y.new_empty(split, M, N, dtype=torch.int32 if w8a8 else torch.float32)
    whole, few = bool(K % block_k == 0), rows <= (0 if N <= 16 * sms else 4)
    scalars = M, N, K, *strides, ieee, permuted, whole, few, split, *tile
    tensors, programs = (x, more_x, weight, x_scale, scale, bias, out), -(-M // (block_m + more_m)) * -(-N // block_n)
    _enqueue(_gemm_kernel, programs * split, tensors, scalars, num_warps=warps, num_stages=stages)
    if split > 1:
        _enqueue(_add_parts_kernel, M * -(-N // 1024), (out, x_scale, scale, bias, y), (M, N, split, 1024), num_warps=4)
    return y


def _int8_gemm_row(x, weight, scale, bias, y, w8a8, sms):
    """Fills y, one row."""
    K, N = x.shape[1], weight.shape[0]
    # As many programs as the SMs hold at once, where they can: (16384, 6144) 29.7 us (H200), by 4 channels and 1024
    # columns 35.3. (4096, 14336) 19.1, where to read the weight takes 17.0
    row = _row_block(K) if w8a8 and K <= 16384 else 0  # in one launch: the host's time of a call 21 us, by two 37
    if row and K > 8192:
        block_n, block_k, warps = (8, 2048, 4) if N <= 40 * sms else (8, 1024, 4)
    elif row and N > 72 * sms:
        block_n, block_k, warps = (16, 512, 2) if N <= 144 * sms else (8, 1024, 4)
    elif row:
        block_n, block_k, warps = (4, 2048, 4) if N <= 20 * sms else (8, 512, 2) if K % 1024 else (8, 1024, 4)
    elif N <= 20 * sms:
        block_n, block_k, warps = 2, 2048, 4
    elif K % 1024 and K <= 8192:
        block_n, block_k, warps = 4, 512, 2
    elif N <= 40 * sms or N > 144 * sms or (w8a8 and K % 1024):  # W8A8, (29568, 8192): 72, with 8 channels 83
        block_n, block_k, warps = 4, 1024, 4
    else:
        block_n, block_k, warps = (8, 1024, 4) if N <= 72 * sms else (8, 512, 2)
    x, x_scale = _quantize_rows(x) if w8a8 and not row else (x, None)
    scalars = N, K, weight.stride(0), row, bool(K % block_k == 0), block_n, block_k
    _enqueue(_one_row_kernel, -(-N // block_n), (x, weight, x_scale, scale, bias, y), scalars, num_warps=warps)


def _tile(M: int, N: int, K: int, w8a8: bool, ieee: bool, capability: tuple[int, int], sms: int):
    """For _gemm_kernel: (BLOCK_M, MORE_M, BLOCK_N, BLOCK_K), PERMUTED, SPLIT, warps and stages."""
    memory, widest = capability[0] in (9, 10), N > 128 * sms
    block_m = 16 if M <= 16 else 32 if M <= 32 or ieee else 64 if M <= 64 or (w8a8 and memory) else 128
    more_m, block_n, block_k, warps, stages, permuted = 0, 64, 128, 4, 4 if memory else 3, 0
    if ieee:
        block_k, warps, stages = 32, 4 if M <= 16 else 8, 2
    elif w8a8 and block_m == 128:
        block_n, block_k, warps = 128, 64, 8
    elif w8a8:  # all tiles at once, up to four on an SM: (3584, 18944), M = 64: 28.3 us (H200), with six stages 32.4
        stages = 3 if not memory or N > 192 * sms else 4 if widest else 6
    elif M <= 16:  # us at (8192, 28672): 70, by the second tile 75; (8192, 10240) 33, by the first 40
        block_n, block_k, warps, stages = (
            (32, 128, 2, 6) if not memory else (64, 256, 2, 3) if widest else (32, 256, 2, 4)
        )  # fmt: skip
    elif capability[0] != 9:
        warps, stages = (4, stages) if M <= 64 else (4, 3) if memory else (8, 2)
    elif M <= 64:
        rule = _few_rows_tile if torch.compiler.is_compiling() else _few_rows_tile_cached
        block_n, split, stages = rule(M <= 32, N, K, sms)
        # no launch for the order of x: (4096, 4096), M = 32: 11.7, with it 12.9; (2048, 2048), M = 64: 8.3 and 9.2
        brief = not _OLD_TRITON and (N * K <= 2**23 or (block_n == 128 and split > 1))  # 3.4 would spill
        return (block_m, 0, block_n, block_k), 2 if M <= 32 or brief else 1, split, warps, stages
    elif parts := _small_parts(M, N, K, sms):
        return (64, 0, 64, 128), 2, parts, 4, 4
    elif M <= 128:
        block_n, block_k, stages, permuted = *((128, 64, 4) if widest else (64, 128, 3)), 1
    else:
        # (BLOCK_M, MORE_M, BLOCK_N, BLOCK_K, stages) and its ns for 10 of K: the least time, that to add parts of K up
        # included, is taken: within 2 % of the best in 45 products, M = 192 to 640
        least, permuted, choices = None, 1, (
            ((128, 0, 64, 128, 3), 35), ((128, 64, 64, 64, 4), 56), ((256, 0, 64, 64, 3), 61),
            ((128, 0, 128, 64, 4), 62),
        )  # fmt: skip
        for tile, ns in choices[: 4 if widest else 3 if N > 16 * sms else 2]:
            tiles = -(-M // (tile[0] + tile[1])) * -(-N // tile[2])
            parts = _parts(tiles, M, N, K, False, sms)
            turns = 1 if tiles * parts <= sms else 2 * -(-tiles * parts // (2 * sms))
            time = turns * (K * ns // parts + 10000) + (30000 + parts * M * N // 75 if parts > 1 else 0)
            if least is None or time < least:
                (block_m, more_m, block_n, block_k, stages), least = tile, time
    tiles = -(-M // (block_m + more_m)) * -(-N // block_n)
    split = 1 if M <= 16 or ieee else _parts(tiles, M, N, K, w8a8, sms)
    return (block_m, more_m, block_n, block_k), permuted, split, warps, stages


def _small_parts(M: int, N: int, K: int, sms: int) -> int:
    """Parts of K for small products of 65 to 256 rows by tiles of 64 x 64; 0 where other tiles are faster. us (H200):
    (1024, 4096), M = 128: 8.8, else 12.4; (4096, 256), M = 256: 8.2 and 12.7; 1.02 of the others' time at most."""
    parts = _one_of(range(1, 9), max(1, min(8, sms // (-(-M // 64) * -(-N // 64)), K // 256)))
    return parts if 64 < M <= 256 and N * K <= 2**22 and K < 1536 * parts and not _OLD_TRITON else 0


def _few_rows_tile(fewer: bool, N: int, K: int, sms: int) -> tuple[int, int, int]:
    """BLOCK_N, parts of K and stages for 17 to 64 rows (fewer: at most 32): what leaves the fewest SMs idle."""
    # us (H200), M = 32: (14336, 3072) by 64 channels, eight parts and three programs on an SM 20.8, five and two 22.4;
    # (8192, 10240) by 128 channels and three parts 33.9, whole 40
    most = 0
    for block_n, programs, stages in ((64, 2, 5), (64, 3, 4), (128, 2, 4)):
        room, tiles = programs * sms, -(-N // block_n)
        parts = max(1, min(8, room // tiles, max(K // 512, min(sms // tiles, K // 320))))
        turns = -(-parts * tiles // room)
        busy = parts * tiles / (turns * room)
        if block_n == 128:  # where as many are: (28672, 8192), M = 32: 71 in four parts, by 64 channels in two 87
            busy *= 1.03 if parts > 1 and (K > 8192 or (fewer and N > 64 * sms)) else 0.97
        elif turns > 1:
            busy *= 0.9
        if busy > most and (programs == 2 or fewer):
            most, choice = busy, (block_n, parts, stages)
    return choice[0], _one_of(range(1, 9), choice[1]), choice[2]


_few_rows_tile_cached = functools.cache(_few_rows_tile)


def _parts(tiles: int, M: int, N: int, K: int, w8a8: bool, sms: int) -> int:
    """How many programs share a tile, so that each SM has two; their sums are then added up."""
    # us: W8A8, M = 192, whole (2304, 1024) 9.3, in four 10.2; M = 64, in two (3584, 3584) 11.3, in four 12.2
    if N > 64 * sms or tiles > sms or (w8a8 and (K < 1024 or M * N > 75 * K)):
        return 1
    if w8a8:
        return 4 if 4 * tiles <= sms or (2 * tiles <= sms and K > 5000) else 2
    if 4 * tiles <= sms and M <= 192 and K >= 1024 and M * N <= 100 * K:
        return 8
    if sms < 2 * tiles:
        return 3 if 3 * tiles <= 2 * sms else 2
    return 4 if 2 * tiles <= sms else 2


@functools.cache
def _groups_rule(M: int, N: int, K: int, sms: int) -> tuple[int, int, int, int]:
    """BLOCK_M, MORE_M, GROUPS and parts of K: the tile that takes least. In 93 products, M = 100 to 1024, within 2 % of
    the best."""
    least, tiles_ns = None, (  # the tile, what 64 of K and what its end take (H200)
        ((256, 0, 2), 640, 3100), ((128, 0, 2), 360, 2500), ((128, 0, 3), 500, 2300),
        ((256, 64, 2), 820, 3600), ((128, 64, 2), 490, 2700), ((128, 64, 3), 700, 4000),
    )  # fmt: skip
    for (block_m, more_m, groups), step, end in tiles_ns:
        for parts in (1, 2, 3, 4):
            tiles = -(-M // (block_m + more_m)) * -(-N // (64 * groups)) * parts
            time = -(-tiles // sms) * (K // 64 * step // parts + end)
            time += 3400 + parts * M * N // 870 if parts > 1 else 0  # the parts' sums are added up
            if least is None or time < least:
                choice, least = (block_m, more_m, groups, parts), time
    return choice


@functools.cache
def _layout(swizzle: int, bits: int):
    """Shared memory as TMA writes it and the tensor cores read it; 2.4 us to build."""
    return gl.NVMMASharedLayout(swizzle, bits, 2)


def _int8_gemm_groups(x, weight, scale, bias, y, sms):
    """Fills y. x in 16 bits, on Hopper."""
    # us by this and by the other kernels (H200), (4096, 14336), M = 128, 640: 32, 114 and 41, 156; M = 192 with the 64
    # more rows 39, without 47. From N / 4 rows on, to put x in order takes as long as to widen the weight; up to 1536
    # this is faster all the same: (14336, 4096), M = 1100: 185 and not 271
    (M, K), N = x.shape, weight.shape[0]
    block_m, more_m, groups, parts = _groups_rule(M, N, K, sms)
    x, weight = _cast_rows(x, x.dtype, permuted=block_m + more_m), _for_tma(weight)
    out = y if parts == 1 else y.new_empty(parts * x.shape[0], N, dtype=torch.float32)
    x_desc = GluonDescriptor.from_tensor(x, [block_m, 64], _layout(128, 16))
    tensors = (
        x_desc, GluonDescriptor.from_tensor(x, [more_m, 64], _layout(128, 16)) if more_m else x_desc,
        GluonDescriptor.from_tensor(weight, [64, 64], _layout(64, 8)),
        GluonDescriptor.from_tensor(out, [64, 64], _layout(128, 8 * out.element_size())),
        scale, scale if bias is None else bias,
    )  # fmt: skip
    stages = (232000 - 4096 * groups * out.element_size()) // (128 * (block_m + more_m) + 4096 * groups)
    scalars = M, N, K, parts, parts == 1 and bias is not None, parts == 1, groups, block_m, more_m, stages
    programs = min(sms, x.shape[0] // (block_m + more_m) * -(-N // (64 * groups)) * parts)
    _enqueue(_gemm_groups_kernel, programs, tensors, scalars, num_warps=4)
    if parts > 1:
        scalars = x.shape[0], N, parts, 1024
        _enqueue(_add_parts_kernel, M * -(-N // 1024), (out, None, scale, bias, y), scalars, num_warps=4)


def _int8_gemm_tma(x, weight, x_scale, scale, bias, y, capability, sms):
    """Fills y. x is int8 (W8A8) or 16 bits: then the weight is widened once into a temporary of that type."""
    (M, K), N = x.shape, weight.shape[0]
    if x.dtype != torch.int8:  # us for 4096 x 14336: 44, where F.linear takes 155 with 1024 rows and 311 with 2048
        weight = _cast_rows(weight, x.dtype)
    x, weight = _for_tma(x), _for_tma(weight)
    # BLOCK_M, BLOCK_N, warps, stages, programs on an SM, and the relative time of a round of these. The least total is
    # the fastest of 167 products (M = 192 to 4096) or within 4 % of it, once 7 %. us, W8A8 at (4096, 14336), M = 300,
    # 2048: (64, 128) 47, 203, (128, 128) 54, 175
    if x.dtype != torch.int8 and _OLD_TRITON:  # 3.4 wants 295 kB for 128 x 256, on sm_100 246 for 128 x 128
        choices = ((64, 128, 4, 4, 2, 1),)
    elif x.dtype != torch.int8 and capability[0] == 9:  # sm_100 would spill
        choices = (64, 128, 4, 4, 1, 22), (128, 128, 4, 6, 1, 32), (128, 256, 8, 4, 1, 58)
    else:
        choices = (64, 128, 4, 4, 2, 60), (128, 128, 8, 3 if y.element_size() == 2 else 2, 2, 100)
    rows, block_k, least = _rule_rows(M), 128 // x.element_size(), None
    for choice in choices:
        tiles = -(-rows // choice[0]) * -(-N // choice[1])
        time = -(-tiles // (choice[4] * sms)) * choice[5]
        if least is None or time < least:
            (block_m, block_n, warps, stages, per_sm, _), least = choice, time
    tensors = (
        TensorDescriptor.from_tensor(x, [block_m, block_k]),
        TensorDescriptor.from_tensor(weight, [block_n, block_k]),
        TensorDescriptor.from_tensor(y, [block_m, block_n // 2]),
        x_scale, scale, bias,
    )  # fmt: skip
    programs = min(per_sm * sms, -(-M // block_m) * -(-N // block_n))
    scalars = M, N, K, block_m, block_n, block_k
    _enqueue(_gemm_tma_kernel, programs, tensors, scalars, num_warps=warps, num_stages=stages)


def _for_tma(t: Tensor) -> Tensor:
    """t, or a copy if its rows do not start at multiples of 16 bytes (traced: unless contiguous)."""
    start = not t.is_contiguous() if torch.compiler.is_compiling() else t.data_ptr() % 16
    each = 16 if _INTERPRET else 16 // t.element_size()  # Triton 3.4's interpreter counts elements
    if not start and t.stride(0) % each == 0 and t.stride(0) > 0:
        return t
    return t.new_empty(t.shape[0], -(-t.shape[1] // each) * each)[:, : t.shape[1]].copy_(t)


class _Int8Gemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_int8, scale, bias, quantize_activations):
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(weight_int8, scale)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _int8_gemm_triton(x, weight_int8, scale, bias, quantize_activations)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dequantize(*ctx.saved_tensors, grad.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, None, None, grad_bias, None


def int8_gemm(
    x: Tensor, weight_int8: Tensor, scale: Tensor, bias: Tensor | None = None, *, quantize_activations: bool = False
) -> Tensor:
    """x @ (weight_int8 * scale).T + bias, in x.dtype.

    Args:
        x: (..., K), fp32/fp16/bf16. weight_int8: (N, K) int8. scale: (N,) float32. bias: (N,) float or None.
        quantize_activations: False: x as it is, the weight widened (W8A16). True: x is quantised per row to int8 and
            the int8 tensor cores multiply, sums exact (W8A8).
    Returns:
        (..., N), in the autocast dtype under autocast, as F.linear. Differentiable in x and bias; the rounding of x
        passes its gradient straight through. Raises: ValueError, TypeError.
    """
    if getattr(weight_int8, "dtype", None) != torch.int8:
        raise TypeError(f"weight_int8 must be an int8 tensor, got {getattr(weight_int8, 'dtype', type(weight_int8))}")
    if weight_int8.ndim != 2:
        raise ValueError(f"weight_int8 must have shape (N, K), got {tuple(weight_int8.shape)}")
    N, K = weight_int8.shape
    _check_float("x", x)
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"x must have shape (..., {K}) to go with weight_int8 {(N, K)}, got {tuple(x.shape)}")
    if getattr(scale, "dtype", None) != torch.float32:
        raise TypeError(f"scale must be a float32 tensor, got {getattr(scale, 'dtype', type(scale))}")
    if scale.shape != (N,):
        raise ValueError(f"scale must have shape {(N,)}, got {tuple(scale.shape)}")
    if bias is not None:
        _check_float("bias", bias)
        if bias.shape != (N,):
            raise ValueError(f"bias must have shape {(N,)}, got {tuple(bias.shape)}")
    if weight_int8.device != x.device or scale.device != x.device or (bias is not None and bias.device != x.device):
        devices = weight_int8.device, scale.device, None if bias is None else bias.device
        raise ValueError(f"weight_int8, scale and bias must be on x's device {x.device}, got {devices}")
    if scale.requires_grad and torch.is_grad_enabled():
        raise ValueError("scale must not require a gradient: int8_gemm is differentiable in x and bias alone")
    device_type = x.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        x = x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device_type))
        with torch.autocast(device_type, enabled=False):
            return int8_gemm(x, weight_int8, scale, bias, quantize_activations=quantize_activations)
    if (
        not _kernel_serves(x, weight_int8, scale, bias) or not x.numel() or not N
        or (_INTERPRET and x.dtype == torch.bfloat16)  # the interpreter's tl.dot multiplies bfloat16 wrongly
        or (quantize_activations and (K > 131072 or _gpu(x)[0] < (8, 0)))  # int32 holds 2^31 / 128^2 products
    ):  # fmt: skip
        return int8_gemm_torch(x, weight_int8, scale, bias, quantize_activations=quantize_activations)
    if x.is_cuda and not torch.compiler.is_compiling() and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):  # Triton launches on the current device, not on x's
            return int8_gemm(x, weight_int8, scale, bias, quantize_activations=quantize_activations)
    rows = x if x.ndim == 2 else x.reshape(-1, K)
    grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    y = (_Int8Gemm.apply if grad else _int8_gemm_triton)(rows, weight_int8, scale, bias, quantize_activations)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], N)


class Int8Linear(nn.Module):
    """nn.Linear with an int8 weight (buffers weight_int8 and weight_scale) and, if asked for, a trainable bias.

    The weight is all zeros until quantize_weights or load_state_dict fills it. `.to(dtype)` and `.half()` cast the bias
    alone: int8 stays int8 and the scales stay float32.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, *, quantize_activations: bool = False,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if in_features < 0 or out_features < 0:
            raise ValueError(f"in_features and out_features must not be negative, got {in_features} and {out_features}")
        self.in_features, self.out_features = in_features, out_features
        self.quantize_activations = quantize_activations
        self.register_buffer("weight_int8", torch.zeros(out_features, in_features, device=device, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(out_features, device=device, dtype=torch.float32))
        bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", bias)
        self.register_parameter("weight", None)  # T5 asks whether its wo has one

    @torch.no_grad()
    def quantize_weights(self, weight: Tensor) -> None:
        """Fills the buffers from a float weight (out_features, in_features)."""
        _check_float("weight", weight)
        if weight.shape != self.weight_int8.shape:
            raise ValueError(f"weight must have shape {tuple(self.weight_int8.shape)}, got {tuple(weight.shape)}")
        if weight.is_meta != self.weight_int8.is_meta:
            raise ValueError(f"weight must be on {self.weight_int8.device}, got {weight.device}")
        quantized, scale = quantize_weight_per_channel(weight)
        self.weight_int8.copy_(quantized)
        self.weight_scale.copy_(scale)

    def _apply(self, fn, recurse=True):
        kept = {name: self._buffers[name] for name in ("weight_int8", "weight_scale")}
        super()._apply(fn, recurse)
        for name, was in kept.items():
            if self._buffers[name].dtype != was.dtype:  # fn casts: take only its move to another device
                self._buffers[name] = was.to(self._buffers[name].device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return int8_gemm(
            x, self.weight_int8, self.weight_scale, self.bias, quantize_activations=self.quantize_activations
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"quantize_activations={self.quantize_activations}"
        )


class QuantizedLinear(Int8Linear):
    """Int8Linear made from a trained nn.Linear."""

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, quantize_activations: bool = False) -> "QuantizedLinear":
        """A bias parameter is taken over as it is, the weight quantised; the linear is left alone."""
        weight = getattr(linear, "weight", None)
        floats = isinstance(weight, Tensor) and weight.is_floating_point()
        if not floats or weight.ndim != 2 or not hasattr(linear, "in_features"):
            raise TypeError(f"linear must be an nn.Linear with a float weight, got {type(linear).__name__}")
        new = cls(0, 0, quantize_activations=quantize_activations, device="meta")
        new.in_features, new.out_features = linear.in_features, linear.out_features
        with torch.inference_mode(False):  # its tensors could not be saved for a backward
            new.weight_int8, new.weight_scale = quantize_weight_per_channel(weight.detach())
        bias = linear.bias  # a parametrised or pruned one is a plain tensor
        new.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return new.train(linear.training)


def quantize_model(
    model: nn.Module, skip: tuple[str, ...] | None = ("lm_head",), *, quantize_activations: bool = False
) -> list[str]:
    """Swaps every nn.Linear of the model for a QuantizedLinear, in place, and returns the names that it converted.

    Left alone: subclasses of nn.Linear, a weight that another module holds too (tied embeddings), that is a tensor
    subclass (sharded) or not of 16, 32 or 64 bits, a weight or bias that is pruned, and what `skip` names: a module's
    qualified name, its last part, or either of a module above it (with or without torch.compile's "_orig_mod"). A
    Linear that torch.compile wraps by itself is left alone, too. A Linear whose weight its parent reads itself (those
    of nn.TransformerEncoderLayer) wants to be in `skip`. Hooks of a swapped module are not taken over.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    one = isinstance(skip, str) or not hasattr(skip, "__iter__")
    skipped = set() if skip is None else {None} if one else set(skip)
    if not all(isinstance(name, str) for name in skipped):
        raise TypeError(f"skip must be a sequence of names, got {skip!r}")
    if type(getattr(model, "_orig_mod", model)) is nn.Linear:
        raise ValueError("model must hold its nn.Linear modules, got one itself: use QuantizedLinear.from_linear")
    owners: dict[tuple, set[int]] = {}  # where a tensor's memory starts -> the modules that hold it

    def memory(p):
        return p.untyped_storage()._cdata, p.storage_offset()

    for module in model.modules():
        for p in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if p.layout == torch.strided and not nn.parameter.is_lazy(p):  # no Linear's weight is sparse or lazy
                owners.setdefault(memory(p), set()).add(id(module))
    found, names, left = {}, [], set()
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter:
            continue
        if not isinstance(module.bias, nn.Parameter | None):  # pruned, say
            continue
        parts = name.split(".")
        plain = [part for part in parts if part != "_orig_mod"]
        above = {".".join(path[: i + 1]) for path in (parts, plain) for i in range(len(path))}
        found.setdefault(id(module), (module, []))[1].append(name)
        names.append((name, id(module)))
        if (
            parts[-1] == "_orig_mod"  # its compiled wrapper would go on running the float one
            or skipped & above.union(parts) or len(owners.get(memory(module.weight), ())) > 1
            or module.weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        ):  # fmt: skip
            left.add(id(module))  # under its other names, too
    for key in [key for key in found if key not in left]:
        module, places = found.pop(key)  # only the model still holds it: each float weight is freed before the next
        new = QuantizedLinear.from_linear(module, quantize_activations=quantize_activations)
        for name in places:  # a module used in two places stays one module
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new)
    return [name for name, key in names if key not in left]
