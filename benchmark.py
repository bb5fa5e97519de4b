"""Speed of every op beside PyTorch's own, torch.compile and each peer library that is installed.

    python benchmark.py                                   # every op, forward, and the host's time
    python benchmark.py rmsnorm rope --backward           # every op of those names; the autograd.grad call alone
    python benchmark.py int8_gemm --json int8.json --plot plots
    python benchmark.py host                              # the host's time of one small eager call
    python benchmark.py model                             # Llama 3 8B's shapes end to end (80 GB); only where named

Kernel time is the profiler's: the kernels of one call summed, the median of 5 to 20 calls that take turns with every other
provider's, the L2 cache flushed before each. The floor is the fewest bytes a call must move (each tensor once) over the
copy rate of the same run, or its operations over the matmul rate of the same run, whichever is longer. "x best" is the
fastest other provider's time over ours. "call us" is the time of one call in a tight loop, host included. A provider
whose result is off, or that cannot take the shape, prints "-" and a note on stderr: a fast wrong kernel has no number.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import random
import sys
import time
import types
import warnings
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
START = time.perf_counter()


def note(message):
    print(f"[{time.perf_counter() - START:4.0f} s] {message}", file=sys.stderr, flush=True)


def reason(error):
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def peer(path):
    """'package.module:name' where it is installed and there is a GPU, else None."""
    module, _, name = path.partition(":")
    try:
        module = importlib.import_module(module) if torch.cuda.is_available() else None
        return getattr(module, name) if name and module else module
    except ImportError:
        return None
    except Exception as error:  # installed, but not for this machine
        return note(f"{path}: {reason(error)}")


PEERS = ("liger-kernel", "quack-kernels", "flash-attn", "gemlite", "torchao")
liger_norm = peer("liger_kernel.ops.rms_norm:LigerRMSNormFunction")
liger_residual = peer("liger_kernel.ops.fused_add_rms_norm:LigerFusedAddRMSNormFunction")
liger_swiglu = peer("liger_kernel.ops.swiglu:LigerSiLUMulFunction")
liger_packed = peer("liger_kernel.ops.swiglu:LigerFusedGateUpSiLUMulFunction")
liger_geglu = peer("liger_kernel.ops.geglu:LigerGELUMulFunction")
liger_rope = peer("liger_kernel.ops.rope:LigerRopeFunction")
quack_norm = peer("quack.rmsnorm:rmsnorm")
flash_rope = peer("flash_attn.ops.triton.rotary:apply_rotary")
gemlite = peer("gemlite.helper")
torchao = peer("torchao.quantization")


@dataclasses.dataclass
class Case:
    label: str
    group: str  # the cases of one group are one panel of the plot
    x: int  # tokens, or M: the plot's abscissa
    inputs: list  # what the providers take; those that require a gradient are what --backward differentiates
    bytes: int
    reference: Callable  # the result, from float32 copies of the inputs
    providers: dict  # name -> function or false: PyTorch's eager way first, ours last; "torch.compile..." is compiled
    flops: int = 0
    rate: str = "16 bit"  # which matmul rate bounds it
    tolerance: float | None = None  # relative Frobenius error allowed; by default the dtype's epsilon
    rows: torch.Tensor | None = None  # the rows of the output that the reference gives


# ---------------------------------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------------------------------


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


def kernel_us(calls, o):
    """{name: fn} -> {name: median of the summed kernel times of one call, us}, the providers taking turns."""
    round_us = sum(loop_us(fn, o, 3) for fn in calls.values())  # warms up, too
    if not o.gpu:
        return {name: sorted(loop_us(fn, o, 1) for _ in range(5))[2] for name, fn in calls.items()}
    order = list(calls) * max(5, min(20, int(3e5 / max(round_us, 1))))
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
    groups = {name: sorted(s for s, n in zip(sums, order) if n == name) for name in calls}
    return {name: s[len(s) // 2] for name, s in groups.items()}


def measured_rates(o):
    """Bytes per second of a large copy, operations per second of large products. int8 and fp8 tensor cores have one
    rate, and _scaled_mm comes nearer to it than _int_mm."""
    n, fp8 = 8192, devices.supports_fp8(o.device)
    a, (x, y) = randn(o, 2**29), (randn(o, n, n, dtype=torch.bfloat16) for _ in range(2))
    b, one = torch.empty_like(a), torch.ones((), device=o.device)
    x8, y8 = (t.to(FP8 if fp8 else torch.int8) for t in (x, y))
    scaled = lambda: torch._scaled_mm(x8, y8.T, one, one, out_dtype=x.dtype, use_fast_accum=True)
    calls = {"copy": lambda: b.copy_(a), "16 bit": lambda: x @ y.T}
    calls["8 bit"] = scaled if fp8 else lambda: torch._int_mm(x8, y8.T)
    with torch.no_grad():
        times = kernel_us(calls, o)
    return {name: (2 * a.nbytes if name == "copy" else 2 * n**3) / us * 1e6 for name, us in times.items()}


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
        compiled = name.startswith("torch.compile")
        if not fn or (compiled and not o.gpu):
            continue
        own = [t.detach().clone().requires_grad_(t.requires_grad) for t in case.inputs]  # some peers overwrite theirs
        try:
            fn = torch.compile(fn, fullgraph=True, dynamic=False) if compiled else fn
            call, got = prepare(fn, own, cotangents)
            got = got if case.rows is None else [g[case.rows] for g in got]
            pairs = [(g.float(), w.float()) for g, w in zip(got, want, strict=True)]
            error = torch.stack([(g - w).norm() / w.norm() for g, w in pairs]).max().item()  # NaN where one is
        except Exception as exception:
            note(f"  {case.label}: {name}: {reason(exception)}")
            continue
        if error <= tolerance:
            calls[name], errors[name] = call, error
        else:
            note(f"  {case.label}: {name}: relative error {error:.2g}, allowed {tolerance:.2g}")
    row = {key: getattr(case, key) for key in ("label", "group", "x", "bytes", "flops")}
    if o.gpu:
        row["floor_us"] = 1e6 * max(case.bytes / o.rates["copy"], case.flops / o.rates[case.rate])
    call_us = {name: loop_us(call, o) for name, call in calls.items() if name in (next(iter(calls)), "ours")}
    return row | {"us": kernel_us(calls, o), "call_us": call_us, "error": errors}


# ---------------------------------------------------------------------------------------------------------------------
# Eager PyTorch, as the models' own files write it
# ---------------------------------------------------------------------------------------------------------------------


def torch_rmsnorm(x, w):
    return F.rms_norm(x, w.shape, w, EPS)


def eager_rmsnorm(x, w, offset=0.0):
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS)
    return (h * (offset + w.float())).to(x.dtype)


def eager_residual(x, r, w):
    h = x + r
    return torch_rmsnorm(h, w), h


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


def eager_mlp(x, gate, up):
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


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
# The ops: a function each that makes one case
# ---------------------------------------------------------------------------------------------------------------------


def randn(o, *shape, scale=1.0, shift=0.0, dtype=None):
    x = torch.randn(*shape, device=o.device, dtype=dtype or o.dtype)
    return x.mul_(scale).add_(shift).requires_grad_(o.backward)


def batch(t):
    """Tokens as (B, S): a decode step has one token a sequence, longer inputs sequences of up to 4096."""
    return (t, 1) if t < 128 else (max(t // 4096, 1), min(t, 4096))


def tables(o, s, d, interleaved=False, base=500000.0):
    """float32 tables [S, D/2] for our ops, and [S, D] in the model's dtype for the eager code."""
    cos, sin = rope.build_rope_cache(s, d, base, device=o.device)
    full = (t.repeat_interleave(2, -1) if interleaved else t.repeat(1, 2) for t in (cos, sin))
    return cos, sin, *(t.to(o.dtype) for t in full)


