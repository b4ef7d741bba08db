#!/usr/bin/env bash
# Collect wheels for `session.sh --wheels DIR`, for a machine without a package index whose Python has PyTorch already:
#   bash launch/gpu/wheels.sh DIR [--python-version 3.12] [NAME...]
# NAME: packages that it lacks, at the versions of requirements.lock; the default is what machines made for deep
# learning usually lack. Run it where pip works. DeepSpeed is built here, without compiled parts.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,5p' "$0" | sed 's/^# //' && exit 2; }
folder=$(realpath -m "$1") version=3.12
shift
if [ "${1:-}" = --python-version ]; then
  version=$2
  shift 2
fi
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || set -- deepspeed hjson pydantic pydantic-core typing-inspection typing-extensions annotated-types \
  webdataset braceexpand simplejpeg
pip=(python3 -m pip --disable-pip-version-check --quiet)
mkdir -p "$folder"
platforms=()
for glibc in 39 35 34 31 28 27 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
for name; do
  pin=$(grep -iE "^${name//[-_]/[-_]}==" requirements.lock) || { echo "$name is not in requirements.lock" >&2 && exit 2; }
  if [ "$name" = deepspeed ]; then
    DS_BUILD_OPS=0 "${pip[@]}" wheel --no-deps --wheel-dir "$folder" "$pin"
  else
    "${pip[@]}" download --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
      "${platforms[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --dest "$folder" "$pin"
  fi
done
du -sh "$folder"
ls "$folder"
