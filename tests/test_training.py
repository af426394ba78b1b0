"""Loss, bound, training."""

import math
import random

import pytest
import torch
from conftest import random_model
from torch import nn

import diffusion
import gpt


class Stub(nn.Module):
    """Logits that are a parameter, or a function of the input: a model with known probabilities."""

    def __init__(self, script, chars, logits):
        super().__init__()
        self.tokenizer, self.logits = script.CharTokenizer(chars), logits
        self.register_buffer("rope", torch.zeros(1))

    def forward(self, ids):
        return self.logits(ids) if callable(self.logits) else self.logits


def doubled_letters(words, seed=0):
    """aa cc bb ...: log(4) nats in every three characters."""
    draw = random.Random(seed)
    return "".join(2 * draw.choice("abcd") + " " for _ in range(words))


ENTROPY = math.log(4) / 3


@pytest.fixture
def toy(monkeypatch, tmp_path, script):
    """A text and settings to learn it by; returns the paths of the text and the weights."""
    sizes = {"n_embd": 64, "block_size": 48, "batch_size": 32, "learning_rate": 0.01}
    for key, value in {**sizes, "max_iters": 150, "eval_interval": 50}.items():
        monkeypatch.setattr(script, key, value)
    data = tmp_path / "data.txt"
    data.write_text(doubled_letters(1500))
    return data, tmp_path / "new" / "weights.pt"


@pytest.mark.parametrize("rows", [4, 32, 64])
def test_exactly_l_characters_are_hidden_and_l_is_uniform(rows):
    """One row draws l from each rows-th part of 1..32."""
    ids = torch.randint(50, (rows, 32))
    torch.manual_seed(0)
    hidden = [diffusion.hide(ids, 99) == 99 for _ in range(400)]
    assert not torch.equal(hidden[0], hidden[1])
    counts = torch.stack([h.sum(1) for h in hidden])
    low = torch.arange(rows) * 32 // rows
    high = (torch.arange(1, rows + 1) * 32 + rows - 1) // rows
    assert ((low < counts) & (counts <= high)).all()
    share = counts.flatten().bincount(minlength=33)[1:] / counts.numel()
    assert ((share - 1 / 32).abs() < 5 * math.sqrt(1 / 32 / counts.numel())).all()


def test_hiding_keeps_the_rest_and_favours_no_place():
    ids = torch.randint(50, (6400, 32))
    torch.manual_seed(0)
    inputs = diffusion.hide(ids, 99)
    hidden = inputs == 99
    assert torch.equal(inputs[~hidden], ids[~hidden])
    share = hidden.float().mean(0)  # 16.5 of 32 in the mean
    assert ((share - 16.5 / 32).abs() < 5 * 0.5 / math.sqrt(6400)).all()


def test_only_hidden_characters_count_and_each_row_alike():
    """The gradient of the loss at zero logits, place by place."""
    chars, (B, T) = "abcd", (8, 24)
    logits = nn.Parameter(torch.zeros(B, T, 4))
    model, batch = Stub(diffusion, chars, logits), torch.randint(4, (B, T + 1))
    torch.manual_seed(1)
    hidden = diffusion.hide(batch[:, 1:], 4) == 4
    torch.manual_seed(1)
    loss = diffusion.loss_fn(model, batch)
    assert loss.shape == (B,)
    loss.mean().backward()
    right = torch.nn.functional.one_hot(batch[:, 1:], 4)
    expected = (0.25 - right) * (hidden / hidden.sum(1, keepdim=True) / B)[:, :, None]
    assert (~hidden).any() and torch.allclose(logits.grad, expected, atol=1e-7)


def test_gpt_is_asked_for_the_next_character():
    chars, (B, T) = "abcd", (8, 24)
    logits = nn.Parameter(torch.zeros(B, T, 4))
    batch = torch.randint(4, (B, T + 1))
    loss = gpt.loss_fn(Stub(gpt, chars, logits), batch)
    assert loss.shape == (B,)
    loss.mean().backward()
    right = torch.nn.functional.one_hot(batch[:, 1:], 4)
    assert torch.allclose(logits.grad, (0.25 - right) / (B * T), atol=1e-7)


def test_the_bound_by_hand(monkeypatch):
    """A model that gives a n / (T + 1) where n are hidden, and b the rest: 8 windows of a, 8 of b.
    With as many draws as characters, each window sees every n once, so both kinds score the mean of
    -log(n / (T + 1)) over n."""
    monkeypatch.setattr(diffusion, "block_size", 16)

    def logits(ids):
        p = (ids == 2).sum(1) / 17
        return torch.stack((p, 1 - p), -1).log()[:, None].expand(-1, 16, 2)

    score = diffusion.evaluate(Stub(diffusion, "ab", logits), "a" * 129 + "b" * 128)
    assert score == pytest.approx(-sum(math.log(n / 17) for n in range(1, 17)) / 16, abs=1e-6)


