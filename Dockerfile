# edgepress in a container. One stage per kind of target:
#
#   docker build --target x86 -t edgepress:x86 .
#   docker run --rm -v "$PWD:/work" edgepress:x86 run model.onnx -t x86-64-v3 -o bundle
#
# x86 has the host's C compiler. cross-aarch64 and cross-armv7 add that board's cross compiler and
# qemu, so that `-d qemu` works too. The base image must be Debian or Ubuntu with Python 3.11 or
# later. A container runs on the host's kernel, but `native` there is still the host's CPU.
#
# Verified with buildah, on a Debian 12 base made by debootstrap: x86 and cross-aarch64 build and run
# as uid 1000. In cross-aarch64, `edgepress run` of examples/fashion_mnist passed its gates for
# x86-64-v3 and, under qemu, for raspberry-pi-4; x86, the same without the cross compiler, was only
# asked for `targets` and `doctor`. Not built: cross-armv7, other bases, with a Docker engine.
ARG BASE_IMAGE=debian:bookworm-slim

FROM ${BASE_IMAGE} AS base
ENV DEBIAN_FRONTEND=noninteractive PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/edgepress
ENV PATH=/opt/edgepress/bin:$PATH
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY calibration calibration
COPY passes passes
COPY pipeline pipeline
COPY targets targets
RUN pip install --no-cache-dir '.[images]' && rm -rf /src/*
RUN useradd --create-home --uid 1000 edgepress
WORKDIR /work
RUN chown edgepress /work
ENTRYPOINT ["edgepress"]
CMD ["--help"]

FROM base AS x86
USER edgepress

FROM base AS cross-aarch64
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user \
    && rm -rf /var/lib/apt/lists/*
USER edgepress

FROM base AS cross-armv7
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        gcc-arm-linux-gnueabihf libc6-dev-armhf-cross \
        gcc-arm-linux-gnueabi libc6-dev-armel-cross qemu-user \
    && rm -rf /var/lib/apt/lists/*
USER edgepress
