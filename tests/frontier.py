"""How many characters a pass may write: the measurements behind README.md and its plot.

    python tests/frontier.py rules 464 32 "local maximum"   # the rule of diffusion.py, all windows
    python tests/frontier.py rules 32 32      # every rule, by 32 windows and 32 samples
    python tests/frontier.py contexts 12      # how a window is shared by given and new characters
    python tests/frontier.py temperatures 4   # words and copied runs of samples
    python tests/frontier.py hiding 150 64    # training goes on for 150 iterations; 64 windows
    uv run --with matplotlib tests/frontier.py plot    # frontier.csv -> frontier.svg

Each but the last prints CSV, after minutes or hours on a CPU; frontier.csv is made of it, its rows
of 32 windows with the weights of commit 01d98fe. A rule takes the place of diffusion.most_certain,
so that the walk of `diffusion.py --eval` measures it: exact nats per character, and passes, of
windows of 256 characters, 16 given and 240 scored.
"""

import contextlib
import copy
import csv
import math
import re
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

here = Path(__file__).resolve()
root = here.parent.parent
sys.path.insert(0, str(root))
import diffusion  # noqa: E402
import gpt  # noqa: E402

given = diffusion.context
local_maximum = diffusion.most_certain


# ---- rules: logits (B, T, V), holes (B, T) bool, a parameter -> the holes (B, T) to commit ------
def uncertainty(logits, kind="entropy"):
    p = logits.softmax(-1)
    if kind == "entropy":
        return -(p * logits.log_softmax(-1)).sum(-1)
    first, second = p.topk(2, -1).values.unbind(-1)
    return -first if kind == "top probability" else second - first


def most_certain_one(logits, holes, _=None):
    return local_maximum(logits, holes, holes.size(1))


def local_maximum_by(kind):
    def rule(logits, holes, spacing):
        rank = uncertainty(logits, kind).masked_fill(~holes, math.inf).argsort(stable=True)
        rank = rank.argsort().float()
        return holes & (rank == -F.max_pool1d(-rank, 2 * spacing - 1, 1, spacing - 1))

    return rule


def greedy_by(kind):
    """The most certain, then the most certain of those at least spacing away, and so on."""

    def rule(logits, holes, spacing):
        score, free = uncertainty(logits, kind), holes.clone()
        chosen, place = torch.zeros_like(holes), torch.arange(holes.size(1))
        while free.any():
            best = score.masked_fill(~free, math.inf).argmin(1, keepdim=True)
            chosen |= (place == best) & free
            free &= (place - best).abs() >= spacing
        return chosen

    return rule


def segments(logits, holes, width):
    """The leftmost hole of each segment of width characters."""
    start = (torch.arange(holes.size(1)) - given).clamp(min=0) // width * width + given
    before = F.pad(holes.cumsum(1), (1, 0))[:, start]  # holes on the left of the segment
    return holes & (holes.cumsum(1) == before + 1)


def left_to_right(logits, holes, _):
    return holes & (holes.cumsum(1) == 1)


def top_probability(logits, holes, least):
    sure = -uncertainty(logits, "top probability") > least
    return holes & sure | most_certain_one(logits, holes)


def top_two(logits, holes, least):
    sure = logits.softmax(-1).topk(2, -1).values.sum(-1) >= least
    return holes & sure | most_certain_one(logits, holes)


def entropy_bounded(logits, holes, budget):
    """The most certain ones whose entropies but the largest sum to budget (arXiv 2505.24857)."""
    entropy, order = uncertainty(logits).masked_fill(~holes, math.inf).sort(1)
    within = entropy.cumsum(1) - entropy <= budget
    return holes & torch.zeros_like(holes).scatter(1, order, within)


def spacing_by_share(logits, holes, spacings):
    """One spacing while more than half of the holes are left, then another."""
    early = holes.sum(1, keepdim=True) > (holes.size(1) - given) / 2
    first, last = (local_maximum(logits, holes, spacing) for spacing in spacings)
    return torch.where(early, first, last)


def certainty_floor(logits, holes, most):
    """Spacing 4, but only where the entropy is below most."""
    sure = uncertainty(logits) < most
    return local_maximum(logits, holes, 4) & sure | most_certain_one(logits, holes)


