# Not built here: no docker engine on the development machines.
#   CPU    docker build -t synthlit .
#   CUDA   docker build -t synthlit --build-arg BASE=nvidia/cuda:13.0.0-runtime-ubuntu24.04 .     (then docker run --gpus all ...)
#   run    docker run --rm -v $PWD/runs:/app/runs synthlit run nbs/params/digits.yaml
ARG BASE=python:3.11-slim
FROM ${BASE}
# python3 only where the base has none that is new enough (Ubuntu 24.04 brings 3.12)
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends make \
      $(python3 -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || echo python3 python3-venv) \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY Makefile settings.ini setup.py README.md LICENSE ./
COPY synthlit synthlit
COPY nbs nbs
RUN PIP_NO_CACHE_DIR=1 make .venv
ENTRYPOINT [".venv/bin/synthlit"]
CMD ["run", "nbs/params/digits.yaml"]
