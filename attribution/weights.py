"""Files of tensors, held to the roots the log commits to: models, accumulators, factors.

A model's or factors' root is that of ``consensus/parameters.py`` over the safetensors file's own names, dtypes, shapes
and bytes; a window's that of ``consensus/accumulators.py``. What does not have its root is never used.
"""

import hashlib
import importlib
import os
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor, nn

from attribution.cores import each_on_a_core
from consensus.accumulators import (
    MAX_WINDOW_BYTES,
    AccumulatorWindow,
    WindowEntry,
    blob_path,
    decode_window,
    window_path,
)
from consensus.identifiers import Digest
from consensus.parameters import TensorDescriptor, parameter_root
from consensus.predicates.accumulators import Window
from consensus.rejection import ConfigError, Reason, Rejected

ENTRIES_AT_ONCE, ENTRIES_BYTES = 8, 1 << 26
"""So many sources' sums, of at most so many bytes unless a single one has more, are read and met together."""
ROUNDING = 2e-2
"""How far sums stored as bfloat16 may be from their total, relative to their norms together."""
FOREIGN_FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What code of the asker's own, such as a model, raises where it does not fit what it is given."""

R = TypeVar("R")
Summed = tuple[WindowEntry, Mapping[str, Tensor]]
"""A source's entry of a window, and its sums by parameter name (float32)."""


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A safetensors file in memory, and the parameter root over it."""

    path: Path
    tensors: Mapping[str, Tensor]
    root: Digest


@dataclass(frozen=True, slots=True)
class WindowFile:
    """A window of the log, what its file lists, and where its blobs are.

    ``seen`` has the BLAKE3 of every blob that was found to have its SHA-256, by this: reading it again takes less.
    """

    window: Window
    listed: AccumulatorWindow
    directory: Path
    seen: Mapping[bytes, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Missing:
    """A window that cannot be used, and why."""

    window: Window
    why: str


@dataclass(frozen=True, slots=True)
class Search:
    """Which windows are whole and theirs, and which are not."""

    found: tuple[WindowFile, ...]
    missing: tuple[Missing, ...]


def read_tensors(path: Path) -> TensorFile:
    """A whole file.

    Raises:
        Rejected: ``NOT_FOUND``, ``MALFORMED``, or as ``parameter_root``.
    """
    tensors: dict[str, Tensor] = {}
    descriptors = []
    if path.exists() and not path.is_file():
        raise Rejected(Reason.NOT_FOUND, f"{path} is no regular file")
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a reader, not a dict)
                tensor = file.get_tensor(name)
                dtype = file.get_slice(name).get_dtype()
                content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
                tensors[name] = tensor
                descriptors.append(TensorDescriptor(name, dtype, tuple(tensor.shape), blake3(content).digest()))
    except OSError as error:
        raise Rejected(Reason.NOT_FOUND, f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise Rejected(Reason.MALFORMED, f"{path} is no safetensors file: {error}") from error
    return TensorFile(path, tensors, parameter_root(descriptors))


def find_windows(directory: Path, campaign: bytes, windows: tuple[Window, ...]) -> Search:
    """The windows of which everything is in a run's folder: the list, by its root, and every blob, by its SHA-256.

    Raises:
        Rejected: ``NOT_FOUND`` for a missing directory.
    """
    if not directory.is_dir():
        raise Rejected(Reason.NOT_FOUND, f"{directory}: expected the folder of a run's accumulators")
    found, missing = [], []
    for window in windows:
        try:
            file = open_window(directory, campaign, window)
            entries = file.listed.entries
            found_here = each_on_a_core(lambda entry: _digest_of_blob(directory, entry), entries)
            seen = {entry.blob_sha256: digest for entry, digest in zip(entries, found_here, strict=True)}
        except Rejected as error:
            missing.append(Missing(window, str(error)))
        else:
            found.append(replace(file, seen=seen))
    return Search(tuple(found), tuple(missing))


def open_window(directory: Path, campaign: bytes, window: Window) -> WindowFile:
    """What a window's file lists, by its root; its blobs are not looked at.

    Raises:
        Rejected: ``NOT_FOUND``, ``DIGEST_MISMATCH``, as ``decode_window``.
    """
    path = directory / window_path(window.root)
    if path.exists() and not path.is_file():
        raise Rejected(Reason.NOT_FOUND, f"{path}: no regular file")
    try:
        with path.open("rb") as file:
            listed = decode_window(file.read(MAX_WINDOW_BYTES + 1), window.root)
    except OSError as error:
        raise Rejected(Reason.NOT_FOUND, f"{path}: {error.strerror}") from error
    terms = listed.terms
    if (terms.campaign, terms.first_step, terms.last_step) != (campaign, window.first, window.last):
        raise Rejected(
            Reason.DIGEST_MISMATCH,
            f"{path} is of steps {terms.first_step} to {terms.last_step} of campaign {terms.campaign.hex()}",
        )
    return WindowFile(window, listed, directory)


def accumulators_of(file: WindowFile) -> Iterator[Summed]:
    """Each entry of a window with its sums by parameter name (float32), checked as ``map_entries`` does.

    Raises:
        Rejected: as ``map_entries``.
    """
    for together in map_entries(lambda some: some, file):
        yield from together


def map_entries(work: Callable[[Sequence[Summed]], R], file: WindowFile) -> Iterator[R]:
    """What ``work`` makes of a window's entries, a few at a time, in order, on all cores; each blob is checked again.

    The sources' sums must add up to the window's total, up to the rounding of their storage: else somebody left out
    what reached the optimizer.

    Raises:
        Rejected: ``DIGEST_MISMATCH``, ``NOT_FOUND``, ``MALFORMED``; ``COUNTS_NOT_CONSERVED``.
    """
    difference = total_of(file)
    scale = dict.fromkeys(difference, 0.0)
    sizes = {name: tensor.shape for name, tensor in difference.items()}

    def added_and_made(entries: Sequence[WindowEntry]) -> tuple[dict[str, Tensor], dict[str, float], R]:
        added: dict[str, Tensor] = {}
        norms: dict[str, float] = {}
        together = [(entry, _read_sums(file, entry)) for entry in entries]
        for _, sums in together:
            for name, part in sums.items():
                if sizes.get(name) != part.shape:
                    raise Rejected(Reason.COUNTS_NOT_CONSERVED, f"{file.directory}: {name!a} is no part of the total")
                added[name] = added[name].add_(part) if name in added else part.clone()
                norms[name] = norms.get(name, 0.0) + float(part.norm())
        return added, norms, work(together)

    for added, norms, made in each_on_a_core(added_and_made, _few_at_a_time(file.listed.of_sources)):
        for name, part in added.items():
            difference[name].sub_(part)
            scale[name] += norms[name]
        yield made
    for name, left in difference.items():
        if not float(left.norm()) <= ROUNDING * scale[name]:
            raise Rejected(
                Reason.COUNTS_NOT_CONSERVED,
                f"steps {file.window.first} to {file.window.last}: the sources' sums of {name!a} leave "
                f"{float(left.norm()):.3g} of the total unexplained",
            )


def total_of(file: WindowFile) -> dict[str, Tensor]:
    """A window's whole gradient by parameter name (float32).

    Raises:
        Rejected: ``NOT_FOUND``, ``DIGEST_MISMATCH``, ``MALFORMED``.
    """
    return _read_sums(file, file.listed.total)


def _few_at_a_time(entries: Sequence[WindowEntry]) -> Iterator[list[WindowEntry]]:
    few: list[WindowEntry] = []
    for entry in entries:
        size_bytes = sum(held.size_bytes for held in (*few, entry))
        if few and (len(few) == ENTRIES_AT_ONCE or size_bytes > ENTRIES_BYTES):
            yield few
            few = []
        few.append(entry)
    if few:
        yield few


def _read_sums(file: WindowFile, entry: WindowEntry) -> dict[str, Tensor]:
    content = _committed_bytes(file.directory, entry, file.seen)
    return {name: tensor.float() for name, tensor in _tensors_in(content, _blob(file.directory, entry)).items()}


def _digest_of_blob(directory: Path, entry: WindowEntry) -> bytes:
    """BLAKE3 of a blob that is the committed one."""
    content = _committed_bytes(directory, entry, {})
    _tensors_in(content, _blob(directory, entry))
    return blake3(content).digest()


def _committed_bytes(directory: Path, entry: WindowEntry, seen: Mapping[bytes, bytes]) -> bytes:
    """A blob that a window's list commits to, by its SHA-256 or by the BLAKE3 of what was seen to have that.

    Raises:
        Rejected: ``NOT_FOUND``, ``DIGEST_MISMATCH``.
    """
    path = _blob(directory, entry)
    try:
        found_bytes = path.stat().st_size
        if found_bytes != entry.size_bytes:
            raise Rejected(Reason.DIGEST_MISMATCH, f"{path} has {found_bytes} bytes, committed are {entry.size_bytes}")
        content = path.read_bytes()
    except OSError as error:
        raise Rejected(Reason.NOT_FOUND, f"{path}: {error.strerror}") from error
    if entry.blob_sha256 in seen and blake3(content).digest() == seen[entry.blob_sha256]:
        return content
    digest = hashlib.sha256(content).digest()
    if digest != entry.blob_sha256:
        raise Rejected(Reason.DIGEST_MISMATCH, f"{path} has SHA-256 {digest.hex()}")
    return content


def _blob(directory: Path, entry: WindowEntry) -> Path:
    return directory / blob_path(entry.blob_sha256)


def _tensors_in(content: bytes, path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load(content)
    except SafetensorError as error:
        raise Rejected(Reason.MALFORMED, f"{path} is no safetensors file: {error}") from error
    return tensors


def load_model(
    architecture: str, path: Path, expected_root: bytes, what: str, adapter: Path | None = None
) -> nn.Module:
    """A model with the weights of ``path``, if they are the ones the log names.

    Args:
        architecture, adapter: as ``build_model``; the file fills the module's ``state_dict``.

    Raises:
        ConfigError: there is no such function, or the file does not fit what it returns.
        Rejected: ``DIGEST_MISMATCH`` for other weights.
    """
    held = read_tensors(path)
    if held.root != expected_root:
        raise Rejected(
            Reason.DIGEST_MISMATCH, f"{path}: the {what} has root {expected_root.hex()}, the file {held.root.hex()}"
        )
    model = build_model(architecture, adapter)
    try:
        missing, unexpected = model.load_state_dict(dict(held.tensors), strict=False)
    except RuntimeError as error:
        raise ConfigError(f"{path}: expected the weights of {architecture}, found: {error}") from error
    tied = {name for name in missing if any(_same(model, name, other) for other in held.tensors)}
    if unexpected or set(missing) - tied:
        raise ConfigError(
            f"{path}: expected the weights of {architecture}, missing {sorted(set(missing) - tied)}, "
            f"unexpected {sorted(unexpected)}"
        )
    return model.eval()


def build_model(architecture: str, adapter: Path | None = None) -> nn.Module:
    """What ``module:function`` returns; or the causal language model that a folder's ``config.json`` describes.

    ``adapter``: a folder with the ``adapter_config.json`` of the adapter that PEFT puts around it.

    Raises:
        ConfigError: there is no such function or folder, or what comes of it is no torch module.
    """
    model = _of_transformers(Path(architecture)) if Path(architecture).is_dir() else _of_function(architecture)
    return model if adapter is None else _adapted(model, adapter)


def _of_function(architecture: str) -> nn.Module:
    module_name, _, function_name = architecture.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, SyntaxError, TypeError, ValueError) as error:
        raise ConfigError(
            f"--model {architecture}: expected module:function, here or where Python looks, or a folder, found: {error}"
        ) from error
    try:
        model = function()
    except FOREIGN_FAULTS as error:
        raise ConfigError(
            f"--model {architecture}: expected a function that returns a model, found {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"--model {architecture}: expected a function that returns a torch module")
    return model


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """A linear's weight. ``turned``: it is ``[I, O]``, as in the linear of GPT-2's makers, not ``[O, I]``."""

    module: nn.Module
    turned: bool

    @property
    def weight(self) -> Tensor:
        """The parameter."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight


