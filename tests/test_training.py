"""What training hides and asks, the loop, and what it saves."""

import itertools
import math
import os
import random

import pytest
import torch
from conftest import CHARS, Fake, mean_score, random_model
from torch import nn

import diffusion
import gpt


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
    sizes = {"block_size": 48, "batch_size": 32, "learning_rate": 0.02}
    for key, value in {**sizes, "max_iters": 3, "eval_interval": 80}.items():
        monkeypatch.setattr(script, key, value)
    data = tmp_path / "data.txt"
    data.write_text(doubled_letters(1500))
    return data, tmp_path / "new" / "folder" / "weights.v1"


def command(toy, *args):
    return ["--train", "--data", str(toy[0]), "--weights", str(toy[1]), *map(str, args)]


def train(script, toy, *args):
    script.main(command(toy, *args))


def test_training_learns_what_there_is_to_learn(script, toy, capsys, monkeypatch):
    iters, n_embd = (80, 32) if script is gpt else (160, 64)
    monkeypatch.setattr(script, "n_embd", n_embd)
    train(script, toy, "--iters", iters, "--seed", 1)
    model = script.load(toy[1])
    score = mean_score(script, model, doubled_letters(200, seed=1))
    assert math.log(4) / 3 < score < 0.6  # no model can pass the entropy, 0.46; log(5) is 1.61
    *_, (text, _) = script.generate(model, length=300)
    words = text.split()[:-1]
    right = sum(len(w) == 2 and w[0] == w[1] for w in words) / len(words)
    assert right > 0.85, words
    assert len({word[0] for word in words}) == 4
    output = capsys.readouterr().err
    assert output.count("nats per character") == (2 if script is gpt else 3)
    assert f"{toy[1]}: " in output
    assert [path.name for path in toy[1].parent.iterdir()] == ["weights.v1"]


def test_rows_are_never_of_the_validation_text(script, toy, monkeypatch):
    """The last tenth is all z, which no row of training may hold; the nine before it end in y. The
    byte-order mark is no character."""
    text, shapes, seen, loss_fn = doubled_letters(400), [], set(), script.loss_fn
    toy[0].write_text(text[:1070] + "yyyyyyyyyy" + 120 * "z", encoding="utf-8-sig")

    def watch(model, rows):
        shapes.append(tuple(rows.shape))
        seen.update(model.tokenizer.decode(rows.flatten()))
        assert model.training
        return loss_fn(model, rows)

    monkeypatch.setattr(script, "loss_fn", watch)
    monkeypatch.setattr(script, "calibrate", lambda model, text: 0.0)  # long, as z is never learned
    train(script, toy, "--iters", 20)
    assert shapes == [(32, 49)] * 20
    assert seen == set("abcdy ") and script.load(toy[1]).tokenizer.chars == " abcdyz"


@pytest.mark.parametrize("triton", [True, False])
def test_on_cuda_training_is_compiled_where_triton_is_there(script, toy, monkeypatch, triton):
    """On a processor that says it is a GPU."""
    used = []

    def compile(model):
        def compiled(ids):
            used.append(tuple(ids.shape))
            return model(ids)

        compiled.tokenizer = model.tokenizer
        return compiled

    class Device(str):
        type = "cuda"

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(script, "find_spec", lambda name: triton and name == "triton")
    monkeypatch.setattr(script, "best_device", lambda: (Device("cpu"), torch.float32))
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: torch.set_grad_enabled(True))
    train(script, toy)
    assert used == [(32, 48)] * 3 * triton


def test_a_large_text_is_validated_on_its_end_alone(script, tmp_path):
    (path := tmp_path / "large.txt").write_text("ab" * 700_000)
    assert [len(text) for text in script.read_splits(path)] == [1_280_000, 120_000]


# ---- what is saved -----------------------------------------------------------------------------
@pytest.fixture
def scripted(script, toy, monkeypatch):
    """Runs of six iterations whose three scores are set beforehand; keeps what would be scored."""
    for key, value in {"max_iters": 6, "eval_interval": 2, "batch_size": 4, "dropout": 0.2}.items():
        monkeypatch.setattr(script, key, value)
    states = []

    def run(*scores, args=()):
        upcoming = iter(scores)

        def score(model, text):
            model.eval()
            if (nats := next(upcoming, None)) is None:  # a smaller head is no better
                return torch.ones(1)
            states.append({key: value.cpu().clone() for key, value in model.state_dict().items()})
            if nats is KeyboardInterrupt:
                raise nats
            return torch.tensor(nats)

        monkeypatch.setattr(script, "score", score)
        train(script, toy, *args)

    return run, states, toy[1]


