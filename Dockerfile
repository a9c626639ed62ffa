# Two targets: `cpu` (default of `make image`) and `cuda`. Both run as a user without rights and keep their state
# in /state. The torch build comes from the pip index given as TORCH_INDEX_URL, or from pip's own sources.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ make && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/coserve
ENV PATH=/opt/coserve/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
ARG TORCH_INDEX_URL=
ARG TORCH_VERSION=2.13.0
RUN pip install ${TORCH_INDEX_URL:+--index-url ${TORCH_INDEX_URL}} "torch==${TORCH_VERSION}"
WORKDIR /src
COPY pyproject.toml CMakeLists.txt README.md LICENSE ./
COPY csrc csrc
COPY coserve coserve
RUN pip install .

FROM ${PYTHON_IMAGE} AS runtime
RUN useradd --uid 10001 --create-home coserve && install -d -o coserve /state
COPY --from=build /opt/coserve /opt/coserve
ENV PATH=/opt/coserve/bin:$PATH PYTHONUNBUFFERED=1
USER coserve
WORKDIR /home/coserve
VOLUME /state
EXPOSE 8000 50051
# /health answers without a key; the longest start is that of a large model's load.
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s CMD ["python", "-c", \
    "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["coserve"]

FROM runtime AS cuda
# What the NVIDIA container runtime gives to a container that asks for it.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
CMD ["serve", "--host", "0.0.0.0", "--device", "cuda", "--state-dir", "/state"]

FROM runtime AS cpu
CMD ["serve", "--host", "0.0.0.0", "--device", "cpu", "--state-dir", "/state"]
