# An image for work pools of type docker or kubernetes: see prefect.containers.yaml.
#     docker build -t rotation-vit .
FROM python:3.12-slim

WORKDIR /opt/rotation-vit
COPY pyproject.toml constraints.txt README.md ./
COPY flows flows
COPY tasks tasks
COPY training training
COPY models models
COPY data data
COPY prefect.yaml prefect.containers.yaml ./
RUN pip install --no-cache-dir --constraint constraints.txt ".[s3]"

# Outputs and prepared images belong on a volume or in a store (outputs: s3://bucket/prefix), or every
# run starts from nothing.
VOLUME /outputs
ENV GOMP_SPINCOUNT=1000 DO_NOT_TRACK=1
