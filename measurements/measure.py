"""Measures both scripts side by side; each command prints a table for the README.md here.

    python measurements/measure.py nats             # exact nats per character of real text
    python measurements/measure.py text             # what they write: words, variety, copies
    python measurements/measure.py baseline FILE    # the same of the usual ways of diffusion
    python measurements/measure.py infill           # words of real text, hidden and restored
    python measurements/measure.py speed            # seconds and passes

After ± stands the standard error. FILE has weights for diffusion.py: of the usual masks, for the
baseline. `--gpt` and `--diffusion` name others in place of the repository's; either may name none.
"""

import argparse
import inspect
import re
import sys
import time
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import diffusion
import gpt


# ---- tables ------------------------------------------------------------------------------------
def head(cells):
    print(cells, "|" + " --- |" * (cells.count("|") - 1), sep="\n")


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
    """n items from all over the list, or all."""
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]


def words(texts):
    """All words but for the first and the last of each text, which may be cut."""
    return [word for text in texts for word in re.findall(r"[a-z']+", text.lower())[1:-1]]


def ngram(texts, order, characters):
    """An n-gram model of texts in so many different characters: modified Kneser-Ney, interpolated
    (Chen and Goodman, 1999). It is a function: text -> nats of each of its characters."""
    levels = []  # one per length of the context
    counts = Counter(gram for text in texts for gram in pieces(text, order, 1))
    for _ in range(order):
        n = Counter(counts.values())  # how many grams were counted once, twice, ...
        y = n[1] / max(1, n[1] + 2 * n[2])
        kept, total, lost = {}, Counter(), Counter()  # of a gram; of the contexts of grams
        for gram, count in counts.items():
            k = min(count, 3)
            discount = k - (k + 1) * y * n[k + 1] / max(1, n[k])
            kept[gram] = count - min(max(discount, 0.1 * k), 0.9 * k)  # some n may be 0
            total[gram[:-1]] += count
            lost[gram[:-1]] += count - kept[gram]
        levels.insert(0, (kept, total, lost))
        counts = Counter(gram[1:] for gram in counts)  # how many characters it was seen after

    def nats(text):
        probabilities = []
        for i, char in enumerate(text):
            p = 1 / characters
            for n, (kept, total, lost) in enumerate(levels[: i + 1]):
                context = text[i - n : i]
                if context in total:
                    p = (kept.get(context + char, 0) + lost[context] * p) / total[context]
            probabilities.append(p)
        return -np.log(probabilities)

    return nats


# ---- nats: of real text, exact -----------------------------------------------------------------
def nats_by_hidden(model, window):
    """Nats per hidden character where 1 to all columns are hidden, as in training: (columns,)."""
    ids = model.tokenizer.encode(window).to(model.rope.device)
    rows = ids.expand(diffusion.columns, -1)  # as many as hide() takes to hide each number once
    inputs = diffusion.hide(rows, model.tokenizer.mask)
    hidden = inputs == model.tokenizer.mask
    paid = F.cross_entropy(model(inputs).transpose(1, 2), rows, reduction="none")
    means = (paid * hidden).sum(1) / hidden.sum(1)
    return means[hidden.sum(1).argsort()].cpu().numpy()


@torch.no_grad()
def measure_nats(models, train, val, args):
    size, given = gpt.block_size, gpt.context
    texts = {"validation": val, "training": train[-len(val) :]}
    windows = {kind: pieces(text, size, size - given) for kind, text in texts.items()}
    nanogpt_windows = pieces(val, size + 1, size)  # inputs and targets
    first, details = [], []
    head("| | validation text | less the first row | training text | nanoGPT's windows |")
    for name, script, model in models:
        torch.manual_seed(0)  # each model finds the same characters hidden
        nats, causal = [], ""
        for kind, text in texts.items():
            paid = script.score(model, text).cpu().numpy()
            nats.append(paid.mean(1))
            if script is diffusion:
                by_hidden = np.stack([nats_by_hidden(model, window) for window in windows[kind]])
                details.append((f"{name}, pass of the draft, {kind} text", paid))
                details.append((f"{name}, hidden columns, {kind} text", by_hidden))
        if script is gpt:
            rows = [model.tokenizer.encode(w)[None].to(model.rope.device) for w in nanogpt_windows]
            causal = mean([gpt.loss_fn(model, ids).item() for ids in rows])
        first = first or nats
        row(name, mean(nats[0]), mean(nats[0] - first[0], sign="+"), mean(nats[1]), causal)
    seven = ngram([train], 7, len(set(train + val)))
    nats = np.array([seven(window)[given:].mean() for window in windows["validation"]])
    causal = mean([seven(window)[1:].mean() for window in nanogpt_windows])
    row("7-gram", mean(nats), mean(nats - first[0], sign="+"), "", causal)
    print()
    head("| | " + " | ".join(map(str, range(1, diffusion.columns + 1))) + " |")
    for name, figures in sorted(details, key=lambda detail: detail[0]):
        row(name, *map(mean, figures.T))
    print(f"\nfloat32, {len(nats)} windows, {len(nanogpt_windows)} of nanoGPT's")


