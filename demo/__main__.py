"""Try a checkpoint in the browser: drop an image, see and download what is found.

    pip install -r requirements-demo.txt
    python -m demo outputs/NAME/best_stage_4.pth

The page is served to this machine alone, at http://127.0.0.1:7860. Nothing is sent anywhere else.
"""

import argparse
import sys

from system.options import Parser, add_device, add_views, checkpoint_list, command, number, whole

# Torch and gradio are imported inside the functions: --help and wrong options answer at once.


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = Parser(prog="python -m demo", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=checkpoint_list, help="a checkpoint, a run folder, or several joined by "
                                                                 "commas, which are averaged")
    parser.add_argument("--port", type=whole(1, 65535), default=7860, help="of the page (7860)")
    parser.add_argument("--pixel_size", type=number(0, above=True), help="micrometres a pixel of the images, for areas")
    add_views(parser.add_argument)
    add_device(parser.add_argument)
    return parser


@command()
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)

    from demo.page import serve
    from inference import Predictor
    from system.devices import set_up_process

    predictor = Predictor(args.checkpoint, args.device, augment=args.augment, single_cell=args.single_cell)
    set_up_process(predictor.device, predictor.precision)
    print(f"{','.join(args.checkpoint)}: {predictor}")
    serve(predictor, ",".join(args.checkpoint), args.port, args.pixel_size)


if __name__ == "__main__":
    sys.exit(main())
