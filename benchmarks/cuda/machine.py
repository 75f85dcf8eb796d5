"""What the GPU says of itself: its name, its clocks, and what holds them down."""

from __future__ import annotations

import shutil
import subprocess

CONSTANT = ("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.mem",
            "power.limit", "ecc.mode.current")  # fmt: skip
MOMENTARY = ("pstate", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw",
             "clocks_event_reasons.active")  # fmt: skip
# NVML's clocks event reasons that slow a busy GPU; the others are an idle one's or a user's limit
THROTTLED = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "temperature",
    0x40: "hardware temperature",
    0x80: "power brake",
}


def query(fields: tuple[str, ...]) -> dict[str, str]:
    """Ask nvidia-smi about the first GPU; empty where there is none."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = [
        "nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}",
        "--format=csv,noheader,nounits",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.split(",")]
    if done.returncode or len(values) != len(fields):
        return {}
    return dict(zip(fields, values, strict=True))


def constant() -> dict[str, str]:
    """Return what does not change."""
    return query(CONSTANT)


def momentary() -> dict[str, str]:
    """Return clocks, temperature, power, and why the clocks are no higher."""
    return query(MOMENTARY)


def throttled(state: dict[str, str]) -> list[str]:
    """Return what slows a GPU in such a state down."""
    try:
        active = int(state.get("clocks_event_reasons.active", "0"), 16)
    except ValueError:
        return []
    return [reason for bit, reason in THROTTLED.items() if active & bit]
