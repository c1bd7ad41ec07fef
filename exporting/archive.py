"""One file to hand to a colleague: a checkpoint without what training needs, and with a model card."""

import json
from pathlib import Path

from images.resolutions import RESOLUTIONS
from reporting.text import label
from system.archives import digest_of
from unet import build_model, count_parameters

# Fields of a checkpoint that only a training that goes on needs -> what stands for nothing in them.
OF_TRAINING = {"unborn": {}, "optimizer": None, "scaler": None, "averaged": None, "random_states": None,
               "position": None, "history": [], "time_limit": None}
OF_RECIPE = ("epochs_per_stage", "budget", "max_minutes", "lr", "batch_sizes", "augment_probability",
             "augment_strength", "seed", "data_fingerprint")  # of the settings of a run, for the card


def archived(checkpoint: dict, path: Path, licence: str = "", title: str = "") -> dict:
    """Return a loaded checkpoint as one to hand on: weights, recipe, settings and card.

    Args:
        path: of the checkpoint; scores are read from its folder.
        licence: of the weights, for the card.
        title: of the card.
    """
    return checkpoint | OF_TRAINING | {"card": model_card(checkpoint, path, licence, title)}


def model_card(checkpoint: dict, path: Path, licence: str = "", title: str = "") -> str:
    """Return the card of a loaded checkpoint in Markdown; that of an archive is the one that it carries."""
    if checkpoint["card"]:
        return checkpoint["card"]
    config = checkpoint["config"] or {}
    sections = [f"# {title or path.stem}", _what(checkpoint), "## Use", _use(checkpoint), "## Scores",
                _scores(checkpoint, path), "## Training", _training(checkpoint, config)]
    if report := config.get("data_report"):
        sections += ["## Data", "```\n" + "\n".join(map(str, report)) + "\n```"]
    ranges = [(name, f"{low:.3g}", f"{high:.3g}") for name, (low, high) in checkpoint["data"].training_ranges.items()]
    if ranges:
        sections += ["Training images lay within these ranges. Others are reported at prediction.",
                     _table(("", "from", "to"), ranges)]
    sections += ["## Limits", "For research. It is no medical device and was not validated for diagnosis. On images "
                 "from another scanner, stain or magnification than those above it may fail without a warning.",
                 "## Licence", licence or "Not stated. Ask whoever gave you this file.",
                 f"Made from a checkpoint with the SHA-256 `{digest_of(path)}`."]
    return "\n\n".join(sections) + "\n"


def _what(checkpoint: dict) -> str:
    recipe, args, stage = checkpoint["data"], checkpoint["model_args"], checkpoint["stage"]
    name = "progressive U-Net" if args["model"] == "pgunet" else "classic U-Net"
    seen = f"the whole image at {RESOLUTIONS[stage - 1]}x{RESOLUTIONS[stage - 1]} pixels" \
        if recipe.sizing == "resize" else "images at their own scale, in tiles"
    if recipe.microns_per_pixel:
        seen += f", {recipe.microns_per_pixel:g} micrometres a pixel"
    classes = " and ".join(recipe.class_names) or ("one class" if recipe.classes == 1 else f"{recipe.classes} classes")
    rims = " and the rims of nuclei" if "boundary" in recipe.targets else ""
    parameters = count_parameters(build_model(args)) / 1e6
    return (f"A {name} (stage {stage}, {parameters:.1f} M parameters, {args['base_channels']} base channels) that "
            f"segments {classes}{rims} in {'RGB' if recipe.in_channels == 3 else 'grey'} images. It sees {seen}.")


def _use(checkpoint: dict) -> str:
    return ("```sh\npython predict_papsmear.py THIS_FILE images/ --out predicted\n"
            "python evaluate_papsmear.py THIS_FILE --data_root DATA\n"
            "python train_papsmear.py --data_root DATA --init_from THIS_FILE\n```\n\n"
            f"The threshold is {checkpoint['threshold']:g}.")


def _scores(checkpoint: dict, path: Path) -> str:
    lines = []
    if checkpoint["score"] is not None:
        lines.append(f"Dice on the validation images: {checkpoint['score']:.4f} at {RESOLUTIONS[-1]} pixels. They "
                     f"chose this epoch, so it is no test score.")
    try:
        scores = json.loads((path.parent / "test_scores.json").read_text(encoding="utf-8"))[path.stem]
        classes = checkpoint["data"].class_names
        rows = [(label(name, classes), *(f"{value[key]:.4f}" for key in ("mean", "std", "low", "high")))
                for name, value in scores.items() if isinstance(value, dict)]
        lines += [f"On {scores['images']} test images at their own size, with the 95 % interval of the mean:",
                  _table(("", "mean", "standard deviation", "from", "to"), rows)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or of another checkpoint
        lines.append("No test scores lay beside the checkpoint.")
    return "\n\n".join(lines)


def _training(checkpoint: dict, config: dict) -> str:
    rows = [(name, json.dumps(config[name])) for name in OF_RECIPE if config.get(name) not in (None, "")]
    text = f"Command: `python {config['command']}`\n\n" if config.get("command") else ""
    return text + (_table(("setting", "value"), rows) if rows else "No settings are known.")


def _table(head: tuple, rows: list[tuple]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in line)} |" for line in lines)
