"""SwiGLU and its relatives: act(gate) * up, elementwise (swiglu_fused) and as one product (fused_gated_mlp).

    swiglu_fused:     act(gate) * up                               gate, up (..., I), or packed (..., 2 * I)
    fused_gated_mlp:  act(x @ gate_weight.T) * (x @ up_weight.T)   x (..., K), weights (I, K), or packed (2 * I, K)

act is silu (x * sigmoid(x)), gelu (x * Phi(x)) or gelu_tanh (its tanh approximation). Weights lie as in nn.Linear.

Cost. Elementwise: memory-bound, 3 * itemsize bytes an element forward, 5 backward. Gated product: 4 * M * I * K
operations and (2 * I * K + M * K + M * I) * itemsize bytes: bound by the weights' bytes up to some 200 rows of x on an
H200, by the tensor cores from there on. Neither product reaches memory (but see _gated_mlp_rest), nor is x read twice.
Numerics. float32 inside, products included (IEEE, no TF32), and one rounding, at the end. Under autograd the gated
product keeps gate and up for the backward pass, rounded to x.dtype as two nn.Linear would leave them.
Source: Shazeer, GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202
"""

import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton on this platform: the twins serve every call
    triton = None

# Triton's interpreter runs the kernels on CPU tensors; Triton reads the variable when it decorates a kernel
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def swiglu_torch(gate: Tensor, up: Tensor | None = None, activation: str = "silu") -> Tensor:
    """Twin of swiglu_fused."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (_ACTIVATIONS[activation](gate.to(wide)) * up.to(wide)).to(gate.dtype).contiguous()


def gated_mlp_torch(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor | None = None, activation: str = "silu"
) -> Tensor:
    """Twin of fused_gated_mlp."""
    if up_weight is None:
        gate_weight, up_weight = gate_weight.chunk(2)
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # it would take the products back to 16 bits
        with torch.autocast(x.device.type, enabled=False):
            return gated_mlp_torch(x, gate_weight, up_weight, activation)
    wide = torch.promote_types(x.dtype, torch.float32)
    gate, up = (F.linear(x.to(wide), w.to(wide)) for w in (gate_weight, up_weight))
    return (_ACTIVATIONS[activation](gate) * up).to(x.dtype)


if triton is not None:

    @triton.jit
    def _act(x, ACT: tl.constexpr, EXACT: tl.constexpr = False):
        if ACT == "gelu":
            y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
        else:  # x * sigmoid(z); gelu_tanh by (1 + tanh(u)) / 2 = sigmoid(2 * u)
            z = x if ACT == "silu" else 1.5957691216057308 * (x + 0.044715 * x * x * x)
            if EXACT:  # for float32: no further off than PyTorch; the other form is, by 1.1 times
                rest = tl.div_rn(tl.minimum(x, 3e38), 1 + tl.exp(tl.abs(z)))  # x * sigmoid(-abs(z)); 0 for inf
                y = tl.where(z > 0, x - rest, rest)
            else:
                y = x / (1 + tl.exp(-z))
        return y

    @triton.jit
    def _act_and_derivative(x, ACT: tl.constexpr):
        if ACT == "gelu":
            phi = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
            y = x * phi
            dy = phi + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
        else:  # x * sigmoid(z)
            z, slope = x, 1.0
            if ACT == "gelu_tanh":
                c = tl.minimum(tl.maximum(x, -20.0), 20.0)  # beyond, s is 0 or 1; a huge x would make 0 * inf = NaN
                z = 1.5957691216057308 * (c + 0.044715 * c * c * c)
                slope = 1.5957691216057308 + 0.21406444881780074 * c * c
            e = tl.exp(-tl.abs(z))
            q = 1 / (1 + e)  # s * (1 - s) = e * q * q without the cancellation of 1 - s
            s = tl.where(z > 0, 1 - e * q, e * q)
            y = x * s
            dy = s + x * (e * q * q) * slope
        return y, dy

    @triton.jit
    def _swiglu_fwd_kernel(
        gate_ptr, up_ptr, out_ptr, stride_gm, stride_um, stride_om, I, ACT: tl.constexpr, BLOCK: tl.constexpr
    ):
        blocks = tl.cdiv(I, BLOCK)
        row = (tl.program_id(0) // blocks).to(tl.int64)
        cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = cols < I
        gate = tl.load(gate_ptr + row * stride_gm + cols, mask).to(tl.float32)
        up = tl.load(up_ptr + row * stride_um + cols, mask).to(tl.float32)
        tl.store(out_ptr + row * stride_om + cols, _act(gate, ACT, out_ptr.dtype.element_ty == tl.float32) * up, mask)

    @triton.jit
    def _swiglu_bwd_kernel(
        dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,  # dgate and dup are None where nothing asks for them
        stride_dom, stride_gm, stride_um, stride_dm, I, ACT: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
        blocks = tl.cdiv(I, BLOCK)
        row = (tl.program_id(0) // blocks).to(tl.int64)
        cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = cols < I
        dout = tl.load(dout_ptr + row * stride_dom + cols, mask).to(tl.float32)
        act, derivative = _act_and_derivative(tl.load(gate_ptr + row * stride_gm + cols, mask).to(tl.float32), ACT)
        if dgate_ptr is not None:
            up = tl.load(up_ptr + row * stride_um + cols, mask).to(tl.float32)
            tl.store(dgate_ptr + row * stride_dm + cols, dout * up * derivative, mask)
        if PACKED:  # dup lies behind dgate
            tl.store(dgate_ptr + row * stride_dm + I + cols, dout * act, mask)
        elif dup_ptr is not None:
            tl.store(dup_ptr + row * stride_dm + cols, dout * act, mask)

    @triton.jit
    def _gated_row_kernel(
        x_ptr, gate_w_ptr, up_w_ptr, out_ptr, gate_ptr, up_ptr,  # gate, up: None, or what the backward pass needs
        stride_gi, stride_ui, I, K, ACT: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr
    ):  # fmt: skip
        """One row of x: plain products and sums, since a tensor core would waste 15 of its 16 rows."""
        offs_i = tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
        offs_k = tl.arange(0, BLOCK_K)
        mask_i = offs_i < I
        gate_w_ptrs = gate_w_ptr + offs_i[:, None] * stride_gi + offs_k[None, :]
        up_w_ptrs = up_w_ptr + offs_i[:, None] * stride_ui + offs_k[None, :]
        gate = tl.zeros((BLOCK_I, BLOCK_K), tl.float32)
        up = tl.zeros((BLOCK_I, BLOCK_K), tl.float32)
        for k in range(0, K, BLOCK_K):
            mask = mask_i[:, None] & (offs_k < K - k)[None, :]
            # weights are read once: evict_first spares what L2 holds for others, 62 instead of 66 us at 4096 x 14336
            gate_w = tl.load(gate_w_ptrs + k, mask, 0.0, eviction_policy="evict_first")
            up_w = tl.load(up_w_ptrs + k, mask, 0.0, eviction_policy="evict_first")
            x = tl.load(x_ptr + k + offs_k, offs_k < K - k, 0.0).to(tl.float32)[None, :]
            gate += gate_w.to(tl.float32) * x
            up += up_w.to(tl.float32) * x
        gate, up = tl.sum(gate, 1), tl.sum(up, 1)
        tl.store(out_ptr + offs_i, _act(gate, ACT) * up, mask_i)
        if gate_ptr is not None:
            tl.store(gate_ptr + offs_i, gate, mask_i)
            tl.store(up_ptr + offs_i, up, mask_i)

    @triton.jit
    def _add_product(total, rest, a, b):
        """total + a @ b in IEEE float32; the addition's error, rest, enters the next step's product (Kahan)."""
        # One chain of additions down the whole of K is up to nine times as far off as cuBLAS (K = 4099)
        step = tl.dot(a.to(tl.float32), b.to(tl.float32), rest, input_precision="ieee")
        new = total + step
        return new, tl.where(tl.abs(new) < float("inf"), step - (new - total), 0.0)  # an infinite sum has no rest

    @triton.jit(do_not_specialize=["M"])
    def _gated_mlp_kernel(
        x_ptr, gate_w_ptr, up_w_ptr, out_ptr, gate_ptr, up_ptr,  # as above
        stride_xm, stride_gi, stride_ui, M, I, K,
        ACT: tl.constexpr, IEEE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr
    ):  # fmt: skip
        # The weights are the left operand: with few rows of x they fill the tensor cores' longer side
        tiles_m = tl.cdiv(M, BLOCK_M)
        offs_m = (tl.program_id(0) % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_i = (tl.program_id(0) // tiles_m).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
        offs_k = tl.arange(0, BLOCK_K)
        mask_m, mask_i = (offs_m < M)[None, :], (offs_i < I)[:, None]
        x_ptrs = x_ptr + offs_m[None, :] * stride_xm + offs_k[:, None]
        gate_w_ptrs = gate_w_ptr + offs_i[:, None] * stride_gi + offs_k[None, :]
        up_w_ptrs = up_w_ptr + offs_i[:, None] * stride_ui + offs_k[None, :]
        zeros = tl.zeros((BLOCK_I, BLOCK_M), tl.float32)
        gate, gate_rest, up, up_rest = zeros, zeros, zeros, zeros
        for k in range(0, K, BLOCK_K):
            mask_k = offs_k < K - k
            x = tl.load(x_ptrs + k, mask_m & mask_k[:, None], 0.0)
            gate_w = tl.load(gate_w_ptrs + k, mask_i & mask_k[None, :], 0.0)
            up_w = tl.load(up_w_ptrs + k, mask_i & mask_k[None, :], 0.0)
            if IEEE:  # float32, and 16 bits where the tensor cores are older than Triton's support (sm_75)
                gate, gate_rest = _add_product(gate, gate_rest, gate_w, x)
                up, up_rest = _add_product(up, up_rest, up_w, x)
            else:
                gate, up = tl.dot(gate_w, x, gate), tl.dot(up_w, x, up)
        offs_out = offs_m[None, :] * I + offs_i[:, None]
        tl.store(out_ptr + offs_out, _act(gate, ACT) * up, mask_m & mask_i)
        if gate_ptr is not None:
            tl.store(gate_ptr + offs_out, gate, mask_m & mask_i)
            tl.store(up_ptr + offs_out, up, mask_m & mask_i)

    @triton.jit(do_not_specialize=["M"])
    def _gated_mlp_tma_kernel(
        x_desc, w_desc, out_desc, gate_desc, up_desc,  # gate, up: None, or what the backward pass needs
        M, end, K, ACT: tl.constexpr, UP_FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
        BLOCK_K: tl.constexpr
    ):  # fmt: skip
        """The columns before end, in tiles that the programs take in turns."""
        GROUP_M: tl.constexpr = 8  # rows of tiles that share the weights in L2; 2 costs 11 % at 2048 rows
        tiles_m, tiles_i = tl.cdiv(M, BLOCK_M), tl.cdiv(end, BLOCK_I)
        for tile in tl.range(tl.program_id(0), tiles_m * tiles_i, tl.num_programs(0), flatten=True):
            first = tile // (GROUP_M * tiles_i) * GROUP_M
            group = tl.minimum(tiles_m - first, GROUP_M)
            m = (first + tile % (GROUP_M * tiles_i) % group) * BLOCK_M
            # TMA is slow on rows past the end: the last tile moves up and computes some of its neighbour's rows again
            m = tl.maximum(tl.minimum(m, M - BLOCK_M), 0)
            i = tile % (GROUP_M * tiles_i) // group * BLOCK_I
            acc = tl.zeros((BLOCK_M, 2 * BLOCK_I), tl.float32)
            for k in range(0, tl.cdiv(K, BLOCK_K)):
                x = x_desc.load([m, k * BLOCK_K])
                # rows of gate stacked on rows of up: one product twice as wide, which the tensor cores do faster
                w = w_desc.load([0, i, k * BLOCK_K]).reshape(2 * BLOCK_I, BLOCK_K)
                acc = tl.dot(x, w.T, acc)
            gate, up = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_I)), (0, 2, 1)))
            if UP_FIRST:
                gate, up = up, gate
            if gate_desc is not None:  # before the activation, which is computed while gate is on its way: 2954 us
                gate_desc.store([m, i], gate.to(gate_desc.dtype))  # instead of 2984 at 8192 x 4096 x 14336
            out_desc.store([m, i], (_act(gate, ACT) * up).to(out_desc.dtype))
            if up_desc is not None:
                up_desc.store([m, i], up.to(up_desc.dtype))


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


def _rows(t):
    """t itself where it is contiguous (a reshape costs a microsecond), else a matrix whose columns are adjacent."""
    if t is None or t.is_contiguous():
        return t
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _extent(*tensors):
    """Rows, columns and row strides. Contiguous tensors count as one long row: no row's end then cuts a block short."""
    n = tensors[0].numel()
    for t in tensors:
        if not t.is_contiguous():
            I = tensors[0].shape[-1]
            return n // I, I, [_row_stride(t) for t in tensors]
    return 1, n, [n] * len(tensors)


