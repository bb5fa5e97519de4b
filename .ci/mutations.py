"""Plants faults, one at a time, in a copy of the repo and says whether the suite catches each.

    python .ci/mutations.py [NAME ...]     all of them, or those whose name contains one of these words

Without a GPU the kernels run in Triton's interpreter. The table goes to results/mutations.txt. Exit status: 1 where a fault is missed,
2 where the text to be replaced does not occur exactly once (then the code has changed, and the fault has to be planted anew).
"""

import concurrent.futures
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent

# name, file, what stands there, what stands there instead, tests that are to notice (pytest -k)
MUTATIONS = [
    # ---- rmsnorm
    ("norm: eps outside the root", "rmsnorm.py", "keep_dims=True) / N + tl.cast(eps, tl.float32))",
     "keep_dims=True) / N) + tl.cast(eps, tl.float32)", "test_rmsnorm"),
    ("norm: offset forgotten", "rmsnorm.py", "w += tl.cast(offset, tl.float32)", "w += 0.0", "test_rmsnorm"),
    ("norm: mask of the last columns dropped", "rmsnorm.py", "mask = (rows < M) & (at < N)\n        h =", "mask = (rows < M) & (at < N + 1)\n        h =", "test_rmsnorm"),
    ("norm: one block of a long row skipped", "rmsnorm.py", "LAST: tl.constexpr = (N - 1) // BLOCK_N * BLOCK_N",
     "LAST: tl.constexpr = (N - 1) // BLOCK_N * BLOCK_N // (2 * BLOCK_N) * BLOCK_N", "test_rmsnorm"),
    ("norm: casting ignored", "rmsnorm.py", "xhat = xhat.to(y_ptr.dtype.element_ty).to(tl.float32)", "xhat = xhat.to(tl.float32)", "test_rmsnorm"),
    ("norm: sum not rounded to the residual's dtype", "rmsnorm.py", "(h + res.to(tl.float32)).to(res.dtype).to(tl.float32)",
     "h + res.to(tl.float32)", "test_rmsnorm"),
    ("norm: row stride taken for the width", "rmsnorm.py", "t.shape[-1] if t.is_contiguous() else t.stride(0)", "t.shape[-1]", "test_rmsnorm"),
    ("norm: sign in the backward pass", "rmsnorm.py", "dx = rstd * (g - xhat * mean)", "dx = rstd * (g + xhat * mean)", "test_rmsnorm"),
    ("norm: gradient through the second output lost", "rmsnorm.py", "dx += tl.load(dh_ptr", "dx += 0.0 * tl.load(dh_ptr", "test_rmsnorm"),
    ("norm: backward of long rows without the weight", "rmsnorm.py", '(w if KEPT else _load_weight(w_ptr, at, at < N, offset, ""))', "(w if KEPT else 1.0)", "test_rmsnorm"),
    ("norm: frozen parts get a gradient", "rmsnorm.py", "need_x, need_residual, need_w = ctx.needs_input_grad[:3]",
     "need_x, need_residual, need_w = True, ctx.needs_input_grad[1], weight is not None", "test_rmsnorm"),
    ("norm: residual's gradient in x's dtype", "rmsnorm.py", "shared = h.dtype == dtype ", "shared = True ",
     "test_rmsnorm"),
    ("norm: second derivatives silently wrong", "rmsnorm.py", "    @torch.autograd.function.once_differentiable\n", "", "test_trust_gradients"),
    ("launch: alignment left out of the key", "rmsnorm.py", "t.dtype if t.data_ptr() % 16 == 0 else (t.dtype,)", "t.dtype", "test_host"),
    ("launch: device left out of the key", "swiglu.py", "key = id(kernel), device, scalars,", "key = id(kernel), scalars,", "test_host"),
    ("norm: strides of saved tensors taken for granted", "rmsnorm.py", "shape, h, rstd = h.shape, _rows(h), rstd.contiguous()", "shape = h.shape", "test_trust_hooks"),
    ("norm: rows with a stride copied", "rmsnorm.py", "return t if t.stride(1) == 1 else t.contiguous()", "return t.contiguous()", "test_trust_copies"),
    # ---- rope
    ("rope: wrong half", "rope.py", "tl.load(x_ptr + R // 2 + pairs", "tl.load(x_ptr + D // 2 + pairs", "test_rope"),
    ("rope: backward does not negate the sine", "rope.py", "            sin = -sin\n", "            sin = sin\n", "test_rope"),
    ("rope: negative positions read before the table", "rope.py", "(position >= 0) & (position < rows) & (pairs", "(position < rows) & (pairs",
     "test_rope_positions or (test_fuzz and apply_rope)"),
    ("rope: positions past the table read on", "rope.py", "(position >= 0) & (position < rows) & (pairs", "(position >= 0) & (pairs",
     "test_rope_positions or (test_fuzz and apply_rope)"),
    ("rope: the part that is not rotated is left out", "rope.py", "mask & (rest < D))\n\n", "mask & (rest < R))\n\n", "test_rope"),
    ("rope: angle rounded down to a quarter turn", "rope.py", "quarter = (turn + 536870912) >> 30", "quarter = turn >> 30", "test_rope_angles"),
    ("rope: heads share one stride of k and q", "rope.py", "stride_h, H = tl.where(of_k, stride_kh, stride_qh)", "stride_h, H = stride_qh", "test_rope"),
    ("rope: yarn without its attention factor", "rope.py", "if m and m_all else grow + 1", "if m and m_all else 1.0", "test_rope_scaling"),
    ("rope: tables stay where they were made", "rope.py", "            if device != self._kept[0].device:\n", "            if False:\n", "test_rope_embedding_moves"),
    ("rope: autograd not told of inplace", "rope.py", "torch.autograd.graph.increment_version(t)", "pass", "test_rope_inplace or trust"),
    ("rope: tables of a batch read with one stride", "rope.py", "stride_cb = cos.stride(0) if at and cos.shape[0] > 1 else 0\n    if", "stride_cb = 0\n    if",
     "test_rope"),
    ("rope: dynamic frequencies kept for short calls", "rope.py", "elif rows > self.max_seq_len >= length and self.dynamic:", "elif False:", "test_rope_embedding"),
    ("rope: k's heads counted on from q's", "rope.py", "h = tl.where(of_k, h - Hq, h)", "h = h + 0", "test_rope"),
    ("rope: a traced decode step's table of one row", "rope.py", "            if positions is not None:\n                length = (max", "            if False:\n                length = (max", "traced_decode_step"),
    ("rope: gradients of an output that nothing uses", "rope.py", "ctx.mark_non_differentiable(*(y for x, y in zip((q, k), outs) if y is not None and not x.requires_grad))", "pass",
     "test_rope"),
    # ---- fused RMSNorm + RoPE
    ("fused: heads normed by the whole row's width", "fused_rmsnorm_rope.py", "_sum(squares, WHOLE) / (H * D if WHOLE else D)", "_sum(squares, WHOLE) / (H * D)", "test_fused"),
    ("fused: heads past the end of k counted", "fused_rmsnorm_rope.py", "mask = (token < tokens) & (at < Hk)", "mask = (token < tokens) & (at < Hk + 1)",
     "test_fused"),
    ("fused: gradient of v not copied", "fused_rmsnorm_rope.py", "Hk if need_x else 0)\n        programs_q", "0)\n        programs_q", "test_fused"),
    ("fused: the turn's sine has the wrong sign", "fused_rmsnorm_rope.py", "tl.fma(n0, cos, -(n1 * sin)), tl.fma(n1, cos, n0 * sin)",
     "tl.fma(n0, cos, n1 * sin), tl.fma(n1, cos, -(n0 * sin))", "test_fused"),
    ("fused: rows that fill up a tile count in the weights' gradients", "fused_rmsnorm_rope.py",
     "rstd = tl.where(mask, rstd, 0.0)", "rstd += 0.0",
     "test_trust_norms"),
    ("fused: positions outside the tables", "fused_rmsnorm_rope.py", "tl.where(known | (mask == 0), cos, float(\"nan\"))", "cos", "test_fused"),
    ("fused: strided weights", "fused_rmsnorm_rope.py", "return x, q_weight.contiguous(), k_weight", "return x, q_weight, k_weight",
     "test_fuzz and fused"),
    # ---- swiglu
    ("swiglu: halves of a packed tensor swapped", "swiglu.py", "        gate, up = gate.chunk(2, dim=-1)\n    if out",
     "        up, gate = gate.chunk(2, dim=-1)\n    if out", "test_swiglu"),
    ("swiglu: gelu's derivative", "swiglu.py", "phi + x * tl.exp(-0.5 * x * x)", "phi + tl.exp(-0.5 * x * x)", "test_swiglu"),
    ("swiglu: huge gates", "swiglu.py", "c = tl.minimum(tl.maximum(x, -20.0), 20.0)", "c = x + 0.0", "test_swiglu or (test_fuzz and swiglu)"),
    ("swiglu: float32 by the rounded sigmoid", "swiglu.py", "s = tl.where(z > 0, 1 - e * q, e * q)", "s = tl.where(z > 0, q, e * q)", "test_swiglu_float32"),
    ("gated MLP: gate and up swapped", "swiglu.py", "            if UP_FIRST:\n", "            if not UP_FIRST:\n", "test_gated"),
    ("gated MLP: last step of K skipped", "swiglu.py", "for k in range(0, tl.cdiv(K, BLOCK_K)):", "for k in range(0, K // BLOCK_K):", "test_gated"),
    ("gated MLP: frozen x gets a gradient, x does not", "swiglu.py", "dx = dgate @ gate_weight if ctx.needs_input_grad[0] else None",
     "dx = None if ctx.needs_input_grad[0] else dgate @ gate_weight", "test_gated"),
    ("gated MLP: one descriptor, however far apart", "swiglu.py", "gate_weight.data_ptr()) < 2**40", "gate_weight.data_ptr()) < 2**62", "test_gated"),
    ("gated MLP: columns between two launches left out", "swiglu.py", "up_weight, made, activation, end)\n", "up_weight, made, activation, end + 8)\n", "test_gated or gated_mlp_of_two"),
    ("gated MLP: a symbol for the stages", "swiglu.py", "stages = 4 if turns == 1 else 3 if turns == 2 else 2", "stages = max(5 - turns, 2)", "test_gated"),
    ("swiglu: a strided gradient", "swiglu.py", "_swiglu_backward(_rows(dout), _rows(gate), _rows(up), d, None", "_swiglu_backward(dout, _rows(gate), _rows(up), d, None", "test_gated or test_trust_gradients_of"),
    # ---- int8
    ("int8: the last tile moved up a row too far", "int8_gemm.py", "tl.minimum(m, M - BLOCK_M)", "tl.minimum(m, M - BLOCK_M - 1)", "test_int8"),
    ("int8: halves rounded up", "int8_gemm.py", "return (v + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)", "return tl.floor(v + 0.5).to(tl.int8)", "test_int8_quantizer"),
    ("int8: an all-zero row", "int8_gemm.py", "return tl.where(scale == 0.0, 1.0, scale)", "return scale", "test_int8_quantizer"),
    ("int8: one row quantised, its scale forgotten", "int8_gemm.py", "            y *= x_scale\n        y = _finish(", "            y *= 1.0\n        y = _finish(", "test_int8_gemm"),
    ("int8: a linear of inference mode", "int8_gemm.py", "with torch.inference_mode(False):  # its", "with torch.no_grad():  # its", "inference_mode_train"),
    ("int8: scale of the wrong channel", "int8_gemm.py", "y *= tl.load(scale_ptr + offs_n, mask=offs_n < N)",
     "y *= tl.load(scale_ptr + offs_n // 2, mask=offs_n < N)", "test_int8_gemm"),
    ("int8: rows of x past the end of the matrix", "int8_gemm.py", "x_ptrs = x_ptr + (offs_m % M).to(tl.int64)[None, :] * stride_xm + offs_k[:, None]",
     "x_ptrs = x_ptr + (offs_m % (M - 1)).to(tl.int64)[None, :] * stride_xm + offs_k[:, None]", "test_int8_gemm"),
    ("int8: scales cast with the model", "int8_gemm.py", "self._buffers[name] = was.to(self._buffers[name].device)", "pass", "test_int8_linear"),
    ("int8: tied weights swapped", "int8_gemm.py", " or len(owners.get(memory(module.weight), ())) > 1", "", "test_int8_quantize_model"),
    ("int8: bias with the wrong sign", "int8_gemm.py", "y += tl.load(bias_ptr + offs_n", "y -= tl.load(bias_ptr + offs_n", "test_int8_gemm"),
    ("int8: strided scales", "int8_gemm.py", "scale, bias = scale.contiguous(), bias if", "scale, bias = scale, bias if", "test_int8_gemm or (test_fuzz and int8_gemm)"),
    ("int8: autocast ignored", "int8_gemm.py", "x = x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device_type))", "x = x + 0", "test_int8_gemm_autocast"),
    ("int8: names to skip ignored", "int8_gemm.py", "skip & above.union(parts) or len(", "len(", "test_int8_quantize_model"),
    ("int8: AMD sent to the twin", "int8_gemm.py", "return (8, 0), 100", "return (7, 5), 100", "test_trust_amds_route"),
    ("int8: W8A8 has no gradient in its twin", "int8_gemm.py", "x - x.detach() if quantize_activations", "x.detach() * 0.0 if quantize_activations", "test_int8"),
    # ---- fp8
    ("fp8: cached while another tensor shares the memory", "fp8_gemm.py", "storage._cdata) > 2:", "storage._cdata) > 99:", "test_fp8_linear_cache"),
    ("fp8: stale cache after an in-place edit", "fp8_gemm.py", "state = storage._cdata, w.data_ptr(), w._version,", "state = storage._cdata, w.data_ptr(),",
     "test_fp8_linear_cache"),
    ("fp8: stale cache after another tensor took the memory", "fp8_gemm.py", "state, StorageWeakRef(storage), quantized", "state, None, quantized",
     "test_fp8_linear_cache or test_trust_fp8"),
    ("fp8: scales of the step before", "fp8_gemm.py", "scale = tl.load(a_scale_ptrs + k // 128 * stride_ask)",
     "scale = tl.load(a_scale_ptrs + max(k // 128 - 1, 0) * stride_ask)", "test_fp8_gemm"),
    ("fp8: scale axes of w swapped", "fp8_gemm.py", "0 if b_scale.numel() == 1 else b_scale.stride(1), b_scale.stride(0) if blocks else 0,",
     "0 if b_scale.numel() == 1 else b_scale.stride(0), b_scale.stride(1) if blocks else 0,", "test_fp8_gemm"),
    ("fp8: NaN widened to a number", "fp8_gemm.py", "tl.where((q & 0x7F) == 0x7F, 0x7E00,", "tl.where((q & 0x7F) == 0x80, 0x7E00,", "test_fp8_widening"),
    ("fp8: the smallest scale", "fp8_gemm.py", "scale.clamp(_TINY, torch", "scale.clamp(0.0, torch", "test_fp8_quantiser"),
    ("fp8: infinities counted in the scale", "fp8_gemm.py", "        return x * 0.0 + x\n", "        return x\n", "test_fp8_quantiser"),
    ("fp8: weights of the block recipe quantised by row blocks", "fp8_gemm.py", '"block2d" if self.granularity == "block" else self.granularity', "self.granularity",
     "test_fp8_linear"),
    ("fp8: bias gets no gradient from an inference layer", "fp8_gemm.py", "        if ctx.needs_input_grad[2]:\n", "        if ctx.needs_input_grad[1]:\n",
     "test_fp8_linear or test_trust_fp8"),
    ("fp8: torch.compile takes inputs for written", "fp8_gemm.py", "is_pure=True", "is_pure=False", "test_ahead_of_time_writes"),
    ("fp8: a fused optimizer's steps not seen", "fp8_gemm.py", "state += (_steps_of(storage),)", "state += (0,)", "test_fp8_linear_cache"),
    ("fp8: steps that are not fused not seen", "fp8_gemm.py", "if storage in _steps:", "if storage in _steps and group.get('fused'):", "test_fp8_linear_cache"),
    ("fp8: traced with its cache", "fp8_gemm.py", "or torch.jit.is_tracing() or (w.is_cuda", "or (w.is_cuda", "test_fp8_linear_trace"),
    ("fp8: the cache goes along with a copy", "fp8_gemm.py", "        return type(None), ()\n", "        return tuple, (tuple(self),)\n", "test_fp8_linear_copies"),
    ("rope: results as transposed views", "rope.py", "return x.new_empty_strided(x.shape, (H * S * D, D, S * D, 1)[-x.dim() :])",
     "return _dense_like(x.transpose(-3, -2), '').transpose(-3, -2)", "test_rope_results"),
    ("rope: tables of inference mode kept", "rope.py", "unfit = eager and (kept[0].is_inference() or", "unfit = eager and (", "test_rope_embedding_tables"),
    # ---- any file
    ("fp8: blocks repeated, which Inductor cuts wrongly", "fp8_gemm.py", "        if torch.compiler.is_compiling():\n            # By index",
     "        if False:\n            # By index", "test_compile_blocks_by_inductor"),
    ("fp8: each part of K the whole", "fp8_gemm.py", "tl.range(part * BLOCK_K, K, SPLIT * BLOCK_K, num", "tl.range(0, K, SPLIT * BLOCK_K, num", "test_fp8_parts"),
    ("fp8: the bias once in each part", "fp8_gemm.py", "bias if split == 1 else None, out", "bias, out", "test_fp8_parts"),
    ("fp8: parts of one place", "fp8_gemm.py", "(part.to(tl.int64) * M + offs_m)", "(part.to(tl.int64) * 0 + offs_m)", "test_fp8_parts"),
    ("fp8: a weight saved that nothing asks for", "fp8_gemm.py", "*(kept if needs_x else (None, None))", "*kept", "saves_no_weight"),
    ("fp8: a linear of inference mode", "fp8_gemm.py", "with torch.inference_mode(False):  # its", "with torch.no_grad():  # its", "inference_mode_train"),
    ("int8: bits of a symbol", "int8_gemm.py", "(known_bits := _one_of(range(2, 9), bits)) is None", "(known_bits := bits) not in range(2, 9)", "test_compile_quantize_symmetric"),
    ("int8: a pruned bias assigned", "int8_gemm.py", "        if not isinstance(module.bias, nn.Parameter | None):  # pruned, say\n            continue\n", "",
     "pruned_bias"),
    ("norm: size asked before who serves", "rmsnorm.py", "if not _kernel_serves(x, residual, weight) or not x.numel():",
     "if not x.numel() or not _kernel_serves(x, residual, weight):", "test_compile_sizes"),
    ("norm: float64 normed in the residual's float32", "rmsnorm.py", "torch.promote_types(torch.promote_types(h.dtype, dtype), torch.float32)",
     "torch.promote_types(h.dtype, torch.float32)", "narrower_residual"),
    ("fused: v of a copy", "fused_rmsnorm_rope.py", " or qkv.stride(-1) != 1:  # autocast, or", ":  # autocast, or", "test_fused_qk_norm_rope"),
    ("benchmark: NaN beside a right result", "benchmark.py", "torch.stack([(g - w).norm() / w.norm() for g, w in pairs]).max().item()",
     "max(((g - w).norm() / w.norm()).item() for g, w in pairs)", "test_benchmark_gives"),
    ("device: fp8 from 8.0 on", "device.py", "(8, 9)", "(8, 0)", "test_device"),
    # ---- what takes two devices or streams, or much memory
    ("norm: rows counted in 32 bits", "rmsnorm.py", "rows = tl.program_id(0).to(tl.int64) * BLOCK_M", "rows = tl.program_id(0) * BLOCK_M",
     "test_rmsnorm_beyond or rows_far_apart"),
    ("rope: another device's stream", "rope.py", "with torch.cuda.device(q.device):  # Triton launches", "if True:  # Triton launches",
     "test_rope_second_gpu or launches_on_the_tensors"),
    ("fp8: another stream does not wait", "fp8_gemm.py", "            stream.wait_event(cache[4])\n", "", "test_fp8_linear_cache_on_other or another_stream"),
]  # fmt: skip