def test_gpts_score_by_hand(monkeypatch):
    """A model that always gives its chars 1/2, 1/4, 1/4; five windows of 16 and something over."""
    monkeypatch.setattr(gpt, "block_size", 16)
    p = torch.tensor([0.5, 0.25, 0.25]).log()
    text = "b" + "aabc" * 20 + "ccccccc"
    score = gpt.evaluate(Stub(gpt, "abc", lambda ids: p.expand(*ids.shape, 3)), text)
    assert score == pytest.approx((2 * math.log(2) + 2 * math.log(4)) / 4, abs=1e-6)


def test_scoring_is_repeatable_and_leaves_no_trace(script, monkeypatch):
    monkeypatch.setattr(script, "dropout", 0.5)
    model = random_model(script)
    text = "once upon a time " * 60
    for training in (True, False):
        model.train(training)
        state = torch.get_rng_state()
        first = script.evaluate(model, text)
        assert torch.equal(state, torch.get_rng_state()) and model.training is training
        torch.rand(1)
        assert script.evaluate(model, text) == first
        assert all(weight.grad is None for weight in model.parameters())


def test_training_learns_what_there_is_to_learn(script, toy, capsys, monkeypatch):
    data, weights = toy
    monkeypatch.setattr(script, "learning_rate", 0.03)
    monkeypatch.setattr(script, "max_iters", 60 if script is gpt else 150)
    monkeypatch.setattr(script, "eval_interval", script.max_iters // 3)
    script.main(["--train", "--data", str(data), "--weights", str(weights), "--seed", "1"])
    model = script.load(weights)
    score = script.evaluate(model, doubled_letters(200, seed=1))
    limit = 0.6 if script is gpt else 0.8  # from log(5) = 1.61; no model can pass the entropy
    assert ENTROPY < score < limit
    *_, text = script.generate(model, "aa bb ", 300)
    words = [word for word in text.split(" ")[:-1] if word]
    right = sum(len(word) == 2 and word[0] == word[1] for word in words) / len(words)
    assert right > 0.9
    assert len({word[0] for word in words}) == 4
    output = capsys.readouterr()
    assert output.out.count("nats per character") == 3 and "aa " in output.out
    assert str(weights) in output.err
    assert [path.name for path in weights.parent.iterdir()] == ["weights.pt"]


def test_the_command_line_sets_iterations_and_batch(script, toy, monkeypatch):
    data, weights = toy
    shapes, loss_fn = [], script.loss_fn

    def watch(model, batch):
        shapes.extend([tuple(batch.shape)] * model.training)
        return loss_fn(model, batch)

    monkeypatch.setattr(script, "loss_fn", watch)
    args = ["--train", "--iters", "3", "--batch", "5"]
    script.main([*args, "--data", str(data), "--weights", str(weights)])
    assert shapes == [(5, 49)] * 3


@pytest.fixture
def scripted(script, toy, monkeypatch):
    """Training whose validation scores are set beforehand; keeps what each of them would score."""
    data, weights = toy
    for key, value in {"max_iters": 6, "eval_interval": 2, "batch_size": 4}.items():
        monkeypatch.setattr(script, key, value)
    states = []

    def run(*scores, args=()):
        upcoming = iter(scores)

        def evaluate(model, text, **_):
            states.append({key: value.cpu().clone() for key, value in model.state_dict().items()})
            score = next(upcoming)
            if score is KeyboardInterrupt:
                raise score
            return score

        monkeypatch.setattr(script, "evaluate", evaluate)
        script.main(["--train", "--data", str(data), "--weights", str(weights), *args])

    return run, states, weights


def same_weights(model, state):
    loaded = model.state_dict()
    return all(torch.equal(loaded[k].cpu(), state[k].bfloat16().float()) for k in state)


def test_the_best_weights_are_kept_not_the_last(script, scripted):
    run, states, weights = scripted
    run(3.0, 1.0, 2.0)
    model = script.load(weights)
    assert [same_weights(model, state) for state in states] == [False, True, False]
    assert model.prompt == doubled_letters(1500)[:16] and not model.training


def test_ctrl_c_leaves_the_best_so_far(script, scripted, capsys):
    run, states, weights = scripted
    with pytest.raises(SystemExit) as stop:
        run(3.0, KeyboardInterrupt)
    assert stop.value.code == 130
    assert same_weights(script.load(weights), states[0])
    assert f"{weights} holds iteration 2" in capsys.readouterr().err


def content(path):
    """The weights in a checkpoint."""
    return torch.load(path, weights_only=True)["weights"]


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(script, scripted, monkeypatch):
    """Resumed after its second of three evaluations it sees the same batches, masks, dropout and
    learning rates, and ends with the same weights; what it need not remember is gone."""
    run, _, weights = scripted
    monkeypatch.setattr(script, "dropout", 0.2)
    run(3.0, 2.0, 1.0)
    whole = content(weights)
    weights.unlink()
    with pytest.raises(SystemExit):
        run(3.0, 2.0, KeyboardInterrupt, args=["--iters", "6", "--batch", "4"])
    assert {path.name for path in weights.parent.iterdir()} == {"weights.pt", "weights.resume"}
    monkeypatch.setattr(script, "max_iters", 100)
    monkeypatch.setattr(script, "batch_size", 1)
    run(1.0, args=["--resume", "--seed", "5"])
    resumed = content(weights)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert [path.name for path in weights.parent.iterdir()] == ["weights.pt"]


def test_a_resumed_run_remembers_its_best(script, scripted, capsys):
    run, states, weights = scripted
    with pytest.raises(SystemExit):
        run(1.0, KeyboardInterrupt)
    run(3.0, 2.0, args=["--resume"])
    assert same_weights(script.load(weights), states[0])
    assert f"{weights} holds iteration 2: 1.0000" in capsys.readouterr().err.splitlines()[-1]


def test_without_a_state_training_goes_on_from_the_weights(script, scripted, monkeypatch):
    """In float32 from the start: also the angles of RoPE, which loading rounds."""
    run, _, weights = scripted
    run(3.0, 2.0, 1.0)
    before = content(weights)
    monkeypatch.setattr(script, "learning_rate", 0.0)
    run(3.0, 2.0, 1.0, args=["--resume"])
    after = content(weights)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert script.load(weights, torch.float32).rope.dtype == torch.float32


def test_the_weights_that_were_there_are_kept_once(script, scripted):
    """By the first save of a run, and no later one takes their place."""
    run, _, weights = scripted
    run(3.0, 2.0, 1.0)
    first = weights.read_bytes()
    run(9.0, 8.0, 7.0, args=["--seed", "2"])
    assert weights.with_suffix(".old").read_bytes() == first != weights.read_bytes()
    with pytest.raises(SystemExit):
        run(9.0, KeyboardInterrupt, args=["--seed", "3"])
    second = weights.with_suffix(".old").read_bytes()
    run(8.0, 7.0, args=["--resume"])
    assert weights.with_suffix(".old").read_bytes() == second != first


def test_all_is_saved_before_anything_is_shown(script, scripted, monkeypatch):
    """A console that fails, for whatever reason, loses nothing."""
    run, states, weights = scripted

    def fail(*args, **kwargs):
        raise UnicodeEncodeError("cp1252", "x", 0, 1, "no such character")

    monkeypatch.setattr(script.tqdm, "write", fail)
    with pytest.raises(SystemExit):
        run(3.0)
    assert same_weights(script.load(weights), states[0])
    assert weights.with_suffix(".resume").exists()


@pytest.mark.parametrize("works", [True, False])
def test_where_torch_compile_fails_training_goes_on(script, toy, monkeypatch, capsys, works):
    """On a processor that says it is a GPU: compiled once, or one line and no compiling."""
    data, weights = toy
    used = []

    def compile(model):
        def compiled(ids):
            used.append(tuple(ids.shape))
            if not works:
                raise RuntimeError("no compiler\nand a long story")
            return model(ids)

        compiled.tokenizer = model.tokenizer
        return compiled

    class Device(str):
        type = "cuda"

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(script, "best_device", lambda: (Device("cpu"), torch.float32))
    args = ["--train", "--iters", "3", "--data", str(data), "--weights", str(weights)]
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: torch.set_grad_enabled(True))
    script.main(args)
    lines = [line for line in capsys.readouterr().err.splitlines() if "torch.compile" in line]
    assert len(lines) == (not works) and used == [(32, 48)] * (4 if works else 1)