def interrupted(run, *args, **kwargs):
    with pytest.raises(SystemExit) as stop:
        run(*args, KeyboardInterrupt, **kwargs)
    assert stop.value.code == 130


def resume(weights):
    return weights.parent / "weights.v1.resume"


def equal(state, other):
    return all(torch.equal(state[key], other[key]) for key in state)


def holds(path, state):
    """Whether the weights in a checkpoint are those of a state, rounded."""
    rounded = {key: value.bfloat16() for key, value in state.items()}
    return equal(rounded, torch.load(path, weights_only=True)["weights"])


def test_the_best_weights_are_kept_not_the_last(script, scripted):
    """Also where the last of three scores is of a run that went on; until then one can write with
    the best so far."""
    run, states, weights = scripted
    interrupted(run, 3.0, 1.0)
    assert not weights.exists() and holds(resume(weights), states[1])
    assert script.load(resume(weights)).prompt == doubled_letters(1500)[:16]
    run(2.0)
    assert [holds(weights, state) for state in states] == [False, True, False, False]
    assert script.load(weights).prompt == doubled_letters(1500)[:16]


def test_all_weights_decay(script, scripted, monkeypatch):
    """Here to zero in the first step, so that its update is all that is left of them."""
    run, states, _ = scripted
    monkeypatch.setattr(script, "weight_decay", 1 / script.rate(1, 1))
    run(1.0, args=["--iters", 1])
    assert all(weight.abs().max() < 0.02 for weight in states[0].values())


def test_the_same_command_goes_on_as_if_nothing_had_been(script, scripted, capsys):
    """Interrupted after its second of three scores it sees the same rows, masks, dropout and rates,
    and ends with the same weights."""
    run, states, weights = scripted
    run(3.0, 2.0, 1.0)
    weights.unlink()
    interrupted(run, 3.0, 2.0)
    assert "the same command goes on after iteration 4" in capsys.readouterr().err
    assert [*weights.parent.iterdir()] == [resume(weights)]
    run(1.0)
    assert "goes on after iteration 4" in capsys.readouterr().err
    assert equal(states[2], states[-1]) and holds(weights, states[2])
    assert [*weights.parent.iterdir()] == [weights]


def test_the_head_of_the_best_weights_is_shrunk_while_that_scores_better(script, scripted):
    """Also where that was interrupted."""
    run, states, weights = scripted
    interrupted(run, 3.0, 1.0, 2.0, 1.0)
    run(1.0, 0.8, 0.7, 0.9)
    kept = torch.load(weights, weights_only=True)["weights"]
    shrunk = dict(states[1], **{"head.weight": states[1]["head.weight"] * 0.95**2})
    for key, weight in shrunk.items():
        torch.testing.assert_close(kept[key].float(), weight, rtol=0.01, atol=0)


def test_calibration_ends_at_the_best_scale(script, monkeypatch):
    """In bfloat16 too, as on most machines, where autocast keeps the weights that it has cast."""
    monkeypatch.setattr(script, "block_size", 48)
    model, text = random_model(script), CHARS * 4
    with torch.autocast("cpu", torch.bfloat16):
        before, best = mean_score(script, model, text), script.calibrate(model, text)
    scores = []
    for scale in (1, 0.95, 1 / 0.95**2):  # as it is, one step further, one step back
        model.head.weight.data.mul_(scale)
        with torch.autocast("cpu", torch.bfloat16):
            scores.append(mean_score(script, model, text))
    assert scores[0] == pytest.approx(best, rel=1e-3)
    assert best < 1.001 * min(scores[1:]) and best < before / 1.3


def test_scores_leave_training_as_it_was(script, scripted, monkeypatch):
    """Scored once or three times on the way, training ends with the same weights."""
    run, states, _ = scripted
    run(1.0, 1.0, 1.0)
    monkeypatch.setattr(script, "eval_interval", 6)
    run(1.0)
    assert equal(states[2], states[3])
    run(1.0, args=["--seed", "2"])
    assert not equal(states[2], states[4])


