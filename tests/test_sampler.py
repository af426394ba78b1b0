"""Generation, of both; the rule that says which characters a pass commits, and its likelihood."""

import itertools
import math

import pytest
import torch
from conftest import CHARS, random_model

import diffusion
import gpt


def slowly(doubt, holes, spacing):
    """The rule by its definition. doubt: the lower, the more certain."""
    chosen = set()
    for i in sorted(holes, key=lambda i: (doubt[i], i)):
        if all(abs(i - j) >= spacing for j in chosen):
            chosen.add(i)
    return chosen


@pytest.mark.parametrize("spacing", [1, 2, 3, 8, 40, 256, 10**9])
def test_the_rule_is_the_slow_one(spacing):
    """Logits come from five distributions, from certain to uniform, so that most of them tie."""
    levels = torch.tensor(
        [[500.0, 0, 0, 0], [4, 0, 0, 0], [2, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    )
    generator = torch.Generator().manual_seed(spacing)
    for length, share in itertools.product((1, 7, 40, 256), (0.0, 0.1, 0.5, 1.0)):
        for highest in (1, 3, 5):
            level = torch.randint(highest, (3, length), generator=generator)
            holes = torch.rand(3, length, generator=generator) < share
            chosen = diffusion.most_certain(levels[level], holes, spacing)
            for row in range(3):
                places = holes[row].nonzero().flatten().tolist()
                assert set(chosen[row].nonzero().flatten().tolist()) == slowly(
                    level[row].tolist(), places, spacing
                )


@pytest.fixture
def filled(monkeypatch):
    """Each pass of diffusion.generate: the block before and after it, and the spacing it kept."""
    calls, fill = [], diffusion.fill

    def watch(model, block, temp, spacing):
        before = block.clone()
        fill(model, block, temp, spacing)
        calls.append((before, block.clone(), spacing))

    monkeypatch.setattr(diffusion, "fill", watch)
    return calls


def holes(block):
    return (block == len(CHARS)).nonzero().flatten().tolist()


def blocks(calls):
    """Per block: the places it wrote, its passes of the draft, and those of the second look."""
    found, calls = [], iter(calls)
    for first in calls:
        written, draft = holes(first[0]), [first]
        while holes(draft[-1][1]):
            draft.append(next(calls))
        found.append((written, draft, list(itertools.islice(calls, min(8, len(written))))))
    return found


@pytest.mark.parametrize("length", [0, 1, 239, 240, 241, 700])
@pytest.mark.parametrize("spacing", [1, 8, 256])
def test_every_pass_of_a_draft_fills_what_is_free(length, spacing, filled):
    """Characters of one pass are far enough apart, none could have been added, no other changes."""
    model, prompt = random_model(diffusion), "ab_d ______ef_"
    texts = list(diffusion.generate(model, prompt, length, spacing=spacing))
    assert len(texts) == len(filled) and len(texts[-1]) == len(prompt) + length
    assert "_" not in texts[-1]
    for _, draft, _ in blocks(filled):
        for before, after, kept in draft:
            new = sorted(set(holes(before)) - set(holes(after)))
            assert kept == spacing and new
            assert all(b - a >= spacing for a, b in itertools.pairwise(new))
            assert all(min(abs(i - j) for j in new) < spacing for i in holes(after))
            changed = (before != after).nonzero().flatten().tolist()
            assert changed == new
    written = sum(len(places) for places, _, _ in blocks(filled))
    assert written == prompt.count("_") + length


@pytest.mark.parametrize("prompt, length", [("abc", 600), ("ab_d ______ef_", 0), ("_", 300)])
def test_a_second_look_writes_each_character_of_the_block_once_more(prompt, length, filled):
    """And nothing else: no character of the prompt, none of another block, all in eight passes."""
    texts = list(diffusion.generate(random_model(diffusion), prompt, length))
    for written, draft, look in blocks(filled):
        assert len(look) == min(8, len(written))
        hidden = [holes(before) for before, _, _ in look]
        assert sorted(itertools.chain(*hidden)) == written
        rank = {place: n for n, place in enumerate(written)}
        for places, (before, after, _) in zip(hidden, look, strict=True):
            assert all(rank[b] - rank[a] == 8 for a, b in itertools.pairwise(places))
            changed = (before != after).nonzero().flatten().tolist()
            assert changed == places and not holes(after)
        for (_, after, _), (before, _, _) in itertools.pairwise([draft[-1], *look]):
            kept = before != len(CHARS)
            assert torch.equal(after[kept], before[kept])
    for place, char in enumerate(prompt):
        assert char == "_" or texts[-1][place] == char


def mended(logits, monkeypatch):
    """The ids of a draft with every third character damaged, and those after its second look."""
    model, drafts = Sure(logits), []
    fill = diffusion.fill

    def damage(model, block, temp, spacing):
        fill(model, block, temp, spacing)
        if spacing == 1:  # the draft, in one pass
            block[2::3] = (block[2::3] + 1) % 3
            drafts.append(block.tolist())

    monkeypatch.setattr(diffusion, "fill", damage)
    *_, text = diffusion.generate(model, "", 200, spacing=1)
    return drafts[0], model.tokenizer.encode(text).tolist()


class Sure(torch.nn.Module):
    """A model with the same logits (T, V) whatever it reads."""

    def __init__(self, logits):
        super().__init__()
        self.tokenizer, self.logits = diffusion.CharTokenizer("abc"), logits
        self.register_buffer("rope", torch.zeros(1))

    def forward(self, ids):
        return self.logits.expand(len(ids), -1, -1)


def test_a_second_look_mends_a_draft(monkeypatch):
    torch.manual_seed(0)
    right = torch.randint(3, (256,))
    draft, text = mended(50 * torch.nn.functional.one_hot(right, 3).float(), monkeypatch)
    assert text == right[:200].tolist() != draft


def test_a_second_look_of_a_model_that_knows_nothing_changes_two_thirds(monkeypatch):
    torch.manual_seed(0)
    draft, text = mended(torch.zeros(256, 3), monkeypatch)
    changed = sum(a != b for a, b in zip(draft, text, strict=True))
    assert abs(changed / 200 - 2 / 3) < 5 * math.sqrt(2 / 9 / 200)


def test_only_the_active_block_is_shown_and_known_text_after_it():
    model = random_model(diffusion)
    shown = [len(text) for text in diffusion.generate(model, "abc", 600)]
    assert set(shown) == {256, 496, 603} and shown == sorted(shown)
    prompt = "_".ljust(700, "x")
    texts = list(diffusion.generate(model, prompt, 0))
    assert len(texts) == 2 and all(text[1:] == prompt[1:] for text in texts)


@pytest.mark.parametrize("length", [0, 1, 241, 600])
def test_gpt_writes_one_character_per_pass(length):
    texts = list(gpt.generate(random_model(gpt), "abc", length))
    assert [len(text) for text in texts] == list(range(4, length + 4))
    for shorter, longer in itertools.pairwise(["abc", *texts]):
        assert longer.startswith(shorter)


def test_the_default_prompt_is_the_models(script):
    text = next(script.generate(random_model(script), length=5))
    assert text.startswith("once upon a time")


def test_temperature_zero_is_argmax(script):
    model, logits = random_model(script), []
    model.register_forward_hook(lambda _, args, out: logits.append(out[0]))
    texts, length = [], 300 if script is gpt else 200  # a second read of many; a single window
    for seed in (0, 1):
        torch.manual_seed(seed)
        texts.append(list(script.generate(model, "when", length, temp=0)))
    assert texts[0] == texts[1] and len(logits) == 2 * len(texts[0])
    before = "when"
    for text, out in zip(texts[0], logits, strict=False):
        for i, char in enumerate(text):
            if char != before[i : i + 1] and char != "_":
                assert char == model.tokenizer.chars[out[-1 if script is gpt else i].argmax()]
        before = text
    assert len(before) == 4 + length


def test_the_seed_decides(script):
    model = random_model(script)

    def write(seed):
        torch.manual_seed(seed)
        return list(script.generate(model, length=50))

    assert write(1) == write(1) != write(2)


def test_temperature_shapes_the_draw(script):
    """Frequencies of draws against the softmax of logits / temp, within five standard errors."""
    torch.manual_seed(0)
    logits, n = torch.tensor([2.0, 1.0, 0.0, -1.0]), 40000
    for temp in (0.5, 1.0, 2.0):
        share = script.draw(logits.expand(n, 4), temp).bincount(minlength=4) / n
        p = (logits / temp).softmax(-1)
        assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()


def test_certainty_is_judged_at_temperature_one(filled):
    """So the places of the first pass are the same at every temperature."""
    model, first = random_model(diffusion), []
    for temp in (0, 0.5, 3):
        filled.clear()
        next(diffusion.generate(model, "ab", 200, temp))
        first.append(holes(filled[0][1]))
    assert first[0] == first[1] == first[2]


def test_holes_past_the_end_pad_and_nothing_else(filled):
    """The model is shown a full window, but only the holes asked for are compared."""
    would_matter = False
    for seed in range(20):
        model, shown = random_model(diffusion, seed=seed), []
        model.register_forward_hook(lambda _, args, out, shown=shown: shown.append((args[0], out)))
        filled.clear()
        next(diffusion.generate(model, "abc", 20, spacing=8))
        first = set(range(3, 23)) - set(holes(filled[0][1]))
        ids, logits = shown[0]
        assert ids.shape == (1, 256) and (ids[0, 3:] == model.tokenizer.mask).all()
        doubt = -logits[0].softmax(-1).max(-1).values
        assert first == slowly(doubt.tolist(), range(3, 23), 8)
        would_matter |= first != slowly(doubt.tolist(), range(3, 256), 8) & set(range(3, 23))
    assert would_matter


@pytest.mark.parametrize("given, length", [(3, 600), (100, 150), (250, 300), (400, 30), (20, 0)])
def test_a_window_sees_the_context_and_more_where_the_text_ends(given, length):
    """It begins context characters before the first hole, half a window before one that stands in
    or right behind the prompt, or further left to see a full window."""
    model, shown = random_model(diffusion), []
    model.register_forward_hook(lambda _, args, out: shown.append(args[0][0].clone()))
    prompt = "".join(CHARS[i] for i in torch.randint(26, (given,)))
    *_, text = (prompt, *diffusion.generate(model, prompt, length, spacing=1))
    ids, first, windows = model.tokenizer.encode(text), given, shown[::9]
    assert len(shown) == 9 * len(windows)  # one pass of draft and eight of second look
    for window in windows:
        in_view = diffusion.context if first > given else 128
        start = max(0, min(first - in_view, len(ids) - 256))
        assert torch.equal(window[: first - start], ids[start:first])
        assert (window[first - start :] == model.tokenizer.mask).all()
        first = min(start + 256, len(ids))
    assert first == len(ids)