def last_ones_single(logits, holes, n):
    """Spacing 4 until n holes are left, then one at a time."""
    few = holes.sum(1, keepdim=True) <= n
    return torch.where(few, most_certain_one(logits, holes), local_maximum(logits, holes, 4))


rules = {
    "local maximum": (local_maximum, (256, 8, 6, 4, 3, 2)),
    "local maximum of margin": (local_maximum_by("margin"), (16, 12, 8, 6, 5, 4)),
    "local maximum of entropy": (local_maximum_by("entropy"), (256, 8, 6, 4)),
    "greedy": (greedy_by("entropy"), (12, 8)),
    "greedy by margin": (greedy_by("margin"), (16, 12, 8)),
    "segments": (segments, (32, 16, 8)),
    "spacing by share": (spacing_by_share, ((8, 4), (4, 8), (4, 3))),
    "certainty floor": (certainty_floor, (2,)),
    "last ones single": (last_ones_single, (24,)),
    "entropy-bounded": (entropy_bounded, (4, 2, 0.5)),
    "top probability": (top_probability, (0.5, 0.9)),
    "top two": (top_two, (0.95,)),
    "left to right": (left_to_right, (1,)),
}


# ---- measuring ---------------------------------------------------------------------------------
@torch.no_grad()
def sample(model, windows, parameter, temp):
    """windows (N, T), all but the given characters drawn anew; the sampler's own nats (N,)."""
    ids, nats = windows.clone(), torch.zeros(len(windows))
    ids[:, given:] = model.tokenizer.mask
    while (holes := ids == model.tokenizer.mask).any():
        logits = model(ids)
        chosen = diffusion.most_certain(logits, holes, parameter)
        drawn = diffusion.draw(logits, temp)
        nats += (F.cross_entropy(logits.transpose(1, 2), drawn, reduction="none") * chosen).sum(1)
        ids = torch.where(chosen, drawn, ids)
    return ids, nats / (windows.size(1) - given)


@torch.no_grad()
def gpt_nats(model, windows):
    return torch.stack([gpt.loss_fn(model, window[None], given=given) for window in windows])


def exact(model, windows, *args):
    """diffusion.exact of windows (N, T), a few at a time."""
    parts = [diffusion.exact(model, part, *args) for part in windows.split(16)]
    return map(torch.cat, zip(*parts, strict=True))


def words(text):
    return re.findall(r"[a-z']+", text.lower())


def share(truths):
    return sum(truths) / max(len(truths), 1)


def known_words(model, windows, train):
    """The share of words of each window, but for its first and last, which may be cut, in train."""
    vocabulary, texts = set(words(train)), map(model.tokenizer.decode, windows[:, given:])
    return [share([word in vocabulary for word in words(text)[1:-1]]) for text in texts]


def mean_error(x):
    """The mean of N numbers and its standard error."""
    x = torch.as_tensor(x)
    return f"{x.mean():.4f}", f"{x.std() / len(x) ** 0.5:.4f}"


def row(*cells):
    print(*cells, sep=",", flush=True)


def measure_rules(model, train, text, n, sampled, *only):
    """Known words: at temperature 0.8. Gap: by how much a GPT's nats of samples at temperature 1
    exceed the sampler's own, an estimate of how far its texts are from the GPT's."""
    windows = model.tokenizer.encode(text).unfold(0, diffusion.block_size, 240)
    windows = windows[torch.linspace(0, len(windows) - 1, int(n)).long()]
    some = windows[torch.linspace(0, len(windows) - 1, int(sampled)).long()]
    judge, single = gpt.load(gpt.weights_path), None
    columns = "rule,parameter,windows,nats,nats error,more,more error,passes"
    row(columns, "samples,known words,known error,gap,gap error")
    for name, (rule, parameters) in rules.items():
        for parameter in parameters:
            if single is not None and only and name not in only:
                continue
            diffusion.most_certain = rule
            nats, passes = exact(model, windows, parameter)
            single = nats if single is None else single
            torch.manual_seed(0)
            known = known_words(model, sample(model, some, parameter, 0.8)[0], train)
            ids, own = sample(model, some, parameter, 1)
            cells = mean_error(nats) + mean_error(nats - single) + (f"{passes.mean():.1f}",)
            cells += (sampled, *mean_error(known), *mean_error(gpt_nats(judge, ids) - own))
            row(name, str(parameter).replace(", ", " to "), n, *cells)
    nats = gpt_nats(judge, windows)
    row("gpt", "", n, *mean_error(nats), *mean_error(nats - single), 240, "", "", "", "", "")


