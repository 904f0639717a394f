# The image of every pod in k8s/: head, workers, submitter.
#
#   docker build -t embedshard:0.1.0-py3.11-ray2.60.0-cpu --build-arg TORCH_INDEX_URL=<PyTorch's index of CPU wheels> .
#   docker build -t embedshard:0.1.0-py3.11-ray2.60.0-cuda --build-arg FLAVOUR=cuda .
#
# The order of the steps is that of requirements/README.md, which says why it matters.
ARG PYTHON_VERSION=3.11.14

FROM python:${PYTHON_VERSION}-slim-bookworm AS build
# cpu or cuda: the name of a file in requirements/
ARG FLAVOUR=cpu
# Absent: torch's build for CUDA, which works on a CPU too and is several gigabytes larger.
ARG TORCH_INDEX_URL=""
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
WORKDIR /src
COPY requirements/ requirements/
RUN pip install ${TORCH_INDEX_URL:+--index-url "${TORCH_INDEX_URL}"} -r requirements/torch.txt
RUN pip install -r "requirements/${FLAVOUR}.txt" -r requirements/ray.txt
RUN pip install --no-deps -r requirements/torchrec.txt
COPY pyproject.toml README.md ./
COPY embedshard/ embedshard/
RUN pip install .

FROM python:${PYTHON_VERSION}-slim-bookworm
# bash (there already) and wget: KubeRay starts Ray, and may ask for its health, with them.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 tini wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 embedshard \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin embedshard
COPY --from=build /opt/venv /opt/venv
COPY pipelines/ /opt/embedshard/pipelines/
COPY k8s/drain.py /opt/embedshard/
# The root filesystem may be read-only: whatever writes, writes below /tmp.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    OMP_WAIT_POLICY=PASSIVE \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0
USER 10001:10001
WORKDIR /tmp
# tini hands SIGTERM on, upon which training saves a checkpoint. KubeRay replaces both by its `ray start`.
ENTRYPOINT ["tini", "--"]
CMD ["embedshard", "--help"]