def rmsnorm_case(o, t, n):
    x, w = randn(o, t, n), randn(o, n, scale=0.1, shift=1.0)
    moved = 3 * x.nbytes + 2 * w.nbytes if o.backward else 2 * x.nbytes + w.nbytes
    return Case(f"{t}x{n}", f"hidden {n}", t, [x, w], moved, lambda x, w: rmsnorm.rmsnorm_torch(x, w, EPS), {
        "F.rms_norm": torch_rmsnorm, "eager": eager_rmsnorm, "torch.compile": torch_rmsnorm,
        "liger": liger_norm and (lambda x, w: liger_norm.apply(x, w, EPS, 0.0, "llama", False)),
        "quack": quack_norm and (lambda x, w: quack_norm(x, w, eps=EPS)),
        "ours": lambda x, w: rmsnorm.rmsnorm(x, w, EPS),
    })  # fmt: skip


def residual_case(o, t, n):
    x, r, w = randn(o, t, n), randn(o, t, n), randn(o, n, scale=0.1, shift=1.0)
    moved = 4 * x.nbytes + w.nbytes * (1 + o.backward)  # backward: h, dy, dh in, one gradient for both out
    ours = functools.partial(rmsnorm.rmsnorm_residual_fused, eps=EPS, return_residual=True)
    return Case(f"{t}x{n}", f"hidden {n}", t, [x, r, w], moved,
                functools.partial(rmsnorm.rmsnorm_residual_torch, eps=EPS, return_residual=True), {
        "eager": eager_residual, "torch.compile": eager_residual,
        "liger": liger_residual and (lambda x, r, w: liger_residual.apply(x, r, w, EPS, 0.0, "llama", False)),
        "quack": quack_norm and (lambda x, r, w: quack_norm(x, w, residual=r, eps=EPS, prenorm=True)), "ours": ours,
    })  # fmt: skip


def swiglu_case(o, t, n, kind):
    eager, liger, activation = {
        "silu": (lambda gate, up: F.silu(gate) * up, liger_swiglu, "silu"),
        "packed": (lambda both: F.silu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1], liger_packed, "silu"),
        "gelu_tanh": (lambda gate, up: F.gelu(gate, approximate="tanh") * up, liger_geglu, "gelu_tanh"),
    }[kind]
    inputs = [randn(o, t, 2 * n)] if kind == "packed" else [randn(o, t, n), randn(o, t, n)]
    moved = (5 if o.backward else 3) * t * n * o.dtype.itemsize
    return Case(f"{t}x{n} {kind}", f"{n} {kind}", t, inputs, moved,
                functools.partial(swiglu.swiglu_torch, activation=activation), {
        "eager": eager, "torch.compile": eager, "liger": liger and liger.apply,
        "ours": functools.partial(swiglu.swiglu_fused, activation=activation),
    })  # fmt: skip


def rope_case(o, t, hq, hk, d, kind):
    (b, s), pairs = batch(t), kind == "interleaved"
    cos, sin, cos_full, sin_full = tables(o, s, d, pairs)
    seen = (lambda t: t.transpose(1, 2)) if kind == "transposed" else (lambda t: t)  # [B, H, S, D] in memory
    q, k = (randn(o, b, h, s, d) if kind == "transposed" else randn(o, b, s, h, d) for h in (hq, hk))
    eager = lambda q, k: tuple(eager_rope(seen(t), cos_full, sin_full, pairs) for t in (q, k))

    def in_place(q, k):
        q, k, *_ = liger_rope.apply(seen(q).transpose(1, 2), seen(k).transpose(1, 2), cos_full[None], sin_full[None])
        return q.transpose(1, 2), k.transpose(1, 2)

    def ours(q, k, inplace=False):
        return rope.apply_rope(seen(q), seen(k), cos, sin, interleaved=pairs, inplace=inplace)

    return Case(f"B{b} S{s} H{hq}/{hk} D{d} {kind}", f"{kind}, {hq} and {hk} heads of {d}", t, [q, k],
                2 * (q.nbytes + k.nbytes) + cos.nbytes + sin.nbytes,
                lambda q, k: rope.rope_torch(seen(q), seen(k), cos, sin, interleaved=pairs), {
        "eager": eager, "torch.compile": eager,
        "liger (in place)": liger_rope and not (pairs or o.backward) and in_place,
        "ours (in place)": not o.backward and functools.partial(ours, inplace=True),
        "flash-attn": flash_rope and not o.backward and (
            lambda q, k: tuple(flash_rope(seen(t), cos, sin, interleaved=pairs) for t in (q, k))),
        "ours": ours,
    })  # fmt: skip


def angles_case(o, t, hq, hk, d):
    b, s = batch(t)
    q, k = randn(o, b, s, hq, d), randn(o, b, s, hk, d)
    *_, cos, sin = tables(o, s, d, True, 10000.0)
    return Case(f"B{b} S{s} H{hq}/{hk} D{d}", f"{hq} and {hk} heads of {d}", t, [q, k], 2 * (q.nbytes + k.nbytes),
                rope.rope_pytorch, {
        "eager": eager_angles, "torch.compile": eager_angles,
        "torch.compile, tables": lambda q, k: [eager_rope(t, cos, sin, True) for t in (q, k)],  # made before
        "ours": rope.rope_triton,
    })  # fmt: skip


def fused_case(o, t, heads, d, kind):
    (b, s), per_head = batch(t), kind == "per head"
    cos, sin, cos_full, sin_full = tables(o, s, d)
    x, w = randn(o, b, s, heads * d), randn(o, d if per_head else heads * d, scale=0.1, shift=1.0)

    def eager(x, w):
        y = eager_rmsnorm(x.unflatten(-1, (heads, d)), w) if per_head else eager_rmsnorm(x, w).unflatten(-1, (heads, d))
        return eager_rope(y, cos_full, sin_full).flatten(-2)

    return Case(f"B{b} S{s} H{heads} D{d} {kind}", f"{kind}, {heads} heads of {d}", t, [x, w],
                (3 if o.backward else 2) * x.nbytes + cos.nbytes + sin.nbytes,
                lambda x, w: fused.fused_rmsnorm_rope_torch(x, w, cos, sin, EPS, heads), {
        "eager": eager, "torch.compile": eager,
        "ours": lambda x, w: fused.fused_rmsnorm_rope(x, w, cos, sin, EPS, heads),
    })  # fmt: skip


