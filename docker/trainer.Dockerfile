# The trainer's image. It needs BuildKit, the default builder since Docker 23:
#   docker build -f docker/trainer.Dockerfile -t gkd-trainer:cpu .
#   docker build -f docker/trainer.Dockerfile -t gkd-trainer:gpu --build-arg VARIANT=gpu .
# VARIANT=gpu holds what verl 0.9.1 pins. It was locked but never built: no machine with a GPU was to be had.
# Where packages come from is pip's own configuration, by any of:
#   --build-arg PIP_INDEX_URL=… --build-arg PIP_EXTRA_INDEX_URL=…   for addresses that are no secret
#   --secret id=pip,src=pip.conf   --secret id=ca,src=bundle.crt    credentials; certificates of a proxy that re-signs
#   wheels in docker/wheels/                                        what no index has
ARG BASE=python:3.11-slim-bookworm
ARG VARIANT=cpu

# hadolint ignore=DL3006 # BASE has a tag, which hadolint can't see
FROM ${BASE} AS dependencies
ARG VARIANT
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_CONFIG_FILE=/run/secrets/pip \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_FIND_LINKS=/src/docker/wheels \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
# The environment has no pip of its own: the base's installs into it.
RUN python3 -m venv --without-pip /opt/venv
COPY requirements/cpu-overrides.txt requirements/trainer-cpu.lock requirements/trainer-gpu.lock requirements/
# Torch's CPU builds carry a local version that no lock can name, so pip picks the build, as in requirements/install.sh;
# then the lock has the last word on every other version. CUDA builds are in the lock.
RUN --mount=type=secret,id=ca --mount=type=secret,id=pip \
    --mount=type=bind,source=docker/wheels,target=docker/wheels --mount=type=cache,target=/root/.cache/pip \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi; \
    if [ "$VARIANT" = cpu ]; then \
        python3 -m pip --python /opt/venv/bin/python install "$(grep '^torch==' requirements/cpu-overrides.txt)"; \
    fi && \
    python3 -m pip --python /opt/venv/bin/python install --no-deps --require-hashes \
        -r "requirements/trainer-$VARIANT.lock"

# Apart from what it depends on: a change of the code makes a layer of a megabyte, not of gigabytes.
FROM dependencies AS project
COPY LICENSE README.md pyproject.toml ./
COPY hydra_plugins hydra_plugins
COPY protos protos
COPY teacher_service teacher_service
COPY trainer trainer
RUN python3 -m pip --python /opt/venv/bin/python install --no-deps --no-build-isolation --no-index --target /opt/gkd .

# hadolint ignore=DL3006 # as above
FROM ${BASE} AS base-cpu
# vLLM for CPUs is linked against libnuma.
# hadolint ignore=DL3008 # Debian keeps one version of a package: a pin would break at its next security update
RUN apt-get update && apt-get install -y --no-install-recommends libnuma1 && rm -rf /var/lib/apt/lists/*

# hadolint ignore=DL3006 # as above
FROM ${BASE} AS base-gpu
# Compilers, though nothing is built here: at run time Triton compiles each kernel's launcher in C, against Python's
# headers, and torch.compile its host code in C++. There is no CUDA toolkit.
# hadolint ignore=DL3008 # as above
RUN apt-get update && apt-get install -y --no-install-recommends g++ gcc libc6-dev libnuma1 python3-dev && \
    rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    # vLLM would compile it with nvcc while it loads
    VLLM_USE_FLASHINFER_SAMPLER=0

# hadolint ignore=DL3006 # one of the two stages above
FROM base-${VARIANT}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="gkd-trainer" \
      org.opencontainers.image.description="A distillation trainer: GKD inside PPO and GRPO, on verl and vLLM" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin gkd && \
    install -d -o gkd -g gkd /models /runs
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=project /opt/gkd /opt/gkd
COPY examples /app/examples
WORKDIR /app
# /tmp is the one folder that has to be writable beside the run's own: Ray's sockets and all caches lie there.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/gkd \
    HOME=/tmp \
    USER=gkd \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    NUMBA_CACHE_DIR=/tmp/numba \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor \
    TRITON_CACHE_DIR=/tmp/triton \
    RAY_USAGE_STATS_ENABLED=0 \
    VLLM_NO_USAGE_STATS=1
USER 10001:10001
STOPSIGNAL SIGTERM
# It serves nothing: a run's health is its log and its exit code.
HEALTHCHECK NONE
ENTRYPOINT ["python", "-m", "trainer.main_ppo"]
