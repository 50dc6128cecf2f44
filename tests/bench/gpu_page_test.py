#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Defends: gpu_page.py shows every kind of row that tests/gpu.sh writes, each where it belongs, and leaves a section out
whose rows are not there."""
import unittest

import gpu_page

STEP = {"config": "tests/bench/models/v3", "layers": 2, "deterministic": False, "rows": "bf16"}
DECODE = {**STEP, "bench": "decode", "batch": 16, "context": 32768, "us": 4000.0, "floor_us": 3000.0, "share": 0.75,
          "cache_bytes": 1e9}
PREFILL = {**STEP, "bench": "prefill", "tokens": 4096, "us": 90000.0, "tflops": 400.0, "matrix_share": 0.45}
MEMORY = {**STEP, "bench": "memory", "weights": 2**31, "cache": 2**30, "workspace": 2**28, "stated": 2**32, "taken": 2**32}
HOP = {"bench": "nccl_hop", "mps": True, "nccl": "2.28.9", "bytes": 28672, "bare_us": 40.0, "transport_us": 50.0,
       "ratio": 1.25, "taken": 160 * 2**20, "stated": 256 * 2**20}
LIMITS = {"bench": "limits", "device": "GPU", "read_gb_s": 4400.0}
GEMM = {"bench": "gemm", "name": "v3 up", "rows": 16, "n": 2048, "k": 7168, "fp8": True, "us": 9.0, "gb_s": 1700.0,
        "read_share": 0.386, "tflops": 52.0, "matrix_share": 0.06}
MLA = {"heads": 128, "batch": 1, "length": 4096, "new_tokens": 1, "format": "bf16", "deterministic": False, "us": 18.0,
       "tflops": 63.2, "gb_per_s": 276.8, "read_gb_per_s": 4654.7, "device": "GPU"}
SERVE = {"model": "v2-lite", "prompt_tokens": 1024, "output_tokens": 128, "runs": [
    {"concurrency": 16, "prompt_tokens_per_s": 9000.0, "output_tokens_per_s": 1125.0, "failed": 0,
     "ttft_ms": {"p50": 321.0, "p99": 400.0}, "tpot_ms": {"p50": 7.25, "p99": 9.5}}]}


EXPANDED = {"form": "expanded", "heads": 16, "length": 8192, "new_tokens": 2048, "us": 204.3, "tflops": 735.9, "with_keys_us": 329.5,
            "with_keys_tflops": 560.6}


def page(*results, serve=None):
    return gpu_page.page({"gpu": "GPU", "results": [LIMITS, GEMM, *results]}, [MLA, EXPANDED], serve)


class PageTest(unittest.TestCase):
    def test_steps(self):
        text = page(DECODE, PREFILL)
        self.assertIn("| v3, 2 layers | 16 | 32768 | 4.00 | 3.00 | 75 % | 4000 |", text)
        self.assertIn("Prefill of 4096 tokens, v3, 2 layers: 90 ms, 45511 tokens/s; 400 TFLOP/s as done, attention in the absorbed form", text)
        for section in ("Serving", "What --deterministic costs", "fp8 cache rows", "A stage's memory", "A hop over NCCL"):
            self.assertNotIn("## " + section, text)

    def test_other_modes_are_beside_the_plain_ones_and_not_among_them(self):
        text = page(DECODE, PREFILL, {**DECODE, "rows": "fp8", "us": 3000.0}, {**PREFILL, "rows": "fp8", "us": 99000.0},
                    {**DECODE, "deterministic": True, "us": 6000.0})
        steps, rest = text.split("## DeepSeek-V3 from its layers")
        self.assertEqual(steps.count("| v3, 2 layers |"), 1)
        self.assertEqual(steps.count("Prefill of"), 1)
        price, rows = rest.split("## fp8 cache rows")
        self.assertIn("| v3, 2 layers | decode 16 × 32,768 | 4.00 | 6.00 | 1.50 |", price)
        self.assertNotIn("0.75", price.split("## What --deterministic costs")[1])
        self.assertIn("| v3, 2 layers | decode 16 × 32,768 | 4.00 | 3.00 | 0.75 |", rows)
        self.assertIn("| v3, 2 layers | prefill of 4,096 | 90.00 | 99.00 | 1.10 |", rows)

    def test_attention_in_both_forms(self):
        text = page(DECODE)
        self.assertIn("| 128 | 1 × 4,096 | 18.0 | 63 |", text)
        self.assertIn("| 16 | 8,192, 2,048 new | 204.3 | 736 | 329.5 | 561 |", text)

    def test_rows_of_before_there_was_a_choice(self):
        old = {k: v for k, v in DECODE.items() if k != "rows"}
        self.assertIn("| v3, 2 layers | 16 | 32768 | 4.00 |", page(old))

    def test_another_stage_is_not_compared_with(self):
        self.assertNotIn("## fp8 cache rows", page(DECODE, {**DECODE, "rows": "fp8", "layers": 3}))

    def test_ranks(self):
        run = {"bench": "ranks", "concurrency": 64, "prompt_tokens_per_s": 8000.0, "tpot_p50_ms": 12.0, "failed": 0}
        quarter = {"bench": "quarter", "us": 3000.0, "at_once": 1, "batch": 64}
        text = page(DECODE, {**run, "ranks": 1, "output_tokens_per_s": 2000.0}, {**run, "ranks": 4, "output_tokens_per_s": 1500.0},
                    quarter, {**quarter, "batch": 16, "us": 2000.0}, {**quarter, "at_once": 4, "batch": 16, "us": 7000.0},
                    {**quarter, "at_once": 4, "batch": 16, "us": 8000.0}, {**quarter, "at_once": 4, "us": 11000.0})
        self.assertIn("| 4 | 8000 | 1500 | 75 % | 12.0 | 0 |", text)
        self.assertIn(": 3.00 ms for 64 sequences", text)
        self.assertIn("; 2.00 ms for the 16 ", text)
        self.assertIn("; 7.50 ms for 16 when four", text)
        self.assertIn("decode 40 % of one rank's tokens", text)
        self.assertNotIn("GPUs of their own", text)

    def test_ranks_on_gpus_of_their_own(self):
        run = {"bench": "gpu_ranks", "concurrency": 64, "prompt_tokens_per_s": 8000.0, "tpot_p50_ms": 12.0, "failed": 0}
        text = page(DECODE, {**run, "ranks": 1, "output_tokens_per_s": 2000.0}, {**run, "ranks": 2, "output_tokens_per_s": 3000.0})
        self.assertIn("| 2 | 8000 | 3000 | 150 % | 12.0 | 0 |", text.split("## Ranks on GPUs of their own")[1])

    def test_memory(self):
        text = page(MEMORY, {**MEMORY, "rows": "fp8", "deterministic": True})
        self.assertIn("| v3, 2 layers | 2.00 | 1.00 | 0.25 | 4.00 | 4.00 | 100.0 % |", text)
        self.assertIn("| v3, 2 layers, deterministic, fp8 rows |", text)

    def test_hops(self):
        text = page(HOP, {**HOP, "mps": False, "bytes": 2097152})
        self.assertIn("| 28,672 | MPS | 2.28.9 | 40.0 | 50.0 | 1.25 | 160 | 256 |", text)
        self.assertIn("| 2,097,152 | taking turns | 2.28.9 |", text)
        self.assertIn("| 28,672 | a GPU each | 2.28.9 |", page({**HOP, "mps": False, "gpus": 2}))

    def test_serving(self):
        self.assertIn("| 16 | 9000 | 1125 | 321 | 7.25 | 9.50 |  |  | 0 |", page(serve=SERVE))

    def test_serving_beside_the_bare_steps(self):
        bare = {**DECODE, "config": "tests/bench/models/v2-lite", "context": 1088, "us": 5500.0, "ahead_us": 5250.0}
        self.assertIn("| 7.25 | 9.50 | 5.50 | 5.25 | 0 |", page(bare, serve=SERVE))
        for other in ({"context": 1024}, {"batch": 1}, {"config": "tests/bench/models/v3"}):
            self.assertIn("| 7.25 | 9.50 |  |  | 0 |", page({**bare, **other}, serve=SERVE))


if __name__ == "__main__":
    unittest.main()
