"""The weights in the repository, and the real text where it is there."""

import hashlib
import re

import pytest
import torch
from conftest import mean_score

import gpt

text_is_here = pytest.mark.skipif(not gpt.data_path.exists(), reason="there is no data.txt")


@pytest.fixture(autouse=True)
def real(small, monkeypatch):
    """Takes back what conftest.py shrinks."""
    monkeypatch.undo()
    torch.set_num_threads(small)


@text_is_here
def test_the_text_is_tiny_shakespeare(script):
    content = script.data_path.read_bytes()
    assert hashlib.sha256(content).hexdigest() == script.data_sha256
    train, validation = script.read_splits(script.data_path)
    assert (train + validation).encode() == content and len(validation) == 111_540


def test_the_weights_are_of_this_model(script):
    model = script.load(script.weights_path)
    assert sum(weight.numel() for weight in model.parameters()) // 100_000 == 106
    assert len(model.prompt) == 16 and not model.training
    assert script.weights_path.stat().st_size < 22e6


@text_is_here
def test_the_weights_predict_what_they_were_not_trained_on_and_write_words_and_lines(script):
    """Characters drawn by their frequency alone would score 3.3."""
    train, validation = script.read_splits(script.data_path)
    model = script.load(script.weights_path)
    score = mean_score(script, model, validation[:3_000])
    assert 1.1 < score < (1.3 if script is gpt else 1.45)
    torch.manual_seed(0)
    *_, (text, _) = script.generate(model, length=480)
    known = set(re.findall(r"[a-z']+", train.lower()))
    words = re.findall(r"[a-z']+", text.lower())
    assert 60 < len(words) < 135
    assert sum(word in known for word in words) / len(words) > 0.75
    assert 5 < text.count("\n") < 60
    assert text[100:300] not in train
