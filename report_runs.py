"""Make pages about runs, which any browser shows without a network, from the shell.

    python report_runs.py outputs/A
    python report_runs.py outputs/A outputs/B --out comparison.html

One run: its report.html is made anew, from what the run folder holds. Several: one page that compares them; the first
is the one that the others are measured against.
"""

import argparse
import os
import sys
from pathlib import Path

from system.errors import UserError
from system.options import Parser, command

# What needs torch is imported inside the functions: --help and wrong options answer at once.


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = Parser(prog="report_runs.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_FOLDER", help="folders of runs, e.g. outputs/NAME")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="the page that compares runs (comparison.html)")
    parser.add_argument("--overwrite", action="store_true", help="replace a comparison that is there")
    return parser


def report(args: argparse.Namespace) -> None:
    """Write the page and say where it is."""
    if len(args.runs) == 1:
        if args.out:
            raise UserError(f"--out {args.out}: the page of one run is report.html in its folder. Leave --out out, or "
                            f"name a second run to compare with")
        from reporting.report import write_report

        print(f"look at {write_report(args.runs[0])}")
        return
    out = args.out or Path("comparison.html")
    if out.suffix != ".html" or out.is_dir():
        raise UserError(f"--out {out}: {'a folder' if out.is_dir() else f'its ending is {out.suffix!r}'}; the page is "
                        f"a file that ends in .html")
    if out.name == "report.html" and (out.parent / "config.json").exists():
        raise UserError(f"--out {out}: that is the page of the run in this folder. Choose another name")
    if os.path.lexists(out) and not args.overwrite:
        raise UserError(f"{out}: exists already, and nothing is overwritten unasked. Choose another --out, or pass "
                        f"--overwrite")
    if len({path.resolve() for path in args.runs}) < len(args.runs):
        raise UserError("a run is named twice; a comparison needs different ones")
    from reporting.comparison import write_comparison

    out.parent.mkdir(parents=True, exist_ok=True)
    write_comparison(args.runs, out)
    print(f"look at {out}")


@command(interrupted="nothing was written")
def main(argv: list[str] | None = None) -> None:
    report(build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
