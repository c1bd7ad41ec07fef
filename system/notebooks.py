"""What a notebook shows of our objects: tables, and figures that follow a training while a cell runs.

Nothing here needs IPython: where no kernel runs, which has imported it, there is nothing to show.
"""

import html
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from system.text import shown

DRAWING_SHARE = 0.1  # of the time of a training, for the figure that follows it


def kernel() -> Any | None:
    """Return the shell of the notebook's kernel that this process is; None in a script and in a terminal."""
    ask = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = ask() if ask else None
    return shell if getattr(shell, "kernel", None) is not None else None


def html_table(title: str, rows: Iterable[Sequence], header: Sequence[str] = ()) -> str:
    """Return a table in HTML in which every text is escaped, as file names are among them.

    Args:
        title: above it.
        rows: of cells; without a header the first cell of each is a heading.
    """
    def cells(row: Sequence, kinds: Iterable[str]) -> str:
        return "".join(f'<{kind} style="text-align: left">{html.escape(shown(str(cell)))}</{kind}>'
                       for cell, kind in zip(row, kinds, strict=True))

    lines = [f"<tr>{cells(header, ['th'] * len(header))}</tr>"] if header else []
    lines += [f"<tr>{cells(row, ['td' if header or i else 'th' for i in range(len(row))])}</tr>" for row in rows]
    return f"<table><caption>{html.escape(shown(title))}</caption>{''.join(lines)}</table>"


class Described:
    """Something that says in words what it is: a line when it is printed, a table in a notebook."""

    def described(self) -> dict[str, str]:
        """Return what there is to say, name -> words, without reading a file or an image."""
        raise NotImplementedError

    def __repr__(self) -> str:
        words = "; ".join(f"{name} {words}" for name, words in self.described().items())
        return shown(f"{type(self).__name__}({words})")

    def _repr_html_(self) -> str:
        return html_table(type(self).__name__, self.described().items())


class LiveFigure:
    """A figure below a running cell of a notebook that is drawn anew as often as a tenth of the time pays for."""

    def __init__(self):
        self._handle, self._cell = None, None
        self._drawn, self._took = -math.inf, 0.0

    def draw(self, figure: Callable[[], Any], last: bool = False) -> None:
        """Show what `figure` returns in place of what was shown before; does nothing where no notebook runs.

        Args:
            figure: is called only where it is time to draw; in a cell that shows none yet it is.
            last: draw whether it is time or not.
        """
        shell = kernel()
        if shell is None:
            return
        begin = time.monotonic()
        new = self._handle is None or shell.execution_count != self._cell
        if not new and not last and begin - self._drawn < self._took / DRAWING_SHARE:
            return
        from IPython.display import display

        if new:
            self._handle, self._cell = display(figure(), display_id=True), shell.execution_count
        else:
            self._handle.update(figure())
        self._drawn = time.monotonic()
        self._took = self._drawn - begin
