#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures what tests/reports/cpu.md states, and writes it there.

  report.py [--bin build/release/bin] [--only NAME …] [--write]

Every figure comes with the limit measured in the same run. --write replaces the tables between the `measured`
marks of tests/reports/cpu.md and saves tests/reports/cpu.json. Close other programs first: it uses every core, and takes
about six minutes on two. Needs only the standard library and the release build with its tests.
"""
import argparse
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODELS = ROOT / "tests/bench/models"
MARKS = ("<!-- measured: tests/bench/report.py --write -->", "<!-- end of measured -->")


class Server:
    """`strait up` with random weights; it moves to free ports where its own are taken."""

    def __init__(self, programs, model, workers, threads, args=()):
        self.dir = tempfile.TemporaryDirectory(prefix="strait-report-")
        command = [str(programs / "strait"), "up", "--model", str(model), "--random-weights", "1", "--workers",
                   str(workers), "--threads", str(threads), "--log-dir", self.dir.name, *args]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout:
            match = re.match(r"ready: (\S+)", line)
            if match:
                self.url = match.group(1)
                return
        raise RuntimeError(f"{' '.join(command)} ended with {self.process.wait()}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        self.dir.cleanup()

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=60) as reply:
            return json.loads(reply.read())

    def complete(self, **body):
        request = urllib.request.Request(self.url + "/v1/completions", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=1200) as reply:
            return json.loads(reply.read())

    def bench(self, programs, **options):
        out = pathlib.Path(self.dir.name) / "bench.json"
        command = [str(programs / "strait"), "bench", "--url", self.url, "--json", str(out)]
        for name, value in options.items():
            command += ["--" + name.replace("_", "-"), str(value)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return json.loads(out.read_text())


def limits(programs):
    """Read bandwidth and fused multiply-add rate, by number of threads."""
    program = programs.parent / "bin/kernels_bench"
    text = subprocess.run([str(program), "--benchmark_filter=^$"], capture_output=True, text=True).stdout
    found = re.findall(r"limits, (\d+) threads, (\w+): read ([\d.]+) GB/s, fma ([\d.]+) GFLOP/s", text)
    return {int(n): {"simd": simd, "read_gb_s": float(read), "fma_gflop_s": float(fma)} for n, simd, read, fma in found}


def status_bytes(server):
    status = server.get("/strait/status")
    stages = [s for w in status["workers"] for s in w["stages"]]
    return status, stages


def first(result):
    """The figures of the only concurrency that was run."""
    return result["runs"][0]


def decode(programs):
    """Batch-1 decoding: bytes of weights read a token, against the read bandwidth of the same run."""
    rows = []
    for threads in (1, 2):
        with Server(programs, MODELS / "dense-1g", workers=1, threads=threads) as server:
            result = first(server.bench(programs, concurrency=1, prompt_tokens=32, output_tokens=48, requests=4))
            _, stages = status_bytes(server)
            weights = sum(s["weight_bytes"] for s in stages)
        config = json.loads((MODELS / "dense-1g/config.json").read_text())
        embedding = config["vocab_size"] * config["hidden_size"] * 2  # one row of it is read
        read = limits(programs)[threads]["read_gb_s"]
        seconds = result["tpot_ms"]["p50"] / 1e3
        rate = (weights - embedding) / seconds / 1e9
        rows.append({"threads": threads, "weight_bytes": weights, "ms_per_token": seconds * 1e3, "gb_per_s": rate,
                     "read_limit_gb_s": read, "share": rate / read})
    return rows


def added(programs):
    """Time a token that coordinator and transport add: two stages, a model that costs next to nothing."""
    program = programs.parent / "tests/token_latency"
    rows = []
    for stages in (1, 2):
        out = subprocess.run([str(program), str(stages), "3000"], capture_output=True, text=True, check=True).stdout
        rows.append(json.loads(out))
    return rows


def memory(programs):
    """Resident memory of a worker against the bytes of its layers and of its cache in use."""
    rows = []
    with Server(programs, MODELS / "dense-1g", workers=2, threads=1, args=["--memory", "2GiB"]) as server:
        def sample(what):
            time.sleep(2.5)  # two heartbeats: the figure is the worker's own
            status, _ = status_bytes(server)
            for worker in status["workers"]:
                stage = worker["stages"][0]
                block = stage["block_bytes"]
                expected = stage["weight_bytes"] + used[0] * block * (stage["layer_end"] - stage["layer_begin"])
                rows.append({"worker": worker["name"], "when": what, "resident_bytes": worker["resident_bytes"],
                             "weight_bytes": stage["weight_bytes"], "expected_bytes": expected,
                             "ratio": worker["resident_bytes"] / expected})
        used = [0]
        sample("loaded")
        tokens = 4096
        server.complete(prompt=[i * 7919 % 30000 + 2 for i in range(tokens)], max_tokens=2, ignore_eos=True)
        used[0] = (tokens + 1 + 63) // 64  # block columns that were touched; pages stay resident
        sample(f"after {tokens} tokens")
    return rows


def pipelining(programs, prompt=8192):
    """One long prompt: one stage on one core against two stages with a core each."""
    rows = []
    for workers in (1, 2):
        with Server(programs, MODELS / "long-context", workers=workers, threads=1, args=["--prefill-chunk", "256"]) as server:
            ids = [i * 7919 % 4000 + 2 for i in range(prompt)]
            server.complete(prompt=ids[:512], max_tokens=1)
            times = []
            for run in range(3):
                start = time.monotonic()
                server.complete(prompt=ids, max_tokens=1, ignore_eos=True)
                times.append(time.monotonic() - start)
            rows.append({"stages": workers, "seconds": sorted(times)[1], "tokens_per_s": prompt / sorted(times)[1]})
    return {"prompt": prompt, "rows": rows, "speedup": rows[0]["seconds"] / rows[1]["seconds"]}


def throughput(programs):
    """Decoding by concurrency, two stages with a core each."""
    with Server(programs, MODELS / "long-context", workers=2, threads=1) as server:
        return server.bench(programs, concurrency="1,4,16", prompt_tokens=128, output_tokens=64)["runs"]


MEASURES = {"decode": decode, "added": added, "memory": memory, "pipelining": pipelining, "throughput": throughput}


def cpu_name():
    for line in open("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def tables(m):
    limit = m["limits"]
    out = [f"Machine: {m['cpu']}, {m['cores']} cores ({limit['2']['simd']}); read bandwidth {limit['1']['read_gb_s']:.1f} "
           f"GB/s with one thread, {limit['2']['read_gb_s']:.1f} with two; {limit['2']['fma_gflop_s']:.0f} GFLOP/s fp32.", ""]
    gb = m["decode"][0]["weight_bytes"] / 1e9
    out += [f"| batch-1 decode, {gb:.2f} GB of bf16 weights | ms a token | GB/s | read bandwidth right after | share |",
            "|---|---|---|---|---|"]
    out += [f"| {r['threads']} thread{'s' * (r['threads'] > 1)} | {r['ms_per_token']:.1f} | {r['gb_per_s']:.1f} | "
            f"{r['read_limit_gb_s']:.1f} | {r['share']:.0%} (goal 80 %) |" for r in m["decode"]]
    out += ["", "| added by coordinator and transport, a token | p50 | p99 |", "|---|---|---|"]
    out += [f"| {r['stages']} stage{'s' * (r['stages'] > 1)} on loopback | {r['p50_us']} µs | {r['p99_us']} µs"
            f"{' (goal: under 500 µs)' if r['stages'] == 2 else ''} |" for r in m["added"]]
    out += ["", "| a worker's resident memory | resident | weights + touched cache | ratio |", "|---|---|---|---|"]
    out += [f"| {r['worker']}, {r['when']} | {r['resident_bytes'] / 1e6:.0f} MB | {r['expected_bytes'] / 1e6:.0f} MB | "
            f"{r['ratio']:.2f} (goal 1.10) |" for r in m["memory"]]
    p = m["pipelining"]
    out += ["", f"| one prompt of {p['prompt']:,} tokens, one core a stage | seconds | tokens/s |", "|---|---|---|"]
    out += [f"| {r['stages']} stage{'s' * (r['stages'] > 1)} | {r['seconds']:.2f} | {r['tokens_per_s']:.0f} |" for r in p["rows"]]
    out += [f"| speed-up | {p['speedup']:.2f}× (goal 1.7×) | |"]
    out += ["", "| serving, 2 stages, 128 in / 64 out | output tokens/s | first token p50 / p99 | per token p50 / p99 |",
            "|---|---|---|---|"]
    out += [f"| {r['concurrency']} client{'s' * (r['concurrency'] > 1)} | {r['output_tokens_per_s']:.0f} | "
            f"{r['ttft_ms']['p50']:.0f} / {r['ttft_ms']['p99']:.0f} ms | {r['tpot_ms']['p50']:.1f} / {r['tpot_ms']['p99']:.1f} ms |"
            for r in m["throughput"]]
    return "\n".join(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bin", type=pathlib.Path, default=ROOT / "build/release/bin")
    parser.add_argument("--only", nargs="*", choices=MEASURES, help="measure these and print them as JSON")
    parser.add_argument("--write", action="store_true", help="write the tables of tests/reports/cpu.md and tests/reports/cpu.json")
    args = parser.parse_args()
    os.environ.pop("http_proxy", None)
    programs = args.bin.resolve()
    measured = {"cpu": cpu_name(), "cores": os.cpu_count(),
                "limits": {str(k): v for k, v in limits(programs).items()}}
    for name in args.only or MEASURES:
        print(f"measuring {name}: {MEASURES[name].__doc__}", file=sys.stderr)
        measured[name] = MEASURES[name](programs)
        print(json.dumps(measured[name]), file=sys.stderr)
    if args.only:
        print(json.dumps(measured, indent=1))
        return
    text = tables(measured)
    print(text)
    if args.write:
        (ROOT / "tests/reports/cpu.json").write_text(json.dumps(measured, indent=1) + "\n")
        page = ROOT / "tests/reports/cpu.md"
        before, rest = page.read_text().split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        page.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
