"""What the tests share: both scripts at a small size, models with random or known weights."""

from pathlib import Path

import pytest
import torch

import diffusion
import gpt

ROOT = Path(__file__).parent.parent
CHARS = "abcdefghijklmnopqrstuvwxyz .\n"


@pytest.fixture(params=[gpt, diffusion], ids=lambda script: script.name)
def script(request):
    return request.param


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Shrinks both models; the window stays at 256 characters, 16 of them context. One thread: at
    this size more of them wait for each other. Gives back how many there were."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "batch_size": 8}
    sizes |= {"dropout": 0.0, "token_dropout": 0.0, "max_iters": 2, "warmup_iters": 5}
    for module in (gpt, diffusion):
        for key, value in sizes.items():
            monkeypatch.setattr(module, key, value)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield threads
    torch.set_num_threads(threads)


def random_model(script, chars=CHARS, seed=0):
    """A model whose every weight is random: a fresh one predicts next to nothing from its input."""
    torch.manual_seed(seed)
    model = script.Model(script.CharTokenizer(chars), "once upon a time").eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return model


def mean_score(script, model, text):
    return script.score(model, text).mean().item()


class Fake(torch.nn.Module):
    """A model whose logits (B, T, V) are a given function of ids (B, T), or the same for all."""

    def __init__(self, script, chars, logits):
        super().__init__()
        self.tokenizer, self.logits = script.CharTokenizer(chars), logits
        self.register_buffer("rope", torch.zeros(1))

    def forward(self, ids):
        return self.logits(ids) if callable(self.logits) else self.logits


@pytest.fixture
def fails(capsys, tmp_path):
    """Runs a module's main on bad input; gives back the line it says, after one of usage where the
    arguments are wrong in themselves. Nothing may be written anywhere."""

    def files():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fails(module, *args):
        before = files()
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            module.main([str(arg) for arg in args])
        output = capsys.readouterr()
        *usage, line = output.err.splitlines()
        assert (stop.value.code, output.out) == (2, "") and files() == before
        assert usage in ([], [f"usage: {module.__name__}.py [options]"])
        assert line.startswith(f"{getattr(module, 'name', module.__name__)}.py: ")
        return line

    return fails


def checkpoint(model, path):
    contents = dict(model.sizes, chars=model.tokenizer.chars, prompt=model.prompt)
    weights = {key: weight.bfloat16() for key, weight in model.state_dict().items()}
    torch.save(dict(contents, weights=weights), path)
    return path
