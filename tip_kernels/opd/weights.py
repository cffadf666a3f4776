"""What the files of a checkpoint say before any weight is read: safetensors' headers beside config.json's sizes.

A config may ask for any size, and a weight map name any file. So both are compared with what the folder holds first,
and the model that the config describes is built where tensors have a shape and no memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tip_kernels.inspect.objects import read_object
from tip_kernels.inspect.usage import UsageError

OWN = {"local_files_only": True, "trust_remote_code": False}  # no code of the folder's, and no question
WEIGHTS = "model.safetensors"
JSON = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")  # a broken one would be left out
HUB = re.compile(r"[\w.-]+/[\w.-]+")  # what a hub calls a model
COUNTED = re.compile(r"(n|num)_(\w+_)?(layers?|experts|labels|blocks)")  # of which each has a weight, or a row of one


class Entry(NamedTuple):
    """A tensor by its header."""

    shape: tuple[int, ...]
    dtype: str  # F32, BF16, I8, ...


Entries = dict[str, Entry]


def check_folder(argument: str, folder: Path) -> None:
    """UsageError where there is no folder with the config of a whole model."""
    if not folder.is_dir():
        name = str(folder)
        hub = (
            f"; of a model on a hub, download it first: hf download {name} --local-dir FOLDER"
            if HUB.fullmatch(name)
            else ""
        )
        raise UsageError(
            f"argument {argument}: expected the folder of a checkpoint, got {name!r}, which is not there{hub}"
        )
    if not (folder / "config.json").is_file():
        raise UsageError(f"argument {argument}: expected a config.json in {folder}, got a folder without one")
    if (folder / "adapter_config.json").is_file():
        raise UsageError(f"argument {argument}: expected a whole model in {folder}, got an adapter: merge it first")


def check(argument: str, folder: Path) -> None:
    """UsageError where the folder is no whole checkpoint of the model that its config.json describes."""
    check_folder(argument, folder)
    config = read_object(folder / "config.json", argument)
    for name in JSON:
        if (folder / name).is_file():
            read_object(folder / name, argument)
    entries = _entries(argument, folder, str(config.get("transformers_weights") or WEIGHTS))
    _check_counts(argument, folder, config, entries)
    if not config.get("quantization_config"):
        _compare(argument, folder, _described(folder), entries)


def _entries(argument: str, folder: Path, name: str) -> Entries:
    """Every tensor of the folder's weight files."""
    entries: Entries = {}
    for path, names in _files(argument, folder, name).items():
        with safe_open(path, "pt") as file:  # which compares the header with the file's length
            there = file.keys()
            if missing := sorted(set(names) - set(there)):
                raise UsageError(
                    f"argument {argument}: expected {missing[0]} in {path}, as the weight map says, got none"
                )
            parts = {name: file.get_slice(name) for name in names or there}
            entries |= {name: Entry(tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    return entries


def _files(argument: str, folder: Path, name: str) -> Mapping[Path, Iterable[str]]:
    """The folder's weight files, each with the names that a weight map looks for there; none: all."""
    index = folder / (name if name.endswith(".index.json") else f"{name}.index.json")
    if not index.is_file() or (not name.endswith(".index.json") and (folder / name).is_file()):
        return {_inside(argument, folder, name): ()}
    places = read_object(index, argument).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise UsageError(f"argument {argument}: expected a weight_map of file names in {index}, got another object")
    files: dict[Path, list[str]] = {}
    for tensor, place in places.items():
        files.setdefault(_inside(argument, folder, place), []).append(tensor)
    return files


def _inside(argument: str, folder: Path, name: str) -> Path:
    """A safetensors file of the folder; UsageError of one that is elsewhere."""
    paths = (PurePosixPath(name), PureWindowsPath(name))
    if any(path.is_absolute() or path.drive or path.root or ".." in path.parts for path in paths):
        raise UsageError(f"argument {argument}: expected weight files within {folder}, got {name!r}")
    if not name.endswith(".safetensors") or not (folder / name).is_file():
        raise UsageError(
            f"argument {argument}: expected a causal language model in {folder}, got no weights in safetensors: {name}"
        )
    return folder / name


def _check_counts(argument: str, folder: Path, config: dict, entries: Entries) -> None:
    """There are no more layers than tensors and no more experts than the largest tensor has rows: lists would grow."""
    most = max([len(entries), *(max(entry.shape, default=0) for entry in entries.values())])
    for name, value in config.items():
        if isinstance(value, dict):
            _check_counts(argument, folder, value, entries)
        elif COUNTED.fullmatch(name) and isinstance(value, int) and value > most:
            raise UsageError(f"argument {argument}: expected {name} that the weights in {folder} have, got {value}")


def _described(folder: Path) -> nn.Module:
    """The model of a folder's config.json, without memory."""
    config = AutoConfig.from_pretrained(folder, **OWN)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _compare(argument: str, folder: Path, model: nn.Module, entries: Entries) -> None:
    """Every weight of the model has its shape in the file, or, under another name there, as many elements."""
    own = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    for name in sorted(own.keys() & entries.keys()):  # the same line each time
        shape, dtype = entries[name]
        if shape != own[name]:
            raise UsageError(
                f"argument {argument}: expected {name} of shape {own[name]}, as config.json in {folder} says,"
                f" got {shape}"
            )
        if not dtype.startswith(("F", "BF")):
            raise UsageError(f"argument {argument}: expected {name} in {folder} as floating-point numbers, got {dtype}")
    lacking = {name: math.prod(shape) for name, shape in own.items() if name not in entries}
    if sum(lacking.values()) > sum(math.prod(entry.shape) for name, entry in entries.items() if name not in own):
        first = next(iter(lacking))
        raise UsageError(f"argument {argument}: expected every weight in {folder}, got none for {first} {own[first]}")


def check_read(argument: str, folder: Path, model: nn.Module, loading: dict) -> None:
    """UsageError where weights that were read are none, too many for the config, or no numbers."""
    if missing := sorted(loading["missing_keys"]):
        raise UsageError(f"argument {argument}: expected every weight in {folder}, got none for {missing[0]}")
    of_any_layer = lambda name: re.sub(r"\d+", "#", name)  # noqa: E731
    known = {of_any_layer(name) for name in model.state_dict()}
    if unread := sorted(name for name in loading["unexpected_keys"] if of_any_layer(name) in known):
        raise UsageError(
            f"argument {argument}: expected no more layers than config.json in {folder} says, got {unread[0]}"
        )
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UsageError(f"argument {argument}: expected finite weights in {folder}, got NaN or infinity in {name}")
