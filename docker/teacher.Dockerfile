# The teacher's image. It needs BuildKit, the default builder since Docker 23:
#   docker build -f docker/teacher.Dockerfile -t gkd-teacher:cpu .
#   docker build -f docker/teacher.Dockerfile -t gkd-teacher:gpu --build-arg VARIANT=gpu .
# VARIANT=gpu holds the current vLLM. It was locked but never built: no machine with a GPU was to be had.
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
COPY requirements/cpu-overrides.txt requirements/teacher-cpu.lock requirements/teacher-gpu.lock requirements/
# Torch's CPU builds carry a local version that no lock can name, so pip picks the build, as in requirements/install.sh;
# then the lock has the last word on every other version. CUDA builds are in the lock.
RUN --mount=type=secret,id=ca --mount=type=secret,id=pip \
    --mount=type=bind,source=docker/wheels,target=docker/wheels --mount=type=cache,target=/root/.cache/pip \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi; \
    if [ "$VARIANT" = cpu ]; then \
        python3 -m pip --python /opt/venv/bin/python install "$(grep '^torch==' requirements/cpu-overrides.txt)"; \
    fi && \
    python3 -m pip --python /opt/venv/bin/python install --no-deps --require-hashes \
        -r "requirements/teacher-$VARIANT.lock"

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
# headers, and torch.compile its host code in C++. No CUDA toolkit: attention and sampling that need nvcc are those of
# FlashInfer, which scoring does without (docs/deploy.md says what a Blackwell GPU needs).
# hadolint ignore=DL3008 # as above
RUN apt-get update && apt-get install -y --no-install-recommends g++ gcc libc6-dev libnuma1 python3-dev && \
    rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    # vLLM would compile it with nvcc while it loads; what it samples is one token for each sequence, which is dropped
    VLLM_USE_FLASHINFER_SAMPLER=0

# hadolint ignore=DL3006 # one of the two stages above
FROM base-${VARIANT}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="gkd-teacher" \
      org.opencontainers.image.description="A teacher logprob service over gRPC and HTTP, on vLLM" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin gkd && \
    install -d -o gkd -g gkd /models && install -d -m 1777 /cache
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=project /opt/gkd /opt/gkd
COPY docker/healthcheck.py /app/
WORKDIR /app
# Two folders have to be writable, by whichever user. /tmp holds sockets and little else: a tmpfs will do. /cache holds
# what vLLM, torch and Triton compile, gigabytes on a GPU, and code is loaded from there: keep it in a named volume, and
# the next start finds it.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/gkd \
    HOME=/tmp \
    USER=gkd \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/cache \
    FLASHINFER_WORKSPACE_BASE=/cache \
    NUMBA_CACHE_DIR=/cache/numba \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    TRITON_CACHE_DIR=/cache/triton \
    VLLM_CACHE_ROOT=/cache/vllm \
    VLLM_NO_USAGE_STATS=1 \
    TEACHER_HOST=0.0.0.0 \
    TEACHER_LOG_FORMAT=json
VOLUME /cache
USER 10001:10001
EXPOSE 15555 15556
STOPSIGNAL SIGTERM
# Until the first success failures do not count for as long as a model of 60 GB may take: 10 min to read it at 100 MB/s,
# 5 min to compile it and to measure its memory, and as much again for a slower disk.
HEALTHCHECK --interval=5s --timeout=5s --start-period=1800s --retries=3 CMD ["python", "/app/healthcheck.py"]
ENTRYPOINT ["python", "-m", "teacher_service"]
CMD ["serve"]
