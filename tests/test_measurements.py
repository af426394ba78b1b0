"""What measurements/frontier.py measures is what its names say."""

import itertools
import math

import frontier
import pytest
import torch
from conftest import CHARS, random_model

import diffusion
import gpt

every_rule = [(name, p) for name, (_, parameters) in frontier.rules.items() for p in parameters]


@pytest.fixture
def state():
    torch.manual_seed(0)
    logits = 4 * torch.rand(4, 256, 1) * torch.randn(4, 256, 20)  # certain and uncertain places
    holes = torch.rand(4, 256) > torch.tensor([0.0, 0.5, 0.98, 1.0])[:, None]
    holes[:, :16] = False
    return logits, holes


@pytest.mark.parametrize("name, parameter", every_rule)
def test_every_rule_commits_holes_until_none_is_left(name, parameter, state):
    logits, holes = state
    while holes.any():
        chosen = frontier.rules[name][0](logits, holes, parameter)
        assert not (chosen & ~holes).any()
        assert torch.equal(chosen.any(1), holes.any(1))
        holes = holes & ~chosen


def test_rules_by_hand(state):
    logits, holes = state
    holes, logits = holes[:2], logits[:2]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    first = holes.float().argmax(1)

    def places(name, parameter):
        chosen = frontier.rules[name][0](logits, holes, parameter)
        return [row.nonzero().flatten() for row in chosen]

    assert [int(p) for p in places("left to right", 1)] == first.tolist()
    for row, picks in enumerate(places("most certain by entropy", 8)):
        assert entropy[row].masked_fill(~holes[row], 99).argmin() in picks
        assert picks.diff().min() >= 8
        left = holes[row].nonzero().flatten()
        assert ((left[:, None] - picks).abs().min(1).values < 8).all()  # no room for another
    for row, picks in enumerate(places("local maximum", 8)):
        top = logits[row].softmax(-1).amax(-1)
        for p in holes[row].nonzero().flatten().tolist():
            rivals = [q for q in range(max(0, p - 7), p + 8) if q < 256 and holes[row, q]]
            assert (p in picks) is (max(rivals, key=lambda q: (top[q].item(), -q)) == p)
    for row, picks in enumerate(places("segments", 16)):
        assert [p // 16 for p in picks.tolist()] == list(range(1, 16))
        for p in picks.tolist():
            assert not holes[row, p // 16 * 16 : p].any()
    for row, picks in enumerate(places("entropy-bounded", 2)):
        taken = entropy[row, picks]
        others = entropy[row][holes[row] & ~torch.isin(torch.arange(256), picks)]
        assert len(picks) > 1 and taken.max() <= others.min()
        assert taken.sum() - taken.max() <= 2 < taken.sum()
    same = frontier.most_certain_by(lambda logits: (1 + logits.softmax(-1).amax(-1)) / 2)
    same = same(logits, holes, 8)
    assert torch.equal(same, diffusion.most_certain(logits, holes, 8))


@pytest.mark.parametrize("spacing", [1, 2, 4])
def test_the_exact_likelihood_sums_to_one_over_all_texts(spacing):
    model = random_model(diffusion, chars="abc")
    texts = torch.tensor([(0, *rest) for rest in itertools.product(range(3), repeat=4)])
    with torch.no_grad():
        nats, count = frontier.exact(model, texts, spacing, given=1)
    assert abs((-4 * nats.double()).exp().sum().item() - 1) < 1e-5
    assert (-4 * nats).exp().max() > 2 / 81  # and is not just uniform
    expected = {1: {1}, 4: {4}}.get(spacing)
    assert set(count.tolist()) == expected if expected else set(count.tolist()) <= {2, 3, 4}


def draft(texts):
    """The passes of a first block, up to the one that leaves no hole."""
    for text in texts:
        yield text
        if "_" not in text:
            return


def test_generate_drafts_each_text_as_often_as_its_likelihood_says():
    """Two characters, drawn at temperature 1."""
    model, n = random_model(diffusion, chars="ab", seed=3), 1500
    texts = torch.tensor([(0, *rest) for rest in itertools.product(range(2), repeat=2)])
    torch.manual_seed(0)
    runs = [draft(diffusion.generate(model, "a", 2, temp=1.0, spacing=2)) for _ in range(n)]
    ends = [list(run)[-1] for run in runs]
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
    model, written, before = random_model(diffusion), [], "once upon a time".ljust(256, "_")
    for text in draft(diffusion.generate(model, length=240, spacing=spacing)):
        written.append([i for i in range(256) if text[i] != before[i]])
        before = text
    walked, rule = [], diffusion.most_certain

    def watch(*args):
        chosen = rule(*args)
        walked.append(chosen[0].nonzero().flatten().tolist())
        return chosen

    monkeypatch.setattr(diffusion, "most_certain", watch)
    _, count = frontier.exact(model, model.tokenizer.encode(before)[None], spacing)
    assert walked == written and count.item() == len(written)


def test_exact_scores_each_window_as_if_alone():
    model = random_model(diffusion)
    windows = torch.randint(len(CHARS), (3, 60))
    together, passes_together = frontier.exact(model, windows, 8)
    for row in range(3):
        alone, count = frontier.exact(model, windows[row : row + 1], 8)
        assert torch.allclose(alone, together[row], atol=1e-4)
        assert count == passes_together[row]


def test_a_second_look_rewrites_every_comb_once():
    """By a model that answers what it read, one letter on; what it hid, it answers with a."""

    class Next(torch.nn.Module):
        tokenizer = diffusion.CharTokenizer(CHARS)

        def forward(self, ids):
            seen.append(ids == self.tokenizer.mask)
            return 50 * torch.nn.functional.one_hot(ids * 0 + 5, len(CHARS)).float()

    seen = []
    windows = torch.zeros(2, 60, dtype=torch.long)
    ids, passes = frontier.sample(Next(), windows, 60, temp=0, looks=2)
    assert passes == len(seen) == 44 + 16 and (ids[:, 16:] == 5).all() and (ids[:, :16] == 0).all()
    hidden = torch.stack(seen[44:])[:, 0]
    assert (hidden.sum(0)[16:] == 2).all() and not hidden[:, :16].any()
    assert all(mask.nonzero().flatten().diff().eq(8).all() for mask in hidden)


def test_truncation():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    kept = [(keep(logits) > -math.inf).tolist() for keep in (frontier.top(2), frontier.floor(0.2))]
    assert kept == [[True, True, False, False], [True, True, True, False]]


def test_the_five_gram_is_a_distribution_and_knows_what_it_was_trained_on():
    text = "the cat sat on the mat. a cat is not a mat.\n" * 5 + "dog"
    chars = [*sorted(set(text)), "z"]
    model = frontier.KneserNey([text], characters=len(chars))
    for context in ("the ", "cat ", "zzzz", "og a", "dogz"):
        assert sum(model.probability(context, c) for c in chars) == pytest.approx(1)
    assert model.probability("the ", "c") > 0.3 > model.probability("the ", "s") > 0
    assert model.nats("the mat is a cat") < model.nats("taht mis ac tea.") < model.nats("zz" * 8)


def test_kneser_ney_by_hand():
    """ab twice, ac once: of three bigrams, b and c end one each; a is followed by two kinds."""
    model = frontier.KneserNey(["abab", "ac"], order=2, characters=3)
    (unigrams, _, _, _), (bigrams, discounts, total, left) = model.levels
    assert dict(bigrams) == {"ab": 2, "ba": 1, "ac": 1} and dict(unigrams) == dict(a=1, b=1, c=1)
    assert total["a"] == 3 and left["a"] == discounts[2] + discounts[1]
    p = (2 - discounts[2] + left["a"] * model.probability("", "b")) / 3
    assert model.probability("a", "b") == pytest.approx(p)


def test_both_sides_of_a_text():
    """Gibberish costs known words, a line over and over distinct words, and both cost reverse."""
    words = ["the", "cat", "sat", "mat", "dog", "ran", "red", "sun", "hen", "pig"]
    torch.manual_seed(0)
    text = " ".join(words[i] for i in torch.randint(10, (3000,)))
    train, held_out = text[:9000], text[9000:]
    good = frontier.judge([text[3000:6000]], train, held_out)
    gibberish = frontier.judge([text[3000:6000].replace("a", "q")], train, held_out)
    monotone = frontier.judge(["the cat sat " * 250], train, held_out)
    known, distinct, reverse = (
        [float(row[i]) for row in (good, gibberish, monotone)] for i in (0, 2, 4)
    )
    assert known[0] == known[2] == 1 > known[1]
    assert distinct[2] < distinct[0]
    assert reverse[0] < min(reverse[1:])
    assert float(good[3]) > 0.9 > float(gibberish[3])  # runs of 20 copied from the text


def test_gpts_nats_of_windows_are_those_of_its_loss():
    model = random_model(gpt)
    windows = torch.randint(len(CHARS), (3, 60))
    with torch.no_grad():
        nats = frontier.gpt_nats(model, windows)
        for row, window in zip(nats, windows, strict=True):
            logits = model(window[None, :-1])[0, 15:]
            assert row == pytest.approx(
                torch.nn.functional.cross_entropy(logits, window[16:]).item(), abs=1e-5
            )
