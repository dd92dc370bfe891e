"""The `torchweave` command. One file a command; what a command needs is imported when it runs,
so that `torchweave --help` loads neither torch nor Ray. The one place that may import the upper
packages (deployments, optimizer) from inside torchweave_ray.
"""

from __future__ import annotations


def main() -> None:
    """Run the command line; a TorchWeaveError is one line on stderr and exit status 1."""
    import sys

    from torchweave_ray.cli.app import build_app
    from torchweave_ray.errors import TorchWeaveError

    try:
        build_app()()
    except TorchWeaveError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
