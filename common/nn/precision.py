"""The dtype for mixed precision on a device."""

import torch

from common.errors import InputError, check

_FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision(device, wanted="auto"):
    """Return the torch dtype for autocast on `device`: float32 means no autocast.

    wanted: auto (bf16 if the hardware supports it, else fp16 on GPUs), fp32, bf16 or fp16; else InputError.
    """
    device = torch.device(device)
    if wanted == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if _gpu_supports_bf16(device) else torch.float16
        return torch.bfloat16 if device.type == "cpu" and _cpu_supports_bf16() else torch.float32
    check(wanted != "fp16" or device.type != "cpu", "precision fp16 needs a GPU: use bf16 or fp32 on a CPU")
    if wanted == "bf16" and device.type == "cuda" and not _gpu_supports_bf16(device):
        raise InputError("precision bf16: this GPU does not support it; use fp16, fp32 or auto")
    return _FORMATS[wanted]


def autocast(device, dtype):
    """Return the autocast context for a dtype of `precision`; it does nothing for float32."""
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32)


def _gpu_supports_bf16(device):
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)  # a T4 only emulates it


def _cpu_supports_bf16():
    # private functions, absent from builds for other processors, which use float32
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask is not None and ask() for ask in asked)
