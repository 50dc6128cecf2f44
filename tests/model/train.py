#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains the reference model from corpus.py's files and writes a Hugging Face directory.

  train.py --corpus DIR --work DIR [--seed N] [--steps 3000,1500,900]

Three phases of growing length. State is saved every minute and at the end of a phase under --work; the same command
resumes. Afterwards WORK/model holds config.json, model.safetensors, tokenizer.json, tokenizer_config.json, and
WORK/report.json the measured quality. DIR/tokenizer.json is made from the corpus if it is not there. Needs one GPU,
PyTorch 2.6 or newer, tokenizers, safetensors.
"""
import argparse
import collections
import concurrent.futures as cf
import json
import lzma
import multiprocessing
import pathlib
import time

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from model import Config, Model
from tasks import Tasks

LENGTHS = (512, 2048, 8192)
TOKENS_PER_STEP = (65536, 65536, 131072)
TASK_SHARE = (0.40, 0.35, 0.30)      # of the rows; the rest is text
PLATEAU = (1.0, 0.6, 0.4)            # of the base learning rates, by phase
WARM_UP_STEPS = 100
MUON_RATE, ADAM_RATE = 0.02, 0.004
BALANCE_RATE = (0.02, 0.005, 0.002)
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
    """g [n, rows, cols] -> the nearest semi-orthogonal matrices, by Newton-Schulz (Muon, Jordan et al. 2024)."""
    x = g.bfloat16()
    flip = x.shape[1] > x.shape[2]
    x = x.mT if flip else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if flip else x


class Muon:
    """Matrices of one shape go through the iteration together."""

    def __init__(self, params):
        groups = {}
        for p in params:
            groups.setdefault(tuple(p.shape), []).append(p)
        self.groups = list(groups.values())
        self.momentum = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]

    @torch.no_grad()
    def step(self, rate):
        """rate: 0-dimensional tensor."""
        for group, m in zip(self.groups, self.momentum):
            grad = torch.stack([p.grad for p in group])
            m.lerp_(grad, 0.05)
            update = orthogonalized(grad.lerp(m, 0.95)).float()
            update *= -max(1, group[0].shape[0] / group[0].shape[1]) ** 0.5 * rate
            torch._foreach_mul_(group, 1 - 0.1 * rate)
            torch._foreach_add_(group, list(update.unbind(0)))


def make_batch(*arguments):
    return TASKS.batch(*arguments)


def losses(logits, targets, weights, kinds):
    """Weighted loss, and for each kind of row: [summed loss, right answers, count] of what counts in it (of text
    tokens only in text rows, of answers only in recall rows)."""
    per_token = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    right = (logits.argmax(-1) == targets).float()
    loss = (per_token * weights).sum() / weights.sum()
    counted = (weights > 1.5) | ((weights > 0) & ((kinds == 0) | (kinds == 3))[:, None])
    out = []
    for kind in range(4):
        these = (counted & (kinds == kind)[:, None]).float()
        out.append(torch.stack(((per_token.detach() * these).sum(), (right * these).sum(), these.sum())))
    return loss, torch.stack(out, 1)


class Run:
    def __init__(self, args):
        self.work, self.seed, self.args = args.work, args.seed, args
        self.steps_of = [int(n) for n in args.steps.split(",")]
        self.work.mkdir(parents=True, exist_ok=True)
        docs, heldout = read(args.corpus / "train.jsonl.xz"), read(args.corpus / "heldout.jsonl.xz")
        self.tokenizer = make_tokenizer(docs, args.corpus / "tokenizer.json")
        self.heldout, train = encode(self.tokenizer, heldout), encode(self.tokenizer, docs)
        self.tasks = Tasks(self.tokenizer, train)
        print(f"{len(self.tasks.stream) / 1e6:.1f} M tokens, {len(self.tasks.words)} words, held out "
              f"{sum(len(d) >= 8193 for d in self.heldout)} documents of 8192 tokens or more", flush=True)
        # Batches are made by processes that are forked before the GPU is touched.
        global TASKS
        TASKS = self.tasks
        self.pool = cf.ProcessPoolExecutor(args.processes, mp_context=multiprocessing.get_context("fork"))
        list(self.pool.map(abs, range(args.processes)))
        torch.manual_seed(args.seed)
        torch.set_float32_matmul_precision("high")
        self.model = Model(Config()).cuda()
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n
                    and not n.endswith("gate")]
        chosen = set(map(id, matrices))
        self.muon = Muon(matrices)
        self.adam_rate, self.muon_rate = torch.zeros((), device="cuda"), torch.zeros((), device="cuda")
        self.adam = torch.optim.AdamW([p for p in self.model.parameters() if id(p) not in chosen], lr=self.adam_rate,
                                      betas=(0.9, 0.95), weight_decay=0.0, fused=True, capturable=True)
        self.phase, self.done = 0, 0  # steps done in this phase
        for layer in self.model.layers:  # one compilation serves all layers of a kind
            layer.compile(dynamic=False)
        self.score = torch.compile(losses, dynamic=False)
        if (self.work / "state.pt").exists():
            self.load()

    def save(self):
        torch.save({"model": self.model.state_dict(), "adam": self.adam.state_dict(), "muon": self.muon.momentum,
                    "phase": self.phase, "done": self.done}, self.work / "state.tmp")
        (self.work / "state.tmp").rename(self.work / "state.pt")

    def load(self):
        state = torch.load(self.work / "state.pt", map_location="cuda")
        self.model.load_state_dict(state["model"])
        self.adam.load_state_dict(state["adam"])
        for group in self.adam.param_groups:
            group["lr"] = self.adam_rate
        self.muon.momentum = state["muon"]
        self.phase, self.done = state["phase"], state["done"]
        print(f"resumed in phase {self.phase} after {self.done} steps", flush=True)

    def rate(self):
        """Of the base learning rates: warm-up, then a plateau for each phase; the last one falls to nothing."""
        share = self.done / self.steps_of[self.phase]
        if self.phase == 0:
            return PLATEAU[0] * min(1, (self.done + 1) / WARM_UP_STEPS)
        return PLATEAU[self.phase] * (1 if self.phase + 1 < len(LENGTHS) else max(0.01, 1 - share))

    def step(self, ids, weights, kinds):
        for p in self.model.parameters():
            p.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            logits = self.model(ids[:, :-1])
        loss, per_kind = self.score(logits, ids[:, 1:], weights, kinds)
        loss.backward()
        self.seen += per_kind
        torch.nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], 1.0)
        self.adam.step()
        self.muon.step(self.muon_rate)
        for moe in self.model.moes():
            moe.balance(BALANCE_RATE[self.phase])

    def train_phase(self):
        length, rows, steps = LENGTHS[self.phase], TOKENS_PER_STEP[self.phase] // LENGTHS[self.phase], self.steps_of[self.phase]
        self.model.train()
        self.seen = torch.zeros(3, 4, device="cuda")  # by kind of row: summed loss, right answers, count
        batch = (torch.zeros(rows, length + 1, dtype=torch.int64, device="cuda"), torch.zeros(rows, length, device="cuda"),
                 torch.zeros(rows, dtype=torch.int8, device="cuda"))
        share, ahead, asked, graph = TASK_SHARE[self.phase], collections.deque(), self.done, None
        began, saved, first = time.time(), time.time(), self.done
        stream = torch.cuda.current_stream()
        while self.done < steps:
            while len(ahead) < 3 * self.args.processes and asked < steps:
                ahead.append(self.pool.submit(make_batch, self.seed, 1_000_000 * self.phase + asked, rows, length, share))
                asked += 1
            for to, made in zip(batch, ahead.popleft().result()):
                to.copy_(torch.from_numpy(made).pin_memory(), non_blocking=True)
            self.adam_rate.fill_(ADAM_RATE * self.rate())
            self.muon_rate.fill_(MUON_RATE * self.rate())
            if self.done == first + 3:
                # A step is thousands of small launches; recorded once, it is replayed without the host's time.
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    self.step(*batch)
                torch.cuda.synchronize()
                print(f"phase {self.phase}: compiled and recorded in {time.time() - began:.0f} s", flush=True)
                began = time.time()
            graph.replay() if graph else self.step(*batch)
            self.done += 1
            if self.done % 100 == 0 or self.done == steps:
                nll, right = (self.seen[0] / self.seen[2]).tolist(), (self.seen[1] / self.seen[2]).tolist()
                load = torch.stack([m.last_load / m.last_load.mean() for m in self.model.moes()])
                print(f"phase {self.phase} step {self.done}/{steps} {time.time() - began:4.0f} s  text {nll[0]:.3f}  "
                      f"right: dense {right[1]:.3f} sparse {right[2]:.3f} copy {right[3]:.3f}  "
                      f"load {float(load.min()):.2f}-{float(load.max()):.2f}", flush=True)
                self.seen.zero_()
            if time.time() - saved > 60:
                torch.cuda.synchronize()
                self.save()
                saved = time.time()
        del graph
        self.phase, self.done = self.phase + 1, 0
        self.save()

    # ------------------------------------------------------------------ quality

    @torch.no_grad()
    def logits(self, ids):
        # Lengths vary here: compiling for each would take longer than it saves.
        with torch.compiler.set_stance("force_eager"), torch.autocast("cuda", torch.bfloat16):
            return self.model(torch.from_numpy(ids.astype(np.int64))[None].cuda())[0].float()

    @torch.no_grad()
    def measure(self):
        self.model.eval()
        documents = [d[:8193] for d in self.heldout if len(d) >= 8193]
        nll = np.zeros((len(documents), 8192))
        for i, d in enumerate(documents):
            target = torch.from_numpy(d[1:].astype(np.int64)).cuda()
            nll[i] = F.cross_entropy(self.logits(d[:-1]), target, reduction="none").cpu().numpy()
        report = {"documents": len(documents), "seed": self.seed, "steps": self.steps_of, "perplexity": {}, "recall": {}}
        for name, a, b in (("0-1k", 0, 1024), ("1-4k", 1024, 4096), ("4-8k", 4096, 8192), ("all", 0, 8192)):
            report["perplexity"][name] = float(np.exp(nll[:, a:b].mean()))
        report["perplexity"]["bigram"] = self.bigram(documents)
        by_document = nll[:, 4096:].mean(1) - nll[:, :1024].mean(1)
        report["late_minus_early_nll"] = [float(by_document.mean()), float(1.96 * by_document.std() / len(documents) ** 0.5)]
        rng = np.random.default_rng(1234)
        for distance in (512, 2048, 8000):
            right = count = 0
            while count < 2000:
                ids, answers = self.tasks.probe(rng, distance, 8192)
                best = self.logits(ids[:-1]).argmax(-1).cpu().numpy()
                right += int((best[answers - 1] == ids[answers]).sum())
                count += len(answers)
            report["recall"][str(distance)] = right / count
        self.model.train()  # counts the load
        for moe in self.model.moes():
            moe.load.zero_()
        for d in documents:
            self.logits(d[:-1])
        report["expert_load_over_mean_by_layer"] = [[round(x, 3) for x in sorted((m.load / m.load.mean()).tolist())]
                                                    for m in self.model.moes()]
        for moe in self.model.moes():
            moe.load.zero_()
        return report

    def bigram(self, documents):
        """Perplexity of an interpolated bigram model counted on the training text."""
        v, stream = Config.vocab_size, self.tasks.stream.astype(np.int64)
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
        (out / "tokenizer.json").write_bytes((self.args.corpus / "tokenizer.json").read_bytes())
        (out / "tokenizer_config.json").write_text(json.dumps({
            "add_bos_token": True, "add_eos_token": False, "bos_token": SPECIAL[0], "eos_token": SPECIAL[1],
            "pad_token": SPECIAL[1], "clean_up_tokenization_spaces": False, "model_max_length": Config.max_position_embeddings,
            "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT}, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--steps", default="3000,1500,900", help="steps of each phase")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=6, help="that make batches")
    run = Run(parser.parse_args())
    with torch.cuda.stream(torch.cuda.Stream()):  # the default stream cannot be recorded
        while run.phase < len(LENGTHS):
            run.train_phase()
    torch.cuda.synchronize()
    report = run.measure()
    print(json.dumps(report), flush=True)
    (run.work / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    run.export()
    print("done", flush=True)


if __name__ == "__main__":
    main()
