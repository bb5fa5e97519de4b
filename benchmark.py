"""Speed of every op beside PyTorch's own, torch.compile and each peer library that is installed.

    python benchmark.py                                   # every op, forward
    python benchmark.py rmsnorm rope --backward           # kernel time of the autograd.grad call alone
    python benchmark.py int8_gemm --json int8.json --plot plots
    python benchmark.py host                              # the host's time of one small eager call

Kernel time is the profiler's: the kernels of one call summed, the median of 20 calls that take turns with every other
provider, the L2 cache flushed before each. The floor is the fewest bytes a call must move (each tensor once) over the
copy rate of the same run, or its operations over the matmul rate of the same run, whichever is longer. "x best" is the
fastest other provider's time over ours. "call us" is the time of one call in a tight loop, host included. A provider
whose result is off, or that cannot take the shape, prints "-" and a note on stderr: a fast wrong kernel has no number.
"""

import argparse
import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import math
import os
import pathlib
import sys
import time
import types
from collections.abc import Callable

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's speed says nothing; without a GPU the twins are timed

import torch
import torch._functorch.config
import torch.nn.functional as F
from tabulate import tabulate

import device as devices
import fp8_gemm
import fused_rmsnorm_rope as fused
import int8_gemm
import rmsnorm
import rope
import swiglu

EPS = 1e-6
FP8 = torch.float8_e4m3fn


def note(*message):
    print(*message, file=sys.stderr, flush=True)


def peer(path):
    """'package.module:name' where it is installed and there is a GPU, else None."""
    module, name = path.split(":")
    try:
        return getattr(importlib.import_module(module), name) if torch.cuda.is_available() else None
    except ImportError:
        return None
    except Exception as error:  # installed, but not for this machine
        return note(f"{path}: {type(error).__name__}: {str(error)[:200]}")


PEERS = ("liger-kernel", "quack-kernels", "flash-attn", "gemlite", "torchao")
liger_norm = peer("liger_kernel.ops.rms_norm:LigerRMSNormFunction")
liger_residual = peer("liger_kernel.ops.fused_add_rms_norm:LigerFusedAddRMSNormFunction")
liger_swiglu = peer("liger_kernel.ops.swiglu:LigerSiLUMulFunction")
liger_packed = peer("liger_kernel.ops.swiglu:LigerFusedGateUpSiLUMulFunction")
liger_geglu = peer("liger_kernel.ops.geglu:LigerGELUMulFunction")
liger_rope = peer("liger_kernel.ops.rope:LigerRopeFunction")
quack_norm = peer("quack.rmsnorm:rmsnorm")
flash_rope = peer("flash_attn.ops.triton.rotary:apply_rotary")
gemlite = peer("gemlite.helper:__name__") and sys.modules["gemlite.helper"]
torchao = peer("torchao.quantization:__name__") and sys.modules["torchao.quantization"]


@dataclasses.dataclass
class Case:
    label: str
    group: str  # the cases of one group are one panel of the plot
    x: int  # tokens, or M: the plot's abscissa
    inputs: list  # what the providers take; those that require a gradient are what --backward differentiates
    bytes: int
    reference: Callable  # the result, from float32 copies of the inputs
    providers: dict  # name -> function or None: PyTorch's eager way first, ours last; "compile..." is compiled first
    flops: int = 0
    rate: str = "bf16"  # which matmul rate bounds it
    tolerance: float | None = None  # relative Frobenius error allowed; by default the dtype's epsilon
    rows: torch.Tensor | None = None  # the rows of the output that the reference gives
    table: str = ""  # a second table of the op


# ---------------------------------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------------------------------


