"""Builds a library or program, or prints a translation: ``python -m ptxsim build|translate --help``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .build import BuildError, build_library, build_program, cache_directory
from .ptxparse import PtxError
from .translate import translate


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ptxsim", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="CUDA sources or PTX to a CPU program or library")
    build.add_argument("sources", nargs="+", type=Path)
    build.add_argument("--arch", default="80")
    build.add_argument("--out", type=Path, default=cache_directory() / "lib")
    build.add_argument("--library", metavar="NAME", help="lib<NAME>.so; without it, a program from the only source")
    build.add_argument("-I", dest="includes", type=Path, action="append", default=[])
    build.add_argument("-O", dest="opt", default="1")
    build.add_argument("--ptxas", action="store_true", help="also assemble the PTX, to check it")
    show = commands.add_parser("translate", help="print the C++ of a PTX file")
    show.add_argument("source", type=Path)
    args = parser.parse_args()
    try:
        if args.command == "translate":
            sys.stdout.write(translate(args.source.read_text(), str(args.source)))
        elif args.library:
            options = {"includes": args.includes, "opt": f"-O{args.opt}", "ptxas": args.ptxas}
            print(build_library(args.sources, args.arch, args.out, name=args.library, **options))
        elif len(args.sources) == 1:
            print(build_program(args.sources[0], args.arch, args.out, includes=args.includes, opt=f"-O{args.opt}"))
        else:
            parser.error("several sources make a library: give --library NAME")
    except (PtxError, BuildError) as error:
        sys.exit(f"ptxsim: {error}")


if __name__ == "__main__":
    main()
