"""RMSNorm, alone or of a residual sum.

    rmsnorm:                 y = x / sqrt(mean(x^2) + eps) * (offset + weight)          x (..., N), weight (N,)
    rmsnorm_residual_fused:  the same of h = x + residual, which it returns on request: what a pre-norm block needs

Cost. Memory-bound: x is read once and y written once, 2 * M * N * itemsize bytes (4 * M * N with the residual and h);
backward 3 * M * N: x and dy in, dx out. Long rows are read twice, the second time from L1 or L2.
Numerics. float32 inside, one rounding, at the end (casting="llama": see rmsnorm).
Backward: with g = dy * (offset + weight) and xhat = x * rstd, dx = rstd * (g - xhat * mean(g * xhat)); the weight's
gradient is summed in float32, one partial sum for each program, without atomics: the same bits every time.
Sources: Zhang and Sennrich, https://arxiv.org/abs/1910.07467; LlamaRMSNorm and Gemma's offset of 1 as in
https://github.com/huggingface/transformers (models/llama, models/gemma).
"""

import numbers
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
_OLD_TRITON = triton is not None and tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 6)


def rmsnorm_torch(
    x: Tensor, weight: Tensor | None = None, eps: float | None = 1e-6, *, offset: float = 0.0, casting: str = "torch"
) -> Tensor:
    """Twin of rmsnorm."""
    return _normalise(x, weight, eps, offset, casting, x.dtype)


