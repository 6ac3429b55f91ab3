# The gateway: patchsight-serve without torch. `docker build -t patchsight .`; for NVIDIA GPUs `--build-arg EXTRAS=gpu`,
# which brings CUDA from the lock, so that the base stays the same and the host needs the driver alone.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG UV=0.13.9
ARG EXTRAS=
ENV UV_PYTHON_DOWNLOADS=never
RUN pip install --no-cache-dir "uv==${UV}"
WORKDIR /src
COPY pyproject.toml requirements.lock ./
# What the lock has of the base install and the extra, each file by its hash; without a GPU 300 MB less of ONNX Runtime.
RUN uv venv --quiet /opt/patchsight && \
    uv pip compile --quiet --generate-hashes --constraints requirements.lock ${EXTRAS:+--extra ${EXTRAS}} \
        --python /opt/patchsight/bin/python pyproject.toml -o /tmp/requirements.txt && \
    uv pip sync --quiet --no-cache --compile-bytecode --require-hashes --python /opt/patchsight/bin/python \
        /tmp/requirements.txt && \
    if [ -z "${EXTRAS}" ]; then \
        rm -f /opt/patchsight/lib/python3*/site-packages/onnxruntime/capi/libonnxruntime_providers_cuda.so \
            /opt/patchsight/lib/python3*/site-packages/onnxruntime/capi/libonnxruntime_providers_tensorrt.so; \
    fi
COPY README.md LICENSE ./
COPY train/patchsight_train train/patchsight_train
COPY export/patchsight_export export/patchsight_export
COPY serve/patchsight_serve serve/patchsight_serve
COPY model_repository/simclr-vit-tiny-photos model_repository/simclr-vit-tiny-photos
RUN uv build --quiet --wheel --build-constraints requirements.lock --require-hashes --out-dir /tmp/dist . && \
    uv pip install --quiet --no-cache --no-deps --compile-bytecode --python /opt/patchsight/bin/python /tmp/dist/*.whl

FROM ${BASE}
RUN useradd --system --uid 10001 --no-create-home --home-dir /state patchsight && \
    install -d -o patchsight -m 0700 /state
COPY --from=build /opt/patchsight /opt/patchsight
ENV PATH=/opt/patchsight/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PATCHSIGHT_HOST=0.0.0.0 \
    PATCHSIGHT_STATE_DIR=/state \
    PATCHSIGHT_LOG_FORMAT=json \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001
WORKDIR /state
VOLUME /state
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=5)"]
ENTRYPOINT ["patchsight-serve"]
