# SPDX-License-Identifier: Apache-2.0
"""Generated long-range tasks, as token ids, and the batches that mix them with text.

Recall: pairs "\\n@ w1 w2 = w3 w4" (two key words, two value words, each one token) lie among text or among each
other; later "\\n? w1 w2 = w3 w4" asks for some of them. Copying: a run of words, then "\\n+" and the run again. Only
what can be known counts in the loss: text, answers, the second run; random words carry no weight.
"""
import numpy as np


class Tasks:
    def __init__(self, tokenizer, docs, rng):
        """docs: list of uint16 arrays, each starting with the begin-of-sentence token."""
        ids = {t: i for t, i in tokenizer.get_vocab().items()}
        # Words that are one token with a leading space ("Ġ" in byte-level BPE), letters only, so that encoding the
        # written task gives the same ids.
        self.words = np.array(sorted(i for t, i in ids.items() if t[0] == "\u0120" and t[1:].isascii()
                                     and t[1:].isalpha() and len(t) >= 3), dtype=np.int64)
        one = lambda text: self._encode(tokenizer, text)
        self.define, self.ask, self.equals, self.copy = one("\n@"), one("\n?"), one(" ="), one("\n+")
        self.bos, self.rng = tokenizer.token_to_id("<|begin_of_text|>"), rng
        self.stream = np.concatenate(docs)
        self.docs = docs

    @staticmethod
    def _encode(tokenizer, text):
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def text(self, n):
        start = self.rng.integers(0, len(self.stream) - n)
        return self.stream[start:start + n].astype(np.int64), np.ones(n, np.float32)

    def document(self, n):
        """One document from its start where one is long enough, so that far context is of the same document."""
        for _ in range(64):
            doc = self.docs[self.rng.integers(len(self.docs))]
            if len(doc) >= n:
                return doc[:n].astype(np.int64), np.ones(n, np.float32)
        return self.text(n)

    def pair_length(self):
        return len(self.define) + 4 + len(self.equals)

    def recall(self, n, queries, filler):
        """n tokens: pairs (among text when `filler`), then `queries` questions spread over all distances."""
        per = self.pair_length()
        body = n - 1 - queries * per
        pairs = max(queries, int(body / per)) if not filler else max(4, min(body // per, int(queries * self.rng.uniform(1, 3))))
        pairs = min(pairs, body // per)
        keys = self.unique_keys(pairs)
        values = self.words[self.rng.integers(0, len(self.words), (pairs, 2))]
        out, weight = [np.array([self.bos])], [np.zeros(1, np.float32)]
        slack = body - pairs * per
        cuts = np.sort(self.rng.integers(0, slack + 1, pairs)) if filler else np.full(pairs, slack)
        text, text_weight = self.text(max(slack, 1))
        at = 0
        for k, v, cut in zip(keys, values, cuts):
            if cut > at and filler:
                out.append(text[at:cut]); weight.append(text_weight[at:cut]); at = cut
            out.append(np.concatenate((self.define, k, self.equals, v)))
            weight.append(np.zeros(per, np.float32))
        if slack > at:
            out.append(text[at:slack]); weight.append(text_weight[at:slack])
        replace = pairs < queries
        for i in self.rng.choice(pairs, queries, replace=replace):
            out.append(np.concatenate((self.ask, keys[i], self.equals, values[i])))
            w = np.zeros(per, np.float32)
            w[-2:] = 1
            weight.append(w)
        return np.concatenate(out)[:n], np.concatenate(weight)[:n]

    def unique_keys(self, count):
        w = len(self.words)
        flat = self.rng.choice(w * w, count, replace=False)
        return np.stack((self.words[flat // w], self.words[flat % w]), 1)

    def copying(self, n):
        run = (n - 1 - len(self.copy)) // 2
        words = self.words[self.rng.integers(0, len(self.words), run)]
        ids = np.concatenate(([self.bos], words, self.copy, words))
        weight = np.concatenate((np.zeros(1 + run + len(self.copy)), np.ones(run))).astype(np.float32)
        pad, pad_weight = self.text(n - len(ids)) if n > len(ids) else (np.zeros(0, np.int64), np.zeros(0, np.float32))
        return np.concatenate((ids, pad)), np.concatenate((weight, pad_weight))

    def probe(self, distance, n):
        """One context with questions whose definitions begin close to `distance` tokens before the question: a
        block of pairs, text, a block of questions in the same order. Returns ids and the positions of answers."""
        per = self.pair_length()
        count = max(1, min(32, distance // per // 2))
        keys = self.unique_keys(count)
        values = self.words[self.rng.integers(0, len(self.words), (count, 2))]
        gap = distance - count * per
        text, _ = self.text(max(1, n - 1 - 2 * count * per))
        lead = len(text) - gap
        out = [np.array([self.bos]), text[:max(lead, 0)]]
        out += [np.concatenate((self.define, k, self.equals, v)) for k, v in zip(keys, values)]
        out.append(text[max(lead, 0):max(lead, 0) + gap])
        answers, at = [], sum(map(len, out))
        for k, v in zip(keys, values):
            out.append(np.concatenate((self.ask, k, self.equals, v)))
            at += per
            answers.append(at - 2)
        return np.concatenate(out), np.array(answers)

    def batch(self, rows, n, recall_share):
        """[rows, n + 1] ids and [rows, n] weights of the predictions."""
        ids, weights = np.zeros((rows, n + 1), np.int64), np.zeros((rows, n + 1), np.float32)
        for r in range(rows):
            u = self.rng.random()
            if u < recall_share * 0.45:
                i, w = self.recall(n + 1, int(min(n // 3 // self.pair_length(), self.rng.integers(16, 129))), False)
            elif u < recall_share * 0.9:
                i, w = self.recall(n + 1, int(min(n // 3 // self.pair_length(), self.rng.integers(8, 65))), True)
            elif u < recall_share:
                i, w = self.copying(n + 1)
            elif n >= 2048 or self.rng.random() < 0.5:
                i, w = self.document(n + 1)
            else:
                i, w = self.text(n + 1)
            ids[r, :len(i)], weights[r, :len(w)] = i, w
        return ids, weights[:, 1:]
