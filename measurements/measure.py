"""Measures both scripts side by side; each command prints a table for the README.md here.

    python measurements/measure.py nats      # exact nats per character of real text
    python measurements/measure.py text      # what they write: words, variety, copies
    python measurements/measure.py infill    # words of real text, hidden and restored
    python measurements/measure.py speed     # seconds and passes

After ± stands the standard error. `--gpt` and `--diffusion` name files of weights in place of the
repository's: any number of them, or none.
"""

import argparse
import re
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import diffusion
import gpt


# ---- tables ------------------------------------------------------------------------------------
def head(line):
    print(line)
    print("|" + " --- |" * (line.count("|") - 1))


def row(*cells):
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def mean(values, sign=""):
    """The mean of numbers and its standard error."""
    error = np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):{sign}.3f} ± {error:.3f}"


# ---- texts and n-grams -------------------------------------------------------------------------
def pieces(text, length, stride):
    """All pieces of a length that begin stride characters apart."""
    return [text[i : i + length] for i in range(0, len(text) - length + 1, stride)]


def evenly(items, n):
    """n items at equal distances in a list; all items if it has fewer."""
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]


def words(texts):
    """All words but for the first and the last of each text, which may be cut."""
    return [word for text in texts for word in re.findall(r"[a-z']+", text.lower())[1:-1]]


def ngram(texts, order, characters):
    """An n-gram model of texts in so many different characters: interpolated modified Kneser-Ney
    (Chen and Goodman, 1999). It is a function: text -> nats of each of its characters."""
    levels = []  # one per length of the context
    counts = Counter(gram for text in texts for gram in pieces(text, order, 1))
    for _ in range(order):
        n = Counter(counts.values())  # how many grams were counted once, twice, ...
        y = n[1] / max(1, n[1] + 2 * n[2])
        kept = {}  # gram -> its count less the discount
        total = Counter()  # context -> the counts of its grams
        lost = Counter()  # context -> their discounts, for the shorter contexts to share out
        for gram, count in counts.items():
            k = min(count, 3)
            discount = k - (k + 1) * y * n[k + 1] / max(1, n[k])
            discount = min(max(discount, 0.1 * k), 0.9 * k)  # some n may be 0
            kept[gram] = count - discount
            total[gram[:-1]] += count
            lost[gram[:-1]] += discount
        levels.insert(0, (kept, total, lost))
        counts = Counter(gram[1:] for gram in counts)  # how many characters it was seen after

    def nats(text):
        probabilities = []
        for i, char in enumerate(text):
            p = 1 / characters
            for length, (kept, total, lost) in enumerate(levels[: i + 1]):
                context = text[i - length : i]
                if context in total:
                    p = (kept.get(context + char, 0) + lost[context] * p) / total[context]
            probabilities.append(p)
        return -np.log(probabilities)

    return nats


# ---- nats: of real text, exact -----------------------------------------------------------------
@torch.no_grad()
def measure_nats(models, train, val, args):
    size = gpt.block_size
    texts = {"validation": val, "training": train[-len(val) :]}
    nanogpt_windows = pieces(val, size + 1, size)  # inputs and targets
    rows = []  # for each row its nats of each window of the validation text
    passes = []  # the rows of the second table: nats of each pass of the draft
    head("| | validation text | less the first row | training text | nanoGPT's windows |")
    for name, script, model in models:
        nats = {kind: script.score(model, text).cpu().numpy() for kind, text in texts.items()}
        rows.append(nats["validation"].mean(1))
        on_nanogpt_windows = ""
        if script is gpt:
            ids = [model.tokenizer.encode(w)[None].to(model.rope.device) for w in nanogpt_windows]
            on_nanogpt_windows = mean([gpt.loss_fn(model, window).item() for window in ids])
        else:
            passes += [(f"{name}, {kind} text", nats[kind].T) for kind in texts]
        difference = mean(rows[-1] - rows[0], sign="+")
        row(name, mean(rows[-1]), difference, mean(nats["training"].mean(1)), on_nanogpt_windows)
    seven_gram = ngram([train], 7, len(set(train + val)))
    windows = pieces(val, size, size - gpt.context)
    rows.append(np.array([seven_gram(window)[gpt.context :].mean() for window in windows]))
    on_nanogpt_windows = mean([seven_gram(window)[1:].mean() for window in nanogpt_windows])
    row("7-gram", mean(rows[-1]), mean(rows[-1] - rows[0], sign="+"), "", on_nanogpt_windows)
    print()
    head("| | " + " | ".join(map(str, range(1, diffusion.columns + 1))) + " |")
    for name, nats in passes:
        row(name, *map(mean, nats))
    print(f"\nfloat32, {len(windows)} windows, {len(nanogpt_windows)} of nanoGPT's")