def _row_stride(t):
    """That of the last leading dimension above 1: one of size 1 may have any stride, even in a contiguous tensor."""
    for d in range(t.dim() - 2, -1, -1):
        if t.shape[d] > 1:
            return t.stride(d)
    return t.shape[-1]


# Eight elements a thread are one 16-byte load of each input: 322 us forward at 16384 x 14336 bf16 (H200), as fast as a
# copy. Larger blocks and more warps lose up to 10 %, at odd widths up to half
_BLOCK = 1024


def _swiglu_forward(gate, up, activation, out=None):
    """gate and up as _rows leaves them; without up packed."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    if out is None:
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)  # half the host's time of new_empty
    M, I, strides = _extent(gate, up, out)
    _enqueue(_swiglu_fwd_kernel, M * -(-I // _BLOCK), (gate, up, out), (*strides, I, activation, _BLOCK), num_warps=4)
    return out


def _swiglu_backward(dout, gate, up, dgate, dup, activation):
    """Writes dgate and dup, one of which may be None. A dgate twice as wide as gate takes both: given as two views of
    one tensor, torch.compile would copy each into the kernel and back."""
    packed = dgate is not None and dgate.numel() == 2 * gate.numel()
    like = dup if dgate is None else dgate.chunk(2, dim=-1)[0] if packed else dgate
    M, I, strides = _extent(dout, gate, up, like)
    # more arithmetic for each byte wants longer blocks: 816 us instead of 833 at 16384 x 21504
    block = 2 * _BLOCK if activation == "gelu_tanh" else _BLOCK
    scalars = *strides, I, activation, packed, block
    _enqueue(_swiglu_bwd_kernel, M * -(-I // block), (dout, gate, up, dgate, dup), scalars, num_warps=4)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _swiglu_forward(gate, up, activation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        gate, up = ctx.saved_tensors
        dgate, dup = (gate.new_empty(gate.shape) if needed else None for needed in ctx.needs_input_grad[:2])
        gate, up = _rows(gate), _rows(up)  # a hook for saved tensors may have changed their strides
        if up is None:
            gate, up = gate.chunk(2, dim=-1)
        _swiglu_backward(_rows(dout), gate, up, dgate, dup, ctx.activation)
        return dgate, dup, None


def _check(activation, **tensors):
    if activation not in tuple(_ACTIVATIONS):
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    like = None
    for name, t in tensors.items():
        if t is None and name in ("up", "up_weight"):
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {t.dtype}")
        like = like or (name, t.device)
        if t.device != like[1]:
            raise ValueError(f"{name} must be on {like[0]}'s device {like[1]}, got {t.device}")


def swiglu_fused(gate: Tensor, up: Tensor | None = None, activation: str = "silu") -> Tensor:
    """act(gate) * up in one pass; the result has gate's dtype. Differentiable in gate and up.

    Args:
        gate: (..., I), float16, bfloat16 or float32, any strides; without up packed as (..., 2 * I), gate first
        up: gate's shape and dtype
        activation: "silu", "gelu" (erf) or "gelu_tanh"

    Raises: ValueError for shapes or devices that differ, an odd packed width, an activation; TypeError for dtypes.
    """
    _check(activation, gate=gate, up=up)
    if up is None and (gate.dim() == 0 or gate.shape[-1] % 2):
        raise ValueError(f"gate without up must be packed as (..., 2 * I), got shape {tuple(gate.shape)}")
    if up is not None and up.shape != gate.shape:
        raise ValueError(f"up must have gate's shape {tuple(gate.shape)}, got {tuple(up.shape)}")
    if up is not None and up.dtype != gate.dtype:
        raise TypeError(f"up must have gate's dtype {gate.dtype}, got {up.dtype}")
    if not _kernel_serves(gate, up) or not gate.numel():
        return swiglu_torch(gate, up, activation)
    if gate.is_cuda and not torch.compiler.is_compiling() and gate.get_device() != torch.cuda.current_device():
        with torch.cuda.device(gate.device):  # Triton launches on the current device, not on gate's
            return swiglu_fused(gate, up, activation)

    shape = gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2)
    gate, up = _rows(gate), _rows(up)
    if up is not None and gate.dim() != up.dim():
        gate, up = (t.reshape(-1, shape[-1]) for t in (gate, up))
    if torch.is_grad_enabled() and (gate.requires_grad or (up is not None and up.requires_grad)):
        out = _SwiGLU.apply(gate, up, activation)
    else:
        out = _swiglu_forward(gate, up, activation)
    return out if out.shape == shape else out.view(shape)


def _descriptors_serve(*tensors) -> bool:
    """True where TMA serves these matrices: 16 bits, Hopper or sm_100, rows that start at multiples of 16 bytes."""
    device = tensors[0].device
    if not _INTERPRET and (
        device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device)[0] not in (9, 10)
    ):
        return False
    for t in tensors:
        # data_ptr() can't be traced: the compiler aligns its own buffers and its inputs, though not their views
        if t is not None and (
            t.element_size() != 2 or t.stride(0) % (16 if _INTERPRET else 8) or t.stride(0) < t.shape[1]
            or (not t.is_contiguous() if torch.compiler.is_compiling() else t.data_ptr() % 16)
        ):  # fmt: skip
            return False
    return True


def _gated_mlp_forward(x, gate_weight, up_weight, activation, dtype, save):
    """(M, K) x and weights of one dtype -> (M, I) out of `dtype` and, for the backward pass, gate and up (or None)."""
    (M, K), I = x.shape, gate_weight.shape[0] // (2 if up_weight is None else 1)
    out = x.new_empty(M, I, dtype=dtype)
    made = [out, x.new_empty(M, I), x.new_empty(M, I)] if save else [out, None, None]
    if M > 1 and _descriptors_serve(x, gate_weight, up_weight, out):
        # One descriptor spans both weights, with their distance as a stride: so their strides must agree, and the
        # distance be below 2^40 bytes (addresses may lie further apart), which a traced call can't check. Otherwise a
        # packed copy (115 us at 4096 x 14336) pays off from 1000 rows; fewer take the kernel without descriptors
        near = up_weight is None or (
            not torch.compiler.is_compiling() and gate_weight.stride() == up_weight.stride()
            and abs(up_weight.data_ptr() - gate_weight.data_ptr()) < 2**40
        )  # fmt: skip
        if not near and M > 1024:
            gate_weight, up_weight, near = torch.cat((gate_weight, up_weight)), None, True
        if near:
            _gated_mlp_tma(x, gate_weight, up_weight, made, activation)
            return made
    if up_weight is None:
        gate_weight, up_weight = gate_weight.chunk(2)
    if M == 1:  # 17.0 us at 1536 x 8960 (H200; by 1024 18.5), 20.0 at 2048 x 8192 (by 512 20.6)
        block_k, warps = (512, 2) if K % 1024 else (1024, 4)
        scalars = gate_weight.stride(0), up_weight.stride(0), I, K, activation, 1, block_k
        _enqueue(_gated_row_kernel, I, (x, gate_weight, up_weight, *made), scalars, num_warps=warps)
        return made
    old = x.is_cuda and not torch.version.hip and torch.cuda.get_device_capability(x.device) < (8, 0)
    ieee = x.dtype == torch.float32 or old
    if ieee:
        BLOCK_M, BLOCK_I, BLOCK_K, warps, stages = (16, 32, 32, 4, 3) if M <= 16 else (64, 32 if old else 64, 32, 8, 2)
    elif M <= 64:
        BLOCK_M, BLOCK_I, BLOCK_K, warps, stages = (16, 32, 128, 4, 4) if M <= 16 else (64, 64, 64, 4, 3)
    else:
        BLOCK_M, BLOCK_I, BLOCK_K, warps, stages = 128, 64, 64, 8, 3
    programs, tensors = triton.cdiv(M, BLOCK_M) * triton.cdiv(I, BLOCK_I), (x, gate_weight, up_weight, *made)
    strides = x.stride(0), gate_weight.stride(0), up_weight.stride(0)
    scalars = *strides, M, I, K, activation, ieee, BLOCK_M, BLOCK_I, BLOCK_K
    _enqueue(_gated_mlp_kernel, programs, tensors, scalars, num_warps=warps, num_stages=stages)
    return made


def _gated_mlp_tma(x, gate_weight, up_weight, made, activation):
    # H200, 4096 x 14336 bf16: 65 us at M = 16, 70 at 128, 602 at 2048; cuBLAS and swiglu_fused take 69, 76 and 644
    (M, K), I = x.shape, made[0].shape[1]
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    end, tiles_m, BLOCK_I = I, triton.cdiv(M, 128), 0 if M <= 64 else 128
    if x.is_cuda and M > 64 and not torch.compiler.is_compiling():  # there M may be a symbol
        # What takes least, in times of a tile of 128 x 128: all columns by such tiles, by halves of them, by small
        # ones, or cuBLAS for those past the last full wave or, where its tiles fit M better, for all. us (H200):
        # M = 768 at 4096 x 14336 231 (without cuBLAS 265), M = 160 78 (96); by halves M = 384 at 2048 x 8192 40 (48);
        # by small tiles M = 128 at 1024 x 3072 8.3 (10.0). The constants fit 168 products of 65 to 1024 rows
        waves, rows = tiles_m * triton.cdiv(I, 128) / processors, M / (128 * tiles_m)
        costs = [(math.ceil(waves), I, 128), (0.54 * math.ceil(2 * waves), I, 64)] + [(0.36, I, 0)] * (waves <= 0.25)
        fits = 128 < M <= 384 and rows < 0.8
        for full in {int(waves), 0 if fits else int(waves)} if M > 128 or waves >= 1 else ():
            rest = 1.1 * (waves - full) * (rows if fits else 1) + (700 if full else 400) / K
            costs.append((full + rest, full * processors // tiles_m * 128, 128))
        _, end, BLOCK_I = min(costs)
    if end < I:
        _gated_mlp_rest(x, gate_weight, up_weight, made, activation, end)
    if not end:
        return
    if BLOCK_I:  # 128 x 256 with both weights: what the tensor cores like best
        BLOCK_M, BLOCK_K, warps, stages = 128, 64, *((8, 4) if BLOCK_I == 128 else (4, 6))
    else:  # the weights' bytes: small tiles
        BLOCK_M, BLOCK_I, BLOCK_K, warps = 16 if M <= 16 else 32 if M <= 32 else 64, 64, 128, 4
        tiles = triton.cdiv(M, BLOCK_M) * triton.cdiv(I, 64)
        turns = triton.cdiv(tiles, processors)
        if 4 * tiles <= processors:  # 8.8 us at M = 16, 2048 x 2048; by 32 columns 9.2, cuBLAS 10.0
            BLOCK_I, BLOCK_K, warps, stages = 16, 256 if M <= 32 else 128, 2 if M <= 16 else 4, 6 if M <= 32 else 8
        elif 2 * tiles <= processors:  # 24 us at M = 16, 4096 x 4096; by 64 columns 25, in three stages 31
            BLOCK_I, stages = 32, 6
        elif M <= 32:  # M = 32: 75 us at 3584 x 18944 (three stages 82), 58 at 4096 x 12288 (two stages 65)
            stages = 4 if turns == 1 else 3 if turns == 2 else 2
        else:  # 54 us at 4096 x 11008, in steps of 128 57
            BLOCK_K, stages = 64 if turns == 2 else 128, 4
        if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] != 9:
            stages = min(stages, 3)  # on sm_100 Triton 3.4 wants 270 kB of shared memory for four
    programs = triton.cdiv(M, BLOCK_M) * triton.cdiv(end, BLOCK_I)
    if BLOCK_M == 128:
        programs = min(programs, processors)
    box, first = [2, BLOCK_I, BLOCK_K], gate_weight
    if up_weight is None:
        w = TensorDescriptor.from_tensor(gate_weight.unflatten(0, (2, I)), box)
    else:
        first, second = sorted((gate_weight, up_weight), key=Tensor.data_ptr)
        apart = (second.data_ptr() - first.data_ptr()) // x.element_size()
        w = TensorDescriptor(first, [2, I, K], [apart, first.stride(0), 1], box)
    made = [t if t is None else TensorDescriptor.from_tensor(t, [BLOCK_M, BLOCK_I]) for t in made]
    tensors = TensorDescriptor.from_tensor(x, [BLOCK_M, BLOCK_K]), w, *made
    scalars = M, end, K, activation, first is up_weight, BLOCK_M, BLOCK_I, BLOCK_K
    _enqueue(_gated_mlp_tma_kernel, programs, tensors, scalars, num_warps=warps, num_stages=stages)


def _gated_mlp_rest(x, gate_weight, up_weight, made, activation, start):
    """The columns from start on by cuBLAS, the products in float32."""
    I = made[0].shape[1]
    if up_weight is None:  # one launch for both
        weights = gate_weight.unflatten(0, (2, I))[:, start:]
        products = torch.bmm(x.expand(2, *x.shape), weights.mT, out_dtype=torch.float32)
    else:
        products = [torch.mm(x, w[start:].T, out_dtype=torch.float32) for w in (gate_weight, up_weight)]
    _swiglu_forward(*products, activation, made[0][:, start:])
    for t, product in zip(made[1:], products):
        if t is not None:
            t[:, start:] = product


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate_weight, up_weight, activation, dtype):
        out, *pre = _gated_mlp_forward(x, gate_weight, up_weight, activation, dtype, save=True)
        ctx.save_for_backward(x, gate_weight, up_weight, *pre)
        ctx.activation = activation
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        x, gate_weight, up_weight, gate, up = ctx.saved_tensors
        d = x.new_empty(gate.shape[0], 2 * gate.shape[1])
        _swiglu_backward(_rows(dout), _rows(gate), _rows(up), d, None, ctx.activation)
        dgate, dup = (d, None) if up_weight is None else d.chunk(2, dim=1)
        dx = dgate @ gate_weight if ctx.needs_input_grad[0] else None
        if dx is not None and dup is not None:
            dx = torch.addmm(dx, dup, up_weight)
        weights = (d.T @ x if needed else None for d, needed in zip((dgate, dup), ctx.needs_input_grad[1:3]))
        return dx, *weights, None, None


def fused_gated_mlp(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor | None = None, activation: str = "silu"
) -> Tensor:
    """act(x @ gate_weight.T) * (x @ up_weight.T) in one kernel; the result (..., I) has x's dtype, under autocast
    autocast's, as F.linear. Differentiable in x and the weights.

    Args:
        x: (..., K), float16, bfloat16 or float32
        gate_weight, up_weight: (I, K), or without up_weight both packed as (2 * I, K), gate first; any float dtype
        activation: "silu", "gelu" (erf) or "gelu_tanh"

    Raises: ValueError for shapes or devices that do not fit, an unknown activation; TypeError for dtypes.
    """
    _check(activation, x=x, gate_weight=gate_weight, up_weight=up_weight)
    if x.dim() == 0:
        raise ValueError("x must have shape (..., K), got ()")
    if gate_weight.dim() != 2 or gate_weight.shape[1] != x.shape[-1]:
        raise ValueError(f"gate_weight must have shape (I, {x.shape[-1]}), got {tuple(gate_weight.shape)}")
    if up_weight is None and gate_weight.shape[0] % 2:
        raise ValueError(f"gate_weight alone must be packed as (2 * I, K), got {tuple(gate_weight.shape)}")
    if up_weight is not None and up_weight.shape != gate_weight.shape:
        raise ValueError(f"up_weight must have shape {tuple(gate_weight.shape)}, got {tuple(up_weight.shape)}")
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, gate_weight, up_weight = (t if t is None else t.to(dtype) for t in (x, gate_weight, up_weight))
    if (
        not _kernel_serves(x, gate_weight, up_weight) or not x.numel() or not gate_weight.numel()
        or (x.is_cpu and x.dtype == torch.bfloat16)  # the interpreter multiplies bfloat16 wrongly
    ):  # fmt: skip
        return gated_mlp_torch(x, gate_weight, up_weight, activation)
    if x.is_cuda and not torch.compiler.is_compiling() and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):  # Triton launches on the current device, not on x's
            return fused_gated_mlp(x, gate_weight, up_weight, activation)

    common = torch.promote_types(x.dtype, gate_weight.dtype)
    common = common if up_weight is None else torch.promote_types(common, up_weight.dtype)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    operands = [_rows(t if t is None or t.dtype == common else t.to(common)) for t in (rows, gate_weight, up_weight)]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands):
        out = _GatedMLP.apply(*operands, activation, x.dtype)
    else:
        out = _gated_mlp_forward(*operands, activation, x.dtype, save=False)[0]
    return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[1])


class SwiGLU(nn.Module):
    """The whole feed-forward block, down_proj(act(gate_proj(x)) * up_proj(x)), its parameters named as Hugging Face's.
    The projections are called as modules, so hooks, quantised replacements and tensor parallelism work."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, bias: bool = False, activation: str = "silu", *,
        device=None, dtype=None
    ):  # fmt: skip
        super().__init__()
        _check(activation)
        if min(sizes := (hidden_size, intermediate_size)) < 0:
            raise ValueError(f"hidden_size and intermediate_size must not be negative, got {sizes}")
        self.hidden_size, self.activation = hidden_size, activation
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias, device=device, dtype=dtype)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias, device=device, dtype=dtype)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        _check(self.activation, x=x)
        if x.shape[-1:] != (self.hidden_size,):
            raise ValueError(f"x must have shape (..., {self.hidden_size}), got {tuple(x.shape)}")
        return self.down_proj(swiglu_fused(self.gate_proj(x), self.up_proj(x), self.activation))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class FusedGatedMLP(nn.Module):
    """The gated expansion of a feed-forward block, without its down projection: fused_gated_mlp with its weights."""

    def __init__(self, hidden_dim: int, intermediate_dim: int, activation: str = "silu", *, device=None, dtype=None):
        super().__init__()
        _check(activation)
        if min(sizes := (hidden_dim, intermediate_dim)) < 0:
            raise ValueError(f"hidden_dim and intermediate_dim must not be negative, got {sizes}")
        self.hidden_dim, self.intermediate_dim, self.activation = hidden_dim, intermediate_dim, activation
        self.gate_weight = nn.Parameter(torch.empty(intermediate_dim, hidden_dim, device=device, dtype=dtype))
        self.up_weight = nn.Parameter(torch.empty(intermediate_dim, hidden_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.gate_weight, self.up_weight):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))  # as nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor) and x.shape[-1:] != (self.hidden_dim,):
            raise ValueError(f"x must have shape (..., {self.hidden_dim}), got {tuple(x.shape)}")
        return fused_gated_mlp(x, self.gate_weight, self.up_weight, self.activation)

    def extra_repr(self) -> str:
        return f"hidden_dim={self.hidden_dim}, intermediate_dim={self.intermediate_dim}, activation={self.activation!r}"
