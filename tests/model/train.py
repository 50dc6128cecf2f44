#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains the reference model from corpus.py's files and writes a Hugging Face directory.

  train.py --corpus DIR --work DIR [--minutes 8,4,5] [--until PHASE]

Phases: (length, minutes). Each phase ends by its clock, so a run takes the same time anywhere and its quality
depends on the device. State is saved every minute and at the end of a phase under --work; the same command
resumes. After the last phase WORK/model holds config.json, model.safetensors, tokenizer.json, tokenizer_config.json
and WORK/report.json the measured quality. Needs one GPU, PyTorch 2.4 or newer, tokenizers, safetensors.
"""
import argparse
import json
import lzma
import math
import pathlib
import time

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from model import Config, Model
from tasks import Tasks

LENGTHS = (1024, 4096, 8192)
TOKENS_PER_STEP = 131072
RECALL_SHARE = (0.25, 0.30, 0.35)
PEAK_RATE = (1.0, 0.45, 0.25)      # of the base learning rates, by phase
MUON_RATE, ADAM_RATE = 0.02, 0.004
BALANCE_RATE = 0.002
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|User|>", "<|Assistant|>"]
# DeepSeek-V3's pre-tokenizer sequence: digits in threes, CJK and kana runs, then words, punctuation, white space.
SPLITS = [r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
          "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
          "| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"]
CHAT = ("{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|User|>' + "
        "message['content'] }}{% elif message['role'] == 'assistant' %}{{ '<|Assistant|>' + message['content'] + "
        "eos_token }}{% else %}{{ message['content'] + '\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}")


def read(path):
    with lzma.open(path, "rt") as f:
        return [json.loads(line) for line in f]


def make_tokenizer(docs, path):
    if path.exists():
        return Tokenizer.from_file(str(path))
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(s), "isolated") for s in SPLITS] +
        [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=Config.vocab_size, special_tokens=SPECIAL,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    t.train_from_iterator((d["text"] for d in docs), trainer)
    t.post_processor = processors.TemplateProcessing(single=SPECIAL[0] + " $A", special_tokens=[(SPECIAL[0], 0)])
    t.save(str(path))
    return t


def encode(tokenizer, docs):
    out = []
    for begin in range(0, len(docs), 256):
        for e in tokenizer.encode_batch([d["text"] for d in docs[begin:begin + 256]], add_special_tokens=False):
            out.append(np.array([0] + e.ids + [1], dtype=np.uint16))
    return out


def orthogonalized(g):
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix (Muon, Jordan et al. 2024)."""
    x = g.bfloat16()
    flip = x.shape[0] > x.shape[1]
    x = x.t() if flip else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.t()
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.t() if flip else x


class Muon:
    def __init__(self, params):
        self.params = list(params)
        self.momentum = [torch.zeros_like(p) for p in self.params]

    @torch.no_grad()
    def step(self, rate):
        for p, m in zip(self.params, self.momentum):
            m.lerp_(p.grad, 0.05)
            update = orthogonalized(p.grad.lerp(m, 0.95))
            p.mul_(1 - rate * 0.1)
            p.add_(update.to(p.dtype), alpha=-rate * max(1, p.shape[0] / p.shape[1]) ** 0.5)


