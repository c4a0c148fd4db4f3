"""Networks as ONNX files that include the preprocessing, and runtimes that may be faster than torch on a CPU."""

import io
import threading
import timeit
import warnings
from functools import partial

import torch
from torch import nn

from common.errors import InputError, check, log
from common.extras import is_installed
from common.paths import atomic_path

TOLERANCE = 1e-4  # largest difference from torch in float32, relative to the largest output or 1
OTHER_SIGNS = 5e-4  # largest share of logits that change their sign in bfloat16
REPEATS = 3  # runs per timing, of which the shortest counts


@torch.no_grad()
def to_onnx(model, images, title="network"):
    """Return the network as the bytes of an ONNX file: images, in any batch size → the model's outputs, float32.

    images: an example (B, …), which fixes the other sizes. Raises InputError if it cannot be exported.
    """
    model, example = model.cpu().float().eval(), images[:1].expand(2, *images.shape[1:]).contiguous()
    names = {"input_names": ["images"], "output_names": ["logits", "presence"][: len(_outputs(model(example)))]}
    how = {"dynamo": True, "verbose": False, "dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings(action="ignore"):  # warnings about the exporter's own operators
            torch.onnx.export(model, (example,), external_data=False, **how, **names).save(buffer)
    except Exception as error:  # of many kinds, depending on the exporter's failing part
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
    """Return the largest difference between two networks' outputs in float32, relative to the largest output or 1."""
    with torch.autocast("cpu", enabled=False):
        pairs = zip(_outputs(model(images)), _outputs(session(images)), strict=True)
        return float(torch.stack([(a - b).abs().max() / a.abs().max().clamp_min(1) for a, b in pairs]).max())


@torch.no_grad()
def share_of_other_signs(model, session, images):
    """Return the share of logits whose sign differs between two segmenters."""
    return float(((model(images) > 0) != (session(images) > 0)).float().mean())


def _outputs(found):
    return found if isinstance(found, tuple) else (found,)


class OnnxSession:
    """A network in ONNX Runtime on the CPU; calling it with images returns the network's output or outputs."""

    name, compare, limit = "ONNX Runtime", staticmethod(difference), TOLERANCE

    def __init__(self, content, threads=None):
        import onnxruntime  # optional

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common base class
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"not a usable ONNX file ({reason})") from None
        (self._input,) = self._session.get_inputs()

    def fits(self, images):
        """Return whether images have the dtype and the shape, apart from the batch, of the exported network."""
        kinds = {"tensor(uint8)": torch.uint8, "tensor(float)": torch.float32}
        return images.dtype == kinds.get(self._input.type) and list(images.shape[1:]) == self._input.shape[1:]

    def __call__(self, images):
        found = self._session.run(None, {self._input.name: images.contiguous().numpy()})
        return tuple(map(torch.from_numpy, found)) if len(found) > 1 else torch.from_numpy(found[0])


class OpenVinoSession:
    """A segmenter in OpenVINO on the CPU, in bfloat16 if the processor supports it: images → logits.

    content: as for OnnxSession. threads: number of simultaneous calls, each on one core.
    """

    name, compare, limit = "OpenVINO", staticmethod(share_of_other_signs), OTHER_SIGNS

    def __init__(self, content, threads):
        import openvino  # optional

        core, how = openvino.Core(), {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": threads}
        self._model = core.compile_model(core.read_model(content, b""), "CPU", how)

    def __call__(self, images):
        return torch.from_numpy(self._model.create_infer_request().infer([images.contiguous().numpy()])[0])


class Fastest(nn.Module):
    """A network on the CPU that runs in torch or a session, whichever was fastest on the first batch.

    Torch also runs images of other sizes than the OnnxSession's, and replaces sessions whose outputs differ by more
    than their limit. Several threads may call it.
    """

    def __init__(self, net, session, title, *further):
        super().__init__()
        self.net, self._sessions, self._title = net, (session, *further), title
        self._chosen, self._lock = None, threading.Lock()

    def forward(self, images):
        if not self._sessions[0].fits(images):
            return self.net(images)
        with self._lock:
            self._chosen = self._chosen or self._measure(images)
        return self._chosen(images)

    def _measure(self, images):
        networks, said = {"torch": self.net}, []
        for session in self._sessions:
            if (found := session.compare(self.net, session, images)) <= session.limit:
                networks[session.name] = session
            else:
                said.append(f"{session.name} differs by {found:.1e}")
        times = {k: timeit.repeat(partial(net, images), number=1, repeat=REPEATS) for k, net in networks.items()}
        best = {name: min(found) for name, found in times.items()}
        said += [f"{name} {1000 * value / len(images):.1f} ms per image" for name, value in best.items()]
        chosen = min(best, key=best.get)
        log.info(f"{self._title}: {', '.join(said)}; {chosen} is used")
        return networks[chosen]


def with_session(net, path):
    """Return the network, wrapped in Fastest if the ONNX file `path` exists; InputError for a damaged file."""
    title = "/".join(path.parts[-3:-1])
    if not path.is_file():
        return net
    if not is_installed("onnx"):
        log.info(f"{title}: torch is used; ONNX Runtime is missing: pip install -e '.[onnx]'")
        return net
    return Fastest(net, OnnxSession(path.read_bytes()), title)
