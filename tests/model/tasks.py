# SPDX-License-Identifier: Apache-2.0
"""Generated long-range tasks, as token ids, and the batches that mix them with text.

Recall: a definition "\\n@ key value" (key and value are words of one token each) lies far back, among text or among
other definitions; "\\n? key value" asks for it. Copying: a run of words, then "\\n+" and the run again. Only what can
be known counts in the loss: text, answers, the second run; random words carry no weight.
"""
import numpy as np

LINE = 4                 # tokens of a definition and of a question
ANSWER_WEIGHT = 6.0      # of an answer in the loss; a token of text has 1
KINDS = ("text", "dense", "sparse", "copy")
SHARES = (0.45, 0.35, 0.20)  # of the tasks' rows: dense recall, recall among text, copying


class Tasks:
    def __init__(self, tokenizer, docs):
        """docs: list of uint16 arrays, each starting with the begin-of-sentence token."""
        ids = tokenizer.get_vocab()
        # Words that are one token with a leading space ("Ġ" in byte-level BPE), letters only, so that encoding the
        # written task gives the same ids.
        self.words = np.array(sorted(i for t, i in ids.items() if t[0] == "\u0120" and t[1:].isascii()
                                     and t[1:].isalpha() and len(t) >= 3), dtype=np.int64)
        one = lambda text: np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)
        self.define, self.ask, self.copy = one("\n@"), one("\n?"), one("\n+")
        assert len(self.define) == len(self.ask) == len(self.copy) == 2
        self.bos = tokenizer.token_to_id("<|begin_of_text|>")
        self.stream = np.concatenate(docs)
        self.docs = docs

    # ---- Pieces ----

    def text(self, rng, n):
        start = rng.integers(0, len(self.stream) - n)
        return self.stream[start:start + n].astype(np.int64)

    def document(self, rng, n):
        """One document from its start where one is long enough, so that far context is of the same document."""
        for _ in range(64):
            doc = self.docs[rng.integers(len(self.docs))]
            if len(doc) >= n:
                return doc[:n].astype(np.int64)
        return self.text(rng, n)

    def pairs(self, rng, count):
        """Keys, all different, and values, none of them a key here."""
        words = rng.permutation(self.words)
        count = min(count, len(words) * 2 // 3)
        return words[:count], words[count + rng.integers(0, len(words) - count, count)]

    def lines(self, marker, keys, values):
        """[count, LINE] ids."""
        out = np.empty((len(keys), LINE), np.int64)
        out[:, :2], out[:, 2], out[:, 3] = marker, keys, values
        return out

    # ---- Rows: ids [n], weight of each id as a prediction [n] ----

    def dense(self, rng, n):
        """Definitions and questions only. Few pairs are asked often, many once: from easy to hard."""
        slots = (n - 1) // LINE
        keys, values = self.pairs(rng, int(np.exp(rng.uniform(np.log(4), np.log(slots // 2)))))
        pairs = len(keys)
        order = np.concatenate([rng.permutation(pairs) for _ in range(-(-(slots - pairs) // pairs))])[:slots - pairs]
        ids, weight = np.zeros(n, np.int64), np.zeros(n, np.float32)
        ids[0] = self.bos
        table = np.concatenate((self.lines(self.define, keys, values), self.lines(self.ask, keys[order], values[order])))
        ids[1:1 + slots * LINE] = table.ravel()
        weight[1 + pairs * LINE + LINE - 1:1 + slots * LINE:LINE] = ANSWER_WEIGHT
        return ids, weight

    def sparse(self, rng, n):
        """Definitions strewn over text, questions anywhere behind them; the text counts too."""
        keys, values = self.pairs(rng, int(rng.integers(4, max(5, min(160, n // 24)))))
        pairs = len(keys)
        slack = n - 1 - 2 * pairs * LINE
        text = self.text(rng, slack)
        # A definition's place in the text, and its question's: at a random distance, or both at random places.
        at = rng.integers(0, slack + 1, pairs) if rng.random() < 0.5 else rng.integers(0, max(1, slack // 8), pairs)
        then = np.array([rng.integers(a, slack + 1) for a in at]) if rng.random() < 0.5 else \
            np.maximum(at, slack - rng.integers(0, max(1, slack // 8), pairs))
        events = sorted([(a, 0, i) for i, a in enumerate(at)] + [(a, 1, i) for i, a in enumerate(then)])
        ids, weight, cursor, taken = np.zeros(n, np.int64), np.zeros(n, np.float32), 1, 0
        ids[0] = self.bos
        define, ask = self.lines(self.define, keys, values), self.lines(self.ask, keys, values)
        for place, question, i in events:
            run = place - taken
            ids[cursor:cursor + run], weight[cursor:cursor + run] = text[taken:place], 1
            cursor, taken = cursor + run, place
            ids[cursor:cursor + LINE] = (ask if question else define)[i]
            if question:
                weight[cursor + LINE - 1] = ANSWER_WEIGHT
            cursor += LINE
        ids[cursor:], weight[cursor:] = text[taken:taken + n - cursor], 1
        return ids, weight

    def copying(self, rng, n):
        run = int(rng.integers(8, min(512, (n - 3) // 2)))
        ids, weight, cursor = np.zeros(n, np.int64), np.zeros(n, np.float32), 1
        ids[0] = self.bos
        while cursor + 2 * run + 2 <= n:
            words = self.words[rng.integers(0, len(self.words), run)]
            ids[cursor:cursor + 2 * run + 2] = np.concatenate((words, self.copy, words))
            weight[cursor + run + 3:cursor + 2 * run + 2] = 1
            cursor += 2 * run + 2
        ids[cursor:], weight[cursor:] = self.text(rng, n - cursor), 1
        return ids, weight

    def batch(self, seed, step, rows, n, task_share):
        """[rows, n + 1] ids, [rows, n] weights of the predictions, [rows] kinds. A function of its arguments."""
        rng = np.random.default_rng((seed, step))
        ids, weights, kinds = np.zeros((rows, n + 1), np.int64), np.zeros((rows, n + 1), np.float32), np.zeros(rows, np.int8)
        for r in range(rows):
            u = rng.random() / task_share
            if u < SHARES[0]:
                kinds[r], (i, w) = 1, self.dense(rng, n + 1)
            elif u < SHARES[0] + SHARES[1]:
                kinds[r], (i, w) = 2, self.sparse(rng, n + 1)
            elif u < 1:
                kinds[r], (i, w) = 3, self.copying(rng, n + 1)
            else:
                i = self.document(rng, n + 1) if n >= 2048 or rng.random() < 0.5 else self.text(rng, n + 1)
                w = np.ones(n + 1, np.float32)
            ids[r], weights[r] = i, w
        return ids, weights[:, 1:], kinds

    # ---- Measuring ----

    def probe(self, rng, distance, n):
        """One context of at most n tokens: text, a block of definitions, text, the questions in the same order, so
        that every answer lies exactly `distance` tokens behind the value that it repeats. Returns ids and the
        positions of the answers."""
        count = min(64, distance // 2 // LINE, (n - 1 - distance) // LINE)
        keys, values = self.pairs(rng, count)
        gap = distance - count * LINE
        lead = rng.integers(0, max(1, n - distance - count * LINE))
        text = self.text(rng, lead + gap)
        ids = np.concatenate(([self.bos], text[:lead], self.lines(self.define, keys, values).ravel(), text[lead:],
                              self.lines(self.ask, keys, values).ravel()))
        return ids, 1 + lead + distance + LINE - 1 + LINE * np.arange(count)
