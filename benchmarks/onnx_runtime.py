"""ONNX Runtime against torch on a CPU, in one process: the lungs' shipped network and others with random weights.

Run: python -m benchmarks.onnx_runtime [threads]. Torch runs channels last, in float32 and, where the processor has it,
in bfloat16; the networks take turns, and the best of five times counts. Outputs are compared in float32. OpenVINO in
torch's format takes part if it is installed (pip install openvino; the project does not use it).
"""

import importlib.util
import os
import sys
import time

import torch

from common.nn.models import classifier, segmenter
from common.nn.onnx import TOLERANCE, OnnxSession, difference, to_onnx
from common.nn.precision import autocast, precision
from solutions.lung_segmentation.segmenter import load_segmenter

ROUNDS, BATCH = 5, 4


def networks():
    """Yield (name, network, side of its images)."""
    lungs = load_segmenter(device="cpu")
    yield "shipped lung network", lungs._model, lungs.size
    torch.manual_seed(0)
    for name, side in (("tf_efficientnet_lite0", 224), ("densenet121", 224), ("resnet50", 224)):
        yield name, classifier(name, 14, "none"), side
    yield "U-Net, ResNet-34", segmenter("unet", "resnet34", "none"), 256


def openvino(content, threads, dtype):
    """Return the network of an ONNX file's bytes as OpenVINO runs it: a function of images, uint8."""
    import openvino

    core, kind = openvino.Core(), {torch.bfloat16: "bf16"}.get(dtype, "f32")
    how = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": kind}
    model = core.compile_model(core.read_model(content, b""), "CPU", how)
    return lambda images: model(images.numpy())


@torch.inference_mode()
def main(threads="1"):
    """Print a line a network."""
    torch.set_num_threads(int(threads))
    fastest = precision("cpu")
    print(f"{threads} threads, batch {BATCH}, load {os.getloadavg()[0]:.1f}; torch in fp32 and {fastest}")
    for name, net, side in networks():
        images = torch.randint(0, 256, (BATCH, 1, side, side), dtype=torch.uint8)
        content = to_onnx(net, images)
        session = OnnxSession(content)
        found = difference(net.eval(), session, images)
        assert found <= TOLERANCE, (name, found)
        net.to(memory_format=torch.channels_last)
        ways = {"fp32": (net, torch.float32), "auto": (net, fastest), "onnx": (session, torch.float32)}
        if importlib.util.find_spec("openvino"):
            ways["openvino"] = openvino(content, int(threads), fastest), torch.float32
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(ROUNDS + 1):  # the first round warms up, and is never the best
            for way, (network, dtype) in ways.items():
                with autocast("cpu", dtype):
                    begun = time.perf_counter()
                    network(images)
                    best[way] = min(best[way], time.perf_counter() - begun)
        ms = {way: 1000 * seconds / BATCH for way, seconds in best.items()}
        print(f"{name}, {side} px: torch {ms['fp32']:.1f} ms an image (as `infer` runs it {ms['auto']:.1f})", end="")
        for way, label in (("onnx", "ONNX"), ("openvino", f"OpenVINO in {fastest}")):
            if way in ms:
                ratios = f"{ms['fp32'] / ms[way]:.2f} x ({ms['auto'] / ms[way]:.2f} x)"
                print(f", {label} {ms[way]:.1f}: {ratios}", end="")
        print(f"; ONNX within {found:.0e}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
