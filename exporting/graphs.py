"""Write a network as one graph for other programs: ONNX, TorchScript or a program of torch.export.

The graph takes images of any size from 17x17 pixels on, (N, C, H, W) float32 in [0, 1], and gives probabilities of the
same size. Normalisation, padding, sigmoid and cropping are in it. What an image must be brought to before, and what
the channels mean, is in its metadata (see `metadata_of`).
"""

import json
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from checkpoints import model_of
from images.recipe import DataRecipe
from images.resolutions import RESOLUTIONS
from system.archives import digest_of
from system.atomic import atomic_write
from system.errors import UserError

INPUT, OUTPUT = "image", "probability"
SMALLEST = 17       # pixels of a side; padded to 32, the least from which the shapes of the graph are general
LARGEST = 2 ** 20   # of batch and sides
TOLERANCE = 1e-4    # of a probability, between a written graph and the network
CHECKED_SIZES = ((1, 33, 91), (2, 50, 70), (1, 64, 64))  # N, H, W
METADATA = "metadata.json"  # in files of TorchScript and torch.export


class WholeGraph(nn.Module):
    """A network from images of any size to probabilities of that size."""

    def __init__(self, model):
        super().__init__()
        self.model, self.multiple = model, 2 ** model.stage

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[-2], image.shape[-1]
        rows, columns = (self._repeating_last(side, image.device) for side in (height, width))
        padded = image[:, :, rows][:, :, :, columns]
        # In a memory of its own, and cropped by indices: of a view torch asks whether it is the whole, and the graph
        # would depend on that.
        probability = self.model.logits(padded)[-1].clone(memory_format=torch.contiguous_format).sigmoid()
        return probability[:, :, torch.arange(height, device=image.device)][
            :, :, :, torch.arange(width, device=image.device)]

    def _repeating_last(self, side: int, device: torch.device) -> torch.Tensor:
        """Return the indices of a side's pixels, the last one again until their number is a multiple."""
        padded = (side + self.multiple - 1) // self.multiple * self.multiple
        return torch.arange(padded, device=device).clamp(max=side - 1)


def graph_of(checkpoint: dict, path: Path) -> WholeGraph:
    """Return the graph of a loaded checkpoint, on the CPU, with batch normalisation folded into the convolutions."""
    model = model_of(checkpoint, path)
    model.fold()
    return WholeGraph(model).eval()


def metadata_of(checkpoint: dict, path: Path) -> dict[str, str]:
    """Return what a program must know that runs the graph, as texts by name."""
    recipe: DataRecipe = checkpoint["data"]
    channels = list(recipe.class_names) or [f"class {k + 1}" if recipe.classes > 1 else "foreground"
                                            for k in range(recipe.classes)]
    channels += ["rim of nuclei"] * ("boundary" in recipe.targets)
    side = RESOLUTIONS[checkpoint["stage"] - 1]
    reduced = f", {RESOLUTIONS[-1] // side} times smaller in height and width by area means" * (side < RESOLUTIONS[-1])
    shown = f"the whole image, brought to {side}x{side} pixels by area means" if recipe.sizing == "resize" else \
        f"the image at its own scale{reduced}, or parts of it"
    return {
        "input": f"{INPUT}: (N, {recipe.in_channels}, H, W) float32 in [0, 1], "
                 f"{'RGB' if recipe.in_channels == 3 else 'luminance'}, H and W at least {SMALLEST}; {shown}",
        "output": f"{OUTPUT}: (N, {recipe.target_channels}, H, W) float32 in [0, 1]",
        "channels": ", ".join(channels), "classes": str(recipe.classes), "in_channels": str(recipe.in_channels),
        "threshold": f"{checkpoint['threshold']:g}", "sizing": recipe.sizing,
        "resolution": str(side), "stage": str(checkpoint["stage"]),
        "microns_per_pixel": f"{recipe.microns_per_pixel:g}" if recipe.microns_per_pixel else "",
        "max_value": str(recipe.max_value), "model": json.dumps(checkpoint["model_args"]), "sha256": digest_of(path)}


def write_graph(graph: WholeGraph, metadata: dict[str, str], kind: str, out: Path) -> None:
    """Write a graph as 'onnx', 'torchscript' or 'torch'; the file is whole or not there.

    Raises:
        UserError: where packages are missing that ONNX needs.
    """
    channels = graph.model.in_channels
    example = torch.rand(2, channels, 50, 70, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself: what is deprecated, or was tried first
        if kind == "torchscript":
            traced = torch.jit.trace(graph, (example,), check_trace=False)
            with atomic_write(out) as file:
                torch.jit.save(traced, file, _extra_files={METADATA: json.dumps(metadata)})
            return
        free = {i: torch.export.Dim(name, min=low, max=LARGEST)
                for i, name, low in ((0, "batch", 1), (2, "height", SMALLEST), (3, "width", SMALLEST))}
        program = torch.export.export(graph, (example,), dynamic_shapes=(free,))
        if kind == "torch":
            with atomic_write(out) as file:
                torch.export.save(program, file, extra_files={METADATA: json.dumps(metadata)})
        else:
            _write_onnx(program, example, metadata, out)


def _write_onnx(program, example: torch.Tensor, metadata: dict[str, str], out: Path) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"ONNX needs the package {error.name}, which is not installed. "
                        f"pip install -r requirements-export.txt") from None
    written = torch.onnx.export(program, (example,), dynamo=True, input_names=[INPUT], output_names=[OUTPUT],
                                verbose=False)
    model = written.model_proto
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    with atomic_write(out) as file:
        file.write(model.SerializeToString())


def largest_difference(graph: WholeGraph, kind: str, path: Path) -> float | None:
    """Run a written graph on random images of odd sizes; return how far it is from the network at most.

    None where there is nothing to run it with: ONNX without onnxruntime.
    """
    run = _runner(kind, path)
    if run is None:
        return None
    differences, generator = [], torch.Generator().manual_seed(1)
    for count, height, width in CHECKED_SIZES:
        image = torch.rand(count, graph.model.in_channels, height, width, generator=generator)
        with torch.no_grad():
            differences.append(float(np.abs(run(image) - graph(image).numpy()).max()))
    return max(differences)


def _runner(kind: str, path: Path):
    """Return a function from images (N, C, H, W) to probabilities as arrays, by what is written; None without one."""
    if kind == "onnx":
        try:
            import onnxruntime
        except ImportError:
            return None
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda image: session.run(None, {INPUT: image.numpy()})[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.jit.load(path) if kind == "torchscript" else torch.export.load(path).module()
    return lambda image: program(image).numpy()
