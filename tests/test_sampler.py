"""Generation and exact scores, of both; diffusion's against a second, slow implementation."""

import itertools
import math

import pytest
import torch
from conftest import CHARS, Fake, mean_score, random_model

import diffusion
import gpt


def predict(model, text):
    """Probabilities (256, V) of a window, padded with holes to the length that the model knows."""
    with torch.no_grad():
        return model(model.tokenizer.encode(text.ljust(256, "_"))[None])[0].softmax(-1)


def surest(columns, certainty):
    return max(columns, key=lambda column: sum(certainty[i] for i in column) / len(column))


def slowly(model, prompt, length, looks):
    """What generate yields at temperature 0, one place after another."""
    chars, given, yields = list(prompt + "_" * length), len(prompt), []
    while "_" in chars:
        first = chars.index("_")
        start = max(0, first - (128 if first <= given else 16))
        end = min(start + 256, len(chars))
        prompt_goes_on = any(char != "_" for char in chars[end:])
        reach = end - 16 if prompt_goes_on else end
        block = [i for i in range(first, reach) if chars[i] == "_"]
        columns = [[i for i in block if (i - start) % 8 == n] for n in range(8)]
        columns = [column for column in columns if column]

        def write(candidates, start=start, end=end, first=first):
            p = predict(model, "".join(chars[start:end]))[: end - start]
            certainty = dict(enumerate(p.amax(-1).tolist(), start))
            column = surest(candidates, certainty)
            for i in column:
                chars[i] = model.tokenizer.chars[p[i - start].argmax()]
            yields.append(("".join(chars[: max(end, given)]), first))
            return column

        left = list(columns)
        while left:
            left.remove(write(left))
        for column in columns * looks:
            for i in column:
                chars[i] = "_"
            write([column])
    return yields or [(prompt, given)]


FAR = "abc " * 250  # a prompt of 1,000 characters


@pytest.mark.parametrize(
    "prompt, length, looks",
    [
        ("once upon a time", 496, 1),  # the last block is padded: two of 240, and 16
        ("abc", 300, 0),
        ("a" * 300, 20, 2),  # half a window of the prompt is in view
        ("", 1, 1),  # one hole: in a window of holes alone all columns are equally sure
        ("abc", 3, 1),  # three columns of one place
        ("a" + "_" * 269, 0, 1),
        ("_ab_d ______ef_", 10, 1),  # columns of unequal numbers of holes
        ("abc", 0, 1),
        (f"{FAR[:10]}_{FAR[11:600]}__{FAR[602:]}", 0, 1),
        (f"_{FAR[1:245]}___{FAR[248:]}_", 30, 1),  # holes that a window sees and leaves to the next
    ],
    ids=lambda value: str(value)[:16],
)
def test_diffusion_writes_as_the_slow_one_does(prompt, length, looks):
    model = random_model(diffusion)
    yields = list(diffusion.generate(model, prompt, length, 0, looks))
    assert yields == slowly(model, prompt, length, looks)


def test_what_is_final_never_changes(script):
    """Nor does any character of the prompt; at the end no hole is left. Chance decides the rest."""
    model = random_model(script)
    prompt = "once upon a time" if script is gpt else f"_b_{FAR[:300]}__ab_d"
    yields = list(script.generate(model, prompt, 500, 1.0))
    for (text, final), (longer, further) in itertools.pairwise(yields):
        assert longer[:final] == text[:final] and further >= final
    text, _ = yields[-1]
    assert len(text) == len(prompt) + 500 and "_" not in text
    assert all(was in ("_", now) for was, now in zip(prompt, text, strict=False))
    assert list(script.generate(model, prompt, 500, 1.0)) != yields


def test_an_unknown_character_ends_it_before_any_work(script, monkeypatch):
    """Also one that is far from all that is written."""
    model = random_model(script)
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(ValueError, match="'Z'"):
        next(script.generate(model, f"Z{FAR}", 10))


