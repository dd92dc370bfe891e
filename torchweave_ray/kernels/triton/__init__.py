"""Our Triton kernels for GPUs. Importing a module of this folder imports triton: do it late, and
only where runner/backends.py found that they can run. Their twins are the torch executor's own
functions, attention/torch_paged.py and runner/sampler.py."""
