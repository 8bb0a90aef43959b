# untried: nobody has built this image yet
FROM python:3.11-slim

# torch without CUDA; leave this line out, and take an image with CUDA, where there is a GPU
RUN pip install --no-cache-dir 'torch<2.16' --index-url https://download.pytorch.org/whl/cpu

COPY pyproject.toml setup.cfg README.md LICENSE /src/
COPY plugin /src/plugin
COPY jax_kernels /src/jax_kernels
RUN pip install --no-cache-dir '/src[serve]' && rm -r /src

RUN useradd --create-home packscore
USER packscore
# models that are named by the hub are kept here
ENV HF_HOME=/home/packscore/models PACKSCORE_SERVE_HOST=0.0.0.0
EXPOSE 8000
HEALTHCHECK --start-period=5m CMD \
  python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"
ENTRYPOINT ["packscore", "serve"]
