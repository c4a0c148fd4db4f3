"""Training and inference on a CPU: PyTorch's default float32 against our bfloat16 with channels-last.

`python -m benchmarks.cpu_bf16` prints images per second and the ratios; the goal is 2 on CPUs with native bf16. On a
busy machine OMP_NUM_THREADS=1 gives steadier figures. Both start from the same weights, take turns, and must agree in
loss and probabilities.
"""

import time

import numpy as np
import torch

from common.nn.losses import combo
from common.nn.models import segmenter
from common.nn.precision import autocast, precision

NETWORKS = (("fpn", "resnet34"), ("unet", "tf_efficientnet_lite0"))
SIZE, BATCH, ROUNDS = 256, 4, 3


def main():
    """Measure every network of NETWORKS and print the table."""
    ours = precision("cpu")
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (BATCH, 1, SIZE, SIZE), dtype=np.uint8))
    masks = torch.from_numpy((rng.random((BATCH, 1, SIZE, SIZE)) < 0.1).astype(np.uint8))
    print(f"auto chooses {ours}; {SIZE} px, batch {BATCH}, {torch.get_num_threads()} threads, best of {ROUNDS}")
    print(f"{'':32}{'fp32, contiguous':>18}{'bf16, channels-last':>21}{'ratio':>8}")
    for architecture, encoder in NETWORKS:
        ways = [(_network(architecture, encoder, torch.contiguous_format), torch.float32)]
        ways += [(_network(architecture, encoder, torch.channels_last), torch.bfloat16)]
        ways[1][0].load_state_dict(ways[0][0].state_dict())
        for name, run in (("training", _train), ("inference", _infer)):
            seconds, results = [np.inf, np.inf], [None, None]
            for _ in range(ROUNDS + 1):  # the first round compiles kernels: the best time leaves it out
                for way, (model, dtype) in enumerate(ways):
                    start = time.perf_counter()
                    value = run(model, dtype, images, masks)
                    seconds[way] = min(seconds[way], time.perf_counter() - start)
                    results[way] = value if results[way] is None else results[way]
            torch.testing.assert_close(*results, atol=0.03, rtol=0.03)
            rates = [BATCH / second for second in seconds]
            title = f"{architecture} {encoder} {name}"
            print(f"{title:32}{rates[0]:>14.1f} /s{rates[1]:>17.1f} /s{rates[1] / rates[0]:>8.2f}", flush=True)


def _network(architecture, encoder, memory_format):
    torch.manual_seed(0)
    return segmenter(architecture, encoder, "none").to(memory_format=memory_format)


def _train(model, dtype, images, masks):
    model.train()
    torch.manual_seed(0)  # dropout's
    with autocast("cpu", dtype):
        loss = combo(model(images), masks)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():  # plain SGD with small steps keeps both comparable
            parameter -= 1e-6 * parameter.grad
    model.zero_grad()
    return loss.detach()


@torch.inference_mode()
def _infer(model, dtype, images, masks):
    model.eval()
    with autocast("cpu", dtype):
        return model(images).sigmoid().mean((1, 2, 3)).clone()


if __name__ == "__main__":
    main()
