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
    sizes = {"n_embd": 64, "block_size": 48, "batch_size": 32}
    for key, value in {**sizes, "max_iters": 150, "eval_interval": 50}.items():
        monkeypatch.setattr(script, key, value)
    data = tmp_path / "data.txt"
    data.write_text(doubled_letters(1500))
    return data, tmp_path / "new" / "weights.pt"


def test_exactly_n_characters_are_hidden_and_n_is_uniform():
    ids = torch.randint(50, (64, 32))
    torch.manual_seed(0)
    for _ in range(5):
        hidden = diffusion.hide(ids, 99, 64) == 99
        assert torch.equal(diffusion.hide(ids, 99, 64) == 99, hidden) is False
        counts = hidden.sum(1)
        assert counts.sort().values.tolist() == [n for n in range(1, 33) for _ in range(2)]
    counts = torch.cat([(diffusion.hide(ids, 99, 4) == 99).sum(1) for _ in range(400)])
    quarter = (counts - 1) // 8
    assert torch.equal(quarter, torch.arange(4).repeat(len(counts) // 4))
    share = counts.bincount(minlength=33)[1:] / len(counts)
    assert ((share - 1 / 32).abs() < 5 * math.sqrt(1 / 32 / len(counts))).all()


def test_hiding_keeps_the_rest_and_favours_no_place():
    ids = torch.randint(50, (6400, 32))
    torch.manual_seed(0)
    inputs = diffusion.hide(ids, 99, 64)
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
    hidden = diffusion.hide(batch[:, 1:], 4, B) == 4
    torch.manual_seed(1)
    diffusion.loss_fn(model, batch).backward()
    right = torch.nn.functional.one_hot(batch[:, 1:], 4)
    expected = (0.25 - right) * (hidden / hidden.sum(1, keepdim=True) / B)[:, :, None]
    assert (~hidden).any() and torch.allclose(logits.grad, expected, atol=1e-7)


def test_gpt_is_asked_for_the_next_character():
    chars, (B, T) = "abcd", (8, 24)
    logits = nn.Parameter(torch.zeros(B, T, 4))
    batch = torch.randint(4, (B, T + 1))
    gpt.loss_fn(Stub(gpt, chars, logits), batch).backward()
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
    monkeypatch.setattr(script, "max_iters", 150 if script is gpt else 300)
    monkeypatch.setattr(script, "eval_interval", script.max_iters // 3)
    script.main(["--train", "--data", str(data), "--weights", str(weights), "--seed", "1"])
    model = script.load(weights)
    score = script.evaluate(model, doubled_letters(200, seed=1))
    limit = 0.6 if script is gpt else 1.1  # from log(5) = 1.61; no model can pass the entropy
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


@pytest.fixture
def scripted(script, toy, monkeypatch):
    """Training whose validation scores are set beforehand; keeps what each of them would score."""
    data, weights = toy
    monkeypatch.setattr(script, "max_iters", 6)
    monkeypatch.setattr(script, "eval_interval", 2)
    states = []

    def run(*scores):
        upcoming = iter(scores)

        def evaluate(model, text, **_):
            states.append({key: value.cpu().clone() for key, value in model.state_dict().items()})
            score = next(upcoming)
            if score is KeyboardInterrupt:
                raise score
            return score

        monkeypatch.setattr(script, "evaluate", evaluate)
        script.main(["--train", "--data", str(data), "--weights", str(weights)])

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
