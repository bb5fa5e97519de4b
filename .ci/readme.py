"""Fills the README's figures in from results/h200_*.json, between its `<!-- fill NAME -->` and `<!-- end -->`.

    python .ci/readme.py            writes them
    python .ci/readme.py --check    fails where the README's differ
    python .ci/readme.py --plots    writes them and draws results/*.png, too (needs matplotlib)
"""

import json
import pathlib
import re
import sys
import types

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import benchmark  # noqa: E402

FORWARD, BACKWARD, MODEL = (
    json.loads((ROOT / f"results/h200_{name}.json").read_text()) for name in ("forward", "backward", "model")
)
PEERS = ("liger", "quack", "flash-attn", "gemlite", "torchao", "cuBLAS + liger")
# Of all cases, those in the README's table
SHOWN = {
    "rmsnorm": ["8x4096", "2048x4096", "16384x4096", "16384x8192", "1024x131072", "4096x32768", "524288x128"],
    "rmsnorm_residual": ["2048x4096", "16384x8192"],
    "swiglu": ["8x14336 silu", "2048x14336 silu", "16384x14336 silu", "16384x14336 packed"],
    "rope": ["B8 S1 H32/8 D128 half", "B1 S2048 H32/8 D128 half", "B4 S4096 H32/8 D128 half",
             "B4 S4096 H32/8 D128 interleaved"],
    "rope_angles": ["B4 S4096 H32/8 D128"],
    "fused_rmsnorm_rope": ["B4 S4096 H32 D128 whole row", "B4 S4096 H32 D128 per head"],
    "qk_norm_rope": ["B8 S1 H32/8 D128", "B1 S2048 H32/8 D128", "B4 S4096 H32/8 D128"],
    "gated_mlp": [f"M{m} K4096 N14336" for m in (1, 16, 256, 2048, 8192)],
    "int8_gemm": [f"W8A16 M{m} K4096 N14336" for m in (1, 16, 64, 256, 2048, 8192)],
    "int8_gemm_w8a8": [f"W8A8 M{m} K4096 N14336" for m in (16, 256, 2048, 8192)],
    "fp8_gemm": [f"row fast M{m} K4096 N14336" for m in (1, 16, 256, 2048, 8192)]
    + [f"{recipe} slow M{m} K4096 N14336" for recipe in ("row", "block") for m in (256, 2048, 8192)],
    "fp8_linear": [f"M{m} K4096 N14336" for m in (1, 16, 256, 2048, 8192)],
    "quantize": [f"{kind} 8192x4096" for kind in benchmark.QUANTIZERS],
}  # fmt: skip


def is_peer(name):
    return name.startswith(PEERS)


