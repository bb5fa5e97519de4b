"""Rotary position embedding (RoPE): each pair (x0, x1) of a head's row turns by an angle that grows with the position.

    (y0, y1) = (x0 * cos - x1 * sin, x1 * cos + x0 * sin)     angle = position * base ** (-2 * i / R), i = 0 ... R/2 - 1

q (B, S, Hq, D) and k (B, S, Hk, D), or (S, H, D). A pair is (i, i + R/2) (GPT-NeoX, Hugging Face Llama, Qwen) or, with
interleaved=True, (2 * i, 2 * i + 1) (RoFormer, GPT-J, Meta's Llama). With R < D the rest of the row passes through.

Cost. Memory-bound: q and k are read once and written once, 2 * B * S * (Hq + Hk) * D * itemsize bytes, in one launch;
all heads share the tables' rows. The backward pass is the forward with the sine negated.
Layout. Any strides are read in place, but for columns that are not adjacent: those are copied. Results are dense:
(B, S, H, D), or, where q's heads lie outside its tokens, the transpose of a contiguous (B, H, S, D).
Numerics. float32 inside, one rounding, at the end.
Source: Su et al., RoFormer, https://arxiv.org/abs/2104.09864
"""

import contextlib
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


def _frequencies(seq_len, head_dim, base, scaling, device):
    """Angle per position of each pair, float64, and the factor on cos and sin, as transformers' ROPE_INIT_FUNCTIONS."""
    if scaling is not None and not isinstance(scaling, dict):
        raise TypeError(f"scaling must be a dict or None, got {type(scaling).__name__}")
    given = {name: value for name, value in (scaling or {}).items() if value is not None}
    if layers := [name for name, value in given.items() if isinstance(value, dict)]:
        raise ValueError(f"scaling must be the dict of one kind of layer, got one for each of {', '.join(layers)}")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in (kinds := ("default", "linear", "dynamic", "llama3", "yarn")):
        raise ValueError(f"scaling's rope_type must be one of {', '.join(kinds)}, got {kind!r}")

    def entry(name):
        if name not in given:
            raise ValueError(f"scaling of rope_type {kind!r} must have {name!r}, got {list(scaling)}")
        return given[name]

    if longest := given.get("max_position_embeddings"):
        given.setdefault("original_max_position_embeddings", longest)
    trained = 1 if kind in ("default", "linear") else entry("original_max_position_embeddings")
    if not trained > 0:
        raise ValueError(f"scaling's original_max_position_embeddings must be positive, got {trained}")
    if kind == "yarn" and longest:
        given.setdefault("factor", longest / trained)
    factor = 1.0 if kind == "default" else entry("factor")
    if not factor > 0:
        raise ValueError(f"scaling's factor must be positive, got {factor}")
    base, dim = given.get("rope_theta", base), int(head_dim * given.get("partial_rotary_factor", 1.0))
    least = 4 if kind == "dynamic" else 2
    if dim < least or dim % 2:
        raise ValueError(f"head_dim must be an even number, {least} at least, got {dim}")
    if not base > 0:
        raise ValueError(f"base must be positive, got {base}")
    if kind == "yarn" and not base > 1:
        raise ValueError(f"base must be greater than 1 for yarn, got {base}")
    if kind == "dynamic":
        # no branch: torch.export then takes lengths on both sides
        longest = (max if isinstance(seq_len, int) else torch.sym_max)(seq_len, trained)
        base = base * (factor * longest / trained - (factor - 1)) ** (dim / (dim - 2))
    inv_freq = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    keep, attention_factor = 1.0, 1.0  # how much of each frequency is kept; the rest is divided by the factor
    if kind == "linear":
        keep = 0.0
    elif kind == "llama3":
        low, high = entry("low_freq_factor"), entry("high_freq_factor")
        if low >= high:
            raise ValueError(f"scaling's high_freq_factor must be above low_freq_factor, got {high} and {low}")
        keep = ((trained * inv_freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    elif kind == "yarn":  # low and high: the pairs that turn beta_fast and beta_slow times within the trained length
        turns = given.get("beta_fast") or 32, given.get("beta_slow") or 1
        low, high = (dim * math.log(trained / (n * 2 * math.pi)) / (2 * math.log(base)) for n in turns)
        if given.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        pairs = torch.arange(dim // 2, dtype=torch.float64, device=device)
        keep = 1 - ((pairs - low) / (high - low or 0.001)).clamp(0, 1)
        grow, m, m_all = 0.1 * math.log(max(factor, 1)), given.get("mscale"), given.get("mscale_all_dim")
        attention_factor = (m * grow + 1) / (m_all * grow + 1) if m and m_all else grow + 1
        attention_factor = given.get("attention_factor", attention_factor)
    return keep * inv_freq + (1 - keep) * inv_freq / factor, attention_factor


def _index(n, name):
    """n; NumPy's integers as int."""
    if isinstance(n, (int, torch.SymInt)):
        return n
    if not hasattr(n, "__index__"):
        raise TypeError(f"{name} must be an integer, got {n!r}")
    return operator.index(n)


def _check_tensors(**tensors):
    like, floats = None, (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for name, t in tensors.items():
        if t is None and name in ("k", "position_ids", "mask"):
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.dtype not in floats and name not in ("position_ids", "mask"):
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {t.dtype}")
        like = like or (name, t.device)
        if t.device != like[1]:
            raise ValueError(f"{name} must be on {like[0]}'s device {like[1]}, got {t.device}")


def build_rope_cache(
    seq_len: int, head_dim: int, base: float = 10000.0, *, scaling: dict | None = None, device=None,
    dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Tables (cos, sin), (seq_len, head_dim / 2) each, of the positions 0 to seq_len - 1; angles in float64.

    scaling: a Hugging Face rope_scaling or rope_parameters dict, rope_type (or type) linear, dynamic, llama3 or yarn.
    Its rope_theta is the base, original_max_position_embeddings (or else max_position_embeddings) the trained length; a
    partial_rotary_factor makes the tables narrower; yarn's attention factor is in the tables.

    Raises: ValueError for a negative seq_len, an odd head_dim, an unknown rope_type or one whose entries are missing.
    """
    seq_len, head_dim = _index(seq_len, "seq_len"), _index(head_dim, "head_dim")
    if seq_len < 0:
        raise ValueError(f"seq_len must not be negative, got {seq_len}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}")
    device = torch.empty(0).device if device is None else torch.device(device)
    wide = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    inv_freq, attention_factor = _frequencies(seq_len, head_dim, base, scaling, wide)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float64, device=wide), inv_freq)
    cos, sin = ((t * attention_factor).to(dtype) for t in (angles.cos(), angles.sin()))
    return (cos, sin) if wide == device else (cos.to(device), sin.to(device))


def _rotary_dim(D, cos, rotary_dim):
    width = cos.shape[-1]
    return rotary_dim if rotary_dim is not None else 2 * width if 2 * width <= D and cos.dim() != 4 else width


def _turn(x, interleaved, turn):
    """x with turn(x0, x1) for each pair, left in float32 (float64 where x is)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x0, x1 = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, dim=-1)
    y = turn(x0, x1)
    dim = y[0].dim() if interleaved else y[0].dim() - 1  # of a negative one PyTorch 2.11 loses count: DTensors gather
    return torch.stack(y, dim).flatten(-2)


def _dense(y, q):
    """y made dense, heads outermost where q's are."""
    return y.transpose(-3, -2).contiguous().transpose(-3, -2) if q.stride(-2) > q.stride(-3) else y.contiguous()


def _on_mesh_of(q, *tables):
    """The tables as replicated DTensors where q is a DTensor: PyTorch's operations take no mixture."""
    if not hasattr(q, "device_mesh"):
        return tables
    from torch.distributed.tensor import DTensor

    return [DTensor.from_local(t, q.device_mesh, run_check=False) for t in tables]


def rope_torch(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *, interleaved: bool = False,
    position_ids: Tensor | None = None, rotary_dim: int | None = None, inplace: bool = False
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Twin of apply_rope."""
    S, R = q.shape[-3], _rotary_dim(q.shape[-1], cos, rotary_dim)
    # Of full-width tables, whose halves are equal, the first is read
    cos, sin = ((t.squeeze(2) if t.dim() == 4 else t).narrow(-1, 0, R // 2) for t in (cos, sin))
    if position_ids is None:
        cos, sin = cos.narrow(-2, 0, S), sin.narrow(-2, 0, S)
    else:  # one more row, of NaN, stands for every position outside the tables
        inside = (position_ids >= 0) & (position_ids < cos.shape[0])
        index = torch.where(inside, position_ids, cos.shape[0]).long()
        cos, sin = (F.embedding(index, F.pad(t, (0, 0, 0, 1), value=math.nan)) for t in (cos, sin))
    wide = torch.promote_types(q.dtype, torch.float32)
    c, s = cos.unsqueeze(-2).to(wide), sin.unsqueeze(-2).to(wide)

    def rotate(x):
        y = _turn(x.narrow(-1, 0, R), interleaved, lambda x0, x1: (x0 * c - x1 * s, x1 * c + x0 * s))
        y = torch.cat((y.reshape(*x.shape[:-1], R), x.narrow(-1, R, x.shape[-1] - R).to(wide)), dim=-1).to(x.dtype)
        return x.copy_(y) if inplace else _dense(y, q)

    return rotate(q), None if k is None else rotate(k)


def rope_pytorch(
    q: Tensor, k: Tensor, seq_len: int | None = None, theta: float = 10000.0, *, interleaved: bool = True
) -> tuple[Tensor, Tensor]:
    """Twin of rope_triton: each pair is a complex number, multiplied by exp(i * angle)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    cos, sin = build_rope_cache(q.shape[1], q.shape[-1], theta, device=q.device, dtype=wide)
    (turns,) = _on_mesh_of(q, torch.complex(cos, sin).unsqueeze(1))

    def turn(x0, x1):
        y = torch.view_as_complex(torch.stack((x0, x1), dim=-1)) * turns  # PyTorch 2.11 can't torch.complex DTensors
        return y.real, y.imag

    return tuple(t if t is None else _dense(_turn(t, interleaved, turn).to(t.dtype), q) for t in (q, k))


if triton is not None:

    @triton.jit
    def _cos_sin(position, i, RATIO: tl.constexpr, BITS: tl.constexpr):
        """cos and sin of position * theta ** (-2 * i / R), i below 2 ** BITS; RATIO is 2 ** 64 * theta ** (-2 / R)."""
        # Angles are 64-bit fractions of a turn: integer products wrap around just as angles do, so nothing is lost at
        # any position (float32 products are off by 0.06 at position 1,000,000), and no float64 is needed
        turn = tl.full(i.shape, 2935890503282001226, tl.uint64)  # 1 / (2 * pi)
        power = tl.full(i.shape, RATIO, tl.uint64)
        for bit in tl.static_range(BITS):
            turn = tl.where(((i >> bit) & 1) == 1, tl.umulhi(turn, power), turn)
            power = tl.umulhi(power, power)
        turn = ((turn * position.to(tl.uint32).to(tl.uint64)) >> 32).to(tl.uint32)  # 2 ** -32 is now enough
        quarter = (turn + 536870912) >> 30  # the nearest quarter turn; what is left lies within 1/8
        x = (turn - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-9
        z = x * x
        sin = x + x * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
        cos = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
        odd = (quarter & 1) == 1
        c, s = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
        return tl.where(((quarter + 1) & 2) == 2, -c, c), tl.where((quarter & 2) == 2, -s, s)

    # Strides are specialised, as 16-byte loads must know them to be multiples of 16; counts are not. The tables' stride
    # is a constexpr: it may be no such multiple (40 for head_dim 80), 56 us instead of 66 at 16384 tokens
    @triton.jit(do_not_specialize=["tokens", "S", "rows", "stride_pb"])
    def _rope_kernel(
        q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, position_ptr,  # cos, sin: or None, then RATIO
        stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_cb, stride_pb,
        tokens, S, rows, Hq, Hk, stride_cs: tl.constexpr, RATIO: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr,
        R: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, NEGATE: tl.constexpr, OUT: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr
    ):  # fmt: skip
        """BLOCK_T tokens of one block of BLOCK_H heads; those of k follow those of q."""
        HALF: tl.constexpr = 1 << BITS
        blocks = tl.cdiv(Hq + Hk, BLOCK_H)
        block, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks
        if OUT == "bhsd":  # programs in memory's order: 85.5 us instead of 87.6 at 16384 tokens of 40 heads
            tiles = tl.cdiv(tokens, BLOCK_T)
            block, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
        h = (block * BLOCK_H + tl.arange(0, BLOCK_H))[:, None, None]
        token = (tile * BLOCK_T + tl.arange(0, BLOCK_T))[None, :, None]
        mask = (token < tokens) & (h < Hq + Hk)
        x_ptr, y_ptr, stride_b, stride_s, stride_h, H = q_ptr, q_out_ptr, stride_qb, stride_qs, stride_qh, Hq
        if k_ptr is not None:
            of_k = h >= Hq
            h = tl.where(of_k, h - Hq, h)
            x_ptr, y_ptr = tl.where(of_k, k_ptr, q_ptr), tl.where(of_k, k_out_ptr, q_out_ptr)
            stride_b, stride_s = tl.where(of_k, stride_kb, stride_qb), tl.where(of_k, stride_ks, stride_qs)
            stride_h, H = tl.where(of_k, stride_kh, stride_qh), tl.where(of_k, Hk, Hq)
        b, s, h = (token // S).to(tl.int64), (token % S).to(tl.int64), h.to(tl.int64)
        x_ptr += b * stride_b + s * stride_s + h * stride_h
        if OUT == "inplace":
            y_ptr = x_ptr
        elif OUT == "bhsd":
            y_ptr += ((b * H + h) * S + s) * D
        else:
            y_ptr += ((b * S + s) * H + h) * D
        pairs, cols = tl.arange(0, HALF)[None, None, :], tl.arange(0, 2 * HALF)[None, None, :]
        mask_pairs, mask_cols = mask & (pairs < R // 2), mask & (cols < R)
        if INTERLEAVED:  # a row is read as it lies and taken apart in registers: loads stay 16 bytes wide
            x0, x1 = tl.split(tl.reshape(tl.load(x_ptr + cols, mask_cols), (BLOCK_H, BLOCK_T, HALF, 2)))
        else:
            x0, x1 = tl.load(x_ptr + pairs, mask_pairs), tl.load(x_ptr + R // 2 + pairs, mask_pairs)
        if REST > 0:  # the part that is not rotated
            rest = R + tl.arange(0, REST)[None, None, :]
            passed = tl.load(x_ptr + rest, mask & (rest < D))
        # cos and sin last: the rows are already being loaded
        if cos_ptr is None:
            cos, sin = _cos_sin(s, pairs, RATIO, BITS)
        else:
            position = s
            if position_ptr is not None:
                position = tl.load(position_ptr + b * stride_pb + s, token < tokens, 0).to(tl.int64)
            known = (token < tokens) & (position >= 0) & (position < rows) & (pairs < R // 2)
            offs = b * stride_cb + position * stride_cs + pairs
            if not INTERLEAVED:  # each thread loads what its own columns need, from L1: no shared memory
                known, offs = tl.broadcast_to(known, x0.shape), tl.broadcast_to(offs, x0.shape)
            cos = tl.load(cos_ptr + offs, known, float("nan")).to(tl.float32)  # NaN: a position outside the tables
            sin = tl.load(sin_ptr + offs, known, float("nan")).to(tl.float32)
        if NEGATE:
            sin = -sin
        x0, x1 = x0.to(tl.float32), x1.to(tl.float32)
        # By fma: which product the compiler fuses may depend on the strides, and so would a row's bits
        y0, y1 = tl.fma(x0, cos, -(x1 * sin)), tl.fma(x1, cos, x0 * sin)
        if INTERLEAVED:
            tl.store(y_ptr + cols, tl.reshape(tl.join(y0, y1), (BLOCK_H, BLOCK_T, 2 * HALF)), mask_cols)
        else:
            tl.store(y_ptr + pairs, y0, mask_pairs)
            tl.store(y_ptr + R // 2 + pairs, y1, mask_pairs)
        if REST > 0:
            tl.store(y_ptr + rest, passed, mask & (rest < D))


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


def _tile(D, angles):
    """Tokens and heads of a program, which is one warp where there are many."""
    # 84.4 us at 16384 tokens of 40 heads of 128 (H200) by 8 heads, which share a token's tables, 101 by 4. Angles cost
    # more, so that more heads share them: 82.4 us by 16 heads, 99 by 8
    half = 1 << (D // 2 - 1).bit_length()
    BLOCK_H = min(max((1024 if angles else 512) // half, 1), 16)
    return max(512 // (half * BLOCK_H), 1), BLOCK_H


def _dense_like(x, OUT):
    if x is None or OUT == "inplace":
        return x
    if OUT == "bhsd":  # no transposed view: autograd forbids writing into one that a Function returns
        S, H, D = x.shape[-3:]
        return x.new_empty_strided(x.shape, (H * S * D, D, S * D, 1)[-x.dim() :])
    return torch.empty_like(x, memory_format=torch.contiguous_format)  # half the host's time of new_empty


def _launch(q, k, cos, sin, position_ids, R, interleaved, theta=None, negate=False, inplace=False):
    """q and k, one of which may be None, rotated by tables, or (cos None) by theta's angles."""
    options = cos, sin, position_ids, R, interleaved, theta, negate, inplace
    if q is None:
        return _launch(k, None, *options)[::-1]
    if q.is_cuda and not torch.compiler.is_compiling() and q.get_device() != torch.cuda.current_device():
        with torch.cuda.device(q.device):  # Triton launches on the current device, not on q's
            return _launch(q, k, *options)
    S, Hq, D = q.shape[-3:]
    B, Hk = q.shape[0] if q.dim() == 4 else 1, 0 if k is None else k.shape[-2]
    stride_qb, stride_qs, stride_qh, stride_qd = (0, *q.stride())[-4:]
    stride_kb, stride_ks, stride_kh, stride_kd = (0, 0, 0, 1) if k is None else (0, *k.stride())[-4:]
    if (stride_qd != 1 and q.numel()) or (stride_kd != 1 and k.numel()):  # the one case that costs a copy
        out = _launch(*(None if t is None else _dense(t, q) for t in (q, k)), *options)
        return tuple(None if t is None else t.copy_(o) for t, o in zip((q, k), out)) if inplace else out
    OUT = "inplace" if inplace else "bhsd" if stride_qh > stride_qs else "bshd"
    q_out, k_out = _dense_like(q, OUT), _dense_like(k, OUT)
    rows = stride_cb = stride_cs = stride_pb = ratio = 0
    if cos is None:
        ratio = min(round(theta ** (-2 / R) * 2**64), 2**64 - 1)
    else:
        if cos.stride(-1) != 1 or cos.stride() != sin.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
        at = 0 if cos.dim() == 2 else 1
        rows, stride_cs = cos.shape[at], cos.stride(at)
        stride_cb = cos.stride(0) if at and cos.shape[0] > 1 else 0
    if position_ids is not None:
        position_ids = position_ids.contiguous()
        stride_pb = S if position_ids.dim() == 2 and position_ids.shape[0] > 1 else 0
    bits = (R // 2 - 1).bit_length()
    REST = 1 << (D - R - 1).bit_length() if R < D and not inplace else 0
    BLOCK_T, BLOCK_H = _tile(D, cos is None)
    programs = -(-(B * S) // BLOCK_T) * -(-(Hq + Hk) // BLOCK_H)  # ceil
    scalars = (
        stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_cb, stride_pb, B * S, S, rows, Hq,
        Hk, stride_cs, ratio, bits, D, R, REST, interleaved, negate, OUT, BLOCK_T, BLOCK_H
    )  # fmt: skip
    num_warps = 4 if programs <= 128 else 1  # few programs don't fill the processors: 1.7 us at 8 tokens, else 1.8
    _enqueue(_rope_kernel, programs, (q, k, q_out, k_out, cos, sin, position_ids), scalars, num_warps=num_warps)
    if inplace and not torch.compiler.is_compiling():  # autograd is told, as PyTorch's own in-place operations tell it
        for t in (q, k):
            if t is not None and not t.is_inference():
                torch.autograd.graph.increment_version(t)
    return q_out, k_out


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, position_ids, R, interleaved, theta):
        ctx.save_for_backward(cos, sin, position_ids)
        ctx.options = R, interleaved, theta
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)  # an output that nothing uses costs no launch
        outs = _launch(q, k, cos, sin, position_ids, R, interleaved, theta)
        ctx.mark_non_differentiable(*(y for x, y in zip((q, k), outs) if y is not None and not x.requires_grad))
        return outs if k is not None else outs[:1]  # torch.compile has no gradient for an output of None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk=None):
        cos, sin, position_ids = ctx.saved_tensors
        dq, dk = (d if needed else None for d, needed in zip((dq, dk), ctx.needs_input_grad))
        if dq is not None or dk is not None:
            dq, dk = _launch(dq, dk, cos, sin, position_ids, *ctx.options, negate=True)
        return dq, dk, *[None] * 6


def _check_qk(q, k, dims):
    if q.dim() not in dims:
        forms = "(B, S, H, D) or (S, H, D)" if 3 in dims else "(B, S, H, D)"
        raise ValueError(f"q must be {forms}, got shape {tuple(q.shape)}")
    if k is not None and (k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1]):
        raise ValueError(f"k must have q's shape {tuple(q.shape)} but for the heads, got {tuple(k.shape)}")
    if k is not None and k.dtype != q.dtype:
        raise TypeError(f"k must have q's dtype {q.dtype}, got {k.dtype}")


def _check_tables(q, cos, sin, position_ids, rotary_dim):
    """Returns R."""
    B, S, D = q.shape[0] if q.dim() == 4 else 1, q.shape[-3], q.shape[-1]
    shape, dims = cos.shape, cos.dim()
    if sin.shape != shape:
        raise ValueError(f"sin must have cos's shape {tuple(shape)}, got {tuple(sin.shape)}")
    if not (dims == 2 or (dims == 3 and (shape[0] == 1 or shape[0] == B)) or (dims == 4 and shape[0] == shape[2] == 1)):
        raise ValueError(f"cos must be (S, W), ({B}, S, W), (1, S, W) or (1, S, 1, W), got shape {tuple(shape)}")
    R, width = _rotary_dim(D, cos, rotary_dim), shape[-1]
    if R % 2 or not 0 < R <= D:
        raise ValueError(f"rotary_dim must be even, positive and at most head_dim {D}, got {R} (cos is {width} wide)")
    if width != R and (2 * width != R or dims == 4):
        raise ValueError(f"cos must be {'' if dims == 4 else f'{R // 2} or '}{R} wide for rotary_dim {R}, got {width}")
    if position_ids is None:
        if (rows := shape[0 if dims == 2 else 1]) < S:
            raise ValueError(f"cos must have at least {S} rows, one for each position of q, got {rows}")
    elif position_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"position_ids must be int32 or int64, got {position_ids.dtype}")
    elif dims != 2:
        raise ValueError(f"position_ids must go with tables of two dimensions, got cos of shape {tuple(shape)}")
    elif (ids := position_ids.shape)[-1:] != (S,) or len(ids) > 2 or (len(ids) == 2 and ids[0] != 1 and ids[0] != B):
        raise ValueError(f"position_ids must be ({S},) or ({B}, {S}), got shape {tuple(ids)}")
    return R


def apply_rope(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *, interleaved: bool = False,
    position_ids: Tensor | None = None, rotary_dim: int | None = None, inplace: bool = False
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """q and k rotated, in one launch. Differentiable in q and k; tables that ask for a gradient get it from the twin.

    Args:
        q: (B, S, Hq, D) or (S, Hq, D), float16, bfloat16 or float32, any strides
        k: q's shape with its own number of heads, or None: the result is (q, None)
        cos, sin: any float dtype, (S, R/2) or (B, S, R/2), or R wide, the halves repeated (only the first is read),
            (1, S, 1, R) among them; more than S rows serve the positions 0 to S - 1
        position_ids: (S,) or (B, S), int32 or int64: the rows of two-dimensional tables to use; outside the tables the
            rotated part is NaN
        rotary_dim: R; without it a table W wide is R/2 wide where 2 * W <= D, else R. Columns R to D pass through
        inplace: overwrite q and k, and return them

    Raises: ValueError for shapes, devices and rotary_dim, for inplace where q or k requires a gradient or is expanded
    or k is q; TypeError for dtypes.
    """
    _check_tensors(q=q, k=k, cos=cos, sin=sin, position_ids=position_ids)
    _check_qk(q, k, (3, 4))
    rotary_dim = rotary_dim if rotary_dim is None else _index(rotary_dim, "rotary_dim")
    R = _check_tables(q, cos, sin, position_ids, rotary_dim)
    if inplace:
        if k is q:
            raise ValueError("inplace must be False where k is q")
        for name, t in (("q", q), ("k", k)):
            if t is not None and t.requires_grad:
                raise ValueError(f"inplace must be False where {name} requires a gradient")
            if t is not None and any(stride == 0 and size > 1 for size, stride in zip(t.shape, t.stride())):
                raise ValueError(f"inplace must be False where {name} is expanded, got strides {t.stride()}")
    gradients = torch.is_grad_enabled()
    learned = gradients and (cos.requires_grad or sin.requires_grad)
    if learned or not _kernel_serves(q, k, cos, sin, position_ids) or not q.numel():
        return rope_torch(
            q, k, cos, sin, interleaved=interleaved, position_ids=position_ids, rotary_dim=R, inplace=inplace
        )
    if gradients and (q.requires_grad or (k is not None and k.requires_grad)):
        return (*_RoPE.apply(q, k, cos, sin, position_ids, R, interleaved, None), None)[:2]
    return _launch(q, k, cos, sin, position_ids, R, interleaved, inplace=inplace)


def apply_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Drop-in for the function of that name in Hugging Face's modeling files, but for the one rounding at the end.

    q, k: (B, H, S, D), or with unsqueeze_dim=2 (B, S, H, D); cos, sin: (B, S, R) or (1, S, R), halves repeated.
    """
    if isinstance(unsqueeze_dim, Tensor) or unsqueeze_dim not in (1, 2):  # older files give position_ids there
        raise ValueError(f"unsqueeze_dim must be 1 or 2, got {unsqueeze_dim!r}")
    _check_tensors(q=q, k=k, cos=cos)
    if q.dim() != 4:
        form = "(B, H, S, D)" if unsqueeze_dim == 1 else "(B, S, H, D)"
        raise ValueError(f"q must be {form}, got shape {tuple(q.shape)}")
    if k is not None and (k.dim() != 4 or any(k.shape[d] != q.shape[d] for d in (0, 3 - unsqueeze_dim, 3))):
        raise ValueError(f"k must have q's shape {tuple(q.shape)} but for the heads, got {tuple(k.shape)}")
    S = q.shape[3 - unsqueeze_dim]
    if cos.dim() != 3 or cos.shape[1] != S:
        raise ValueError(f"cos must be (B, S, R) or (1, S, R) with S = {S}, got shape {tuple(cos.shape)}")
    if unsqueeze_dim == 2:
        return apply_rope(q, k, cos, sin, rotary_dim=cos.shape[-1])
    q, k = apply_rope(q.transpose(1, 2), None if k is None else k.transpose(1, 2), cos, sin, rotary_dim=cos.shape[-1])
    return q.transpose(1, 2), None if k is None else k.transpose(1, 2)


def rope_triton(
    q: Tensor, k: Tensor, seq_len: int | None = None, theta: float = 10000.0, *, interleaved: bool = True
) -> tuple[Tensor, Tensor]:
    """q and k (B, S, H, D) rotated without tables: the kernel computes the angles of the positions 0 to S - 1, exact to
    float32 at any position. seq_len, where given, must be S. Differentiable in q and k.

    Raises: ValueError for shapes, devices, seq_len, a theta below 1; TypeError for dtypes.
    """
    _check_tensors(q=q, k=k)
    _check_qk(q, k, (4,))
    if seq_len is not None and seq_len != q.shape[1]:
        raise ValueError(f"seq_len must be q's {q.shape[1]}, got {seq_len}")
    if q.shape[-1] % 2 or not q.shape[-1]:
        raise ValueError(f"q must have an even head_dim, got {q.shape[-1]}")
    if not theta >= 1:
        raise ValueError(f"theta must be at least 1, got {theta}")
    if not _kernel_serves(q, k) or not q.numel():
        return rope_pytorch(q, k, seq_len, theta, interleaved=interleaved)
    if torch.is_grad_enabled() and (q.requires_grad or (k is not None and k.requires_grad)):
        return (*_RoPE.apply(q, k, None, None, None, q.shape[-1], interleaved, float(theta)), None)[:2]
    return _launch(q, k, None, None, None, q.shape[-1], interleaved, float(theta))


class RotaryEmbedding(nn.Module):
    """rope(q, k, seq_len=None, position_ids=None): apply_rope with tables that grow with the calls, in powers of two.

    The tables are float32 whatever .to(dtype) says, follow q's device and are no part of state_dict. With position_ids,
    seq_len is the length of the cache, or whatever bounds them: nothing on the device is looked at. With dynamic
    scaling the frequencies are those of the tables' length, which goes back to max_seq_len once a call fits in it.
    """

    def __init__(
        self, dim: int, max_seq_len: int = 2048, base: float = 10000.0, *, interleaved: bool = False,
        scaling: dict | None = None, device=None
    ):  # fmt: skip
        super().__init__()
        dim, max_seq_len = _index(dim, "dim"), _index(max_seq_len, "max_seq_len")
        if scaling is None and (dim < 2 or dim % 2):  # scaled ones may be partial: build_rope_cache checks
            raise ValueError(f"dim must be an even number, 2 at least, got {dim}")
        if max_seq_len < 0:
            raise ValueError(f"max_seq_len must not be negative, got {max_seq_len}")
        self.dim, self.max_seq_len, self.base, self.interleaved = dim, max_seq_len, base, interleaved
        known = isinstance(scaling, dict)  # else build_rope_cache says what is wrong
        self.scaling = {"max_position_embeddings": max_seq_len, **scaling} if known else scaling
        self.dynamic = known and "dynamic" in (scaling.get("rope_type"), scaling.get("type"))
        self._kept = self._build(max_seq_len, device)  # cos and sin, replaced together: other threads read them

    def _build(self, rows, device):
        # Tables of inference mode could not serve training. no_grad comes first: inside inference_mode(False) its end
        # would have torch.export record that gradients go on
        with torch.no_grad(), torch.inference_mode(False):
            return build_rope_cache(rows, self.dim, self.base, scaling=self.scaling, device=device)

    def _tables(self, length: int, q: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        # An exported program keeps nothing: its lengths have no bound, and positions may lie anywhere. (is_exporting()
        # is True in torch.compile, too, up to PyTorch 2.11)
        if torch.compiler._is_exporting_flag:
            if positions is not None:
                length = (max if isinstance(length, int) else torch.sym_max)(length, self.max_seq_len)
            return self._build(length, q.device)
        kept, eager = self._kept, not torch.compiler.is_compiling()
        rows = kept[0].shape[0]
        if length > rows:
            rows = 1
            while rows < length:  # bit_length would make length a constant, and torch.compile recompile for each
                rows *= 2
        elif rows > self.max_seq_len >= length and self.dynamic:
            rows = self.max_seq_len
        # made while torch.compile traced inference mode; or fake where q is not, or the other way about
        unfit = eager and (kept[0].is_inference() or (type(kept[0]) is Tensor) == hasattr(q, "fake_mode"))
        if rows != kept[0].shape[0] or kept[0].device != q.device or unfit:
            kept = self._build(rows, q.device)
            transformed = eager and torch._C._functorch.peek_interpreter_stack() is not None
            # Those of torch.func and FakeTensorMode serve this call alone (`is` fails in torch 2.8's dynamo)
            if not transformed and type(kept[0]) in (Tensor,):
                self._kept = kept
        return kept

    def _apply(self, fn, recurse=True):
        """Moves the tables now: made in a call compiled with CUDA graphs, they would belong to the graph."""
        super()._apply(fn, recurse)
        with contextlib.suppress(NotImplementedError):  # from meta, which only to_empty leaves: made at the first call
            device = fn(torch.empty(0, device=self._kept[0].device)).device
            if device != self._kept[0].device:
                self._kept = self._build(self._kept[0].shape[0], device)
        return self

    def forward(
        self, q: Tensor, k: Tensor | None, seq_len: int | None = None, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        _check_tensors(q=q, k=k)
        _check_qk(q, k, (3, 4))
        length = q.shape[-3] if seq_len is None else max(q.shape[-3], _index(seq_len, "seq_len"))
        cos, sin = _on_mesh_of(q, *self._tables(length, q, position_ids))
        if q.shape[-1] < 2 * cos.shape[-1]:
            raise ValueError(f"q must have a head_dim of at least {2 * cos.shape[-1]}, got shape {tuple(q.shape)}")
        return apply_rope(
            q, k, cos, sin, interleaved=self.interleaved, position_ids=position_ids, rotary_dim=2 * cos.shape[-1]
        )

    def extra_repr(self) -> str:
        scaling = "" if self.scaling is None else f", scaling={self.scaling}"
        return f"{self.dim}, max_seq_len={self.max_seq_len}, base={self.base}, interleaved={self.interleaved}{scaling}"


class RoPEAttention(nn.Module):
    """Self-attention of x (B, S, d_model) with RoPE; mask and is_causal as in PyTorch's scaled_dot_product_attention.

    A Hugging Face Llama attention's state_dict loads into it. Dropout acts in training alone.
    """

    def __init__(
        self, d_model: int, n_heads: int, dropout: float = 0.1, theta: float = 10000.0, *,
        n_kv_heads: int | None = None, interleaved: bool = False, bias: bool = False, device=None, dtype=None
    ):  # fmt: skip
        super().__init__()
        d_model, n_heads = _index(d_model, "d_model"), _index(n_heads, "n_heads")
        n_kv_heads = n_heads if n_kv_heads is None else _index(n_kv_heads, "n_kv_heads")
        if n_heads < 1:
            raise ValueError(f"n_heads must be positive, got {n_heads}")
        if d_model < 1 or d_model % (2 * n_heads):
            raise ValueError(f"d_model must be n_heads ({n_heads}) times an even head_dim, got {d_model}")
        if n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(f"n_kv_heads must divide n_heads ({n_heads}), got {n_kv_heads}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be between 0 and 1, got {dropout}")
        if not theta > 0:
            raise ValueError(f"theta must be positive, got {theta}")
        self.n_heads, self.n_kv_heads, self.head_dim, self.dropout = n_heads, n_kv_heads, d_model // n_heads, dropout
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(d_model, d_model, **options)
        self.k_proj = nn.Linear(d_model, n_kv_heads * self.head_dim, **options)
        self.v_proj = nn.Linear(d_model, n_kv_heads * self.head_dim, **options)
        self.o_proj = nn.Linear(d_model, d_model, **options)
        self.rope = RotaryEmbedding(self.head_dim, base=theta, interleaved=interleaved, device=device)

    def forward(self, x: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        _check_tensors(x=x, mask=mask)
        if x.dim() != 3 or x.shape[-1] != self.q_proj.in_features:
            raise ValueError(f"x must be (B, S, {self.q_proj.in_features}), got shape {tuple(x.shape)}")
        if mask is not None:
            if is_causal:
                raise ValueError("is_causal must be False where a mask is given")
            autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)  # casts any but float64
            sixteen = (torch.float16, torch.bfloat16) if autocast else ()
            if mask.dtype not in (torch.bool, torch.float32, x.dtype, *sixteen):
                raise TypeError(f"mask must be bool, float32 or x's {x.dtype}, got {mask.dtype}")
            scores = x.shape[0], self.n_heads, x.shape[1], x.shape[1]
            if not 2 <= mask.dim() <= 4 or any(m != 1 and m != n for m, n in zip(mask.shape[::-1], scores[::-1])):
                raise ValueError(f"mask must broadcast to {scores}, got shape {tuple(mask.shape)}")
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.rope(q, k)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=is_causal,
            dropout_p=self.dropout if self.training else 0.0, enable_gqa=self.n_kv_heads != self.n_heads
        )  # fmt: skip
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}, dropout={self.dropout}"
