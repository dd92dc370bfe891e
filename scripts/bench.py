"""The predecessor's benchmark under its own name: `torchweave bench serving` and its flags.

python scripts/bench.py --concurrency 8 --iters 24 \
    --sse http://127.0.0.1:8000/v1/generate --nobatch http://127.0.0.1:8000/v1/generate_nobatch
"""

from __future__ import annotations

import sys

from torchweave_ray.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["bench", "serving"]
    main()
