"""Which files of a folder are images, and under which name: the one place that lists them."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

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
