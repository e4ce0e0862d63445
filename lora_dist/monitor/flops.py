"""What a device can compute at most, by its name, which a run's FLOPs are compared with (MFU). Called by `engine/telemetry.py`."""

from __future__ import annotations

# Dense TFLOP/s in bfloat16 and float16 with float32 sums, from the makers' data sheets. The first name that is part of the device's counts.
_TFLOPS = (
    ("B200", 2250.0),
    ("H200", 989.0),
    ("H100 NVL", 835.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("A40", 150.0),
    ("A10", 125.0),
    ("A6000", 155.0),
    ("RTX 4090", 165.0),
    ("RTX 3090", 71.0),
    ("V100", 125.0),
    ("T4", 65.0),
)


def peak_tflops(device_name: str, dtype: str, given: float | None = None) -> float | None:
    """Dense TFLOP/s of one device; None where it is not known, and MFU is not told.

    Args:
        device_name: as the driver says it.
        dtype: what is computed in, such as bfloat16; float32 has no figure of its own (it depends on TF32).
        given: the user's own figure, which rules.
    """
    if given is not None:
        return given
    if dtype not in ("bfloat16", "float16"):
        return None
    return next((figure for name, figure in _TFLOPS if name.lower() in device_name.lower()), None)
