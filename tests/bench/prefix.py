#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What shared prefixes save: the time to the first token of a prompt that is cached against one that is not, and a workload
of conversations with the prefix cache on and off.

  prefix.py --bin build/release/bin [--model DIR] [--lengths 1024,8192,16000] [--repeats 5] [--workers 1] [--threads 1]
            [--conversations 32] [--turns 8] [--park 8192,131072] [--arg=--backend --arg=cuda …] [--json FILE]

A prompt that is cached has all of its whole blocks of 64 tokens there but for the one with its last token. The two servers
of the conversations stay up and take turns, off on, on off; every conversation begins with one of four system prompts of
512 tokens, each turn has a question of 64 tokens and an answer of 64. With --park a server that has host memory is asked for a
prompt, then for others until the first one's blocks are in host memory, then for the first again: they come back. Random
weights.
"""
import argparse
import concurrent.futures
import json
import pathlib
import random
import statistics
import time

from report import MODELS, Server

SYSTEM_PROMPTS, SYSTEM_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 4, 512, 64, 64


def tokens(seed, count):
    # The smallest bundled vocabulary has 640 ids.
    return random.Random(seed).choices(range(10, 610), k=count)


def first_token(server, prompt):
    begin = time.perf_counter()
    reply = server.complete(prompt=prompt, max_tokens=1, temperature=0, ignore_eos=True)
    return time.perf_counter() - begin, reply["usage"]["prompt_tokens_details"]["cached_tokens"]


def first_tokens(server, lengths, repeats):
    rows = []
    for length in lengths:
        misses, hits = [], []
        for repeat in range(repeats):
            prompt = tokens(f"{length} {repeat}", length)
            miss, none = first_token(server, prompt)
            hit, cached = first_token(server, prompt)
            assert none == 0 and cached == (length - 1) // 64 * 64, (none, cached)
            misses.append(miss)
            hits.append(hit)
        rows.append({"tokens": length, "miss_ms": statistics.median(misses) * 1e3, "hit_ms": statistics.median(hits) * 1e3,
                     "ratio": statistics.median(h / m for h, m in zip(hits, misses))})
        print(f"{length} tokens: miss {rows[-1]['miss_ms']:.1f} ms, hit {rows[-1]['hit_ms']:.1f} ms, ratio {rows[-1]['ratio']:.3f}",
              flush=True)
    return rows


def parked(server, lengths, repeats):
    """Of each length: computed the first time, back from host memory the second."""
    rows = []
    free = server.get("/strait/status")["pipelines"][0]["tokens_max"]
    longest = min(max(lengths), free // 2)
    for length in lengths:
        misses, returns = [], []
        for repeat in range(repeats):
            prompt = tokens(f"park {length} {repeat}", length)
            misses.append(first_token(server, prompt)[0])
            others = 0
            while others < free:  # blocks used longest ago make room first
                first_token(server, tokens(f"other {length} {repeat} {others}", longest))
                others += longest
            before = server.get("/strait/status")["stats"]["prefix_blocks_returned"]
            seconds, cached = first_token(server, prompt)
            assert cached == (length - 1) // 64 * 64, f"{cached} of {length} tokens were there"
            time.sleep(1.5)  # status is published now and then
            returned = server.get("/strait/status")["stats"]["prefix_blocks_returned"] - before
            # Those that were used last before it may not have made room.
            assert returned * 10 >= cached // 64 * 9, f"{returned} of {cached // 64} blocks came back from host memory"
            returns.append(seconds)
        rows.append({"tokens": length, "computed_ms": statistics.median(misses) * 1e3,
                     "returned_ms": statistics.median(returns) * 1e3,
                     "ratio": statistics.median(r / m for r, m in zip(returns, misses))})
        print(f"{length} tokens: computed in {rows[-1]['computed_ms']:.1f} ms, back from host memory in "
              f"{rows[-1]['returned_ms']:.1f} ms, ratio {rows[-1]['ratio']:.3f}", flush=True)
    return rows


def converse(server, run, number, turns):
    prompt = tokens(f"system {run} {number % SYSTEM_PROMPTS}", SYSTEM_TOKENS)
    asked = cached = 0
    answers = []
    for turn in range(turns):
        prompt += tokens(f"question {run} {number} {turn}", QUESTION_TOKENS)
        reply = server.complete(prompt=prompt, max_tokens=ANSWER_TOKENS, temperature=0, ignore_eos=True, return_token_ids=True)
        usage = reply["usage"]
        asked += usage["prompt_tokens"]
        cached += usage["prompt_tokens_details"]["cached_tokens"]
        answers.append(reply["choices"][0]["token_ids"])
        prompt += answers[-1]
    return asked, cached, answers


def conversations(server, run, count, turns):
    begin = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        results = list(pool.map(lambda number: converse(server, run, number, turns), range(count)))
    seconds = time.perf_counter() - begin
    return seconds, sum(r[0] for r in results), sum(r[1] for r in results), [r[2] for r in results]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, required=True, help="folder of the programs")
    parser.add_argument("--model", type=pathlib.Path, default=MODELS / "long-context")
    parser.add_argument("--lengths", default="1024,8192,16000", help="of prompts, in tokens; empty: none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--park", default="", help="lengths of prompts that go to host memory and come back; empty: none")
    parser.add_argument("--host-cache-bytes", default="64GiB", help="for --park")
    parser.add_argument("--conversations", type=int, default=32, help="0: none")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3, help="of the conversations, on each server")
    parser.add_argument("--arg", action="append", default=[], help="one more argument of strait up; repeat it")
    parser.add_argument("--same-tokens", action="store_true", help="on and off must give the same answers")
    parser.add_argument("--json", type=pathlib.Path)
    o = parser.parse_args()
    results = {"model": o.model.name, "workers": o.workers, "threads": o.threads}

    def server(cache):
        return Server(o.bin, o.model, o.workers, o.threads, ["--prefix-cache", cache, *o.arg])

    if o.lengths:
        with server("on") as on:
            first_token(on, tokens("warm", 256))
            results["first_token"] = first_tokens(on, [int(n) for n in o.lengths.split(",")], o.repeats)
    if o.park:
        more = ["--prefix-cache", "on", "--host-cache-bytes", o.host_cache_bytes, "--preempt", "park", *o.arg]
        with Server(o.bin, o.model, o.workers, o.threads, more) as host:
            first_token(host, tokens("warm", 256))
            results["parked"] = parked(host, [int(n) for n in o.park.split(",")], o.repeats)
    if o.conversations > 0:
        with server("off") as off, server("on") as on:
            runs = []
            for run in range(o.runs):
                order = [("off", off), ("on", on)][:: 1 if run % 2 == 0 else -1]
                measured = {name: conversations(each, run, o.conversations, o.turns) for name, each in order}
                if o.same_tokens:
                    assert measured["on"][3] == measured["off"][3], "shared rows give other tokens"
                runs.append({"off_s": measured["off"][0], "on_s": measured["on"][0],
                             "hit_rate": measured["on"][2] / measured["on"][1]})
            generated = o.conversations * o.turns * ANSWER_TOKENS
            results["conversations"] = runs
            ratio = statistics.median(r["off_s"] / r["on_s"] for r in runs)
            off_s, on_s = (statistics.median(r[k] for r in runs) for k in ("off_s", "on_s"))
            print(f"{o.conversations} conversations of {o.turns} turns: {generated / off_s:.1f} tokens/s without, "
                  f"{generated / on_s:.1f} with the prefix cache, {ratio:.2f} times; "
                  f"{statistics.median(r['hit_rate'] for r in runs):.1%} of prompt tokens cached")
    if o.json:
        o.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
