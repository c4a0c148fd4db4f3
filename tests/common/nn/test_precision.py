import pytest
import torch

from common.errors import InputError
from common.nn import precision as module
from common.nn.precision import autocast, precision


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_takes_bf16_where_it_is_native(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert precision("cpu") == expected
    assert precision(torch.device("cpu"), "bf16") == torch.bfloat16
    assert precision("cpu", "fp32") == torch.float32


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_takes_bf16_or_fp16(monkeypatch, native, expected):
    monkeypatch.setattr(module, "_gpu_supports_bf16", lambda device: native)
    assert precision("cuda", "auto") == expected
    assert precision("cuda", "fp16") == torch.float16
    if not native:
        with pytest.raises(InputError, match="this GPU does not support it"):
            precision("cuda", "bf16")


def test_a_format_the_cpu_lacks_is_refused():
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        precision("cpu", "fp16")


def test_autocast_does_nothing_for_float32():
    layer = torch.nn.Linear(3, 3)
    for dtype in (torch.float32, torch.bfloat16):
        with autocast("cpu", dtype):
            assert layer(torch.ones(1, 3)).dtype == dtype
