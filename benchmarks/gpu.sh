#!/usr/bin/env bash
# On a box with one GPU, torch, triton and transformers (no Ray, no network): correctness against the
# torch reference, the kernels beside their ceilings, LLM.generate beside transformers' continuous
# batching. JSON lines on stdout, a file in benchmarks/results/. `--dry-run` needs no GPU;
# `--sections correctness,kernels,throughput` takes some. PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m torchweave_ray.bench.gpu "$@"