def gains(result, ops, keep, against=lambda name: not name.startswith("ours") and not is_peer(name)):
    """Over the cases that keep names: the fastest of the others over ours."""
    rows = [row for op in ops for row in result.get(op, []) if "ours" in row["us"] and keep(row)]
    pairs = [([us for name, us in row["us"].items() if against(name)], row["us"]["ours"]) for row in rows]
    ratios = [min(others) / ours for others, ours in pairs if others]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def head():
    many, few = (lambda row: row["x"] >= 2048), (lambda row: row["x"] <= 16)
    row_scales = lambda row: row["label"].startswith("row fast")
    text = {}
    for name, ops in {
        "rmsnorm": ["rmsnorm", "rmsnorm_residual"], "swiglu": ["swiglu"], "rope": ["rope"],
        "fused": ["fused_rmsnorm_rope", "qk_norm_rope"],
    }.items():  # fmt: skip
        text[name] = f"{gains(FORWARD, ops, many)} times forward, {gains(BACKWARD, ops, many)} backward"
    text["mlp"] = (
        f"{gains(FORWARD, ['gated_mlp'], few)} times at M up to 16, "
        f"{gains(FORWARD, ['gated_mlp'], many)} from 2048 up"
    )
    text["int8"] = (
        f"W8A16 {gains(FORWARD, ['int8_gemm'], few)} times at M up to 16, {gains(FORWARD, ['int8_gemm'], many)} from 2048 up; "
        f"W8A8 {gains(FORWARD, ['int8_gemm_w8a8'], many)} there"
    )
    linear = gains(FORWARD, ["fp8_linear"], many, lambda name: name == "F.linear")
    text["fp8"] = (
        f"row scales {gains(FORWARD, ['fp8_gemm'], lambda r: few(r) and row_scales(r))} times `_scaled_mm` at M up to 16, "
        f"{gains(FORWARD, ['fp8_gemm'], lambda r: many(r) and row_scales(r))} from 2048 up; "
        f"`FP8Linear` {gains(FORWARD, ['fp8_linear'], many)} there, and {linear} times bf16"
    )
    text["caption"] = (
        f"The last column: kernel time in bf16 on one {FORWARD['gpu']}, the faster of PyTorch's own ops and `torch.compile` over ours, "
        "from the\nslowest case to the fastest (from 2048 tokens up where nothing else is said). [All figures](#results)."
    )
    gain = lambda kind, name: [
        rows["stock compiled"]["ms"] / rows[name]["ms"] for step, rows in MODEL["model"].items() if step.startswith(kind)
    ]
    span = lambda kind, name: " to ".join(f"{g:.2f}" for g in sorted(gain(kind, name)))
    text["model"] = (
        f"A whole model, Llama 3 8B's shapes, against `torch.compile` of PyTorch's own ops: decoding {span('decode', 'ours')} times, with int8 "
        f"{span('decode', 'int8')};\nprefill {span('prefill', 'ours')}, with fp8 {span('prefill', 'fp8')}; training {span('training', 'ours')}, "
        f"compiled too {span('training', 'ours compiled')}, with fp8 {span('training', 'fp8')}."
    )
    turns = "; ".join(
        f"{group.removeprefix('W8A16 ')}: {said.rpartition('about ')[2]}"
        for group, _, said in (line.partition(": ") for line in benchmark.crossovers(FORWARD["int8_gemm"]))
    )
    text["crossover"] = (
        f"W8A16 is faster than bf16 `F.linear` on one {FORWARD['gpu']} up to about: {turns}. Beyond, it saves\nmemory."
    )
    return text


def us(value):
    return "-" if value is None else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def machine(result):
    return f"{result['gpu']}, {', '.join(f'{k} {v}' for k, v in result['versions'].items())}, {result['dtype']}, {result['date']}, `{result['command']}`."


def cases(result):
    yield "| op | case | PyTorch | `torch.compile` | best peer | ours | of the floor | x best |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for op, labels in SHOWN.items():
        rows = {row["label"]: row for row in result.get(op, [])}
        for label in labels:
            if label not in rows:
                continue
            row = rows[label]
            times, ours = row["us"], row["us"]["ours"]
            fastest = lambda names: min((n for n in names if n in times), key=times.get, default=None)
            own = fastest([n for n in times if not is_peer(n) and not n.startswith(("ours", "torch.compile"))])
            compiled = fastest([n for n in times if n.startswith("torch.compile")])
            peer = fastest([n for n in times if is_peer(n)])
            best = fastest([n for n in times if not n.startswith("ours")])
            plain = own in (None, "eager")
            cells = [op, label, us(times.get(own)) + ("" if plain else f" ({own})"), us(times.get(compiled))]
            cells += ["-" if peer is None else f"{us(times[peer])} ({peer})", us(ours)]
            cells += ["-" if row["x"] < 100 and not row["flops"] else f"{row['floor_us'] / ours:.2f}"]
            yield "| " + " | ".join([*cells, f"{times[best] / ours:.2f}" if best else "-"]) + " |"


def behind():
    """Where another provider is more than 3 % faster."""
    for result in (FORWARD, BACKWARD):
        for op, rows in result.items():
            if op not in benchmark.OPS or op == "scaling":
                continue
            found = []
            for row in rows:
                others = {n: t for n, t in row["us"].items() if not n.startswith("ours")}
                if others and "ours" in row["us"]:
                    best = min(others, key=others.get)
                    found.append((others[best] / row["us"]["ours"], row["label"], best))
            slow = sorted(f for f in found if f[0] < 0.97)
            if slow:
                worst = "; ".join(f"{label} {ratio:.2f} ({best})" for ratio, label, best in slow[:3])
                yield f"- {op} {result['way']}: {len(slow)} of {len(found)} cases; furthest behind: {worst}"
    for step, rows in MODEL["model"].items():
        ratios = {name: rows["stock compiled"]["ms"] / row["ms"] for name, row in rows.items() if name in ("ours", "int8", "fp8")}
        slow = [f"{name} {ratio:.2f}" for name, ratio in ratios.items() if ratio < 0.99]
        if slow:
            yield f"- model, {step}: {', '.join(slow)} (stock compiled)"