def kernel_us(calls, o, reps=20):
    """{name: fn} -> {name: median of the summed kernel times of one call, us}, the providers taking turns."""
    for fn in calls.values():
        for _ in range(3):
            fn()
    if not o.gpu:
        times = {name: sorted(loop_us(fn, o, 1) for _ in range(5)) for name, fn in calls.items()}
        return {name: t[2] for name, t in times.items()}
    order = list(calls) * reps
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        for name in order:
            o.flush.bitwise_not_()  # its kernel also marks where a call begins
            calls[name]()
        torch.cuda.synchronize()
    kernels = [e for e in prof.profiler.kineto_results.events() if e.device_type() == torch.autograd.DeviceType.CUDA]
    sums = []
    for e in sorted(kernels, key=lambda e: e.start_ns()):
        if "bitwise_not" in e.name():
            sums.append(0.0)
        elif sums:
            sums[-1] += e.duration_ns() / 1e3
    assert len(sums) == len(order), "the profiler lost kernels"
    groups = {name: sorted(s for s, n in zip(sums, order, strict=True) if n == name) for name in calls}
    return {name: s[len(s) // 2] for name, s in groups.items()}


def loop_us(fn, o, reps=20, wait=True):
    """Time of one call in a tight loop: the host's or the GPU's, whichever is longer; with wait=False the host's."""
    if o.gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(reps):
        fn()
    if o.gpu and wait:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / reps * 1e6


def measured_rates(o, products):
    """Bytes per second of a large copy, operations per second of large products."""
    a = torch.empty(2**30, dtype=torch.uint8, device=o.device).random_(0, 255)
    b, n = torch.empty_like(a), 8192
    calls, work = {"copy": lambda: b.copy_(a)}, {"copy": 2 * a.numel()}
    if products:
        x, y = (torch.randn(n, n, device=o.device, dtype=torch.bfloat16) for _ in range(2))
        x8, y8 = ((t * 40).clamp(-127, 127).to(torch.int8) for t in (x, y))
        calls |= {"bf16": lambda: x @ y.T, "int8": lambda: torch._int_mm(x8, y8.T)}
        if devices.supports_fp8(o.device):
            xf, yf, one = x.to(FP8), y.to(FP8), torch.ones((), device=o.device)
            calls["fp8"] = lambda: torch._scaled_mm(xf, yf.T, one, one, out_dtype=x.dtype, use_fast_accum=True)
        work |= dict.fromkeys(("bf16", "int8", "fp8"), 2 * n**3)
    return {name: work[name] / us * 1e6 for name, us in kernel_us(calls, o, reps=10).items()}


def as_tuple(out):
    return tuple(out) if isinstance(out, tuple | list) else (out,)


def prepare(fn, inputs, cotangents):
    """The call to time, and its first result."""
    if cotangents is None:
        return lambda: fn(*inputs), [out.clone() for out in as_tuple(fn(*inputs))]
    leaves = [t for t in inputs if t.requires_grad]
    outs = [t for t in as_tuple(fn(*inputs)) if t.requires_grad]
    own = [c.clone() for c in cotangents]
    backward = lambda: torch.autograd.grad(outs, leaves, own, retain_graph=True)
    return backward, [g.clone() for g in backward()]


def measure(case, o):
    """One row: every provider held against the reference, then timed."""
    wide = [t.detach().float().requires_grad_(t.requires_grad) for t in case.inputs]
    want, cotangents = as_tuple(case.reference(*wide)), None
    if o.backward:
        want = [t for t in want if t.requires_grad]
        cotangents = [torch.randn_like(t).to(o.dtype) for t in want]
        leaves = [t for t in wide if t.requires_grad]
        want = torch.autograd.grad(want, leaves, [c.to(w) for c, w in zip(cotangents, want)])
    tolerance = case.tolerance or max(torch.finfo(o.dtype).eps, 1e-5)
    calls, errors = {}, {}
    for name, fn in case.providers.items():
        if fn is None or (name.startswith("compile") and not o.gpu):
            continue
        if name.startswith("compile"):
            fn = torch.compile(fn, fullgraph=True, dynamic=False)
        own = [t.detach().clone().requires_grad_(t.requires_grad) for t in case.inputs]  # some peers overwrite theirs
        try:
            call, got = prepare(fn, own, cotangents)
            got = got if case.rows is None or o.backward else [g[case.rows] for g in got]
            pairs = [(g.float(), w.float()) for g, w in zip(got, want, strict=True)]
            error = max(((g - w).norm() / w.norm()).item() for g, w in pairs)
        except Exception as exception:
            reason = str(exception).partition("\n")[0][:200]
            note(f"  {case.label}: {name}: {type(exception).__name__}: {reason}")
            continue
        if error <= tolerance:
            calls[name], errors[name] = call, error
        else:
            note(f"  {case.label}: {name}: relative error {error:.2g}, allowed {tolerance:.2g}")
    us = kernel_us(calls, o)
    row = {key: getattr(case, key) for key in ("table", "label", "group", "x", "bytes", "flops")}
    if o.gpu:
        row["floor_us"] = 1e6 * max(case.bytes / o.rates["copy"], case.flops / o.rates.get(case.rate, math.inf))
    return row | {"us": us, "call_us": {name: loop_us(fn, o) for name, fn in calls.items()}, "error": errors}


# ---------------------------------------------------------------------------------------------------------------------
# Eager PyTorch, as the models' own files write it
# ---------------------------------------------------------------------------------------------------------------------


def eager_rmsnorm(x, w, offset=0.0):
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS)
    return (h * (offset + w.float())).to(x.dtype)


def eager_rope(x, cos, sin, interleaved=False):
    """x [B, S, H, D], tables [S, D]: halves repeated, or (interleaved) each entry twice."""
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    turned = torch.stack((-b, a), -1).flatten(-2) if interleaved else torch.cat((-b, a), -1)
    return x * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)


def eager_angles(q, k, theta=10000.0):
    d = q.shape[-1]
    inverse = theta ** (-torch.arange(0, d, 2, device=q.device, dtype=torch.float32) / d)
    angle = torch.outer(torch.arange(q.shape[1], device=q.device).float(), inverse).repeat_interleave(2, -1)
    return tuple(eager_rope(t.float(), angle.cos(), angle.sin(), True).to(t.dtype) for t in (q, k))


def eager_quantize(x, dtype, dims=(1,), block=None):
    """Codes and scales: one scale per row, or per block of it, or (dims) of the rows together."""
    rows = x.float() if block is None else x.float().unflatten(-1, (-1, block))
    rows = rows.unflatten(0, (-1, block)) if len(dims) > 1 and block else rows
    top = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = rows.abs().amax(dims, keepdim=True).clamp(min=1e-12) / top
    q = rows / scale
    return (q.round() if dtype == torch.int8 else q).clamp(-top, top).to(dtype).view(x.shape), scale


def eager_int8(x, q, s):
    xq, xs = eager_quantize(x, torch.int8)
    return (torch._int_mm(xq, q.T).float() * xs * s).to(x.dtype)


def eager_fp8(x, q, s):
    xq, xs = eager_quantize(x, FP8)
    return torch._scaled_mm(xq, q.T, xs, s.T, out_dtype=x.dtype, use_fast_accum=True)


# ---------------------------------------------------------------------------------------------------------------------
# The ops: each yields its cases
# ---------------------------------------------------------------------------------------------------------------------


def randn(o, *shape, scale=1.0, shift=0.0):
    return torch.randn(*shape, device=o.device, dtype=o.dtype).mul_(scale).add_(shift).requires_grad_(o.backward)


def sizes(o, full, small, tokens=lambda s: s[0]):
    """The sizes to run: small ones without a GPU; with --backward none of a decode step."""
    return [s for s in full if not o.backward or tokens(s) >= 1024] if o.gpu else small


