#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes tests/reports/gpu.md from what tests/gpu.sh measured.

  python3 tests/bench/gpu_page.py FOLDER     # its --out: gpu.json, mla.json; both are kept beside the page
"""
import json
import math
import pathlib
import shutil
import sys

V3_LAYERS = 61
REPORTS = pathlib.Path(__file__).resolve().parents[1] / "reports"


def table(head, rows):
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)] + ["| " + " | ".join(map(str, r)) + " |" for r in rows]


def name(r):
    return pathlib.Path(r["config"]).name


def projection(decode):
    """What the steps of V3 layers measured say of the whole model, a GPU a stage."""
    rows = []
    for r in decode:
        layer_ms = r["us"] / 1000 / r["layers"]
        gpus = math.ceil(V3_LAYERS / r["layers"])
        rows.append([r["batch"], f"{r['context']:,}", r["layers"], f"{layer_ms:.3f}", gpus,
                     f"{V3_LAYERS * layer_ms:.1f}", f"{1000 * r['batch'] / (V3_LAYERS * layer_ms):.0f}",
                     f"{1e6 * r['batch'] / r['us']:.0f}"])
    if not rows:
        return []
    return ["", "## DeepSeek-V3 from its layers", "",
            f"A layer takes the step's time over the layers measured, as many as fit beside the cache of the case; {V3_LAYERS} "
            f"layers take {V3_LAYERS} times that (the three dense ones less, the head more) on ceil({V3_LAYERS} / layers) GPUs, one "
            "stage each, without the time of hops. One batch on its way: batch / (61 x layer time) tokens/s. A batch on every "
            "stage: batch / step time, with as many sequences as batch x GPUs.", ""] + table(
                ["batch", "context", "layers", "ms a layer", "GPUs", "ms a token", "tokens/s, one batch", "tokens/s, full"], rows)


def price(decode, prefill):
    """Equal cases with and without --deterministic, side by side."""
    rows = []
    for r in decode + prefill:
        if not r.get("deterministic"):
            continue
        key = [k for k in ("config", "layers", "batch", "context", "tokens") if k in r]
        plain = [p for p in decode + prefill if not p.get("deterministic") and p["bench"] == r["bench"] and
                 all(p[k] == r[k] for k in key)]
        if not plain:
            continue
        what = f"prefill of {r['tokens']:,}" if r["bench"] == "prefill" else f"decode {r['batch']} × {r['context']:,}"
        rows.append([f"{name(r)}, {r['layers']} layers", what, f"{plain[-1]['us'] / 1000:.2f}", f"{r['us'] / 1000:.2f}",
                     f"{r['us'] / plain[-1]['us']:.2f}"])
    if not rows:
        return []
    return ["", "## What --deterministic costs", ""] + table(["model", "step", "ms without", "ms with", "times"], rows)


def memory(measured):
    if not measured:
        return []
    gib = lambda r, k: f"{r[k] / 2**30:.2f}"
    return ["", "## A stage's memory", "",
            "As the stage states it before it loads, and what the GPU then missed, all steps behind it.", ""] + table(
                ["model", "weights, GiB", "cache", "workspace", "stated", "taken", "taken of stated"],
                [[f"{name(r)}, {r['layers']} layers" + (", deterministic" if r["deterministic"] else ""), gib(r, "weights"),
                  gib(r, "cache"), gib(r, "workspace"), gib(r, "stated"), gib(r, "taken"),
                  f"{100 * r['taken'] / r['stated']:.1f} %"] for r in measured])


def serving(path):
    """What strait bench measured of a whole cluster."""
    if not path.exists():
        return []
    data = json.loads(path.read_text())
    rows = [[r["concurrency"], f"{r['prompt_tokens_per_s']:.0f}", f"{r['output_tokens_per_s']:.0f}", f"{r['ttft_ms']['p50']:.0f}",
             f"{r['tpot_ms']['p50']:.2f}", f"{r['tpot_ms']['p99']:.2f}", r["failed"]] for r in data["runs"]]
    return ["", "## Serving", "",
            f"`strait bench`, a worker on one GPU, {data['model']} shape with random weights, prompts of {data['prompt_tokens']:,} "
            f"tokens, {data['output_tokens']} generated.", ""] + table(
                ["clients", "prompt tokens/s", "output tokens/s", "first token p50, ms", "a token p50, ms", "p99", "failed"], rows)


def main():
    folder = pathlib.Path(sys.argv[1])
    if folder.resolve() != REPORTS:
        shutil.copy(folder / "gpu.json", REPORTS / "gpu.json")
        shutil.copy(folder / "mla.json", REPORTS / "gpu_mla.jsonl")
        if (folder / "serve.json").exists():
            shutil.copy(folder / "serve.json", REPORTS / "gpu_serve.json")
    data = json.loads((REPORTS / "gpu.json").read_text())
    attention = [json.loads(line) for line in (REPORTS / "gpu_mla.jsonl").read_text().splitlines()]
    by = lambda name: [r for r in data["results"] if r["bench"] == name]
    read = by("limits")[0]["read_gb_s"]
    out = ["# Measured on a GPU", "",
           f"By `tests/gpu.sh`, written by `tests/bench/gpu_page.py`, one run. {data['gpu']}; read-only streaming "
           f"{read / 1000:.2f} TB/s by the program of the same run. Medians of graph replays over more than twice the L2.", "",
           "## A stage's step", "",
           "The floor is the time to read the weights that the step touches and the cache rows once, at that rate. Random "
           "weights and tokens.", ""]
    rows = []
    plain = [r for r in by("decode") if not r.get("deterministic")]
    for r in plain:
        rows.append([f"{name(r)}, {r['layers']} layers", r["batch"], r["context"],
                     f"{r['us'] / 1000:.2f}", f"{r['floor_us'] / 1000:.2f}", f"{100 * r['floor_us'] / r['us']:.0f} %",
                     f"{1e6 * r['batch'] / r['us']:.0f}"])
    out += table(["model", "batch", "context", "ms", "floor, ms", "share of floor", "tokens/s"], rows)
    for r in by("prefill"):
        if r.get("deterministic"):
            continue
        out += ["", f"Prefill of {r['tokens']} tokens, {name(r)}: {r['us'] / 1000:.0f} ms, {1e6 * r['tokens'] / r['us']:.0f} "
                "tokens/s."]
    out += serving(REPORTS / "gpu_serve.json")
    out += projection([r for r in plain if name(r) == "v3"])
    out += price(by("decode"), by("prefill"))
    out += memory(by("memory"))
    out += ["", "## Multi-head latent attention", "",
            "TFLOP/s: 2 · heads · rows · (576 + 512) a new token. GB/s: cache, queries and outputs once.", ""]
    out += table(["heads", "batch × length", "µs", "TFLOP/s", "GB/s", "share of read rate"],
                 [[r["heads"], f"{r['batch']} × {r['length']:,}" + (" prefill" if r["new_tokens"] > 1 else ""), f"{r['us']:.1f}",
                   f"{r['tflops']:.0f}", f"{r['gb_per_s']:.0f}", f"{100 * r['gb_per_s'] / r['read_gb_per_s']:.0f} %"]
                  for r in attention])
    out += ["", "## Products", ""]
    out += table(["product", "rows × n × k", "weights", "µs", "GB/s", "share of read rate", "TFLOP/s", "share of matrix rate"],
                 [[r["name"], f"{r['rows']} × {r['n']} × {r['k']}", "fp8" if r["fp8"] else "bf16", f"{r['us']:.1f}",
                   f"{r['gb_s']:.0f}", f"{100 * r['read_share']:.0f} %", f"{r['tflops']:.0f}",
                   f"{100 * r['matrix_share']:.0f} %"] for r in by("gemm")])
    (REPORTS / "gpu.md").write_text("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