def measure_contexts(model, _, text, n):
    """The same characters, n stretches of 1,920, written in blocks behind 16 to 192 given ones."""
    ids = model.tokenizer.encode(text)
    starts = torch.linspace(192, len(ids) - 1920, int(n)).long().tolist()
    row("context,spacing,stretches,nats,nats error,more than 16,error,passes per 240")
    for spacing in (6, 4):
        narrow = None
        for context in (16, 64, 128, 192):
            blocks = [ids[s - context : s + 1920].unfold(0, 256, 256 - context) for s in starts]
            nats, passes = exact(model, torch.cat(blocks), spacing, context)
            nats = nats.view(len(starts), -1).mean(1)
            narrow = nats if narrow is None else narrow
            cells = mean_error(nats) + mean_error(nats - narrow)
            row(context, spacing, n, *cells, f"{passes.mean() * 240 / (256 - context):.1f}")


def half(hide, uniform=diffusion.hide):
    """Half of the sequences as in training, half by hide."""

    def both(ids, mask, *_):
        first, last = ids.chunk(2)
        return torch.cat((uniform(first, mask, len(first)), hide(last, mask)))

    return both


def suffix(ids, mask, *_):
    """Hides all from a place drawn at random: what writing from left to right meets."""
    place = torch.randint(given, ids.size(1), (len(ids), 1))
    return torch.where(torch.arange(ids.size(1)) < place, ids, mask)


def spaced(ids, mask, *_):
    """A state between passes drawn at random, were certainty drawn at random too."""
    holes = (torch.arange(ids.size(1)) >= given).expand_as(ids)
    states = []  # each (B, T)
    while holes.any():
        states.append(holes)
        holes = holes & ~local_maximum(torch.randn(*ids.shape, 2), holes, diffusion.spacing)
    states = torch.stack(states, 1)
    pick = (torch.rand(len(ids)) * states.any(2).sum(1)).long()
    return torch.where(states[torch.arange(len(ids)), pick], mask, ids)


def measure_hiding(model, train, text, iterations, n):
    """The weights, trained on for a while with each way to hide; then as in measure_rules."""
    start = diffusion.Model(model.tokenizer, model.prompt)
    start.load_state_dict(model.state_dict())
    windows = model.tokenizer.encode(text).unfold(0, diffusion.block_size, 240)
    windows = windows[torch.linspace(0, len(windows) - 1, int(n)).long()]
    diffusion.Model = lambda *_: copy.deepcopy(start)
    diffusion.batch_size, diffusion.max_iters, diffusion.eval_interval = 32, int(iterations), 10**6
    diffusion.learning_rate, diffusion.warmup_iters = 0.002, 20
    uniform, path, reference = diffusion.hide, Path(tempfile.mkdtemp()) / "weights.pt", None
    ways = {"uniform": uniform, "half suffix": half(suffix), "half spaced": half(spaced)}
    row("hiding,iterations,bound,windows,nats,error,more,error,passes,known words,error")
    for name, diffusion.hide in (ways | {"spaced": spaced}).items():
        torch.manual_seed(0)
        with contextlib.redirect_stdout(sys.stderr):
            diffusion.train(diffusion.data_path, path)
        diffusion.hide, trained = uniform, diffusion.load(path)
        nats, passes = exact(trained, windows, diffusion.spacing)
        reference = nats if reference is None else reference
        torch.manual_seed(0)
        ids, _ = sample(trained, windows, diffusion.spacing, 0.8)
        cells = mean_error(nats) + mean_error(nats - reference) + (f"{passes.mean():.1f}",)
        bound = f"{diffusion.evaluate(trained, text, draws=2):.4f}"
        row(name, iterations, bound, n, *cells, *mean_error(known_words(trained, ids, train)))