def rmsnorm_residual_torch(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float | None = 1e-6, *, offset: float = 0.0,
    casting: str = "torch", return_residual: bool = False
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Twin of rmsnorm_residual_fused."""
    h = (x.to(torch.promote_types(x.dtype, torch.float32)) + residual).to(residual.dtype).contiguous()
    y = _normalise(h, weight, eps, offset, casting, x.dtype)
    return (y, h) if return_residual else y


def _normalise(h, weight, eps, offset, casting, dtype):
    h = h.to(torch.promote_types(torch.promote_types(h.dtype, dtype), torch.float32))
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + _eps(h, eps))
    if casting == "llama":
        y = y.to(dtype).to(h.dtype)
    return (y if weight is None else y * (offset + weight.to(h.dtype))).to(dtype).contiguous()


def _eps(x, eps):
    # PyTorch's own default: the epsilon of the dtype that the sum is taken in
    return torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if eps is None else eps


if triton is not None:

    @triton.jit
    def _load_sum(x_ptr, res_ptr, h_ptr, at, mask, POLICY: tl.constexpr):
        """x, or x + residual in the residual's precision, which goes to h_ptr."""
        x = tl.load(x_ptr + at, mask, 0.0, eviction_policy=POLICY)
        h = x.to(tl.float32)
        if res_ptr is not None:
            res = tl.load(res_ptr + at, mask, 0.0, eviction_policy=POLICY)
            if x.dtype == tl.bfloat16 and res.dtype == tl.float16:
                # By its bits: LLVM turns a plain conversion into a float16 addition, x rounded to float16 first
                h = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
            h = (h + res.to(tl.float32)).to(res.dtype).to(tl.float32)
        if h_ptr is not None:
            tl.store(h_ptr + at, h, mask)
        return h

    @triton.jit
    def _load_weight(w_ptr, cols, mask, offset, CACHE: tl.constexpr):
        w = 1.0
        if w_ptr is not None:
            POLICY: tl.constexpr = "" if CACHE == ".cg" else "evict_last"
            w = tl.load(w_ptr + cols, mask, 0.0, cache_modifier=CACHE, eviction_policy=POLICY).to(tl.float32)
            w += tl.cast(offset, tl.float32)
        return w

    @triton.jit
    def _store_y(y_ptr, at, xhat, w, mask, LLAMA: tl.constexpr, POLICY: tl.constexpr):
        if LLAMA:
            xhat = xhat.to(y_ptr.dtype.element_ty).to(tl.float32)
        tl.store(y_ptr + at, xhat * w, mask, eviction_policy=POLICY)

    # M is not specialised: a new number of rows never recompiles. res, w, h and rstd may be None
    @triton.jit(do_not_specialize=["M"])
    def _rmsnorm_fwd_kernel(
        x_ptr, res_ptr, w_ptr, y_ptr, h_ptr, rstd_ptr, stride_xm, stride_rm, M, eps, offset,
        N: tl.constexpr, LLAMA: tl.constexpr, AGAIN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
        UNROLL: tl.constexpr
    ):  # fmt: skip
        rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        cols = tl.arange(0, BLOCK_N)[None, :]
        x_ptr += rows * stride_xm
        y_ptr += rows * N
        if res_ptr is not None:
            res_ptr += rows * stride_rm
        if h_ptr is not None:
            h_ptr += rows * N
        # A long row is read twice: only its last block stays in registers, the others come from L1 the second time. In
        # fewer registers more rows run at once on a processor: 130 us at 4096x32768 (H200), 141 with whole rows held.
        # A row that fills L1 gets it to itself: weight and y bypass it. 149 us at 1024x131072, else 172
        LAST: tl.constexpr = (N - 1) // BLOCK_N * BLOCK_N
        ONCE: tl.constexpr = "evict_first" if N >= 4 * BLOCK_N else ""
        CACHE: tl.constexpr = ".cg" if N >= 4 * BLOCK_N else ""
        squares = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in tl.range(0, LAST, BLOCK_N, loop_unroll_factor=UNROLL):
            h = _load_sum(x_ptr, res_ptr, h_ptr, start + cols, rows < M, "evict_last")
            squares = tl.fma(h, h, squares)  # the compiler's own choice to fuse may vary
        at = LAST + cols
        mask = (rows < M) & (at < N)
        h = _load_sum(x_ptr, res_ptr, h_ptr, at, mask, "evict_last" if AGAIN else ONCE)
        if not AGAIN:
            w = _load_weight(w_ptr, at, at < N, offset, CACHE)  # now, so that it arrives during the sum
        rstd = tl.rsqrt(tl.sum(tl.fma(h, h, squares), axis=1, keep_dims=True) / N + tl.cast(eps, tl.float32))
        if rstd_ptr is not None:
            tl.store(rstd_ptr + rows, rstd, rows < M)
        if AGAIN:
            h = _load_sum(x_ptr, res_ptr, None, at, mask, "evict_first")
            w = _load_weight(w_ptr, at, at < N, offset, CACHE)
        _store_y(y_ptr, at, h * rstd, w, mask, LLAMA, ONCE)
        if h_ptr is not None:  # one tensor to read again instead of two: 297 us at 1024x131072, else 347
            x_ptr, res_ptr = h_ptr, None
        for start in tl.range(0, LAST, BLOCK_N, loop_unroll_factor=UNROLL):
            h = _load_sum(x_ptr, res_ptr, None, start + cols, rows < M, "evict_first")
            w = _load_weight(w_ptr, start + cols, start + cols < N, offset, CACHE)
            _store_y(y_ptr, start + cols, h * rstd, w, rows < M, LLAMA, ONCE)

    @triton.jit
    def _mean(h_ptr, dy_ptr, w_ptr, rstd, N, offset, BLOCK_N: tl.constexpr, STAGES: tl.constexpr):
        """mean(g * xhat) of a row too long to hold whole."""
        sums = tl.zeros((1, BLOCK_N), tl.float32)
        for start in tl.range(0, N, BLOCK_N, num_stages=STAGES):
            at = start + tl.arange(0, BLOCK_N)[None, :]
            h = tl.load(h_ptr + at, at < N, 0.0, eviction_policy="evict_last").to(tl.float32)
            dy = tl.load(dy_ptr + at, at < N, 0.0, eviction_policy="evict_last").to(tl.float32)
            sums += h * (dy * _load_weight(w_ptr, at, at < N, offset, ""))  # h * dy alone might overflow
        return tl.sum(sums) * rstd / N

    @triton.jit
    def _rmsnorm_mean_kernel(
        h_ptr, w_ptr, rstd_ptr, dy_ptr, mean_ptr, stride_hm, stride_dym, N, offset,
        BLOCK_N: tl.constexpr, STAGES: tl.constexpr
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        h_ptr, dy_ptr, rstd = h_ptr + row * stride_hm, dy_ptr + row * stride_dym, tl.load(rstd_ptr + row)
        tl.store(mean_ptr + row, _mean(h_ptr, dy_ptr, w_ptr, rstd, N, offset, BLOCK_N, STAGES))

    # Each program walks over rows and sums its own row of dw (programs, N). It takes a row whole, in PIECES, or only
    # one block of its columns: then the means are given. w, mean, dh, dx, dres and dw may be None
    @triton.jit(do_not_specialize=["M", "programs"])
    def _rmsnorm_bwd_kernel(
        h_ptr, w_ptr, rstd_ptr, mean_ptr, dy_ptr, dh_ptr, dx_ptr, dres_ptr, dw_ptr, stride_hm, stride_dym, stride_dhm,
        M, N, programs, offset, LLAMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
        PIECES: tl.constexpr, STAGES: tl.constexpr
    ):  # fmt: skip
        first = tl.program_id(0) % programs
        cols = tl.arange(0, BLOCK_N)[None, :]
        piece = tl.arange(0, PIECES)[:, None]
        POLICY: tl.constexpr = "evict_first" if PIECES > 1 else ""
        # Longer rows load the weight anew, which frees registers: 181 us at 8192x12288, with it kept 189
        KEPT: tl.constexpr = PIECES == 1 and BLOCK_N <= 8192
        if PIECES == 1:
            cols += tl.program_id(0) // programs * BLOCK_N
        if KEPT:
            w = _load_weight(w_ptr, cols, cols < N, offset, "")
        dw = tl.zeros((BLOCK_M * PIECES, BLOCK_N), tl.float32)
        # Stages prefetch the next rows: 199 us at 16384x8192, without them 266
        for tile in tl.range(first, tl.cdiv(M, BLOCK_M), programs, num_stages=STAGES if PIECES == 1 else 1):
            rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None].to(tl.int64)
            rstd = tl.load(rstd_ptr + rows, rows < M, 0.0)
            h_row, dy_row = h_ptr + rows * stride_hm, dy_ptr + rows * stride_dym
            if mean_ptr is not None:
                mean = tl.load(mean_ptr + rows, rows < M, 0.0)
            elif PIECES > 1:  # the pieces are then read again
                mean = _mean(h_row, dy_row, w_ptr, rstd, N, offset, BLOCK_N, STAGES)
            for k in tl.static_range(PIECES):
                at = k * BLOCK_N + cols
                mask = (at < N) & (rows < M)
                xhat = tl.load(h_row + at, mask, 0.0, eviction_policy=POLICY).to(tl.float32) * rstd
                dy = tl.load(dy_row + at, mask, 0.0, eviction_policy=POLICY).to(tl.float32)
                if dw_ptr is not None:
                    part = dy * (xhat.to(dy_ptr.dtype.element_ty).to(tl.float32) if LLAMA else xhat)
                    dw += part if PIECES == 1 else tl.where(piece == k, part, 0.0)
                if dx_ptr is not None or dres_ptr is not None:
                    g = dy * (w if KEPT else _load_weight(w_ptr, at, at < N, offset, ""))
                    if PIECES == 1 and mean_ptr is None:
                        mean = tl.sum(g * xhat, axis=1, keep_dims=True) / N
                    dx = rstd * (g - xhat * mean)
                    if dh_ptr is not None:
                        dx += tl.load(dh_ptr + rows * stride_dhm + at, mask, 0.0).to(tl.float32)
                    if dx_ptr is not None:
                        tl.store(dx_ptr + rows * N + at, dx, mask)
                    if dres_ptr is not None:
                        tl.store(dres_ptr + rows * N + at, dx, mask)
        if dw_ptr is not None:
            at = piece * BLOCK_N + cols
            sums = dw if PIECES > 1 else tl.sum(dw, axis=0, keep_dims=True)
            tl.store(dw_ptr + first.to(tl.int64) * N + at, sums, at < N)

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


def _rows(t):
    """t itself where it is contiguous (a reshape costs a microsecond), else a matrix whose columns are adjacent."""
    if t is None or t.is_contiguous():
        return t
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _stride(t):
    return 0 if t is None else t.shape[-1] if t.is_contiguous() else t.stride(0)


def _block(N):
    return 1 << max(N - 1, 15).bit_length()  # the next power of 2, 16 at least


def _sum_rows(parts, dtype):
    """One small launch: PyTorch's sum and cast take 5.5 us for 132x4096 on an H200, this 3.6."""
    rows, N = parts.shape
    out = parts.new_empty(N, dtype=dtype)
    BLOCK_M = 64 if N <= 8192 else 16  # wide parts are few
    _enqueue(_sum_kernel, -(-N * BLOCK_M // 2048), (parts, out), (rows, N, BLOCK_M, 2048 // BLOCK_M), num_warps=8)
    return out


def _forward(x, residual, weight, eps, offset, casting, keep_h, keep_rstd):
    N = x.shape[-1]
    M = x.numel() // N
    y = torch.empty_like(x, memory_format=torch.contiguous_format)  # half the host's time of new_empty
    h = torch.empty_like(residual, memory_format=torch.contiguous_format) if keep_h else None
    rstd = x.new_empty(M, dtype=torch.float32) if keep_rstd else None
    # Rows of up to 8192 columns in one block, longer ones in halves of their power of two, 130 us at 4096x32768 (H200;
    # in quarters 136), or in quarters where they fill less than 3/4 of it, 291 us at 16384x18944 (in halves 325)
    BLOCK_N = _block(N)
    if N > 8192:
        widest = 65536 // x.element_size() // (1 if residual is None else 2)
        BLOCK_N = min(BLOCK_N // (2 if N >= BLOCK_N // 4 * 3 else 4), widest)
    # Rows that leave much of their block empty want few warps: 73 us at 65536x1152, by four 85
    num_warps = 2 if 512 < N < 2048 and N != 1024 else 4 if N <= 3072 else 8 if N <= 6144 else 16
    unroll = 1
    if N > 32768 and residual is None and torch.version.hip is None:  # 32 of AMD's warps would be too many threads
        # 133 us at 2730x49152, by 16 warps 168; unrolled, where all blocks are full, 141 at 1024x131072, else 149
        num_warps, unroll = 32, N // BLOCK_N - 1 if N % BLOCK_N == 0 and N <= 8 * BLOCK_N else 1
    BLOCK_M = max(2048 // BLOCK_N, 1)
    # Many rows of 3073 to 8192 columns are read twice, too, with the same bits: 250 us at 65536x4096, once 260. Few
    # are not: with a residual 17.0 us at 2048x4096, twice 18.2. Between, once is less steady: 9.2 to 11.3 us at
    # 2048x4096, twice 9.9 to 10.9
    again = 3072 < N <= 8192 and M >= (512 if residual is None else 4096)
    scalars = _stride(x), _stride(residual), M, eps, offset, N, casting == "llama", again, BLOCK_M, BLOCK_N, unroll
    _enqueue(_rmsnorm_fwd_kernel, -(-M // BLOCK_M), (x, residual, weight, y, h, rstd), scalars, num_warps=num_warps)
    return y, h, rstd


def _backward_tile(N, small, residual):
    """BLOCK_M, BLOCK_N, pieces, warps. Rows of up to 8192 are held whole, 16-bit ones of up to 16384. Longer ones go in
    blocks of columns, after a kernel for their means; small ones in pieces, read twice: 270 us at 4096x32768 (H200), in
    blocks 322."""
    if 8192 < N <= 16384 and small:  # 181 us at 8192x12288 (in pieces 272), with a residual 119 at 4096 (in blocks 164)
        return 1, 16384, 1, 16
    if 16384 < N <= 32768 and small and not residual and not _OLD_TRITON:  # Triton 3.4 spills 700 bytes
        return 1, 8192, _block(N) // 8192, 16
    BLOCK_N = _block(N) if N <= 8192 else 4096
    return 8192 // BLOCK_N, BLOCK_N, 1, 8


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, offset, casting):
        y, h, rstd = _forward(x, residual, weight, eps, offset, casting, residual is not None, True)
        ctx.save_for_backward(x if h is None else h, weight, rstd)
        ctx.options = x.dtype, offset, casting == "llama"
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)  # an unused h then has dh None, not a tensor of zeros
        if h is not None and not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(h)  # only the weight trains
        return y if h is None else (y, h)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh=None):
        h, weight, rstd = ctx.saved_tensors
        need_x, need_residual, need_w = ctx.needs_input_grad[:3]
        dtype, offset, llama = ctx.options
        shape, h, rstd = h.shape, _rows(h), rstd.contiguous()  # a hook for saved tensors may have changed their strides
        weight = weight if weight is None else weight.contiguous()
        dy, dh = h.new_zeros(shape, dtype=dtype) if dy is None else _rows(dy), _rows(dh)
        N = h.shape[-1]
        M = h.numel() // N
        shared = h.dtype == dtype  # then dx is the residual's gradient, too
        dx = h.new_empty(shape, dtype=dtype) if need_x or (need_residual and shared) else None
        dres = h.new_empty(shape) if need_residual and not shared else None
        processors, room = 4, 0
        if h.is_cuda:
            properties = torch.cuda.get_device_properties(h.device)
            processors, room = properties.multi_processor_count, properties.shared_memory_per_block_optin or 65536
        small = h.element_size() + dy.element_size() == 4
        BLOCK_M, BLOCK_N, pieces, num_warps = _backward_tile(N, small, dh is not None)
        blocks = -(-N // (BLOCK_N * pieces))
        programs = min(-(-M // BLOCK_M), max(processors // blocks, 1))
        # Load two tiles ahead, three where N is no full block, if shared memory has room: 71 us at 16384x2560, else 82;
        # but no whole rows of more than 8192, which leave no registers for it: a third more time at 8192x12288
        loaded = h, dy, dh, weight if N > 8192 else None
        stage = 8192 * sum(t.element_size() for t in loaded if t is not None)
        stages = 1 if BLOCK_N > 8192 else min(3 + (N < BLOCK_N), max((room - 16384) // stage, 0) + 1)
        mean = None
        if blocks > 1 and (need_x or need_residual):
            mean = torch.empty_like(rstd)
            scalars = _stride(h), _stride(dy), N, offset, 8192, stages
            _enqueue(_rmsnorm_mean_kernel, M, (h, weight, rstd, dy, mean), scalars, num_warps=16)
        dw = h.new_empty(programs, N, dtype=torch.float32) if need_w else None
        scalars = _stride(h), _stride(dy), _stride(dh), M, N, programs, offset, llama, BLOCK_M, BLOCK_N, pieces, stages
        tensors = h, weight, rstd, mean, dy, dh, dx, dres, dw
        _enqueue(_rmsnorm_bwd_kernel, programs * blocks, tensors, scalars, num_warps=num_warps)
        dw = _sum_rows(dw, weight.dtype) if need_w else None
        return dx if need_x else None, dx if need_residual and shared else dres, dw, None, None, None


def _dispatch(x, residual, weight, eps, offset, casting, keep_h):
    """Both functions, residual None for rmsnorm: (y, h or None)."""
    for name, t in (("x", x), ("residual", residual), ("weight", weight)):
        if t is None and name != "x":
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {t.device}")
    if x.dim() == 0:
        raise ValueError("x must have shape (..., N), got ()")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if weight is not None and weight.shape != (x.shape[-1],):
        raise ValueError(f"weight must have shape ({x.shape[-1]},), got {tuple(weight.shape)}")
    if casting not in ("torch", "llama"):
        raise ValueError(f"casting must be 'torch' or 'llama', got {casting!r}")
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        # To the dtype that autocast gives F.rms_norm: float32 in newer releases on CUDA
        x = x.to(F.rms_norm(x.new_empty(()).expand(0, 1), (1,)).dtype)
    if not _kernel_serves(x, residual, weight) or not x.numel():
        if residual is None:
            return rmsnorm_torch(x, weight, eps, offset=offset, casting=casting), None
        return rmsnorm_residual_torch(x, residual, weight, eps, offset=offset, casting=casting, return_residual=True)
    if x.is_cuda and not torch.compiler.is_compiling() and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):  # Triton launches on the current device, not on x's
            return _dispatch(x, residual, weight, eps, offset, casting, keep_h)
    shape, eps, offset = x.shape, float(_eps(x, eps)), float(offset)
    x, residual = _rows(x), _rows(residual)
    if residual is not None and x.dim() != residual.dim():
        x, residual = x.reshape(-1, shape[-1]), residual.reshape(-1, shape[-1])
    weight = weight if weight is None else weight.contiguous()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, weight)):
        y = _RMSNorm.apply(x, residual, weight, eps, offset, casting)
        y, h = (y, None) if residual is None else y
    else:
        y, h, _ = _forward(x, residual, weight, eps, offset, casting, keep_h, False)
    if y.dim() != len(shape):
        y, h = y.view(shape), h if h is None else h.view(shape)
    return y, h


def rmsnorm(
    x: Tensor, weight: Tensor | None = None, eps: float | None = 1e-6, *, offset: float = 0.0, casting: str = "torch"
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension, in x's dtype. Differentiable in x and
    weight.

    Args:
        x: (..., N), float16, bfloat16 or float32, any strides, rows of any length
        weight: (N,), any float dtype, or None for 1
        eps: None is PyTorch's own default, the epsilon of float32
        offset: added to the weight in float32; Gemma's is 1
        casting: "torch": one rounding, at the end, as torch.nn.RMSNorm; "llama": the normalised row is rounded to
            x.dtype before the weight multiplies it, as LlamaRMSNorm

    Raises: ValueError for shapes or devices that do not fit and an unknown casting; TypeError for dtypes.
    """
    return _dispatch(x, None, weight, eps, offset, casting, False)[0]


def rmsnorm_residual_fused(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float | None = 1e-6, *, offset: float = 0.0,
    casting: str = "torch", return_residual: bool = False
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """rmsnorm of x + residual, which is added in float32 and rounded to residual's dtype first; with
    return_residual=True the pair (y, x + residual). Differentiable in x, residual and weight, through both results.

    Args:
        x, weight, eps, offset, casting: as in rmsnorm; y has x's dtype
        residual: x's shape, any float dtype: a float32 residual stream stays float32

    Raises: as rmsnorm.
    """
    if residual is None:
        raise TypeError("residual must be a tensor, got NoneType")
    y, h = _dispatch(x, residual, weight, eps, offset, casting, return_residual)
    return (y, h) if return_residual else y


class TritonRMSNorm(nn.RMSNorm):
    """Drop-in for torch.nn.RMSNorm over one dimension: norm(x) -> y; norm(x, residual) -> (y, x + residual).

    The weight starts at 1 - offset (Gemma's, with offset=1, at 0); eps=None is PyTorch's own default.
    """

    def __init__(
        self, hidden_size: int | tuple[int], eps: float | None = 1e-6, elementwise_affine: bool = True, *,
        offset: float = 0.0, casting: str = "torch", device=None, dtype=None
    ):  # fmt: skip
        sizes = hidden_size if isinstance(hidden_size, list | tuple) else (hidden_size,)
        if not all(isinstance(n, numbers.Integral) for n in sizes):
            raise TypeError(f"hidden_size must be an int or hold one, got {hidden_size!r}")
        if len(sizes) != 1 or sizes[0] < 0:
            raise ValueError(f"hidden_size must be an int or hold one, and not be negative, got {hidden_size}")
        if casting not in ("torch", "llama"):
            raise ValueError(f"casting must be 'torch' or 'llama', got {casting!r}")
        self.offset, self.casting = offset, casting  # before nn.RMSNorm's own, which calls reset_parameters
        super().__init__(hidden_size, eps, elementwise_affine, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        if self.elementwise_affine:
            nn.init.constant_(self.weight, 1 - self.offset)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        options = {"offset": self.offset, "casting": self.casting}
        if isinstance(x, Tensor) and x.shape[-1:] != self.normalized_shape:  # without a weight nothing else notices
            raise ValueError(f"x must have shape (..., {self.normalized_shape[0]}), got {tuple(x.shape)}")
        if residual is None:
            return rmsnorm(x, self.weight, self.eps, **options)
        return rmsnorm_residual_fused(x, residual, self.weight, self.eps, return_residual=True, **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, offset={self.offset}, casting={self.casting!r}"
