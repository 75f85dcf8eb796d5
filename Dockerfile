# edgepress in a container: one stage per kind of target. docs/images.md has sizes, uses and limits.
#
#   edgepress image raspberry-pi-4
#
# or by hand:
#
#   docker build --target cross-aarch64 -t edgepress:cross-aarch64 .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" edgepress:cross-aarch64 \
#       run model.onnx -t raspberry-pi-4 -o bundle
#
# The base must be Debian, or made from it, with Python 3.11 or later. To build on the same one every
# time, name it by its digest: --build-arg BASE_IMAGE=debian@sha256:…
ARG BASE_IMAGE=debian:bookworm-slim

# What is not needed at run time is not unpacked: documentation, emulators that no target names, and
# GCC's lto-dump, a debugging aid of 30 MB for each compiler.
FROM ${BASE_IMAGE} AS base
RUN printf '%s\n' \
        'path-exclude=/usr/bin/qemu-*' \
        'path-include=/usr/bin/qemu-aarch64' \
        'path-include=/usr/bin/qemu-arm' \
        'path-exclude=/usr/bin/*-lto-dump-*' \
        'path-exclude=/usr/share/doc/*' \
        'path-include=/usr/share/doc/*/copyright' \
        'path-exclude=/usr/share/info/*' \
        'path-exclude=/usr/share/locale/*' \
        'path-exclude=/usr/share/man/*' \
        > /etc/dpkg/dpkg.cfg.d/edgepress

# pip stays in this stage, in an environment of its own.
FROM base AS builder
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && python3 -m venv /opt/pip \
    && python3 -m venv --without-pip /opt/edgepress
# With this date set, compiled Python files do not depend on when they were made.
ENV SOURCE_DATE_EPOCH=315532800 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY requirements.txt ./
RUN /opt/pip/bin/pip --python /opt/edgepress/bin/python install --no-deps -r requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY calibration calibration
COPY passes passes
COPY pipeline pipeline
COPY targets targets
RUN /opt/pip/bin/pip --python /opt/edgepress/bin/python install --no-deps . \
    && /opt/pip/bin/pip --python /opt/edgepress/bin/python check

# The compiler of the stage cuda: what the extra `cuda` of pyproject.toml brings.
FROM builder AS nvrtc
ARG CUDA_NVRTC=12.6.85
RUN /opt/pip/bin/pip install --no-deps --target /opt/nvrtc "nvidia-cuda-nvrtc-cu12==${CUDA_NVRTC}"

# gcc is in every stage: native and x86 targets, and qemu's instruction counter, are built with it.
FROM base AS runtime
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev openssh-client python3 \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* /var/log/*
# Whoever the container runs as may write to the home folder (cache, tuned tiles) and to /work.
RUN useradd --create-home --uid 1000 edgepress \
    && mkdir /work \
    && chmod 1777 /home/edgepress /work
ENV HOME=/home/edgepress PATH=/opt/edgepress/bin:$PATH
COPY --from=builder /opt/edgepress /opt/edgepress
WORKDIR /work
ENTRYPOINT ["edgepress"]
CMD ["--help"]

FROM runtime AS x86
USER 1000

FROM runtime AS cross-aarch64
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* /var/log/*
USER 1000

FROM runtime AS cross-armv7
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        gcc-arm-linux-gnueabi gcc-arm-linux-gnueabihf \
        libc6-dev-armel-cross libc6-dev-armhf-cross qemu-user \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* /var/log/*
USER 1000

# Compiles for GPUs and their hosts, a Jetson's too, without a GPU.
FROM cross-aarch64 AS cuda
COPY --from=nvrtc /opt/nvrtc /opt/nvrtc
ENV PYTHONPATH=/opt/nvrtc
USER 1000
