"""What a training says: one line an epoch."""

from unet import STAGE_RESOLUTIONS


def epoch_lines(stage: int, epoch: int, epochs: int, train: dict, valid: dict, left: str = "") -> list[str]:
    """Return what is said at the end of an epoch (from 0) of a stage: one line, and a warning where it is due.

    Args:
        left: the time left, in words, if it is known.
    """
    side = STAGE_RESOLUTIONS[stage]
    lines = [f"stage {stage} ({side}x{side}) epoch {epoch + 1}/{epochs}  loss {train['loss']:.4f}  "
             f"soft dice {train['soft_dice']:.4f}  | valid loss {valid['loss']:.4f}  "
             f"soft dice {valid['soft_dice']:.4f}  dice {valid['dice']:.4f}  "
             f"| lr {train['lr']:.1e}  {train['images_per_second']:.0f} images/s"
             + (f"  {left}" if left else "")]
    if valid["foreground"] == 0 and epoch + 1 == epochs:
        lines.append(f"warning: stage {stage} ends predicting no foreground at all. Train longer, lower --lr, or check "
                     f"that the masks are not empty")
    return lines
