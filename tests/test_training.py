"""What training hides and asks, the loop, and what it saves."""

import itertools
import math
import random
import re

import pytest
import torch
from conftest import Fake, mean_score
from torch import nn

import diffusion


# ---- loss --------------------------------------------------------------------------------------
def test_one_to_eight_neighbouring_columns_are_hidden_and_never_the_context():
    """Each number in as many rows, give or take one; where they begin is uniform."""
    torch.manual_seed(0)
    ids, begins = torch.randint(50, (20, 256)), torch.zeros(8)
    for _ in range(200):
        inputs = diffusion.hide(ids, 99)
        hidden = inputs == 99
        assert torch.equal(inputs[~hidden], ids[~hidden]) and not hidden[:, :16].any()
        table = hidden[:, 16:].view(20, 30, 8)
        assert (table == table[:, :1]).all()
        columns = table[:, 0]
        edges = columns & ~columns.roll(1, 1)  # where neighbours begin, round the edge of the table
        assert (edges.sum(1) <= 1).all()
        counts = columns.sum(1).bincount(minlength=9)
        assert counts[0] == 0 and (counts[1:] // 2 == 1).all()  # 20 rows: two or three of each
        begins += edges.sum(0)
    assert (begins / begins.sum() - 1 / 8).abs().max() < 5 * math.sqrt(7 / 64 / begins.sum())


def test_gpt_is_asked_for_all_next_characters_diffusion_for_the_hidden_ones(script):
    """The gradient of the loss at zero logits, place by place; each row counts alike."""
    logits, rows = nn.Parameter(torch.zeros(8, 24, 4)), torch.randint(4, (8, 25))
    torch.manual_seed(1)
    hidden = diffusion.hide(rows[:, 1:], 4) == 4
    asked = hidden if script is diffusion else torch.ones(8, 24)
    torch.manual_seed(1)
    script.loss_fn(Fake(script, "abcd", logits), rows).backward()
    right = nn.functional.one_hot(rows[:, 1:], 4)
    expected = (0.25 - right) * (asked / asked.sum(1, keepdim=True) / 8)[:, :, None]
    assert torch.allclose(logits.grad, expected, atol=1e-7)


@pytest.mark.parametrize("iters", [1000, 3])
def test_the_rate_rises_to_its_peak_and_falls_from_there(script, monkeypatch, iters):
    monkeypatch.setattr(script, "warmup_iters", 100)
    rates = [script.rate(i, iters) / script.learning_rate for i in range(1, iters + 1)]
    assert rates[:3] == pytest.approx([0.01, 0.02, 0.03])  # a short run only warms up
    if iters == 1000:
        assert rates[99] == max(rates) == 1 and rates[-1] == pytest.approx(1 / 900)
        falls = [b - a for a, b in itertools.pairwise(rates[100:])]
        assert falls == pytest.approx([-1 / 900] * 899)


# ---- the loop ----------------------------------------------------------------------------------
def doubled_letters(words, seed=0):
    """aa cc bb ...: log(4) nats in every three characters."""
    draw = random.Random(seed)
    return "".join(2 * draw.choice("abcd") + " " for _ in range(words))


@pytest.fixture
def toy(monkeypatch, tmp_path, script):
    """A text and settings to train on it; returns the paths of the text and the weights."""
    sizes = {"block_size": 24, "context": 8, "columns": 4, "batch_size": 16, "learning_rate": 0.02}
    for key, value in {**sizes, "eval_interval": 80}.items():
        monkeypatch.setattr(script, key, value, raising=False)
    data = tmp_path / "data.txt"
    data.write_text(doubled_letters(1500))
    return data, tmp_path / "new" / "folder" / "weights.v1"


def command(toy, *args):
    return ["--train", "--data", str(toy[0]), "--weights", str(toy[1]), *map(str, args)]


def test_training_learns_what_there_is_to_learn(script, toy, capsys, monkeypatch):
    monkeypatch.setattr(script, "n_embd", 64)
    script.main(command(toy, "--iters", 100, "--seed", 1))
    model = script.load(toy[1])
    score = mean_score(script, model, doubled_letters(200, seed=1))
    assert math.log(4) / 3 < score < 0.6  # no model can pass the entropy, 0.46; log(5) is 1.61
    *_, (text, _) = script.generate(model, length=300)
    words = text.split()[:-1]
    right = sum(len(w) == 2 and w[0] == w[1] for w in words) / len(words)
    assert right > 0.85, words
    assert len({word[0] for word in words}) == 4
    assert f"{toy[1]}: " in capsys.readouterr().err
    assert [*toy[1].parent.iterdir()] == [toy[1]]


def test_rows_are_always_new_and_never_of_the_validation_text(script, toy, monkeypatch):
    """The last tenth is all z, which no row of training may hold; the nine before it end in y. The
    byte-order mark is no character. Another seed draws other rows in each iteration."""
    text, batches, loss_fn = doubled_letters(400), [], script.loss_fn
    toy[0].write_text(text[:1070] + "yyyyyyyyyy" + 120 * "z", encoding="utf-8-sig")

    def watch(model, rows):
        batches.append([model.tokenizer.decode(row) for row in rows])
        assert model.training
        return loss_fn(model, rows)

    monkeypatch.setattr(script, "loss_fn", watch)
    for seed in 1, 2:
        script.main(command(toy, "--iters", 10, "--seed", seed))
    assert [[len(row) for row in rows] for rows in batches] == [[25] * 16] * 20
    assert len({tuple(rows) for rows in batches}) == 20
    assert set("".join(itertools.chain(*batches))) == set("abcdy ")
    assert script.load(toy[1]).tokenizer.chars == " abcdyz"


def test_a_large_text_is_validated_on_its_end_alone(script, tmp_path):
    (path := tmp_path / "large.txt").write_text("ab" * 700_000)
    assert [len(text) for text in script.read_splits(path)] == [1_280_000, 120_000]


# ---- what is saved -----------------------------------------------------------------------------
@pytest.fixture
def scripted(script, toy, monkeypatch):
    """Runs of six iterations whose three scores are set beforehand, and the weights at each. A run
    of fewer scores is interrupted. Returns run(), those weights, and the path of the weights."""
    for key, value in {"max_iters": 6, "eval_interval": 2, "batch_size": 4, "dropout": 0.2}.items():
        monkeypatch.setattr(script, key, value)
    states = []

    def run(*scores, args=(), ends=None):
        upcoming = iter(scores)

        def score(model, text):
            model.eval()
            if (nats := next(upcoming, None)) is None:
                raise KeyboardInterrupt
            states.append({key: value.cpu().clone() for key, value in model.state_dict().items()})
            return torch.tensor(nats)

        monkeypatch.setattr(script, "score", score)
        if ends is None:
            script.main(command(toy, *args))
        else:
            with pytest.raises(SystemExit) as stop:
                script.main(command(toy, *args))
            assert stop.value.code == ends

    return run, states, toy[1]


def equal(state, other):
    return all(torch.equal(state[key], other[key]) for key in state)


def holds(script, path, state):
    """Whether a checkpoint can be loaded and its weights are those of a state, rounded."""
    model, rounded = script.load(path, torch.float32), {}
    for key, value in state.items():
        rounded[key] = value.bfloat16().float()
    return model.prompt == doubled_letters(1500)[:8] and equal(rounded, model.state_dict())


def states_in(folder):
    return sorted(folder.glob("weights.v1.????????.resume"))


def test_the_same_command_goes_on_as_if_nothing_had_been(script, scripted, capsys):
    """Interrupted after its second of three scores it sees the same rows, masks, dropout and rates,
    and ends with the same weights: the best ones. Until then one can write with its state."""
    run, states, weights = scripted
    run(3.0, 1.0, 2.0)
    capsys.readouterr()
    assert holds(script, weights, states[1]) and not equal(states[1], states[2])
    weights.unlink()
    run(3.0, 1.0, ends=130)
    (state,) = weights.parent.iterdir()
    assert [state] == states_in(weights.parent) and holds(script, state, states[1])
    errors = capsys.readouterr().err
    assert f"state in {state}, 0 of 6 iterations done\n" in errors
    assert "iteration 2: 3.0000 nats" in errors
    assert errors.endswith(".py: stopped; a training goes on with the same command\n")
    run(2.0)
    assert f"state in {state}, 4 of 6 iterations done\n" in capsys.readouterr().err
    assert equal(states[2], states[-1]) and holds(script, weights, states[1])
    assert [*weights.parent.iterdir()] == [weights]


@pytest.mark.parametrize("stopped, left", [(3, [2.0, 1.0]), (5, [])], ids=["state", "weights"])
def test_after_an_interrupted_save_it_goes_on_from_the_one_before(
    script, scripted, monkeypatch, stopped, left
):
    """A run saves its state before it begins and after each of three scores, then the weights. What
    these were before is there all the time."""
    run, states, weights = scripted
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"before")
    save, saves = script.save, itertools.count(1)

    def interrupted(contents, path):
        if next(saves) == stopped:
            raise KeyboardInterrupt
        save(contents, path)

    monkeypatch.setattr(script, "save", interrupted)
    run(3.0, 2.0, 1.0, ends=130)
    scored = 2 if left else 3
    assert len(states) == scored and weights.read_bytes() == b"before"
    run(*left)
    assert len(states) == scored + len(left) and holds(script, weights, states[-1])
    assert {*weights.parent.iterdir()} == {weights, weights.parent / "weights.v1.old"}


