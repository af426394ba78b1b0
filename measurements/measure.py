"""Measures both scripts side by side; each command prints a table for the README.md here.

    python measurements/measure.py nats      # exact nats per character of real text
    python measurements/measure.py text      # what they write: words, variety, copies
    python measurements/measure.py infill    # words of real text, hidden and restored
    python measurements/measure.py speed     # seconds and passes

Behind ± stands the standard error. Other weights are measured in place of the repository's, or
beside them: `nats --diffusion weights/diffusion.pt other.pt`, and `--gpt` with no file for no GPT.
"""

import argparse
import platform
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
def head(cells):
    print(cells, "|" + " --- |" * (cells.count("|") - 1), sep="\n")


def row(*cells):
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def mean(values, digits=3, sign=""):
    """The mean of numbers and its standard error; nothing of none."""
    if not len(values):
        return ""
    error = np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):{sign}.{digits}f} ± {error:.{digits}f}"


def median(values):
    return f"{np.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


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


class KneserNey:
    """An n-gram model of characters: modified Kneser-Ney, interpolated (Chen and Goodman, 1999)."""

    def __init__(self, texts, order, characters):
        self.characters, self.levels = characters, []  # how many there are; one level per length
        counts = Counter(gram for text in texts for gram in pieces(text, order, 1))
        for _ in range(order):
            n = Counter(counts.values())  # how many grams were counted once, twice, ...
            y = n[1] / max(1, n[1] + 2 * n[2])
            kept, total, lost = {}, Counter(), Counter()  # of a gram; of the contexts of grams
            for gram, count in counts.items():
                k = min(count, 3)
                discount = k - (k + 1) * y * n[k + 1] / max(1, n[k])
                # In bounds, as a small text, or the alphabet, may have no gram of some count.
                kept[gram] = count - min(max(discount, 0.1 * k), 0.9 * k)
                total[gram[:-1]] += count
                lost[gram[:-1]] += count - kept[gram]
            self.levels.insert(0, (kept, total, lost))
            counts = Counter(gram[1:] for gram in counts)  # how many characters it was seen behind

    def nats(self, text):
        """Of each character of text, by as much as there is before it."""
        probabilities = []
        for i in range(len(text)):
            p = 1 / self.characters
            for n, (kept, total, lost) in enumerate(self.levels):
                context = text[max(0, i - n) : i]
                if context not in total:
                    break
                p = (kept.get(context + text[i], 0) + lost[context] * p) / total[context]
            probabilities.append(p)
        return -np.log(probabilities)


# ---- nats: of real text, exact -----------------------------------------------------------------
def nats_by_hidden(model, window):
    """Nats per hidden character where 1 to stride neighbours of every stride are hidden, as in
    training: (stride,)."""
    ids = model.tokenizer.encode(window).to(model.rope.device)
    rows = ids.expand(diffusion.stride, -1)  # as many rows as hide() takes to hide each number once
    inputs = diffusion.hide(rows, model.tokenizer.mask)
    hidden = inputs == model.tokenizer.mask
    paid = F.cross_entropy(model(inputs).transpose(1, 2), rows, reduction="none")
    means = (paid * hidden).sum(1) / hidden.sum(1)
    return means[hidden.sum(1).argsort()].cpu().numpy()