def qk_case(o, t, hq, hk, d, offset):
    b, s = batch(t)
    cos, sin, cos_full, sin_full = tables(o, s, d)
    inputs = [randn(o, b, s, (hq + 2 * hk) * d)] + [randn(o, d, scale=0.1, shift=1.0 - offset) for _ in range(2)]
    heads = {"num_heads": hq, "num_kv_heads": hk, "eps": EPS, "offset": offset}

    def eager(qkv, q_weight, k_weight):
        q, k, v = qkv.unflatten(-1, (-1, d)).split((hq, hk, hk), -2)
        normed = eager_rmsnorm(q, q_weight, offset), eager_rmsnorm(k, k_weight, offset)
        return *(eager_rope(t, cos_full, sin_full) for t in normed), v

    turned, v = t * (hq + hk) * d * o.dtype.itemsize, t * hk * d * o.dtype.itemsize
    moved = cos.nbytes + sin.nbytes + (3 * turned + 2 * v if o.backward else 2 * turned)  # v: a view, then a copy
    return Case(f"B{b} S{s} H{hq}/{hk} D{d}", f"{hq} and {hk} heads of {d}", t, inputs, moved,
                lambda *a: fused.fused_qk_norm_rope_torch(*a, cos, sin, **heads), {
        "eager": eager, "torch.compile": eager, "ours": lambda *a: fused.fused_qk_norm_rope(*a, cos, sin, **heads),
    })  # fmt: skip


def weight(o, n, k):
    return randn(o, n, k, scale=k**-0.5)


def sample(o, m):
    """64 rows stand for all in the float64 reference of a forward product; a backward takes whole matrices."""
    return None if o.backward else torch.randperm(m, device=o.device)[:64]


def exact(x, w, rows):
    return x @ w.float().T if rows is None else x[rows].double() @ w.double().T


def tuned(o, m, k, n):
    """Where gemlite and torchao run: they spend seconds on tuning or compiling each shape."""
    return o.gpu and not o.backward and (m, k, n) in TUNED


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


def mlp_case(o, m, k, n):
    x, gate, up, rows = randn(o, m, k), weight(o, n, k), weight(o, n, k), sample(o, m)
    both = None if o.backward else torch.cat((gate, up))

    def packed(x, gate, up):
        gate, up = F.linear(x, both).chunk(2, -1)
        return F.silu(gate) * up

    read, made = x.nbytes + gate.nbytes + up.nbytes, m * n * o.dtype.itemsize
    return Case(f"M{m} K{k} N{n}", f"K{k} N{n}", m, [x, gate, up], 2 * read + made if o.backward else read + made,
                lambda x, gate, up: F.silu(exact(x, gate, rows)) * exact(x, up, rows), {
        "eager": eager_mlp, "eager packed": not o.backward and packed,
        "torch.compile": eager_mlp, "torch.compile packed": not o.backward and packed,
        "cuBLAS + liger": liger_swiglu and (lambda x, g, u: liger_swiglu.apply(F.linear(x, g), F.linear(x, u))),
        "ours": swiglu.fused_gated_mlp,
    }, flops=(8 if o.backward else 4) * m * n * k, rows=rows)  # fmt: skip


def int8_case(o, m, k, n, kind):
    x, rows, w8a8 = randn(o, m, k), sample(o, m), kind == "W8A8"
    q, s = int8_gemm.quantize_weight_per_channel(weight(o, n, k).detach())
    w, s16, wide = int8_gemm.dequantize(q, s, o.dtype), s.to(o.dtype), q.double() * s.double()[:, None]
    if w8a8:
        eager = (lambda x: eager_int8(x, q, s)) if m > 16 else None  # _int_mm takes no fewer rows
        theirs = {"_int_mm": eager, "torch.compile": eager,
                  "torchao": torchao_linear(o, "Int8DynamicActivationInt8WeightConfig", w, m) if m > 16 else None,
                  "gemlite": gemlite_linear(o, "A8W8_int8_dynamic", q, s, m)}  # fmt: skip
    else:
        eager = lambda x: F.linear(x, q.to(x.dtype)) * s16
        theirs = {"dequantised": eager, "torch.compile": eager,
                  # it is for few rows: 0.26 s at M = 2048
                  "torchao": torchao_linear(o, "Int8WeightOnlyConfig", w, m) if m <= 256 else None,
                  "gemlite": gemlite_linear(o, "A16W8", q, s, m)}  # fmt: skip
    return Case(f"{kind} M{m} K{k} N{n}", f"{kind} K{k} N{n}", m, [x], x.nbytes + q.nbytes + m * n * x.itemsize,
                lambda x: exact(x, wide, rows), {
        "F.linear": lambda x: F.linear(x, w), **theirs,
        "ours": lambda x: int8_gemm.int8_gemm(x, q, s, quantize_activations=w8a8),
    }, flops=2 * m * n * k, rate="8 bit" if w8a8 else "16 bit", rows=rows,
        tolerance=0.03 if w8a8 else None)  # fmt: skip


def fp8_case(o, m, k, n, recipe, sums):
    a, sa = fp8_gemm.quantize_fp8(randn(o, m, k), recipe)
    b, sb = fp8_gemm.quantize_fp8(weight(o, n, k), "block2d" if recipe == "block" else recipe)
    wide = [fp8_gemm.dequantize_fp8(*t, torch.float64) for t in ((a, sa), (b, sb))]
    sb = sb.T if recipe != "tensor" else sb
    blocks = recipe == "block"  # PyTorch takes these with the rows of a innermost, and the columns of b outermost
    theirs = (sa.T.contiguous().T, sb.T.contiguous().T) if blocks else (sa, sb)
    name, fast, rows = f"{recipe} {sums}", sums == "fast", sample(o, m)
    moved = sum(t.nbytes for t in (a, b, sa, sb)) + m * n * o.dtype.itemsize
    return Case(f"{name} M{m} K{k} N{n}", f"{name} K{k} N{n}", m, [], moved, lambda: exact(*wide, rows), {
        "_scaled_mm": lambda: torch._scaled_mm(a, b.T, *theirs, out_dtype=o.dtype, use_fast_accum=fast),
        "ours": lambda: fp8_gemm.fp8_gemm(a, b.T, sa, sb, o.dtype, fast_accum=fast),
    }, flops=2 * m * n * k, rate="8 bit", rows=rows, tolerance=0.01)  # fmt: skip


