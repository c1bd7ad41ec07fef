"""Which files of a folder are images, and under which name: the one place that lists them."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from system.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


@dataclass(frozen=True)
class Listing:
    """What lies in a folder.

    Attributes:
        files: name -> file of a type that is read, in the order of their names.
        twins: (further file of a name, first file of it).
        others: files of other types, and what is no file, such as a pipe.
        folders: which are not looked into.
    """

    files: dict[str, Path] = field(default_factory=dict)
    twins: list[tuple[Path, Path]] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)


def name_of(path: Path | str) -> str:
    """Return the stem of a file in the Unicode form NFC: macOS writes an ä as two characters, others as one."""
    return composed(Path(path).stem)


def composed(text: str) -> str:
    """Return a text in the Unicode form NFC."""
    return unicodedata.normalize("NFC", text)


def has_suffix(path: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> bool:
    """Tell whether a name ends so, in small letters or large; hidden files, such as macOS leaves, count as no file."""
    return path.suffix.lower() in suffixes and not path.name.startswith(".")


def place(path: Path) -> Path:
    """Return the path with all links in its folders followed, and not that of the file, which may lead in a circle."""
    return path.parent.resolve() / path.name


def list_folder(folder: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> Listing:
    """Return what lies in a folder; hidden files are left out. Raises OSError for a folder that cannot be listed."""
    found = Listing()
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            found.folders.append(path)
        elif not has_suffix(path, suffixes) or path.exists() and not path.is_file():  # a pipe would be read for ever
            found.others.append(path)
        elif first := found.files.get(name_of(path)):
            found.twins.append((path, first))
        else:
            found.files[name_of(path)] = path
    return found


def list_images(given: Sequence[str], suffixes: Sequence[str] = IMAGE_SUFFIXES) -> list[Path]:
    """Return files as they are named, and the images of folders in the order of their names; say what is not read.

    Raises UserError for what is not there and for two images whose results would have one name.
    """
    paths = []
    for path in map(Path, given):
        if path.is_dir():
            listing = list_folder(path, suffixes)
            if not listing.files:
                raise UserError(f"{path}: no image in this folder; {', '.join(IMAGE_SUFFIXES)} are read")
            paths += sorted([*listing.files.values(), *(twin for twin, _ in listing.twins)])
            if words := left_out(listing):
                print(f"not read in {path}: {words}")
        elif path.is_file():
            paths.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    paths = list(dict.fromkeys(paths))
    if not paths:
        raise UserError("no image is named. Name image files, or folders of them")
    stem, count = Counter(path.stem for path in paths).most_common(1)[0]
    if count > 1:
        twins = [str(path) for path in paths if path.stem == stem]
        raise UserError(f"{' and '.join(twins[:2])}: both would be written as {stem}_mask.png. Predict them into two "
                        f"folders, or rename one")
    return paths


def file_named(folder: Path, name: str) -> Path | None:
    """Return the image file of a name in a folder, listed anew when it has changed; None if it is not there."""
    try:
        return _listed(folder, folder.stat().st_mtime_ns).files.get(name)
    except OSError:
        return None


@lru_cache(maxsize=64)
def _listed(folder: Path, changed: int) -> Listing:
    return list_folder(folder)


def left_out(listing: Listing) -> str:
    """Return in words what of a folder is not read, '' if there is nothing."""
    parts = []
    for paths, what in ((listing.others, "file(s) of no type that is read"), (listing.folders, "folder(s) in it")):
        if paths:
            parts.append(f"{len(paths)} {what}, e.g. {paths[0].name}")
    return " and ".join(parts)
