"""What benchmarks/gpu.sh runs on a box with a GPU: needs torch, triton and transformers, no Ray."""