# ---- text and baseline: what is written --------------------------------------------------------
def judge(samples, train, real):
    """Of the words of each sample, the share that train has and the share of different ones; of
    its runs of 20 characters, the percentage that train has; and nats per character of a real text
    by a 5-gram of it: what is not English costs there, and what is never said."""
    vocabulary, runs, characters = set(words([train])), set(pieces(train, 20, 1)), set(train + real)
    known, distinct, copied, reverse = [], [], [], []
    for texts in samples:
        said = words(texts)
        known.append(sum(word in vocabulary for word in said) / max(1, len(said)))
        distinct.append(len(set(said)) / max(1, len(said)))
        copied.append(100 * np.mean([run in runs for t in texts for run in pieces(t, 20, 1)]))
        reverse.append(ngram(texts, 5, len(characters))(real).mean())
    return known, distinct, copied, reverse


@torch.inference_mode()
def usual(model, n, length, way, passes, temp):
    """n texts in a usual way of masked diffusion: each pass draws all holes of a block and keeps
    the k surest (LLaDA) or k by chance (MDLM). The windows are those of diffusion.generate(), and
    the temperature falls as there."""
    size, mask, end = diffusion.block_size, model.tokenizer.mask, len(model.prompt) + length
    ids = model.tokenizer.encode(model.prompt + "_" * (length + size)).repeat(n, 1)  # (B, T)
    for start in range(0, length, size - diffusion.context):
        window = ids[:, start : start + size]  # a view: what is written in it is written in ids
        block_passes = min(passes, length - start)
        for i in range(block_passes):
            holes = window == mask
            holes[:, end - start :] = False  # padding
            logits = model(window.to(model.rope.device)).cpu()
            drawn = diffusion.draw(logits, temp * (1 - i / block_passes) ** 3)  # (B, T)
            certainty = logits.softmax(-1).gather(2, drawn[..., None])[..., 0]
            order = certainty if way == "k surest" else torch.rand(n, size)
            k = int((holes[0].sum() / (block_passes - i)).ceil())
            kept = torch.where(holes, order, -1).topk(k).indices  # (B, k)
            window.scatter_(1, kept, drawn.gather(1, kept))
    return [model.tokenizer.decode(text[len(model.prompt) : end]) for text in ids]