def fp8_linear_case(o, m, k, n):
    x, w, rows = randn(o, m, k), weight(o, n, k), sample(o, m)
    q, s = fp8_gemm.quantize_fp8(w.detach(), "row")
    module = fp8_gemm.FP8Linear(k, n, device=o.device, dtype=o.dtype).requires_grad_(False)
    module.weight.data.copy_(w.detach())
    eager = None if o.backward else lambda x, w: eager_fp8(x, q, s)
    by_row = {"granularity": torchao.PerRow()} if torchao else {}
    # a frozen weight is quantised once, a training one in every forward
    ours = lambda x, w: torch.func.functional_call(module, {"weight": w}, (x,)) if o.backward else module(x)
    moved = 2 * (x.nbytes + w.nbytes) if o.backward else x.nbytes + q.nbytes + s.nbytes
    return Case(f"M{m} K{k} N{n}", f"K{k} N{n}", m, [x, w], moved + m * n * x.itemsize,
                lambda x, w: exact(x, w, rows), {
        "F.linear": F.linear, "_scaled_mm": eager, "torch.compile": eager,
        "torchao": torchao_linear(o, "Float8DynamicActivationFloat8WeightConfig", w.detach(), m, **by_row),
        "gemlite": gemlite_linear(o, "A8W8_fp8_dynamic", q, s, m), "ours": ours,
    }, flops=(4 if o.backward else 2) * m * n * k, rate="16 bit" if o.backward else "8 bit", rows=rows,
        tolerance=0.06)  # fmt: skip


QUANTIZERS = {
    "int8 per token": (lambda x: int8_gemm.quantize_symmetric(x, dim=-1), lambda x: eager_quantize(x, torch.int8)),
    "fp8 row": (lambda x: fp8_gemm.quantize_fp8(x, "row"), lambda x: eager_quantize(x, FP8)),
    "fp8 block": (lambda x: fp8_gemm.quantize_fp8(x, "block"), lambda x: eager_quantize(x, FP8, (2,), 128)),
    "fp8 block2d": (lambda x: fp8_gemm.quantize_fp8(x, "block2d"), lambda x: eager_quantize(x, FP8, (1, 3), 128)),
    "fp8 tensor": (lambda x: fp8_gemm.quantize_fp8(x, "tensor"), lambda x: eager_quantize(x, FP8, (0, 1))),
}


def quantize_case(o, m, k, kind):
    x, (ours, eager_shaped) = randn(o, m, k), QUANTIZERS[kind]
    shapes = [t.shape for t in ours(x)]
    eager = lambda x: [t.view(shape) for t, shape in zip(eager_shaped(x), shapes)]
    moved = x.nbytes + x.numel() + 4 * shapes[1].numel()
    return Case(f"{kind} {m}x{k}", f"{kind}, K{k}", m, [x], moved, eager,
                {"eager": eager, "torch.compile": eager, "ours": ours}, tolerance=0.02)  # fmt: skip


def scaling_case(o, t, op, *shape):
    """Any op's case with our kernel alone."""
    case = OPS[op][0](o, t, *shape)
    case.label, case.group, case.providers = f"{op} {case.label}", op, {"ours": case.providers["ours"]}
    return case


TOKENS = (1, 8, 2048, 16384)
KN = [(4096, 14336), (14336, 4096), (4096, 4096), (8192, 28672)]  # (K, N) of the products
MKN = [(m, k, n) for k, n in KN for m in (1, 8, 16, 64, 256, 2048, 8192)]
TUNED = [(m, *KN[0]) for m in (1, 16, 256, 2048, 8192)] + [(m, *kn) for kn in KN[1:3] for m in (1, 16)]
SMALL = [(1, 512, 768), (64, 512, 768)]
RECIPES = [("tensor", "fast"), ("row", "slow"), ("tensor", "slow"), ("block", "slow")]
HEADS, HEADS70, HEADS_GEMMA = (32, 8, 128), (64, 8, 128), (8, 4, 256)
LINEAR = [
    ("rmsnorm", 4096), ("rmsnorm_residual", 4096), ("swiglu", 14336, "silu"), ("rope", *HEADS, "half"),
    ("rope_angles", *HEADS), ("fused_rmsnorm_rope", 32, 128, "whole row"), ("qk_norm_rope", *HEADS, 0.0),
]  # fmt: skip

# op -> what makes a case, its shapes (tokens or M first), its shapes without a GPU. The widths: Llama 3 8B (4096,
# 14336), Llama 3 70B (8192, 28672), Qwen 3 (2560, 5120), Gemma 3 (5376, 21504).
OPS = {
    "rmsnorm": (
        rmsnorm_case,
        [(t, n) for n in (4096, 8192, 2560, 5120, 5376) for t in TOKENS]
        + [(4096, 4096), (65536, 4096), (1024, 131072), (4096, 32768), (524288, 128)],
        [(8, 1024), (256, 1024)],
    ),
    "rmsnorm_residual": (
        residual_case, [(t, n) for n in (4096, 8192, 5120) for t in TOKENS], [(8, 1024), (256, 1024)]
    ),
    "swiglu": (
        swiglu_case,
        [(t, 14336, kind) for kind in ("silu", "packed") for t in TOKENS]
        + [(t, n, kind) for n, kind in ((28672, "silu"), (21504, "gelu_tanh")) for t in TOKENS[1:]]
        + [(2048, 11008, "silu"), (16384, 12288, "silu")],
        [(8, 1024, "silu"), (256, 1024, "gelu_tanh"), (256, 1024, "packed")],
    ),
    "rope": (
        rope_case,
        [(t, *HEADS, kind) for kind in ("half", "interleaved", "transposed") for t in TOKENS]
        + [(t, *heads, "half") for heads in (HEADS70, HEADS_GEMMA) for t in TOKENS[1:]],
        [(128, 8, 2, 64, "half"), (128, 8, 2, 64, "interleaved")],
    ),
    "rope_angles": (angles_case, [(t, *HEADS) for t in TOKENS], [(128, 8, 2, 64)]),
    "fused_rmsnorm_rope": (
        fused_case,
        [(t, 32, 128, kind) for kind in ("whole row", "per head") for t in TOKENS] + [(16384, 64, 128, "whole row")],
        [(128, 8, 64, "whole row"), (128, 8, 64, "per head")],
    ),
    "qk_norm_rope": (
        qk_case,
        [(t, *heads) for heads in ((*HEADS, 0.0), (*HEADS70, 0.0), (*HEADS_GEMMA, 1.0)) for t in TOKENS],
        [(64, 8, 2, 64, 0.0), (256, 8, 2, 64, 1.0)],
    ),
    "gated_mlp": (mlp_case, [s for s in MKN if s[1:] in (KN[0], KN[3])], SMALL),
    "int8_gemm": (functools.partial(int8_case, kind="W8A16"), MKN, SMALL),
    "int8_gemm_w8a8": (functools.partial(int8_case, kind="W8A8"), MKN, SMALL),
    "fp8_gemm": (
        fp8_case,
        [(*s, "row", "fast") for s in MKN] + [(*s, *recipe) for recipe in RECIPES for s in MKN[:7]],
        [(*SMALL[1], *recipe) for recipe in RECIPES],
    ),
    "fp8_linear": (fp8_linear_case, MKN, SMALL),
    "quantize": (
        quantize_case,
        [(m, k, kind) for kind in QUANTIZERS for m, k in ((2048, 4096), (8192, 4096), (8192, 14336))],
        [(128, 512, kind) for kind in QUANTIZERS],
    ),
    "scaling": (scaling_case, [(2**i, *shape) for shape in LINEAR for i in range(11, 17)], [(256, "rmsnorm", 1024)]),
}  # fmt: skip
FORWARD_ONLY = ("int8_gemm_w8a8", "fp8_gemm", "quantize", "host", "model")


