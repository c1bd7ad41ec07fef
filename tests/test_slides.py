"""Slides: which level is read, what its pixels are, and what a prediction says of its scale."""

import builtins

import numpy as np
import pytest
import tifffile
from PIL import Image

import predict_papsmear
from conftest import lively_model, read_rows, write_checkpoint, write_slide
from images.files import ImageFileError
from images.slides import SlideRows, differ, in_words

pytest.importorskip("tiffslide", reason="slides need tiffslide: pip install -r requirements-wsi.txt")

@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("slides") / "a.svs"
    return path, write_slide(path)


@pytest.mark.parametrize(("wanted", "pixel_size", "level", "microns"), [
    (0, 0, 0, 0.25), (0.25, 0, 0, 0.25), (0.5, 0, 1, 0.5), (0.45, 0, 1, 0.5), (3, 0, 2, 1.0), (0.5, 0.5, 0, 0.5)])
def test_the_level_nearest_to_training_is_read(slide, wanted, pixel_size, level, microns, monkeypatch):
    monkeypatch.setattr("images.slides.BAND_PIXELS", 256 * 1100)  # several bands a level
    path, levels = slide
    rows = SlideRows(path, 3, wanted=wanted, pixel_size=pixel_size)
    assert (rows.level, rows.levels, rows.microns_per_pixel) == (level, 3, pytest.approx(microns, rel=0.01))
    bands = list(rows)
    assert len(bands) > 1 or level
    assert np.array_equal(np.concatenate(bands), levels[level])
    grey = np.concatenate(list(SlideRows(path, 1, wanted=wanted, pixel_size=pixel_size)))
    assert np.array_equal(grey[..., 0], np.asarray(Image.fromarray(levels[level]).convert("L")))


def test_what_is_said_of_the_scale(slide, tmp_path):
    path, _ = slide
    assert SlideRows(path, 3, wanted=0.26).scale_in_words(0.26) == \
        "level 0 of 3, 0.25 micrometres a pixel, in training 0.26"
    assert SlideRows(path, 3, wanted=0.1).scale_in_words(0.1).endswith(
        "in training 0.1; nuclei are 2.5 times as small as in training")
    assert "that of the training images is not known" in SlideRows(path, 3).scale_in_words(0)
    write_slide(tmp_path / "b.svs", mpp=None)
    unknown = SlideRows(tmp_path / "b.svs", 3, wanted=0.5)
    assert unknown.level == 0
    assert "its pixel size is not known" in unknown.scale_in_words(0.5)
    assert not differ(0.25, 0.3)
    assert differ(0.25, 0.35)
    assert not differ(0, 0.5)
    assert in_words(0.5) == "2 times as large"


def test_tiles_that_were_never_scanned_are_said(slide, tmp_path):
    path = tmp_path / "holes.svs"
    path.write_bytes(slide[0].read_bytes())
    with tifffile.TiffFile(path, mode="r+") as file:
        for tag in (file.pages[0].tags["TileOffsets"], file.pages[0].tags["TileByteCounts"]):
            tag.overwrite([0, 0, *tag.value[2:]])
    rows = SlideRows(path, 3)
    assert rows.scale_in_words(0).endswith("; 2 of 15 tiles were never scanned and count as black")
    pixels = np.concatenate(list(rows))
    assert not pixels[:256, :512].any()
    assert np.array_equal(pixels[:256, 512:], slide[1][0][:256, 512:])


def test_a_slide_is_predicted_at_its_level_and_measured_in_micrometres(slide, tmp_path, capsys):
    path, levels = slide
    checkpoint = write_checkpoint(tmp_path / "a.pth", lively_model(in_channels=3), "tile", microns_per_pixel=0.5)
    Image.fromarray(levels[1]).save(tmp_path / "b.png")
    command = [str(checkpoint), "--out", str(tmp_path / "out"), "--min_area", "5", "--min_probability", "0"]
    assert predict_papsmear.main([*command, str(path), str(tmp_path / "b.png")]) == 0
    said = capsys.readouterr().out
    assert "a.svs: level 1 of 3, 0.5 micrometres a pixel, in training 0.5\n" in said
    found = tifffile.imread(tmp_path / "out/a_mask.tif")
    assert found.shape == levels[1].shape[:2]
    assert (found == np.asarray(Image.open(tmp_path / "out/b_mask.png"))).mean() > 0.999, "as the level as a file"
    of_slide = [row for row in read_rows(tmp_path / "out/nuclei.csv") if row["image"] == "a.svs"]
    assert of_slide
    for row in of_slide:
        assert float(row["area_um2"]) == pytest.approx(float(row["area"]) * 0.25, rel=0.01)
    assert predict_papsmear.main([*command, "--overwrite", "--pixel_size", "2", str(tmp_path / "b.png")]) == 0
    assert "warning: --pixel_size is 2 micrometres, in training it was 0.5, so that in images nuclei are 4 times as " \
        "small as the network knows them. Bring them to 0.5 first" in capsys.readouterr().out


def test_a_slide_that_cannot_be_read_fails_alone(slide, tmp_path, capsys, monkeypatch):
    path, _ = slide
    (tmp_path / "cut.svs").write_bytes(path.read_bytes()[:5000])
    (tmp_path / "text.svs").write_text("no slide")
    checkpoint = write_checkpoint(tmp_path / "a.pth", lively_model(in_channels=3), "tile")
    assert predict_papsmear.main([str(checkpoint), str(tmp_path / "cut.svs"), str(tmp_path / "text.svs"), str(path),
                                  "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "text.svs: no slide that can be read (tiffslide: " in said.err
    assert "cut.svs: rows 0 to 700 of level 0 cannot be read" in said.err
    assert len(said.err.splitlines()) == 3, "a line for each file and their number"
    assert not list((tmp_path / "out").glob("cut*")) + list((tmp_path / "out").glob("text*"))
    assert (tmp_path / "out/a_mask.tif").is_file()
    whole = write_checkpoint(tmp_path / "b.pth", lively_model(in_channels=3), "resize")
    assert predict_papsmear.main([str(whole), str(path), "--out", str(tmp_path / "out2")]) == 1
    assert "brings each image to 256x256 as a whole" in capsys.readouterr().err
    with pytest.raises(ImageFileError, match="at most 1e\\+03 are decoded"):
        SlideRows(path, 3, max_pixels=1000)
    imported = builtins.__import__

    def without_readers(name, *args, **kwargs):
        if name in ("openslide", "tiffslide"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_readers)
    with pytest.raises(ImageFileError, match="neither is installed. Say pip install -r requirements-wsi.txt"):
        SlideRows(path, 3)