@torch.no_grad()
def measure_nats(models, train, val, args):
    size, given = gpt.block_size, gpt.context
    texts = {"validation": val, "training": train[-len(val) :]}
    windows = {name: pieces(text, size, size - given) for name, text in texts.items()}
    nanogpt_windows = pieces(val, size + 1, size)  # inputs and targets
    totals, details = [], []
    for name, script, model in models:
        torch.manual_seed(0)  # each model finds the same characters hidden
        figures = []
        for kind, text in texts.items():
            paid = script.score(model, text).cpu().numpy()
            figures.append(paid.mean(1))
            if script is diffusion:
                by_hidden = np.stack([nats_by_hidden(model, window) for window in windows[kind]])
                details.append((f"{name}, pass of the draft, {kind} text", paid))
                details.append((f"{name}, hidden of each {script.stride}, {kind} text", by_hidden))
        causal = []
        if script is gpt:
            rows = [model.tokenizer.encode(w)[None].to(model.rope.device) for w in nanogpt_windows]
            causal = [gpt.loss_fn(model, ids).item() for ids in rows]
        totals.append((name, *figures, causal))
    ngram = KneserNey([train], 7, len(set(train + val)))
    figures = np.array([ngram.nats(window)[given:].mean() for window in windows["validation"]])
    totals.append(("7-gram", figures, [], [ngram.nats(w)[1:].mean() for w in nanogpt_windows]))

    head("| | validation text | less the first row | training text | nanoGPT's windows |")
    for name, val_nats, train_nats, nanogpt_nats in totals:
        difference = mean(val_nats - totals[0][1], sign="+")
        row(name, mean(val_nats), difference, mean(train_nats), mean(nanogpt_nats))
    print()
    head("| | " + " | ".join(map(str, range(1, diffusion.stride + 1))) + " |")
    for name, figures in sorted(details, key=lambda detail: detail[0]):
        row(name, *map(mean, figures.T))
    print(f"\nfloat32, {len(windows['training'])} windows, {len(nanogpt_windows)} of nanoGPT's")


# ---- text: what the scripts write --------------------------------------------------------------
def judge(texts, vocabulary, runs, real, characters):
    """Of the words of texts, the share that is in the vocabulary and the share of different ones;
    of their runs of 20 characters, the share that is among the given ones; and nats per character
    of a real text by a 5-gram of texts: what is not English costs there, and what is never said."""
    said = words(texts)
    known = sum(word in vocabulary for word in said) / max(1, len(said))
    distinct = len(set(said)) / max(1, len(said))
    copied = np.mean([run in runs for text in texts for run in pieces(text, 20, 1)])
    return known, distinct, copied, KneserNey(texts, 5, characters).nats(real).mean()


def measure_text(models, train, val, args):
    stretches, n = pieces(val, args.length, args.length), 3 * args.texts
    real, scored = evenly(stretches[::2], n), "".join(stretches[1::2])  # of the same plays
    if len(real) < n:
        raise ValueError("the text is too short: give a smaller --length or --texts")
    vocabulary, runs, characters = set(words([train])), set(pieces(train, 20, 1)), set(train + val)

    def print_judged(name, temp, passes, samples):
        figures = [judge(texts, vocabulary, runs, scored, len(characters)) for texts in samples]
        known, distinct, copied, reverse = zip(*figures, strict=True)
        row(name, temp, passes, mean(known), mean(distinct), mean(copied, 4), mean(reverse))

    def print_written(name, temp, script, model, *looks):
        samples, passes = [[], [], []], 0
        for seed in range(3):
            torch.manual_seed(seed)
            for _ in range(args.texts):
                yields = list(script.generate(model, None, args.length, temp, *looks))
                samples[seed].append(yields[-1][0][len(model.prompt) :])
                passes += len(yields)
        print_judged(name, temp, f"{passes * 240 / (n * args.length):.1f}", samples)

    head("| | temp | passes per 240 | known words | distinct words | copied runs | reverse |")
    print_judged("held-out text", "", "", [real[seed::3] for seed in range(3)])
    for temp in args.temps:
        for name, script, model in models:
            print_written(name, temp, script, model)
            if script is diffusion and temp == 0.7:
                print_written(f"{name}, draft alone", temp, script, model, 0)
                print_written(f"{name}, two second looks", temp, script, model, 2)
    print(f"\nthree seeds, {args.texts} texts of {args.length} characters by each")


