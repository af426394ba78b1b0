"""What the samplers write, and at what price: the measurements behind README.md here and its plot.

    python measurements/frontier.py rules 464 32 "most certain"  # diffusion.py's rule, all windows
    python measurements/frontier.py rules 32 32                  # every rule
    python measurements/frontier.py looks 96                     # second looks and temperatures
    python measurements/frontier.py contexts 6                   # how much of the text is in view
    python measurements/frontier.py samples 12                   # both scripts as they are
    uv run --with matplotlib measurements/frontier.py plot       # frontier.csv -> frontier.svg

Each but the last prints CSV, after minutes to an hour on a CPU; frontier.csv is made of it. A rule
takes the place of diffusion.most_certain. Windows are 256 characters, 16 given and 240 written.
frontier.csv puts the bound of the weights that were measured in front of each row.
"""

import csv
import functools
import math
import re
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

here = Path(__file__).resolve()
sys.path.insert(0, str(here.parent.parent))
import diffusion  # noqa: E402
import gpt  # noqa: E402

given = 16
most_certain = diffusion.most_certain


# ---- rules: logits (B, T, V), holes (B, T) bool, a parameter -> the holes (B, T) to fill ---------
def margin(logits):
    first, second = logits.softmax(-1).topk(2, -1).values.unbind(-1)
    return first - second


def entropy(logits):
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def most_certain_by(certainty):
    """diffusion.py's rule by another certainty, logits (B, T, V) -> (B, T) from 0.5 to 1, which it
    is shown as the top probability of two outcomes."""

    def rule(logits, holes, spacing):
        p = certainty(logits)
        return most_certain(torch.stack((p, 1 - p), -1).log(), holes, spacing)

    return rule


def local_maximum(logits, holes, spacing):
    """The holes more certain than all others less than spacing from them; of equals the left."""
    rivals = logits.softmax(-1).amax(-1).masked_fill(~holes, -1)
    _, best = F.max_pool1d(rivals, 2 * spacing - 1, 1, spacing - 1, return_indices=True)
    return holes & (best == torch.arange(holes.size(1)))


def segments(logits, holes, width):
    """The leftmost hole of each segment of width characters."""
    start = (torch.arange(holes.size(1)) - given).clamp(min=0) // width * width + given
    before = F.pad(holes.cumsum(1), (1, 0))[:, start]  # holes on the left of the segment
    return holes & (holes.cumsum(1) == before + 1)


def left_to_right(logits, holes, _):
    return holes & (holes.cumsum(1) == 1)


def top_probability(logits, holes, least):
    sure = logits.softmax(-1).amax(-1) > least
    return holes & sure | most_certain(logits, holes, holes.size(1))


def top_two(logits, holes, least):
    sure = logits.softmax(-1).topk(2, -1).values.sum(-1) >= least
    return holes & sure | most_certain(logits, holes, holes.size(1))


def entropy_bounded(logits, holes, budget):
    """The most certain ones whose entropies but the largest sum to budget (arXiv 2505.24857)."""
    uncertainty, order = entropy(logits).masked_fill(~holes, math.inf).sort(1)
    within = uncertainty.cumsum(1) - uncertainty <= budget
    return holes & torch.zeros_like(holes).scatter(1, order, within)


rules = {
    "most certain": (most_certain, (256, 12, 10, 8, 7, 6, 5)),
    "most certain by margin": (
        most_certain_by(lambda logits: (1 + margin(logits)) / 2),
        (12, 10, 8, 7, 6, 5),
    ),
    "most certain by entropy": (
        most_certain_by(lambda logits: 1 - entropy(logits) / math.log(logits.size(-1)) / 2),
        (8, 6),
    ),
    "local maximum": (local_maximum, (8, 6, 4, 3, 2)),
    "segments": (segments, (32, 16, 8)),
    "entropy-bounded": (entropy_bounded, (2, 0.5)),
    "top probability": (top_probability, (0.5, 0.9)),
    "top two": (top_two, (0.95,)),
    "left to right": (left_to_right, (1,)),
}


# ---- texts and their figures -------------------------------------------------------------------
@torch.no_grad()
def exact(model, windows, parameter, given=given):
    """Nats per character (N,), exact, of drafting windows (N, T) behind the given ones, and passes
    (N,): which holes a pass fills depends on the text so far alone (DUEL, arXiv 2603.01367)."""
    ids, mask = windows.clone(), model.tokenizer.mask
    ids[:, given:] = mask
    nats, passes = torch.zeros(2, len(ids))
    while (holes := ids == mask).any():
        logits = model(ids)
        chosen = diffusion.most_certain(logits, holes, parameter)
        nats += (F.cross_entropy(logits.transpose(1, 2), windows, reduction="none") * chosen).sum(1)
        passes += holes.any(1)
        ids = torch.where(chosen, windows, ids)
    return nats / (windows.size(1) - given), passes


