# The server in a container: internlm2 serve, on the CPU.
#   docker build -t internlm2 .
#   docker run --rm -p 8000:8000 -e INTERNLM2_API_KEY=choose-one -v /path/to/models:/models:ro internlm2 /models/internlm2_5-1_8b-chat
# For GPUs take a CUDA build of torch: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130, and run with --gpus all.
FROM python:3.11-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=serve
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/internlm2
ENV PATH=/opt/internlm2/bin:$PATH
WORKDIR /source
# NOTE: torch first and by itself: it is large and changes rarely, so its layer is kept.
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt --index-url "$TORCH_INDEX" torch
COPY . .
# The C++ kernels are compiled here, into the wheel.
RUN pip install --no-cache-dir -c constraints.txt ".[$EXTRAS]"

FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 libstdc++6 && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 internlm2
COPY --from=build /opt/internlm2 /opt/internlm2
ENV PATH=/opt/internlm2/bin:$PATH
# A number, so that Kubernetes can see that it is not root (runAsNonRoot).
USER 10001
WORKDIR /home/internlm2
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
# A container's own address is public, so a key is needed: INTERNLM2_API_KEY, or --keys FILE.
ENTRYPOINT ["internlm2", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["demo"]