def written(script, model, args, seed, way, passes, temp):
    """The texts of a seed, after the default prompt, in so many passes per 240 characters."""
    torch.manual_seed(seed)
    if way in ("k surest", "k by chance"):
        return usual(model, args.texts, args.length, way, passes, temp)
    looks = [passes // diffusion.columns - 1] if script is diffusion else []
    runs = [script.generate(model, None, args.length, temp, *looks) for _ in range(args.texts)]
    return [list(yields)[-1][0][len(model.prompt) :] for yields in runs]


def measure_text(models, train, val, args):
    stretches, n = pieces(val, args.length, args.length), args.seeds * args.texts
    real, scored = evenly(stretches[::2], n), "".join(stretches[1::2])  # of the same plays
    if len(real) < n:
        raise ValueError("the text is too short: give a smaller --length, --texts or --seeds")
    gpts, diffusions = ([m for m in models if m[1] is script] for script in (gpt, diffusion))
    temp = inspect.signature(diffusion.generate).parameters["temp"].default
    draft = diffusion.columns  # passes; each look takes as many
    if args.what == "text":
        rows = [*product(gpts, ["left to right"], [240], args.temps or [0.65, 0.75, 0.85])]
        rows += product(diffusions, ["columns"], [2 * draft], args.temps or [0.85, 0.95, 1.05])
        rows += product(diffusions, ["columns"], [draft, 2 * draft, 3 * draft], [temp])
    else:
        if not args.files:
            raise ValueError("baseline is about a FILE of weights: name one")
        temps = args.temps or [0.7, 0.9, 2.0]
        rows = [*product(diffusions[:1], ["k surest", "k by chance"], [8, 16, 64, 240], temps)]
        rows += product(diffusions, ["columns"], [draft, 2 * draft], [temp])
    head("| | way | passes per 240 | temp | known words | distinct words | copied, % | reverse |")
    held_out = [real[seed :: args.seeds] for seed in range(args.seeds)]
    row("held-out text", "", "", "", *map(mean, judge(held_out, train, scored)))
    known, *_ = judge([[stretch] for stretch in stretches], train, scored)
    row("all held-out text", "", "", "", mean(known), "", "", "")
    for (name, script, model), *way in dict.fromkeys(rows):  # each once
        samples = [written(script, model, args, seed, *way) for seed in range(args.seeds)]
        row(name, *way, *map(mean, judge(samples, train, scored)))
    print(f"\n{args.seeds} seeds, {args.texts} texts of {args.length} characters by each")


# ---- infill: hidden words of real text ---------------------------------------------------------
@torch.no_grad()
def infill(script, model, text, start, end):
    """Whether text[start:end] comes back whole at temperature 0, and its exact nats per character.
    GPT sees the text before it. Diffusion sees all else, and its draft pays, as in score()."""
    rows = model.tokenizer.encode(text)[None].to(model.rope.device)
    if script is gpt:
        *_, (written, _) = gpt.generate(model, text[:start], end - start, temp=0)
        logits = model(rows[:, : end - 1])[0, start - 1 :]
        paid = F.cross_entropy(logits, rows[0, start:end], reduction="sum").item()
    else:
        prompt = text[:start] + "_" * (end - start) + text[end:]
        *_, (written, _) = diffusion.generate(model, prompt, length=0, temp=0)
        ids, paid = model.tokenizer.encode(prompt)[None].to(model.rope.device), 0
        while (holes := ids == model.tokenizer.mask).any():
            logits = model(ids)
            column = diffusion.surest_column(logits, holes)
            paid += F.cross_entropy(logits[column], rows[column], reduction="sum").item()
            ids = torch.where(column, rows, ids)
    return written[start:end] == text[start:end], paid / (end - start)


def hidden_words(text, n):
    """n times a window, and where in its middle a word of 4 to 8 letters starts and ends."""
    size, half = gpt.block_size, gpt.block_size // 2
    found = re.finditer(r"(?<![A-Za-z'])[A-Za-z]{4,8}(?![A-Za-z'])", text)
    found = [word for word in found if half <= word.start() <= len(text) - half]
    return [(text[w.start() - half :][:size], half, half + len(w[0])) for w in evenly(found, n)]


def measure_infill(models, train, val, args):
    places, first = hidden_words(val, args.words), None
    head("| | restored whole | nats per hidden character | less the first row |")
    for name, script, model in models:
        whole, nats = np.array([infill(script, model, *place) for place in places]).T
        first = nats if first is None else first
        row(name, mean(whole), mean(nats), mean(nats - first, sign="+"))
    print(f"\nfloat32, {len(places)} words; each counts alike")


# ---- speed -------------------------------------------------------------------------------------
def measure_speed(models, train, val, args):
    seconds, passes = np.zeros((len(models), args.runs)), [0] * len(models)
    for i in range(args.runs):
        for j, (_, script, model) in enumerate(models):
            began = time.perf_counter()
            passes[j] = len(list(script.generate(model, None, args.length)))
            seconds[j, i] = time.perf_counter() - began
    head("| | passes | seconds | milliseconds per pass | of the first row's seconds |")
    for (name, *_), count, taken in zip(models, passes, seconds, strict=True):
        figures = taken, 1000 * taken / count, taken / seconds[0]
        row(name, count, *(f"{np.median(f):.3g} ({f.min():.3g} to {f.max():.3g})" for f in figures))
    device, dtype = gpt.best_device()
    print(f"\n{args.length} characters, {args.runs} times each in turn: median, least and most;")
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {dtype}")


# ---- command line ------------------------------------------------------------------------------
def main(argv=None):
    measures = dict(nats=measure_nats, text=measure_text, baseline=measure_text)
    measures |= dict(infill=measure_infill, speed=measure_speed)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("what", choices=measures)
    add("files", nargs="*", type=Path, metavar="FILE", help="weights for diffusion.py")
    add("--gpt", nargs="*", type=Path, default=[gpt.weights_path], metavar="FILE")
    add("--diffusion", nargs="*", type=Path, default=[diffusion.weights_path], metavar="FILE")
    add("--data", type=Path, default=gpt.data_path, metavar="FILE", help="a text of your own")
    add("--words", type=int, default=200, help="infill: how many (%(default)s)")
    add("--texts", type=int, default=4, help="text, baseline: by each seed (%(default)s)")
    add("--seeds", type=int, default=7, help="text, baseline: how many (%(default)s)")
    add("--temps", type=float, nargs="+", metavar="T", help="text, baseline: temperatures")
    add("--length", type=int, default=2000, help="text, baseline, speed: characters (%(default)s)")
    add("--runs", type=int, default=5, help="speed: of each (%(default)s)")
    args = parser.parse_args(argv)
    dtype = torch.float32 if args.what in ("nats", "infill") else None  # exact, or as one writes
    try:
        files = [*product([gpt], args.gpt), *product([diffusion], args.files + args.diffusion)]
        models = [(f"`{path.name}`", script, script.load(path, dtype)) for script, path in files]
        measures[args.what](models, *gpt.read_splits(args.data), args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"measure.py: {error}\n")


if __name__ == "__main__":
    main()
