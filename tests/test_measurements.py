"""What measurements/measure.py measures is what its names say."""

import inspect
import itertools
import math
import random

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
    """What was printed, as rows of cells under each head; a row has as many as its head."""
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
    texts, others = ["x the cat's x", f"x On the cat, the {CHARS[:24]}"], [" a x" * 9]
    assert measure.words(texts) == ["the", "cat's", "on", "the", "cat", "the"]
    known, distinct, copied, _ = measure.judge([texts, others], f"x On the {CHARS[:24]}", "cat")
    assert (known, distinct) == ([4 / 6, 0], [4 / 6, 2 / 16])
    assert copied == [100 * 10 / 23, 0]


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


def test_nats_by_hidden_go_by_the_number_of_hidden_columns():
    """By a model that is the surer the more is hidden, and knows nothing of what is not hidden."""
    truth = F.one_hot(diffusion.CharTokenizer(chars).encode(val[:256]), len(chars))

    def logits(ids):
        hidden = ids == len(chars)
        return truth * (hidden.sum(1, keepdim=True) * hidden)[..., None] / 100

    nats = measure.nats_by_hidden(Fake(diffusion, chars, logits), val[:256])
    expected = [math.log(1 + (len(chars) - 1) * math.exp(-0.3 * n)) for n in range(1, 9)]
    assert nats.tolist() == pytest.approx(expected)


def test_infill_pays_what_scoring_pays_and_diffusion_sees_what_comes_after(script):
    model, text = random_model(script, "abc"), "".join(draw.choices("abc", k=256))
    _, nats = measure.infill(script, model, text, 16, 256)
    assert nats == pytest.approx(script.score(model, text).mean().item(), abs=1e-4)
    here = measure.infill(script, model, text, 128, 130)
    there = measure.infill(script, model, text[:130] + text[131:] + "a", 128, 130)
    assert (here == there) == (script is gpt)


def test_restored_is_a_word_that_is_written_whole_without_a_sight_of_it(script):
    """At temperature 0."""
    model, left, right = random_model(script, chars), val[:128], val[134:256]
    asked = (left, 6) if script is gpt else (left + "______" + right, 0)
    *_, (text, _) = script.generate(model, *asked, temp=0)
    word = text[128:134]
    for other in word, "b" + word[1:], "c" + word[1:], word[:5] + "b", word[:5] + "c":
        restored, _ = measure.infill(script, model, left + other + right, 128, 134)
        assert restored == (other == word)


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
    ngram = measure.ngram([train], 7, 28)
    expected = {
        (0, 1): gpt.score(models[0], val).mean(),
        (0, 4): gpt.loss_fn(models[0], rows).item(),
        (1, 1): diffusion.score(models[1], val).mean(),
        (3, 1): ngram(val[:976])[16:].mean(),  # the windows, with an unlimited history
        (3, 4): sum(ngram(text)[1:].mean() for text in nanogpt) / 3,
    }
    for (i, j), nats in expected.items():
        assert totals[i][j].startswith(f"{nats:.3f} ")
    assert totals[1][2].startswith(f"{expected[1, 1] - expected[0, 1]:+.3f} ")
    assert totals[0][1] != totals[0][3] and details[0][1:] != details[2][1:]
    assert totals[1] == totals[2] and details[::2] == details[1::2]  # the same model, twice
    assert len(totals) == 4 and len(details) == 8


default = inspect.signature(diffusion.generate).parameters["temp"].default


@pytest.fixture
def temps(monkeypatch):
    """The temperature of each pass in which something is written."""
    drawn_at = []
    for script in (gpt, diffusion):

        def spy(logits, temp, draw=script.draw):
            drawn_at.append(temp)
            return draw(logits, temp)

        monkeypatch.setattr(script, "draw", spy)
    return drawn_at


def falling(temp, passes):
    return [temp * (1 - i / passes) ** 3 for i in range(passes)]


def test_equal_amounts_of_text_are_compared_on_another(files, capsys, fails, monkeypatch, temps):
    """The model is sure of nothing, so that texts differ even after a second look."""
    model = random_model(diffusion, chars)
    torch.nn.init.normal_(model.head.weight, std=0.01)
    checkpoint(model, files[-1])
    calls, judge = [], measure.judge
    monkeypatch.setattr(measure, "judge", lambda *args: calls.append(args) or judge(*args))
    options = ["--temps", "2", "3", "--seeds", "3", "--texts", "1", "--length", "100"]
    measure.main(["text", *files, *options])
    (rows,) = tables(capsys)
    ways = [(2.0, 240), (3.0, 240), (2.0, 16), (3.0, 16)] + [(default, n) for n in (8, 16, 24)]
    assert [cells[3:1:-1] for cells in rows[2:]] == [[*map(str, way)] for way in ways]
    assert temps[:600] == [2] * 300 + [3] * 300  # GPT: three times 100 characters
    assert temps[600:] == [temp for way in ways[2:] for temp in falling(*way) * 3]
    assert rows[0][4] == rows[1][4] == "1.000 ± 0.000" and len(calls) == len(rows)
    stretches = [val[i : i + 100] for i in range(0, 1000, 100)]
    assert all(scored == "".join(stretches[1::2]) for _, _, scored in calls)
    texts = [[text for (text,) in samples] for samples, *_ in calls]
    assert texts.pop(1) == stretches
    assert all(len(text) == 100 for three in texts for text in three)
    assert all(len(set(three)) > 1 for three in texts) and set(texts[0]) < set(stretches[::2])
    assert "too short" in fails(measure, "text", *files, "--length", "100")


