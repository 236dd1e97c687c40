"""Makes ``tests/golden/data`` out of ../shared/golden: ``python -m tests.golden.extract ../shared/golden``.

The extract is a folder of the same form, small enough to commit: the tiny model as it is, the second moment of the one
edited layer, and of each case all that is compared but for the larger tensors that follow from others (ΔW is kept for
one request a case, the logits for the edited prompt).
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.golden.cases import find, read_json
from tests.golden.compare import QUANTITIES

DATA = Path(__file__).parent / "data"
CASES = (("ROME", "gpt2-tiny"), ("TOP", "gpt2-tiny"))
LEFT_OUT = ("logits_pre/", "logits_post/paraphrase", "logits_post/neighborhood", "logits_post/relation_specificity")
MODEL_FILES = ("config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")


def extract(source: Path, target: Path = DATA) -> None:
    """Write the extract."""
    shutil.rmtree(target, ignore_errors=True)
    patterns = [*QUANTITIES.values(), r"(stage\d/)?(input_ids|attention_mask|rewriting_targets|target_ids)"]
    requests = set()
    for editor, model in CASES:
        case = find(source, editor, model)[0]
        requests |= set(case.meta["case_ids"])
        kept = {}
        for name, tensor in case.numbers().items():
            rest = name.split("/", 1)[1]
            wanted = any(re.fullmatch(pattern, rest) for pattern in patterns)
            if wanted and not rest.startswith(LEFT_OUT) and (not rest.startswith("dW/") or name.startswith("req2/")):
                kept[name] = tensor.contiguous()
        (target / "models" / model).mkdir(parents=True, exist_ok=True)
        save_file(kept, target / f"{editor}_{model}.safetensors")
        meta = {key: value for key, value in case.meta.items() if key not in ("tail_of_peer_stdout", "seconds")}
        (target / f"{editor}_{model}.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        for file in MODEL_FILES:
            shutil.copyfile(source / "models" / model / file, target / "models" / model / file)
        moments = load_file(source / f"cov_{model}.safetensors")
        layers = case.meta["hparams"]["layers"]
        named = {f"transformer.h.{layer}.mlp.c_proj" for layer in layers} | {"count"}
        save_file({name: moments[name] for name in named}, target / f"cov_{model}.safetensors")
    found = read_json(source / "requests.json")["requests"]
    kept_requests = {"requests": [request for request in found if request["case_id"] in requests]}
    (target / "requests.json").write_text(json.dumps(kept_requests, indent=1) + "\n", encoding="utf-8")
    for path in target.rglob("*.safetensors"):
        path.chmod(0o644)
    contexts = {"flat": read_json(source / "contexts.json")["flat"]}
    (target / "contexts.json").write_text(json.dumps(contexts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    extract(Path(sys.argv[1]))
