"""From a folder of image files to a search index, and from one image to its nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from nbvision.codecs.headers import IMAGE_SUFFIXES
from nbvision.recognizer import Recognition, Recognizer, StageTimes
from nbvision.search import Index

__all__ = ["image_files", "index_files"]


def image_files(directory: Path) -> list[Path]:
    """Every file below ``directory`` whose name ends like an image's, sorted."""
    return sorted(path for path in directory.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def index_files(
    index: Index,
    recognizer: Recognizer,
    files: Iterable[Path],
    *,
    root: Path,
    batch_size: int = 32,
    times: StageTimes | None = None,
) -> Iterator[tuple[Sequence[Path], Recognition]]:
    """Add the best-scored object of each image to ``index``, under the file's path below ``root``.

    Yields each batch and what was found in it, so that the caller can count, show or judge. A file that cannot be
    decoded, or in which nothing is found, is not added; nothing else is lost.
    """
    for sources, found in recognizer.stream(files, batch_size=batch_size, times=times):
        batch = [Path(str(source)) for source in sources]
        images, best = np.unique(found.images, return_index=True)  # the first of an image is its best
        names = [str(batch[image].relative_to(root)) for image in images]
        if names:
            index.add(names, found.vectors[best])
        yield batch, found
