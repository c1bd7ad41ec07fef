"""What people have in their folders: a row a kind, and what becomes of it.

Each row changes a data set of four images and checks it. Either it is read, exit code 0, or it is refused with the
file, what was found and what to do, exit code 2. Nothing is written, and nothing ends in a traceback.
"""

import io
import json
import os
import shutil
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

import evaluate_papsmear
import predict_papsmear
import prepare_data
from conftest import draw_pair, lively_model, read_rows, write_checkpoint, write_data_set
from images.files import save_png

SIDE = 32
NAME = "train_0"


def image_of(root) -> Path:
    return root / f"train/images/{NAME}.png"


def mask_of(root) -> Path:
    return root / f"train/masks/{NAME}.png"


def encoded(kind: str, **options) -> bytes:
    """Return the first training image as a file of another kind."""
    content = io.BytesIO()
    image = Image.fromarray(draw_pair(np.random.default_rng([0, 0]), SIDE)[0])
    for mode in (options.pop("mode", None),):
        image = image.convert(mode) if mode else image
    image.save(content, kind, **options)
    return content.getvalue()


def instead(content: bytes, name: str | None = None):
    """Put these bytes in the place of the first training image, under another name if one is given."""
    def change(root):
        image_of(root).unlink()
        (image_of(root).with_name(name) if name else image_of(root)).write_bytes(content)
    return change


def picture(kind: str, name: str | None = None, cut: int = 0, **options):
    """Put a file of this kind there, perhaps without its last bytes."""
    content = encoded(kind, **options)
    return instead(content[:-cut] if cut else content, name)


def array_tiff(array, **options):
    """Put a TIFF of this array there."""
    content = io.BytesIO()
    tifffile.imwrite(content, array, **options)
    return instead(content.getvalue(), f"{NAME}.tif")


def new_mask(array):
    """Put a PNG of this array in the place of the first training mask."""
    def change(root):
        save_png(mask_of(root), np.asarray(array))
    return change


def of_all(kind: str, function):
    """Change every image, or every mask, of the data set."""
    def change(root):
        for path in sorted(root.rglob(f"{kind}/*.png")):
            save_png(path, function(np.asarray(Image.open(path))))
    return change


def renamed(name: str):
    """Give the first training pair another name."""
    def change(root):
        for path in (image_of(root), mask_of(root)):
            os.rename(path, os.fsencode(path.parent) + b"/" + os.fsencode(name) + b".png")
    return change


def second_pair(name: str, kind: str = "png"):
    """Add another training pair."""
    def change(root):
        image, mask = draw_pair(np.random.default_rng(99), SIDE)
        for folder, array in (("images", image), ("masks", mask.astype(np.uint8) * 255)):
            Image.fromarray(array).save(root / f"train/{folder}/{name}.{kind}")
    return change


def table(content: str):
    """Write splits.csv with one line that is right for each split, and this one."""
    def change(root):
        right = "".join(f"{split}/images/{split}_0.png,{split}\n" for split in ("train", "valid", "test"))
        (root / "splits.csv").write_text(f"path,split\n{right}{content}")
    return change


def animated(kind: str, name: str | None = None):
    frames = [Image.new("RGB", (SIDE, SIDE), (90 * i, 200, 200)) for i in range(3)]
    content = io.BytesIO()
    frames[0].save(content, kind, save_all=True, append_images=frames[1:], duration=100)
    return instead(content.getvalue(), name)


