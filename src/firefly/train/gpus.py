"""What a device can do at most: memory, bf16 and float32 arithmetic, bandwidth, and links to other devices.

GPU figures are NVIDIA's data sheets of the card named, SXM where there are two forms; for GeForce the tables of the
architecture whitepapers "Ampere GA102", "Ada" and "RTX Blackwell". bf16 is dense (half of the figures with sparsity)
with float32 sums. Sheets print both directions of a link together, here is one; rates are in 10⁹, memory in 2³⁰.
A CPU has no such sheet, so it is measured.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from firefly.errors import RecipeError, choices

GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """One device. Rates are None where only the memory is known (`--gpu 24GB`)."""

    name: str
    kind: str  # cuda or cpu
    memory_bytes: int
    bf16_flops: float | None = None
    float32_flops: float | None = None
    bandwidth_bytes_per_s: float | None = None
    peer_bytes_per_s: float = 16e9  # to another GPU of the node, one direction: NVLink, else PCIe
    host_bytes_per_s: float = 32e9  # to main memory over PCIe, one direction


_SHOWN = 0.985
"""Share of the printed memory that programs are given; an H200 of 141 GB shows 139, an H100 of 80 shows 79."""

_SHEETS = {
    # name: GB, bf16 TFLOP/s, float32 TFLOP/s, memory GB/s, NVLink GB/s (0: none), PCIe GB/s
    "B200": (180, 2250, 75, 8000, 900, 64),
    "H200": (141, 989, 67, 4800, 450, 64),
    "H100": (80, 989, 67, 3350, 450, 64),
    "H100 PCIe": (80, 756, 51, 2000, 300, 64),
    "H800": (80, 989, 67, 3350, 200, 64),
    "H20": (96, 148, 44, 4000, 450, 64),
    "A100-80GB": (80, 312, 19.5, 2039, 300, 32),
    "A100-40GB": (40, 312, 19.5, 1555, 300, 32),
    "A800": (80, 312, 19.5, 2039, 200, 32),
    "A40": (48, 149.7, 37.4, 696, 56.25, 32),
    "A30": (24, 165, 10.3, 933, 100, 32),
    "A10": (24, 125, 31.2, 600, 0, 32),
    "L40S": (48, 362, 91.6, 864, 0, 32),
    "L40": (48, 181, 90.5, 864, 0, 32),
    "L4": (24, 121, 30.3, 300, 0, 32),
    "A6000": (48, 154.8, 38.7, 768, 56.25, 32),
    "5090": (32, 209.5, 104.8, 1792, 0, 64),
    "4090": (24, 165.2, 82.6, 1008, 0, 32),
    "4080": (16, 97.5, 48.7, 717, 0, 32),
    "3090": (24, 71, 35.6, 936, 56.25, 32),
}
GPUS = {
    name: Device(
        name,
        "cuda",
        int(_SHOWN * memory * GIB),
        bf16 * 1e12,
        single * 1e12,
        bandwidth * 1e9,
        (nvlink or pcie / 2) * 1e9,  # without NVLink bytes go up to the host's bridge and down again
        pcie * 1e9,
    )
    for name, (memory, bf16, single, bandwidth, nvlink, pcie) in _SHEETS.items()
}


def find_gpu(text: str) -> Device:
    """The GPU that a person means: a name such as H200, "RTX 4090" or A100, or a memory size such as 24GB.

    Raises `RecipeError` for a name that is not in the table.
    """
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:GB|GiB|G)", text.strip(), re.IGNORECASE)
    if size and float(size[1]) > 0:
        return Device(f"a GPU of {size[1]} GB", "cuda", int(float(size[1]) * GIB))
    plain = _plain(text)
    for name, device in GPUS.items():
        if plain in (_plain(name), _plain(name).removesuffix("80gb")):
            return device
    raise RecipeError(
        f"The GPU '{text}' is not known; give its memory, such as 24GB, or a name: {choices(text, GPUS)}."
    )


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|rtx|[\s_-]", "", name.lower())


def this_device() -> Device:
    """The device that training would use here, with the memory that is free now."""
    if torch.cuda.is_available():  # never run in the tests, which have no GPU
        name = torch.cuda.get_device_name()
        free_bytes, _ = torch.cuda.mem_get_info()
        words = re.split(r"[\s_-]+", name.lower())
        known = [gpu for gpu in GPUS.values() if set(re.split(r"[\s-]", gpu.name.lower())) <= {*words}]
        best = max(known, key=lambda gpu: len(gpu.name), default=None)
        if best is None:
            return Device(name, "cuda", free_bytes)
        return replace(best, name=name, memory_bytes=free_bytes)
    return Device("this machine's CPU", "cpu", free_memory_bytes())


def with_measured_rates(device: Device) -> Device:
    """The CPU with its float32 and bf16 rates and its bandwidth measured, which takes a second; a GPU as it is."""
    if device.kind != "cpu":
        return device
    rates = {kind: _matmul_flops(kind) for kind in (torch.float32, torch.bfloat16)}
    block = torch.zeros(1 << 24)
    seconds = _seconds(lambda: block.add_(1.0))
    return Device(
        device.name,
        "cpu",
        device.memory_bytes,
        rates[torch.bfloat16],
        rates[torch.float32],
        2 * block.nbytes / seconds,
    )


def _matmul_flops(dtype: torch.dtype, size: int = 768) -> float:
    square = torch.ones(size, size, dtype=dtype)
    return 2.0 * size**3 / _seconds(lambda: square @ square)


def _seconds(work: object) -> float:
    assert callable(work)
    work()
    best = float("inf")
    for _ in range(3):
        start_s = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start_s)
    return max(best, 1e-9)


def free_memory_bytes() -> int:
    """Main memory that a new job here can have: what the system calls available, within the container's limit."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        table = {
            name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)
        }
        free = table["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        import os

        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1 << 62
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Cached files count as used there, and are given up for whoever needs the room.
        return min(free, int(limit) - int(used) + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):  # no such group, or its limit is "max"
        return free
