# SPDX-License-Identifier: Apache-2.0
"""A pipeline gets other stages while a client reads: the same tokens and log-probabilities, to the last bit, as without.

One worker makes two and three stages of its one, which share its memory and its weights; other workers take some and
give them up again, and get the rows of their layers before they do. No row is computed again. Refusals name the reason and the flag. Runs on GPU workers with STRAIT_TEST_BACKEND=cuda.
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


@pytest.mark.parametrize("workers,changes", [(1, (2, 3, 1, 2)), (2, (1, 2, 3, 1, 2))])
def test_the_same_tokens_while_stages_change(workers, changes):
    with cluster_of(workers) as cluster:
        whole = cluster.complete(**body())["choices"][0]
        before = cluster.status()["workers"][0]
        ids, logprobs, done = streamed_while(cluster, *[lambda n=n: scale(cluster, n) for n in changes])
        for one in done:
            assert one.returncode == 0, one.stderr
            assert re.match(r"1 pipeline with \d stages?; longest pause [\d.]+ ms; rows kept", one.stdout), one.stdout
        assert ids == whole["token_ids"]
        assert logprobs == whole["logprobs"]["token_logprobs"]
        assert cluster.status()["stats"]["recoveries"] == 0
        assert cluster.status()["stats"]["recomputed_rows"] == 0
        moved = [re.search(r"computed again 0, moved ([\d.]+ \w+); 1 sequence stood still for [\d.]+ to [\d.]+ ms", one.stdout).group(1)
                 for one in done]
        residents = cluster.status()["last_scale"]["residents"]
        assert residents["count"] == 1 and residents["longest"][0]["pause_us"] == residents["pause_max_us"] > 0, residents
        assert [one != "0 B" for one in moved] == ([False] * 4 if workers == 1 else [True, True, False, True, True]), moved
        assert sum(len(one) for one in layers(cluster)) == 2
        assert {w["id"] for w in cluster.status()["workers"]} >= {before["id"]}
        for worker in cluster.status()["workers"]:
            assert worker["booked_bytes"] <= worker["memory_bytes"]


def test_one_long_sequence_beside_others_from_one_stage_to_two_to_four_to_two():
    """Each on a worker of its own: most rows change their worker, none is computed again, and there is more room."""
    tiny = ROOT / "deploy/models/tiny-random"
    with Cluster(tiny, workers=4, pipelines=1, random_weights=1, memory="16MiB" if BACKEND == "cpu" else "1GiB", args=FIXED) as cluster:
        assert scale(cluster, 1).returncode == 0
        long = dict(prompt=[10 + i * 7 % 600 for i in range(3000)], max_tokens=500, temperature=0.9, seed=5, logprobs=1, ignore_eos=True,
                    return_token_ids=True)
        # Two that begin alike, and a prompt that is under way while stages change.
        others = [dict(long, prompt=long["prompt"][:500] + [11 + i] * 40, seed=i, max_tokens=400) for i in range(2)]
        whole = [cluster.complete(**one)["choices"][0] for one in (long, *others)]
        parts, room = [None] * 3, []

        def stream(i, one):
            ids, logprobs = [], []
            parts[i] = (ids, logprobs)
            for event in cluster.stream(**one):
                for choice in event.get("choices", []):
                    ids += choice.get("token_ids") or []
                    logprobs += (choice.get("logprobs") or {}).get("token_logprobs") or []

        threads = [threading.Thread(target=stream, args=(i, one)) for i, one in enumerate((long, *others))]
        for thread in threads:
            thread.start()
        wait_until(lambda: parts[0] and len(parts[0][0]) >= 10, what="tokens")
        for stages in (2, 4, 2):
            before = cluster.status()["pipelines"][0]["tokens_max"]
            one = scale(cluster, stages)
            assert one.returncode == 0, one.stderr
            assert re.search(r"computed again 0, moved [1-9]", one.stdout), one.stdout
            assert threads[0].is_alive(), "it ended before the stages had changed: it must be longer"
            wait_until(lambda: cluster.status()["pipelines"][0]["tokens_max"] != before, what="another room")
            room.append(cluster.status()["pipelines"][0]["tokens_max"])
        for thread in threads:
            thread.join()
        assert room[1] > room[0] > 0 and room[2] == room[0], room
        assert cluster.status()["stats"]["recomputed_rows"] == 0
        for got, expected in zip(parts, whole):
            assert got[0] == expected["token_ids"]
            assert got[1] == expected["logprobs"]["token_logprobs"]


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
        planned = strait("scale", "--stages", 2, "--dry-run", "--coordinator", cluster.base_url)
        assert planned.returncode == 0 and "pipeline 1 could get 2 stages" in planned.stdout, planned
        assert len(layers(cluster)[0]) == 1
        dry = strait("scale", "--stages", 200, "--dry-run", "--coordinator", cluster.base_url)
        assert dry.returncode == 1 and "a stage has a layer at least" in dry.stderr
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