# ---------------------------------------------------------------------------------------------------------------------
# The host's time of a small eager call
# ---------------------------------------------------------------------------------------------------------------------


def bare_launch(x, w):
    """A plain kernel[grid](...) of eight arguments that does nothing: what any Triton op pays at least."""

    @rmsnorm.triton.jit
    def nothing(x_ptr, w_ptr, y_ptr, stride_x, stride_y, M, N, eps):
        pass

    return lambda: nothing[(1,)](x, w, x, x.stride(0), x.stride(0), *x.shape, EPS)


def host_rows(o):
    """[call, us, times the first of its group], at one token; the host's part alone, nothing waits for the GPU."""
    k, n = (4096, 14336) if o.gpu else (512, 768)
    x, w, gate, up, q, kv = (randn(o, *s) for s in ((1, k), (k,), (1, n), (1, n), (1, 1, 32, 128), (1, 1, 8, 128)))
    xg, wg, gate_g = (t.clone().requires_grad_() for t in (x, w, gate))
    cos, sin, cos_full, sin_full = tables(o, 1, 128)
    wide = weight(o, n, k)
    w8, s8 = int8_gemm.quantize_weight_per_channel(wide)
    (xf, sxf), (wf, swf) = fp8_gemm.quantize_fp8(x, "row"), fp8_gemm.quantize_fp8(wide, "row")
    module = fp8_gemm.FP8Linear(k, n, device=o.device, dtype=o.dtype).requires_grad_(False)
    gem = gemlite_linear(o, "A16W8", w8, s8, 1)
    compiled = torch.compile(torch_rmsnorm, fullgraph=True, dynamic=False)
    groups = [
        [("F.rms_norm", lambda: torch_rmsnorm(x, w)), ("rmsnorm", lambda: rmsnorm.rmsnorm(x, w, EPS)),
         ("bare launch, eight arguments", o.gpu and rmsnorm.triton and bare_launch(x, w)),
         ("compiled F.rms_norm", o.gpu and (lambda: compiled(x, w))),
         ("quack", quack_norm and (lambda: quack_norm(x, w, eps=EPS))),
         ("liger", liger_norm and (lambda: liger_norm.apply(x, w, EPS, 0.0, "llama", False)))],
        [("F.rms_norm, gradients on", lambda: torch_rmsnorm(xg, wg)),
         ("rmsnorm, gradients on", lambda: rmsnorm.rmsnorm(xg, wg, EPS)),
         ("quack, gradients on", quack_norm and (lambda: quack_norm(xg, wg, eps=EPS))),
         ("liger, gradients on", liger_norm and (lambda: liger_norm.apply(xg, wg, EPS, 0.0, "llama", False)))],
        [("F.silu(gate) * up", lambda: F.silu(gate) * up), ("swiglu_fused", lambda: swiglu.swiglu_fused(gate, up)),
         ("liger swiglu", liger_swiglu and (lambda: liger_swiglu.apply(gate, up)))],
        [("F.silu(gate) * up, gradients on", lambda: F.silu(gate_g) * up),
         ("swiglu_fused, gradients on", lambda: swiglu.swiglu_fused(gate_g, up))],
        [("F.rms_norm", lambda: torch_rmsnorm(x, w)), ("apply_rope, q and k", lambda: rope.apply_rope(q, kv, cos, sin)),
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
        times = {name: [] for name, fn in group if fn}
        turns = [call for call in group if call[1]] * (25 if o.gpu else 5)  # the host's other work falls on all alike
        with torch.set_grad_enabled("gradients on" in group[0][0]):
            for name, fn in turns:
                try:
                    if name in times:
                        times[name].append(loop_us(fn, o, 50 if o.gpu else 3, wait=False))
                except Exception as error:
                    note(f"  host: {name}: {reason(error)}")
                    del times[name]
        medians = {name: sorted(us)[len(us) // 2] for name, us in times.items()}
        rows += [[name, us, us / next(iter(medians.values()))] for name, us in medians.items()]
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# A whole model: Llama, its layer made of PyTorch's own ops or of the repo's
# ---------------------------------------------------------------------------------------------------------------------

CAPTION = """\
Llama 3 8B's shapes, random weights, PyTorch's attention throughout. stock: PyTorch's ops, as transformers writes them;
ours: the repo's, projections packed; int8, fp8: ours with QuantizedLinear, FP8Linear; compiled: torch.compile of one
layer, which all layers share, and of the end. decode: a token a sequence in a static cache, captured in a CUDA graph.
training: forward, loss, backward. peak: the variant's weights and what a step allocates. error: against float32, of
the logits; in training of the embedding's gradient.
"""
LLAMA = types.SimpleNamespace(layers=32, hidden=4096, inner=14336, heads=32, kv_heads=8, dim=128, vocab=128256)
TINY = types.SimpleNamespace(layers=2, hidden=64, inner=96, heads=4, kv_heads=2, dim=16, vocab=256)
# sequences, tokens of each (decode: rows of the cache), layers
STEPS = [("prefill", 1, 4096, 32), ("prefill", 4, 2048, 32), ("decode", 1, 512, 32), ("decode", 8, 512, 32),
         ("training", 1, 4096, 8)]  # fmt: skip
TINY_STEPS = [("prefill", 2, 32, 2), ("decode", 2, 64, 2), ("training", 1, 32, 1)]


def model_weights(o, c):
    """[{name: weight}], which all variants share: of both ends, then of each layer."""
    norm = lambda: randn(o, c.hidden, scale=0.1, shift=1.0)
    added = lambda k: weight(o, c.hidden, k).mul_((2 * c.layers) ** -0.5)  # the residual stream keeps its size
    ends = {"embed": randn(o, c.vocab, c.hidden), "norm": norm(), "head": weight(o, c.vocab, c.hidden)}
    return [ends] + [{
        "norm1": norm(), "qkv": weight(o, (c.heads + 2 * c.kv_heads) * c.dim, c.hidden), "o": added(c.heads * c.dim),
        "norm2": norm(), "gate_up": weight(o, 2 * c.inner, c.hidden), "down": added(c.inner),
    } for _ in range(c.layers)]  # fmt: skip


def linear(weight):
    module = torch.nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    module.weight = torch.nn.Parameter(weight)
    return module


class StockLayer(torch.nn.Module):
    """x is what the layer before adds to the residual stream."""

    def __init__(self, c, w):
        super().__init__()
        self.heads, self.dim = (c.heads, c.kv_heads, c.kv_heads), c.dim
        self.norm1, self.norm2 = torch.nn.Parameter(w["norm1"]), torch.nn.Parameter(w["norm2"])
        self.o_proj, self.down_proj = linear(w["o"]), linear(w["down"])
        self.project(w)

    def project(self, w):
        self.q_proj, self.k_proj, self.v_proj = map(linear, w["qkv"].split([h * self.dim for h in self.heads]))
        self.gate_proj, self.up_proj = map(linear, w["gate_up"].chunk(2))

    def norm(self, x, residual, weight):
        residual = residual + x
        h = residual.float()
        return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype), residual

    def qkv(self, x):
        return [p(x).unflatten(-1, (-1, self.dim)) for p in (self.q_proj, self.k_proj, self.v_proj)]

    def rotated(self, q, k, cos, sin):
        return eager_rope(q, cos, sin), eager_rope(k, cos, sin)

    def gated(self, x):
        return F.silu(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x, residual, cos, sin, cache, positions, mask):
        x, residual = self.norm(x, residual, self.norm1)
        q, k, v = self.qkv(x)  # (B, S, heads, dim)
        q, k, v = (t.transpose(1, 2) for t in (*self.rotated(q, k, cos, sin), v))
        if cache is not None:
            k, v = updated(cache, positions, k, v)
        if q.dtype == torch.float32:  # no kernel takes fewer heads of k there, and the scores would fill the memory
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        x = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=q.shape[1] > k.shape[1])
        x, residual = self.norm(self.o_proj(x.transpose(1, 2).flatten(2)), residual, self.norm2)
        return self.down_proj(self.gated(x)), residual


def updated(cache, positions, k, v):
    return [old.index_copy_(2, positions, new) for old, new in zip(cache, (k, v))]


class OurLayer(StockLayer):
    def project(self, w):
        self.qkv_proj, self.gate_up_proj = linear(w["qkv"]), linear(w["gate_up"])

    def norm(self, x, residual, weight):
        return rmsnorm.rmsnorm_residual_fused(x, residual, weight, EPS, return_residual=True)

    def qkv(self, x):
        return self.qkv_proj(x).unflatten(-1, (-1, self.dim)).split(self.heads, 2)

    def rotated(self, q, k, cos, sin):
        return rope.apply_rope(q, k, cos, sin)

    def gated(self, x):
        if type(self.gate_up_proj) is torch.nn.Linear:
            return swiglu.fused_gated_mlp(x, self.gate_up_proj.weight)
        return swiglu.swiglu_fused(self.gate_up_proj(x))


class Decoder(torch.nn.Module):
    def __init__(self, c, weights, layer, tables):
        super().__init__()
        self.embed, self.norm = (torch.nn.Parameter(weights[0][name]) for name in ("embed", "norm"))
        self.layers = torch.nn.ModuleList(layer(c, w) for w in weights[1:])
        self.lm_head, self.tables = linear(weights[0]["head"]), tables

    def end(self, x, residual, labels):
        logits = self.lm_head(self.layers[0].norm(x, residual, self.norm)[0])
        return logits if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    def forward(self, tokens, positions, caches=(), mask=None, labels=None):
        residual = F.embedding(tokens, self.embed)
        x = torch.zeros_like(residual).requires_grad_(residual.requires_grad)  # else the first layer is compiled apart
        cos, sin = (t[positions] for t in self.tables)
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers)):
            x, residual = layer(x, residual, cos, sin, cache, positions, mask)
        return self.end(x, residual, labels)