def exact_of_all(model, windows, *args):
    """exact, of many windows: a few at a time."""
    parts = [exact(model, part, *args) for part in windows.split(58)]
    return map(torch.cat, zip(*parts, strict=True))


@torch.no_grad()
def sample(
    model,
    windows,
    parameter=diffusion.spacing,
    temp=0.8,
    looks=1,
    stride=8,
    look_temp=None,
    keep=None,
):
    """windows (N, T), all but the given characters written anew: ids (N, T) and passes.

    looks is the number of second looks, at look_temp; keep takes logits to those to draw from.
    """
    ids, mask, passes = windows.clone(), model.tokenizer.mask, 0
    keep, look_temp = keep or (lambda logits: logits), temp if look_temp is None else look_temp
    ids[:, given:] = mask
    while (holes := ids == mask).any():
        logits = model(ids)
        chosen = diffusion.most_certain(logits, holes, parameter)
        ids = torch.where(chosen, diffusion.draw(keep(logits), temp), ids)
        passes += 1
    for comb in list(range(stride)) * looks:
        hidden = torch.zeros_like(holes)
        hidden[:, given + comb :: stride] = True
        drawn = diffusion.draw(keep(model(ids.masked_fill(hidden, mask))), look_temp)
        ids = torch.where(hidden, drawn, ids)
        passes += 1
    return ids, passes


def top(n):
    """Keeps the n most likely characters."""

    def keep(logits):
        return logits.masked_fill(logits < logits.topk(n, -1).values[..., -1:], -math.inf)

    return keep


def floor(share):
    """Keeps the characters of at least a share of the top probability."""
    limit = math.log(share)
    return lambda logits: logits.masked_fill(logits < logits.amax(-1, True) + limit, -math.inf)


class KneserNey:
    """An interpolated modified Kneser-Ney model of characters (Chen and Goodman, 1999)."""

    def __init__(self, texts, order=5, characters=65):
        self.order, self.characters, self.levels = order, characters, []
        counts = Counter(t[i : i + order] for t in texts for i in range(len(t) - order + 1))
        for _ in range(order):
            n = Counter(counts.values())
            y = n[1] / max(n[1] + 2 * n[2], 1)
            discounts = [0.0]
            for k in (1, 2, 3):  # in bounds, as a small text can have none of a kind
                discount = k - (k + 1) * y * n[k + 1] / max(n[k], 1)
                discounts.append(min(max(discount, 0.1 * k), 0.9 * k))
            total, left = Counter(), Counter()  # of each context: its count, what it lost
            for gram, count in counts.items():
                total[gram[:-1]] += count
                left[gram[:-1]] += discounts[min(count, 3)]
            self.levels.insert(0, (counts, discounts, total, left))
            counts = Counter(gram[1:] for gram in counts)  # how many contexts it was seen behind

    def probability(self, context, char):
        p = 1 / self.characters
        for n, (counts, discounts, total, left) in enumerate(self.levels):
            seen = context[len(context) - n :]
            if not total[seen]:
                break
            count = counts[seen + char]
            p = (count - discounts[min(count, 3)] + left[seen] * p) / total[seen]
        return p

    def nats(self, text):
        """Per character of text, but for the first ones, which have no full context."""
        first, places = self.order - 1, range(self.order - 1, len(text))
        p = (self.probability(text[i - first : i], text[i]) for i in places)
        return -sum(map(math.log, p)) / len(places)


def words(text):
    """Its words, but for the first and the last, which may be cut."""
    return re.findall(r"[a-z']+", text.lower())[1:-1]


@functools.cache
def contents(train):
    """The words of the training text, and its runs of 20 characters."""
    return set(words(train)), {train[i : i + 20] for i in range(len(train) - 19)}


def known_words(texts, train):
    """The share of the words of each of texts that the training text has."""
    vocabulary, _ = contents(train)
    return [share([word in vocabulary for word in words(t)]) for t in texts]


def share(truths):
    return sum(truths) / max(len(truths), 1)


def mean_error(x):
    """The mean of N numbers and its standard error."""
    x = torch.as_tensor(x, dtype=torch.float)
    return x.mean().item(), x.std().item() / len(x) ** 0.5 if len(x) > 1 else ""


def judge(texts, train, text):
    """Known words and error, distinct words, copied runs of 20 characters, and reverse: the nats a
    character of text by a 5-gram of texts. What is not English costs there, and what is never said.
    """
    _, runs = contents(train)
    said = [word for t in texts for word in words(t)]
    copied = share([t[i : i + 20] in runs for t in texts for i in range(len(t) - 19)])
    known = mean_error(known_words(texts, train))
    return *known, len(set(said)) / len(said), copied, KneserNey(texts).nats(text)


