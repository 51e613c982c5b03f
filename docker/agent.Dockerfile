# syntax=docker/dockerfile:1
# The agent. Two targets:
#   torch   any amd64 or arm64 machine (CPU by default, CUDA by TORCH_INDEX)
#     docker build -f docker/agent.Dockerfile --target torch -t hsplit-agent .
#   jetson  JetPack 6, built on the device; its base image brings Python 3.10, CUDA and torch
#     docker build -f docker/agent.Dockerfile --target jetson -t hsplit-agent:jetson .
ARG JETSON_BASE=dustynv/pytorch:2.7-r36.4.0

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
# Not root; the volumes take over the owner of these folders.
RUN useradd --uid 10001 --create-home hsplit \
    && mkdir -p /cache /state \
    && chown 10001 /cache /state
USER 10001
WORKDIR /home/hsplit
ENV HSPLIT_CACHE_FOLDER=/cache HSPLIT_STATE_FOLDER=/state
VOLUME ["/cache", "/state"]
ENTRYPOINT ["hsplit-agent"]
CMD ["run"]

# hadolint ignore=DL3006
FROM ${JETSON_BASE} AS jetson
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
ENV HSPLIT_CACHE_FOLDER=/cache HSPLIT_STATE_FOLDER=/state
VOLUME ["/cache", "/state"]
ENTRYPOINT ["hsplit-agent"]
CMD ["run"]
