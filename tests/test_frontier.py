"""The rules that frontier.py measures do what their names say."""

import frontier
import pytest
import torch

every_rule = [(name, p) for name, (_, parameters) in frontier.rules.items() for p in parameters]


@pytest.fixture
def state():
    torch.manual_seed(0)
    logits = 4 * torch.rand(4, 256, 1) * torch.randn(4, 256, 20)  # certain and uncertain places
    holes = torch.rand(4, 256) > torch.tensor([0.0, 0.5, 0.98, 1.0])[:, None]
    holes[:, :16] = False
    return logits, holes


@pytest.mark.parametrize("name, parameter", every_rule)
def test_every_rule_commits_holes_until_none_is_left(name, parameter, state):
    logits, holes = state
    while holes.any():
        chosen = frontier.rules[name][0](logits, holes, parameter)
        assert not (chosen & ~holes).any()
        assert torch.equal(chosen.any(1), holes.any(1))
        holes = holes & ~chosen


def test_rules_by_hand(state):
    logits, holes = state
    holes = holes[:2]
    logits = logits[:2]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    best = entropy.masked_fill(~holes, 99).argmin(1)
    first = holes.float().argmax(1)

    def places(name, *args):
        return [row.nonzero().flatten() for row in frontier.rules[name][0](logits, holes, *args)]

    assert [int(p) for p in places("left to right", 1)] == first.tolist()
    for row, picks in enumerate(places("greedy", 8)):
        assert best[row] in picks and picks.diff().min() >= 8
        left = holes[row].nonzero().flatten()
        assert ((left[:, None] - picks).abs().min(1).values < 8).all()  # no room for another
    for row, picks in enumerate(places("segments", 16)):
        assert [p // 16 for p in picks.tolist()] == list(range(1, 16))
        for p in picks.tolist():
            assert not holes[row, p // 16 * 16 : p].any()
    for row, picks in enumerate(places("entropy-bounded", 2)):
        taken = entropy[row, picks]
        others = entropy[row][holes[row] & ~torch.isin(torch.arange(256), picks)]
        assert len(picks) > 1 and taken.max() <= others.min()
        assert taken.sum() - taken.max() <= 2 < taken.sum()
    same = frontier.local_maximum_by("top probability")(logits, holes, 8)
    assert torch.equal(same, frontier.local_maximum(logits, holes, 8))


def test_ways_to_hide():
    torch.manual_seed(0)
    ids = torch.randint(0, 20, (64, 256))
    for hide in (frontier.suffix, frontier.spaced):
        inputs = hide(ids, 99)
        hidden = inputs == 99
        assert torch.equal(inputs[~hidden], ids[~hidden])
        assert hidden.any(1).all() and not hidden[:, : frontier.given].any()
        assert hidden.sum(1).unique().numel() > 10
        open_again = (~hidden[:, 1:] & hidden[:, :-1]).any(1)
        assert open_again.any() == (hide is frontier.spaced)
    first, last = (frontier.half(frontier.suffix)(ids, 99) == 99).chunk(2)
    assert (~first[:, 1:] & first[:, :-1]).any(1).float().mean() > 0.9
    assert not (~last[:, 1:] & last[:, :-1]).any()
