"""Draw docs/growth.png: which parts of the network are in use at each of the four stages.

    python docs/draw_growth.py
"""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

NEW, OLD, INK = "#f5b461", "#c9d6e3", "#333333"
ROWS = {256: 0, 128: 1, 64: 2, 32: 3, 16: 4}   # resolution -> row, the finest on top
ENCODER = {256: 64, 128: 128, 64: 256, 32: 512, 16: 512}
DECODER = {256: 64, 128: 64, 64: 128, 32: 256}
WIDTH, HEIGHT, STRIP = 1.0, 0.5, 0.12   # the strip: the convolution through which a level is entered
X_ENCODER, X_DECODER, X_LOGITS, X_IMAGE = 1.25, 3.0, 4.35, 0.2


def box(axis, x: float, y: float, text: str, colour: str, width: float = WIDTH) -> None:
    axis.add_patch(Rectangle((x - width / 2, y - HEIGHT / 2), width, HEIGHT, facecolor=colour, edgecolor=INK, lw=0.8))
    axis.text(x, y, text, ha="center", va="center", fontsize=9)


def arrow(axis, start: tuple[float, float], end: tuple[float, float], style: str = "-") -> None:
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, lw=1, color=INK, linestyle=style,
                                   shrinkA=0, shrinkB=0))


def draw_stage(axis, stage: int) -> None:
    """Draw the levels in use at a stage; what came with it is orange, what was there before is blue."""
    top = 16 * 2 ** stage
    levels = [r for r in ROWS if r <= top]
    for r in levels:
        y = -ROWS[r]
        new = NEW if r == top else OLD
        box(axis, X_ENCODER, y, f"{ENCODER[r]}", NEW if stage == 1 else new)
        axis.add_patch(Rectangle((X_ENCODER - WIDTH / 2, y + HEIGHT / 2 - STRIP), WIDTH, STRIP, edgecolor=INK, lw=0.8,
                                 facecolor=NEW if stage == 1 or r >= top // 2 else OLD))
        if r > 16:
            box(axis, X_DECODER, y, f"{DECODER[r]}", new)
            box(axis, X_LOGITS, y, "logits", new, 0.8)
            arrow(axis, (X_ENCODER + WIDTH / 2, y), (X_DECODER - WIDTH / 2, y), "--")
            arrow(axis, (X_DECODER + WIDTH / 2, y), (X_LOGITS - 0.4, y))
            arrow(axis, (X_ENCODER, y - HEIGHT / 2), (X_ENCODER, y - 1 + HEIGHT / 2))
            below = (X_DECODER, y - 1 + HEIGHT / 2) if r > 32 else (X_ENCODER + WIDTH / 2, y - 1)
            arrow(axis, below, (X_DECODER, y - HEIGHT / 2))
        if r > 32:
            arrow(axis, (X_LOGITS, y - 1 + HEIGHT / 2), (X_LOGITS, y - HEIGHT / 2))
            axis.text(X_LOGITS + 0.07, y - 0.5, "+", fontsize=11, va="center")
    axis.text(X_IMAGE, -ROWS[top], "image", ha="center", va="center", fontsize=9)
    arrow(axis, (X_IMAGE + 0.3, -ROWS[top]), (X_ENCODER - WIDTH / 2, -ROWS[top]))
    axis.set_title(f"stage {stage}: {top}x{top} pixels", fontsize=10)
    axis.set_xlim(-0.3, 5)
    axis.set_ylim(-4.5, 0.5)
    axis.axis("off")


def main() -> None:
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    axes = figure.subplots(1, 4)
    for stage, axis in enumerate(axes, start=1):
        draw_stage(axis, stage)
    for r, row in ROWS.items():
        axes[0].text(-0.3, -row, f"{r}", ha="right", va="center", fontsize=9, color="grey")
    figure.supxlabel("left: encoder, middle: decoder, each with its channels; strip: the convolution through which a "
                     "level is entered; dashed: skip connection; +: enlarged and added\norange: new at this stage; "
                     "blue: goes on with its weights", fontsize=10)
    figure.savefig(Path(__file__).with_name("growth.png"), dpi=80)


if __name__ == "__main__":
    main()
