# Two images from one file (docs/deploy.md):
#   docker build --target cpu --build-arg PIP_EXTRA_INDEX_URL=... -t vllm-calidrop:cpu .
#   docker build --target gpu -t vllm-calidrop:gpu .
# `docker run -p 8000:8000 IMAGE` serves the small model that lies inside; `docker run ... IMAGE MODEL FLAGS` another one.
ARG PYTHON_VERSION=3.11
# The vLLM of the GPU image: the newest release that is tested. The CPU image has the one of requirements/cpu.lock.
ARG VLLM_VERSION=0.33.0

FROM python:${PYTHON_VERSION}-slim-bookworm AS cpu-build
# Where pip finds PyTorch's CPU wheels, which PyPI has not (README.md, Install). pip reads it from the environment.
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY requirements/cpu.lock requirements/check_no_vllm.py requirements/
COPY requirements/vllm_metadata/pyproject.toml requirements/vllm_metadata/
# The Makefile's steps, in its order, and its reasons for --no-deps. The locked setuptools builds what is built here.
RUN python -m pip install --no-deps "$(grep '^torch==' requirements/cpu.lock)+cpu" \
    && python -m pip install --no-deps -r requirements/cpu.lock \
    && python requirements/check_no_vllm.py
COPY pyproject.toml setup.py LICENSE README.md ./
COPY vllm_calidrop vllm_calidrop
COPY server server
COPY docs docs
RUN python -m pip install --no-deps --no-build-isolation ./requirements/vllm_metadata .

FROM python:${PYTHON_VERSION}-slim-bookworm AS cpu
# A C++ compiler: for torch.compile, and for this package's operators, compiled for the machine that runs the container.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home calidrop \
    && install --directory --owner=calidrop /cache
COPY --from=cpu-build /opt/venv /opt/venv
COPY benchmarks/small_model/smooth /opt/calidrop/smooth
# All caches in one volume: models of the hub, compiled graphs and operators. KV cache in GiB: raise it with -e.
ENV PATH=/opt/venv/bin:$PATH \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache \
    VLLM_CACHE_ROOT=/cache/vllm \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    VLLM_CPU_KVCACHE_SPACE=1 \
    VLLM_NO_USAGE_STATS=1
VOLUME /cache
USER 10001
WORKDIR /home/calidrop
EXPOSE 8000
# SIGTERM: requests that run may finish for --shutdown-timeout seconds; `docker stop --time` must be longer.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["calidrop-server"]
CMD ["/opt/calidrop/smooth", "--served-model-name", "smooth", "--block-size", "32", "--shutdown-timeout", "8"]

FROM vllm/vllm-openai:v${VLLM_VERSION} AS gpu
WORKDIR /build
COPY pyproject.toml setup.py LICENSE README.md ./
COPY vllm_calidrop vllm_calidrop
COPY server server
COPY docs docs
# vLLM's image has everything else that this package needs (pyproject.toml), at the versions vLLM wants.
RUN python3 -m pip install --no-cache-dir --no-deps --no-build-isolation . \
    && python3 -c "import numpy, packaging, psutil, pydantic, vllm_calidrop, vllm_calidrop_server" \
    && useradd --uid 10001 --create-home calidrop \
    && install --directory --owner=calidrop /cache
COPY benchmarks/small_model/smooth /opt/calidrop/smooth
ENV HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache \
    VLLM_CACHE_ROOT=/cache/vllm \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton \
    VLLM_NO_USAGE_STATS=1
VOLUME /cache
USER 10001
WORKDIR /home/calidrop
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["calidrop-server"]
CMD ["/opt/calidrop/smooth", "--served-model-name", "smooth", "--shutdown-timeout", "8"]
