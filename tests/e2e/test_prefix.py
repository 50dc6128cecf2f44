# SPDX-License-Identifier: Apache-2.0
"""Sequences that begin with the same tokens share their cache rows: what is computed, what is reported, what is held; and the
same bits as without, alone, batched, chunked, on one to three stages, and after a worker was killed.
"""
import concurrent.futures
import os
import signal

import pytest
from harness import BACKEND, TINY, Cluster, wait_until

BLOCK = 64
LENGTH = 6_000
MEMORY = "1GiB" if BACKEND == "cpu" else "3GiB"
FIXED = [] if BACKEND == "cpu" else ["--deterministic"]


def tokens(count, seed=0, begin=0):
    return [(i * 7 + i // 11 + 3 + 31 * seed) % 500 for i in range(begin, count)]


def diverging(at):
    """As tokens(LENGTH) up to there, then other ones."""
    return tokens(at) + [(t + 1 + i % 3) % 500 for i, t in enumerate(tokens(LENGTH, begin=at))]


BASE = tokens(LENGTH)
SHARED = {0: 0, 3_000: 2_944, 5_999: 5_952}  # whole blocks before the point where prompts part


def ask(cluster, prompt, max_tokens=12, **more):
    answer = cluster.complete(prompt=prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True, logprobs=1,
                              return_token_ids=True, **more)
    choice = answer["choices"][0]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"], answer["usage"]


def cached(usage):
    return usage["prompt_tokens_details"]["cached_tokens"]


def bits(answer):
    return answer[:2]


def wait_prefix_blocks(cluster, blocks):
    """Status is published now and then; returns it. No sequence has any of them then."""
    def there():
        status = cluster.status()
        pipeline = status["pipelines"][0]
        return status if pipeline["prefix_blocks"] == pipeline["prefix_blocks_free"] == blocks else None
    return wait_until(there, timeout_s=10, what=f"{blocks} prefix blocks")


@pytest.fixture(scope="module")
def cold():
    """Of each prompt what a server says that shares nothing."""
    with Cluster(workers=1, memory=MEMORY, args=["--prefix-cache", "off"] + FIXED) as cluster:
        answers = {at: ask(cluster, diverging(at)) for at in SHARED} | {"base": ask(cluster, BASE)}
        assert all(cached(answer[2]) == 0 for answer in answers.values())
        assert cluster.status()["stats"]["cached_rows"] == 0
    return {at: bits(answer) for at, answer in answers.items()}


@pytest.mark.parametrize("workers,chunk", [(1, 256), (3, 37)])
def test_prompts_that_part(cold, workers, chunk):
    args = ["--prefill-chunk", str(chunk), "--max-step-tokens", str(2 * chunk)] + FIXED
    with Cluster(workers=workers, memory=MEMORY, args=args) as cluster:
        first = ask(cluster, BASE)
        assert cached(first[2]) == 0 and bits(first) == cold["base"]
        blocks = LENGTH // BLOCK
        wait_prefix_blocks(cluster, blocks)
        for at, shared in SHARED.items():
            answer = ask(cluster, diverging(at))
            assert cached(answer[2]) == shared, at
            assert bits(answer) == cold[at], at
            blocks += LENGTH // BLOCK - shared // BLOCK  # the cache grows by what is not shared
            wait_prefix_blocks(cluster, blocks)
        assert cached(ask(cluster, BASE, cache_salt="mine")[2]) == 0, "another salt shares nothing"
        assert cached(ask(cluster, BASE, cache_salt="mine")[2]) == LENGTH // BLOCK * BLOCK
        blocks += LENGTH // BLOCK
        status = wait_prefix_blocks(cluster, blocks)
        for worker in status["workers"]:
            for stage in worker["stages"]:
                held = blocks * (stage["layer_end"] - stage["layer_begin"]) * stage["block_bytes"]
                assert stage["cache_bytes_used"] == stage["cache_bytes_reserved"] == held
        # All at once, beside each other.
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda at: bits(ask(cluster, BASE if at == "base" else diverging(at))), list(cold) * 2))
        assert together == [cold[at] for at in list(cold) * 2]
        # A worker dies: the prefixes that nobody has are gone, and come again.
        pids = cluster.worker_pids()
        os.kill(sorted(pids.values())[-1], signal.SIGKILL)
        wait_until(lambda: set(cluster.worker_pids().values()) != set(pids.values()), what="another worker")
        again = ask(cluster, diverging(3_000))
        assert cached(again[2]) == 0 and bits(again) == cold[3_000]
        again = ask(cluster, BASE)
        assert cached(again[2]) == 2_944 and bits(again) == cold["base"]