def test_ctrl_c_before_any_score_keeps_the_old_weights(scripted, capsys):
    run, _, weights = scripted
    weights.parent.mkdir()
    weights.write_bytes(b"older")
    with pytest.raises(SystemExit):
        run(KeyboardInterrupt)
    assert weights.read_bytes() == b"older" and "nothing saved" in capsys.readouterr().err


def test_scores_and_samples_leave_training_as_it_was(script, scripted, monkeypatch):
    """Scored once or three times on the way, training ends with the same weights."""
    run, states, _ = scripted
    monkeypatch.setattr(script, "dropout", 0.2)
    run(1.0, 1.0, 1.0)
    monkeypatch.setattr(script, "eval_interval", 6)
    run(1.0)
    assert all(torch.equal(states[2][key], states[3][key]) for key in states[2])


def test_validation_text_is_never_trained_on(script, toy, monkeypatch):
    """The last tenth is all z, which no batch of training may hold; the nine before it end in y."""
    data, weights = toy
    text = doubled_letters(400)
    data.write_text(text[:1070] + "yyyyyyyyyy" + 120 * "z")
    seen, loss_fn = set(), script.loss_fn

    def watch(model, batch, *args):
        if model.training:
            seen.update(model.tokenizer.decode(batch.flatten()))
        return loss_fn(model, batch, *args)

    monkeypatch.setattr(script, "loss_fn", watch)
    monkeypatch.setattr(script, "max_iters", 40)
    script.main(["--train", "--data", str(data), "--weights", str(weights)])
    assert seen == set("abcdy ")
    assert "z" in script.load(weights).tokenizer.chars