def rmsnorm_cases(o):
    llama, llama70, gemma, long = "4096 (Llama 3 8B)", "8192 (Llama 3 70B)", "5376 (Gemma 3 27B)", "long and short rows"
    full = [(t, 4096, llama) for t in (1, 8, 2048, 4096, 16384, 65536)]
    full += [(t, 8192, llama70) for t in (1, 8, 2048, 16384)] + [(t, 5376, gemma) for t in (8, 2048, 16384)]
    full += [(t, n, f"{n} (Qwen 3)") for n in (2560, 5120) for t in (8, 2048, 16384)]
    full += [(1024, 131072, long), (4096, 32768, long), (524288, 128, long)]
    torch_own = lambda x, w: F.rms_norm(x, w.shape, w, EPS)
    for t, n, name in sizes(o, full, [(8, 1024, "small"), (256, 1024, "small")]):
        x, w = randn(o, t, n), randn(o, n, scale=0.1, shift=1.0)
        moved = 3 * x.nbytes + 2 * w.nbytes if o.backward else 2 * x.nbytes + w.nbytes
        yield Case(f"{t}x{n}", name, t, [x, w], moved, lambda x, w: rmsnorm.rmsnorm_torch(x, w, EPS), {
            "F.rms_norm": torch_own, "eager": eager_rmsnorm, "compile": torch_own,
            "liger": liger_norm and (lambda x, w: liger_norm.apply(x, w, EPS, 0.0, "llama", False)),
            "quack": quack_norm and (lambda x, w: quack_norm(x, w, eps=EPS)),
            "ours": lambda x, w: rmsnorm.rmsnorm(x, w, EPS),
        })  # fmt: skip


def residual_cases(o):
    def eager(x, r, w):
        h = x + r
        return F.rms_norm(h, w.shape, w, EPS), h

    full = [(t, n) for n in (4096, 8192, 5120) for t in (1, 8, 2048, 16384)]
    for t, n in sizes(o, full, [(8, 1024), (256, 1024)]):
        x, r, w = randn(o, t, n), randn(o, t, n), randn(o, n, scale=0.1, shift=1.0)
        moved = 4 * x.nbytes + w.nbytes * (1 + o.backward)  # backward: h, dy, dh in, one gradient for both out
        yield Case(f"{t}x{n}", f"hidden {n}", t, [x, r, w], moved,
                   lambda x, r, w: rmsnorm.rmsnorm_residual_torch(x, r, w, EPS, return_residual=True), {
            "eager": eager, "compile": eager,
            "liger": liger_residual and (lambda x, r, w: liger_residual.apply(x, r, w, EPS, 0.0, "llama", False)),
            "quack": quack_norm and (lambda x, r, w: quack_norm(x, w, residual=r, eps=EPS, prenorm=True)),
            "ours": lambda x, r, w: rmsnorm.rmsnorm_residual_fused(x, r, w, EPS, return_residual=True),
        })  # fmt: skip


def swiglu_cases(o):
    full = [(t, 14336, "silu") for t in (1, 8, 2048, 16384)] + [(t, 28672, "silu") for t in (8, 2048, 16384)]
    full += [(2048, 11008, "silu"), (16384, 12288, "silu")] + [(t, 21504, "gelu_tanh") for t in (8, 2048, 16384)]
    full += [(t, 14336, "packed") for t in (8, 2048, 16384)]
    for t, n, kind in sizes(o, full, [(8, 1024, "silu"), (256, 1024, "gelu_tanh"), (256, 1024, "packed")]):
        inputs = [randn(o, t, 2 * n)] if kind == "packed" else [randn(o, t, n), randn(o, t, n)]
        moved = (5 if o.backward else 3) * t * n * o.dtype.itemsize
        act = "silu" if kind == "packed" else kind
        if kind == "packed":
            eager, liger = (lambda both: F.silu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1]), liger_packed
        elif kind == "silu":
            eager, liger = (lambda gate, up: F.silu(gate) * up), liger_swiglu
        else:
            eager, liger = (lambda gate, up: F.gelu(gate, approximate="tanh") * up), liger_geglu
        yield Case(f"{t}x{n} {kind}", f"{n} {kind}", t, inputs, moved,
                   lambda g, u=None, act=act: swiglu.swiglu_torch(g, u, act), {
            "eager": eager, "compile": eager, "liger": liger and liger.apply,
            "ours": lambda g, u=None, act=act: swiglu.swiglu_fused(g, u, act),
        })  # fmt: skip


def tables(o, s, d, interleaved=False):
    """float32 tables [S, D/2] for our ops, and [S, D] in the model's dtype for the eager code."""
    cos, sin = rope.build_rope_cache(s, d, 500000.0, device=o.device)
    full = (t.repeat_interleave(2, -1) if interleaved else t.repeat(1, 2) for t in (cos, sin))
    return cos, sin, *(t.to(o.dtype) for t in full)


