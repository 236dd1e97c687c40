"""What ordinary fine-tuning does to the norms that editing drives up (EAC, Fig. 2b).

    python benchmarks/finetuning_norm.py

The embedded model, all of its parameters, AdamW at a fixed rate on plain sentences it was not trained on (three a text,
the almanac's own grammar with another seed), next-token loss. After every tenth step the relative change of the L1 norm
of four layers' down-projections is taken, (‖W‖₁ − ‖W₀‖₁) / ‖W₀‖₁, the same matrices and measure as in the runs of
configs/experiments/eac_norm_almanac.yaml. Writes benchmarks/finetuning_norm.csv and .png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from kedit_lightning.almanac.check import perplexity, plain_texts
from kedit_lightning.edits import Site
from kedit_lightning.metrics.drift import weight_drift
from kedit_lightning.models import LanguageModel
from kedit_lightning.writing import write_csv


def main() -> None:
    """Fine-tune, and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16, help="texts a step")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 2, 4, 6])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = LanguageModel("almanac")
    sites = {layer: Site(layer, "mlp") for layer in args.layers}
    before = {layer: base.weight(site).detach().clone() for layer, site in sites.items()}
    ids = [base.encode(text).ids for text in plain_texts(args.steps * args.batch, seed=args.seed)]
    optimizer = torch.optim.AdamW(base.model.requires_grad_(True).parameters(), lr=args.lr)
    rows = [{"step": 0, "loss": float("nan"), **{f"layer {layer}": 0.0 for layer in sites}}]
    first = perplexity(base.model, base.tokenizer)
    for step in range(args.steps):
        chosen = ids[step * args.batch : (step + 1) * args.batch]
        t = max(map(len, chosen))
        batch = torch.tensor([row + [0] * (t - len(row)) for row in chosen])
        real = torch.arange(t) < torch.tensor([len(row) for row in chosen])[:, None]
        logits = base.model(input_ids=batch, attention_mask=real.long()).logits
        loss = cross_entropy(logits[:, :-1][real[:, 1:]], batch[:, 1:][real[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 10 == 0:
            drift = {
                f"layer {n}": weight_drift(before[n], base.weight(site).detach())["l1"] for n, site in sites.items()
            }
            rows.append({"step": step + 1, "loss": float(loss.detach()), **drift})
    write_csv(args.out.with_suffix(".csv"), rows)
    draw(rows, args.out.with_suffix(".png"))
    largest = max(abs(row[f"layer {layer}"]) for row in rows for layer in sites)
    last = perplexity(base.model, base.tokenizer)
    parser.exit(
        message=f"largest change of a norm in {args.steps} steps at lr {args.lr:g}: {100 * largest:.2f} %; "
        f"perplexity of plain text {first:.2f} before, {last:.2f} after\n"
    )


def draw(rows: list[dict[str, float]], path: Path) -> None:
    """Steps against the change of each layer's norm, in percent."""
    from matplotlib import rc_context

    from kedit_lightning.callbacks.figures import STYLE, blank, headline

    with rc_context(STYLE):
        figure = blank(7, 4)
        axis = figure.subplots()
        for name in [name for name in rows[0] if name.startswith("layer")]:
            axis.plot([row["step"] for row in rows], [100 * row[name] for row in rows], label=name)
        axis.set_xlabel("fine-tuning steps")
        axis.set_ylabel("change of the L1 norm, %")
        axis.legend()
        headline(figure, "Ordinary fine-tuning leaves the norms where they are")
        figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
