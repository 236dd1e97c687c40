"""Makes ``tests/golden/data`` out of ../shared/golden: ``python -m tests.golden.extract ../shared/golden``.

The extract is a folder of the same form, small enough to commit: the tiny model as it is, the second moments of the
edited layers, and of each case all that is compared but for the larger tensors that follow from others (ΔW is kept for
one request or batch a case, the logits for the edited prompt, AlphaEdit's P and M not at all). Of a batch the numbers
of its first three requests are kept, its tokens, positions and counts of all.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.golden.cases import find, read_json
from tests.golden.compare import QUANTITIES, split

DATA = Path(__file__).parent / "data"
MODEL = "gpt2-tiny"
CASES = ("ROME", "TOP", "RETS", "MEMIT", "PMET", "AlphaEdit", "JEEP", "FT-L", "FT-U", "FT-WD")
CASES += ("EAC-ROME", "EAC-MEMIT")
LEFT_OUT = r"logits_pre/.*|logits_post/(paraphrase|neighborhood|relation_specificity)|P|cache_c_after_b\d+|.*/resid"
UPDATES = r"req2|b2|"
"""Of what ΔW is kept: a request, a batch of a sequence, the batch."""
REQUESTS = r"((b\d/)?req([0-2]|8|9|10))?|b\d"
MODEL_FILES = ("config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")


def extract(source: Path, target: Path = DATA) -> None:
    """Write the extract."""
    shutil.rmtree(target, ignore_errors=True)
    patterns = [*QUANTITIES.values(), r"(stage\d/)?(input_ids|attention_mask|rewriting_targets|target_ids|important)"]
    requests, layers = set(), set()
    for editor in CASES:
        case = find(source, editor, MODEL)[0]
        requests |= set(case.meta["case_ids"])
        kept = {}
        for name, tensor in case.numbers().items():
            request, rest = split(name)
            wanted = any(re.fullmatch(pattern, rest) for pattern in patterns) and not re.fullmatch(LEFT_OUT, rest)
            if wanted and re.fullmatch(UPDATES if rest.startswith("dW/") else REQUESTS, request):
                kept[name] = tensor.contiguous()
        (target / "models" / MODEL).mkdir(parents=True, exist_ok=True)
        save_file(kept, target / f"{editor}_{MODEL}.safetensors")
        meta = {key: value for key, value in case.meta.items() if key not in ("tail_of_peer_stdout", "seconds")}
        (target / f"{editor}_{MODEL}.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        layers |= {layer for key, found in meta["hparams"].items() if re.match("layers", key) for layer in found}
    for file in MODEL_FILES:
        shutil.copyfile(source / "models" / MODEL / file, target / "models" / MODEL / file)
    moments = load_file(source / f"cov_{MODEL}.safetensors")
    named = {f"transformer.h.{layer}.mlp.c_proj" for layer in layers} | {"count"}
    save_file({name: moments[name] for name in named}, target / f"cov_{MODEL}.safetensors")
    found = read_json(source / "requests.json")
    for key, of_key in found.items():
        found[key] = [request for request in of_key if request["case_id"] in requests]
    (target / "requests.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for path in target.rglob("*.safetensors"):
        path.chmod(0o644)
    shutil.copyfile(source / "rets_knowns.json", target / "rets_knowns.json")
    contexts = read_json(source / "contexts.json")
    (target / "contexts.json").write_text(json.dumps(contexts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    extract(Path(sys.argv[1]))