class Run:
    def __init__(self, args):
        self.work, self.minutes = args.work, [float(m) for m in args.minutes.split(",")]
        self.work.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(args.seed)
        torch.set_float32_matmul_precision("high")
        docs, heldout = read(args.corpus / "train.jsonl.xz"), read(args.corpus / "heldout.jsonl.xz")
        self.tokenizer = make_tokenizer(docs, self.work / "tokenizer.json")
        self.heldout, train = encode(self.tokenizer, heldout), encode(self.tokenizer, docs)
        self.tasks = Tasks(self.tokenizer, train, np.random.default_rng(args.seed))
        self.train_stream = self.tasks.stream
        print(f"{len(self.train_stream) / 1e6:.1f} M tokens, {len(self.tasks.words)} words, held out "
              f"{sum(len(d) >= 8193 for d in self.heldout)} documents of 8192 tokens or more", flush=True)
        self.model = Model(Config()).cuda()
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n
                    and not n.endswith("gate")]
        chosen = set(map(id, matrices))
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW([p for p in self.model.parameters() if id(p) not in chosen], lr=ADAM_RATE,
                                      betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.phase, self.elapsed, self.steps = 0, 0.0, 0
        self.compiled = torch.compile(self.model, dynamic=False)
        if (self.work / "state.pt").exists():
            self.load()

    def save(self):
        torch.save({"model": self.model.state_dict(), "adam": self.adam.state_dict(), "muon": self.muon.momentum,
                    "phase": self.phase, "elapsed": self.elapsed, "steps": self.steps}, self.work / "state.tmp")
        (self.work / "state.tmp").rename(self.work / "state.pt")

    def load(self):
        state = torch.load(self.work / "state.pt", map_location="cuda")
        self.model.load_state_dict(state["model"])
        self.adam.load_state_dict(state["adam"])
        self.muon.momentum = state["muon"]
        self.phase, self.elapsed, self.steps = state["phase"], state["elapsed"], state["steps"]
        print(f"resumed in phase {self.phase} after {self.elapsed:.0f} s, {self.steps} steps", flush=True)

    def loss(self, ids, weights):
        with torch.autocast("cuda", torch.bfloat16):
            logits = self.compiled(ids[:, :-1])
        per_token = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return (per_token * weights.flatten()).sum() / weights.sum()

    def rate(self, share):
        """Linear warm-up over 3 % of a phase's time, cosine to a tenth of its peak."""
        return PEAK_RATE[self.phase] * (min(1, share / 0.03) * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1, share)))))

    def train_phase(self):
        length, budget = LENGTHS[self.phase], self.minutes[self.phase] * 60
        rows, micro = TOKENS_PER_STEP // length, max(1, 32768 // length)
        self.model.train()
        import concurrent.futures as cf
        pool = cf.ThreadPoolExecutor(1)
        make = lambda: self.tasks.batch(rows, length, RECALL_SHARE[self.phase])
        ahead, started, saved, base, shown = pool.submit(make), None, time.time(), self.elapsed, 0.0
        while self.elapsed < budget:
            ids, weights = (torch.from_numpy(a).pin_memory().cuda(non_blocking=True) for a in ahead.result())
            ahead = pool.submit(make)
            total = 0.0
            for i in range(0, rows, micro):
                loss = self.loss(ids[i:i + micro], weights[i:i + micro]) * (micro / rows)
                loss.backward()
                total += loss.detach()
            torch.nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], 1.0)
            rate = self.rate(self.elapsed / budget)
            self.adam.param_groups[0]["lr"] = ADAM_RATE * rate
            self.adam.step()
            self.muon.step(MUON_RATE * rate)
            for p in self.model.parameters():
                p.grad = None
            for moe in self.model.moes():
                moe.balance(BALANCE_RATE * min(1, rate))
            self.steps += 1
            if started is None:  # compiling does not count
                torch.cuda.synchronize()
                started = time.time()
            self.elapsed = base + time.time() - started
            if self.elapsed - shown > 15:
                shown = self.elapsed
                print(f"phase {self.phase} length {length} {self.elapsed:4.0f}/{budget:.0f} s step {self.steps} "
                      f"loss {float(total):.3f}", flush=True)
            if time.time() - saved > 60:
                torch.cuda.synchronize()
                self.save()
                saved = time.time()
        pool.shutdown(cancel_futures=True)
        self.phase, self.elapsed = self.phase + 1, 0.0
        self.save()

    # ------------------------------------------------------------------ quality

    @torch.no_grad()
    def logits(self, ids):
        with torch.autocast("cuda", torch.bfloat16):
            return self.model(torch.from_numpy(ids.astype(np.int64))[None].cuda())[0].float()

    @torch.no_grad()
    def measure(self):
        self.model.eval()
        documents = [d[:8193] for d in self.heldout if len(d) >= 8193]
        nll = np.zeros((len(documents), 8192))
        for i, d in enumerate(documents):
            target = torch.from_numpy(d[1:].astype(np.int64)).cuda()
            nll[i] = F.cross_entropy(self.logits(d[:-1]), target, reduction="none").cpu().numpy()
        report = {"documents": len(documents), "steps": self.steps, "perplexity": {}, "recall": {}}
        for name, a, b in (("0-1k", 0, 1024), ("1-4k", 1024, 4096), ("4-8k", 4096, 8192), ("all", 0, 8192)):
            report["perplexity"][name] = float(np.exp(nll[:, a:b].mean()))
        report["perplexity"]["bigram"] = self.bigram(documents)
        by_document = nll[:, 4096:].mean(1) - nll[:, :1024].mean(1)
        report["late_minus_early_nll"] = [float(by_document.mean()), float(1.96 * by_document.std() / len(documents) ** 0.5)]
        for distance in (512, 2048, 8000):
            right = count = 0
            while count < 2000:
                ids, answers = self.tasks.probe(distance, min(8192, distance + 256 + 40))
                best = self.logits(ids).argmax(-1).cpu().numpy()
                for a in answers:
                    right += int(best[a - 1] == ids[a] and best[a] == ids[a + 1])
                    count += 1
            report["recall"][str(distance)] = right / count
        for moe in self.model.moes():
            moe.load.zero_()
        self.model.train()
        for d in documents[:16]:
            self.logits(d[:-1])
        load = torch.stack([m.load / m.load.sum() * len(m.load) for m in self.model.moes()])
        report["expert_load_over_mean"] = {"min": float(load.min()), "max": float(load.max())}
        for moe in self.model.moes():
            moe.load.zero_()
        return report

    def bigram(self, documents):
        """Perplexity of an interpolated bigram model counted on the training text."""
        v, stream = Config.vocab_size, self.train_stream.astype(np.int64)
        pairs = np.bincount(stream[:-1] * v + stream[1:], minlength=v * v).reshape(v, v).astype(np.float64)
        unigram = (np.bincount(stream, minlength=v) + 1) / (len(stream) + v)
        seen, kinds = pairs.sum(1, keepdims=True), (pairs > 0).sum(1, keepdims=True)
        # Witten-Bell: as much weight for the unigram as the context has shown kinds of followers.
        table = (pairs + np.maximum(kinds, 1) * unigram) / (seen + np.maximum(kinds, 1))
        d = np.concatenate([table[x[:-1].astype(int), x[1:].astype(int)] for x in documents])
        return float(np.exp(-np.log(d).mean()))

    def export(self):
        out = self.work / "model"
        out.mkdir(exist_ok=True)
        save_file(self.model.published_tensors(), out / "model.safetensors", metadata={"format": "pt"})
        (out / "config.json").write_text(json.dumps(Config().huggingface(), indent=1) + "\n")
        (out / "tokenizer.json").write_bytes((self.work / "tokenizer.json").read_bytes())
        (out / "tokenizer_config.json").write_text(json.dumps({
            "add_bos_token": True, "add_eos_token": False, "bos_token": SPECIAL[0], "eos_token": SPECIAL[1],
            "pad_token": SPECIAL[1], "clean_up_tokenization_spaces": False, "model_max_length": Config.max_position_embeddings,
            "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT}, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--minutes", default="8,4,5", help="minutes of each phase")
    parser.add_argument("--seed", type=int, default=1)
    run = Run(parser.parse_args())
    while run.phase < len(LENGTHS):
        run.train_phase()
        report = run.measure() if run.phase else {}
        print(json.dumps(report), flush=True)
        (run.work / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        run.export()
    print("done", flush=True)


if __name__ == "__main__":
    main()
