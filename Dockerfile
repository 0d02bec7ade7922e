# docker build -t anyflow . && docker run --gpus all --ipc=host -v /data:/data anyflow train experiment=...
# The image has CUDA's compiler, which DeepSpeed needs to build its operators.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
RUN apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv python3-dev git \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/anyflow
ENV PATH=/opt/anyflow/bin:$PATH
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir '.[deepspeed,bitsandbytes,parquet]'
WORKDIR /data
ENTRYPOINT ["anyflow"]
CMD ["doctor"]
