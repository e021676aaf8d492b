#!/usr/bin/env bash
# What gpu.sh needs beside torch, transformers, accelerate and peft, for a machine without a network, in one file of 38 MB:
#     bash experiments/throughput/pack.sh packages.txz [3.12]     # here; the other machine's Python
#     tar -xf packages.txz && PYTHONPATH=$PWD/site-packages bash experiments/throughput/gpu.sh OUT    # there
# The directory has that name because dill would take modules in any other for a script's own, and pickle them whole.
set -euo pipefail
file=$1 version=${2:-3.12}
names='antlr4-python3-runtime|certifi|charset-normalizer|datasets|dill|idna|multiprocess|omegaconf|pandas|pyarrow|'
names+='python-dateutil|requests|six|urllib3|xxhash'
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

{ grep -E "^($names)==" constraints.txt; echo trl==1.13.0; } > "$scratch/packages.txt"
python3 -m pip install --quiet --target "$scratch/site-packages" --no-deps --implementation cp --python-version "$version" \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux1_x86_64 \
    --only-binary=:all: --no-binary=antlr4-python3-runtime -r "$scratch/packages.txt"
tar -cJf "$file" -C "$scratch" --exclude=tests --exclude=include --exclude=bin --exclude='*flight*' site-packages
ls -l "$file"
