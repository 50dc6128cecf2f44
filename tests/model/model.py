# SPDX-License-Identifier: Apache-2.0
"""The reference model in its training form: DeepSeek-V3's architecture, small.

Written from the paper's equations: multi-head latent attention expanded to keys and values (training has no
cache), mixture of experts with grouped sigmoid routing and a correction bias that is moved by hand towards equal
load (no auxiliary loss). All experts are computed for every token and weighted, most by zero: at this size that is
faster than gathering. Parameter names and layouts are those of the published checkpoints, so `export` writes them
as they are.
"""
import dataclasses

import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass
class Config:
    vocab_size: int = 2048
    hidden_size: int = 192
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    q_lora_rank: int = 96
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    intermediate_size: int = 512
    moe_intermediate_size: int = 40
    n_routed_experts: int = 16
    n_shared_experts: int = 1
    num_experts_per_tok: int = 4
    n_group: int = 4
    topk_group: int = 2
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = 1
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 8448

    def huggingface(self) -> dict:
        d = dataclasses.asdict(self)
        d.update(architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", hidden_act="silu",
                 num_key_value_heads=self.num_attention_heads, scoring_func="sigmoid", topk_method="noaux_tc",
                 norm_topk_prob=True, moe_layer_freq=1, attention_bias=False, attention_dropout=0.0,
                 tie_word_embeddings=False, rope_scaling=None, rope_interleave=True, use_cache=True,
                 initializer_range=0.02, bos_token_id=0, eos_token_id=1, torch_dtype="bfloat16",
                 num_nextn_predict_layers=0)
        return d


FUSED_HEAD_DIM = 64  # of the attention kernels that training calls


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def linear(n_in, n_out):
    layer = nn.Linear(n_in, n_out, bias=False)
    nn.init.normal_(layer.weight, std=n_in ** -0.5 * 0.6)
    return layer