def model():
    steps = MODEL["model"]
    names = list(dict.fromkeys(name for rows in steps.values() for name in rows))
    names.sort(key=lambda name: "," in name)
    yield "| case | " + " | ".join(names) + " |"
    yield "| --- |" + " ---: |" * len(names)
    for step, rows in steps.items():
        stock = rows["stock"]["ms"]
        cells = [f"{rows[n]['ms']:.3g} ({stock / rows[n]['ms']:.2f})" if rows.get(n) else "-" for n in names]
        yield f"| {step} | " + " | ".join(cells) + " |"


def results():
    rates = "; ".join(
        ", ".join(f"{k} {v / 1e12:.4g} {'TB/s' if k == 'copy' else 'TFLOP/s'}" for k, v in run.items()) + name.removeprefix("rates")
        for name, run in FORWARD.items() if name.startswith("rates")
    )  # fmt: skip
    picture = lambda title, name: ["", f"![{title}](results/{name}.png)"]
    lines = [
        "Kernel time in microseconds from the profiler, the median of calls that take turns, the L2 cache flushed before each; \"of the floor\"",
        "is the fewest bytes or operations over the rates measured in the same run (above 1 where more is read than written: the copy that sets",
        "the rate does as much of each; - where the launch sets the time), \"x best\" the fastest other provider over ours. (liger's RoPE",
        "overwrites q and k; ours in place is a column of the full table.) All cases and providers: [forward](results/h200_forward.txt),",
        "[backward](results/h200_backward.txt), and the same as JSON, from which `.ci/readme.py` fills these figures in and draws the pictures.",
        "", f"**Forward.** {machine(FORWARD)} Measured there: {rates}.", "", *cases(FORWARD),
        "", f"**Backward.** {machine(BACKWARD)}", "", *cases(BACKWARD),
        "", "**The host's time** of one eager call at one token: at this size it is the whole cost, unless a CUDA graph or",
        "`torch.compile` takes it away.", "", "| call | us | x first of its group |", "| --- | ---: | ---: |",
        *(f"| {name} | {time:.1f} | {ratio:.2f} |" for name, time, ratio in FORWARD["host"]),
        "", f"**A whole model**, Llama 3 8B's shapes with random weights: ms a step (speed over stock's). {machine(MODEL)}",
        "stock: PyTorch's ops as transformers writes them; ours: the repo's, with packed projections; int8 and fp8: ours with `QuantizedLinear` and",
        "`FP8Linear`. (The recipes under Real models leave the projections apart; they were not timed.) Decode: one token a sequence, captured in a CUDA graph but for the last two columns. Memory, tokens/s and errors:",
        "[h200_model.txt](results/h200_model.txt).", "", *model(), *picture("A whole model: tokens a second", "model"),
        "", "**Where another is faster** (by more than 3 %, all cases counted):", "", *behind(),
        *picture("Time over tokens, 2k to 64k", "scaling_forward"), *picture("W8A16: TFLOP/s over M", "int8_gemm_forward"),
        *picture("FP8: TFLOP/s over M", "fp8_gemm_forward"), *picture("Gated MLP: TFLOP/s over M", "gated_mlp_forward"),
    ]  # fmt: skip
    return "\n" + "\n".join(lines) + "\n"


def main():
    readme = ROOT / "README.md"
    was = text = readme.read_text()
    for name, filled in {**head(), "results": results()}.items():
        text, count = re.subn(rf"(<!-- fill {name} -->).*?(<!-- end -->)", lambda m: m[1] + filled + m[2], text, flags=re.S)
        assert count == 1, name
    if "--check" in sys.argv:
        sys.exit("the README's figures are not those of results/: run .ci/readme.py" if text != was else 0)
    readme.write_text(text)
    if "--plots" in sys.argv:
        for result in (FORWARD, BACKWARD):
            o = types.SimpleNamespace(gpu=True, name=result["gpu"], type=result["dtype"], way=result["way"])
            for op, rows in result.items():
                if op in benchmark.OPS:
                    benchmark.plot(op, rows, ROOT / "results", o)
        o = types.SimpleNamespace(name=MODEL["gpu"], type=MODEL["dtype"])
        benchmark.plot_model(MODEL["model"], ROOT / "results", o)


if __name__ == "__main__":
    main()
