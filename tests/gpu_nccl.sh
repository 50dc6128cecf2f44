#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The part nccl of tests/gpu.sh: several NCCL ranks on one GPU, without and with MPS. Arguments: the folder of the
# programs, a folder for logs, a Python with pytest and httpx.
#   Without MPS ranks take turns: kills are judged there, by recovery and not by speed. With it they run at the same
#   time: tokens, a rank that is stopped, and the hop's speed. Under MPS one client's death takes the others along.
set -uo pipefail
programs="$1" out="$2" python="$3"
cd "$(dirname "$0")/.." || exit 1
failed=0

part() {  # name, whether MPS runs
  local name="$1" mps="$2"
  echo "--- $name"
  "$programs/tests/cuda_nccl_hop_bench" >"$out/nccl_hop_$name.log" 2>&1
  local rc=$?
  cat "$out/nccl_hop_$name.log"
  [ $rc = 0 ] || { echo "FAILED: hop benchmark, $name (exit code $rc)"; failed=1; }
  STRAIT_TEST_MPS=$mps STRAIT_TEST_BACKEND=cuda STRAIT_BIN="$programs/bin" "$python" -B -m pytest -p no:cacheprovider \
    -q -rP --tb=short tests/e2e/test_nccl_gpu.py </dev/null >"$out/nccl_$name.log" 2>&1 ||
    { echo "FAILED: end to end, $name ($out/nccl_$name.log)"; failed=1; }
  grep -hE "^pause|passed|failed" "$out/nccl_$name.log"
}

part no-mps 0

# The control program may lie beside the driver rather than on PATH.
control="$(command -v nvidia-cuda-mps-control || ls /usr/bin/nvidia-cuda-mps-control \
  /usr/local/nvidia/bin/nvidia-cuda-mps-control 2>/dev/null | head -n 1)"
if [ -z "$control" ]; then
  echo "FAILED: no nvidia-cuda-mps-control here, so nothing ran with MPS"
  exit 1
fi
mps_dir="$(mktemp -d)"
export CUDA_MPS_PIPE_DIRECTORY="$mps_dir/pipe" CUDA_MPS_LOG_DIRECTORY="$mps_dir/log"
mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
end_mps() {
  echo quit | "$control" >/dev/null 2>&1
  cp "$CUDA_MPS_LOG_DIRECTORY"/*.log "$out/" 2>/dev/null
  rm -rf "$mps_dir"
}
trap end_mps EXIT
# What a pipeline of as many ranks serves, and what the sharing alone costs: a quarter of the layers in one process, and
# in four at once.
ranks() {
  echo "--- ranks that share the GPU"
  local n i model=tests/bench/models/v2-lite log="$out/nccl_hop_ranks.log"
  : >"$log"
  for n in 1 2 4; do
    "$programs/bin/strait" bench --model $model --random-weights 1 --backend cuda --workers $n --concurrency 64 \
      --prompt-tokens 1024 --output-tokens 128 --requests 128 --warmup 8 --json "$out/ranks_$n.json" </dev/null \
      >"$out/ranks_$n.log" 2>&1 || { echo "FAILED: $n ranks ($out/ranks_$n.log)"; failed=1; continue; }
    "$python" - "$out/ranks_$n.json" $n >>"$log" <<'PYTHON'
import json, sys
run = json.load(open(sys.argv[1]))["runs"][0]
keys = ("concurrency", "prompt_tokens_per_s", "output_tokens_per_s", "failed")
print("JSON", json.dumps({"bench": "ranks", "ranks": int(sys.argv[2]), "tpot_p50_ms": run["tpot_ms"]["p50"], **{k: run[k] for k in keys}}))
PYTHON
  done
  for n in 1 4; do
    local running=()
    for ((i = 0; i < n; ++i)); do
      "$programs/tests/cuda_stage_bench" $model 7 14 64@1088 --memory 25000000000 >"$out/quarter_${n}_$i.log" 2>&1 &
      running+=($!)
    done
    for i in "${running[@]}"; do wait "$i" || { echo "FAILED: $n stages at once ($out/quarter_${n}_*.log)"; failed=1; }; done
    sed -n "s/^JSON {\"bench\":\"decode\"/JSON {\"bench\":\"quarter\",\"at_once\":$n/p" "$out"/quarter_"$n"_*.log >>"$log"
  done
  grep -h '^JSON' "$log"
}

if "$control" -d >"$out/mps.log" 2>&1; then
  part mps 1
  ranks
else
  echo "FAILED: the MPS daemon does not start ($out/mps.log)"
  failed=1
fi
exit $failed