def rotate(x, cos, sin):
    """x [..., T, rope]: pairs (2i, 2i+1), as the published weights store them."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        heads, head = c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim
        self.q_a_proj = linear(c.hidden_size, c.q_lora_rank)
        self.q_a_layernorm = RMSNorm(c.q_lora_rank, c.rms_norm_eps)
        self.q_b_proj = linear(c.q_lora_rank, heads * head)
        self.kv_a_proj_with_mqa = linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, c.rms_norm_eps)
        self.kv_b_proj = linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.o_proj = linear(heads * c.v_head_dim, c.hidden_size)
        self.o_proj.weight.data.mul_((2 * c.num_hidden_layers) ** -0.5)

    def forward(self, x, cos, sin):
        c, (b, t, _) = self.c, x.shape
        heads, nope = c.num_attention_heads, c.qk_nope_head_dim
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(b, t, heads, -1).transpose(1, 2)
        q_nope, q_rope = q.split([nope, c.qk_rope_head_dim], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(b, t, heads, -1).transpose(1, 2)
        k_nope, v = kv.split([nope, c.v_head_dim], -1)
        k_rope = rotate(k_rope[:, None], cos, sin).expand(-1, heads, -1, -1)
        # The fused kernels want one head size, a power of two; zeros add nothing to a score.
        pad = FUSED_HEAD_DIM - c.qk_nope_head_dim - c.qk_rope_head_dim
        q = F.pad(torch.cat((q_nope, rotate(q_rope, cos, sin)), -1), (0, pad)).to(v.dtype)
        k = F.pad(torch.cat((k_nope, k_rope), -1), (0, pad)).to(v.dtype)
        v = F.pad(v, (0, FUSED_HEAD_DIM - c.v_head_dim))
        scale = (c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[..., :c.v_head_dim]
        return self.o_proj(o.transpose(1, 2).reshape(b, t, -1))


class Mlp(nn.Module):
    def __init__(self, c: Config, width: int):
        super().__init__()
        self.gate_proj, self.up_proj = linear(c.hidden_size, width), linear(c.hidden_size, width)
        self.down_proj = linear(width, c.hidden_size)
        self.down_proj.weight.data.mul_((2 * c.num_hidden_layers) ** -0.5)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rank(x):
    """x [..., n] -> how many of the n are before each in falling order; ties by position."""
    index = torch.arange(x.shape[-1], device=x.device)
    a, b = x[..., :, None], x[..., None, :]
    return ((b > a) | ((b == a) & (index[None, :] < index[:, None]))).sum(-1)


class Moe(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        experts, width = c.n_routed_experts, c.moe_intermediate_size
        self.gate = nn.Parameter(torch.randn(experts, c.hidden_size) * c.hidden_size ** -0.5)
        self.register_buffer("correction", torch.zeros(experts))
        self.register_buffer("load", torch.zeros(experts))
        self.register_buffer("last_load", torch.zeros(experts), persistent=False)
        # Experts side by side: [experts * width, hidden].
        self.gate_up = linear(c.hidden_size, 2 * experts * width)
        self.down = linear(experts * width, c.hidden_size)
        self.down.weight.data.mul_((experts / c.num_experts_per_tok) ** 0.5 * (2 * c.num_hidden_layers) ** -0.5
                                   / c.routed_scaling_factor * 2)
        self.shared_experts = Mlp(c, width * c.n_shared_experts)

    def route(self, x):
        """x [N, hidden] -> dense weights [N, experts], zero where an expert is not chosen."""
        c = self.c
        with torch.autocast("cuda", enabled=False):
            scores = (x.float() @ self.gate.t()).sigmoid()
        # Ranks by pairwise comparison: the compiler fuses them, which it does not do with top-k.
        biased = (scores.detach() + self.correction).view(-1, c.n_group, c.n_routed_experts // c.n_group)
        group_score = (biased * (rank(biased) < 2)).sum(-1)
        allowed = rank(group_score) < c.topk_group
        biased = biased.masked_fill(~allowed[..., None], float("-inf")).flatten(1)
        mask = (rank(biased) < c.num_experts_per_tok).to(scores.dtype)
        weights = scores * mask
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * c.routed_scaling_factor
        return weights, mask

    def forward(self, x):
        c, shape = self.c, x.shape
        flat = x.reshape(-1, c.hidden_size)
        weights, mask = self.route(flat)
        if self.training:
            self.load.add_(mask.detach().sum(0))
        gate, up = self.gate_up(flat).chunk(2, -1)
        h = (F.silu(gate) * up).view(-1, c.n_routed_experts, c.moe_intermediate_size) * weights[..., None].to(gate.dtype)
        return (self.down(h.flatten(1)) + self.shared_experts(flat)).view(shape)

    @torch.no_grad()
    def balance(self, rate):
        """Moves the correction bias towards equal load, by at most `rate`, then forgets the load. The step shrinks
        with the imbalance, so that a balanced router is left alone."""
        mean = self.load.mean()
        self.correction.add_(rate * ((mean - self.load) / (0.5 * mean)).clamp(-1, 1))
        self.correction.sub_(self.correction.min())  # no choice changes; every biased score stays positive
        self.last_load.copy_(self.load)
        self.load.zero_()


class Block(nn.Module):
    def __init__(self, c: Config, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = Mlp(c, c.intermediate_size) if index < c.first_k_dense_replace else Moe(c)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=1.0)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = linear(c.hidden_size, c.vocab_size)
        self.lm_head.weight.data.mul_(0.2)
        inverse = 1.0 / c.rope_theta ** (torch.arange(0, c.qk_rope_head_dim, 2, dtype=torch.float32) / c.qk_rope_head_dim)
        angles = torch.outer(torch.arange(c.max_position_embeddings, dtype=torch.float64), inverse.double())
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, ids):
        t = ids.shape[1]
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, self.cos[:t], self.sin[:t])
        return self.lm_head(self.norm(x))

    def moes(self):
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, Moe)]

    def published_tensors(self) -> dict:
        """Tensors under their published names, bf16 (the correction bias fp32)."""
        c, out = self.c, {}
        for name, p in self.named_parameters():
            if ".mlp.gate_up." in name or ".mlp.down." in name:
                continue
            out[("" if name.startswith("lm_head") else "model.") + (name + ".weight" if name.endswith("mlp.gate") else name)] = p
        for i, layer in enumerate(self.layers):
            if not isinstance(layer.mlp, Moe):
                continue
            moe, width = layer.mlp, c.moe_intermediate_size
            gate, up = moe.gate_up.weight.chunk(2, 0)
            for e in range(c.n_routed_experts):
                rows, name = slice(e * width, (e + 1) * width), f"model.layers.{i}.mlp.experts.{e}."
                out[name + "gate_proj.weight"], out[name + "up_proj.weight"] = gate[rows], up[rows]
                out[name + "down_proj.weight"] = moe.down.weight[:, rows]
        out = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in out.items()}
        for i, layer in enumerate(self.layers):
            if isinstance(layer.mlp, Moe):
                out[f"model.layers.{i}.mlp.gate.e_score_correction_bias"] = layer.mlp.correction.detach().float().cpu().clone()
        return out
