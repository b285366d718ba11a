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
# The one build tool in an image: Triton compiles the launchers of its kernels at run time.
# hadolint ignore=DL3008 # as above
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev libnuma1 python3-dev && \
    rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    # where V2 is the default: the fast route needs the V1 model runner
    VLLM_USE_V2_MODEL_RUNNER=0

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
    install -d -o gkd -g gkd /models
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=project /opt/gkd /opt/gkd
COPY docker/healthcheck.py /app/
WORKDIR /app
# /tmp is the one folder that has to be writable: caches lie there too. Give it a tmpfs or a volume.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/gkd \
    HOME=/tmp \
    USER=gkd \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NUMBA_CACHE_DIR=/tmp/numba \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor \
    TRITON_CACHE_DIR=/tmp/triton \
    VLLM_NO_USAGE_STATS=1 \
    TEACHER_HOST=0.0.0.0 \
    TEACHER_LOG_FORMAT=json
USER 10001:10001
EXPOSE 15555 15556
STOPSIGNAL SIGTERM
# A model takes from seconds to many minutes to load: raise the start period for a large one.
HEALTHCHECK --interval=5s --timeout=5s --start-period=300s --retries=3 CMD ["python", "/app/healthcheck.py"]
ENTRYPOINT ["python", "-m", "teacher_service"]
CMD ["serve"]
