# syntax=docker/dockerfile:1
# Server and optimizer in one image, as user 1000. DEVICE chooses torch's build:
#   cuda  what pip takes by itself on Linux
#   cpu   needs an index or a folder that carries torch's CPU build:
#         --build-arg PIP_EXTRA_INDEX_URL=... or --build-arg PIP_FIND_LINKS=...
# Every package is one that locks/ names by hash, wherever it comes from; `make lock` renews them.
# docs/operations.md says how it is run, and what of this was checked how.
ARG PYTHON_VERSION=3.11
ARG DEBIAN=bookworm

FROM python:${PYTHON_VERSION}-slim-${DEBIAN} AS build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/torchweave
ENV PATH=/opt/torchweave/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src

# torch first: the large layer, which changes least.
ARG DEVICE=cpu
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
COPY locks/torch-*.txt locks/
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ ! -e "locks/torch-$DEVICE.txt" ]; then echo "DEVICE is cpu or cuda, not $DEVICE" >&2; exit 2; fi; \
    pip install --no-deps --require-hashes -r "locks/torch-$DEVICE.txt"
COPY locks/requirements.txt locks/
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps --require-hashes -r locks/requirements.txt; \
    python -c "import torch; assert (torch.version.cuda is None) == ('$DEVICE' == 'cpu'), torch.__version__"

COPY pyproject.toml setup.py README.md LICENSE ./
COPY torchweave_ray torchweave_ray
COPY deployments deployments
COPY optimizer optimizer
# Without a compiler the wheel would come without its kernels: here that is an error.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .; \
    if [ "$(uname -m)" = x86_64 ]; then \
        python -m zipfile -l /wheels/*.whl | grep -F torchweave_ray/kernels/_cpu.so; \
    fi; \
    pip install --no-deps /wheels/*.whl; \
    pip check

FROM python:${PYTHON_VERSION}-slim-${DEBIAN}
# tini reaps what Ray leaves behind; wget is what KubeRay's own probes and the health check call.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home torchweave \
    && install -d -o torchweave -g torchweave /artifacts \
    # KubeRay starts Ray in a login shell, which sets PATH anew.
    && echo "export PATH=/opt/torchweave/bin:\$PATH" > /etc/profile.d/torchweave.sh
COPY --from=build /opt/torchweave /opt/torchweave
WORKDIR /app
COPY serve_config.yaml ./
COPY configs configs
# RAY_AUTH_MODE: without a token `ray start` refuses; `torchweave serve` draws one of its own.
ENV PATH=/opt/torchweave/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    ARTIFACT_DIR=/artifacts \
    HF_HOME=/artifacts/.huggingface \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0
USER 1000:1000
VOLUME /artifacts
EXPOSE 8000
# Open streams are finished first (600 s at most), so give it time: `docker stop --time 660`.
STOPSIGNAL SIGTERM
# Staging a model counts as starting.
HEALTHCHECK --interval=10s --timeout=6s --start-period=900s --retries=3 \
    CMD ["wget", "-q", "-T", "5", "-O", "/dev/null", "http://127.0.0.1:8000/health"]
ENTRYPOINT ["tini", "--"]
CMD ["torchweave", "serve"]
