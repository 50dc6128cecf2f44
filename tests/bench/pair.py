#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Two builds side by side: what a change costs, in ratios of one run.

  pair.py --a build/old/bin --b build/release/bin [--model DIR] [--pairs 20] [--workers 1] [--threads 1]
          [--prompt 256] [--output 32] [--arg=--backend --arg=cuda …]

Starts a server of each build, both stay up, and asks them in turn, A B, B A, …: one request for a prompt alone, one that
also decodes. Prints the median of each, and of the ratios b/a pair by pair with their quartiles. Random weights.
"""
import argparse
import os
import pathlib
import statistics
import time

from report import MODELS, Server


def ask(server, prompt, tokens):
    begin = time.perf_counter()
    reply = server.complete(prompt=prompt, max_tokens=tokens, temperature=0, ignore_eos=True, return_token_ids=True)
    return time.perf_counter() - begin, reply["choices"][0]["token_ids"]


def measure(server, pair, prompt_tokens, output_tokens):
    """Seconds of a prompt of its own, and of a decoded token; the tokens."""
    # Another prompt in every pair, the same for both; the smallest bundled vocabulary has 640 ids.
    prompt = [(pair * 7919 + i * 31) % 600 + 10 for i in range(prompt_tokens)]
    prefill, _ = ask(server, prompt, 1)
    whole, ids = ask(server, prompt, output_tokens + 1)
    return prefill, (whole - prefill) / output_tokens, ids


def quartiles(values):
    if len(values) < 2:
        return values[0], values[0]
    cuts = statistics.quantiles(values, n=4)
    return cuts[0], cuts[2]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--a", type=pathlib.Path, required=True, help="folder of the programs to compare with")
    parser.add_argument("--b", type=pathlib.Path, required=True, help="folder of the programs that are judged")
    parser.add_argument("--model", type=pathlib.Path, default=MODELS / "dense-1g")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--output", type=int, default=32, help="tokens")
    parser.add_argument("--arg", action="append", default=[], help="one more argument of strait up; repeat it")
    o = parser.parse_args()
    os.environ["STRAIT_PREFIX_CACHE"] = "off"  # the second request of a pair has the first one's prompt
    with Server(o.a, o.model, o.workers, o.threads, o.arg) as a, Server(o.b, o.model, o.workers, o.threads, o.arg) as b:
        for server in (a, b):
            measure(server, 0, o.prompt, o.output)
        times = {"a": [], "b": []}
        for pair in range(1, o.pairs + 1):
            ids = {}
            for name, server in [("a", a), ("b", b)][:: 1 if pair % 2 else -1]:
                prefill, decode, ids[name] = measure(server, pair, o.prompt, o.output)
                times[name].append((prefill, decode))
            assert ids["a"] == ids["b"], f"the builds give other tokens in pair {pair}"
    print(f"{o.pairs} pairs, {o.model.name}, {o.workers} worker(s) with {o.threads} thread(s); the same tokens")
    for index, what in enumerate([f"prompt of {o.prompt} tokens", "decode, a token"]):
        a_times = [t[index] for t in times["a"]]
        b_times = [t[index] for t in times["b"]]
        ratios = [y / x for x, y in zip(a_times, b_times)]
        low, high = quartiles(ratios)
        print(f"{what}: a {statistics.median(a_times) * 1e3:.2f} ms, b {statistics.median(b_times) * 1e3:.2f} ms, "
              f"b/a {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
