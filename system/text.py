"""Text from outside, such as file names, made safe to print, to draw and to write into tables."""

import contextlib
import re
import sys
from collections.abc import Iterator

from system.errors import UserError

# What moves a terminal's cursor, colours it or turns the direction of writing: a name that holds it shows another one.
_CONTROL = r"\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
_IN_NAMES, _IN_OUTPUT = re.compile(f"[{_CONTROL}]"), re.compile(f"(?![\n\r\t])[{_CONTROL}]")
_FORMULA = re.compile(r"'*[=+\-@]")  # with which a spreadsheet takes a cell for a formula


def shown(name: str) -> str:
    """Return a name as text that every table, picture and terminal can hold.

    Bytes that are no UTF-8 become escapes such as \\udce4, control characters such as \\x1b.
    """
    return _IN_NAMES.sub(_escaped, name.encode("utf-8", "backslashreplace").decode())


def cell(name: str) -> str:
    """Return a name for a table that people read: as `shown`, and `guarded`."""
    return guarded(shown(name))


def compiled(pattern: str) -> re.Pattern:
    """Return a regular expression as an object; raises UserError for text that Python takes for none."""
    try:
        return re.compile(pattern)
    except (re.error, ValueError, OverflowError, RecursionError, MemoryError) as error:
        shortened = pattern if len(pattern) <= 80 else f"{pattern[:77]}..."
        raise UserError(f"{shortened} is no regular expression that can be used ({error})") from None


def guarded(name: str) -> str:
    """Return a name with an apostrophe in front where a spreadsheet would take it for a formula and compute it."""
    return f"'{name}" if _FORMULA.match(name) else name


def unguarded(text: str) -> str:
    """Return the name that `guarded` was given."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text[1:]) else text


def duration(seconds: float) -> str:
    """Return a time in the unit that fits.

    >>> duration(8.2), duration(100), duration(3500), duration(9000), duration(500_000)
    ('8 s', '100 s', '58 min', '2.5 hours', '139 hours')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.{1 if seconds < 36_000 else 0}f} hours"


def of(count: int, noun: str, plural: str = "") -> str:
    """Return a count with its noun, whose plural has an s where none is given.

    >>> of(1, "epoch"), of(12, "epoch"), of(1, "nucleus", "nuclei"), of(0, "nucleus", "nuclei")
    ('1 epoch', '12 epochs', '1 nucleus', '0 nuclei')
    """
    return f"{count} {noun if count == 1 else plural or f'{noun}s'}"


def _escaped(match: re.Match) -> str:
    return match[0].encode("unicode_escape").decode()


class PlainStream:
    """A text stream that writes control characters as escapes, and line ends and tabs as they are."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text; return how many characters it has."""
        self._stream.write(_IN_OUTPUT.sub(_escaped, text))
        return len(text)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@contextlib.contextmanager
def plain_output() -> Iterator[None]:
    """Let no file name steer the terminal that a command prints to."""
    with contextlib.redirect_stdout(PlainStream(sys.stdout)), contextlib.redirect_stderr(PlainStream(sys.stderr)):
        yield
