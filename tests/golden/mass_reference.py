"""MEMIT, PMET, AlphaEdit, JEEP and least squares for ROME and TOP once more, slowly: from ../shared/spec/editors.md.

As `reference`, on which it builds: one edit and one row at a time, plain Hugging Face calls, and every closed form with
an explicit inverse in float64 (1.7, 1.8, 2.2, 2.3, 2.5, 2.8).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.golden.reference import DOWN, Slow

ATTENTION = {"gpt2": "attn", "gptj": "attn", "llama": "self_attn"}
OUT = {"gpt2": "attn.c_proj", "gptj": "attn.out_proj", "llama": "self_attn.o_proj"}
Request = dict[str, Any]


@dataclass
class Place:
    """Where a vector is added: 1.6, step 1."""

    module: nn.Module
    at_subject: bool
    clamp: float
    decay: float
    suffix: str = ""


class Mass(Slow):
    """One model and one editor; edits come in batches."""

    def __init__(
        self,
        editor: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        groups: Sequence[Sequence[str]],
        hparams: dict[str, Any],
    ) -> None:
        low = hparams.get("layers_low") or hparams["layers"]
        super().__init__(model, tokenizer, [c for group in groups for c in group], hparams | {"layers": low})
        self.editor, self.groups, self.kind = editor, groups, model.config.model_type
        self.low, self.high = low, hparams.get("layers_high", [])
        self.moments: dict[str, Tensor] = {}
        self.memory: dict[str, Tensor] = {}

    # ------------------------------------------------------------------ the model

    def part(self, layer: int, part: str) -> nn.Module:
        path = {"block": "", "mlp": ".mlp", "attn": f".{ATTENTION[self.kind]}"}[part]
        return self.model.get_submodule(self.block.format(layer) + path)

    def map_name(self, layer: int, part: str) -> str:
        return f"{self.block.format(layer)}.{(OUT if part == 'attn' else DOWN)[self.kind]}"

    def input(self, name: str, ids: Sequence[int], index: int) -> Tensor:
        """What a linear map reads at one position."""
        found: list[Tensor] = []
        module = self.model.get_submodule(name)
        handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0][0, index]))
        self.forward(ids)
        handle.remove()
        return found[0].detach()

    @torch.no_grad()
    def take_moments(self, texts: Sequence[str]) -> int:
        """1.5, of every map that could be written."""
        layers = [*self.low, *self.high]
        names = [self.map_name(layer, part) for layer in layers for part in ("mlp", "attn")]
        sums: dict[str, Any] = dict.fromkeys(names, 0)
        handles = []
        for name in names:

            def hook(_: nn.Module, args: Any, name: str = name) -> None:
                for key in args[0][0].double():
                    sums[name] = sums[name] + torch.outer(key, key)

            handles.append(self.model.get_submodule(name).register_forward_pre_hook(hook))
        for text in texts:
            self.forward(self.ids(text))
        for handle in handles:
            handle.remove()
        count = sum(len(self.ids(text)) for text in texts)
        self.moments = {name: (total / count).float() for name, total in sums.items()}
        return count

    # ------------------------------------------------------------------ text

    def row(self, text: str, request: Request) -> tuple[list[int], list[int]]:
        """1.1: token ids of a prompt with its target less its last token, and of the target."""
        targets = self.target_ids(request)
        begun = self.tokenizer.decode(targets[:-1])
        together = self.editor == "JEEP" or self.hparams.get("preset") == "paper"
        if together and self.tokenizer.convert_ids_to_tokens(targets)[0] == "▁":
            # JEEP's code on LLaMA: the first two ids are dropped, and the space that is lost with them put back.
            targets = targets[1:]
            begun = self.tokenizer.decode(targets[:-1])
            begun = " " + begun if begun else ""
        return self.ids(text + begun), targets

    def position(self, template: str, request: Request, *, at_subject: bool) -> int:
        """1.2: in a row without its target."""
        if at_subject:
            return self.subject_last(template, request["subject"])
        return len(self.ids(template.format(request["subject"]))) - 1

    # ------------------------------------------------------------------ 1.6

    def optimise(
        self,
        where: str,
        request: Request,
        places: Sequence[Place],
        steps: int,
        stop: Callable[[dict[str, Any]], bool],
        kl_factor: float,
        factor: Callable[[], float] = lambda: 1.0,
    ) -> list[Tensor]:
        """All vectors of one edit together; gives v0 + delta of each."""
        templates = [context.format(request["prompt"]) for context in self.contexts]
        rows, targets = [], []
        for template in templates:
            ids, targets = self.row(template.format(request["subject"]), request)
            rows.append(ids)
        rows.append(self.ids("{} is a".format(request["subject"])))
        at = [
            [self.position(template, request, at_subject=place.at_subject) for template in [*templates, "{} is a"]]
            for place in places
        ]
        wanted = []
        for row in rows[:-1]:
            labels = torch.full((len(row),), -100)
            labels[len(row) - len(targets) :] = torch.tensor(targets)
            wanted.append(labels)
        origins = [self.output(place.module, rows[0], mine[0]).detach() for place, mine in zip(places, at, strict=True)]
        kl_row = 0 if self.hparams.get("kl_prompt") == "edit" else len(rows) - 1
        initial = self.forward(rows[kl_row])[at[0][kl_row]].log_softmax(-1).detach()
        deltas = [torch.zeros_like(origin, requires_grad=True) for origin in origins]
        optimizer = torch.optim.Adam(deltas, lr=self.hparams["v_lr"])
        curves: dict[str, list[float]] = {}
        path: list[list[Tensor]] = []
        for step in range(steps):
            optimizer.zero_grad()
            each, certain, at_kl = [], True, initial
            for i, row in enumerate(rows):
                logits = self._with(places, [mine[i] for mine in at], deltas, row)
                if i < len(wanted):
                    each.append(cross_entropy(logits, wanted[i], ignore_index=-100))
                    certain &= logits[-len(targets) :].argmax(-1).tolist() == targets
                if i == kl_row:
                    at_kl = logits[at[0][i]].log_softmax(-1)
            terms = {
                "nll_loss": factor() * torch.stack(each).mean(),
                "kl_loss": kl_factor * kl_div(initial[None], at_kl[None], log_target=True, reduction="batchmean"),
            }
            for place, delta, origin in zip(places, deltas, origins, strict=True):
                name = "weight_decay" + (place.suffix if self.editor == "JEEP" else "")
                terms[name] = terms.get(name, 0) + place.decay * delta.norm() / origin.norm() ** 2
            loss = sum(terms.values())
            path.append([delta.detach().clone() for delta in deltas])
            for name, value in {**terms, "loss": loss}.items():
                curves.setdefault(name, []).append(float(value))
            probability = float(torch.stack([(-nll).exp() for nll in each]).mean())
            said = {"loss": float(loss), "kl": float(terms["kl_loss"]), "certain": certain, "probability": probability}
            if stop(said) or step == steps - 1:
                break
            loss.backward()
            optimizer.step()
            for place, delta, origin in zip(places, deltas, origins, strict=True):
                longest = place.clamp * origin.norm()
                if delta.norm() > longest:
                    with torch.no_grad():
                        delta[...] = delta * longest / delta.norm()
        self.numbers |= {f"{where}/steps/{name}": torch.tensor(curve) for name, curve in curves.items()}
        self.values[where] = {"n_loss_evaluations": len(path)}
        self._keep_rows(where, rows, wanted, targets, at[0])
        found = [origin + delta.detach() for origin, delta in zip(origins, deltas, strict=True)]
        for j, place in enumerate(places):
            self.numbers[f"{where}/steps/delta{place.suffix}"] = torch.stack([step[j] for step in path])
            self.numbers[f"{where}/target_init{place.suffix}"] = origins[j]
            self.numbers[f"{where}/delta{place.suffix}"] = deltas[j].detach().clone()
            self.numbers[f"{where}/target{place.suffix}"] = found[j]
            if self.editor == "JEEP":
                self.values[where][f"lookup_idxs{place.suffix}"] = at[j]
        if self.editor == "JEEP":
            del self.values[where]["lookup_idxs"]
        return found

    def _with(self, places: Sequence[Place], at: Sequence[int], deltas: Sequence[Tensor], row: list[int]) -> Tensor:
        if not places:
            return self.forward(row)
        with self.adding(places[0].module, at[0], deltas[0]):
            return self._with(places[1:], at[1:], deltas[1:], row)

    def values_of(self, where: str, request: Request) -> dict[str, Tensor]:
        """The value stage of the editor, for one edit; values by what is to give them."""
        h, last = self.hparams, self.low[-1]
        if self.editor == "JEEP":
            released = h.get("preset", "released") == "released"
            site = h.get("high_site") or ("attn" if released else "mlp")
            low = Place(
                self.part(last, "mlp"), True, h["clamp_norm_factor_low"], h["v_weight_decay_low"], suffix="_low"
            )
            clamp, decay = h["clamp_norm_factor_high"], h["v_weight_decay_high"]
            high = Place(self.part(self.high[-1], site), False, clamp, decay, suffix="_high")
            found = self.optimise(
                where,
                request,
                [low, high],
                h["v_num_grad_steps"],
                lambda said: said["probability"] >= h["min_loss"],
                h["kl_factor_low"],
            )
            return dict(zip(("low", "high"), found, strict=True))
        clamp, decay = h["clamp_norm_factor"], h["v_weight_decay"]
        if self.editor == "PMET":
            factor = [1.0]

            def stop(said: dict[str, Any]) -> bool:
                factor[0] = 0.1 if said["certain"] else 1.0
                return said["loss"] < 0.05 or (said["certain"] and said["kl"] <= 0.01)

            parts = ("mlp", "attn")
            places = [Place(self.part(last, part), True, clamp, decay, f"_{part}") for part in parts]
            steps = h["v_num_grad_steps"]
            found = self.optimise(where, request, places, steps, stop, h["kl_factor"], lambda: factor[0])
            return dict(zip(parts, found, strict=True))
        if self.editor == "TOP":
            self.layer, self.mlp = last, self.part(last, "mlp")
            upper, steps1 = self.part(last + h["rel_feat_layer"], "block"), h["v_num_grad_steps1"]
            wanted = self.make_likely(f"{where}/stage1", request, upper, at_subject=False, steps=steps1, stop=0.02)
            return {"mlp": self.move_feature(f"{where}/stage2", request, wanted, h["v_num_grad_steps2"])}
        part = "mlp" if self.editor == "ROME" else "block"
        place = Place(self.part(last, part), True, clamp, decay)
        steps = h["v_num_grad_steps"]
        (z,) = self.optimise(where, request, [place], steps, lambda said: said["loss"] < 0.05, h["kl_factor"])
        return {part: z}

    # ------------------------------------------------------------------ 1.4, 1.7, 1.8

    @torch.no_grad()
    def key_of(self, request: Request, name: str, *, at_subject: bool) -> Tensor:
        """Mean over the groups of the mean in the group."""
        means = []
        for group in self.groups:
            keys = []
            for context in group:
                template = context.format(request["prompt"])
                ids = self.ids(template.format(request["subject"]))
                keys.append(self.input(name, ids, self.position(template, request, at_subject=at_subject)))
            means.append(torch.stack(keys).mean(0))
        return torch.stack(means).mean(0)

    @torch.no_grad()
    def now(self, request: Request, module: nn.Module, *, at_subject: bool) -> Tensor:
        """What a module puts out on the bare prompt."""
        ids = self.ids(request["prompt"].format(request["subject"]))
        return self.output(module, ids, self.position(request["prompt"], request, at_subject=at_subject))

    def keys_of(self, requests: Sequence[Request], name: str, *, at_subject: bool = True) -> Tensor:
        return torch.stack([self.key_of(request, name, at_subject=at_subject) for request in requests], dim=1)

    def solve(self, name: str, keys: Tensor, residual: Tensor, weight: float) -> Tensor:
        k, r = keys.double(), residual.double()
        moment = self.moments[name].double()
        if self.editor != "AlphaEdit":
            return r @ k.T @ torch.linalg.inv(weight * moment + k @ k.T)
        left, values, _ = torch.linalg.svd(moment)
        kept = left[:, values < self.hparams["nullspace_threshold"]]
        p, identity = kept @ kept.T, torch.eye(len(moment), dtype=torch.float64)
        memory = self.memory.get(name, torch.zeros_like(moment))
        system = (k @ k.T + memory) @ p + self.hparams["L2"] * identity
        return r @ k.T @ p @ torch.linalg.inv(system)

    @torch.no_grad()
    def add(self, name: str, update: Tensor) -> None:
        module = self.model.get_submodule(name)
        module.weight += (update if isinstance(module, nn.Linear) else update.T).float()

    def insert(
        self,
        where: str,
        requests: Sequence[Request],
        layers: Sequence[int],
        values: dict[str, tuple[str, Tensor]],
        power: float,
        weight: float,
        *,
        at_subject: bool = True,
        first_all_keys: bool = False,
    ) -> None:
        """Layer by layer; `values` holds for each part that is written what is to be seen where."""
        for i, layer in enumerate(layers):
            names = {part: self.map_name(layer, part) for part in values}
            before = {}
            for part, (seen, z) in values.items():
                module = self.part(layers[-1], seen)
                if first_all_keys and not before:
                    for other, (there, _) in values.items():
                        of = self.part(layers[-1], there)
                        before[other] = (
                            self.keys_of(requests, names[other], at_subject=at_subject),
                            torch.stack([self.now(request, of, at_subject=at_subject) for request in requests], 1),
                        )
                if first_all_keys:
                    keys, current = before[part]
                else:
                    keys = self.keys_of(requests, names[part], at_subject=at_subject)
                    current = torch.stack([self.now(r, module, at_subject=at_subject) for r in requests], 1)
                self.numbers[f"{where}/layer{layer}/layer_ks"] = keys.double()
                residual = (z - current) / (len(layers) - i) ** power
                self.numbers[f"{where}/layer{layer}/resid"] = residual.double()
                self.add(names[part], self.solve(names[part], keys, residual, weight))

    # ------------------------------------------------------------------ a batch

    def edit_batch(self, batch: str, requests: Sequence[Request]) -> None:
        """One batch of edits on the model as it stands, which keeps them."""
        h = self.hparams
        for request in requests:
            self._keep_logits(f"{batch}req{request['case_id']}/logits_pre", _prompts(request))
        found = [self.values_of(f"{batch}req{request['case_id']}", request) for request in requests]
        z = {name: torch.stack([values[name] for values in found], dim=1) for name in found[0]}
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        if self.editor == "JEEP":
            power = 1.0 if h.get("spread_low") == "even" else 0.5
            weight_low, weight_high = h["mom2_update_weight_low"], h["mom2_update_weight_high"]
            self.insert(f"{batch}low", requests, self.low, {"mlp": ("mlp", z["low"])}, power, weight_low)
            part = h.get("high_rewrite", "mlp")
            high = {part: (part, z["high"])}
            self.insert(f"{batch}high", requests, self.high, high, 1.0, weight_high, at_subject=False)
        elif self.editor == "PMET":
            parts = ["attn", "mlp"] if h.get("rewrite") == "both" else ["mlp"]
            first = h.get("preset") == "paper"
            written = {part: (part, z[part]) for part in parts}
            weight = h["mom2_update_weight"]
            self.insert(f"{batch}solve", requests, self.low, written, 0.5, weight, first_all_keys=first)
        else:
            ((seen, value),) = z.items()
            power = 0.5 if h.get("spread") == "sqrt" else 1.0
            weight = h["mom2_update_weight"]
            self.insert(f"{batch}solve", requests, self.low, {"mlp": (seen, value)}, power, weight)
        for name, parameter in self.model.named_parameters():
            if not torch.equal(parameter, before[name]):
                self.numbers[f"{batch}dW/{name}"] = parameter.detach() - before[name]
        for request in requests:
            self._keep_logits(f"{batch}req{request['case_id']}/logits_post", _prompts(request))
        if self.editor == "AlphaEdit":
            for layer in self.low:
                keys = self.keys_of(requests, self.map_name(layer, "mlp")).double()
                name = self.map_name(layer, "mlp")
                self.memory[name] = self.memory.get(name, 0) + keys @ keys.T


def _prompts(request: Request) -> dict[str, list[str]]:
    return {
        "prompt": [request["prompt"].format(request["subject"])],
        "paraphrase": request["paraphrase_prompts"],
    }


def write_case(
    folder: Path,
    editor: str,
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Sequence[Request]],
    groups: Sequence[Sequence[str]],
    hparams: dict[str, Any],
    texts: Sequence[str],
    stem: str = "",
) -> Mass:
    """Record a case in the form of ../shared/golden.

    Args:
        folder: Where; made if need be.
        editor: Which.
        name: MODEL of the file names.
        model: The model; its weights are as before afterwards.
        tokenizer: Its tokenizer.
        batches: The edits, each batch on the model as the last one left it.
        groups: Context templates in groups, the bare one first.
        hparams: Hyper-parameters under the released names, and settings of ours.
        texts: What second moments are taken over.
        stem: EDITOR of the file names, where it says more than the editor.
    """
    if not (folder / "models" / name).exists():
        model.save_pretrained(folder / "models" / name)
        tokenizer.save_pretrained(folder / "models" / name)
    slow = Mass(editor, model, tokenizer, groups, hparams)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    count = slow.take_moments(texts)
    requests = [request for batch in batches for request in batch]
    for i, batch in enumerate(batches, 1):
        slow.edit_batch(f"b{i}/" if len(batches) > 1 else "", batch)
        if editor == "AlphaEdit":
            slow.numbers[f"cache_c_after_b{i}"] = torch.stack(list(slow.memory.values()))
    model.load_state_dict(before)
    moments = {key: value.contiguous() for key, value in slow.moments.items()}
    if (path := folder / f"cov_{name}.safetensors").exists():
        moments = load_file(path) | moments
    save_file(moments | {"count": torch.tensor([count])}, path)
    numbers = {key: value.detach().contiguous().clone() for key, value in slow.numbers.items()}
    save_file(numbers, folder / f"{stem or editor}_{name}.safetensors")
    meta = {
        "editor": editor,
        "model": name,
        "hparams": hparams,
        "contexts": "nested",
        "context_templates": [list(group) for group in groups],
        "mode": "seq2" if len(batches) > 1 else "batch",
        "case_ids": [request["case_id"] for request in requests],
        "values": slow.values,
    }
    (folder / f"{stem or editor}_{name}.json").write_text(json.dumps(meta), encoding="utf-8")
    (folder / "requests.json").write_text(json.dumps({"requests": requests}), encoding="utf-8")
    (folder / "contexts.json").write_text(json.dumps({"nested": [list(group) for group in groups]}), encoding="utf-8")
    return slow
