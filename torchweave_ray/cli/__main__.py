"""`python -m torchweave_ray.cli`: the same as `torchweave`."""

from torchweave_ray.cli import main

if __name__ == "__main__":
    main()