def test_another_run_has_another_state(script, scripted, toy, monkeypatch, capsys):
    """Whatever it differs in, it begins anew and leaves the states of the others as they are."""
    run, _, weights = scripted
    run(3.0, ends=130)
    text = doubled_letters(1500)
    changes = [
        lambda: monkeypatch.setattr(script, "n_layer", 1),
        lambda: toy[0].write_text("b" + text[1:]),
        lambda: toy[0].write_text(text[:-1] + "b"),
        lambda: monkeypatch.setattr(script, "script_path", toy[0]),
        lambda: args.extend(["--iters", "5"]),
        lambda: args.extend(["--seed", "5"]),
    ]
    args, before = [], {}
    for change in changes:
        before |= {path: path.read_bytes() for path in states_in(weights.parent)}
        change()
        run(3.0, args=args, ends=130)
        assert re.search(r", 0 of \d iterations done\n", capsys.readouterr().err)
        assert len(states_in(weights.parent)) == len(before) + 1
    assert all(path.read_bytes() == contents for path, contents in before.items())


def test_all_weights_decay(script, scripted, monkeypatch):
    """Here to zero in the first step, so that its update is all that is left of them."""
    run, states, _ = scripted
    monkeypatch.setattr(script, "weight_decay", 1 / script.rate(1, 1))
    run(1.0, args=["--iters", 1])
    assert all(weight.abs().max() < 0.02 for weight in states[0].values())


def test_weights_stay_until_a_run_ends_and_then_as_old(script, scripted, capsys):
    """Also where a run is interrupted or diverges."""
    run, _, weights = scripted
    run(3.0, 2.0, 1.0)
    first, old = weights.read_bytes(), weights.parent / "weights.v1.old"
    run(9.0, math.nan, args=["--seed", "2"], ends=2)
    assert capsys.readouterr().err.endswith("smaller learning_rate\n")
    run(8.0, args=["--seed", "3"], ends=130)
    assert weights.read_bytes() == first and not old.exists()
    run(7.0, 6.0, args=["--seed", "3"])
    assert old.read_bytes() == first != weights.read_bytes()