# ---- text: what is written ---------------------------------------------------------------------
def known_words(texts, vocabulary):
    """The share of the words of texts that are in the vocabulary."""
    said = words(texts)
    return sum(word in vocabulary for word in said) / max(1, len(said))


def judge(samples, train, real):
    """Four figures of each sample, which is a list of texts: the share of its words that are in
    train; the share of different words; the percentage of its runs of 20 characters that are in
    train; and "reverse", the nats per character of a real text by a 5-gram of the sample: what is
    not English costs there, and what is never said. (4, samples)"""
    vocabulary = set(words([train]))
    train_runs = set(pieces(train, 20, 1))
    characters = len(set(train + real))
    figures = []
    for texts in samples:
        said = words(texts)
        distinct = len(set(said)) / max(1, len(said))
        runs = [run for text in texts for run in pieces(text, 20, 1)]
        copied = 100 * np.mean([run in train_runs for run in runs])
        reverse = ngram(texts, 5, characters)(real).mean()
        figures.append((known_words(texts, vocabulary), distinct, copied, reverse))
    return np.transpose(figures)


def write(script, model, args, seed, way):
    """The texts of a seed, without the default prompt that each begins with."""
    torch.manual_seed(seed)
    texts = []
    for _ in range(args.texts):
        *_, (text, _) = script.generate(model, None, args.length, **way)
        texts.append(text[len(model.prompt) :])
    return texts


def measure_text(models, train, val, args):
    stretches = pieces(val, args.length, args.length)
    held_out = evenly(stretches[::2], args.seeds * args.texts)
    scored = "".join(stretches[1::2])  # between those, so of the same plays
    if len(held_out) < args.seeds * args.texts:
        raise ValueError("the text is too short: give a smaller --length, --texts or --seeds")
    head("| | passes per 240 | temperature | known words | distinct words | copied, % | reverse |")
    samples = [held_out[seed :: args.seeds] for seed in range(args.seeds)]
    row("held-out text", "", "", *map(mean, judge(samples, train, scored)))
    vocabulary = set(words([train]))
    known = [known_words([stretch], vocabulary) for stretch in stretches]
    row("all held-out text", "", "", mean(known), "", "", "")
    for name, script, model in models:
        if script is gpt:
            ways = [dict(temp=temp) for temp in args.temps]
        else:
            ways = [dict(temp=temp, looks=1) for temp in args.temps]
            ways += [dict(temp=1.0, looks=0), dict(temp=1.0, looks=2)]
        for way in ways:
            passes = 240 if script is gpt else (1 + way["looks"]) * diffusion.columns
            samples = [write(script, model, args, seed, way) for seed in range(args.seeds)]
            row(name, passes, way["temp"], *map(mean, judge(samples, train, scored)))
    print(f"\n{args.seeds} seeds, {args.texts} texts of {args.length} characters by each")


# ---- infill: hidden words of real text ---------------------------------------------------------
@torch.no_grad()
def infill(script, model, text, start, end):
    """Whether text[start:end] comes back whole at temperature 0, and its exact nats per character.
    GPT sees the text before it. Diffusion sees all else, and its draft pays, as in score()."""
    real = model.tokenizer.encode(text)[None].to(model.rope.device)
    if script is gpt:
        *_, (written, _) = gpt.generate(model, text[:start], end - start, temp=0)
        logits = model(real[:, : end - 1])[0, start - 1 :]
        paid = F.cross_entropy(logits, real[0, start:end], reduction="sum").item()
    else:
        prompt = text[:start] + "_" * (end - start) + text[end:]
        *_, (written, _) = diffusion.generate(model, prompt, length=0, temp=0)
        ids = model.tokenizer.encode(prompt)[None].to(model.rope.device)
        paid = 0
        while (holes := ids == model.tokenizer.mask).any():
            logits = model(ids)
            column = diffusion.surest_column(logits, holes)
            paid += F.cross_entropy(logits[column], real[column], reduction="sum").item()
            ids = torch.where(column, real, ids)
    return written[start:end] == text[start:end], paid / (end - start)


