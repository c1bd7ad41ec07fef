"""The page: what it shows of an image, made by the very code of predict_papsmear.py."""

import os
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import predict_papsmear
from images.bands import overview_step, thinned, tiff_bands
from images.files import image_size, save_png
from images.listing import IMAGE_SUFFIXES
from inference import Predictor
from nuclei.results import ResultsFolder, class_endings
from system.errors import UserError
from system.tables import read_table
from system.text import of

HOST = "127.0.0.1"
FORMATS = ("png", "geojson")
EXAMPLES = Path(__file__).resolve().parents[1] / "data/test/images"
KEPT = 3600  # seconds that results stay on the disk after the page made them
BUTTONS = ["download", "fullscreen"]  # of pictures; gradio would have one to put them on the network
STYLE = ("ui-sans-serif", "system-ui", "sans-serif")  # fonts of the machine: the page fetches nothing


def predict_image(predictor: Predictor, path: Path, folder: Path, threshold: float, min_area: int,
                  pixel_size: float | None = None) -> dict[str, str | Path | list[int]]:
    """Predict one image into a folder, as predict_papsmear.py does.

    Args:
        folder: empty, or not there yet.
        threshold: probability from which on a pixel is foreground.
        min_area: pixels of the smallest nucleus.
    Returns:
        overlay, mask (pictures that a browser shows, at most OVERVIEW_SIDE pixels a side if the image was too large
        to hold), nuclei, images and geojson (paths of files), areas (pixels, of each nucleus) and summary (one line
        of text).
    Raises:
        UserError: for a file that is no image.
    """
    args = predict_papsmear.build_parser().parse_args(["-", str(path), "--out", str(folder)])
    args.formats, args.min_area, args.pixel_size = FORMATS, int(min_area), pixel_size
    predictor.threshold = threshold
    with ResultsFolder(folder, (1, 1), predictor.classes, {}, bool(pixel_size),
                       predictor.has_cytoplasm) as results:
        results.begin([path])
        with results.image(path) as result:
            predict_papsmear.predict_one(predictor, path, result, args, lambda: None)
    areas = [int(row["area"]) for row in read_table(results.nuclei)]
    row = next(read_table(results.images))
    count = of(len(areas), "nucleus", "nuclei")
    summary = f"{path.name}, {row['height']}x{row['width']}: {count}, mean area {row['mean_area']} pixels, " \
              f"{float(row['foreground']):.1%} foreground, {row['seconds']} s"
    if row["unlike_training"]:
        summary += f". Unlike the training images: {row['unlike_training']}"
    return {"areas": areas, "summary": summary, "nuclei": results.nuclei, "images": results.images,
            "overlay": folder / f"{path.stem}_overlay.png", "geojson": folder / f"{path.stem}_nuclei.geojson",
            "mask": shown_mask(folder / f"{path.stem}_mask{class_endings(predictor.classes)[0]}")}


def shown_mask(stem: Path) -> Path:
    """Return the path of a mask as a browser shows it: the PNG, or one that is made of the TIFF of a large image."""
    png, tiff = (stem.with_name(stem.name + suffix) for suffix in (".png", ".tif"))
    if tiff.exists():
        save_png(png, np.concatenate(list(thinned(tiff_bands(tiff), overview_step(*image_size(tiff, np.inf))))))
    return png


def draw_areas(areas: list[int]) -> Figure:
    """Draw how many nuclei have which area, in pixels."""
    figure = Figure(figsize=(5, 2.6), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(areas, bins=min(30, max(5, len(areas) // 3)), range=(0, 1.05 * max(areas, default=1)))
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="area of a nucleus (pixels)", ylabel="nuclei")
    return figure


def build_page(predictor: Predictor, name: str, pixel_size: float | None, store: Path):
    """Return the gradio page of a predictor.

    Args:
        name: of the checkpoint, for the page.
        pixel_size: micrometres a pixel of the images, if they are known.
        store: folder for the results.
    Raises:
        UserError: if gradio is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise UserError("The page needs the package gradio, which is not installed. "
                        "pip install -r requirements-demo.txt") from None

    def answer(file: str | None, threshold: float, min_area: float):
        if not file:
            return "", None, None, None, None
        try:
            found = predict_image(predictor, Path(file), Path(tempfile.mkdtemp(dir=store)), threshold,
                                  int(min_area or 0), pixel_size)
        except (UserError, OSError, MemoryError) as error:
            raise gradio.Error(str(error), duration=None, print_exception=False) from None
        return (found["summary"], str(found["overlay"]), str(found["mask"]), draw_areas(found["areas"]),
                [str(found[key]) for key in ("geojson", "nuclei", "images")])

    with gradio.Blocks(title="Nuclei", delete_cache=(KEPT, KEPT)) as page:
        gradio.Markdown(f"# Nuclei\n{name}: {predictor}")
        with gradio.Row():
            with gradio.Column(scale=1):
                file = gradio.File(label="Image", file_types=list(IMAGE_SUFFIXES), elem_id="image")
                threshold = gradio.Slider(0.01, 0.99, predictor.threshold, step=0.01,
                                          label="Foreground from probability")
                smallest = gradio.Number(30, minimum=0, precision=0, label="Pixels of the smallest nucleus")
                button = gradio.Button("Find nuclei", variant="primary", elem_id="find")
                if EXAMPLES.is_dir():
                    gradio.Examples([str(path) for path in sorted(EXAMPLES.glob("*.png"))[:3]], file)
            with gradio.Column(scale=2):
                summary = gradio.Textbox(label="Found", interactive=False, elem_id="found")
                with gradio.Row():
                    overlay = gradio.Image(label="Outlines", buttons=BUTTONS, interactive=False)
                    mask = gradio.Image(label="Mask", buttons=BUTTONS, interactive=False)
                areas = gradio.Plot(label="Areas")
                downloads = gradio.File(label="Download: GeoJSON for QuPath, tables", file_count="multiple",
                                        interactive=False, elem_id="downloads")
        outputs = [summary, overlay, mask, areas, downloads]
        # One image at a time: the threshold is the predictor's.
        gradio.on([button.click, file.change], answer, [file, threshold, smallest], outputs, concurrency_limit=1,
                  api_name="find")
    return page


def serve(predictor: Predictor, name: str, port: int, pixel_size: float | None) -> None:
    """Serve the page to this machine until Ctrl-C."""
    with tempfile.TemporaryDirectory(prefix="nuclei_") as store:
        page = build_page(predictor, name, pixel_size, Path(store))
        import gradio

        try:
            page.launch(server_name=HOST, server_port=port, share=False, allowed_paths=[store], quiet=True,
                        prevent_thread_lock=True, theme=gradio.themes.Default(font=STYLE, font_mono=STYLE))
        except OSError:
            raise UserError(f"--port {port}: it is taken. Choose another") from None
        print(f"open http://{HOST}:{port} in a browser; Ctrl-C ends it", flush=True)
        page.block_thread()
