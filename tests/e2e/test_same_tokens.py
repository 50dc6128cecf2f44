# SPDX-License-Identifier: Apache-2.0
"""The same tokens whatever happens underneath, to the last bit.

A sequence's log-probabilities (printed so that they read back to the same float32) and its sampled tokens are equal
alone, in a batch of 16 mixed ones, prefilled whole and in chunks of 1, 7 and 64, with 1 and 2 threads, with each
SIMD level, on 1, 2 and 3 stages, and after a worker died and its sequences were replayed. With
STRAIT_TEST_BACKEND=cuda the same holds of GPU workers with --deterministic, but for threads and SIMD levels, which are
the CPU's.
"""
import json
import os
import signal
import threading

import pytest
from harness import BACKEND, ROOT, Cluster, wait_until

GOLDEN = ROOT / "tests/golden"
SHAPES = ["v3-yarn", "v2-lite", "v3-fp8"]
LENGTHS = (1, 63, 64, 65, 130, 300)
WHOLE = ["--prefill-chunk", "1024", "--max-step-tokens", "1024"]
FIXED = [] if BACKEND == "cpu" else ["--deterministic"]
of_the_cpu = pytest.mark.skipif(BACKEND != "cpu", reason="threads and SIMD levels are the CPU backend's")


def prompts_of(shape):
    golden = json.loads((GOLDEN / shape / "golden.json").read_text())
    return [p["tokens"] for p in golden["prompts"] if len(p["tokens"]) in LENGTHS]


def cluster_of(shape, stages=1, threads=1, args=WHOLE, env=None):
    return Cluster(GOLDEN / shape, workers=stages, threads=threads, random_weights=None, memory="256MiB",
                   args=args + FIXED, env=env)


def sampled(prompt, seed=11, **more):
    return dict(prompt=prompt, max_tokens=12, temperature=0.9, top_p=0.95, seed=seed, presence_penalty=0.4, logprobs=3,
                echo=True, ignore_eos=True, return_token_ids=True, **more)


def outcome(choice):
    """All numbers of a choice."""
    return choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]


def run_alone(cluster, shape):
    return [outcome(cluster.complete(model=shape, **sampled(p))["choices"][0]) for p in prompts_of(shape)]


@pytest.fixture(scope="module")
def alone():
    """Each sequence alone: one stage, one thread, prompt whole, portable code."""
    expected = {}
    for shape in SHAPES:
        with cluster_of(shape, args=WHOLE + (["--simd", "portable"] if BACKEND == "cpu" else [])) as cluster:
            expected[shape] = run_alone(cluster, shape)
            ids = [w["numerics_id"] for w in cluster.status()["workers"]]
            assert all(i.startswith(BACKEND + "/") and i.endswith("/deterministic") == bool(FIXED) for i in ids), ids
    return expected


def check(expected, got, what):
    for prompt, (a, b) in enumerate(zip(expected, got)):
        assert a[0] == b[0], f"{what}: tokens of prompt {prompt} differ"
        assert a[1] == b[1], f"{what}: log-probabilities of prompt {prompt} differ"
        assert a[2] == b[2], f"{what}: alternatives of prompt {prompt} differ"


def levels():
    flags = open("/proc/cpuinfo").read()
    return {"portable": True, "avx2": "avx2" in flags and "fma" in flags, "avx512": "avx512bw" in flags}


@of_the_cpu
@pytest.mark.parametrize("level", ["avx2", "avx512"])
def test_simd_levels(alone, level):
    if not levels()[level]:
        pytest.skip(f"this processor has no {level}: its bits were not compared here")
    for shape in SHAPES:
        with cluster_of(shape, args=WHOLE + ["--simd", level]) as cluster:
            check(alone[shape], run_alone(cluster, shape), f"{shape}, {level}")


@of_the_cpu
@pytest.mark.parametrize("shape", SHAPES)
def test_two_threads(alone, shape):
    with cluster_of(shape, threads=2) as cluster:
        check(alone[shape], run_alone(cluster, shape), f"{shape}, two threads")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stages", [2, 3])
def test_stages(alone, shape, stages):
    with cluster_of(shape, stages=stages) as cluster:
        check(alone[shape], run_alone(cluster, shape), f"{shape}, {stages} stages")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks(alone, shape, chunk):
    with cluster_of(shape, stages=2, args=["--prefill-chunk", str(chunk), "--max-step-tokens", "512"]) as cluster:
        check(alone[shape], run_alone(cluster, shape), f"{shape}, chunks of {chunk}")


@pytest.mark.parametrize("shape", SHAPES)
def test_in_a_batch_of_16_mixed(alone, shape):
    prompts = prompts_of(shape)
    with cluster_of(shape, stages=2, args=["--prefill-chunk", "50", "--max-step-tokens", "128"]) as cluster:
        replies = [None] * 16

        def ask(i):
            # Every third is one of ours; the others differ in length, seed and sampling.
            prompt = prompts[i % len(prompts)]
            body = sampled(prompt) if i < len(prompts) else sampled(prompt[: 1 + i * 3], seed=i, n=2 if i % 2 else 1)
            replies[i] = cluster.complete(model=shape, **body)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert all(replies)
        check(alone[shape], [outcome(replies[i]["choices"][0]) for i in range(len(prompts))], f"{shape}, batch of 16")


