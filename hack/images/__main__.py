"""`python -m hack.images build [--operator] [--trainer] [--demo-store]`: build and archive."""

from __future__ import annotations

import argparse

from hack.images.build import DEMO_STORE, NAMES, build_image


def main() -> None:
    """Build what is asked for; by default both images."""
    parser = argparse.ArgumentParser(prog="python -m hack.images")
    build = parser.add_subparsers(required=True).add_parser("build", help="build and archive")
    for name in NAMES:
        build.add_argument(
            f"--{name}", action="store_true", help=f"the {name} image (default: both)"
        )
    build.add_argument(f"--{DEMO_STORE}", action="store_true", help="the store to try it with")
    args = vars(parser.parse_args())
    every = (*NAMES, DEMO_STORE)
    chosen = [name for name in every if args[name.replace("-", "_")]] or list(NAMES)
    for name in chosen:
        image = build_image(name)
        print(f"{image.reference} {image.archive}")


if __name__ == "__main__":
    main()
