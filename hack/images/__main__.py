"""`python -m hack.images build [--operator] [--trainer]`: build and archive the images."""

from __future__ import annotations

import argparse

from hack.images.build import NAMES, build_image


def main() -> None:
    """Build what is asked for; by default both images."""
    parser = argparse.ArgumentParser(prog="python -m hack.images")
    build = parser.add_subparsers(required=True).add_parser("build", help="build and archive")
    for name in NAMES:
        build.add_argument(
            f"--{name}", action="store_true", help=f"the {name} image (default: both)"
        )
    args = parser.parse_args()
    chosen = [name for name in NAMES if getattr(args, name)] or list(NAMES)
    for name in chosen:
        image = build_image(name)
        print(f"{image.reference} {image.archive}")


if __name__ == "__main__":
    main()