def huge_header(root):
    """A PNG that says it has 60000x60000 pixels and holds none."""
    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    chunks = b"".join(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
                      for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")))
    image_of(root).write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def missing_strip(root):
    array = np.tile(np.arange(SIDE, dtype=np.uint8), (SIDE, 1))
    array_tiff(array, rowsperstrip=8)(root)
    with tifffile.TiffFile(image_of(root).with_suffix(".tif"), mode="r+") as opened:
        for tag in (opened.pages[0].tags["StripOffsets"], opened.pages[0].tags["StripByteCounts"]):
            tag.overwrite([0, *tag.value[1:]])


def turned(orientation: int, shape=(SIDE, SIDE)):
    """Write the first training image with this orientation in its EXIF data, its mask without."""
    def change(root):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("L", shape[::-1], 90).save(image_of(root), exif=exif)
        mask = np.zeros(shape, np.uint8)
        mask[5:12, 5:12] = 255
        save_png(mask_of(root), mask)
    return change


def link_to(target: str):
    def change(root):
        image_of(root).unlink()
        image_of(root).symlink_to(target)
    return change


def elsewhere(root):
    shutil.move(image_of(root), root.parent / "kept.png")
    image_of(root).symlink_to(root.parent / "kept.png")


def folder_for_image(root):
    image_of(root).unlink()
    image_of(root).mkdir()


def pipe(root):
    image_of(root).unlink()
    os.mkfifo(image_of(root))


def unreadable(root):
    image_of(root).chmod(0)


def without(folder: str):
    def change(root):
        for path in (root / folder).iterdir():
            path.unlink()
    return change


def suffix_on_masks(root):
    for path in sorted(root.rglob("masks/*.png")):
        path.rename(path.with_stem(f"{path.stem}_mask"))


def one_flat_folder(root):
    """Images and masks side by side, without splits."""
    for path in sorted(root.rglob("*/*/*.png")):
        end = "_mask" if path.parent.name == "masks" else ""
        shutil.move(path, root / f"{path.stem}{end}.png")
    for split in ("train", "valid", "test"):
        shutil.rmtree(root / split)


def other_folder_names(root):
    for kind, name in (("images", "imgs"), ("masks", "labels")):
        (root / name).mkdir()
        for path in sorted(root.rglob(f"{kind}/*.png")):
            shutil.move(path, root / name / path.name)
    for split in ("train", "valid", "test"):
        shutil.rmtree(root / split)


def decomposed(root):
    """The image's name as macOS writes it, the mask's as others do."""
    for path, form in ((image_of(root), "NFD"), (mask_of(root), "NFC")):
        path.rename(path.with_name(unicodedata.normalize(form, "zähne.png")))


def beside(name: str, content: bytes = b"x"):
    def change(root):
        (root / "train/images" / name).write_bytes(content)
    return change


def folder_named_splits(root):
    (root / "splits.csv").mkdir()


def file(name: str, content: bytes):
    def change(root):
        (root / name).write_bytes(content)
    return change


def description(content: str):
    return file("dataset.json", content.encode())


def mask_kind(kind: str, name: str, mode: str = "L", **options):
    """Write the first training mask as another kind of file."""
    def change(root):
        mask = Image.open(mask_of(root)).convert(mode)
        mask_of(root).unlink()
        mask.save(mask_of(root).with_name(name), kind, **options)
    return change


def size_of(height: int, width: int):
    def change(root):
        save_png(image_of(root), np.full((height, width), 99, np.uint8))
        save_png(mask_of(root), np.zeros((height, width), bool))
    return change


GREY = np.full((SIDE, SIDE), 0.5, np.float32)
STRIPES = np.zeros((SIDE, SIDE), np.uint8)
STRIPES[2:10, 8:16] = 1
# name -> change, and what is said: for what is refused the sentence, for what is read None or a part of the report.
REFUSED = {
    "truncated PNG": (picture("PNG", cut=60), "damaged or cut off"),
    "truncated JPEG": (picture("JPEG", "train_0.jpg", cut=60), "damaged or cut off"),
    "truncated TIFF": (picture("TIFF", "train_0.tif", cut=600), "damaged or cut off"),
    "zero bytes": (instead(b""), "not a readable image (0 bytes)"),
    "text named .png": (instead(b"hello"), "not a readable image (5 bytes)"),
    "PDF named .png": (instead(b"%PDF-1.4 ..."), "not a readable image"),
    "mask of another size": (new_mask(np.zeros((SIDE, SIDE + 2), np.uint8)), "both must have one size"),
    "turned by EXIF, sides swapped": (turned(6, (20, 40)), "Is one of them turned by EXIF? Then save"),
    "animated GIF named .png": (animated("GIF"), "an animated GIF of 3 pictures"),
    "animated PNG": (animated("PNG"), "an animated PNG of 3 pictures"),
    "animated WebP named .png": (animated("WEBP"), "an animated WEBP of 3 pictures"),
    "enormous header": (huge_header, "at most 5e+08 are decoded"),
    "not a number": (array_tiff(np.where(STRIPES, np.nan, GREY).astype(np.float32)), "64 of 1024 values are infinite"),
    "floating point 0..255": (array_tiff(GREY * 255), "must lie in [0, 1]"),
    "negative values": (array_tiff(STRIPES.astype(np.int16) - 1), "values -1..0 found"),
    "complex values": (array_tiff(GREY.astype(np.complex64)), "values of complex64"),
    "stack": (array_tiff(np.zeros((3, SIDE, SIDE), np.uint8), photometric="minisblack"), "a stack of 3 images"),
    "strip never written": (missing_strip, "1 of 4 strips were never written"),
    "link to itself": (link_to("train_0.png"), "cannot be opened"),
    "link to nothing": (link_to("nowhere.png"), "or where its link points to"),
    "folder named as an image": (folder_for_image, "but it is a folder. Move it elsewhere"),
    "pipe named as an image": (pipe, "but it is a pipe or device. Move it elsewhere"),
    "unreadable": (unreadable, "cannot be opened"),
    "empty split": (lambda root: (without("valid/images")(root), without("valid/masks")(root)), "valid: no image"),
    "no mask": (lambda root: mask_of(root).unlink(), "no mask of that name"),
    "a.png and a.tif": (second_pair(NAME, "tif"), "a stem may occur once in a folder"),
    "label 3 in a binary mask": (new_mask(STRIPES * 3), "or pass --out_channels 3 if its values 1..3 are classes"),
    "label to be ignored": (new_mask(STRIPES + 255 * STRIPES[::-1]), "If 255 marks pixels to ignore"),
    "instances for a mask": (new_mask(np.kron(np.arange(16).reshape(4, 4) * 4, np.ones((8, 8))).astype(np.uint8)),
                             "If every object has its own number, write 255"),
    "colours for classes": (new_mask(np.stack([STRIPES * 255, STRIPES * 0, STRIPES * 90], axis=2)), "colour-coded"),
    "photograph for a mask": (new_mask(np.tile(np.linspace(0, 255, SIDE), (SIDE, 1)).astype(np.uint8)),
                              "Is it an image, not a mask?"),
    "masks all white": (of_all("masks", lambda a: np.full_like(a, 255)), "its masks (2) are foreground"),
    "masks named with an ending": (suffix_on_masks, "Pass --mask_suffix _mask, or rename them"),
    "one flat folder": (one_flat_folder, "prepare_data.py split DATA --mask_suffix _mask"),
    "folders imgs and labels": (other_folder_names, "its folders are imgs and labels"),
    "no folder": (shutil.rmtree, "no such folder"),
    "a file for the data set": (lambda root: (shutil.rmtree(root), root.write_text("x")), "a file, not a folder"),
    "path that climbs in splits.csv": (table("../kept.png,train\n"), "../kept.png is no image with a mask in this"),
    "absolute path in splits.csv": (table("/etc/passwd,train\n"), "/etc/passwd is no image with a mask in this"),
    "unknown split in splits.csv": (table("train/images/train_1.png,training\n"), "split is 'training'"),
    "image listed twice": (table("train/images/train_0.png,test\n"), "a second image named train_0"),
    "splits.csv of other columns": (file("splits.csv", b"a;b\n"), "columns ['a;b'] found"),
    "splits.csv of nothing": (file("splits.csv", b""), "'path' and 'split' are needed"),
    "splits.csv in UTF-16": (file("splits.csv", "path,split\n".encode("utf-16")), "splits.csv: cannot be read"),
    "folder named splits.csv": (folder_named_splits, "splits.csv: a folder of that name"),
    "dataset.json that is none": (description("{"), "dataset.json: cannot be read"),
    "dataset.json, nested deeply": (description("[" * 100_000), "dataset.json: cannot be read"),
    "unknown sizing": (description('{"sizing": "crop"}'), "sizing is 'crop'; it must be one of"),
    "pixel size of text": (description('{"sizing": "resize", "microns_per_pixel": "big"}'), "it must be 0, or a"),
    "pixel size of kilometres": (description('{"sizing": "resize", "microns_per_pixel": 1e308}'), "it must be 0, or a"),
    "white of text": (description('{"sizing": "resize", "max_value": "4095"}'), "max_value is '4095'; it must be a"),
    "white below 0": (description('{"sizing": "resize", "max_value": -1}'), "max_value is -1; it must be a"),
    "pixel size of a list": (description('{"sizing": "resize", "microns_per_pixel": []}'), "it must be 0, or a number"),
    "twin classes": (description('{"sizing": "resize", "classes": ["a", "a"]}'), "classes, all different"),
    "class that steers": (description('{"sizing": "resize", "classes": ["\\u001b[2J"]}'), "cannot be printed"),
    "splits.csv, a quotation mark": (table('"train/images/train_1.png,train\n'), "splits.csv: cannot be read"),
    "tiles of another size": (description('{"sizing": "tile"}'), "this data set is one of tiles, which have 256x256"),
}
READ = {
    "palette": (picture("PNG", mode="P"), None),
    "RGBA": (picture("PNG", mode="RGBA"), None),
    "grey with alpha": (picture("PNG", mode="LA"), None),
    "CMYK": (picture("JPEG", "train_0.jpg", mode="CMYK"), None),
    "1 bit": (picture("PNG", mode="1"), None),
    "16 bit": (array_tiff(STRIPES.astype(np.uint16) * 65535), None),
    "12 bit in 16 bit": (array_tiff(STRIPES.astype(np.uint16) * 4095), "for 12 bit pass --max_value 4095"),
    "floating point": (array_tiff(GREY), None),
    "BMP": (picture("BMP", "train_0.bmp"), None),
    "JPEG named .PNG": (picture("JPEG", "train_0.PNG"), None),
    "still WebP named .png": (picture("WEBP"), None),
    "turned upside down by EXIF": (turned(3), "turned upright by EXIF, whose masks are not turned"),
    "turned by a quarter, square": (turned(6), "turned upright by EXIF, whose masks are not turned"),
    "spaces": (renamed("a b  c"), None),
    "line break": (renamed("a\nb"), None),
    "accents": (renamed("zähne ñ 細胞"), None),
    "accents in two forms": (decomposed, None),
    "no UTF-8": (renamed(os.fsdecode(b"z\xe4hne")), None),
    "begins with =": (renamed("=1+2"), None),
    "begins with a dash": (renamed("-rf"), None),
    "quotes and dollars": (renamed("a'b\"c$HOME"), None),
    "names that differ in case": (second_pair("TRAIN_0"), None),
    "link to an image elsewhere": (elsewhere, None),
    "leftovers of macOS": (beside("._train_0.png"), None),
    "other files": (beside("Thumbs.db"), "1 file(s) of no type that is read, e.g. Thumbs.db"),
    "1x1": (size_of(1, 1), None),
    "10000x3": (size_of(10000, 3), None),
    "all black": (of_all("images", np.zeros_like), "4 image(s) show nothing"),
    "all white": (of_all("images", lambda a: np.full_like(a, 255)), "4 image(s) show nothing"),
    "empty masks": (of_all("masks", np.zeros_like), "all masks of train (2) are empty"),
    "mask of 0 and 1": (new_mask(STRIPES), None),
    "mask of 16 bit": (new_mask(STRIPES.astype(np.uint16) * 65535), None),
    "mask as JPEG": (mask_kind("JPEG", "train_0.jpg"), None),
    "mask of 1 bit": (mask_kind("PNG", "train_0.png", "1"), None),
    "mask in RGB": (mask_kind("PNG", "train_0.png", "RGB"), None),
    "splits.csv with backslashes": (table("train\\images\\train_1.png,train\n"), None),
}


def tree(folder: Path) -> dict[str, tuple]:
    return {os.fsencode(path).decode("latin-1"): (path.lstat().st_size, path.lstat().st_mtime_ns)
            for path in sorted(folder.rglob("*"))}


def checked(root: Path, *options: str) -> int:
    """Check a data set from its parent, so that messages are short, and look that nothing is written."""
    before = tree(root.parent)
    code = prepare_data.main(["check", root.name, *options])
    assert tree(root.parent) == before
    return code


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_data_set(tmp_path / "DATA", (2, 1, 1), SIDE)


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind, root, capsys):
    change, message = REFUSED[kind]
    if kind == "unreadable" and os.geteuid() == 0:
        pytest.skip("the superuser reads everything")
    change(root)
    assert checked(root) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("error: ")
    assert "Traceback" not in said
    assert said.count("\n") <= 4, "few lines"