def measure_temperatures(_, train, text, n):
    """Known words, distinct words, and 20-character runs found in the training text: the shares in
    n samples of 2,000 characters."""
    vocabulary, runs = set(words(train)), {train[i : i + 20] for i in range(len(train) - 19)}
    row("model,temperature,samples,known words,error,distinct words,error,copied runs,error")

    def measure(name, temp, texts):
        written = [words(t) for t in texts]
        known = mean_error([share([word in vocabulary for word in w]) for w in written])
        distinct = mean_error([len(set(w)) / len(w) for w in written])
        copied = [share([t[i : i + 20] in runs for i in range(len(t) - 19)]) for t in texts]
        row(name, temp, len(texts), *known, *distinct, *mean_error(copied))

    measure("the text itself", "", [text[i : i + 2000] for i in range(0, 110000, 2000)])
    for script in (gpt, diffusion):
        model = script.load(script.weights_path)
        for temp in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
            torch.manual_seed(0)
            samples = [[*script.generate(model, temp=temp)][-1] for _ in range(int(n))]
            measure(script.name, temp, samples)


def plot():
    """Draws frontier.csv, in colours that can be read on white and on black."""
    import matplotlib.pyplot as plt

    rows = list(csv.DictReader(here.with_suffix(".csv").open()))
    for r in rows:
        r.update({key: float(r[key]) for key in ("windows", "nats", "nats error", "passes")})
    most = max(r["windows"] for r in rows)
    curve = [r for r in rows if r["rule"] == "local maximum" and r["windows"] == most]
    (point,) = (r for r in rows if r["rule"] == "gpt" and r["windows"] == most)
    grey, blue, orange = "#808080", "#2f81f7", "#e8710a"
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "frontier", "font.size": 10})
    figure, axes = plt.subplots(figsize=(8, 5.2))
    x, y, error = ([r[key] for r in curve] for key in ("passes", "nats", "nats error"))
    axes.errorbar(x, y, error, color=blue, marker="o", capsize=2, label="diffusion, local maximum")
    for r in curve:
        at = r["passes"], r["nats"] - r["nats error"]
        axes.annotate(
            r["parameter"], at, (0, -11), textcoords="offset points", color=blue, ha="center"
        )
    labels = {
        "local maximum": "earlier weights, local maximum",
        "greedy": "… greedy picks, 12 and 8 apart",
        "segments": "… segments of 32 to 8, side by side",
        "entropy-bounded": "… entropy-bounded, 4 to 0.5 nats",
        "top probability": "… top probability over 0.5, 0.9",
        "top two": "… sum of the top two over 0.95",
        "left to right": "… left to right",
    }
    fewer = [r for r in rows if r["windows"] < most]
    for (name, label), style in zip(labels.items(), ("o-", *"^vDP*X"), strict=True):
        points = [(r["passes"], r["nats"]) for r in fewer if r["rule"] == name]
        axes.plot(*zip(*points, strict=True), style, color=grey, markersize=5, lw=1, label=label)
    values = point["passes"], point["nats"], point["nats error"]
    axes.errorbar(*values, color=orange, marker="s", capsize=2, label="GPT", linestyle="none")
    axes.set_xscale("log")
    axes.set_ylim(bottom=1.2)  # room for the legend
    axes.set_xticks([5, 8, 15, 30, 60, 120, 240], ["5", "8", "15", "30", "60", "120", "240"])
    axes.xaxis.set_minor_locator(plt.NullLocator())
    axes.set_xlabel("forward passes per 240 characters", color=grey)
    axes.set_ylabel("exact nats per character", color=grey)
    axes.tick_params(colors=grey)
    axes.grid(color=grey, alpha=0.25)
    axes.spines[:].set_color(grey)
    axes.legend(frameon=False, labelcolor="linecolor", fontsize=9, loc="lower left")
    path = root / "frontier.svg"
    figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    what, *numbers = sys.argv[1:]
    if what == "plot":
        plot()
    else:
        model = diffusion.load(diffusion.weights_path)
        globals()[f"measure_{what}"](model, *diffusion.read_splits(diffusion.data_path), *numbers)