def rope_case(o, b, s, hq, hk, d, kind):
    pairs = kind == "interleaved"
    cos, sin, cos_full, sin_full = tables(o, s, d, pairs)
    seen = (lambda t: t.transpose(1, 2)) if kind == "transposed" else (lambda t: t)  # [B, H, S, D] in memory
    q, k = (randn(o, b, h, s, d) if kind == "transposed" else randn(o, b, s, h, d) for h in (hq, hk))
    eager = lambda q, k: tuple(eager_rope(seen(t), cos_full, sin_full, pairs) for t in (q, k))

    def in_place(q, k):
        q, k, *_ = liger_rope.apply(seen(q).transpose(1, 2), seen(k).transpose(1, 2), cos_full[None], sin_full[None])
        return q.transpose(1, 2), k.transpose(1, 2)

    return Case(f"B{b} S{s} H{hq}/{hk} D{d} {kind}", f"{kind}, {hq} and {hk} heads of {d}", b * s, [q, k],
                2 * (q.nbytes + k.nbytes) + cos.nbytes + sin.nbytes,
                lambda q, k: rope.rope_torch(seen(q), seen(k), cos, sin, interleaved=pairs), {
        "eager": eager, "compile": eager,
        "liger (in place)": in_place if liger_rope and not pairs and not o.backward else None,
        "flash-attn": flash_rope and not o.backward and (
            lambda q, k: tuple(flash_rope(seen(t), cos, sin, interleaved=pairs) for t in (q, k))) or None,
        "ours": lambda q, k: rope.apply_rope(seen(q), seen(k), cos, sin, interleaved=pairs),
    })  # fmt: skip


def rope_cases(o):
    steps = [(8, 1), (1, 2048), (4, 4096)]
    full = [(1, 1, 32, 8, 128, "half")]
    full += [(*s, 32, 8, 128, kind) for kind in ("half", "interleaved", "transposed") for s in steps]
    full += [(*s, 64, 8, 128, "half") for s in steps] + [(*s, 8, 4, 256, "half") for s in steps]
    for s in sizes(o, full, [(1, 128, 8, 2, 64, kind) for kind in ("half", "interleaved")], lambda s: s[0] * s[1]):
        yield rope_case(o, *s)


def angles_cases(o):
    full = [(8, 1, 32, 8, 128), (1, 2048, 32, 8, 128), (4, 4096, 32, 8, 128)]
    for b, s, hq, hk, d in sizes(o, full, [(1, 128, 8, 2, 64)], lambda s: s[0] * s[1]):
        q, k = randn(o, b, s, hq, d), randn(o, b, s, hk, d)
        yield Case(f"B{b} S{s} H{hq}/{hk} D{d}", f"{hq} and {hk} heads of {d}", b * s, [q, k],
                   2 * (q.nbytes + k.nbytes), lambda q, k: rope.rope_pytorch(q, k), {
            "eager": eager_angles, "compile": eager_angles, "ours": lambda q, k: rope.rope_triton(q, k),
        })  # fmt: skip


def fused_case(o, b, s, heads, d, per_head):
    cos, sin, cos_full, sin_full = tables(o, s, d)
    x, w = randn(o, b, s, heads * d), randn(o, d if per_head else heads * d, scale=0.1, shift=1.0)

    def eager(x, w):
        y = eager_rmsnorm(x.unflatten(-1, (heads, d)), w) if per_head else eager_rmsnorm(x, w).unflatten(-1, (heads, d))
        return eager_rope(y, cos_full, sin_full).flatten(-2)

    name = "per head" if per_head else "whole row"
    return Case(f"B{b} S{s} H{heads} D{d} {name}", name, b * s, [x, w],
                (3 if o.backward else 2) * x.nbytes + cos.nbytes + sin.nbytes,
                lambda x, w: fused.fused_rmsnorm_rope_torch(x, w, cos, sin, EPS, heads).reshape(x.shape), {
        "eager": eager, "compile": eager,
        "ours": lambda x, w: fused.fused_rmsnorm_rope(x, w, cos, sin, EPS, heads).reshape(x.shape),
    })  # fmt: skip


def fused_cases(o):
    steps = [(8, 1), (1, 2048), (4, 4096)]
    full = [(*s, 32, 128, per_head) for per_head in (False, True) for s in steps] + [(4, 4096, 64, 128, False)]
    for s in sizes(o, full, [(1, 128, 8, 64, False), (1, 128, 8, 64, True)], lambda s: s[0] * s[1]):
        yield fused_case(o, *s)


def qk_case(o, t, hq, hk, d, offset, model):
    cos, sin, cos_full, sin_full = tables(o, t, d)
    inputs = [randn(o, 1, t, (hq + 2 * hk) * d)] + [randn(o, d, scale=0.1, shift=1.0 - offset) for _ in range(2)]
    heads = {"num_heads": hq, "num_kv_heads": hk, "eps": EPS, "offset": offset}

    def eager(qkv, q_weight, k_weight):
        q, k, v = qkv.unflatten(-1, (-1, d)).split((hq, hk, hk), -2)
        normed = eager_rmsnorm(q, q_weight, offset), eager_rmsnorm(k, k_weight, offset)
        return *(eager_rope(t, cos_full, sin_full) for t in normed), v

    turned, v = t * (hq + hk) * d * o.dtype.itemsize, t * hk * d * o.dtype.itemsize
    moved = (3 * turned + 2 * v if o.backward else 2 * turned) + cos.nbytes + sin.nbytes
    return Case(f"T{t} H{hq}/{hk} D{d}", model, t, inputs, moved,
                lambda *a: fused.fused_qk_norm_rope_torch(*a, cos, sin, **heads), {
        "eager": eager, "compile": eager, "ours": lambda *a: fused.fused_qk_norm_rope(*a, cos, sin, **heads),
    })  # fmt: skip


def qk_cases(o):
    full = [(t, 32, 8, 128, 0.0, "Qwen 3 8B") for t in (1, 8, 2048, 16384)]
    full += [(t, 64, 8, 128, 0.0, "Qwen 3 32B") for t in (8, 2048, 16384)]
    full += [(t, 8, 4, 256, 1.0, "Gemma 3 4B") for t in (8, 2048, 16384)]
    for s in sizes(o, full, [(64, 8, 2, 64, 0.0, "small"), (256, 8, 2, 64, 1.0, "small")]):
        yield qk_case(o, *s)