@pytest.mark.parametrize("kind", READ)
def test_read(kind, root, capsys):
    change, message = READ[kind]
    change(root)
    assert checked(root) == 0
    said = capsys.readouterr()
    assert (message or "data set DATA\n") in said.out
    assert not said.err


def given_mask(folder: Path, name: str) -> Path:
    """Make a file that a link in the folder of results points to."""
    target = folder.parent / "precious.png"
    target.write_bytes(b"precious")
    folder.mkdir()
    (folder / name).symlink_to(target)
    return target


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "a.pth", lively_model())


IMAGES_REFUSED = ["truncated PNG", "zero bytes", "text named .png", "animated GIF named .png", "animated PNG",
                  "enormous header", "link to itself"]


def test_a_bad_image_among_good_ones_fails_alone(checkpoint, root, capsys):
    """Its row is missing and no file of it is there; the others are whole, and the exit code tells."""
    bad = []
    for i, kind in enumerate(IMAGES_REFUSED):
        (root / f"train/images/{NAME}.png").unlink(missing_ok=True)
        (root / f"train/images/{NAME}.png").write_bytes(b"")
        REFUSED[kind][0](root)
        bad.append(root / f"train/images/bad_{i}.png")
        image_of(root).rename(bad[-1])
    bad[-1].unlink()
    bad[-1].symlink_to(bad[-1].name)  # still to itself
    assert predict_papsmear.main([str(checkpoint), "DATA/train/images", "--out", "out"]) == 1
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert [line.split(": ")[1] for line in lines[:-1]] == [f"DATA/train/images/{path.name}" for path in bad]
    assert lines[-1] == f"{len(bad)} of {len(bad) + 1} files failed"
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "images.csv", "nuclei.csv", "settings.json", "train_1_instances.png", "train_1_mask.png",
        "train_1_overlay.png"]
    assert not any("error" in line for line in said.out.splitlines())