def run(mutation):
    name, file, old, new, selection = mutation
    source = (ROOT / file).read_text()
    if source.count(old) != 1:
        return name, file, f"the text occurs {source.count(old)} times", 0.0
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for path in [*ROOT.glob("*.py"), ROOT / "README.md", ROOT / "requirements.txt"]:
            shutil.copy(path, folder)
        (pathlib.Path(folder) / file).write_text(source.replace(old, new))
        if "ahead_of_time" not in selection and "test_compile" not in selection:  # what takes minutes
            selection = f"({selection}) and not ahead_of_time and not compile and not alone"
        command = [sys.executable, "-m", "pytest", "-qx", "--no-header", "--tb=no", "-p", "no:cacheprovider", "test_kernels.py", "-k", selection]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": os.path.join(folder, "cache")}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    verdict = {0: "MISSED", 1: "caught"}.get(done.returncode, f"pytest ended with {done.returncode}")
    if done.returncode < 0:
        verdict = f"caught by a crash (signal {-done.returncode})"
    if done.returncode == 1:
        failed = [line.split("::")[1].split(" - ")[0] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR")) and "::" in line]
        verdict += f" by {failed[0]}" if failed else ""
    return name, file, verdict, time.monotonic() - start


if __name__ == "__main__":
    import torch

    GPU = torch.cuda.is_available()
    words = sys.argv[1:]
    chosen = [m for m in MUTATIONS if not words or any(w in m[0] for w in words)]
    workers = 4 if GPU else len(os.sched_getaffinity(0))
    where = torch.cuda.get_device_name() if GPU else f"CPU ({platform.machine()}), Triton's interpreter"
    lines = [f"{len(chosen)} planted faults, {where}, torch {torch.__version__}, {time.strftime('%Y-%m-%d %H:%M')}", ""]
    print(lines[0], file=sys.stderr)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        results = []
        for result in pool.map(run, chosen):
            results.append(result)
            print(f"{result[3]:5.0f} s  {result[0]}: {result[2]}", file=sys.stderr, flush=True)
    width = max(len(r[0]) for r in results)
    lines += [f"{name:{width}}  {file:22}  {verdict}" for name, file, verdict, _ in results]
    caught = sum(r[2].startswith("caught") for r in results)
    lines += ["", f"caught {caught}, missed {sum(r[2] == 'MISSED' for r in results)}"]
    print("\n".join(lines))
    if not words:
        (ROOT / "results" / "mutations.txt").write_text("\n".join(lines) + "\n")
    bad = [r for r in results if not r[2].startswith("caught")]
    sys.exit(0 if not bad else 1 if any(r[2] == "MISSED" for r in bad) else 2)
