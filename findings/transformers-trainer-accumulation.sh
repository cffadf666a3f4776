#!/usr/bin/env bash
# transformers.Trainer up to 5.5.3 hands gradient_accumulation_steps to accelerate, which divides the loss by it once more
# where the loss is an average already: a `compute_loss_func` that divides by num_items_in_batch, as it is asked to, and
# a model whose forward takes no loss keywords. Four micro-batches of one row then move the weight a quarter as far as one
# batch of the same four rows; nothing is said. 5.5.4 ("GAS=1 in Accelerate") moves it as far. Seen on 2026-11-29 with
# torch 2.13.0, accelerate 1.15.0 and Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
install=("$folder/env/bin/pip" install --quiet --disable-pip-version-check)
"${install[@]}" torch==2.13.0 transformers==5.5.3 accelerate==1.15.0
"${install[@]}" --no-deps --target "$folder/newer" transformers==5.5.4
cat >"$folder/seen.py" <<'PYTHON'
import torch
import transformers
from transformers import Trainer, TrainingArguments

ROWS = [{"x": torch.tensor([4.0]), "labels": torch.tensor([1])}] * 4


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, labels=None):
        return {"loss": (self.weight * x).mean(), "logits": self.weight * x}


def mean_over_labels(outputs, labels, num_items_in_batch):
    return outputs["logits"].sum() / num_items_in_batch


def moved(rows, micro_batches, **options):
    """How far one step of SGD at a rate of 1 moves the weight: the gradient of the mean over four rows is 4."""
    model = Model()
    settings = TrainingArguments(
        "run", per_device_train_batch_size=rows, gradient_accumulation_steps=micro_batches, max_steps=1, optim="sgd",
        learning_rate=1.0, max_grad_norm=0.0, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, settings, train_dataset=ROWS, **options).train()
    return -model.weight.item()


for name, options in (("model", {}), ("compute_loss_func", {"compute_loss_func": mean_over_labels})):
    steps = moved(4, 1, **options), moved(1, 4, **options)
    print(f"seen: {transformers.__version__}, loss of the {name}: 4 rows x 1 {steps[0]}, 1 row x 4 {steps[1]}")
PYTHON
cat >"$folder/expected" <<'TEXT'
seen: 5.5.3, loss of the model: 4 rows x 1 4.0, 1 row x 4 1.0
seen: 5.5.3, loss of the compute_loss_func: 4 rows x 1 4.0, 1 row x 4 1.0
seen: 5.5.4, loss of the model: 4 rows x 1 4.0, 1 row x 4 4.0
seen: 5.5.4, loss of the compute_loss_func: 4 rows x 1 4.0, 1 row x 4 4.0
TEXT
cd "$folder"
{ env/bin/python seen.py; PYTHONPATH="$folder/newer" env/bin/python seen.py; } >output 2>errors || { cat errors; exit 1; }
grep '^seen: ' output | tee seen
diff expected seen