@pytest.mark.parametrize(("arguments", "message"), [
    (("nowhere.png", "--out", "out"), "nowhere.png: no such file or folder"),
    (("empty", "--out", "out"), "empty: no image in this folder"),
    (("DATA/train/images/train_0.png", "twin/train_0.jpg", "--out", "out"), "both would be written as train_0_mask"),
    (("DATA/train/images", "--out", "twin/train_0.jpg"), "is a file; results go to a folder"),
    (("DATA/train/images", "--out", "DATA/train/images"), "images are read from this folder"),
    (("DATA/train/images", "--out", "kept"), "so it is no table of a prediction"),
    (("DATA/train/images", "--out", "out", "--threshold", "7"), "'7' is not a number above 0 and below 1")])
def test_a_prediction_that_cannot_begin_writes_nothing(arguments, message, checkpoint, root, capsys):
    for folder in ("empty", "twin", "kept"):
        Path(folder).mkdir()
    shutil.copy(image_of(root), "twin/train_0.jpg")
    Path("kept/nuclei.csv").write_text("mine")
    before = tree(root.parent)
    assert predict_papsmear.main([str(checkpoint), *arguments]) == 2
    assert message in (said := capsys.readouterr().err)
    assert said.count("\n") == 1
    assert tree(root.parent) == before


