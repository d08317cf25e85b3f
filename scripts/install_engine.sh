#!/usr/bin/env bash
# usage: install_engine.sh VENV    vLLM-Omni on a machine without a GPU, for tests/engine (2 minutes, 1.8 GB)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
venv=$1
"${PYTHON:-python3.11}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pins=$(mktemp)
grep '^torch==' "$root/constraints.txt" | cat - "$root/tests/engine/constraints.txt" > "$pins"
pip -c "$pins" pip
pip -c "$pins" torch
pip -c "$pins" setuptools setuptools-scm setuptools-rust wheel packaging ninja cmake jinja2 numpy
# The source distribution, with no code for a device; it would call itself 0.30.0+empty.
VLLM_VERSION_OVERRIDE=0.30.0 VLLM_TARGET_DEVICE=empty \
  pip --no-deps --no-build-isolation --no-binary vllm vllm==0.30.0
pip --no-deps vllm-omni==0.30.0
pip -c "$pins" transformers diffusers accelerate cache-dit aenum einops \
  pyzmq cloudpickle msgspec pydantic psutil cachetools cbor2 aiohttp openai-harmony openai pybase64 uvloop py-cpuinfo \
  prometheus-client fastapi partial-json-parser apache-tvm-ffi llguidance tiktoken loguru omegaconf prettytable \
  av janus pytest pytest-xdist rich typer
# For its server.
pip -c "$pins" soundfile websockets uvicorn watchfiles model-hosting-container-standards ijson mistral-common \
  python-multipart prometheus-fastapi-instrumentator pydantic-settings
pip --no-deps -c "$pins" xgrammar torchvision torchaudio
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
rm -f "$site"/torchaudio/lib/_torchaudio*.so "$site"/torchaudio/_torchaudio*.so  # made for CUDA
cp "$root/tests/engine/torchvision_ops.py" "$site/torchvision_ops.py"
echo "import torchvision_ops" > "$site/torchvision_ops.pth"
build=$(mktemp -d)
cp -r "$root/tests/engine/platform" "$build/"
pip --no-deps --no-build-isolation "$build/platform"
pip --no-deps --no-build-isolation -e "$root"