class HuggingFace(Decoder):
    """transformers' own model around the same weights."""

    def __init__(self, c, weights, layer, tables):
        super().__init__(c, weights, layer, tables)
        library = importlib.import_module("transformers")
        config = library.LlamaConfig(
            hidden_size=c.hidden, intermediate_size=c.inner, num_hidden_layers=len(self.layers), vocab_size=c.vocab,
            num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.dim, rms_norm_eps=EPS,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, attn_implementation="sdpa",
        )  # fmt: skip
        with torch.device("meta"):
            self.causal = library.LlamaForCausalLM(config)
        model, self.causal.lm_head = self.causal.model, self.lm_head
        model.rotary_emb = type(model.rotary_emb)(config).to(self.embed.device)
        model.embed_tokens.weight, model.norm.weight = self.embed, self.norm
        for theirs, own in zip(model.layers, self.layers):
            theirs.input_layernorm.weight, theirs.post_attention_layernorm.weight = own.norm1, own.norm2
            for name, module in own.named_children():
                setattr(theirs.self_attn if name[0] in "qkvo" else theirs.mlp, name, module)

    def forward(self, tokens, positions, caches=(), mask=None, labels=None):
        cache = types.SimpleNamespace(update=lambda k, v, i: updated(caches[i], positions, k, v))
        where = (mask, positions[None], cache) if caches else ()
        out = self.causal(tokens, *where, labels=labels, shift_labels=labels, use_cache=False)
        return out.logits if labels is None else out.loss


def build(o, name, c, weights, training):
    """The variant of that name."""
    ours = name.startswith(("ours", "int8", "fp8"))
    cos, sin, *full = tables(o, 4096, c.dim)
    full = [t.to(weights[0]["embed"].dtype) for t in full]
    make = HuggingFace if name == "transformers" else Decoder
    model = make(c, weights, OurLayer if ours else StockLayer, (cos, sin) if ours else full)
    if name == "int8":
        int8_gemm.quantize_model(model)
    for layer in model.layers:
        for child, old in list(layer.named_children()) if name == "fp8" else ():
            new = None if training else fp8_gemm.FP8Linear.from_linear(old)
            if training:
                new = fp8_gemm.FP8Linear(old.in_features, old.out_features, device="meta")
                new.weight = old.weight
            setattr(layer, child, new)
        if name.endswith("compiled"):
            layer.compile(fullgraph=True, dynamic=False)
    if name.endswith("compiled"):
        model.end = torch.compile(model.end, fullgraph=True, dynamic=False)
    return model


def captured(call):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return lambda: (graph.replay(), out, call)[1]  # call keeps the model's memory