def test_weights_stay_until_a_run_ends_and_then_as_old(script, scripted):
    """However many runs are begun and interrupted before."""
    run, _, weights = scripted
    run(3.0, 2.0, 1.0)
    first, old = weights.read_bytes(), weights.parent / "weights.v1.old"
    interrupted(run, 9.0, args=["--seed", "2"])
    interrupted(run, 8.0, args=["--seed", "2"])
    assert weights.read_bytes() == first and not old.exists()
    run(7.0, args=["--seed", "2"])
    assert old.read_bytes() == first != weights.read_bytes()
    assert {*weights.parent.iterdir()} == {weights, old}


@pytest.mark.parametrize("change", ["iters", "seed", "n_layer", "text", "script", "damage"])
def test_only_the_same_run_goes_on(script, scripted, toy, fails, monkeypatch, change):
    """What has reached an iteration is neither dropped nor mixed with another run."""
    run, _, weights = scripted
    interrupted(run, 3.0)
    args = []
    if change in ("iters", "seed"):
        args = [f"--{change}", "5"]
    elif change == "n_layer":
        monkeypatch.setattr(script, "n_layer", 3)
    elif change == "text":
        toy[0].write_text(doubled_letters(1500) + "aa ")
    elif change == "script":
        monkeypatch.setattr(script, "script_path", toy[0])
    else:
        resume(weights).write_bytes(b"half")
    line = fails(script, *command(toy, *args))
    says = "iters, seed" if change == "damage" else f"(other {change})"
    assert f"{resume(weights)} is damaged or of another run" in line and says in line
    assert "repeat its command, delete the file, or name other --weights" in line


def test_an_interrupted_save_goes_on_from_what_was_saved_before(
    script, scripted, capsys, monkeypatch
):
    """Also in the last one, of the weights alone."""
    run, _, weights = scripted
    save, saves = script.save, itertools.count(1)

    def saved(contents, path):
        if next(saves) in (3, 7):  # that of iteration 4; that of the weights, after going on from 2
            raise KeyboardInterrupt
        save(contents, path)

    monkeypatch.setattr(script, "save", saved)
    for scores, done in ([3.0, 2.0], 2), ([2.0, 1.0], 6):
        with pytest.raises(SystemExit) as stop:
            run(*scores)
        assert stop.value.code == 130
        assert f"goes on after iteration {done}\n" in capsys.readouterr().err
    run()
    assert [*weights.parent.iterdir()] == [weights]


def out_of_memory(model, rows):
    raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.")


@pytest.mark.parametrize("stop", ["memory", "ctrl-c"])
def test_a_run_of_no_iteration_is_begun_anew(script, scripted, toy, fails, monkeypatch, stop):
    """By the same command, and by another one as an error may advise: in an edited script, say."""
    run, _, weights = scripted
    for path in (script.script_path, toy[0]):
        if stop == "memory":
            with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
                patch.setattr(script, "loss_fn", out_of_memory)
                run()
            assert end.value.code == 2
        else:
            interrupted(run)
        assert torch.load(resume(weights), weights_only=True) == {}
        monkeypatch.setattr(script, "script_path", path)
        run(3.0, 2.0, 1.0)
    assert not resume(weights).exists()


def test_a_run_that_diverges_ends_with_one_line(script, scripted, capsys):
    """Weights that are there stay; nothing is left that another learning rate would trip over."""
    run, _, weights = scripted
    run(3.0, 2.0, 1.0)
    good = weights.read_bytes()
    with pytest.raises(SystemExit) as stop:
        run(1.0, math.nan)
    assert stop.value.code == 2 and "smaller learning_rate\n" in capsys.readouterr().err
    assert weights.read_bytes() == good and [*weights.parent.iterdir()] == [weights]


def test_what_cannot_be_written_is_found_before_the_first_iteration(
    script, scripted, toy, fails, monkeypatch, capsys
):
    """A folder that is a file; a disk that fails since the run was interrupted."""
    run, _, weights = scripted
    interrupted(run, 3.0)
    monkeypatch.setattr(script, "loss_fn", None)
    assert "data.txt" in fails(script, *command((toy[0], toy[0] / "weights.pt")))
    monkeypatch.setattr(os, "fsync", lambda _: os.close(-1))
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2 and f"cannot write {resume(weights)}" in capsys.readouterr().err


def test_all_is_saved_before_anything_is_shown(script, scripted, monkeypatch):
    """A console that fails, for whatever reason, loses nothing."""
    run, states, weights = scripted
    monkeypatch.setattr(script.tqdm, "write", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(3.0)
    assert holds(resume(weights), states[0])
    assert torch.load(resume(weights), weights_only=True)["done"] == 2