def usual(way, passes, temp, length, certainty):
    """Three texts, and the windows (passes, B, T) that were read, by a model that expects a newline
    with a certainty (T,) by its place in the window, and all other characters alike."""
    others = (1 - certainty)[:, None].expand(-1, len(CHARS) - 1) / (len(CHARS) - 1)
    logits, windows = torch.cat((certainty[:, None], others), 1).log().expand(3, -1, -1), []
    model = Fake(diffusion, CHARS, lambda ids: windows.append(ids.clone()) or logits)
    model.prompt = "once upon a time"
    torch.manual_seed(0)
    return measure.usual(model, 3, length, way, passes, temp), torch.stack(windows)


def test_a_usual_way_fills_k_holes_a_pass_and_changes_nothing_else():
    """Of a block of 240 in 9 passes, and of one of 6, which takes no more than 6."""
    texts, windows = usual("k by chance", 9, 1, 246, torch.full((256,), 0.5))
    left = [240, 213, 186, 159, 132, 105, 78, 52, 26] + [240 - n for n in range(6)]
    holes = windows == len(CHARS)
    assert holes.sum(2).tolist() == [[n] * 3 for n in left]
    encode = diffusion.CharTokenizer(CHARS).encode
    first = torch.stack([encode("once upon a time" + text[:240]) for text in texts])
    second = torch.stack([encode(text[224:] + "_" * 234) for text in texts])
    assert (holes[:9] | (windows[:9] == first)).all()
    assert (holes[9:] | (windows[9:] == second)).all()


def test_the_surest_holes_are_filled_first_or_any():
    certainty = 0.4 + torch.tensor(draw.sample(range(256), 256)) / 512
    order = certainty[16:].argsort(descending=True) + 16
    _, windows = usual("k surest", 8, 0, 240, certainty)
    assert all((windows[i][:, order[30 * i :]] == len(CHARS)).all() for i in range(8))
    _, windows = usual("k by chance", 8, 0, 240, certainty)
    filled = windows[1] != windows[0]  # (B, T)
    assert len({tuple(row) for row in filled.tolist()}) == 3
    assert all(0.55 < certainty[row].mean() < 0.75 for row in filled)


def test_what_is_drawn_is_judged():
    """Half of all draws are newlines at temperature 1, at 0 all. A hole that has drawn one is surer
    than any other."""
    fallen = sum(1 / (1 + 28 ** (1 - (240 / n) ** 3)) for n in range(1, 241)) / 240
    for way, least, most in ("k surest", 0.95, 1), ("k by chance", fallen - 0.06, fallen + 0.06):
        texts, _ = usual(way, 240, 1, 240, torch.full((256,), 0.5))
        assert least < "".join(texts).count("\n") / 720 <= most


def test_the_baseline_has_the_file_in_all_ways_and_ours_in_columns(files, tmp_path, capsys, temps):
    file = checkpoint(random_model(diffusion, chars, seed=1), tmp_path / "usual.pt")
    options = ["--temps", "0.6", "0.8", "--seeds", "3", "--texts", "1", "--length", "30"]
    measure.main(["baseline", str(file), *files, *options])
    (rows,) = tables(capsys)
    ways = [*itertools.product(["k surest", "k by chance"], [8, 16, 64, 240], [0.6, 0.8])]
    columns = [("columns", 8, default), ("columns", 16, default)]
    expected = [("`usual.pt`", *way) for way in ways + columns]
    expected += [("`1.pt`", *way) for way in columns]
    assert [cells[:4] for cells in rows[2:]] == [[*map(str, cells)] for cells in expected]
    usual = [t for _, n, temp in ways for t in falling(temp, min(n, 30)) * 3]
    assert temps == usual + (falling(default, 8) * 3 + falling(default, 16) * 3) * 2
    assert rows[-1][4:] != rows[-3][4:]  # those are two models


def test_infill_and_speed_print_a_table(files, capsys, fails):
    measure.main(["infill", *files, "--words", "3"])
    measure.main(["speed", *files, "--runs", "2", "--length", "30"])
    infill, speed = tables(capsys)
    assert len(infill) == 2 and [cells[1] for cells in speed] == ["30", "16"]
    assert "nowhere.pt" in fails(measure, "speed", "--gpt", "nowhere.pt")
    assert "name one" in fails(measure, "baseline", *files, "--length", "10")