def model_rows(o, c, weights, kind, b, s):
    """{variant: figures}: each held against float32, then timed; {} for one that failed."""
    training, decode = kind == "training", kind == "decode"
    tokens, labels = (torch.randint(c.vocab, (b, 1 if decode else s), device=o.device) for _ in range(2))
    places = torch.arange(s, device=o.device)
    positions = places[s // 2 :][:1] if decode else places
    caches = [[randn(o, b, c.kv_heads, s, c.dim) for _ in "kv"] for _ in weights[1:] if decode]

    def step(model, caches=caches):
        if training:
            return torch.autograd.grad(model(tokens, positions, labels=labels), list(model.parameters()))[0]
        if not decode:
            return model(tokens, positions)
        mask = torch.zeros_like(caches[0][0][:1, :1, None, :, 0]).masked_fill_(places > positions, -math.inf)
        return model(tokens, positions, caches, mask)

    def checked(out):  # of a prefill every sixteenth position
        return out if training else out[:, ::16].clone()

    wide = build(o, "stock", c, [{k: t.float() for k, t in w.items()} for w in weights], training)
    want = checked(step(wide, [[t.float() for t in cache] for cache in caches]))
    del wide
    names = ["stock", *["stock compiled"] * o.gpu, *["transformers"] * bool(peer("transformers")), "ours"]
    names += [*["ours compiled"] * o.gpu, *["int8"] * (not training), "fp8"]
    names += ["stock, not captured", "ours, not captured"] if decode and o.gpu else []
    calls, rows = {}, {name: {} for name in names}
    for name in names:
        try:
            model = build(o, name.partition(",")[0], c, weights, training)
            call = functools.partial(step, model)
            row = {"weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers()))}
            got = checked(call())
            if o.gpu:
                del got
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                got = checked(call())
                row["peak"] = torch.cuda.max_memory_allocated() - before + row["weights"]
            if decode and o.gpu and "," not in name:
                call = captured(call)
                got = checked(call())
            row["error"] = (torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want)).item()
        except Exception as exception:
            note(f"  {name}: {reason(exception)}")
            continue
        allowed = {"int8": 0.05, "fp8": 0.15}.get(name, 1.1 * rows["stock"].get("error", 0.04) + 1e-5)
        note(f"  {name}: relative error {row['error']:.2g}, allowed {allowed:.2g}")
        if row["error"] <= allowed:
            calls[name], rows[name] = call, row
    turns = []
    for n in range(7):  # in another order each time: the GPU's clock depends on what ran before
        order = random.Random(n).sample(list(calls), len(calls))
        turns.append({name: loop_us(calls[name], o, 20 if decode else 2) for name in order})
    for name in calls:
        us = sorted(turn[name] for turn in turns)[3]
        rows[name] |= {"ms": us / 1e3, "tokens/s": 1e6 * tokens.numel() / us}
    return rows


def model_steps(o):
    """Prints a table for each step. {step: {variant: figures}}"""
    print(CAPTION if o.gpu else "A toy model, random weights; columns as on a GPU.\n")
    c, steps = LLAMA if o.gpu else TINY, {}
    weights = model_weights(o, c)
    for kind, b, s, layers in STEPS if o.gpu else TINY_STEPS:
        title = f"{kind} {b}x{s}, {layers} layers"
        note(title)
        with torch.set_grad_enabled(kind == "training"):
            rows = steps[title] = model_rows(o, c, weights[: layers + 1], kind, b, s)
        torch._dynamo.reset()
        head = [title, "tokens/s", "ms a token" if kind == "decode" else "ms a step", "x stock"]
        head, stock = head + ["weights GB", "peak GB", "error"], rows["stock"].get("ms", math.nan)
        lines = [[
            name, f"{r['tokens/s']:.0f}", f"{r['ms']:.3g}", f"{stock / r['ms']:.2f}", f"{r['weights'] / 1e9:.2f}",
            f"{r['peak'] / 1e9:.2f}" if o.gpu else "-", f"{r['error']:.1e}",
        ] if r else [name, *"------"] for name, r in rows.items()]  # fmt: skip
        print(github(lines, head))
    return steps


# ---------------------------------------------------------------------------------------------------------------------
# Tables, plots, command line
# ---------------------------------------------------------------------------------------------------------------------


def short(us):
    return "-" if us is None else f"{us:.1f}" if us < 1000 else f"{us:.0f}"


def github(lines, head):
    align = ["left"] + ["right"] * (len(head) - 1)
    return tabulate(lines, head, tablefmt="github", disable_numparse=True, colalign=align) + "\n"


def print_table(title, rows, o):
    fullest = sorted(rows, key=lambda row: -len(row["us"]))  # has the providers in their order
    names = list(dict.fromkeys(name for row in fullest for name in row["us"] if name != "ours"))
    pair, product = [*names[:1], "ours"], rows[0]["flops"]
    head = [f"{title}, us", *names, "ours", *(["TFLOP/s"] if product else [])]
    head += ["GB/s", "of floor" if product else "of copy rate"] if o.gpu else []
    head += ["x best", "best other", *(["error: " + ", ".join(pair)] if product else []), "call us: " + ", ".join(pair)]
    lines = []
    for row in rows:
        us, calls, errors, ours = row["us"], row["call_us"], row["error"], row["us"].get("ours")
        line = [row["label"], *(short(us.get(name)) for name in (*names, "ours"))]
        if ours:
            best = min((name for name in names if name in us and not name.startswith("ours")), key=us.get, default=None)
            line += [f"{row['flops'] / ours / 1e6:.3g}"] if product else []
            line += [f"{row['bytes'] / ours / 1e3:.0f}", f"{row['floor_us'] / ours:.2f}"] if o.gpu else []
            line += [f"{us[best] / ours:.2f}", best] if best else ["-", "-"]
            line += [", ".join(f"{errors[name]:.1e}" if name in errors else "-" for name in pair)] if product else []
            line += [", ".join(short(calls.get(name)) for name in pair)]
        lines.append(line + [""] * (len(head) - len(line)))
    print(github(lines, head))


def crossovers(rows):
    """For each (K, N) the M at which int8 stops paying against F.linear in 16 bits, between the two M around it."""
    for group in dict.fromkeys(row["group"] for row in rows):
        own = [row for row in rows if row["group"] == group and {"F.linear", "ours"} <= row["us"].keys()]
        gains = [(row["x"], row["us"]["F.linear"] / row["us"]["ours"]) for row in own]
        turn = [(a, b) for a, b in zip(gains, gains[1:]) if a[1] >= 1 > b[1]]
        if turn:
            (m0, g0), (m1, g1) = turn[0]
            yield f"{group}: int8 pays up to about M = {m0 * (m1 / m0) ** (math.log(g0) / math.log(g0 / g1)):.0f}"
        elif gains:
            said = "pays" if gains[0][1] >= 1 else "does not pay"
            yield f"{group}: int8 {said} from M = {gains[0][0]} to {gains[-1][0]}"


def picture(tall, wide, width=5.5):
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(width * wide, 4 * tall))
    return figure, figure.subplots(tall, wide, squeeze=False)


def save(figure, folder, name, title):
    figure.suptitle(title)
    figure.tight_layout()
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(pathlib.Path(folder) / f"{name}.png", dpi=100)


