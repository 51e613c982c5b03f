# syntax=docker/dockerfile:1
# The agent. Four targets:
#   onnx          the light agent: any amd64 or arm64 machine, a Jetson's CPU included
#     docker build -f docker/agent.Dockerfile --target onnx -t hsplit-agent .
#   torch         any amd64 or arm64 machine (CPU by default, CUDA by TORCH_INDEX)
#     docker build -f docker/agent.Dockerfile --target torch -t hsplit-agent .
#   jetson        the light agent on the GPU of a Jetson with JetPack 6, built on the device
#     docker build -f docker/agent.Dockerfile --target jetson -t hsplit-agent:jetson .
#   jetson-torch  the same with torch; its base image brings Python 3.10, CUDA and torch
#     docker build -f docker/agent.Dockerfile --target jetson-torch -t hsplit-agent:jetson .
ARG JETSON_BASE=nvcr.io/nvidia/l4t-jetpack:r36.4.0
ARG JETSON_TORCH_BASE=dustynv/pytorch:2.7-r36.4.0

FROM python:3.11-slim-bookworm AS onnx
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE NOTICE ./
COPY shared shared
COPY edge_agent edge_agent
COPY coordinator coordinator
RUN pip install --constraint constraints.txt '.[onnx,nvidia]'
# Not root; the volumes take over the owner of these folders.
RUN useradd --uid 10001 --create-home hsplit \
    && mkdir -p /cache /state \
    && chown 10001 /cache /state
USER 10001
WORKDIR /home/hsplit
ENV HSPLIT_BACKEND=onnx HSPLIT_CACHE_FOLDER=/cache HSPLIT_STATE_FOLDER=/state
VOLUME ["/cache", "/state"]
ENTRYPOINT ["hsplit-agent"]
CMD ["run"]

FROM python:3.11-slim-bookworm AS torch
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
# torch first, in a layer of its own: it is most of the image and changes least.
WORKDIR /src
COPY constraints.txt ./
RUN pip install --constraint constraints.txt --extra-index-url "${TORCH_INDEX}" torch
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY shared shared
COPY edge_agent edge_agent
COPY coordinator coordinator
RUN pip install --constraint constraints.txt --extra-index-url "${TORCH_INDEX}" '.[torch,nvidia]'
RUN useradd --uid 10001 --create-home hsplit \
    && mkdir -p /cache /state \
    && chown 10001 /cache /state
USER 10001
WORKDIR /home/hsplit
ENV HSPLIT_BACKEND=torch HSPLIT_CACHE_FOLDER=/cache HSPLIT_STATE_FOLDER=/state
VOLUME ["/cache", "/state"]
ENTRYPOINT ["hsplit-agent"]
CMD ["run"]

# hadolint ignore=DL3006
FROM ${JETSON_BASE} AS jetson
# PyPI's onnxruntime for arm64 knows the CPU alone; this index has builds for JetPack's CUDA.
ARG ONNXRUNTIME_INDEX=https://pypi.jetson-ai-lab.io/jp6/cu126
ARG ONNXRUNTIME_GPU=1.23.0
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-pip \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE NOTICE ./
COPY shared shared
COPY edge_agent edge_agent
COPY coordinator coordinator
# What onnxruntime needs comes with the one from PyPI, whose place the one for the GPU then takes:
# both are the same Python package, and side by side they would overwrite each other's files.
RUN pip3 install --index-url https://pypi.org/simple --constraint constraints.txt '.[onnx]' \
    && pip3 uninstall --yes onnxruntime \
    && pip3 install --no-deps --index-url "${ONNXRUNTIME_INDEX}" "onnxruntime-gpu==${ONNXRUNTIME_GPU}"
RUN useradd --uid 10001 --create-home --groups video hsplit \
    && mkdir -p /cache /state \
    && chown 10001 /cache /state
USER 10001
WORKDIR /home/hsplit
ENV HSPLIT_BACKEND=onnx HSPLIT_CACHE_FOLDER=/cache HSPLIT_STATE_FOLDER=/state
VOLUME ["/cache", "/state"]
ENTRYPOINT ["hsplit-agent"]
CMD ["run"]

# hadolint ignore=DL3006
FROM ${JETSON_TORCH_BASE} AS jetson-torch
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /src
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY shared shared
COPY edge_agent edge_agent
COPY coordinator coordinator
# Without constraints.txt: torch, and the numpy it was built with, must stay those of the base
# image, which match its CUDA. The index is said because these images set one of their own.
RUN python3 -c 'import torch; open("/tmp/kept.txt", "w").write("torch==" + torch.__version__)' \
    && pip3 install --index-url https://pypi.org/simple --constraint /tmp/kept.txt '.[torch]' \
    && rm /tmp/kept.txt
RUN useradd --uid 10001 --create-home --groups video hsplit \
    && mkdir -p /cache /state \
    && chown 10001 /cache /state
USER 10001
WORKDIR /home/hsplit
ENV HSPLIT_BACKEND=torch HSPLIT_CACHE_FOLDER=/cache HSPLIT_STATE_FOLDER=/state
VOLUME ["/cache", "/state"]
ENTRYPOINT ["hsplit-agent"]
CMD ["run"]