def linear_weights(model: nn.Module) -> dict[str, LinearWeight]:
    """Weights of linears by name, in the model's order; a shared one once, none that an embedding shares or is frozen.

    These are the weights that accumulators can be of (``trainer_client.routed_modules.observed_parameters``).

    Raises:
        Rejected: ``BAD_FIELD`` for a model with none.
    """
    found: dict[str, LinearWeight] = {}
    seen = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    transformers_home = sys.modules.get("transformers.pytorch_utils")
    for name, module in model.named_modules():
        turned = transformers_home is not None and isinstance(module, transformers_home.Conv1D)
        if not (turned or isinstance(module, nn.Linear)):
            continue
        held = LinearWeight(module, turned)
        if id(held.weight) not in seen and held.weight.requires_grad:
            seen.add(id(held.weight))
            found[f"{name}.weight" if name else "weight"] = held
    if not found:
        raise Rejected(Reason.BAD_FIELD, "no weight of a linear was tuned: there is nothing a trace can speak of")
    return found


def freeze_others(model: nn.Module, trainable: Container[str]) -> None:
    """Marks every parameter frozen that is not among ``trainable``: no answer can speak of it."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)


def _adapted(model: nn.Module, folder: Path) -> nn.Module:
    try:
        from peft import PeftConfig, get_peft_model  # noqa: PLC0415 (only adapters need it)
    except ImportError as error:
        raise ConfigError(f"--adapter {folder}: needs peft: pip install 'countersign[hf]'") from error
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(f"--adapter {folder}: expected a folder with adapter_config.json")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = False
        adapted: nn.Module = get_peft_model(model, config)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"--adapter {folder}: no adapter for this model: {error}") from error
    return adapted


def _of_transformers(folder: Path) -> nn.Module:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415 (only its models need it)
    except ImportError as error:
        raise ConfigError(f"--model {folder}: needs transformers: pip install 'countersign[hf]'") from error
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        model: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--model {folder}: expected the config.json of a language model, found: {error}") from error
    return model.float()


def _same(model: nn.Module, name: str, other: str) -> bool:
    state = model.state_dict(keep_vars=True)
    return other in state and name in state and state[name] is state[other]