def plot(op, rows, folder, o):
    """One picture an op: a panel for each group of three sizes or more, a line for each provider, the floor dashed; of
    "scaling" one panel with the time of each op over the tokens."""
    groups = {g: [r for r in rows if r["group"] == g] for g in dict.fromkeys(r["group"] for r in rows)}
    groups = {g: own for g, own in groups.items() if len(own) > 2} or groups
    names = list(dict.fromkeys(name for row in rows for name in row["us"]))
    scaling, product = op == "scaling", rows[0]["flops"]
    amount, unit, y = ("flops", 1e6, "TFLOP/s") if product else ("bytes", 1e3, "GB/s")
    wide = 1 if scaling else min(len(groups), 3)
    tall = 1 if scaling else math.ceil(len(groups) / wide)
    figure, axes = picture(tall, wide)
    for axis in axes.flat:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log" if product or scaling else "linear")
        axis.grid(alpha=0.3)
    for i, (group, own) in enumerate(groups.items()):
        axis = axes.flat[0 if scaling else i]
        for name in dict.fromkeys(name for r in own for name in r["us"]):
            timed = [(r, r["us"][name]) for r in own if name in r["us"]]
            points = [(r["x"], us if scaling else r[amount] / us / unit) for r, us in timed]
            style = {"color": f"C{i if scaling else names.index(name)}"}
            style |= {"color": "black", "linewidth": 2.2, "zorder": 5} if name == "ours" and not scaling else {}
            label = group if scaling else f"torch.{name}" if name[0] == "_" else name  # matplotlib hides a leading "_"
            axis.plot(*zip(*points), marker="o", markersize=3, label=label, **style)
        if o.gpu:
            floor = [(r["x"], r["floor_us"] if scaling else r[amount] / r["floor_us"] / unit) for r in own]
            label = None if scaling else "floor" if product else "copy rate"
            axis.plot(*zip(*floor), color="gray", linestyle="--", linewidth=1, label=label)
        axis.set(title="time, dashed: at the copy rate" if scaling else group, xlabel="M" if product else "tokens",
                 ylabel="us" if scaling else y)  # fmt: skip
        axis.legend(fontsize=7)
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    save(figure, folder, f"{op}_{o.way}", f"{op} {o.way}, {o.name}, {o.type}")


def plot_model(steps, folder, o):
    figure, axes = picture(1, len(steps), 3.6)
    for axis, (title, rows) in zip(axes.flat, steps.items()):
        names = [name for name in rows if rows[name]][::-1]
        colors = ["C0" if name[0] in "st" else "black" if name[0] == "o" else "C1" for name in names]
        axis.barh(names, [rows[name]["tokens/s"] for name in names], color=colors)
        axis.set(title=title, xlabel="tokens/s")
        axis.locator_params("x", nbins=4)
    save(figure, folder, "model", f"A whole model, {o.name}, {o.type}")


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


def main():
    names = [*OPS, "host", "model"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", nargs="*", help=f"names or how they begin; without one all but model: {', '.join(names)}")
    parser.add_argument("--backward", action="store_true", help="time the backward pass: the autograd.grad call alone")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="bfloat16; float32 without a GPU")
    parser.add_argument("--json", metavar="F", help="write every figure to F as well")
    parser.add_argument("--plot", metavar="DIR", help="draw one picture an op into DIR (needs matplotlib)")
    args = parser.parse_args()
    if unknown := [op for op in args.op if not any(name.startswith(op) for name in names)]:
        parser.error(f"op must be among {', '.join(names)}, got {', '.join(unknown)}")
    ops = [name for name in names if name.startswith(tuple(args.op or names[:-1]))]
    if dropped := [name for name in ops if args.backward and name in FORWARD_ONLY]:
        ops = [name for name in ops if name not in dropped]
        if not ops:
            parser.error(f"{', '.join(FORWARD_ONLY)} have no backward pass to time")
        note(f"no backward pass to time: {', '.join(dropped)}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    try:
        if args.json:
            pathlib.Path(args.json).parent.mkdir(parents=True, exist_ok=True)
            open(args.json, "a").close()
        if args.plot:
            pathlib.Path(args.plot).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(str(error))
    o = options(args)
    if not o.gpu:
        torch.set_num_threads(1)  # on shapes this small threads gain little, and crawl where the other cores are busy
    torch.manual_seed(0)
    torch._functorch.config.donated_buffer = not o.backward  # there a compiled backward is to run more than once
    warnings.filterwarnings("ignore", module="torch.profiler")
    versions = {"torch": torch.__version__} | {p: v for p in ("triton", *PEERS, "transformers") if (v := installed(p))}
    result = {"gpu": o.name, "versions": versions}
    result |= {"dtype": o.type, "way": o.way, "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}"}
    result["command"] = " ".join(["python benchmark.py", *sys.argv[1:]])
    print(f"{o.name}, {', '.join(f'{k} {v}' for k, v in versions.items())}, {o.type}, {result['date']}")
    print(result["command"])
    if o.gpu:
        o.rates = result["rates"] = measured_rates(o)
        rates = [f"{k} {v / 1e12:.4g} {'TB/s' if k == 'copy' else 'TFLOP/s'}" for k, v in o.rates.items()]
        print("Measured here: " + ", ".join(rates) + "\n")
    else:
        print("No CUDA or ROCm GPU: the PyTorch twins against eager PyTorch on small shapes. This says nothing about the kernels.\n")
    missing = []
    for op in ops:
        if op == "host":
            rows = result[op] = host_rows(o)
            head = ["host's time of one call at one token", "us", "x first"]
            print(tabulate(rows, head, tablefmt="github", floatfmt=("", ".1f", ".2f")) + "\n")
        elif op == "model":
            result[op] = model_steps(o)
            missing += [f"{step}: {name}" for step, rows in result[op].items() for name in rows if not rows[name]]
        else:
            make, full, small = OPS[op]
            rows = result[op] = []
            for shape in full if o.gpu else small:
                if o.backward and o.gpu and shape[0] < 1024:
                    continue  # no decode step trains
                try:
                    with torch.set_grad_enabled(o.backward):
                        row = measure(make(o, *shape), o)
                except Exception as error:  # too little memory for the case, say: the others go on
                    note(f"{op} {shape}: {reason(error)}")
                    missing.append(f"{op} {shape}")
                    continue
                rows.append(row)
                missing += [] if "ours" in row["us"] else [f"{op} {row['label']}"]
                note(f"{op} {row['label']}: ours {short(row['us'].get('ours'))} us")
                torch._dynamo.reset()
            if not rows:
                continue
            print_table(f"{op} {o.way}", rows, o)
            if op == "int8_gemm" and o.gpu and not o.backward:
                print(*crossovers(rows), sep="\n", end="\n\n")
        if args.json:  # after every op: a run cut short keeps what it has
            pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
        if args.plot and result[op] and op != "host":
            plot_model(result[op], args.plot, o) if op == "model" else plot(op, result[op], args.plot, o)
    if missing:
        sys.exit(f"no result of ours for {', '.join(missing)}")


if __name__ == "__main__":
    main()
