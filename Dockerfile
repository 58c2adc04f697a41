# Images for the two kinds of machines; every version but these two arguments comes from setup.cfg:
#   docker build --target worker -t ymplug_worker .     Beam workers and the driver of build_shards
#   docker build --target tpu -t ymplug_jax .           training on TPU hosts, as launch/gke.yaml starts it
#   docker build --target gpu -t ymplug_jax_gpu .       training on NVIDIA hosts
# BEAM is the version of Beam's entrypoint; the build stops if setup.cfg does not allow it. Driver and workers must have equal versions
# of Python and Beam: run the driver in the image, too.
ARG PYTHON=3.11
ARG BEAM=2.77.0

FROM apache/beam_python${PYTHON}_sdk:${BEAM} AS beam

FROM python:${PYTHON}-slim AS code
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
WORKDIR /app
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY ymplug_jax ymplug_jax
COPY data_prep data_prep
COPY configs configs
COPY launch launch
RUN useradd --create-home --uid 1000 ymplug

# Root: Beam's entrypoint makes environments and folders under /opt and /tmp for the files that a job stages.
FROM code AS worker
ARG BEAM
# hadolint ignore=DL3013
RUN pip install ".[prep,gcs,s3,dataflow]" "apache-beam==${BEAM}"
COPY --from=beam /opt/apache/beam /opt/apache/beam
ENV TF_CPP_MIN_LOG_LEVEL=3
ENTRYPOINT ["/opt/apache/beam/boot"]

# Root: the devices of a TPU and the lock of its library belong to root.
FROM code AS tpu
# hadolint ignore=DL3013
RUN pip install ".[tpu,gcs]"
ENTRYPOINT []
CMD ["python", "-m", "ymplug_jax.main", "--help"]

# The driver of the host is mounted by the NVIDIA container toolkit; CUDA itself comes with jax[cuda12].
FROM code AS gpu
# hadolint ignore=DL3013
RUN pip install ".[cuda,gcs]" && chown ymplug /app
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
ENTRYPOINT []
CMD ["python", "-m", "ymplug_jax.main", "--help"]
