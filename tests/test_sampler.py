"""Generation, of both; the rule that says which characters a pass commits, and its likelihood."""

import itertools
import math

import pytest
import torch
from conftest import CHARS, random_model

import diffusion
import gpt


def slowly(certainty, holes, spacing):
    """The rule by its definition. certainty: the lower, the more certain."""
    chosen = set()
    for i in holes:
        rivals = [j for j in holes if j != i and abs(i - j) < spacing]
        if all((certainty[i], i) < (certainty[j], j) for j in rivals):
            chosen.add(i)
    return chosen


@pytest.mark.parametrize("spacing", [1, 2, 3, 8, 40, 256])
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


def passes(texts, before):
    """For each pass the places that it filled, checking that it left all others as they were."""
    for text in texts:
        before = before.ljust(len(text), "_")
        assert len(text) == len(before)
        places = [i for i in range(len(text)) if text[i] != before[i]]
        assert all(before[i] == "_" for i in places)
        yield places
        before = text


@pytest.mark.parametrize("length", [0, 1, 239, 240, 241, 2000])
@pytest.mark.parametrize("spacing", [1, 8, 256])
def test_every_pass_commits_some_holes_far_enough_apart(length, spacing):
    model, prompt = random_model(diffusion), "ab_d ______ef_"
    texts = list(diffusion.generate(model, prompt, length, spacing=spacing))
    filled = list(passes(texts, prompt))
    assert all(filled) and sum(map(len, filled)) == prompt.count("_") + length
    assert len(texts[-1]) == len(prompt) + length and "_" not in texts[-1]
    for places in filled:
        assert all(b - a >= spacing for a, b in itertools.pairwise(places))
    windows = math.ceil((sum(map(len, filled)) - 253) / 240) + 1  # the first has no context before
    if spacing == 256:
        assert len(filled) == sum(map(len, filled))
    if spacing == 1:
        assert len(filled) == max(windows, 1)


def test_only_the_active_block_is_shown_and_known_text_after_it():
    model = random_model(diffusion)
    shown = [len(text) for text in diffusion.generate(model, "abc", 600)]
    assert set(shown) == {256, 496, 603} and shown == sorted(shown)
    prompt = "_".ljust(700, "x")
    texts = list(diffusion.generate(model, prompt, 0))
    assert len(texts) == 1 and texts[0][1:] == prompt[1:]


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
    for places, text, out in zip(passes(texts[0], "when"), texts[0], logits, strict=False):
        for i in places:
            best = out[-1 if script is gpt else i].argmax()
            assert text[i] == model.tokenizer.chars[best]


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


def test_certainty_is_judged_at_temperature_one():
    """So the places of the first pass are the same at every temperature."""
    model = random_model(diffusion)
    first = [next(passes(diffusion.generate(model, "ab", 200, t), "ab")) for t in (0, 0.5, 3)]
    assert first[0] == first[1] == first[2]


def test_holes_past_the_end_pad_and_nothing_else():
    """The model is shown a full window, but only the holes asked for are compared."""
    would_matter = False
    for seed in range(5):
        model, shown = random_model(diffusion, seed=seed), []
        model.register_forward_hook(lambda _, args, out, shown=shown: shown.append((args[0], out)))
        first = next(passes(diffusion.generate(model, "abc", 20, spacing=8), "abc"))
        ids, logits = shown[0]
        assert ids.shape == (1, 256) and (ids[0, 3:] == model.tokenizer.mask).all()
        doubt = -logits[0].log_softmax(-1).max(-1).values
        assert set(first) == slowly(doubt.tolist(), range(3, 23), 8)
        would_matter |= set(first) != slowly(doubt.tolist(), range(3, 256), 8) & set(range(3, 23))
    assert would_matter


def test_a_window_starts_with_its_context():
    model, shown = random_model(diffusion), []
    model.register_forward_hook(lambda _, args, out: shown.append(args[0][0].clone()))
    *_, text = diffusion.generate(model, "abc", 600, spacing=1)
    ids = model.tokenizer.encode(text)
    assert len(shown) == 3
    for window, start in zip(shown, (0, 240, 480), strict=True):
        given = 3 if start == 0 else 16
        assert torch.equal(window[:given], ids[start : start + given])
        assert (window[given:] == model.tokenizer.mask).all()


@pytest.mark.parametrize("spacing", [1, 2, 4])
def test_the_exact_likelihood_sums_to_one_over_all_texts(spacing):
    model = random_model(diffusion, chars="abc")
    texts = torch.tensor([(0, *rest) for rest in itertools.product(range(3), repeat=4)])
    with torch.no_grad():
        nats, count = diffusion.exact(model, texts, spacing, given=1)
    assert abs((-4 * nats.double()).exp().sum().item() - 1) < 1e-5
    assert (-4 * nats).exp().max() > 2 / 81  # and is not just uniform
    expected = {1: {1}, 4: {4}}.get(spacing)
    assert set(count.tolist()) == expected if expected else set(count.tolist()) <= {2, 3, 4}


def test_generate_writes_each_text_as_often_as_its_likelihood_says():
    """Two characters, drawn at temperature 1."""
    model, n = random_model(diffusion, chars="ab", seed=3), 1500
    texts = torch.tensor([(0, *rest) for rest in itertools.product(range(2), repeat=2)])
    torch.manual_seed(0)
    ends = [list(diffusion.generate(model, "a", 2, temp=1.0, spacing=2))[-1] for _ in range(n)]
    for row in texts:
        p = likelihood(model, row)
        share = ends.count(model.tokenizer.decode(row)) / n
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / n) + 1e-9


def likelihood(model, row):
    """Of the two characters after the first, by hand, one at a time, the most certain first."""
    ids, p = torch.full((1, 256), model.tokenizer.mask), 1.0  # padded, as generate does
    ids[0, 0] = row[0]
    left = [1, 2]
    while left:
        with torch.no_grad():
            probabilities = model(ids)[0].softmax(-1)
        place = max(left, key=lambda i: probabilities[i].max().item())
        p *= probabilities[place, row[place]].item()
        ids[0, place] = row[place]
        left.remove(place)
    return p


@pytest.mark.parametrize("spacing", [4, 8, 256])
def test_generate_and_exact_walk_the_same_positions(spacing, monkeypatch):
    model = random_model(diffusion)
    texts = list(diffusion.generate(model, length=240, spacing=spacing))
    written = list(passes(texts, "once upon a time"))
    walked, rule = [], diffusion.most_certain

    def watch(*args):
        chosen = rule(*args)
        walked.append(chosen[0].nonzero().flatten().tolist())
        return chosen

    monkeypatch.setattr(diffusion, "most_certain", watch)
    _, count = diffusion.exact(model, model.tokenizer.encode(texts[-1])[None], spacing)
    assert walked == written and count.item() == len(written)


def test_exact_scores_each_window_as_if_alone():
    model = random_model(diffusion)
    windows = torch.randint(len(CHARS), (3, 60))
    together, passes_together = diffusion.exact(model, windows, 8)
    for row in range(3):
        alone, count = diffusion.exact(model, windows[row : row + 1], 8)
        assert torch.allclose(alone, together[row], atol=1e-4)
        assert count == passes_together[row]