@pytest.mark.parametrize("shape", SHAPES)
def test_preempted_for_want_of_blocks(shape):
    """Eight sequences that start with one block a layer and grow to three, in a pool of nine: some must give way."""
    longest = max(prompts_of(shape), key=len)
    prompts = [longest[i * 30 : i * 30 + 60] for i in range(8)]
    body = {**sampled(prompts), "max_tokens": 80}
    # The workspace is part of the memory: a first cluster tells how many columns, one block in every layer, some
    # memory leaves. A GPU worker counts a block's entry in the page table, too.
    memory = 96 << 20
    layers = json.loads((GOLDEN / shape / "config.json").read_text())["num_hidden_layers"]
    with Cluster(GOLDEN / shape, workers=1, random_weights=None, memory=str(memory), args=WHOLE + FIXED) as cluster:
        stage = cluster.status()["workers"][0]["stages"][0]
    columns = stage["cache_bytes_total"] // stage["block_bytes"] // layers
    column = stage["cache_bytes_total"] // columns + (0 if BACKEND == "cpu" else 4 * layers)
    memory -= (columns - 9) * column
    outcomes = []
    for memory in ("256MiB", str(memory)):
        with Cluster(GOLDEN / shape, workers=1, random_weights=None, memory=memory, args=WHOLE + FIXED) as cluster:
            choices = sorted(cluster.complete(model=shape, **body)["choices"], key=lambda c: c["index"])
            outcomes.append([outcome(c) for c in choices])
            status = cluster.status()
    assert status["workers"][0]["stages"][0]["cache_bytes_total"] == 9 * layers * stage["block_bytes"]
    preemptions = status["stats"]["preemptions"]
    check(outcomes[0], outcomes[1], f"{shape}, preempted")
    assert preemptions > 0, "the small pool was meant to preempt"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("victim", [0, 1])
def test_after_a_workers_death(alone, shape, victim):
    """A worker is killed between the first and the last token of a stream; the stream goes on with the same tokens."""
    prompt = max(prompts_of(shape), key=len)
    body = dict(sampled(prompt), max_tokens=200, echo=False)
    with cluster_of(shape, stages=2) as cluster:
        whole = cluster.complete(model=shape, **body)["choices"][0]
        before = cluster.status()["stats"]["recoveries"]
        ids, logprobs, killed = [], [], False
        for event in cluster.stream(model=shape, **body):
            for choice in event.get("choices", []):
                ids += choice.get("token_ids") or []
                logprobs += (choice.get("logprobs") or {}).get("token_logprobs") or []
            if not killed and len(ids) >= 5:
                os.kill(sorted(cluster.workers())[victim], signal.SIGKILL)
                killed = True
        assert killed and len(ids) == 200
        assert ids == whole["token_ids"]
        assert logprobs == whole["logprobs"]["token_logprobs"]
        wait_until(lambda: cluster.status()["stats"]["recoveries"] > before, what="a recovery in the status")
        assert run_alone(cluster, shape) == alone[shape]


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_granted_steps(alone, stages):
    """Steps planned before their tokens are known change no bit, also where a stop token or a cancellation falls
    inside a grant; what was computed in vain is given back."""
    shape = "v2-lite"
    prompt = max(prompts_of(shape), key=len)
    tokens = alone[shape][-1][0]
    stop = next(t for i, t in enumerate(tokens) if i >= 4 and t not in tokens[:i])
    for depth in (1, 2, 5):
        with cluster_of(shape, stages=stages, args=WHOLE + ["--grant-depth", str(depth)]) as cluster:
            what = f"{stages} stages, grants of depth {depth}"
            check(alone[shape], run_alone(cluster, shape), what)
            stopped = cluster.complete(model=shape, **sampled(prompts_of(shape)[-1], stop_token_ids=[stop]))["choices"][0]
            assert stopped["finish_reason"] == "stop", what
            assert stopped["token_ids"] in (tokens[: tokens.index(stop)], tokens[: tokens.index(stop) + 1]), what
            together = cluster.complete(model=shape, **dict(sampled(prompts_of(shape)[:-1]), logprobs=None, echo=False))
            choices = sorted(together["choices"], key=lambda c: c["index"])
            assert choices[0]["token_ids"] == alone[shape][0][0], what
            # A client that goes away in the middle.
            body = dict(sampled(prompt), max_tokens=600, echo=False, stream=True)
            with cluster.client() as client, client.stream("POST", "/v1/completions", json=dict(model=shape, **body)) as s:
                for count, _ in enumerate(s.iter_lines()):
                    if count == 7:
                        break
            wait_until(lambda: cluster.bytes_in_use() == 0, what="the cancelled stream's blocks")
            stats = cluster.status()["stats"]
            assert (stats["granted_tokens"] > 0) == (depth > 1), stats
            if depth == 1:
                assert stats["surplus_tokens"] <= 1, stats  # of the cancelled stream
            check(alone[shape], run_alone(cluster, shape), what + ", afterwards")
