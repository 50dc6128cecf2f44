#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Installs what is missing, builds, starts a coordinator and two CPU workers on the bundled model, streams a
# completion. Stays up until Ctrl-C; --once stops everything after the completion.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
STRAIT_ROOT="$PWD"
. deploy/setup.sh

once=
http=
for arg in "$@"; do
  case "$arg" in
    --once) once=1 ;;
    --http=*) http="$arg" ;;
    -h|--help)
      echo "usage: deploy/quickstart.sh [--once] [--http=HOST:PORT]"
      echo "  --once            stop everything after the first completion and exit"
      echo "  --http=HOST:PORT  where the API listens (default: 127.0.0.1:8000, or a free port)"
      exit 0 ;;
    *) strait_fail "unknown option $arg; see --help" ;;
  esac
done

model=deploy/models/reference
bin=build/release/bin

strait_need_packages build
strait_build release strait strait-coordinator strait-worker

# ---- Start ----
state="$(mktemp -d)" || exit 1
up=
cleanup() {
  trap '' INT TERM
  if [ -n "$up" ]; then
    kill -TERM "$up" 2>/dev/null
    wait "$up" 2>/dev/null
  fi
  rm -rf "$state"
}
trap cleanup EXIT
stopped() {
  echo
  strait_say "Stopping."
  exit 0
}
trap stopped INT TERM

strait_say "Starting a coordinator and two CPU workers on $model"
strait_say "This model is small (7.8 M parameters) and knows manuals and source code: see $model/README.md."
# In a session of its own: on Ctrl-C this script decides the order of things. `strait up` still ends its daemons
# if it is killed.
setsid "$bin/strait" up --model "$model" --workers 2 $http >"$state/ready" </dev/null &
up=$!
while [ ! -s "$state/ready" ]; do
  if ! kill -0 "$up" 2>/dev/null; then
    up=
    strait_fail "the cluster did not start; the reason is above"
  fi
  sleep 0.1
done
url="$(sed -n 's/^ready: \([^ ]*\).*/\1/p' "$state/ready")"
[ -n "$url" ] || strait_fail "unexpected first line of strait up: $(cat "$state/ready")"
strait_say "Ready at $url"

# ---- One completion ----
prompt="The package manager"
strait_say "A completion of \"$prompt\", as it comes:"
printf '\n'
"$bin/strait" generate "$prompt" --url "$url" --max-tokens 64 --temperature 0.6 --seed 7 ||
  strait_fail "the completion failed"
printf '\n'
strait_say "The API is at $url/v1. Try:"
cat <<LINE

    curl $url/v1/completions -H 'Content-Type: application/json' \\
      -d '{"prompt": "$prompt", "max_tokens": 32, "stream": true}'
    $bin/strait status --url $url

LINE
if [ -n "$once" ]; then
  strait_say "Done; stopping everything (--once)."
  exit 0
fi
strait_say "Serving until Ctrl-C."
wait "$up"
status=$?
up=
strait_fail "the cluster ended by itself (exit code $status)"