def hidden_words(text, n):
    """n times a window, and where in its middle a word of 4 to 8 letters starts and ends."""
    half = gpt.block_size // 2
    found = re.finditer(r"(?<![A-Za-z'])[A-Za-z]{4,8}(?![A-Za-z'])", text)
    spans = [word.span() for word in found if half <= word.start() <= len(text) - half]
    return [(text[a - half : a + half], half, half + b - a) for a, b in evenly(spans, n)]


def measure_infill(models, train, val, args):
    places = hidden_words(val, args.words)
    rows = []  # for each row its nats of each word
    head("| | restored whole | nats per hidden character | less the first row |")
    for name, script, model in models:
        whole, nats = np.array([infill(script, model, *place) for place in places]).T
        rows.append(nats)
        row(name, mean(whole), mean(nats), mean(nats - rows[0], sign="+"))
    print(f"\nfloat32, {len(places)} words; each counts alike")


# ---- speed -------------------------------------------------------------------------------------
def measure_speed(models, train, val, args):
    device, default_dtype = gpt.best_device()
    where = f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    for dtype in dict.fromkeys((torch.float32, default_dtype)):
        seconds = np.zeros((len(models), args.runs))
        passes = [0] * len(models)
        for i in range(args.runs):
            for j, (_, script, model) in enumerate(models):
                model.to(dtype)
                began = time.perf_counter()
                passes[j] = len(list(script.generate(model, None, args.length)))
                seconds[j, i] = time.perf_counter() - began
        head("| | passes | seconds | milliseconds per pass | of the first row's seconds |")
        for j, (name, _, _) in enumerate(models):
            figures = seconds[j], 1000 * seconds[j] / passes[j], seconds[j] / seconds[0]
            cells = [f"{np.median(f):.3g} ({f.min():.3g} to {f.max():.3g})" for f in figures]
            row(name, passes[j], *cells)
        print(f"\n{where}, {dtype}\n")
    print(f"{args.length} characters, {args.runs} times each in turn: median, least and most")


# ---- command line ------------------------------------------------------------------------------
def main(argv=None):
    tables = dict(nats=measure_nats, text=measure_text, infill=measure_infill, speed=measure_speed)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("command", choices=tables)
    add("--gpt", nargs="*", type=Path, default=[gpt.weights_path], metavar="FILE")
    add("--diffusion", nargs="*", type=Path, default=[diffusion.weights_path], metavar="FILE")
    add("--data", type=Path, default=gpt.data_path, metavar="FILE", help="a text of your own")
    add("--words", type=int, default=200, help="infill: how many (%(default)s)")
    add("--texts", type=int, default=4, help="text: by each seed (%(default)s)")
    add("--seeds", type=int, default=7, help="text: how many (%(default)s)")
    temps = [0.9, 1.0, 1.1]
    add("--temps", type=float, nargs="+", default=temps, help="text: temperatures (%(default)s)")
    add("--length", type=int, default=2000, help="text, speed: characters (%(default)s)")
    add("--runs", type=int, default=5, help="speed: of each (%(default)s)")
    args = parser.parse_args(argv)
    dtype = None if args.command == "text" else torch.float32  # as one writes, or exact
    try:
        models = [(f"`{path.name}`", gpt, gpt.load(path, dtype)) for path in args.gpt]
        for path in args.diffusion:
            models.append((f"`{path.name}`", diffusion, diffusion.load(path, dtype)))
        train, val = gpt.read_splits(args.data)
        tables[args.command](models, train, val, args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"measure.py: {error}\n")


if __name__ == "__main__":
    main()
