#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes the small random checkpoints of this folder and their golden log-probabilities.

    python tests/golden/generate.py --out tests/golden [--only NAME] [--oracle-only]

A shape's folder gets config.json and weights as published checkpoints have them (per-expert
tensors, bf16 or block-scaled fp8), and golden.json. The log-probabilities are those of Hugging Face
transformers (5.17 or newer: older ones leave mscale^2 out of DeepSeek-V2's softmax scale) in
float32 with eager attention. A second, independent implementation in float64 (class Oracle, numpy only)
measures the reference's own error, chooses prompts whose routing is not decided by rounding, and
grows the greedy continuations. With --oracle-only no torch is needed and the oracle's numbers are
written instead.

golden.json:
  shape, reference, seed, vocab_size
  reference_error_max     largest |reference - oracle| over all log-probabilities below
  routing_margin_min      smallest score difference that decided a routing anywhere below
  prompts: [{ tokens: [n ids], logprobs: [null, n-1 numbers: of each token given those before it],
              greedy: {tokens, logprobs, gap: top-1 minus top-2 log-probability at that position} }]
"""

import argparse
import json
import math
import pathlib
import struct
import sys
import tempfile

import numpy as np

VOCAB = 640
PROMPT_LENGTHS = [1, 2, 5, 17, 63, 64, 65, 130, 300, 600]
GREEDY_TOKENS = 24
# A routing decided by less than this could fall either way in float32: such prompts are not used.
ROUTING_MARGIN = 2e-5
# A greedy token is chosen by more than this: float32 implementations must then agree.
GREEDY_MARGIN = 1e-4
FP8_BLOCK = 128

COMMON = dict(
    vocab_size=VOCAB, hidden_act="silu", attention_bias=False, attention_dropout=0.0,
    tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, initializer_range=0.02,
    torch_dtype="bfloat16", use_cache=True)
V3 = dict(architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", moe_layer_freq=1,
          scoring_func="sigmoid", topk_method="noaux_tc", num_nextn_predict_layers=0, **COMMON)
V2 = dict(architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2", moe_layer_freq=1,
          scoring_func="softmax", norm_topk_prob=False, **COMMON)

# name -> (config.json, number of shards). Old and new spellings of the rope keys are both used.
SHAPES = {
    "v3-yarn": (dict(
        V3, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
        intermediate_size=128, moe_intermediate_size=32, n_routed_experts=16, n_shared_experts=1,
        num_experts_per_tok=4, n_group=4, topk_group=2, first_k_dense_replace=1,
        norm_topk_prob=True, routed_scaling_factor=2.5, rms_norm_eps=1e-6,
        max_position_embeddings=2560, rope_theta=10000.0,
        rope_scaling=dict(type="yarn", factor=40.0, original_max_position_embeddings=64,
                          beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)), 3),
    "v3-odd": (dict(
        V3, hidden_size=72, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=6,
        q_lora_rank=40, kv_lora_rank=48, qk_nope_head_dim=20, qk_rope_head_dim=24, v_head_dim=28,
        intermediate_size=100, moe_intermediate_size=36, n_routed_experts=12, n_shared_experts=2,
        num_experts_per_tok=3, n_group=3, topk_group=2, first_k_dense_replace=1,
        norm_topk_prob=False, routed_scaling_factor=1.7, rms_norm_eps=1e-5,
        max_position_embeddings=1024, rope_theta=50000.0, rope_scaling=None), 1),
    "v2-lite": (dict(
        V2, hidden_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        q_lora_rank=None, kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        intermediate_size=160, moe_intermediate_size=24, n_routed_experts=16, n_shared_experts=2,
        num_experts_per_tok=6, n_group=1, topk_group=1, topk_method="greedy",
        first_k_dense_replace=1, routed_scaling_factor=1.0, rms_norm_eps=1e-6,
        max_position_embeddings=2560,
        rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=40.0,
                             original_max_position_embeddings=64, beta_fast=32.0, beta_slow=1.0,
                             mscale=0.707, mscale_all_dim=0.707)), 1),
    "v2": (dict(
        V2, hidden_size=80, num_hidden_layers=3, num_attention_heads=5, num_key_value_heads=5,
        q_lora_rank=48, kv_lora_rank=48, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=24,
        intermediate_size=144, moe_intermediate_size=32, n_routed_experts=16, n_shared_experts=2,
        num_experts_per_tok=4, n_group=4, topk_group=2, topk_method="group_limited_greedy",
        first_k_dense_replace=1, routed_scaling_factor=4.0, rms_norm_eps=1e-6,
        max_position_embeddings=1024, rope_theta=10000.0,
        rope_scaling=dict(type="yarn", factor=8.0, original_max_position_embeddings=128,
                          beta_fast=16.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=0.707)), 1),
    "v3-fp8": (dict(
        V3, hidden_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        q_lora_rank=80, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=36,
        intermediate_size=208, moe_intermediate_size=48, n_routed_experts=8, n_shared_experts=1,
        num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1,
        norm_topk_prob=True, routed_scaling_factor=2.5, rms_norm_eps=1e-6,
        max_position_embeddings=1024, rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        quantization_config=dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8",
                                 weight_block_size=[FP8_BLOCK, FP8_BLOCK])), 1),
}
SEEDS = {name: 1000 + i for i, name in enumerate(SHAPES)}


# ---- Number formats ----

def to_bf16(x):
    """float -> uint16 bits of bf16, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def e4m3_values():
    """The 127 non-negative values of e4m3fn by code (127 is NaN)."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))


def quantize_fp8(w):
    """[rows, cols] float -> e4m3 codes, scale_inv [ceil(rows/128), ceil(cols/128)] float32."""
    rows, cols = w.shape
    scale = np.zeros((-(-rows // FP8_BLOCK), -(-cols // FP8_BLOCK)), np.float32)
    codes = np.zeros(w.shape, np.uint8)
    values = e4m3_values()
    middles = (values[1:] + values[:-1]) / 2
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = (slice(i * FP8_BLOCK, (i + 1) * FP8_BLOCK),
                     slice(j * FP8_BLOCK, (j + 1) * FP8_BLOCK))
            scale[i, j] = np.float32(np.abs(w[block]).max() / 448.0)
            scaled = w[block] / scale[i, j]
            codes[block] = np.searchsorted(middles, np.abs(scaled)) | (np.signbit(scaled) << 7)
    return codes, scale


def dequantize_fp8(codes, scale):
    """code * scale, rounded to float32."""
    values = e4m3_values().astype(np.float32)[codes & 127]
    values = np.where(codes >> 7, -values, values).astype(np.float32)
    wide = np.repeat(np.repeat(scale, FP8_BLOCK, 0), FP8_BLOCK, 1)
    return values * wide[:codes.shape[0], :codes.shape[1]]


# ---- Weights ----

def is_moe(config, layer):
    return layer >= config["first_k_dense_replace"]


def tensor_shapes(config):
    """name -> (shape, kind) of every tensor, in the published names."""
    c, out = config, {}
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    qk = c["qk_nope_head_dim"] + c["qk_rope_head_dim"]

    def mlp(name, intermediate):
        out[f"{name}.gate_proj.weight"] = ((intermediate, hidden), "linear")
        out[f"{name}.up_proj.weight"] = ((intermediate, hidden), "linear")
        out[f"{name}.down_proj.weight"] = ((hidden, intermediate), "linear")

    out["model.embed_tokens.weight"] = ((c["vocab_size"], hidden), "embedding")
    for layer in range(c["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        attn = f"{name}.self_attn"
        out[f"{name}.input_layernorm.weight"] = ((hidden,), "norm")
        if c["q_lora_rank"] is None:
            out[f"{attn}.q_proj.weight"] = ((heads * qk, hidden), "linear")
        else:
            out[f"{attn}.q_a_proj.weight"] = ((c["q_lora_rank"], hidden), "linear")
            out[f"{attn}.q_a_layernorm.weight"] = ((c["q_lora_rank"],), "norm")
            out[f"{attn}.q_b_proj.weight"] = ((heads * qk, c["q_lora_rank"]), "linear")
        out[f"{attn}.kv_a_proj_with_mqa.weight"] = (
            (c["kv_lora_rank"] + c["qk_rope_head_dim"], hidden), "linear")
        out[f"{attn}.kv_a_layernorm.weight"] = ((c["kv_lora_rank"],), "norm")
        out[f"{attn}.kv_b_proj.weight"] = (
            (heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), c["kv_lora_rank"]), "linear")
        out[f"{attn}.o_proj.weight"] = ((hidden, heads * c["v_head_dim"]), "linear")
        out[f"{name}.post_attention_layernorm.weight"] = ((hidden,), "norm")
        if not is_moe(c, layer):
            mlp(f"{name}.mlp", c["intermediate_size"])
            continue
        out[f"{name}.mlp.gate.weight"] = ((c["n_routed_experts"], hidden), "gate")
        if c["topk_method"] == "noaux_tc":
            out[f"{name}.mlp.gate.e_score_correction_bias"] = ((c["n_routed_experts"],), "bias")
        for expert in range(c["n_routed_experts"]):
            mlp(f"{name}.mlp.experts.{expert}", c["moe_intermediate_size"])
        mlp(f"{name}.mlp.shared_experts", c["n_shared_experts"] * c["moe_intermediate_size"])
    out["model.norm.weight"] = ((hidden,), "norm")
    out["lm_head.weight"] = ((c["vocab_size"], hidden), "head")
    return out


def make_weights(config, seed):
    """(stored: name -> (safetensors dtype, array), values: name -> float32 array that it means)."""
    rng = np.random.default_rng(seed)
    stored, values = {}, {}
    for name, (shape, kind) in tensor_shapes(config).items():
        noise = rng.standard_normal(shape)
        if kind == "norm":
            w = 1.0 + 0.2 * noise
        elif kind == "bias":
            w = 0.1 * noise
        elif kind == "embedding":
            w = noise
        else:
            w = noise * {"linear": 1.0, "gate": 1.5, "head": 2.5}[kind] / math.sqrt(shape[-1])
        if kind == "bias":  # published as fp32
            stored[name] = ("F32", w.astype(np.float32))
            values[name] = stored[name][1]
        elif kind == "linear" and "quantization_config" in config:
            # Blocks of different magnitude, so that a scale in the wrong place is seen.
            for i in range(0, shape[0], FP8_BLOCK):
                for j in range(0, shape[1], FP8_BLOCK):
                    w[i:i + FP8_BLOCK, j:j + FP8_BLOCK] *= rng.uniform(0.6, 1.5)
            codes, scale = quantize_fp8(w)
            stored[name] = ("F8_E4M3", codes)
            stored[name + "_scale_inv"] = ("F32", scale)
            values[name] = dequantize_fp8(codes, scale)
        else:
            stored[name] = ("BF16", to_bf16(w))
            values[name] = from_bf16(stored[name][1])
    return stored, values


# ---- Files ----

def write_safetensors(path, tensors):
    """tensors: name -> (dtype, array)."""
    header, blobs, offset = {"__metadata__": {"format": "pt"}}, [], 0
    for name, (dtype, array) in tensors.items():
        blob = np.ascontiguousarray(array).tobytes()
        header[name] = dict(dtype=dtype, shape=list(array.shape),
                            data_offsets=[offset, offset + len(blob)])
        offset += len(blob)
        blobs.append(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def write_checkpoint(folder, config, stored, num_shards):
    folder.mkdir(parents=True, exist_ok=True)
    for old in list(folder.glob("*.safetensors*")) + list(folder.glob("*config.json")):
        old.unlink()
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(
        {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1}) + "\n")
    # Widest elements first, as published files are: no tensor is then unaligned.
    width = {"F32": 0, "BF16": 1, "F8_E4M3": 2}
    names = sorted(stored, key=lambda n: width[stored[n][0]])
    if num_shards == 1:
        write_safetensors(folder / "model.safetensors", {n: stored[n] for n in names})
        return
    # Neighbours are scattered over the shards: only the index tells where a tensor is.
    shards, weight_map = [dict() for _ in range(num_shards)], {}
    for i, name in enumerate(names):
        shard = (i * 7 + i // 5) % num_shards
        shards[shard][name] = stored[name]
        weight_map[name] = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
    for i, tensors in enumerate(shards):
        write_safetensors(folder / f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors", tensors)
    total = sum(array.nbytes for _, array in stored.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        dict(metadata=dict(total_size=total), weight_map=weight_map), indent=0) + "\n")


# ---- The oracle: DeepSeek's model in float64 ----

def rope_parameters(config):
    p = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    p.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    p["type"] = p.get("rope_type", p.get("type", "default"))
    return p


def get_mscale(factor, mscale):
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def inverse_frequencies(config):
    """float32 numbers, as the checkpoint's own code makes them; returned as float64."""
    p, dim = rope_parameters(config), config["qk_rope_head_dim"]
    base = np.float32(p["rope_theta"])
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    plain = np.float32(1) / base**exponents
    if p["type"] == "default":
        return plain.astype(np.float64)
    slow = np.float32(1) / (np.float32(p["factor"]) * base**exponents)

    def correction_dim(rotations):
        length = p["original_max_position_embeddings"]
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(p["rope_theta"]))

    low = max(math.floor(correction_dim(p["beta_fast"])), 0)
    high = min(math.ceil(correction_dim(p["beta_slow"])), dim - 1)
    span = high - low if high != low else 0.001
    steps = np.arange(dim // 2, dtype=np.float32) - np.float32(low)
    keep = np.float32(1) - np.clip(steps / np.float32(span), 0, 1).astype(np.float32)
    return (slow * (np.float32(1) - keep) + plain * keep).astype(np.float64)


class Oracle:
    """One sequence; run() appends tokens and returns log-probabilities [n, vocab] float64."""

    def __init__(self, config, values):
        self.c = config
        self.w = {name: value.astype(np.float64) for name, value in values.items()}
        p = rope_parameters(config)
        self.inv_freq = inverse_frequencies(config)
        self.rope_scale = 1.0
        self.softmax_scale = (config["qk_nope_head_dim"] + config["qk_rope_head_dim"]) ** -0.5
        if p["type"] == "yarn":
            self.rope_scale = (get_mscale(p["factor"], p["mscale"]) /
                               get_mscale(p["factor"], p["mscale_all_dim"]))
            self.softmax_scale *= get_mscale(p["factor"], p["mscale_all_dim"]) ** 2
        self.reset()

    def reset(self):
        self.length = 0
        self.margin = math.inf
        self.experts_used = [np.zeros(self.c["n_routed_experts"], int)
                             for _ in range(self.c["num_hidden_layers"])]
        self.latent = [None] * self.c["num_hidden_layers"]
        self.rope_key = [None] * self.c["num_hidden_layers"]

    def linear(self, name, x):
        return x @ self.w[name + ".weight"].T

    def norm(self, name, x, eps):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * self.w[name + ".weight"]

    def mlp(self, name, x):
        gate = self.linear(name + ".gate_proj", x)
        return self.linear(name + ".down_proj",
                           gate / (1 + np.exp(-gate)) * self.linear(name + ".up_proj", x))

    def rotate(self, x, positions):
        """x [n, …, dim]: pairs (0,1), (2,3), …"""
        angle = positions[:, None] * self.inv_freq
        shape = (len(positions),) + (1,) * (x.ndim - 2) + (len(self.inv_freq),)
        cos = (np.cos(angle) * self.rope_scale).reshape(shape)
        sin = (np.sin(angle) * self.rope_scale).reshape(shape)
        even, odd = x[..., 0::2], x[..., 1::2]
        out = np.empty_like(x)
        out[..., 0::2] = even * cos - odd * sin
        out[..., 1::2] = odd * cos + even * sin
        return out

    def attention(self, layer, x, positions):
        c, name = self.c, f"model.layers.{layer}.self_attn"
        heads, nope, rope = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
        if c["q_lora_rank"] is None:
            q = self.linear(name + ".q_proj", x)
        else:  # this norm and the next have 1e-6 whatever rms_norm_eps says
            q = self.norm(name + ".q_a_layernorm", self.linear(name + ".q_a_proj", x), 1e-6)
            q = self.linear(name + ".q_b_proj", q)
        q = q.reshape(len(x), heads, nope + rope)
        q_rope = self.rotate(q[..., nope:], positions)

        kv = self.linear(name + ".kv_a_proj_with_mqa", x)
        latent = self.norm(name + ".kv_a_layernorm", kv[:, :c["kv_lora_rank"]], 1e-6)
        rope_key = self.rotate(kv[:, c["kv_lora_rank"]:], positions)
        if self.latent[layer] is not None:
            latent = np.concatenate([self.latent[layer], latent])
            rope_key = np.concatenate([self.rope_key[layer], rope_key])
        self.latent[layer], self.rope_key[layer] = latent, rope_key

        expanded = self.linear(name + ".kv_b_proj", latent).reshape(len(latent), heads, -1)
        key, value = expanded[..., :nope], expanded[..., nope:]
        scores = (np.einsum("qhd,khd->hqk", q[..., :nope], key) +
                  np.einsum("qhd,kd->hqk", q_rope, rope_key)) * self.softmax_scale
        scores[:, np.arange(len(latent))[None, :] > positions[:, None]] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("hqk,khd->qhd", weights, value).reshape(len(x), -1)
        return self.linear(name + ".o_proj", out)

    def decide(self, scores, k):
        """Indices of the k best of each row; remembers how narrowly."""
        order = np.argsort(-scores, axis=-1, kind="stable")
        ordered = np.take_along_axis(scores, order, -1)
        if k < scores.shape[-1]:
            gap = ordered[:, k - 1] - ordered[:, k]
            self.margin = min(self.margin, gap[np.isfinite(gap)].min(initial=math.inf))
        return order[:, :k]

    def route(self, layer, x):
        c = self.c
        logits = self.linear(f"model.layers.{layer}.mlp.gate", x)
        if c["scoring_func"] == "sigmoid":
            scores = 1 / (1 + np.exp(-logits))
            choice = scores + self.w[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]
        else:
            scores = np.exp(logits - logits.max(-1, keepdims=True))
            scores /= scores.sum(-1, keepdims=True)
            choice = scores
        if c["topk_method"] != "greedy":
            grouped = choice.reshape(len(x), c["n_group"], -1)
            ordered = np.sort(grouped, -1)
            best = ordered[..., -2:].sum(-1) if c["topk_method"] == "noaux_tc" else ordered[..., -1]
            mask = np.zeros((len(x), c["n_group"]), bool)
            np.put_along_axis(mask, self.decide(best, c["topk_group"]), True, -1)
            choice = np.where(mask[..., None], grouped, -np.inf).reshape(choice.shape)
        experts = self.decide(choice, c["num_experts_per_tok"])
        weights = np.take_along_axis(scores, experts, -1)
        if c["norm_topk_prob"]:
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        self.experts_used[layer] += np.bincount(experts.ravel(), minlength=c["n_routed_experts"])
        return experts, weights * c["routed_scaling_factor"]

    def moe(self, layer, x):
        name = f"model.layers.{layer}.mlp"
        experts, weights = self.route(layer, x)
        out = self.mlp(name + ".shared_experts", x)
        for expert in range(self.c["n_routed_experts"]):
            rows, slots = np.nonzero(experts == expert)
            if len(rows):
                out[rows] += weights[rows, slots][:, None] * self.mlp(f"{name}.experts.{expert}",
                                                                      x[rows])
        return out

    def run(self, tokens):
        c, eps = self.c, self.c["rms_norm_eps"]
        positions = np.arange(self.length, self.length + len(tokens))
        self.length += len(tokens)
        x = self.w["model.embed_tokens.weight"][np.asarray(tokens)]
        for layer in range(c["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            x = x + self.attention(layer, self.norm(name + ".input_layernorm", x, eps), positions)
            y = self.norm(name + ".post_attention_layernorm", x, eps)
            x = x + (self.moe(layer, y) if is_moe(c, layer) else self.mlp(name + ".mlp", y))
        self.logits = self.linear("lm_head", self.norm("model.norm", x, eps))
        return log_softmax(self.logits)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def top2_gap(row):
    second, first = np.partition(row, -2)[-2:]
    return float(first - second)


def choose_prompt(oracle, rng, length):
    """(prompt, greedy continuation, all log-probabilities, margin): nothing decided by rounding."""
    for attempt in range(1, 1000):
        prompt = rng.integers(0, VOCAB, length).tolist()
        oracle.reset()
        rows = [oracle.run(prompt)]
        greedy = []
        while oracle.margin >= ROUTING_MARGIN:
            row = rows[-1][-1]
            if top2_gap(row) < GREEDY_MARGIN or len(greedy) == GREEDY_TOKENS:
                break
            greedy.append(int(row.argmax()))
            rows.append(oracle.run(greedy[-1:]))
        if len(greedy) == GREEDY_TOKENS and oracle.margin >= ROUTING_MARGIN:
            print(f"  prompt of {length}: attempt {attempt}, routing margin {oracle.margin:.1e}")
            return prompt, greedy, np.concatenate(rows), oracle.margin
    raise SystemExit(f"no prompt of {length} tokens in 1000 attempts: lower ROUTING_MARGIN")


# ---- The reference: transformers ----

def verify_parameters(model, values):
    """Every parameter is bit for bit what the checkpoint means, and none is left over."""
    import torch

    state = dict(model.state_dict())
    expected, fused = {}, {}
    for name, value in values.items():
        if ".mlp.experts." not in name:
            expected[name] = value
            continue
        prefix, _, rest = name.partition(".mlp.experts.")
        expert, projection, _ = rest.split(".")
        fused.setdefault(prefix, {}).setdefault(int(expert), {})[projection] = value
    for prefix, experts in fused.items():
        listed = [experts[i] for i in range(len(experts))]
        name = prefix + ".mlp.experts."
        if name + "gate_up_proj" in state:
            expected[name + "gate_up_proj"] = np.stack(
                [np.concatenate([e["gate_proj"], e["up_proj"]]) for e in listed])
            expected[name + "down_proj"] = np.stack([e["down_proj"] for e in listed])
        else:  # a transformers that keeps experts apart
            for i, e in enumerate(listed):
                for projection, value in e.items():
                    expected[f"{name}{i}.{projection}.weight"] = value
    if set(expected) != set(state):
        raise SystemExit(f"parameters differ: {sorted(set(expected) ^ set(state))[:10]}")
    for name, value in expected.items():
        loaded = state[name]
        if loaded.dtype != torch.float32 or not np.array_equal(loaded.cpu().numpy(), value):
            raise SystemExit(
                f"{name}: {loaded.dtype} {tuple(loaded.shape)} is not what was written")


def load_reference(config, values, folder, scratch):
    import torch
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < (5, 17):
        raise SystemExit(f"transformers {transformers.__version__} is too old: 5.17 or newer")
    if "quantization_config" in config:
        # The reference computes with the dequantized weights and never quantizes activations.
        folder = scratch / "dequantized"
        plain = {k: v for k, v in config.items() if k != "quantization_config"}
        write_checkpoint(folder, dict(plain, torch_dtype="float32"),
                         {n: ("F32", v) for n, v in values.items()}, 1)
    cls = getattr(transformers, config["architectures"][0])
    model = cls.from_pretrained(str(folder), dtype=torch.float32, attn_implementation="eager",
                                experts_implementation="eager", local_files_only=True).eval()
    verify_parameters(model, values)
    rotary = model.model.rotary_emb
    difference = np.abs(rotary.inv_freq.double().numpy() / inverse_frequencies(config) - 1).max()
    if difference > 1e-6:
        raise SystemExit(f"inverse frequencies differ from the oracle's by {difference:.1e}")
    name = f"transformers {transformers.__version__}, torch {torch.__version__}, float32, eager"

    def run(tokens):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        return log_softmax(logits.double().numpy())

    return run, name


# ---- One shape ----

def shorten(x):
    return float(f"{x:.9g}")


def make_shape(name, out, oracle_only):
    config, num_shards = SHAPES[name]
    seed = SEEDS[name]
    print(f"{name}: seed {seed}")
    stored, values = make_weights(config, seed)
    folder = out / name
    if name == "v3-odd":
        # As published V3: a multi-token-prediction layer behind the last one, to be ignored.
        extra = f"model.layers.{config['num_hidden_layers']}"
        stored[extra + ".enorm.weight"] = ("BF16", to_bf16(np.ones(config["hidden_size"])))
        stored[extra + ".eh_proj.weight"] = ("BF16", to_bf16(np.ones((8, 16))))
    write_checkpoint(folder, config, stored, num_shards)

    oracle = Oracle(config, values)
    reference_name = "oracle, float64"
    with tempfile.TemporaryDirectory() as scratch:
        reference = None
        if not oracle_only:
            reference, reference_name = load_reference(config, values, folder,
                                                       pathlib.Path(scratch))
        rng = np.random.default_rng(seed + 500)
        prompts, margins, error, used, deviations, gaps = [], [], 0.0, 0, [], []
        for length in PROMPT_LENGTHS:
            prompt, greedy, oracle_rows, margin = choose_prompt(oracle, rng, length)
            margins.append(margin)
            used = used + np.array(oracle.experts_used)
            deviations.append(oracle_rows.std(-1).mean())
            tokens = prompt + greedy
            rows = reference(tokens) if reference else oracle_rows
            rows = rows[:len(tokens)]
            targets = np.array(tokens[1:])
            picked = rows[np.arange(len(targets)), targets]
            error = max(error, np.abs(rows - oracle_rows[:len(rows)]).max())
            for i, token in enumerate(greedy):
                row = rows[length - 1 + i]
                gap = top2_gap(row)
                gaps.append(gap)
                if int(row.argmax()) != token:
                    raise SystemExit(f"reference and oracle disagree on greedy token {i} after a "
                                     f"prompt of {length}; the reference's gap is {gap:.1e}")
            first = [None] + [shorten(x) for x in picked[:length - 1]]
            prompts.append(dict(tokens=prompt, logprobs=first, greedy=dict(
                tokens=greedy, logprobs=[shorten(x) for x in picked[length - 1:]],
                gap=[shorten(top2_gap(rows[length - 1 + i])) for i in range(len(greedy))])))
    moe_layers = [l for l in range(config["num_hidden_layers"]) if is_moe(config, l)]
    share = used[moe_layers] / used[moe_layers].sum(-1, keepdims=True)
    print(f"  error of the reference {error:.1e}, smallest routing margin {min(margins):.1e}, "
          f"deviation of logits {np.mean(deviations):.2f}, median greedy gap {np.median(gaps):.3f}")
    print(f"  least and most used expert: {share.min():.3f}, {share.max():.3f} of the choices")
    if error > 3e-4:
        raise SystemExit(f"the reference is {error:.1e} off the oracle: one of them is wrong")
    (folder / "golden.json").write_text(json.dumps(dict(
        shape=name, reference=reference_name, seed=seed, vocab_size=VOCAB,
        reference_error_max=error, routing_margin_min=min(margins), prompts=prompts),
        separators=(",", ":")) + "\n")
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"  {size / 1e6:.2f} MB in {folder}")
    if size > 1.5e6:
        raise SystemExit(f"{name} takes {size} bytes, more than 1.5 MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--only", choices=list(SHAPES))
    parser.add_argument("--oracle-only", action="store_true", help="without torch and transformers")
    arguments = parser.parse_args()
    for name in [arguments.only] if arguments.only else SHAPES:
        make_shape(name, arguments.out, arguments.oracle_only)


if __name__ == "__main__":
    sys.exit(main())
