# SPDX-License-Identifier: Apache-2.0
"""A pipeline gets other stages while a client reads: the same tokens and log-probabilities, to the last bit, as without.

One worker makes two and three stages of its one, which share its memory and its weights; a second worker takes some and
gives them up again. Refusals name the reason and the flag. Runs on GPU workers with STRAIT_TEST_BACKEND=cuda.
"""
import json
import os
import re
import signal
import threading

import pytest
from harness import BACKEND, ROOT, Cluster, free_port, strait, wait_until

SHAPE = "v2-lite"
MODEL = ROOT / "tests/golden" / SHAPE
FIXED = [] if BACKEND == "cpu" else ["--deterministic"]
TOKENS = 400
MEMORY = "256MiB" if BACKEND == "cpu" else "1GiB"  # a GPU stage has 80 MB of its own: workspace, graphs


def cluster_of(workers):
    return Cluster(MODEL, workers=workers, pipelines=1, random_weights=None, memory=MEMORY, args=FIXED)


def scale(cluster, stages):
    return strait("scale", "--stages", stages, "--coordinator", cluster.base_url)


def body():
    prompt = max((p["tokens"] for p in json.loads((MODEL / "golden.json").read_text())["prompts"]), key=len)
    return dict(model=SHAPE, prompt=prompt, max_tokens=TOKENS, temperature=0.9, seed=11, logprobs=1, ignore_eos=True,
                return_token_ids=True)


def layers(cluster):
    """By worker, what its stages have."""
    return [sorted((s["layer_begin"], s["layer_end"]) for s in w["stages"]) for w in cluster.status()["workers"]]


def streamed_while(cluster, *changes):
    """What a client gets while the cluster changes; each change waits for some more tokens."""
    ids, logprobs, done = [], [], []

    def change():
        for i, one in enumerate(changes):
            wait_until(lambda: len(ids) >= 20 * (i + 1), what="tokens")
            done.append(one())

    changing = threading.Thread(target=change)
    changing.start()
    for event in cluster.stream(**body()):
        for choice in event.get("choices", []):
            ids += choice.get("token_ids") or []
            logprobs += (choice.get("logprobs") or {}).get("token_logprobs") or []
    changing.join()
    return ids, logprobs, done


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_tokens_while_stages_change(workers):
    with cluster_of(workers) as cluster:
        whole = cluster.complete(**body())["choices"][0]
        before = cluster.status()["workers"][0]
        ids, logprobs, done = streamed_while(cluster, *[lambda n=n: scale(cluster, n) for n in (2, 3, 1, 2)])
        for one in done:
            assert one.returncode == 0, one.stderr
            assert re.match(r"1 pipeline with \d stages?; longest pause [\d.]+ ms; rows kept", one.stdout), one.stdout
        assert ids == whole["token_ids"]
        assert logprobs == whole["logprobs"]["token_logprobs"]
        assert cluster.status()["stats"]["recoveries"] == 0
        if workers == 1:
            assert cluster.status()["stats"]["recomputed_rows"] < 50, "rows stay where their layers stay"
        assert sum(len(one) for one in layers(cluster)) == 2
        assert {w["id"] for w in cluster.status()["workers"]} >= {before["id"]}
        for worker in cluster.status()["workers"]:
            assert worker["booked_bytes"] <= worker["memory_bytes"]


def test_a_worker_that_dies_with_two_stages_is_replaced():
    with cluster_of(1) as cluster:
        assert scale(cluster, 2).returncode == 0
        whole = cluster.complete(**body())["choices"][0]
        ids, logprobs, _ = streamed_while(cluster, lambda: os.kill(sorted(cluster.workers())[0], signal.SIGKILL))
        assert ids == whole["token_ids"]
        assert logprobs == whole["logprobs"]["token_logprobs"]
        assert len(layers(cluster)[0]) == 2


def test_what_cannot_be_is_refused_with_the_reason():
    with cluster_of(1) as cluster:
        many = scale(cluster, 200)
        assert many.returncode == 1
        assert "a stage has a layer at least" in many.stderr
        assert strait("scale", "--stages", 0).returncode != 0
        grpc = re.search(r"workers join at (\S+);", cluster.stdout()).group(1)
        wrong = strait("scale", "--stages", 2, "--coordinator", grpc)
        assert wrong.returncode == 1 and "gRPC port" in wrong.stderr
        none = strait("scale", "--stages", 2, "--coordinator", cluster.base_url, env={"XDG_RUNTIME_DIR": cluster.dir})
        assert none.returncode == 1 and "needs the operator key" in none.stderr, none.stderr
        for body, param in (({}, "stages"), ({"stages": 2, "pipelines": 1}, "pipelines")):
            refused = cluster.post("/strait/scale", body, headers=cluster.as_operator())
            assert refused.status_code == 400 and refused.json()["error"]["param"] == param, refused.text
        assert cluster.post("/strait/scale", {"stages": 1}).status_code == 403
    nobody = strait("scale", "--stages", 2, "--coordinator", f"127.0.0.1:{free_port()}", "--timeout", 20)
    assert nobody.returncode == 1
    assert "No server at" in nobody.stderr
