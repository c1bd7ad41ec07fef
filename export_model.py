"""Write a checkpoint for other programs, or as one file to hand on, from the shell.

    python export_model.py outputs/NAME/best_stage_4.pth --format onnx --out model.onnx
    python export_model.py outputs/NAME/best_stage_4.pth --format archive --out model.pth --licence "CC BY 4.0"
    python export_model.py model.pth --format card --out card.md
    python export_model.py model.pth --format archive --out copy.pth --push_to_hub USER/NAME
    python export_model.py hf://USER/NAME --format archive --out model.pth

onnx, torchscript, torch: one graph from images of any size in [0, 1] to probabilities, normalisation included; what it
expects is in its metadata. It is run and compared with the network before it counts as written. archive: weights,
recipe, data report, scores and model card in one file, a third of the checkpoint, which every command takes as it
takes a checkpoint. card: the model card in Markdown. --push_to_hub also uploads archive and card to the Hugging Face
Hub, and hf://USER/NAME downloads them from there.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from exporting.hub import PREFIX, pull, push, repository_name
from system.errors import UserError
from system.options import Parser, checkpoint_path, command

# Torch and all modules that need it are imported inside the functions: --help and wrong options answer at once.

ENDINGS = {"onnx": ".onnx", "torchscript": ".pt", "torch": ".pt2", "archive": ".pth", "card": ".md"}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = Parser(prog="export_model.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=checkpoint_path, help="a checkpoint, an archive, a run folder, or "
                        "hf://USER/NAME[/FILE][@REVISION] of the Hugging Face Hub")
    parser.add_argument("--format", required=True, choices=ENDINGS, help="what to write")
    parser.add_argument("--out", required=True, type=Path, help="the file to write")
    parser.add_argument("--licence", default="", help="of the weights, for the model card")
    parser.add_argument("--title", default="", help="of the model card (the name of the checkpoint)")
    parser.add_argument("--push_to_hub", type=repository_name, metavar="USER/NAME",
                        help="upload the archive and its card to this repository of the Hugging Face Hub")
    parser.add_argument("--private", action="store_true", help="if the repository is made, nobody else sees it")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    return parser


def export(args: argparse.Namespace) -> None:
    """Get the checkpoint, write the file that was asked for, and upload it if that was asked for too."""
    check_request(args)
    if not args.checkpoint.startswith(PREFIX):
        write(Path(args.checkpoint), args)
        return
    with tempfile.TemporaryDirectory() as folder:
        write(pull(args.checkpoint, Path(folder)), args)


def check_request(args: argparse.Namespace) -> None:
    """Raise UserError for a file that cannot be written as asked, before anything is downloaded or loaded."""
    out = args.out
    if out.is_dir() or out.suffix != ENDINGS[args.format]:
        raise UserError(f"--out {out}: {'a folder' if out.is_dir() else f'its ending is {out.suffix!r}'}; "
                        f"--format {args.format} is written to a file that ends in {ENDINGS[args.format]}")
    if os.path.lexists(out) and not args.overwrite:
        raise UserError(f"{out}: exists already, and nothing is overwritten unasked. Choose another --out, or pass "
                        f"--overwrite")
    if (args.push_to_hub or args.private) and args.format != "archive":
        raise UserError(f"--push_to_hub and --private: an archive is uploaded, with its card. Give --format archive "
                        f"instead of {args.format}")
    if args.private and not args.push_to_hub:
        raise UserError("--private is of the repository that --push_to_hub makes. Give both, or leave it out")


def write(path: Path, args: argparse.Namespace) -> None:
    """Write the file that was asked for, and say what it is."""
    from checkpoints import load_checkpoint, save_checkpoint
    from exporting.archive import archived, model_card
    from system.atomic import atomic_write, folder_made

    checkpoint, out = load_checkpoint(path), args.out
    if out.exists() and out.samefile(path):
        raise UserError(f"{out}: the checkpoint itself. Choose another --out")
    with folder_made(out.parent):
        if args.format == "archive":
            handed = archived(checkpoint, path, args.licence, args.title)
            save_checkpoint(out, handed)
            print(f"{out}: {size(out)}, {size(path)} before; every command takes it as a checkpoint. Its card: python "
                  f"export_model.py {out} --format card --out card.md")
            if args.push_to_hub:
                print(f"uploaded: {push(args.push_to_hub, out, handed['card'], args.licence, args.private)}")
        elif args.format == "card":
            with atomic_write(out) as file:
                file.write(model_card(checkpoint, path, args.licence, args.title).encode())
            print(f"{out}: the model card")
        else:
            export_graph(checkpoint, path, args)


def export_graph(checkpoint: dict, path: Path, args: argparse.Namespace) -> None:
    """Write a graph, run it and compare it with the network; a file that differs does not stay."""
    from exporting.graphs import TOLERANCE, graph_of, largest_difference, metadata_of, write_graph

    graph, metadata, out = graph_of(checkpoint, path), metadata_of(checkpoint, path), args.out
    # In a folder of its own, so that it takes the name of no file that is there.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.stem}.", suffix=".unfinished") as folder:
        written = Path(folder, out.name)
        write_graph(graph, metadata, args.format, written)
        difference = largest_difference(graph, args.format, written)
        if difference is not None and not difference <= TOLERANCE:
            raise RuntimeError(f"{out}: the written graph is {difference:.2g} from the network, which is more than "
                               f"{TOLERANCE:g}; nothing was kept")
        written.replace(out)
    checked = "not run, as onnxruntime is not installed (pip install -r requirements-export.txt)" \
        if difference is None else f"run on images of odd sizes: at most {difference:.1e} from the network"
    print(f"{out}: {size(out)}, {checked}")
    for key in ("input", "output", "channels", "threshold"):
        print(f"  {key}: {metadata[key]}")


def size(path: Path) -> str:
    """Return the size of a file in words."""
    return f"{path.stat().st_size / 1e6:.1f} MB"


@command(interrupted="nothing was written")
def main(argv: list[str] | None = None) -> None:
    export(build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