def test_a_pass_of_diffusion_reads_and_writes_its_window_alone(monkeypatch):
    """However long the text is. The prompt is read once."""
    model, read, written = random_model(diffusion), [], []
    encode, decode = model.tokenizer.encode, model.tokenizer.decode
    monkeypatch.setattr(model.tokenizer, "encode", lambda s: read.append(len(s)) or encode(s))
    monkeypatch.setattr(
        model.tokenizer, "decode", lambda ids: written.append(len(ids)) or decode(ids)
    )
    passes = len(list(diffusion.generate(model, FAR, 500, looks=0)))
    assert read == [1000, 256, 256, 256] and written == [256] * passes


def test_temperature_shapes_the_draw(script):
    """Frequencies of draws against the softmax of logits / temp, within five standard errors."""
    torch.manual_seed(0)
    logits, n = torch.tensor([2.0, 1.0, 0.0, -1.0]), 40000
    for temp in (0.5, 1.0, 2.0):
        share = script.draw(logits.expand(n, 4), temp).bincount(minlength=4) / n
        p = (logits / temp).softmax(-1)
        assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()


def test_the_temperature_falls_from_pass_to_pass(monkeypatch):
    """In each block anew, however many columns it has: two of the prompt, then eight."""
    model, drawn = random_model(diffusion), []
    monkeypatch.setattr(
        diffusion, "draw", lambda logits, temp: drawn.append(temp) or logits.argmax(-1)
    )
    list(diffusion.generate(model, "a__b" + 400 * "c", 100, 0.8))
    assert drawn == pytest.approx([0.8 * (1 - i / n) ** 3 for n in (4, 16) for i in range(n)])


def test_a_model_that_has_diverged_does_not_write_for_ever():
    """Of columns whose certainty is no number it takes one that has holes."""
    holes = torch.zeros(1, 32, dtype=torch.bool)
    holes[0, [3, 11, 12]] = True
    column = diffusion.surest_column(torch.full((1, 32, 4), math.nan), holes)
    assert column.any() and (column & holes).equal(column)


# ---- exact scores ------------------------------------------------------------------------------
def test_the_score_of_diffusion_is_what_the_slow_draft_pays():
    """Window by window and pass by pass."""
    model, text = random_model(diffusion), "".join(CHARS[i] for i in torch.randint(29, (760,)))
    expected = []
    for start in (0, 240, 480):
        window = text[start : start + 256]
        chars = list(window[:16] + "_" * 240)
        left, paid = [list(range(16 + n, 256, 8)) for n in range(8)], []
        while left:
            p = predict(model, "".join(chars))
            column = surest(left, p.amax(-1).tolist())
            truth = [model.tokenizer.ids[window[i]] for i in column]
            paid.append(-p[column, truth].log().mean().item())
            left.remove(column)
            for i in column:
                chars[i] = window[i]
        expected.append(paid)
    assert torch.allclose(diffusion.score(model, text), torch.tensor(expected), atol=1e-4)


def test_likelihoods_sum_to_one_over_all_texts(script, monkeypatch):
    """Four characters of three kinds after two that are given; a table of three lines."""
    for key, value in {"block_size": 6, "context": 2, "columns": 2}.items():
        monkeypatch.setattr(script, key, value, raising=False)
    model, texts = random_model(script, chars="abc"), itertools.product("abc", repeat=4)
    nats = [mean_score(script, model, f"ab{''.join(text)}") for text in texts]
    assert sum(math.exp(-4 * n) for n in nats) == pytest.approx(1, abs=1e-4)
    assert max(math.exp(-4 * n) for n in nats) > 2 / 81  # and is not just uniform


def test_both_score_the_same_characters(script):
    """By a model that gives its three characters 1/2, 1/4, 1/4, whatever it reads."""
    p = torch.tensor([0.5, 0.25, 0.25]).log()
    text = "b" * 16 + "a" * 120 + "c" * 240 + "a" * 120 + "b" * 100  # two windows and a rest
    score = mean_score(script, Fake(script, "abc", lambda ids: p.expand(*ids.shape, 3)), text)
    assert score == pytest.approx(1.5 * math.log(2), abs=1e-6)


def test_scoring_is_repeatable_and_draws_nothing(script, monkeypatch):
    monkeypatch.setattr(script, "dropout", 0.5)
    model = random_model(script).train()
    state, text = torch.get_rng_state(), "once upon a time " * 60
    score = script.score(model, text)
    assert torch.equal(score, script.score(model, text)) and not score.requires_grad
    assert torch.equal(state, torch.get_rng_state())
