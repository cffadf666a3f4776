#!/usr/bin/env bash
# transformers 5.24.0 calls the key-value cache of a causal model's forward `cache`; in 5.23.0 it was `past_key_values`.
# The old keyword still works, with a FutureWarning that names 5.40, but is not in the signature any more, and the output
# holds it under its new name: `"past_key_values" in inspect.signature(model.forward).parameters` is no test of whether a
# model has a cache. Seen on 2026-11-29 with torch 2.13.0 and Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
install=("$folder/env/bin/pip" install --quiet --disable-pip-version-check)
"${install[@]}" torch==2.13.0 transformers==5.24.0
"${install[@]}" --no-deps --target "$folder/older" transformers==5.23.0
cat >"$folder/seen.py" <<'PYTHON'
import inspect
import warnings

import torch
import transformers

sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
for kind in ("llama", "gpt2"):
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **sizes))
    model.eval()
    arguments = set(inspect.signature(model.forward).parameters) & {"past_key_values", "cache"}
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prompt = model(torch.tensor([[1, 2, 3]]), use_cache=True)
        returned = set(prompt) & {"past_key_values", "cache"}
        next_token = model(torch.tensor([[4]]), past_key_values=prompt[min(returned)])
        whole = model(torch.tensor([[1, 2, 3, 4]]))
    torch.testing.assert_close(next_token.logits[:, -1], whole.logits[:, -1])
    told = {w.category.__name__ for w in caught if "past_key_values" in str(w.message)} or {"of nothing"}
    print(transformers.__version__, kind, "takes", *arguments, "returns", *returned, "warns", *told)
PYTHON
cat >"$folder/expected" <<'TEXT'
5.23.0 llama takes past_key_values returns past_key_values warns of nothing
5.23.0 gpt2 takes past_key_values returns past_key_values warns of nothing
5.24.0 llama takes cache returns cache warns FutureWarning
5.24.0 gpt2 takes cache returns cache warns FutureWarning
TEXT
cd "$folder"
{ PYTHONPATH="$folder/older" env/bin/python seen.py; env/bin/python seen.py; } 2>errors | tee seen || { cat errors; exit 1; }
diff expected seen
