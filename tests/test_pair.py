"""The two files side by side: what differs is marked, in both, and nothing else is."""

import difflib
import re

from conftest import ROOT

import diffusion
import gpt

GPT, DIFFUSION = ((ROOT / f"{m.name}.py").read_text().splitlines() for m in (gpt, diffusion))
CHANGES = difflib.SequenceMatcher(None, GPT, DIFFUSION, autojunk=False).get_opcodes()


def test_every_hunk_says_in_both_files_which_of_the_five_changes_it_is():
    """Where one file has no line, the other says it alone; the first line is what the file is."""
    for op, i, j, k, n in CHANGES:
        for lines in (GPT[i:j], DIFFUSION[k:n]):
            if op != "equal" and lines and j > 1:
                assert re.search(r"# .*\[[1-5]\]", "\n".join(lines)), lines


def test_both_files_mark_each_of_the_five_changes_and_nothing_that_does_not_differ():
    for lines in (GPT, DIFFUSION):
        assert set(re.findall(r"# \[([1-5])\]", "\n".join(lines))) == set("12345")
    equal = [line for op, i, j, _, _ in CHANGES if op == "equal" for line in GPT[i:j]]
    assert not [line for line in equal if re.search(r"#.*\[[1-5]\]", line)]


def test_the_legend_is_the_same_in_both():
    (legend, other) = (module.__doc__.split("\n", 1)[1] for module in (gpt, diffusion))
    assert legend == other and re.findall(r"^\[(\d)\]", legend, re.M) == list("12345")
