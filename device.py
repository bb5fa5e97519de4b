"""What the machine offers: devices, their dtypes, their tensor cores. For users; no op file imports it.

    python device.py        # a table of it all

Abilities are the hardware's own: a GPU that only emulates bfloat16 (before compute capability 8.0) does not support it.
Works with any PyTorch build, with and without Triton and a GPU, and asks no driver before a function is called.
"""

import os
import platform

import torch

# What stands in for a dtype that a device lacks, nearest first: the same size if there is one, else the next wider.
_STAND_INS = {
    torch.float8_e4m3fn: (torch.bfloat16, torch.float16, torch.float32),
    torch.float8_e5m2: (torch.bfloat16, torch.float16, torch.float32),
    torch.bfloat16: (torch.float16, torch.float32),
    torch.float16: (torch.bfloat16, torch.float32),
    torch.float32: (),
    torch.float64: (torch.float32,),
}


def is_cuda_available() -> bool:
    """Whether PyTorch sees an NVIDIA GPU, or an AMD one under ROCm."""
    return torch.cuda.is_available()


def is_triton_available() -> bool:
    """Whether Triton can be imported; the op files run their PyTorch twins where it cannot."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def get_device(device: torch.device | str | int | None = None) -> torch.device:
    """`device` as a torch.device; without it the best there is: cuda, xpu, mps, cpu.

    Raises: ValueError for a name that PyTorch does not know, and for a number where there is no accelerator.
    """
    if isinstance(device, int) and not torch.accelerator.is_available():
        raise ValueError(f"device must be one that is here, got number {device} of no accelerators")
    if device is not None:
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device must be a torch.device, its name or its number, got {device!r}") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.xpu.is_available():
        return torch.device("xpu")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _index(device: torch.device, backend) -> int:
    count = backend.device_count() if backend.is_available() else 0
    index = backend.current_device() if device.index is None and count else device.index or 0
    if index >= count:
        raise ValueError(f"device must be one of the {count} {device.type} devices here, got {str(device)!r}")
    return index


def get_device_properties(device: torch.device | str | int | None = None) -> dict:
    """Name, size and abilities of a device (by default the best there is).

    Returns: dict of name (str), compute_capability (major, minor; (0, 0) where there is none), total_memory (bytes, 0
    where unknown), multi_processor_count (a CPU's logical cores; 0 where unknown) and the bools supports_fp16,
    supports_bf16, supports_fp8 (e4m3fn tensor cores), supports_int8_tensor_cores.
    Raises: ValueError for a device that is not here or that has no properties.
    """
    device = get_device(device)
    capability, fp16, bf16, fp8, int8 = (0, 0), True, True, False, False
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(_index(device, torch.cuda))
        name, memory, count = p.name, p.total_memory, p.multi_processor_count
        capability = (p.major, p.minor)
        if torch.version.hip:
            arch = p.gcnArchName.split(":")[0]
            fp8 = arch.startswith(("gfx950", "gfx12"))  # gfx942 has fp8 of the fnuz kind, whose values differ
            bf16 = int8 = arch.startswith(("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12"))
        else:
            fp16, bf16, fp8, int8 = (capability >= c for c in ((5, 3), (8, 0), (8, 9), (7, 2)))
    elif device.type == "xpu":
        p = torch.xpu.get_device_properties(_index(device, torch.xpu))
        name, memory, count = p.name, p.total_memory, p.max_compute_units
        int8 = bool(getattr(p, "has_subgroup_matrix_multiply_accumulate", False))
    elif device.type == "mps" and torch.backends.mps.is_available():
        name, memory, count = "Apple " + platform.machine(), torch.mps.recommended_max_memory(), 0
        bf16 = torch.backends.mps.is_macos_or_newer(14, 0)
    elif device.type == "cpu":
        name, count = platform.processor() or platform.machine(), os.cpu_count() or 0
        pages = hasattr(os, "sysconf")  # not on Windows
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if pages else 0
    else:
        raise ValueError(f"device must be a cuda, xpu, mps or cpu device of this machine, got {str(device)!r}")
    return {
        "name": name,
        "compute_capability": capability,
        "total_memory": memory,
        "multi_processor_count": count,
        "supports_fp16": fp16,
        "supports_bf16": bf16,
        "supports_fp8": fp8,
        "supports_int8_tensor_cores": int8,
    }


def supports_bf16(device: torch.device | str | int | None = None) -> bool:
    """Whether the device computes in bfloat16 itself."""
    return get_device_properties(device)["supports_bf16"]


def supports_fp8(device: torch.device | str | int | None = None) -> bool:
    """Whether the device multiplies float8_e4m3fn on tensor cores (NVIDIA: compute capability 8.9 and up)."""
    return get_device_properties(device)["supports_fp8"]


def select_dtype(preferred: torch.dtype = torch.float16, device: torch.device | str | int | None = None) -> torch.dtype:
    """`preferred` where the device supports it, else the nearest float dtype that it does.

    Raises: TypeError where preferred is none of float8_e4m3fn, float8_e5m2, bfloat16, float16, float32, float64.
    """
    if preferred not in _STAND_INS:
        names = ", ".join(str(d).removeprefix("torch.") for d in _STAND_INS)
        raise TypeError(f"preferred must be one of {names}, got {preferred}")
    device = get_device(device)
    p = get_device_properties(device)
    lacks = {
        torch.float8_e4m3fn: not p["supports_fp8"],
        torch.float8_e5m2: not p["supports_fp8"],
        torch.bfloat16: not p["supports_bf16"],
        torch.float16: not p["supports_fp16"],
        torch.float64: device.type == "mps",
    }
    return next(d for d in (preferred, *_STAND_INS[preferred]) if not lacks.get(d, False))


def _main():
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    others = [f"xpu:{i}" for i in range(torch.xpu.device_count())] + ["mps"] * torch.backends.mps.is_available()
    devices = [*cuda, *others, "cpu"]
    triton_version = "none"
    if is_triton_available():
        import triton

        triton_version = triton.__version__
    built_for = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "XPU": torch.version.xpu}
    backend = next((f"{name} {version}" for name, version in built_for.items() if version), "CPU")
    columns = {d: get_device_properties(d) for d in devices}
    rows = [["", *devices]]
    for key in columns["cpu"]:
        values = [c[key] for c in columns.values()]
        if key == "total_memory":
            values = [f"{v / 2**30:.1f} GiB" for v in values]
        elif key == "compute_capability":
            values = [f"{v[0]}.{v[1]}" if v != (0, 0) else "-" for v in values]
        rows.append([key, *("yes" if v is True else "no" if v is False else str(v) for v in values)])
    for preferred in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        chosen = [str(select_dtype(preferred, d)).removeprefix("torch.") for d in devices]
        rows.append([f"select_dtype({str(preferred).removeprefix('torch.')})", *chosen])
    print(f"torch {torch.__version__} ({backend}), triton {triton_version}, Python {platform.python_version()}")
    print(f"default device: {get_device()}\n")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    _main()
