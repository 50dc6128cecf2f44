#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What rounding to bf16 does to the golden log-probabilities: where the bounds of the GPU tests come from.

    python tests/golden/bf16_error.py [--rows fp8] [SHAPE…]

Runs the float64 oracle of generate.py with activations, queries, cache rows and attention weights rounded to bf16
where the CUDA backend rounds them (the residual and all sums stay wide), and compares with golden.json. With --rows
fp8 a row's latent becomes e4m3 codes with a scale for each 128, widened to bf16 when it is read: the bounds for
--cache-format fp8. Prints per shape: mean, median, 90 and 99 in 100, worst |difference|, and the share of tokens off by more than 0.1; then the
same with each token's experts chosen by the unrounded model: what is left when no routing changes. And how many greedy
tokens that the reference prefers by more than CLEAR are not the first choice. For shapes with fp8
weights the same once more with --fp8-activations: what these are multiplied with is rounded to e4m3, too.
"""
import argparse
import json
import pathlib
import struct

import numpy as np

from generate import FP8_BLOCK, SHAPES, Oracle, e4m3_values, from_bf16, make_weights, to_bf16

ROOT = pathlib.Path(__file__).resolve().parent
CLEAR = 0.5  # a log-probability's lead, as in tests/worker/model/cuda/golden_cuda_test.cc


def rounded(x):
    return from_bf16(to_bf16(np.asarray(x, np.float32))).astype(np.float64)


def as_fp8_row(latent):
    """[tokens, rank] -> what attention reads of fp8 rows: the largest of 128 columns gets the largest code, 448."""
    out = np.empty(latent.shape)
    values = e4m3_values()
    for begin in range(0, latent.shape[1], FP8_BLOCK):
        columns = np.asarray(latent[:, begin:begin + FP8_BLOCK], np.float32)
        most = np.abs(columns).max(1, keepdims=True)
        unit = np.where(most > 0, most / np.float32(448), np.float32(1))
        codes = np.searchsorted((values[1:] + values[:-1]) / 2, np.abs(columns / unit))
        out[:, begin:begin + FP8_BLOCK] = rounded(np.copysign(values[codes], columns) * unit)
    return out


class RoundedOracle(Oracle):
    """`guide`: an Oracle that has run the same tokens and whose experts are taken; or None."""

    guide = None
    as_row = staticmethod(rounded)

    def linear(self, name, x):
        weight = self.w[name + ".weight"]
        return rounded(x) @ (rounded(weight) if name.endswith("kv_b_proj") else weight).T

    def decide(self, scores, k):
        if self.guide is None:
            return super().decide(scores, k)
        return self.guide.pop(0)

    def moe(self, layer, x):
        name = f"model.layers.{layer}.mlp"
        experts, weights = self.route(layer, x)
        out = self.mlp(name + ".shared_experts", x)
        for expert in range(self.c["n_routed_experts"]):
            rows, slots = np.nonzero(experts == expert)
            if len(rows):
                out[rows] += weights[rows, slots][:, None] * rounded(self.mlp(f"{name}.experts.{expert}", x[rows]))
        return out

    def attention(self, layer, x, positions):
        c, name = self.c, f"model.layers.{layer}.self_attn"
        heads, nope, rope = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
        if c["q_lora_rank"] is None:
            q = self.linear(name + ".q_proj", x)
        else:
            q = self.norm(name + ".q_a_layernorm", self.linear(name + ".q_a_proj", x), 1e-6)
            q = self.linear(name + ".q_b_proj", q)
        q = rounded(q.reshape(len(x), heads, nope + rope))
        q_rope = rounded(self.rotate(q[..., nope:], positions))
        kv = self.linear(name + ".kv_a_proj_with_mqa", x)
        latent = self.as_row(self.norm(name + ".kv_a_layernorm", kv[:, :c["kv_lora_rank"]], 1e-6))
        rope_key = rounded(self.rotate(kv[:, c["kv_lora_rank"]:], positions))
        up = rounded(self.w[name + ".kv_b_proj.weight"]).reshape(heads, -1, c["kv_lora_rank"])
        q_latent = rounded(np.einsum("qhd,hdr->qhr", q[..., :nope], up[:, :nope]))
        scores = (np.einsum("qhr,kr->hqk", q_latent, latent) +
                  np.einsum("qhd,kd->hqk", q_rope, rope_key)) * self.softmax_scale
        scores[:, np.arange(len(latent))[None, :] > positions[:, None]] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("hqk,kr->qhr", rounded(weights), latent) / weights.sum(-1).T[..., None]
        out = np.einsum("qhr,hvr->qhv", rounded(out), up[:, nope:]).reshape(len(x), -1)
        return self.linear(name + ".o_proj", out)


def coded(x):
    """x through e4m3 with kernels/quantize.h's scales: a power of two a row and 128 columns."""
    values = e4m3_values()
    middles = (values[1:] + values[:-1]) / 2
    out = np.empty_like(x)
    for begin in range(0, x.shape[-1], FP8_BLOCK):
        block = x[..., begin:begin + FP8_BLOCK]
        most = np.maximum(np.abs(block).max(-1, keepdims=True), 2.0**-100)
        scale = 2.0 ** np.ceil(np.log2(most / 448))
        out[..., begin:begin + FP8_BLOCK] = np.copysign(
            values[np.searchsorted(middles, np.abs(block) / scale)] * scale, block)
    return out


