# docker build -f cluster/templates/cuda.Dockerfile -t hybridflow:cuda .
# torch brings CUDA's libraries; the base has the driver's interface and the compiler for DeepSpeed's and vLLM's own kernels.
# KubeRay before 1.6 probes pods with wget. NCCL reaches InfiniBand and RoCE through libibverbs; without it nodes talk over TCP.
FROM nvidia/cuda:13.0.2-devel-ubuntu22.04
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends software-properties-common \
    && add-apt-repository -y ppa:deadsnakes/ppa \
    && apt-get install -y --no-install-recommends python3.11 python3.11-dev python3.11-venv build-essential git wget \
       libibverbs1 librdmacm1 ibverbs-providers rdma-core \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/hybridflow
COPY Makefile pyproject.toml ./
COPY cluster/requirements.py cluster/
RUN make install ACCEL=cuda PYTHON=python3.11 && rm -rf ~/.cache/pip
ENV PATH=/opt/hybridflow/.venv/bin:$PATH
COPY . .
CMD ["python", "-m", "cluster"]