# (K, N) of the products. gemlite and torchao spend seconds on tuning each shape: they run at the first, and elsewhere
# at M = 1 and 16, where kernels for 8-bit weights live.
KN = [(4096, 14336), (14336, 4096), (4096, 4096), (8192, 28672)]


def products(o, kn=KN):
    full = [(m, k, n) for k, n in kn for m in (1, 8, 16, 64, 256, 2048, 8192)]
    return sizes(o, full, [(1, 512, 768), (64, 512, 768)])


def weight(o, n, k):
    return randn(o, n, k, scale=k**-0.5)


def sample(o, m):
    """64 rows stand for all in the float64 reference of a forward product."""
    return torch.randperm(m, device=o.device)[: m if o.backward else 64]


def exact(x, w, rows):
    """x[rows] @ w.T in float64; in --backward, which takes whole matrices, in float32."""
    return x @ w.float().T if x.requires_grad else x[rows].double() @ w.double().T


def tuned(o, m, k, n):
    return o.gpu and not o.backward and ((k, n) == KN[0] or m in (1, 16))


def gemlite_linear(o, kind, q, scale, m):
    if not gemlite or not tuned(o, m, *q.shape[::-1]):
        return None
    module = getattr(gemlite, kind)(device=str(o.device), dtype=o.dtype).from_weights(q, scales=scale.reshape(-1, 1))
    return lambda x, *_: module(x)


def torchao_linear(o, config, w, m, **arguments):
    if not torchao or not tuned(o, m, *w.shape[::-1]):
        return None
    module = torch.nn.Sequential(torch.nn.Linear(*w.shape[::-1], bias=False, device=w.device, dtype=w.dtype))
    module[0].weight.data.copy_(w)
    torchao.quantize_(module, getattr(torchao, config)(set_inductor_config=False, **arguments))
    module = torch.compile(module, fullgraph=True, dynamic=False)
    return lambda x, *_: module(x)


def mlp_cases(o):
    for m, k, n in products(o, [KN[0], KN[3]]):
        x, gate, up, rows = randn(o, m, k), weight(o, n, k), weight(o, n, k), sample(o, m)
        both = torch.cat((gate, up)).detach()
        eager = lambda x, gate, up: F.silu(F.linear(x, gate)) * F.linear(x, up)

        def packed(x, gate, up, both=both):
            gate, up = F.linear(x, both).chunk(2, -1)
            return F.silu(gate) * up

        read, made = x.nbytes + both.nbytes, m * n * o.dtype.itemsize
        yield Case(f"M{m} K{k} N{n}", f"K{k} N{n}", m, [x, gate, up], 2 * read + made if o.backward else read + made,
                   lambda x, gate, up, rows=rows: F.silu(exact(x, gate, rows)) * exact(x, up, rows), {
            "eager": eager, "eager packed": None if o.backward else packed,
            "compile": eager, "compile packed": None if o.backward else packed,
            "cuBLAS + liger": liger_swiglu and (lambda x, g, u: liger_swiglu.apply(F.linear(x, g), F.linear(x, u))),
            "ours": lambda x, gate, up: swiglu.fused_gated_mlp(x, gate, up),
        }, flops=(8 if o.backward else 4) * m * n * k, rows=rows)  # fmt: skip


def int8_cases(o):
    for kind, (m, k, n) in [(kind, s) for kind in ("W8A16", "W8A8") for s in products(o)]:
        if o.backward and kind == "W8A8":
            continue  # the gradient is the same
        x, rows = randn(o, m, k), sample(o, m)
        q, s = int8_gemm.quantize_weight_per_channel(weight(o, n, k).detach())
        w, s16, wide = int8_gemm.dequantize(q, s, o.dtype), s.to(o.dtype), q.double() * s.double()[:, None]
        base, both = {"F.linear": lambda x, w=w: F.linear(x, w)}, kind == "W8A8"
        if not both:
            eager = lambda x, q=q, s16=s16: F.linear(x, q.to(x.dtype)) * s16
            base |= {"dequantised": eager, "compile": eager, "torchao": torchao_linear(o, "Int8WeightOnlyConfig", w, m),
                     "gemlite": gemlite_linear(o, "A16W8", q, s, m)}  # fmt: skip
        else:
            eager = (lambda x, q=q, s=s: eager_int8(x, q, s)) if m > 16 else None  # _int_mm takes no fewer rows
            base |= {"_int_mm": eager, "compile": eager,
                     "torchao": torchao_linear(o, "Int8DynamicActivationInt8WeightConfig", w, m),
                     "gemlite": gemlite_linear(o, "A8W8_int8_dynamic", q, s, m)}  # fmt: skip
        ours = lambda x, q=q, s=s, both=both: int8_gemm.int8_gemm(x, q, s, quantize_activations=both)
        yield Case(f"{kind} M{m} K{k} N{n}", f"{kind} K{k} N{n}", m, [x], x.nbytes + q.nbytes + m * n * x.itemsize,
                   lambda x, wide=wide, rows=rows: exact(x, wide, rows), base | {"ours": ours}, flops=2 * m * n * k,
                   rate="int8" if both else "bf16", rows=rows, table=kind,
                   tolerance=0.03 if both else None)  # fmt: skip