def test_a_link_among_the_results_is_replaced_and_not_followed(checkpoint, root):
    target = given_mask(Path("out").absolute(), "train_0_mask.png")
    arguments = [str(checkpoint), "DATA/train/images/train_0.png", "--out", "out"]
    assert predict_papsmear.main(arguments) == 2, "it is there"
    assert predict_papsmear.main([*arguments, "--overwrite"]) == 0
    assert target.read_bytes() == b"precious"
    assert not Path("out/train_0_mask.png").is_symlink()
    assert Image.open("out/train_0_mask.png").size == (SIDE, SIDE)


def test_names_of_every_kind_are_in_the_table(checkpoint, root, capsys):
    names = ["=1+2", "a b  c", "a\nb", "zähne ñ 細胞", os.fsdecode(b"z\xe4hne"), "-rf"]
    folder = Path("odd")
    folder.mkdir()
    for name in names:
        shutil.copy(root / "train/images/train_1.png", os.fsencode(folder / f"{name}.png"))
    assert predict_papsmear.main([str(checkpoint), "odd", "--out", "out", "--min_area", "1", "--min_probability",
                                  "0"]) == 0
    assert len({row["image"] for row in read_rows("out/nuclei.csv")}) == len(names)


def nothing(path):
    with open(path, "wb") as opened:
        opened.truncate(2 * 2 ** 30)  # without taking place on the disk


