"""Draw docs/growth.png: which parts of the network are in use at each of the four stages.

    python docs/draw_growth.py
"""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

NEW, OLD, INK = "#f5b461", "#c9d6e3", "#333333"
ROWS = {256: 0, 128: 1, 64: 2, 32: 3, 16: 4}   # resolution -> row, the finest on top
ENCODER = {256: 64, 128: 80, 64: 96, 32: 128, 16: 192}
DECODER = {256: 64, 128: 64, 64: 96, 32: 128}
WIDTH, HEIGHT = 1.0, 0.5
X_ENCODER, X_DECODER, X_LOGITS, X_IMAGE = 1.35, 3.0, 4.35, 0.1


def box(axis, x: float, y: float, text: str, colour: str, width: float = WIDTH) -> None:
    axis.add_patch(Rectangle((x - width / 2, y - HEIGHT / 2), width, HEIGHT, facecolor=colour, edgecolor=INK, lw=0.8))
    axis.text(x, y, text, ha="center", va="center", fontsize=9)


def arrow(axis, start: tuple[float, float], end: tuple[float, float], style: str = "-", colour: str = INK) -> None:
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, lw=1.6 if colour != INK else 1,
                                   color=colour, linestyle=style, shrinkA=0, shrinkB=0))


def plus(axis, x: float, y: float, starts_at_zero: bool) -> None:
    axis.text(x + 0.07, y, "+ 0" if starts_at_zero else "+", fontsize=10, va="center")


def draw_stage(axis, stage: int) -> None:
    """Draw the levels in use at a stage; what came with it is orange, what was there before is blue."""
    top = 16 * 2 ** stage
    for r in [r for r in ROWS if r <= top]:
        y, first = -ROWS[r], stage == 1
        colour = NEW if r == top or first else OLD
        joint = "#d98310" if r == top and not first else INK   # what leads from the new level to the one below
        box(axis, X_ENCODER, y, f"{ENCODER[r]}", colour)
        if r == 16:
            continue
        box(axis, X_DECODER, y, f"{DECODER[r]}", colour)
        box(axis, X_LOGITS, y, "logits", colour, 0.8)
        axis.text(X_IMAGE, y, f"image\n{r}", ha="center", va="center", fontsize=8)
        arrow(axis, (X_IMAGE + 0.3, y), (X_ENCODER - WIDTH / 2, y))
        arrow(axis, (X_ENCODER + WIDTH / 2, y), (X_DECODER - WIDTH / 2, y), "--")
        arrow(axis, (X_DECODER + WIDTH / 2, y), (X_LOGITS - 0.4, y), colour=joint)
        arrow(axis, (X_ENCODER, y - HEIGHT / 2), (X_ENCODER, y - 1 + HEIGHT / 2), colour=joint)
        below = (X_DECODER, y - 1 + HEIGHT / 2) if r > 32 else (X_ENCODER + WIDTH / 2, y - 1)
        arrow(axis, below, (X_DECODER, y - HEIGHT / 2))
        if r > 32:
            plus(axis, X_ENCODER, y - 0.5, joint != INK)
            arrow(axis, (X_LOGITS, y - 1 + HEIGHT / 2), (X_LOGITS, y - HEIGHT / 2))
            plus(axis, X_DECODER + WIDTH / 2 - 0.02, y + 0.17, joint != INK)
    axis.set_title(f"stage {stage}: {top}x{top} pixels", fontsize=10)
    axis.set_xlim(-0.3, 5)
    axis.set_ylim(-4.5, 0.6)
    axis.axis("off")


def main() -> None:
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    axes = figure.subplots(1, 4)
    for stage, axis in enumerate(axes, start=1):
        draw_stage(axis, stage)
    for r, row in ROWS.items():
        axes[0].text(-0.3, -row, f"{r}", ha="right", va="center", fontsize=9, color="grey")
    figure.supxlabel("left: encoder, each level with its channels and the image at its resolution; middle: decoder; "
                     "dashed: skip connection; +: added\norange: new at this stage; blue: goes on with its weights; "
                     "orange arrows with + 0 start at zero, so nothing changes at the moment of growth", fontsize=10)
    figure.savefig(Path(__file__).with_name("growth.png"), dpi=80)


if __name__ == "__main__":
    main()