def fp8_cases(o):
    def prequantised(m, k, n, recipe, fast):
        a, sa = fp8_gemm.quantize_fp8(randn(o, m, k), recipe)
        b, sb = fp8_gemm.quantize_fp8(weight(o, n, k), "block2d" if recipe == "block" else recipe)
        sb = sb.T if sb.ndim == 2 else sb
        theirs = sa.T.contiguous().T if recipe == "block" else sa  # PyTorch's layout of block scales
        wide = [fp8_gemm.dequantize_fp8(*t, torch.float64) for t in ((a, sa), (b, sb.T if sb.ndim == 2 else sb))]
        name, rows = f"{recipe} {'fast' if fast else 'slow'}", sample(o, m)
        moved = sum(t.nbytes for t in (a, b, sa, sb)) + m * n * o.dtype.itemsize
        return Case(f"{name} M{m} K{k} N{n}", f"{name} K{k} N{n}", m, [], moved, lambda: exact(*wide, rows), {
            "_scaled_mm": lambda: torch._scaled_mm(a, b.T, theirs, sb, out_dtype=o.dtype, use_fast_accum=fast),
            "ours": lambda: fp8_gemm.fp8_gemm(a, b.T, sa, sb, o.dtype, fast_accum=fast),
        }, flops=2 * m * n * k, rate="fp8", rows=rows, tolerance=0.01, table="prequantised")  # fmt: skip

    def linear(m, k, n):
        x, w, rows = randn(o, m, k), weight(o, n, k), sample(o, m)
        q, s = fp8_gemm.quantize_fp8(w.detach(), "row")
        module = fp8_gemm.FP8Linear(k, n, device=o.device, dtype=o.dtype).requires_grad_(False)
        module.weight.data.copy_(w)
        eager = None if o.backward else lambda x, w: eager_fp8(x, q, s)
        by_row = {"granularity": torchao.PerRow()} if torchao else {}
        # a frozen weight is quantised once, a training one in every forward
        ours = lambda x, w: torch.func.functional_call(module, {"weight": w}, (x,)) if o.backward else module(x)
        moved = 2 * (x.nbytes + w.nbytes) if o.backward else x.nbytes + q.nbytes + s.nbytes
        return Case(f"FP8Linear M{m} K{k} N{n}", f"FP8Linear K{k} N{n}", m, [x, w], moved + m * n * x.itemsize,
                    lambda x, w: exact(x, w, rows), {
            "F.linear": F.linear, "_scaled_mm": eager, "compile": eager,
            "torchao": torchao_linear(o, "Float8DynamicActivationFloat8WeightConfig", w.detach(), m, **by_row),
            "gemlite": gemlite_linear(o, "A8W8_fp8_dynamic", q, s, m), "ours": ours,
        }, flops=(4 if o.backward else 2) * m * n * k, rate="bf16" if o.backward else "fp8", rows=rows, tolerance=0.06,
            table="FP8Linear")  # fmt: skip

    if not o.backward:
        for recipe, fast in (("row", True), ("tensor", True), ("tensor", False), ("row", False), ("block", False)):
            for s in products(o, KN if recipe == "row" and fast else KN[:1]):
                yield prequantised(*s, recipe, fast)
    for s in products(o):
        yield linear(*s)


def quantize_cases(o):
    kinds = {
        "int8 per token": (lambda x: int8_gemm.quantize_symmetric(x, dim=-1), lambda x: eager_quantize(x, torch.int8)),
        "fp8 row": (lambda x: fp8_gemm.quantize_fp8(x, "row"), lambda x: eager_quantize(x, FP8)),
        "fp8 block": (lambda x: fp8_gemm.quantize_fp8(x, "block"), lambda x: eager_quantize(x, FP8, (2,), 128)),
        "fp8 block2d": (lambda x: fp8_gemm.quantize_fp8(x, "block2d"), lambda x: eager_quantize(x, FP8, (1, 3), 128)),
        "fp8 tensor": (lambda x: fp8_gemm.quantize_fp8(x, "tensor"), lambda x: eager_quantize(x, FP8, (0, 1))),
    }
    for name, (ours, eager) in kinds.items():
        for m, k in [(2048, 4096), (8192, 4096), (8192, 14336)] if o.gpu else [(128, 512)]:
            x = randn(o, m, k)
            flat = lambda fn: lambda x: [t.flatten() for t in fn(x)]  # scales as each side shapes them
            moved = x.nbytes + x.numel() + 4 * eager(x)[1].numel()
            yield Case(f"{name} {m}x{k}", name, m, [x], moved, flat(eager), {
                "eager": flat(eager), "compile": flat(eager), "ours": flat(ours)}, tolerance=0.02)  # fmt: skip


OPS = {
    "rmsnorm": rmsnorm_cases, "rmsnorm_residual": residual_cases, "swiglu": swiglu_cases, "rope": rope_cases,
    "rope_angles": angles_cases, "fused_rmsnorm_rope": fused_cases, "qk_norm_rope": qk_cases, "gated_mlp": mlp_cases,
    "int8_gemm": int8_cases, "fp8_gemm": fp8_cases, "quantize": quantize_cases,
}  # fmt: skip
PRODUCTS = {"gated_mlp", "int8_gemm", "fp8_gemm"}


# ---------------------------------------------------------------------------------------------------------------------
# The host's time of a small eager call
# ---------------------------------------------------------------------------------------------------------------------


def bare_launch(x, w):
    """A plain kernel[grid](...) of eight arguments that does nothing: what any Triton op pays at least."""
    triton = rmsnorm.triton

    @triton.jit
    def nothing(x_ptr, w_ptr, y_ptr, stride_x, stride_y, N, eps, BLOCK_N: triton.language.constexpr):
        pass

    return lambda: nothing[(1,)](x, w, x, x.stride(0), x.stride(0), x.shape[1], EPS, BLOCK_N=128)


