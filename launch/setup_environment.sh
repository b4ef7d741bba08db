#!/usr/bin/env bash
# Make a virtual environment with aroface and its locked dependencies. Called by `make setup`.
#   launch/setup_environment.sh VENV     PYTHON names the interpreter (3.11 or newer)
#
# PyTorch: the CUDA build where `nvidia-smi` finds a GPU, a CPU build elsewhere. pip is used as it is configured; where
# its index has no "+cpu" build (PyPI has none for Linux), the default build is taken, which also runs without a GPU.
# To take the small CPU build there, configure PyTorch's CPU index, for instance through PIP_EXTRA_INDEX_URL.
set -euo pipefail
venv=$1
python=${PYTHON:-python3}
lock=requirements.lock

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 2; }

command -v "$python" >/dev/null || fail "$python not found; install Python 3.11 or newer, or name one: make setup PYTHON=..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$("$python" --version) is too old; aroface needs 3.11 or newer: make setup PYTHON=python3.11"

if [ ! -x "$venv/bin/python" ]; then
  say "making $venv with $("$python" --version)"
  "$python" -m venv "$venv" || fail "python -m venv failed; on Debian and Ubuntu: apt-get install python3-venv"
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)

torch_version=$(sed -n 's/^torch==//p' "$lock")
installed=$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true)
if nvidia-smi -L >/dev/null 2>&1; then
  say "NVIDIA GPU found; PyTorch $torch_version with CUDA"
  # "===" matches the version to the letter, so that a "+cpu" build in sight is not taken for a newer one.
  [ "${installed%%+cpu*}" = "$installed" ] && [ "${installed%%+*}" = "$torch_version" ] ||
    "${pip[@]}" install --constraint "$lock" "torch===$torch_version" ||
    "${pip[@]}" install --constraint "$lock" "torch==$torch_version"
elif [ "${installed%%+*}" != "$torch_version" ]; then
  say "no NVIDIA GPU; PyTorch $torch_version for CPU"
  "${pip[@]}" install --constraint "$lock" "torch==$torch_version+cpu" 2>/dev/null ||
    { say "no CPU-only build in pip's index; taking the default build (larger, runs without a GPU too)"
      "${pip[@]}" install --constraint "$lock" "torch==$torch_version"; }
fi

say "aroface and its dependencies at the versions of $lock"
DS_BUILD_OPS=0 "${pip[@]}" install --constraint "$lock" --editable '.[dev]'
say "done: $("$venv/bin/python" -c 'import aroface; print("aroface", aroface.__version__)') in $venv"
