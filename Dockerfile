# An image for work pools of type docker or kubernetes (see prefect.containers.yaml), or for one run:
#
#   docker build -t rotation-vit .
#   docker run --gpus all --shm-size 8g --stop-timeout 60 -v rotation-vit-outputs:/outputs rotation-vit \
#       rotvit run --preset imagenette --outputs /outputs
#
# For ImageNet-1k, and for Weights & Biases, with -e HF_TOKEN -e WANDB_API_KEY: as they are here.
#
# It runs with and without a GPU. For machines that have none there is one that is some gigabytes
# smaller; TORCH_INDEX is the package index of torch's builds for CPU, as torch's installation page
# names it:
#
#   docker build -t rotation-vit:cpu --build-arg VARIANT=cpu --build-arg TORCH_INDEX=https://... .
ARG VARIANT=cuda

FROM python:3.12-slim AS base
ENV PIP_NO_CACHE_DIR=1
WORKDIR /opt/rotation-vit
COPY constraints.txt ./

FROM base AS torch-cuda
# Long trainings on a GPU are compiled, which takes a C compiler.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN pip install --constraint constraints.txt torch torchvision

FROM base AS torch-cpu
ARG TORCH_INDEX
# Both from there: torchvision's other builds do not import beside this torch. What they need, which
# that index has in other versions, comes with the project.
RUN pip install --no-deps --constraint constraints.txt \
    --index-url "${TORCH_INDEX:?must be the index of the builds for CPU: --build-arg TORCH_INDEX=...}" \
    torch torchvision

FROM torch-${VARIANT}
COPY pyproject.toml README.md prefect.yaml prefect.containers.yaml ./
COPY flows flows
COPY tasks tasks
COPY training training
COPY models models
COPY data data
RUN pip install --constraint constraints.txt ".[s3]"

# Outputs and prepared images belong on a volume or in a store (outputs: s3://bucket/prefix), or every
# run starts from nothing.
VOLUME /outputs
ENV GOMP_SPINCOUNT=1000 DO_NOT_TRACK=1
CMD ["rotvit", "--help"]
