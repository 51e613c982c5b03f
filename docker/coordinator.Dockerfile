# syntax=docker/dockerfile:1
# The coordinator, on CPU by default:
#   docker build -f docker/coordinator.Dockerfile -t hsplit-coordinator .
# With CUDA: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128
FROM python:3.11-slim-bookworm

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
RUN pip install --constraint constraints.txt --extra-index-url "${TORCH_INDEX}" '.[coordinator]'

# Not root; the volumes take over the owner of these folders.
RUN useradd --uid 10001 --create-home hsplit \
    && mkdir -p /runs /cache/huggingface \
    && chown -R 10001 /runs /cache
USER 10001
WORKDIR /home/hsplit
# The hub's downloads, and the pieces of the model that devices ask for.
ENV XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface
VOLUME ["/runs", "/cache"]

ENTRYPOINT ["hsplit-coordinator"]
CMD ["run", "/config/run.yaml", "--resume"]
