"""Checkpoints: finding them locally or on the Hugging Face hub, reading and writing their files."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIG = "config.json"
SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
# In order of preference. An index names the files that a large checkpoint was split into.
WEIGHTS = (SAFETENSORS, f"{SAFETENSORS}.index.json", PICKLE, f"{PICKLE}.index.json")
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".tar", ".ckpt", ".json")


def find(source: str | os.PathLike[str], filenames: Sequence[str], **hub: Any) -> Path:
    """The first of `filenames` that a folder or a hub repository has.

    Args:
        source: a folder, or a repository's name such as "sail/poolformer_s12".
        hub: options of huggingface_hub.hf_hub_download: revision, cache_dir, local_files_only,
            token, …

    Raises:
        FileNotFoundError: no such folder or repository, none of the files in it, or the hub is out
            of reach and its cache does not have them.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        for filename in filenames:
            if (folder / filename).is_file():
                return folder / filename
        has = ", ".join(sorted(entry.name for entry in folder.iterdir())[:20]) or "nothing"
        raise FileNotFoundError(
            f"The folder {folder} has no {' or '.join(filenames)}; it has: {has}. Needed is a "
            "folder that save_pretrained wrote. A weights file alone can be loaded by its own "
            "path."
        )
    name = os.fspath(source)
    if folder.is_absolute() or name.startswith(("~", ".")) or name.endswith(_SUFFIXES):
        raise FileNotFoundError(f"There is no file or folder {name}; check the path.")
    return _download(name, filenames, hub)


def _download(name: str, filenames: Sequence[str], hub: Mapping[str, Any]) -> Path:
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError as error:
        raise ImportError(
            f"There is no folder {name}, and looking on the Hugging Face hub needs "
            "huggingface_hub: pip install huggingface_hub"
        ) from error
    reasons: list[Exception] = []
    for filename in filenames:
        try:
            return Path(hf_hub_download(name, filename, **hub))
        except errors.EntryNotFoundError as error:  # the file is absent, or the hub is out of reach
            reasons.append(error)
        except errors.RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"{name!r} is neither a local folder nor a repository on the Hugging Face hub that "
                "can be read; check the name, or pass token= for a private one."
            ) from error
        except errors.HFValidationError as error:
            raise FileNotFoundError(
                f"{name!r} is neither a local folder nor a name that a hub repository can have "
                f"(owner/name): {_first_line(error)}"
            ) from error
        except OSError as error:  # every other failure of the hub, such as an unknown revision
            raise FileNotFoundError(
                f"{filename} of {name!r} cannot be had from the Hugging Face hub: "
                f"{_first_line(error)}"
            ) from error
    if any(isinstance(reason, errors.LocalEntryNotFoundError) for reason in reasons):
        raise FileNotFoundError(
            f"There is no folder {name!r}, the Hugging Face hub is out of reach (offline or "
            f"local_files_only), and its cache does not have {' or '.join(filenames)} of it. "
            "Download it once while online, or pass the path of a local folder or file."
        ) from reasons[-1]
    raise FileNotFoundError(
        f"The hub repository {name!r} has no {' or '.join(filenames)}."
    ) from reasons[-1]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: the file holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON (corrupt or truncated?): {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; needed is an object.")
    return content


def read_weights(source: str | os.PathLike[str], **hub: Any) -> dict[str, Tensor]:
    """All tensors of a weights file, a folder or a hub repository, also if split into files.

    Raises:
        FileNotFoundError: as `find`, or a file that the index names is missing.
        ValueError: a file is corrupt, truncated or holds something else than tensors.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        path = find(source, WEIGHTS, **hub)
        if path.suffix == ".json":
            return _read_shards(source, path, hub)
    return read_state_dict(path)


def _read_shards(
    source: str | os.PathLike[str], index: Path, hub: Mapping[str, Any]
) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map that says which file holds which parameter.")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{index} names the file {shard!r}; needed are names without folders.")
        tensors |= read_state_dict(find(source, [shard], **hub))
    if absent := sorted(weight_map.keys() - tensors.keys()):
        raise ValueError(f"The files that {index} names do not hold {', '.join(absent)}.")
    return tensors


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of one file: safetensors by its suffix, else torch.load with weights_only=True.

    A state dict within a training checkpoint is found under "state_dict" or "model"; the "module."
    that DataParallel puts before every name is taken off.

    Raises:
        ValueError: the file is corrupt, truncated or holds something else than tensors.
    """
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise ValueError(
                f"{path} is a Git LFS pointer, not the weights themselves: run `git lfs pull` in "
                "its folder, or download it from the hub."
            )
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    for nested in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(nested), Mapping):
            state = state[nested]
    if not isinstance(state, Mapping) or not state:
        what = "an empty dict" if isinstance(state, Mapping) else f"a {type(state).__name__}"
        raise ValueError(f"{path} holds {what}; needed is a state dict: names with their tensors.")
    if strangers := [str(k) for k, v in state.items() if not isinstance(v, Tensor)]:
        raise ValueError(
            f"{path} holds entries that are no tensors: {', '.join(strangers)}; needed is a state "
            "dict. Save model.state_dict() alone."
        )
    prefix = "module." if all(key.startswith("module.") for key in state) else ""
    return {key.removeprefix(prefix): tensor for key, tensor in state.items()}


def _read_safetensors(path: Path) -> Any:
    safetensors_torch = _safetensors()
    try:
        return safetensors_torch.load_file(path)
    except Exception as error:  # safetensors has its own exception, besides those of Python
        raise ValueError(
            f"{path} cannot be read as safetensors; it is corrupt or truncated "
            f"({_first_line(error)}). Download or save it again."
        ) from error


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm keeps its options so
            return torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # zip, pickle, EOF and runtime errors, depending on where a file ends
        raise ValueError(
            f"{path} cannot be read by torch.load(weights_only=True): it is corrupt, truncated or "
            f"holds Python objects besides tensors ({_first_line(error)}). Download it again, or, "
            "if you trust it, load it yourself and save its state dict alone."
        ) from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "Reading and writing .safetensors needs safetensors: pip install safetensors. Or use "
            f"{PICKLE}: save_pretrained(…, safe_serialization=False)."
        ) from error
    return safetensors.torch


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in its place, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as Hugging Face does: indented by 2, keys sorted."""
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_weights(folder: Path, state: Mapping[str, Tensor], safe_serialization: bool) -> Path:
    """Write model.safetensors, or pytorch_model.bin, and return its path.

    Raises:
        FileExistsError: the folder holds weights that loading would take instead of the new ones.
    """
    filename = SAFETENSORS if safe_serialization else PICKLE
    for other in WEIGHTS[: WEIGHTS.index(filename)]:
        if (folder / other).exists():
            raise FileExistsError(
                f"{folder} holds {other}, which would be loaded instead of {filename}; remove it "
                "first, or write to another folder."
            )
    dense = {key: tensor.detach().contiguous() for key, tensor in state.items()}
    if safe_serialization:
        save_file = _safetensors().save_file
        write_atomically(
            folder / filename, lambda file: save_file(dense, file, metadata={"format": "pt"})
        )
    else:
        write_atomically(folder / filename, lambda file: torch.save(dense, file))
    return folder / filename
