#!/usr/bin/env bash
# Everything that a lent GPU should answer, in ten minutes: is what has only run on CPUs right there, how fast is it, and
# next to TRL? From the repository's root, with what README.md says is needed on PYTHONPATH:
#     bash experiments/throughput/gpu.sh OUT                   # writes OUT/gpu.json
#     bash experiments/throughput/gpu.sh OUT cpu tiny          # does it run?
set -uo pipefail
out=$1 device=${2:-cuda} model=${3:-qwen2-0.5b-random} python=${PYTHON:-python3}
here=$(dirname "$0")
export PYTHONPATH=.:${PYTHONPATH:-}
mkdir -p "$out"

timeout 200 "$python" "$here/gpu.py" "$out/checks.json" --device "$device" --model "$model"

contenders="trl-best xpo-cold"
"$python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("vllm"))' && contenders+=" xpo-vllm"
# UltraFeedback's 60,829 prompts for training, once, in hours of this device. TRL is taken as this python has it.
timeout 380 "$python" "$here/run.py" --device "$device" --model "$model" --trl-python "${TRL_PYTHON:-$python}" \
    --workloads ultrafeedback --contenders $contenders --steps 4 --budget 90 --floor --headline-prompts 60829 --results "$out/comparison"

"$python" - "$out" <<'PYTHON'
import json, sys
from pathlib import Path

out = Path(sys.argv[1])
files = [out / "checks.json", *sorted((out / "comparison").glob("*.json"))]
parts = {file.stem: json.loads(file.read_text()) for file in files if file.exists()}
(out / "gpu.json").write_text(json.dumps(parts, indent=1) + "\n")
print(f"{out}/gpu.json: {', '.join(parts) or 'nothing'}")
sys.exit(not parts)
PYTHON
