"""What measurements/measure.py measures is what its names say."""

import itertools
import math
import random

import measure
import pytest
import torch
from conftest import CHARS, checkpoint, random_model

import diffusion
import gpt

draw = random.Random(0)
made_up = ["".join(draw.choices(CHARS[:26], k=1 + i % 12)) for i in range(60)] + ["couldn't"]
text = " ".join(draw.choices(made_up, k=2000))
real = f"{text[:9950]} zzz {text[9955:10000]}"  # the training text lacks this word
train, val, chars = real[:9000], real[9000:], CHARS + "'"


@pytest.fixture
def files(tmp_path):
    """The options for small random models and a text of their own. Diffusion is sure of nothing, so
    that its texts differ even after a second look."""
    (data := tmp_path / "data.txt").write_text(real)
    models = [random_model(gpt, chars), random_model(diffusion, chars)]
    torch.nn.init.normal_(models[1].head.weight, std=0.01)
    paths = [str(checkpoint(model, tmp_path / f"{i}.pt")) for i, model in enumerate(models)]
    return ["--gpt", paths[0], "--data", str(data), "--diffusion", paths[1]]


def tables(capsys):
    """What was printed, as rows of cells under each head; a row has as many as its head."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    starts = [i - 1 for i, row in enumerate(rows) if set(row) == {"---"}] + [len(rows)]
    found = [rows[start:end] for start, end in itertools.pairwise(starts)]
    assert all(len({len(row) for row in table}) == 1 for table in found)
    return [table[2:] for table in found]


def test_figures_by_hand():
    assert measure.pieces("abcdefg", 3, 2) == ["abc", "cde", "efg"]
    assert measure.evenly(range(10), 4) == [0, 2, 5, 7] and measure.evenly("abc", 9) == [*"abc"]
    assert measure.mean([0.0, 2, 4], sign="+") == "+2.000 ± 1.155"
    texts, others = ["x the cat's x", f"x On the cat, the {CHARS[:24]}"], [" a x" * 9]
    assert measure.words(texts) == ["the", "cat's", "on", "the", "cat", "the"]
    known, distinct, copied, _ = measure.judge([texts, others], f"x On the {CHARS[:24]}", "cat")
    assert [*known, *distinct, *copied] == [4 / 6, 0, 4 / 6, 2 / 16, 100 * 10 / 23, 0]


def test_the_n_gram_is_kneser_neys():
    """By hand, of pairs: ab, ba and bb come four times, ac and ca twice, ad and bd once. a, b and d
    come after two characters, c after one, x never."""
    once, twice, often = 1 / 3, 1.8, 0.3  # discounts; the most is nine tenths, the least a tenth
    lost = 1 / 7 + 3 * twice
    a = b = d = (2 - twice + lost / 5) / 7
    c = (1 - 1 / 7 + lost / 5) / 7
    x = lost / 5 / 7
    lost = once + twice + often  # after a
    expected = [a, lost * x / 7, a, (4 - often + lost * b) / 7]
    expected += [(4 - often + (2 * often + once) * a) / 9, (2 - twice + lost * c) / 7]
    expected += [(2 - twice + twice * a) / 2, (1 - once + lost * d) / 7]
    nats = measure.ngram(["abacabad", "abacaba", "bd", "bbbbb"], 2, 5)("axabacad")
    assert nats.tolist() == pytest.approx([-math.log(p) for p in expected])


def test_reverse_charges_for_gibberish_and_for_monotony():
    garbled, monotone = val.translate(str.maketrans("abcde", "bcdea")), f"{made_up[59]} " * 80
    *_, (good, *bad) = measure.judge([[val], [garbled], [monotone]], val, train)
    assert good < min(bad) - 0.1


def test_infill_pays_what_scoring_pays_and_diffusion_sees_what_comes_after(script):
    model, text = random_model(script, "abc"), "".join(draw.choices("abc", k=256))
    _, nats = measure.infill(script, model, text, 16, 256)
    assert nats == pytest.approx(script.score(model, text).mean().item(), abs=1e-4)
    here = measure.infill(script, model, text, 128, 130)
    there = measure.infill(script, model, text[:130] + text[131:] + "a", 128, 130)
    assert (here == there) == (script is gpt)


def test_restored_is_a_word_that_is_written_whole_without_a_sight_of_it(script):
    """At temperature 0. Others are what it would write if it saw a letter, or nearly right."""
    model, left, right = random_model(script, chars), val[:128], val[134:256]
    torch.nn.init.normal_(model.head.weight, std=0.01)  # above 0 it would write anything
    written = []
    for seen in "", "b", "c":
        prompt, length = left + seen, 6 - len(seen)
        if script is diffusion:
            prompt, length = prompt + "_" * length + right, 0
        *_, (text, _) = script.generate(model, prompt, length, temp=0)
        written.append(text[128:134])
    word, *others = written
    for other in word, *others, word[:5] + "b", word[:5] + "c":
        restored, _ = measure.infill(script, model, left + other + right, 128, 134)
        assert restored == (other == word)


def test_hidden_words_are_whole_and_stand_in_the_middle_of_what_is_in_view():
    found = measure.hidden_words(real, 10**6)
    words = {window[start - 1 : end + 1] for window, start, end in found}
    assert words == {f" {word} " for word in made_up if 4 <= len(word) <= 8} - {" couldn't "}
    assert {(len(window), start) for window, start, _ in found} == {(256, 128)}
    assert measure.hidden_words(real, 2) == [found[0], found[len(found) // 2]]


def test_nats_are_those_of_the_scripts_and_of_the_n_gram_on_the_validation_text(files, capsys):
    measure.main(["nats", *files, files[-1]])
    totals, passes = tables(capsys)
    models = gpt.load(files[1], torch.float32), diffusion.load(files[-1], torch.float32)
    nanogpt = [val[i : i + 257] for i in (0, 256, 512)]
    rows = torch.stack([models[0].tokenizer.encode(text) for text in nanogpt])
    ngram = measure.ngram([train], 7, 28)
    expected = {
        (0, 1): gpt.score(models[0], val).mean(),
        (0, 3): gpt.score(models[0], train[-1000:]).mean(),
        (0, 4): gpt.loss_fn(models[0], rows).item(),
        (1, 1): diffusion.score(models[1], val).mean(),
        (3, 1): ngram(val[:976])[16:].mean(),  # the windows, with an unlimited history
        (3, 4): sum(ngram(text)[1:].mean() for text in nanogpt) / 3,
    }
    for (i, j), nats in expected.items():
        assert totals[i][j].startswith(f"{nats:.3f} ")
    for i in 1, 3:
        assert totals[i][2].startswith(f"{expected[i, 1] - expected[0, 1]:+.3f} ")
    assert totals[1] == totals[2] and passes[:2] == passes[2:]  # the same model, twice
    for cells, text in zip(passes, (val, train[-1000:]), strict=False):
        nats = [cell.split()[0] for cell in cells[1:]]
        assert nats == [f"{n:.3f}" for n in diffusion.score(models[1], text).mean(0)]


def test_equal_amounts_of_text_are_compared_on_another(files, capsys, fails, monkeypatch):
    samples, scored, temps = [], [], []

    def judge(texts, train, real, judge=measure.judge):
        samples.append(texts)
        scored.append(real)
        return judge(texts, train, real)

    monkeypatch.setattr(measure, "judge", judge)
    for script in (gpt, diffusion):

        def spy(logits, temp, draw=script.draw):
            temps.append(temp)
            return draw(logits, temp)

        monkeypatch.setattr(script, "draw", spy)

    options = ["--temps", "0.9", "3", "--seeds", "2", "--texts", "2", "--length", "100"]
    measure.main(["text", *files, *options])
    held_out, all_held_out, *rows = tables(capsys)[0]
    ways = [(240, 0.9), (240, 3.0), (16, 0.9), (16, 3.0), (8, 1.0), (24, 1.0)]
    assert [cells[1:3] for cells in rows] == [[str(n), str(temp)] for n, temp in ways]
    drawn_at = [0.9] * 400 + [3] * 400  # GPT: four texts of 100 characters in each way
    for n, temp in ways[2:]:
        drawn_at += [temp * (1 - i / n) ** 3 for i in range(n)] * 4
    assert temps == drawn_at
    assert all_held_out[3] < held_out[3] == "1.000 ± 0.000"

    stretches = [val[i : i + 100] for i in range(0, 1000, 100)]
    assert set(scored) == {"".join(stretches[1::2])}
    texts = [text for seeds in samples for texts in seeds for text in texts]
    assert set(texts[:4]) < set(stretches[::2]) and len(texts) == len(set(texts)) == 4 * 7
    assert {len(text) for text in texts} == {100}
    model = gpt.load(files[1])
    torch.manual_seed(1)
    assert samples[1][1][0] == [*gpt.generate(model, length=100, temp=0.9)][-1][0][-100:]
    assert "too short" in fails(measure, "text", *files, "--length", "100")


def test_infill_and_speed_print_a_table(files, capsys, fails, monkeypatch):
    measure.main(["infill", *files, "--words", "3"])
    seen, generate = [], gpt.generate

    def watched(model, *args):
        seen.append(model.head.weight.dtype)
        return generate(model, *args)

    monkeypatch.setattr(gpt, "generate", watched)
    measure.main(["speed", *files, "--runs", "2", "--length", "30"])
    infill, *speeds = tables(capsys)
    dtypes = list(dict.fromkeys((torch.float32, gpt.best_device()[1])))
    assert seen == [dtype for dtype in dtypes for _ in range(2)]
    assert [[cells[1] for cells in speed] for speed in speeds] == [["30", "16"]] * len(dtypes)
    first, second = (float(cells[2].split()[0]) for cells in infill)
    assert float(infill[1][3].split()[0]) == pytest.approx(second - first, abs=0.002)
    assert "nowhere.pt" in fails(measure, "speed", "--gpt", "nowhere.pt")