def host_rows(o):
    """[call, us, times the first of its group], at one token; the host's part alone, nothing waits for the GPU."""
    k, n = (4096, 14336) if o.gpu else (512, 768)
    x, w, gate, up, q, kv = (randn(o, *s) for s in ((1, k), (k,), (1, n), (1, n), (1, 1, 32, 128), (1, 1, 8, 128)))
    xg, wg = x.clone().requires_grad_(), w.clone().requires_grad_()
    cos, sin, cos_full, sin_full = tables(o, 1, 128)
    wide = weight(o, n, k)
    w8, s8 = int8_gemm.quantize_weight_per_channel(wide)
    (xf, sxf), (wf, swf) = fp8_gemm.quantize_fp8(x, "row"), fp8_gemm.quantize_fp8(wide, "row")
    module = fp8_gemm.FP8Linear(k, n, device=o.device, dtype=o.dtype).requires_grad_(False)
    gem = gemlite_linear(o, "A16W8", w8, s8, 1)
    norm = lambda x, w: F.rms_norm(x, (k,), w, EPS)
    compiled = torch.compile(norm, fullgraph=True, dynamic=False)
    groups = [
        [("F.rms_norm", lambda: norm(x, w)), ("rmsnorm", lambda: rmsnorm.rmsnorm(x, w, EPS)),
         ("bare launch, eight arguments", o.gpu and rmsnorm.triton and bare_launch(x, w)),
         ("compiled F.rms_norm", o.gpu and (lambda: compiled(x, w))),
         ("quack", quack_norm and (lambda: quack_norm(x, w, eps=EPS))),
         ("liger", liger_norm and (lambda: liger_norm.apply(x, w, EPS, 0.0, "llama", False)))],
        [("F.rms_norm, gradients on", lambda: norm(xg, wg)),
         ("rmsnorm, gradients on", lambda: rmsnorm.rmsnorm(xg, wg, EPS)),
         ("quack, gradients on", quack_norm and (lambda: quack_norm(xg, wg, eps=EPS))),
         ("liger, gradients on", liger_norm and (lambda: liger_norm.apply(xg, wg, EPS, 0.0, "llama", False)))],
        [("F.silu(gate) * up", lambda: F.silu(gate) * up), ("swiglu_fused", lambda: swiglu.swiglu_fused(gate, up)),
         ("liger swiglu", liger_swiglu and (lambda: liger_swiglu.apply(gate, up)))],
        [("F.rms_norm", lambda: norm(x, w)), ("apply_rope, q and k", lambda: rope.apply_rope(q, kv, cos, sin)),
         ("eager rope", lambda: [eager_rope(t, cos_full, sin_full) for t in (q, kv)]),
         ("flash-attn rotary", flash_rope and (lambda: [flash_rope(t, cos, sin) for t in (q, kv)]))],
        [("F.linear", lambda: F.linear(x, wide)), ("int8_gemm W8A16", lambda: int8_gemm.int8_gemm(x, w8, s8)),
         ("int8_gemm W8A8", lambda: int8_gemm.int8_gemm(x, w8, s8, quantize_activations=True)),
         ("gemlite W8A16", gem and (lambda: gem(x))),
         ("fp8_gemm, prequantised", lambda: fp8_gemm.fp8_gemm(xf, wf.T, sxf, swf.T, o.dtype)),
         ("FP8Linear", lambda: module(x)), ("fused_gated_mlp", lambda: swiglu.fused_gated_mlp(x, wide, wide))],
    ]  # fmt: skip
    rows = []
    for group in groups:
        base = None
        for name, fn in (call for call in group if call[1]):
            with torch.set_grad_enabled("gradients on" in name):
                us = sorted(loop_us(fn, o, 50 if o.gpu else 3, wait=False) for _ in range(13))[6]
            base = base or us
            rows.append([name, us, us / base])
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Tables, plots, command line
# ---------------------------------------------------------------------------------------------------------------------


def short(us):
    return "-" if us is None else f"{us:.1f}" if us < 1000 else f"{us:.0f}"


def print_table(title, rows, o, product):
    names = list(dict.fromkeys(name for row in rows for name in row["us"] if name != "ours"))
    head = [f"{title}, us", *names, "ours", *(["TFLOP/s"] if product else [])]
    head += ["GB/s", "of floor" if product else "of copy rate"] if o.gpu else []
    head += ["x best", "best other", *([f"error: {names[0]}, ours"] if product else []), f"call us: {names[0]}, ours"]
    lines = []
    for row in rows:
        us, calls, ours = row["us"], row["call_us"], row["us"].get("ours")
        line = [row["label"], *(short(us.get(name)) for name in (*names, "ours"))]
        if ours:
            best = min(names, key=lambda name: us.get(name, math.inf))
            line += [f"{row['flops'] / ours / 1e6:.3g}"] if product else []
            line += [f"{row['bytes'] / ours / 1e3:.0f}", f"{row['floor_us'] / ours:.2f}"] if o.gpu else []
            line += [f"{us[best] / ours:.2f}", best] if best in us else ["-", "-"]
            line += [f"{row['error'].get(names[0], math.nan):.1e}, {row['error']['ours']:.1e}"] if product else []
            line += [f"{short(calls.get(names[0]))}, {short(calls['ours'])}"]
        lines.append(line + [""] * (len(head) - len(line)))
    align = ["left"] + ["right"] * (len(head) - 1)
    print(tabulate(lines, head, tablefmt="github", disable_numparse=True, colalign=align) + "\n")


def print_crossover(rows):
    """The M at which int8 stops paying against F.linear in 16 bits, between the two M measured around it."""
    for group in dict.fromkeys(row["group"] for row in rows):
        own = [row for row in rows if row["group"] == group and {"F.linear", "ours"} <= row["us"].keys()]
        gains = [(row["x"], row["us"]["F.linear"] / row["us"]["ours"]) for row in own]
        turn = [(a, b) for a, b in zip(gains, gains[1:]) if a[1] >= 1 > b[1]]
        if turn:
            (m0, g0), (m1, g1) = turn[0]
            print(f"{group}: int8 pays up to about M = {m0 * (m1 / m0) ** (math.log(g0) / math.log(g0 / g1)):.0f}")
        elif gains:
            said = "pays" if gains[0][1] >= 1 else "does not pay"
            print(f"{group}: int8 {said} from M = {gains[0][0]} to {gains[-1][0]}")
    print()


