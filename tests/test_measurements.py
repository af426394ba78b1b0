"""What measurements/measure.py measures is what its names say."""

import itertools
import math
import random
from collections import Counter

import measure
import pytest
import torch
import torch.nn.functional as F
from conftest import CHARS, Fake, checkpoint, random_model

import diffusion
import gpt

draw = random.Random(0)
made_up = ["".join(draw.choices(CHARS[:26], k=1 + i % 12)) for i in range(60)] + ["don't"]
real = " ".join(draw.choices(made_up, k=2000))[:10000]
train, val, chars = real[:9000], real[9000:], CHARS + "'"


@pytest.fixture
def files(tmp_path):
    """The options for small random models and a text of their own."""
    (data := tmp_path / "data.txt").write_text(real)
    models = [random_model(gpt, chars), random_model(diffusion, chars)]
    paths = [str(checkpoint(model, tmp_path / f"{i}.pt")) for i, model in enumerate(models)]
    return ["--gpt", paths[0], "--data", str(data), "--diffusion", paths[1]]


def tables(capsys):
    """What was printed, as rows of cells below each head; a row has as many as its head."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    starts = [i - 1 for i, row in enumerate(rows) if set(row) == {"---"}] + [len(rows)]
    found = [rows[start:end] for start, end in itertools.pairwise(starts)]
    assert starts[0] == 0 and all(len({len(row) for row in table}) == 1 for table in found)
    assert "nan ±" not in str(rows)
    return [table[2:] for table in found]


def test_figures_by_hand():
    assert measure.pieces("abcdefg", 3, 2) == ["abc", "cde", "efg"]
    assert measure.evenly(range(10), 4) == [0, 2, 5, 7] and measure.evenly("abc", 9) == [*"abc"]
    a, b = torch.tensor([1.0, 2, 3]).numpy(), torch.tensor([1.0, 0, -1]).numpy()
    assert measure.mean(a) == "2.000 ± 0.577" and measure.mean(a - b, sign="+") == "+2.000 ± 1.155"
    assert measure.median([3, 1, 20]) == "3 (1 to 20)"
    texts = ["x the cat's x", f"x On the cat, the {CHARS[:24]}"]
    assert measure.words(texts) == ["the", "cat's", "on", "the", "cat", "the"]
    runs = set(measure.pieces(CHARS[:26], 20, 1))
    shares = measure.judge(texts, {"the", "on"}, runs, "cat", 29)[:3]
    assert shares == (4 / 6, 4 / 6, 5 / 23)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_the_n_gram_is_kneser_neys(order):
    """Against one that follows the definition and counts by reading all texts."""
    texts = ["".join(draw.choices("aabc", k=60)) for _ in range(3)]

    def counts(n):
        ends = [(text, i) for text in texts for i in range(order, len(text) + 1)]
        if n == order:
            return Counter(text[i - n : i] for text, i in ends)
        return Counter(gram[1:] for gram in {text[i - n - 1 : i] for text, i in ends})

    def probability(before, char, n):
        if n == 0:
            return 1 / 4
        context, shorter = before[len(before) - n + 1 :], probability(before, char, n - 1)
        seen = {gram[-1]: count for gram, count in counts(n).items() if gram[:-1] == context}
        if len(before) < n - 1 or not seen:
            return shorter
        times = [[*counts(n).values()].count(k) for k in range(5)]
        y, discounts = times[1] / max(1, times[1] + 2 * times[2]), [0]
        for k in (1, 2, 3):
            exact = k - (k + 1) * y * times[k + 1] / max(1, times[k])
            discounts.append(min(max(exact, k / 10), 9 * k / 10))
        lost = {key: discounts[min(count, 3)] for key, count in seen.items()}
        kept = seen.get(char, 0) - lost.get(char, 0)
        return (kept + sum(lost.values()) * shorter) / sum(seen.values())

    model, text = measure.KneserNey(texts, order, 4), "abcadbacabba"
    expected = [-math.log(probability(text[:i], char, order)) for i, char in enumerate(text)]
    assert model.nats(text).tolist() == pytest.approx(expected)


def test_reverse_charges_for_gibberish_and_for_monotony():
    garbled, monotone = val.translate(str.maketrans("abcde", "bcdea")), f"{made_up[59]} " * 80
    texts = [val], [garbled], [monotone]
    good, *bad = (measure.judge(text, {}, {}, train, 28)[3] for text in texts)
    assert good < min(bad) - 0.1


def test_nats_by_hidden_go_by_the_number_of_hidden_neighbours():
    """By a model that is the surer the more is hidden, and knows nothing of what is not hidden."""
    truth = F.one_hot(diffusion.CharTokenizer(chars).encode(val[:256]), len(chars))

    def logits(ids):
        hidden = ids == len(chars)
        return truth * (hidden.sum(1, keepdim=True) * hidden)[..., None] / 100

    nats = measure.nats_by_hidden(Fake(diffusion, chars, logits), val[:256])
    expected = [math.log(1 + (len(chars) - 1) * math.exp(-0.3 * n)) for n in range(1, 9)]
    assert nats.tolist() == pytest.approx(expected)


def test_infill_pays_what_scoring_pays_and_all_words_sum_to_one(script):
    """Words of two letters; diffusion alone sees what is behind them."""
    model, text = random_model(script, "abc"), "".join(draw.choices("abc", k=256))
    nats = measure.infill_nats(script, model, text, 16, 256)
    assert nats == pytest.approx(script.evaluate(model, text), abs=1e-4)

    def likelihoods(behind):
        texts = [f"{text[:128]}{a}{b}{behind}" for a, b in itertools.product("abc", repeat=2)]
        return [math.exp(-2 * measure.infill_nats(script, model, t, 128, 130)) for t in texts]

    here, there = likelihoods(text[130:]), likelihoods(text[131:] + "a")
    assert sum(here) == pytest.approx(1, abs=1e-4) and sum(there) == pytest.approx(1, abs=1e-4)
    assert (here == there) == (script is gpt)


def test_restored_is_a_word_that_is_written_whole_without_a_sight_of_it(script):
    """At temperature 0; no model can read a question mark."""
    model, left, right = random_model(script, chars), val[:128], val[134:256]
    asked = (left, 6) if script is gpt else (left + "______" + right, 0)
    *_, (text, _) = script.generate(model, *asked, temp=0)
    word = text[128:134]
    assert measure.restored(script, model, left + word + right, 128, 134)
    for other in ("?" + word[1:], word[:5] + "?"):
        assert not measure.restored(script, model, left + other + right, 128, 134)


def test_hidden_words_are_whole_and_stand_in_the_middle_of_what_is_in_view():
    found = measure.hidden_words(real, 10**6)
    words = {window[start - 1 : end + 1] for window, start, end in found}
    assert words == {f" {word} " for word in made_up if 4 <= len(word) <= 8} - {" don't "}
    assert {(len(window), start) for window, start, _ in found} == {(256, 128)}
    assert measure.hidden_words(real, 2) == [found[0], found[len(found) // 2]]


def test_nats_are_those_of_the_scripts_and_of_the_n_gram_on_the_validation_text(files, capsys):
    measure.main(["nats", *files, files[-1]])
    totals, details = tables(capsys)
    models = gpt.load(files[1], torch.float32), diffusion.load(files[-1], torch.float32)
    nanogpt = [val[i : i + 257] for i in (0, 256, 512)]
    rows = torch.stack([models[0].tokenizer.encode(text) for text in nanogpt])
    ngram = measure.KneserNey([train], 7, 28)
    expected = {
        (0, 1): gpt.evaluate(models[0], val),
        (0, 4): gpt.loss_fn(models[0], rows).item(),
        (1, 1): diffusion.evaluate(models[1], val),
        (3, 1): ngram.nats(val[:976])[16:].mean(),  # the windows, with an unlimited history
        (3, 4): sum(ngram.nats(text)[1:].mean() for text in nanogpt) / 3,
    }
    for (i, j), nats in expected.items():
        assert totals[i][j].startswith(f"{nats:.3f} ")
    assert totals[0][1] != totals[0][3] and details[0][1:] != details[2][1:]
    assert totals[1] == totals[2] and details[::2] == details[1::2]  # the same model, twice
    assert len(totals) == 4 and len(details) == 8


def test_equal_amounts_of_text_are_compared_on_another(files, capsys, fails, monkeypatch):
    calls, judge = [], measure.judge
    monkeypatch.setattr(measure, "judge", lambda *args: calls.append(args) or judge(*args))
    measure.main(["text", *files, "--temps", "0.7", "--texts", "1", "--length", "100"])
    (rows,) = tables(capsys)
    assert [cells[2] for cells in rows] == ["", "240.0", "38.4", "19.2", "57.6"]
    assert rows[0][3] == "1.000 ± 0.000" and len(calls) == 3 * len(rows)
    stretches = [val[i : i + 100] for i in range(0, 1000, 100)]
    assert all(scored == "".join(stretches[1::2]) for _, _, _, scored, _ in calls)
    assert all(len(texts) == 1 and len(texts[0]) == 100 for texts, *_ in calls)
    assert all(texts[0] in stretches[::2] for texts, *_ in calls[:3])
    assert len({texts[0] for texts, *_ in calls}) == len(calls)
    assert "too short" in fails(measure, "text", *files, "--length", "100")


def test_infill_and_speed_print_a_table(files, capsys, fails):
    measure.main(["infill", *files, "--words", "3"])
    measure.main(["speed", *files, "--runs", "2", "--length", "30"])
    infill, speed = tables(capsys)
    assert len(infill) == 2 and [cells[1] for cells in speed] == ["30", "16"]
    assert "nowhere.pt" in fails(measure, "speed", "--gpt", "nowhere.pt")
