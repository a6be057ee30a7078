"""Which weights the demo runs: a checkpoint, the hub's release, or seeded ones."""

from __future__ import annotations

import contextlib
import threading
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from poolformer_kernels.models.poolformer.checkpoints import CONFIG, WEIGHTS, find
from poolformer_kernels.models.poolformer.image_processing import CONFIG_NAME
from poolformer_kernels.models.poolformer.variants import hub_name, variant_name

RELEASE = "sail/poolformer_s12"
REACH_S = 4.0


@dataclass(frozen=True)
class Checkpoint:
    """source: a local file or folder, None for seeded weights; label: its short name."""

    source: str | None
    label: str
    description: str

    @property
    def trained(self) -> bool:
        return self.source is not None

    @property
    def has_processor(self) -> bool:
        return self.source is not None and (Path(self.source) / CONFIG_NAME).is_file()


def choose(named: str | None, variant: str = "s12") -> Checkpoint:
    """The checkpoint of that path or hub name, or the release if it is cached or within reach.

    Raises FileNotFoundError or ValueError for a named checkpoint that cannot be had.
    """
    if named is not None:
        label = variant_name(named) or Path(named).name
        return Checkpoint(local_copy(named), label, f"the checkpoint {named}")
    with contextlib.suppress(OSError, ImportError):
        return _release(local_files_only=True)
    if (failure := why_unreachable()) is None:
        try:
            return _release(local_files_only=False)
        except (OSError, ImportError) as error:
            failure = str(error)
    return Checkpoint(
        None,
        variant,
        f"seeded weights with layer scales of trained size, because the release {RELEASE} cannot "
        f"be had: the hub's cache does not have it, and {failure}",
    )


def _release(local_files_only: bool) -> Checkpoint:
    folder = local_copy(RELEASE, local_files_only)
    return Checkpoint(folder, "s12", f"the hub's release {RELEASE}")


def local_copy(name: str, local_files_only: bool = False) -> str:
    """The file or folder `name`, or the folder to which the hub's repository was downloaded."""
    if Path(name).exists():
        return name
    source = hub_name(name)
    find(source, [CONFIG], local_files_only=local_files_only)
    folder = find(source, WEIGHTS, local_files_only=local_files_only).parent
    with contextlib.suppress(FileNotFoundError):  # not every repository has one
        find(source, [CONFIG_NAME], local_files_only=local_files_only)
    return str(folder)


def why_unreachable(timeout_s: float = REACH_S) -> str | None:
    """None if the hub answers within `timeout_s`, else the reason. Name lookup counts too."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return "huggingface_hub is not installed"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    address = f"{constants.ENDPOINT}/{RELEASE}/resolve/main/{CONFIG}"
    found: list[str | None] = [f"{constants.ENDPOINT} did not answer within {timeout_s:g} s"]

    def ask() -> None:
        try:
            request = urllib.request.Request(address, method="HEAD")
            with urllib.request.urlopen(request, timeout=timeout_s):
                found.append(None)
        except (OSError, ValueError) as error:  # URLError is an OSError
            found.append(f"{constants.ENDPOINT} cannot be reached ({error})")

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(timeout_s)
    return found[-1]
