# docker build -t ernie-quant .
# docker run --rm --user "$(id -u):$(id -g)" --read-only --tmpfs /tmp -v "$PWD:/data" ernie-quant inspect ERNIE-4.5-0.3B-PT
#
# Any user number will do, and nothing but /data and /tmp is written to. What is downloaded or compiled is kept in /data/.cache.
FROM python:3.11-slim AS build
# for a PyTorch without CUDA: --build-arg TORCH="torch==2.13.0 --index-url …", the address that pytorch.org names for CPUs
ARG TORCH=torch==2.13.0
RUN python -m venv /opt/ernie-quant && /opt/ernie-quant/bin/pip install --no-cache-dir $TORCH
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY cli cli
COPY calibration calibration
COPY ernie_quant ernie_quant
ARG EXTRAS=calibration,plots
RUN /opt/ernie-quant/bin/pip install --no-cache-dir ".[$EXTRAS]"

FROM python:3.11-slim
COPY --from=build /opt/ernie-quant /opt/ernie-quant
# no home and no place in the package to write to: every cache has a place in the volume
ENV PATH=/opt/ernie-quant/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    XDG_CACHE_HOME=/data/.cache \
    ERNIE_QUANT_CACHE=/data/.cache/ernie-quant \
    NUMBA_CACHE_DIR=/data/.cache/numba \
    HF_HOME=/data/.cache/huggingface \
    MPLCONFIGDIR=/tmp/matplotlib \
    USER=ernie-quant
VOLUME /data
WORKDIR /data
USER 12345:12345
ENTRYPOINT ["ernie-quant"]
CMD ["--help"]
