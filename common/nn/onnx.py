"""Networks as ONNX files with their preprocessing inside, and ONNX Runtime where it is faster than torch on a CPU."""

import io
import logging
import threading
import time
import warnings

import torch
from torch import nn

from common.errors import InputError, check
from common.extras import is_installed
from common.paths import atomic_path

log = logging.getLogger(__name__)
TOLERANCE = 1e-4  # largest difference from torch in float32, relative to the largest output but at least to 1
REPEATS = 3  # of each timing, of which the shortest counts


@torch.no_grad()
def to_onnx(model, images, title="network"):
    """Return the network as an ONNX file's bytes: `images` with any number in a batch → the model's outputs, float32.

    images: an example (B, …), which fixes the other sizes. Raises InputError if it cannot be exported.
    """
    model, example = model.cpu().float().eval(), images[:1].expand(2, *images.shape[1:]).contiguous()
    names = {"input_names": ["images"], "output_names": ["logits", "presence"][: len(_outputs(model(example)))]}
    how = {"dynamo": True, "verbose": False, "dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about operators of the exporter itself
            torch.onnx.export(model, (example,), external_data=False, **how, **names).save(buffer)
    except Exception as error:  # of many kinds, by the part of the exporter that fails
        cause = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{title}: cannot be exported to ONNX ({cause})") from None
    return buffer.getvalue()


def write_onnx(path, model, images):
    """Write the network as an ONNX file, checked against torch on `images`, uint8 (B, …); else raise InputError."""
    content = to_onnx(model, images, path.name)
    found = difference(model, OnnxSession(content), images)
    check(found <= TOLERANCE, f"{path.name}: ONNX Runtime differs from torch by {found:.1e}, more than {TOLERANCE:.0e}")
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    log.info(f"{path}: equal to torch within {found:.1e} on {len(images)} images")


@torch.no_grad()
def difference(model, session, images):
    """Return the largest difference of two networks' outputs in float32, relative to the largest but at least to 1."""
    with torch.autocast("cpu", enabled=False):
        pairs = zip(_outputs(model(images)), _outputs(session(images)), strict=True)
        return float(torch.stack([(a - b).abs().max() / a.abs().max().clamp_min(1) for a, b in pairs]).max())


def _outputs(found):
    return found if isinstance(found, tuple) else (found,)


class OnnxSession:
    """A network in ONNX Runtime on the CPU: called with images, it returns the network's output or tuple of outputs."""

    def __init__(self, content, threads=None):
        import onnxruntime  # optional

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common class
            raise InputError(f"not a usable ONNX file ({str(error).splitlines()[0]})") from None
        (self._input,) = self._session.get_inputs()

    def fits(self, images):
        """Return whether images have the type and size, without the batch's, of the exported network."""
        kinds = {"tensor(uint8)": torch.uint8, "tensor(float)": torch.float32}
        return images.dtype == kinds.get(self._input.type) and list(images.shape[1:]) == self._input.shape[1:]

    def __call__(self, images):
        found = self._session.run(None, {self._input.name: images.contiguous().numpy()})
        return tuple(map(torch.from_numpy, found)) if len(found) > 1 else torch.from_numpy(found[0])


class Fastest(nn.Module):
    """A network on the CPU that answers by torch or by ONNX Runtime, whichever took less time for the first batch.

    Torch also answers for other sizes, and if outputs differ by more than TOLERANCE. Threads may call it.
    """

    def __init__(self, net, session, title):
        super().__init__()
        self.net, self._session, self._title = net, session, title
        self._measured, self._lock = False, threading.Lock()

    def forward(self, images):
        if self._session is None or not self._session.fits(images):
            return self.net(images)
        with self._lock:
            if not self._measured:
                self._measure(images)
        session = self._session
        return self.net(images) if session is None else session(images)

    def _measure(self, images):
        found = difference(self.net, self._session, images)
        chosen, said = "torch", f"outputs differ by {found:.1e}"
        if found <= TOLERANCE:
            networks = {"torch": self.net, "ONNX Runtime": self._session}
            best = dict.fromkeys(networks, float("inf"))
            for name, network in REPEATS * [*networks.items()]:
                begun = time.perf_counter()
                network(images)
                best[name] = min(best[name], time.perf_counter() - begun)
            chosen = min(best, key=best.get)
            said = ", ".join(f"{name} {1000 * value / len(images):.1f} ms an image" for name, value in best.items())
        log.info(f"{self._title}: {said}; {chosen} is used")
        self._session, self._measured = None if chosen == "torch" else self._session, True


def with_session(net, path):
    """Return the network, as Fastest if there is an ONNX file `path`; InputError for a damaged file."""
    title = "/".join(path.parts[-3:-1])
    if not path.is_file():
        return net
    if not is_installed("onnx"):
        log.info(f"{title}: torch is used; ONNX Runtime is missing: pip install -e '.[onnx]'")
        return net
    return Fastest(net, OnnxSession(path.read_bytes()), title)
