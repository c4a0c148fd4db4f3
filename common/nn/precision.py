"""Which number format the hardware is fast in."""

import torch

from common.errors import InputError

_FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision(device, wanted="auto"):
    """Return the torch dtype for autocast on `device`: float32 means no autocast.

    wanted: auto, fp32, bf16 or fp16. auto takes bfloat16 where the hardware computes in it (GPUs since Ampere, CPUs
    with AVX512-BF16 or AMX), float16 on older GPUs, float32 elsewhere. Raises InputError for a format that the
    device lacks; bf16 may be asked of any CPU, and is slow without native support.
    """
    device = torch.device(device)
    if wanted not in ("auto", *_FORMATS):
        raise InputError(f"precision {wanted!r}: choose one of auto, {', '.join(_FORMATS)}")
    if wanted == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if _gpu_has_bf16(device) else torch.float16
        return torch.bfloat16 if device.type == "cpu" and _cpu_has_bf16() else torch.float32
    if wanted == "fp16" and device.type == "cpu":
        raise InputError("precision fp16 needs a GPU: use bf16 or fp32 on a CPU")
    if wanted == "bf16" and device.type == "cuda" and not _gpu_has_bf16(device):
        raise InputError("precision bf16: this GPU does not compute in it; use fp16, fp32 or auto")
    return _FORMATS[wanted]


def autocast(device, dtype):
    """Return the context of mixed precision for a dtype from `precision`; it does nothing for float32."""
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32)


def _gpu_has_bf16(device):
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)  # a T4 says yes when emulation counts


def _cpu_has_bf16():
    # private names, absent from builds for other processors: float32 is right there
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask is not None and ask() for ask in asked)
