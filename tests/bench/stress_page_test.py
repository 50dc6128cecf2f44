#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Defends: stress_page.py shows violations, every kind of fault and what was skipped, and its plots are well-formed and have
a mark for each move and each time in which something was done; of an empty run too."""
import unittest
import xml.etree.ElementTree as xml

import stress_page
import stress_plots

SPREAD = {"p50": 1234.5, "p99": 2, "max": 3, "count": 7}
REPORT = {"program": "strait stress 1", "seconds": 600.2, "clients": 4, "requests": 8, "min_rows": 64, "max_rows": 6000, "seed": 1,
          "streams": 1500, "sequences": 1700, "violations": 3, "migrations": 1000, "migrations_of_1000_rows": 612,
          "migrations_of_4000_rows": 101, "recovered_sequences": 41, "interrupted_sequences": 42, "recomputed_tokens": 1234,
          "protected_share": 0.9951, "moved_bytes": 3_210_000_000, "gb_per_s": 0.0451, "restored_rows": 77,
          "skipped_faults": ["partition"], "pause_ms": SPREAD, "pause_told_ms": SPREAD, "move_ms": SPREAD, "move_rows": SPREAD,
          "moves": [[1.5, 100, 9, 20.0, 3.25], [2.5, 5000, 9, 20.0, None], [3.5, 4000, 9, 20.0, -1.0]],
          "move_rows_histogram": [{"from": 64.0, "to": 128.0, "count": 1}, {"from": 128.0, "to": 1e12, "count": 2}],
          "timeline": {"bin_s": 5.0, "tokens": [10, 0, 30], "death": [0, 2, 1], "join": [1, 0, 0]},
          **{key: 100 + i for i, (key, _) in enumerate(stress_page.FAULTS) if key != "migrations"}}
EMPTY = {**REPORT, "streams": 0, "migrations": 0, "moves": [], "move_rows_histogram": [], "timeline": {"bin_s": 1.0, "tokens": [0]}}


def marks(svg, tag):
    return len(xml.fromstring(svg).findall("{http://www.w3.org/2000/svg}" + tag))


class PageTest(unittest.TestCase):
    def test_what_was_judged_and_done(self):
        text, plots = stress_page.page({"cpu": REPORT})
        for line in ("| **violations** | **3** |", "| moves of 1,000 rows and more | 612, 61.2 % |", "| skipped faults | partition |",
                     "| sequences that went on after a failure | 41 of 42 |", "| decode time protected by copies | 99.5 % |",
                     "| moved | 3.21 GB, at 0.045 GB/s while a move lasted |", "| pause at the client, ms | 1,234.5 | 2.0 | 3.0 | 7 |"):
            self.assertIn(line + "\n", text)
        for i, (key, what) in enumerate(stress_page.FAULTS):
            self.assertIn(f"| {what} | {REPORT[key]:,} |\n", text)
        self.assertNotIn("goals", text)
        self.assertIn("\nOn a machine.\n", stress_page.page({"cpu": {**REPORT, "note": "On a machine."}})[0])
        self.assertEqual(set(plots), {"stress_cpu_time.svg", "stress_cpu_pauses.svg", "stress_cpu_rows.svg"})
        for name in plots:
            self.assertIn(f"]({name})", text)

    def test_acceptance_and_absence(self):
        text, _ = stress_page.page({"a": {**REPORT, "missed": ["reshapes: 3, at least 20"]}, "b": {**REPORT, "missed": []}})
        self.assertIn("it missed:\n\n- reshapes: 3, at least 20\n", text)
        self.assertIn("it missed none.\n", text)
        without = {key: value for key, value in REPORT.items() if key != "protected_share"}
        self.assertIn("protected by copies | none |", stress_page.page({"a": {**without, "skipped_faults": []}})[0])

    def test_plots(self):
        self.assertEqual(marks(stress_plots.over_time(REPORT), "circle"), 3)  # two times of deaths, one of a join
        self.assertEqual(marks(stress_plots.over_time(REPORT), "rect"), 1 + 3)
        self.assertEqual(marks(stress_plots.pauses(REPORT), "circle"), 2)  # one move's pause is not known
        self.assertEqual(marks(stress_plots.rows(REPORT), "rect"), 1 + 2)

    def test_an_empty_run(self):
        _, plots = stress_page.page({"cpu": EMPTY})
        for svg in plots.values():
            xml.fromstring(svg)


if __name__ == "__main__":
    unittest.main()
