"""Real photographs that are on this machine already: those inside scikit-image and scikit-learn."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from PIL import Image

SHIPPED = {
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
    "skimage": (
        "data/astronaut.png",
        "data/chelsea.png",
        "data/coffee.png",
        "data/rocket.jpg",
        "data/motorcycle_left.png",
        "data/camera.png",  # grey
    ),
}


def shipped() -> list[Path]:
    """Files of the installed packages; nothing is imported or downloaded."""
    paths = []
    for package, names in SHIPPED.items():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            paths += [Path(spec.origin).parent / name for name in names]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise FileNotFoundError(
            "neither scikit-image nor scikit-learn is installed, whose photographs the demo takes; "
            "pip install scikit-image scikit-learn, or name your own: make demo IMAGE=file"
        )
    return paths


def find(source: str | None, limit: int) -> tuple[list[Path], int]:
    """At most `limit` image files of a file, a folder, or (None) those shipped; how many are left.

    Raises FileNotFoundError if there are none.
    """
    if source is None:
        paths = shipped()
    elif Path(source).is_dir():
        suffixes = Image.registered_extensions()
        paths = [path for path in sorted(Path(source).iterdir()) if path.suffix.lower() in suffixes]
        if not paths:
            raise FileNotFoundError(f"no image file in the folder {source!r}; name one with images")
    elif Path(source).is_file():
        paths = [Path(source)]
    else:
        raise FileNotFoundError(f"no image file or folder at {source!r}; check IMAGE or --image")
    return paths[:limit], len(paths[limit:])
