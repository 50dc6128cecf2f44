#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The part nccl of tests/gpu.sh: several NCCL ranks on one GPU, without and with MPS, and where there are more GPUs one rank
# on each. Arguments: the folder of the programs, a folder for logs, a Python with pytest and httpx.
#   Without MPS ranks take turns: kills are judged there, by recovery and not by speed. With it they run at the same
#   time: tokens, a rank that is stopped, and the hop's speed. Under MPS one client's death takes the others along.
set -uo pipefail
programs="$1" out="$2" python="$3"
cd "$(dirname "$0")/.." || exit 1
failed=0

part() {  # name, whether MPS runs, GPUs
  local name="$1" mps="$2" gpus="${3:-0}" num=1
  case "$gpus" in *,*) num=2 ;; esac
  echo "--- $name"
  "$programs/tests/cuda_nccl_hop_bench" --gpus $num >"$out/nccl_hop_$name.log" 2>&1
  local rc=$?
  cat "$out/nccl_hop_$name.log"
  [ $rc = 0 ] || { echo "FAILED: hop benchmark, $name (exit code $rc)"; failed=1; }
  STRAIT_TEST_MPS=$mps STRAIT_TEST_GPUS=$gpus STRAIT_TEST_BACKEND=cuda STRAIT_BIN="$programs/bin" "$python" -B -m pytest -p no:cacheprovider \
    -q -rP --tb=short tests/e2e/test_nccl_gpu.py </dev/null >"$out/nccl_$name.log" 2>&1 ||
    { echo "FAILED: end to end, $name ($out/nccl_$name.log)"; failed=1; }
  grep -hE "^pause|passed|failed" "$out/nccl_$name.log"
}

part no-mps 0

# What a pipeline of n ranks serves. name of the JSON lines, n, more arguments of strait bench…
serve_ranks() {
  local name="$1" n="$2" log="$out/nccl_hop_$1.log"
  shift 2
  "$programs/bin/strait" bench --model tests/bench/models/v2-lite --random-weights 1 --backend cuda --workers "$n" "$@" \
    --concurrency 64 --prompt-tokens 1024 --output-tokens 128 --requests 128 --warmup 8 --json "$out/${name}_$n.json" \
    </dev/null >"$out/${name}_$n.log" 2>&1 || { echo "FAILED: $n ranks ($out/${name}_$n.log)"; failed=1; return; }
  "$python" - "$out/${name}_$n.json" "$name" "$n" >>"$log" <<'PYTHON'
import json, sys
run = json.load(open(sys.argv[1]))["runs"][0]
keys = ("concurrency", "prompt_tokens_per_s", "output_tokens_per_s", "failed")
print("JSON", json.dumps({"bench": sys.argv[2], "ranks": int(sys.argv[3]), "tpot_p50_ms": run["tpot_ms"]["p50"], **{k: run[k] for k in keys}}))
PYTHON
}

if [ -n "${CUDA_VISIBLE_DEVICES-}" ]; then
  num_gpus="$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)"
else
  num_gpus="$(nvidia-smi -L | grep -c '^GPU')"
fi
if [ "$num_gpus" -gt 1 ]; then
  all="$(seq -s, 0 $((num_gpus > 4 ? 3 : num_gpus - 1)))"
  part gpus 0 "$all"
  : >"$out/nccl_hop_gpu_ranks.log"
  for n in 1 2 4; do
    [ "$n" -gt "$num_gpus" ] || serve_ranks gpu_ranks "$n" --gpu "$(seq -s, 0 $((n - 1)))"
  done
  grep -h '^JSON' "$out/nccl_hop_gpu_ranks.log"
fi

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
# What pipelines whose ranks share the GPU serve, and what the sharing alone costs: a quarter of the layers with a quarter
# of the clients, as the stages of four ranks make it, in one process and in four at once.
ranks() {
  echo "--- ranks that share the GPU"
  local n i log="$out/nccl_hop_ranks.log"
  : >"$log"
  for n in 1 2 4; do serve_ranks ranks $n; done
  for n in 1 4; do
    local running=()
    for ((i = 0; i < n; ++i)); do
      "$programs/tests/cuda_stage_bench" tests/bench/models/v2-lite 7 14 16@1088 64@1088 --memory 25000000000 \
        >"$out/quarter_${n}_$i.log" 2>&1 &
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