# ---- measurements ------------------------------------------------------------------------------
def row(*cells, end="\n"):
    cells = [f"{cell:.4f}" if isinstance(cell, float) else cell for cell in cells]
    print(*cells, sep=",", end=end, flush=True)


def spread(windows, n):
    """n of the windows (N, T), evenly spaced."""
    return windows[torch.linspace(0, len(windows) - 1, int(n)).long()]


@torch.no_grad()
def gpt_nats(model, windows):
    """Nats per character (N,) of all but the given characters of windows (N, T)."""
    logits = torch.cat([model(part[:, :-1]) for part in windows.split(16)]).transpose(1, 2)
    return F.cross_entropy(logits, windows[:, 1:], reduction="none")[:, given - 1 :].mean(1)


def measure_rules(model, train, text, n, sampled, *only):
    """Exact nats of drafts, and known words in drafts at temperature 0.8."""
    windows = spread(model.tokenizer.encode(text).unfold(0, diffusion.block_size, 240), n)
    some, single = spread(windows, sampled), None
    row("rule,parameter,windows,nats,nats error,more,more error,passes,samples,known words,error")
    for name, (rule, parameters) in rules.items():
        for parameter in parameters:
            if single is not None and only and name not in only:
                continue
            diffusion.most_certain = rule
            nats, passes = exact_of_all(model, windows, parameter)
            single = nats if single is None else single
            torch.manual_seed(0)
            drafts, _ = sample(model, some, parameter, looks=0)
            known = known_words(map(model.tokenizer.decode, drafts[:, given:]), train)
            cells = mean_error(nats) + mean_error(nats - single) + (f"{passes.mean():.1f}",)
            row(name, str(parameter), n, *cells, sampled, *mean_error(known))
    nats = gpt_nats(gpt.load(gpt.weights_path), windows)
    row("gpt", "", n, *mean_error(nats), *mean_error(nats - single), 240, "", "", "")


looks = {  # the arguments of sample, where they are not those of diffusion.py
    "draft alone": {"looks": 0},
    "draft alone at 0.7": {"looks": 0, "temp": 0.7},
    "draft and second look": {},
    "every 6th": {"stride": 6},
    "every 4th": {"stride": 4},
    "spacing 6": {"parameter": 6},
    "spacing 5 and stride 6": {"parameter": 5, "stride": 6},
    "two second looks": {"looks": 2},
    "draft at 1 and second look at 0.8": {"temp": 1, "look_temp": 0.8},
    "draft at 1 and second look at 0.6": {"temp": 1, "look_temp": 0.6},
    "draft at 1 and two second looks at 0.7": {"temp": 1, "look_temp": 0.7, "looks": 2},
    "at 1 among the top 3": {"temp": 1, "keep": top(3)},
    "at 1 above a twentieth of the top": {"temp": 1, "keep": floor(0.05)},
}


def measure_looks(model, train, text, n):
    """Both sides of n windows behind given characters of the training text."""
    windows = spread(model.tokenizer.encode(train).unfold(0, diffusion.block_size, 240), n)
    row("how,windows,passes,known words,error,distinct words,copied runs,reverse")
    decode = model.tokenizer.decode
    texts = [decode(ids[given:]) for ids in windows]
    row("training text", n, "", *judge(texts, train, text))
    torch.manual_seed(0)
    causal, length = gpt.load(gpt.weights_path), diffusion.block_size - given
    prompts = [decode(ids[:given]) for ids in windows]
    texts = [list(gpt.generate(causal, prompt, length))[-1][given:] for prompt in prompts]
    row("gpt.py", n, length, *judge(texts, train, text))
    for name, how in looks.items():
        torch.manual_seed(0)
        ids, passes = sample(model, windows, **how)
        row(name, n, passes, *judge([decode(i) for i in ids[:, given:]], train, text))


def measure_contexts(model, train, text, n):
    """The same characters, n stretches of 6,720, drafted in blocks behind 16 to 96 given ones."""
    ids, narrow = model.tokenizer.encode(text), None
    starts = torch.linspace(96, len(ids) - 6720, int(n)).long().tolist()
    row("context,stretches,nats,error,more than 16,error,passes per 240")
    for context in (16, 32, 64, 96):
        width = 256 - context  # 6,720 is a multiple of each
        blocks = torch.cat([ids[s - context : s + 6720].unfold(0, 256, width) for s in starts])
        nats, passes = exact_of_all(model, blocks, diffusion.spacing, context)
        nats = nats.view(len(starts), -1).mean(1)
        narrow = nats if narrow is None else narrow
        cells = mean_error(nats) + mean_error(nats - narrow)
        row(context, n, *cells, f"{passes.mean() * 240 / width:.1f}")


