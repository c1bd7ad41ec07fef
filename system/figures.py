"""Figures of matplotlib that belong to nobody's pyplot, and that a notebook shows nevertheless."""

import io

from matplotlib.figure import Figure


class ShownFigure(Figure):
    """A figure that a notebook shows where it is the value of a cell, with or without `%matplotlib inline`.

    pyplot knows nothing of it: no window opens, and nothing is to be closed. Save it with `savefig`.
    """

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()