def plot(op, rows, folder, o):
    """One picture an op: a panel for each group of three sizes or more, a line for each provider, the floor dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = {g: [r for r in rows if r["group"] == g] for g in dict.fromkeys(r["group"] for r in rows)}
    groups = {g: own for g, own in groups.items() if len(own) > 2} or groups
    wide, product = min(len(groups), 3), op in PRODUCTS
    amount, unit = ("flops", 1e6) if product else ("bytes", 1e3)
    tall = math.ceil(len(groups) / wide)
    figure, axes = plt.subplots(tall, wide, figsize=(5.5 * wide, 4 * tall), squeeze=False)
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    for axis, (group, own) in zip(axes.flat, groups.items()):
        for name in dict.fromkeys(name for r in own for name in r["us"]):
            points = [(r["x"], r[amount] / r["us"][name] / unit) for r in own if name in r["us"]]
            style = {"color": "black", "linewidth": 2.2, "zorder": 5} if name == "ours" else {"linewidth": 1.2}
            axis.plot(*zip(*points), marker="o", markersize=3, label=name, **style)
        if o.gpu:
            floor = [(r["x"], r[amount] / r["floor_us"] / unit) for r in own]
            axis.plot(*zip(*floor), color="gray", linestyle="--", label="floor" if product else "copy rate")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log" if product else "linear")
        axis.set(title=group, xlabel="M" if product else "tokens", ylabel="TFLOP/s" if product else "GB/s")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle(f"{op} {o.way}, {o.name}, {o.type}")
    figure.tight_layout()
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(pathlib.Path(folder) / f"{op}_{o.way}.png", dpi=110)
    plt.close(figure)


def installed(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def options(args):
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    preferred = getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
    o = types.SimpleNamespace(gpu=gpu, device=device, backward=args.backward)
    o.dtype, o.name = devices.select_dtype(preferred, device), devices.get_device_properties(device)["name"]
    o.way, o.type = "backward" if o.backward else "forward", str(o.dtype).removeprefix("torch.")
    o.flush = torch.ones(2**26 if gpu else 1, dtype=torch.int32, device=device)  # 256 MiB, more than any L2
    return o


def save(path, result):
    if path:
        pathlib.Path(path).write_text(json.dumps(result, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", nargs="*", help=f"any of {', '.join(OPS)}, host; all of them without one")
    parser.add_argument("--backward", action="store_true", help="time the backward pass: the autograd.grad call alone")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="bfloat16; float32 without a GPU")
    parser.add_argument("--json", metavar="F", help="write every figure to F as well")
    parser.add_argument("--plot", metavar="DIR", help="draw one picture an op into DIR (needs matplotlib)")
    args = parser.parse_args()
    ops = args.op or [*OPS, "host"]
    if unknown := [op for op in ops if op not in OPS and op != "host"]:
        parser.error(f"op must be among {', '.join(OPS)}, host, got {', '.join(unknown)}")
    o = options(args)
    if o.backward:
        ops = [op for op in ops if op not in ("quantize", "host")]
    torch.manual_seed(0)
    torch._functorch.config.donated_buffer = False  # a compiled backward is to run more than once
    versions = {p: v for p in ("triton", *PEERS) if (v := installed(p))}
    result = {"gpu": o.name, "versions": {"torch": torch.__version__} | versions, "dtype": o.type, "way": o.way}
    result["date"] = f"{datetime.datetime.now():%Y-%m-%d %H:%M}"
    result["command"] = " ".join(["python benchmark.py", *sys.argv[1:]])
    print(f"{o.name}, {', '.join(f'{k} {v}' for k, v in result['versions'].items())}, {o.type}, {result['date']}")
    print(result["command"])
    if o.gpu:
        o.rates = result["rates"] = measured_rates(o, PRODUCTS & set(ops))
        rates = [f"{k} {v / 1e12:.4g} {'TB/s' if k == 'copy' else 'TFLOP/s'}" for k, v in o.rates.items()]
        print("Measured here: " + ", ".join(rates) + "\n")
    else:
        print("No GPU: the PyTorch twins against eager PyTorch on small shapes. This says nothing about the kernels.\n")
    missing = []
    for op in ops:
        start = time.perf_counter()
        if op == "host":
            rows = result["host"] = host_rows(o)
            head = ["host's time of one call at one token", "us", "x first"]
            print(tabulate(rows, head, tablefmt="github", floatfmt=("", ".1f", ".2f")) + "\n")
            save(args.json, result)
            continue
        rows = result[op] = []
        for case in OPS[op](o):
            with torch.set_grad_enabled(o.backward):
                rows.append(measure(case, o))
            ours = rows[-1]["us"].get("ours")
            missing += [] if ours else [f"{op} {case.label}"]
            note(f"{op} {case.label}: ours {short(ours)} us ({time.perf_counter() - start:.0f} s)")
            torch._dynamo.reset()
        for table in dict.fromkeys(row["table"] for row in rows):
            title = " ".join(word for word in (op, table, o.way) if word)
            print_table(title, [r for r in rows if r["table"] == table], o, op in PRODUCTS)
        if op == "int8_gemm" and not o.backward:
            print_crossover(rows)
        if args.plot:
            plot(op, rows, args.plot, o)
        save(args.json, result)  # after every op: a run cut short keeps what it has
    if missing:
        sys.exit(f"no result of ours for {', '.join(missing)}")


if __name__ == "__main__":
    main()