def test_a_worker_dies_under_sharers(cold):
    """Sequences that share rows decode; a stage is lost: they go on with the same bits."""
    with Cluster(workers=2, memory=MEMORY, args=FIXED) as cluster:
        ask(cluster, BASE, max_tokens=1)
        prompts = [BASE, diverging(3_000), diverging(5_999)]
        whole = [ask(cluster, prompt, max_tokens=160) for prompt in prompts]
        victim = sorted(cluster.worker_pids().values())[0]
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            answers = [pool.submit(ask, cluster, prompt, 160) for prompt in prompts]
            wait_until(lambda: [s["generated_tokens"] > 20 for s in cluster.status()["sequences"]] == [True] * 3,
                       what="three streams under way")
            os.kill(victim, signal.SIGKILL)
            answers = [answer.result() for answer in answers]
        assert [bits(answer) for answer in answers] == [bits(answer) for answer in whole]
        stats = cluster.status()["stats"]
        assert stats["recoveries"] == 1 and stats["prefix_blocks_survived"] > 0
        print({name: stats[name] for name in ("prefix_blocks_survived", "prefix_blocks_mended", "replayed_tokens")})
        assert ask(cluster, BASE)[:2] == cold["base"]

def test_a_prompt_cancelled_halfway(cold):
    """What was computed of it is whole blocks, and serves the next one."""
    args = ["--prefill-chunk", "64", "--max-step-tokens", "64"] + FIXED
    with Cluster(workers=2, memory=MEMORY, args=args) as cluster:
        with cluster.client() as client:
            body = dict(prompt=BASE, max_tokens=5, stream=True)
            with client.stream("POST", "/v1/completions", json=body):
                wait_until(lambda: any(1_000 < s["rows"] for s in cluster.status()["sequences"]), what="half a prompt")
        wait_until(lambda: not cluster.status()["sequences"], what="the cancelled request's end")
        answer = ask(cluster, BASE)
        assert 512 < cached(answer[2]) < LENGTH - BLOCK, "it was cancelled too late"  # rows are planned ahead
        assert bits(answer) == cold["base"]


def test_siblings_wait_for_the_one_that_computes():
    prompt = tokens(1_500, seed=5)
    with Cluster(workers=2, memory=MEMORY, args=FIXED) as cluster:
        alone = cluster.complete(prompt=prompt, n=6, seed=3, max_tokens=5, cache_salt="cold", return_token_ids=True)
        before = cluster.status()["stats"]
        answer = cluster.complete(prompt=prompt, n=6, seed=3, max_tokens=5, return_token_ids=True)
        assert [c["token_ids"] for c in answer["choices"]] == [c["token_ids"] for c in alone["choices"]]
        stats = cluster.status()["stats"]
        shared = 1_500 // BLOCK * BLOCK
        assert stats["cached_rows"] - before["cached_rows"] == 5 * shared
        # What was computed: the prompt once, of each sibling what lies behind the last whole block.
        assert stats["prompt_tokens"] - before["prompt_tokens"] == 1_500 + 5 * (1_500 - shared)
        assert cached(answer["usage"]) == 0, "the prompt is counted once, and was computed once"


def test_turns_of_a_conversation(cold):
    """Each prompt is the one before it, the answer to it, and a question more."""
    with Cluster(workers=2, memory=MEMORY, args=FIXED) as cluster:
        prompt = tokens(300, seed=9)
        for turn in range(4):
            ids, _, usage = ask(cluster, prompt, max_tokens=100)
            # All rows but that of the last token, which was never fed, were there; whole blocks count.
            assert cached(usage) == (0 if turn == 0 else (len(prompt) - 41) // BLOCK * BLOCK), turn
            prompt = prompt + ids + tokens(40, seed=20 + turn)


def test_scores_are_computed(cold):
    """Positions whose log-probabilities are asked for are computed, whatever is cached."""
    with Cluster(workers=1, memory=MEMORY, args=FIXED) as cluster:
        prompt = tokens(400, seed=2)
        body = dict(prompt=prompt, max_tokens=1, temperature=0, echo=True, logprobs=0)
        first, second = cluster.complete(**body), cluster.complete(**body)
        assert cached(second["usage"]) == 0
        assert first["choices"][0]["logprobs"] == second["choices"][0]["logprobs"]
        assert cached(cluster.complete(prompt=prompt, max_tokens=1)["usage"]) == 384


def test_keys_and_salts():
    with Cluster(workers=1, memory=MEMORY, args=["--api-key", "one", "--api-key", "two"] + FIXED) as cluster:
        prompt = tokens(200, seed=4)

        def shared(key, **more):
            reply = cluster.post("/v1/completions", dict(prompt=prompt, max_tokens=1, **more),
                                 headers={"Authorization": f"Bearer {key}"})
            assert reply.status_code == 200, reply.text
            return cached(reply.json()["usage"])

        assert [shared("one"), shared("one"), shared("two"), shared("two")] == [0, 192, 0, 192]
        assert [shared("one", cache_salt="both"), shared("two", cache_salt="both")] == [0, 192]
        assert shared("one", cache_salt="key one") == 0, "a salt is no key's"
        for salt in ("", "x" * 257, 5, ["a"], {}):
            reply = cluster.post("/v1/completions", dict(prompt=prompt, cache_salt=salt),
                                 headers={"Authorization": "Bearer one"})
            assert reply.status_code == 400 and reply.json()["error"]["param"] == "cache_salt", (salt, reply.text)
        assert shared("one") == 192