class CodedOracle(RoundedOracle):
    def linear(self, name, x):
        if not name.endswith((".mlp.gate", "lm_head", "kv_b_proj")):
            x = coded(rounded(x))
        return super().linear(name, x)


class Recording(Oracle):
    def reset(self):
        super().reset()
        self.decisions = []

    def decide(self, scores, k):
        self.decisions.append(super().decide(scores, k))
        return self.decisions[-1]


def show(shape, what, errors):
    errors = np.sort(np.array(errors))
    at = lambda q: errors[int(q * (len(errors) - 1))]
    print(f"{shape:8} {what:17} mean {errors.mean():.4f} median {at(.5):.4f} 90% {at(.9):.4f} 99% {at(.99):.4f} "
          f"worst {errors[-1]:.3f} over 0.1: {(errors > 0.1).mean():.4f}", flush=True)


def trained(folder):
    """(config, values) of a checkpoint in one file of bf16 and fp32 tensors."""
    data = (folder / "model.safetensors").read_bytes()
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    values = {}
    for name, t in json.loads(data[8:begin]).items():
        if name == "__metadata__":
            continue
        raw = data[begin + t["data_offsets"][0]:begin + t["data_offsets"][1]]
        value = from_bf16(np.frombuffer(raw, np.uint16)) if t["dtype"] == "BF16" else np.frombuffer(raw, np.float32)
        values[name] = value.reshape(t["shape"])
    return json.loads((folder / "config.json").read_text()), values


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", choices=["bf16", "fp8"], default="bf16")
    parser.add_argument("shapes", nargs="*", default=[*SHAPES, "reference"])
    args = parser.parse_args()
    for shape in args.shapes:
        golden = json.loads((ROOT / shape / "golden.json").read_text())
        if shape == "reference":
            config, values = trained(ROOT.parent.parent / "deploy/models/reference")
            golden["prompts"] = [p for p in golden["prompts"] if len(p["tokens"]) <= 600]  # float64 takes its time
        else:
            config = SHAPES[shape][0]
            _, values = make_weights(config, golden["seed"])
        exact = Recording(config, values)
        ways = {"": RoundedOracle(config, values)}
        if "quantization_config" in config:
            ways["fp8, "] = CodedOracle(config, values)
        for oracle in ways.values():
            oracle.as_row = {"bf16": rounded, "fp8": as_fp8_row}[args.rows]
        errors, clear, others = {}, 0, {way: 0 for way in ways}
        for prompt in golden["prompts"]:
            tokens = prompt["tokens"] + prompt["greedy"]["tokens"]
            expected = np.array(prompt["logprobs"][1:] + prompt["greedy"]["logprobs"])
            exact.reset()
            exact.run(tokens)
            clear += sum(gap > CLEAR for gap in prompt["greedy"]["gap"])
            for way, oracle in ways.items():
                for what, guide in (("as it is", None), ("same experts", list(exact.decisions))):
                    oracle.reset()
                    oracle.guide = guide
                    all_of = oracle.run(tokens)
                    errors.setdefault(way + what, []).extend(
                        np.abs(all_of[np.arange(len(tokens) - 1), tokens[1:]] - expected))
                    if guide is not None:
                        continue
                    for i, gap in enumerate(prompt["greedy"]["gap"], len(prompt["tokens"])):
                        others[way] += bool(gap > CLEAR and np.argmax(all_of[i - 1]) != tokens[i])
        for what, list_of in errors.items():
            show(shape, what, list_of)
        for way, count in others.items():
            print(f"{shape:8} {way}{count} of {clear} clear choices differ", flush=True)


if __name__ == "__main__":
    main()
