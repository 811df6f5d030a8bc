# docker build -f cluster/templates/cpu.Dockerfile -t hybridflow:cpu .
FROM python:3.11-slim-bookworm
# A compiler for what PyTorch and DeepSpeed may build on first use; wget for the probes of KubeRay before 1.6.
RUN apt-get update && apt-get install -y --no-install-recommends build-essential git wget libtcmalloc-minimal4 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/hybridflow
# Requirements first: editing the code does not install them again.
COPY Makefile pyproject.toml ./
COPY cluster/requirements.py cluster/
RUN make install ACCEL=cpu PYTHON=python3.11 && rm -rf ~/.cache/pip
ENV PATH=/opt/hybridflow/.venv/bin:$PATH
COPY . .
CMD ["python", "-m", "recipes.quickstart"]