COCO = {"images": [{"id": 1, "file_name": "train_0.png", "height": SIDE, "width": SIDE}]}
NO_SIZE = {"images": [{"id": 1, "file_name": "train_0.png"}]}
ANNOTATIONS = {
    "2 GB of nothing": (nothing, "65536 bytes of nothing"),
    "blanks alone": (lambda path: path.write_bytes(b" " * 70_000), "65536 bytes of nothing"),
    "text": (lambda path: path.write_text("hello"), "it begins with b'hello'"),
    "nested deeply": (lambda path: path.write_text("[" * 100_000), "no JSON that can be read"),
    "another JSON": (lambda path: path.write_text("{}"), "the lists 'images' and 'annotations' are needed"),
    "run lengths of a trillion": (lambda path: path.write_text(json.dumps(NO_SIZE | {"annotations": [
        {"image_id": 1, "segmentation": {"counts": [0, 10 ** 12], "size": [10 ** 6, 10 ** 6]}}]})),
        "at most 5e+08 pixels are decoded"),
    "run lengths of another size": (lambda path: path.write_text(json.dumps(COCO | {"annotations": [
        {"image_id": 1, "segmentation": {"counts": [0, 4 * 10 ** 8], "size": [20_000, 20_000]}}]})),
        "run lengths for (20000, 20000), image of (32, 32)"),
}


@pytest.mark.parametrize("kind", ANNOTATIONS)
def test_annotations_that_are_refused(kind, root, capsys):
    write, message = ANNOTATIONS[kind]
    write(Path("drawn.json"))
    before = tree(root.parent)
    assert prepare_data.main(["drawn", "--format", "coco", "--images", "DATA/train/images", "--annotations",
                              "drawn.json", "--out", "out"]) == 2
    assert message in (said := capsys.readouterr().err)
    assert said.count("\n") <= 2
    assert tree(root.parent) == before


def test_masks_with_an_ending_are_trained_on_and_scored(checkpoint, root, capsys):
    suffix_on_masks(root)
    assert checked(root, "--mask_suffix", "_mask") == 0
    assert evaluate_papsmear.main([str(checkpoint), "--data_root", "DATA", "--mask_suffix", "_mask", "--out",
                                   "scores"]) == 0
    assert checked(root, "--mask_suffix", "_label") == 2
    assert "--mask_suffix _label says how names of masks end, and this one does not" in capsys.readouterr().err


def test_one_flat_folder_is_dealt(checkpoint, root, capsys):
    one_flat_folder(root)
    assert prepare_data.main(["split", "DATA", "--mask_suffix", "_mask", "--shares", "50,25,25"]) == 0
    assert checked(root, "--mask_suffix", "_mask") == 0
    said = capsys.readouterr().out
    assert "train        2          2" in said
    assert evaluate_papsmear.main([str(checkpoint), "--data_root", "DATA", "--mask_suffix", "_mask", "--out",
                                   "scores"]) == 0