def measure_samples(_, train, text, n):
    """Both scripts as they are: n texts of 2,000 characters from the default prompt by each of
    three seeds; errors are over seeds. Least is the share of distinct words in the text with the
    least: one that ran into a loop would show."""
    row("script,temperature,seeds,texts,passes,known words,error", end=",")
    row("distinct words,error,copied runs,error,reverse,error,least")
    size, count = 2000, 3 * int(n)
    stretches = [train[i * len(train) // count :][:size] for i in range(count)]
    real = [stretches[seed::3] for seed in range(3)]  # from all over the text
    figures = [judge(texts, train, text) for texts in real]
    row("training text", "", 3, n, "", *over_seeds(figures), "")
    models = {script: script.load(script.weights_path) for script in (diffusion, gpt)}
    for temp in (0.8, 1.0, 0.6):
        for script, model in models.items():
            figures, passes, least = [], [], []
            for seed in range(3):
                torch.manual_seed(seed)
                runs = [list(script.generate(model, temp=temp)) for _ in range(int(n))]
                written = [texts[-1] for texts in runs]
                figures.append(judge(written, train, text))
                passes += [len(texts) * 240 / size for texts in runs]
                least += [len(set(words(t))) / len(words(t)) for t in written]
            passes = f"{sum(passes) / len(passes):.1f}"
            row(script.name, str(temp), 3, n, passes, *over_seeds(figures), min(least))


def over_seeds(figures):
    """What judge says of each seed -> mean and standard error of each figure."""
    known, _, distinct, copied, reverse = zip(*figures, strict=True)
    return [c for figure in (known, distinct, copied, reverse) for c in mean_error(figure)]


def plot():
    """Draws frontier.csv, in colours that can be read on white and on black."""
    import matplotlib.pyplot as plt

    rows = list(csv.DictReader(here.with_suffix(".csv").open()))
    for r in rows:
        r.update({key: float(r[key]) for key in ("bound", "more", "more error", "passes")})
    latest, first = min(r["bound"] for r in rows), max(r["bound"] for r in rows)
    grey, blue, orange = "#808080", "#2f81f7", "#e8710a"
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "frontier", "font.size": 10})
    figure, axes = plt.subplots(figsize=(8, 3.6))

    def curve(rule, bound, **style):
        points = [r for r in rows if r["rule"] == rule and r["bound"] == bound]
        values = ([r[key] for r in points] for key in ("passes", "more", "more error"))
        axes.errorbar(*values, capsize=2, markersize=4, lw=1, **style)
        return [(r["parameter"], (r["passes"], r["more"])) for r in points]

    def label(text, at, offset, color):
        axes.annotate(text, at, offset, textcoords="offset points", color=color, fontsize=9)

    points = curve("local maximum", latest, color=grey, marker="o")
    label("local maxima only", points[-1][1], (8, -2), grey)
    points = curve("segments", first, color=grey, marker="^")
    label("segments", points[0][1], (0, -14), grey)
    points = curve("entropy-bounded", first, color=grey, marker="D")
    label("a budget of entropy", points[0][1], (-104, 2), grey)
    points = curve("top probability", first, color=grey, marker="v")
    label("a threshold", points[0][1], (-62, 4), grey)
    points = curve("most certain", latest, color=blue, marker="o", zorder=3)
    for parameter, at in points:
        label(parameter, at, (-12, -13), blue)
    label("diffusion.py, by spacing", points[0][1], (-210, 16), blue)
    ((_, at),) = curve("gpt", latest, color=orange, marker="s")
    label("gpt.py", at, (-40, -3), orange)
    axes.set_xscale("log")
    axes.set_xticks([5, 8, 15, 30, 60, 120, 240], ["5", "8", "15", "30", "60", "120", "240"])
    axes.xaxis.set_minor_locator(plt.NullLocator())
    axes.set_xlabel("forward passes per 240 characters", color=grey)
    axes.set_ylabel("nats more than one per pass", color=grey)
    axes.tick_params(colors=grey)
    axes.grid(color=grey, alpha=0.25)
    axes.spines[:].set_color(grey)
    path = here.with_suffix(".svg")
    figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    what, *numbers = sys.argv[1:]
    if what == "plot":
        plot()
    else:
        model = diffusion.load(diffusion.weights_path)
        globals()[f"measure_{what}"](model, *diffusion.read_splits(diffusion.data_path), *numbers)
