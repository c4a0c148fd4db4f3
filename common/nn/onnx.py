"""Networks as ONNX files with their preprocessing inside, and runtimes that may be faster than torch on a CPU."""

import io
import threading
import time
import warnings

import torch
from torch import nn

from common.errors import InputError, check, log
from common.extras import is_installed
from common.paths import atomic_path

TOLERANCE = 1e-4  # largest difference from torch in float32, relative to the largest output but at least to 1
OTHER_SIGNS = 5e-4  # largest share of logits that change sides in bfloat16
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


@torch.no_grad()
def share_of_other_signs(model, session, images):
    """Return the share of logits for which two segmenters disagree about the side of 0."""
    return float(((model(images) > 0) != (session(images) > 0)).float().mean())


def _outputs(found):
    return found if isinstance(found, tuple) else (found,)


class OnnxSession:
    """A network in ONNX Runtime on the CPU: called with images, it returns the network's output or tuple of outputs."""

    name, compare, limit = "ONNX Runtime", staticmethod(difference), TOLERANCE

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


class OpenVinoSession:
    """A segmenter in OpenVINO on the CPU, in bfloat16 where the processor has it: images → logits.

    content: as of OnnxSession. threads: calls at a time, on a core each.
    """

    name, compare, limit = "OpenVINO", staticmethod(share_of_other_signs), OTHER_SIGNS

    def __init__(self, content, threads):
        import openvino  # optional

        core, how = openvino.Core(), {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": threads}
        self._model = core.compile_model(core.read_model(content, b""), "CPU", how)

    def __call__(self, images):
        return torch.from_numpy(self._model.create_infer_request().infer([images.contiguous().numpy()])[0])


class Fastest(nn.Module):
    """A network on the CPU that answers by torch or a session, whichever took least time for the first batch.

    Torch also answers for other sizes than the OnnxSession's, and in place of sessions whose outputs differ by more
    than their limit. Threads may call it.
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
        best = dict.fromkeys(networks, float("inf"))
        for name, network in REPEATS * [*networks.items()]:
            begun = time.perf_counter()
            network(images)
            best[name] = min(best[name], time.perf_counter() - begun)
        said += [f"{name} {1000 * value / len(images):.1f} ms an image" for name, value in best.items()]
        chosen = min(best, key=best.get)
        log.info(f"{self._title}: {', '.join(said)}; {chosen} is used")
        return networks[chosen]


def with_session(net, path):
    """Return the network, as Fastest if there is an ONNX file `path`; InputError for a damaged file."""
    title = "/".join(path.parts[-3:-1])
    if not path.is_file():
        return net
    if not is_installed("onnx"):
        log.info(f"{title}: torch is used; ONNX Runtime is missing: pip install -e '.[onnx]'")
        return net
    return Fastest(net, OnnxSession(path.read_bytes()), title)