# ---- infill: hidden words of real text ---------------------------------------------------------
@torch.no_grad()
def infill_nats(script, model, text, start, end):
    """Exact nats per character of text[start:end]. GPT sees the text before it, diffusion all else:
    it walks the draft, as score() does, over these holes."""
    rows = model.tokenizer.encode(text)[None].to(model.rope.device)
    if script is gpt:
        return F.cross_entropy(model(rows[:, : end - 1])[0, start - 1 :], rows[0, start:end]).item()
    ids, paid = rows.clone(), 0
    ids[:, start:end] = model.tokenizer.mask
    while (holes := ids == model.tokenizer.mask).any():
        logits = model(ids)
        comb = diffusion.surest_comb(logits, holes)
        paid += F.cross_entropy(logits[comb], rows[comb], reduction="sum").item()
        ids = torch.where(comb, rows, ids)
    return paid / (end - start)


def restored(script, model, text, start, end):
    """Whether text[start:end] comes back as it was at temperature 0."""
    if script is gpt:
        *_, (written, _) = gpt.generate(model, text[:start], end - start, temp=0)
    else:
        prompt = text[:start] + "_" * (end - start) + text[end:]
        *_, (written, _) = diffusion.generate(model, prompt, length=0, temp=0)
    return written[start:end] == text[start:end]


def hidden_words(text, n):
    """n times a window, and where in its middle a word of 4 to 8 letters starts and ends."""
    size, half = gpt.block_size, gpt.block_size // 2
    found = re.finditer(r"[A-Za-z']+", text)
    found = [word for word in found if word[0].isalpha() and 4 <= len(word[0]) <= 8]
    found = [word for word in found if half <= word.start() <= len(text) - half]
    return [(text[w.start() - half :][:size], half, half + len(w[0])) for w in evenly(found, n)]


def measure_infill(models, train, val, args):
    places, first = hidden_words(val, args.words), None
    head("| | restored whole | nats per hidden character | less the first row |")
    for name, script, model in models:
        whole = [restored(script, model, *place) for place in places]
        nats = np.array([infill_nats(script, model, *place) for place in places])
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
        row(name, count, median(taken), median(1000 * taken / count), median(taken / seconds[0]))
    device, dtype = gpt.best_device()
    chip = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", platform.machine())
    chip = torch.cuda.get_device_name() if device.type == "cuda" else chip
    print(f"\n{args.length} characters, {args.runs} times each in turn: median, least and most;")
    print(f"{chip}, {torch.get_num_threads()} threads, torch {torch.__version__}, {dtype}")


# ---- command line ------------------------------------------------------------------------------
def main(argv=None):
    measures = dict(nats=measure_nats, text=measure_text)
    measures |= dict(infill=measure_infill, speed=measure_speed)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("what", choices=measures)
    add("--gpt", nargs="*", type=Path, default=[gpt.weights_path], metavar="FILE")
    add("--diffusion", nargs="*", type=Path, default=[diffusion.weights_path], metavar="FILE")
    add("--data", type=Path, default=gpt.data_path, metavar="FILE", help="a text of your own")
    add("--words", type=int, default=200, help="infill: how many (%(default)s)")
    add("--texts", type=int, default=4, help="text: by each of three seeds (%(default)s)")
    add("--temps", type=float, nargs="+", default=[0.6, 0.7, 0.8, 0.9, 1.0], metavar="T")
    add("--length", type=int, default=2000, help="text, speed: characters (%(default)s)")
    add("--runs", type=int, default=5, help="speed: of each (%(default)s)")
    args = parser.parse_args(argv)
    dtype = torch.float32 if args.what in ("nats", "infill") else None  # exact, or as one writes
    try:
        models = []
        for script, paths in (gpt, args.gpt), (diffusion, args.diffusion):
            for path in paths:
                name = f"{script.name}.py" if path == script.weights_path else path
                models.append((f"`{name}`", script, script.load(path, dtype)))
        measures[args.what](models, *gpt.read_splits(args.data), args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"measure.py: {error}\n")


if __name__ == "__main__":
    main()
