"""String ids and their embeddings: add, remove, search, save, load."""

from __future__ import annotations

import operator
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from nbvision.errors import InputError, SearchError
from nbvision.image import to_device
from nbvision.search._faiss import require_faiss
from nbvision.search._locks import ReadWriteLock
from nbvision.search._snapshot import Manifest, read_manifest, read_snapshot, write_snapshot

__all__ = ["Hits", "Index", "Metric"]

Metric = Literal["cosine", "inner_product"]

_NAMED_IN_MESSAGES = 5
# By Cauchy-Schwarz no inner product of two vectors this short leaves the range of float32.
_LONGEST_NORM = float(np.sqrt(np.finfo(np.float32).max)) * 0.99


@dataclass(frozen=True)
class Hits:
    """The nearest entries of Q queries, nearest first.

    Attributes
    ----------
    ids : list of Q lists of str
        k' ids for each query; k' is the smaller of ``k`` and the number of vectors in the index.
    scores : (Q, k') float32 array, on the host
        Cosine similarity (about -1 to 1) or inner product, falling along each row.
    """

    ids: list[list[str]]
    scores: npt.NDArray[np.float32]


class Index:
    """Exact nearest-neighbour search among the embeddings of one model.

    Every vector has a string id of its own, such as a file's path: a product with several photographs has one
    entry for each, and the caller knows which product an id belongs to.

    Safe to share between threads: searches run together, and a change waits for them and has the index alone.

    Parameters
    ----------
    dimension : int
        Length of every vector.
    model : str
        Identity of the model that makes the vectors, such as the SHA-256 of its file.  Vectors of different
        models cannot be compared, so :meth:`load` refuses an index of another model.
    metric : {"cosine", "inner_product"}
        With ``"cosine"`` the index normalises vectors and queries to length 1 by itself.

    Raises
    ------
    InputError
        For an impossible dimension, model or metric.
    MissingExtraError
        If FAISS is not installed.
    """

    def __init__(self, dimension: int, *, model: str, metric: Metric = "cosine") -> None:
        if not isinstance(model, str) or not model:
            raise InputError(
                f"model is {model!r}; expected a non-empty string, such as the SHA-256 of the model's file"
            )
        if metric not in get_args(Metric):
            raise InputError(f"metric is {metric!r}; expected one of {get_args(Metric)}")
        self.dimension = _positive("dimension", dimension)
        self.metric: Metric = metric
        self.model = model
        faiss = require_faiss()
        self._vectors: Any = faiss.IndexIDMap2(faiss.IndexFlatIP(self.dimension))
        # FAISS knows a vector by a number, and happily holds two vectors of one number: none is given twice.
        self._number_of: dict[str, int] = {}
        self._id_of: dict[int, str] = {}
        self._next_number = 0
        self._lock = ReadWriteLock()

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, model: str | None = None) -> Index:
        """The index that :meth:`save` wrote.

        Another process may save to the same directory meanwhile: either index is loaded, whole.

        Parameters
        ----------
        path : path
            The index's directory.
        model : str, optional
            The model whose vectors will be added and searched; an index of another model is refused.

        Raises
        ------
        SearchError
            If the directory holds no index, a damaged one, one of a newer format, or one of another model.
        MissingExtraError
            If FAISS is not installed.
        """
        directory = Path(path)
        manifest = read_manifest(directory)
        while True:
            try:
                return cls._from_snapshot(directory, manifest, model)
            except SearchError:
                # A save that ended just now has removed the files of the manifest read before it.
                latest = read_manifest(directory)
                if latest == manifest:
                    raise
                manifest = latest

    @classmethod
    def _from_snapshot(cls, directory: Path, manifest: Manifest, model: str | None) -> Index:
        if model is not None and model != manifest.model:
            raise SearchError(
                f"{directory}: the index was made by model {manifest.model!r}, expected model {model!r}; "
                f"load it with the model that made it, or embed the images again with this one"
            )
        vectors, ids = read_snapshot(directory, manifest)
        try:
            index = cls(manifest.dimension, model=manifest.model, metric=manifest.metric)  # type: ignore[arg-type]
        except InputError as error:
            raise SearchError(f"{directory}: the manifest is impossible: {error}; build the index again") from error
        index._vectors = vectors
        numbers = index._numbers()
        index._number_of = dict(zip(ids, numbers, strict=True))
        index._id_of = dict(zip(numbers, ids, strict=True))
        index._next_number = max(numbers, default=-1) + 1
        return index

    def __len__(self) -> int:
        """How many vectors the index holds."""
        with self._lock.read():
            return len(self._number_of)

    def __contains__(self, name: object) -> bool:
        """Whether there is a vector of this id."""
        with self._lock.read():
            return name in self._number_of

    def __repr__(self) -> str:
        return f"Index({len(self)} vectors of dimension {self.dimension}, {self.metric}, model {self.model!r})"

    def add(self, ids: Sequence[str], vectors: Any) -> None:
        """Add vectors; an id that is there already gets the new vector in place of its old one.

        Parameters
        ----------
        ids : sequence of N different str
        vectors : (N, dimension) float32 or float16 array
            NumPy, CuPy, torch, on the host or a GPU; copied.

        Raises
        ------
        InputError
            For a wrong shape or dtype, an id given twice, or vectors with NaN, infinity or (for cosine)
            length 0, naming the ids.  The index is unchanged then.
        """
        names = _checked_ids(ids)
        repeated = [name for name, times in Counter(names).items() if times > 1]
        if repeated:
            raise InputError(f"ids given more than once: {_some(repeated)}; expected every id once in a call")
        rows = self._checked_vectors(vectors, names)
        if not names:
            return
        with self._lock.write():
            numbers = np.arange(self._next_number, self._next_number + len(names), dtype=np.int64)
            # The new vectors go in before the old ones go out: if memory ends here, nothing is lost.
            self._vectors.add_with_ids(rows, numbers)
            self._next_number += len(names)
            self._forget(names)
            self._number_of.update(zip(names, numbers.tolist(), strict=True))
            self._id_of.update(zip(numbers.tolist(), names, strict=True))

    def remove(self, ids: Sequence[str]) -> int:
        """Remove the vectors of these ids; ids that are not there are passed over.

        Returns
        -------
        int
            How many vectors went.

        Raises
        ------
        InputError
            If ``ids`` is not a sequence of strings.
        """
        names = _checked_ids(ids)
        with self._lock.write():
            return self._forget(names)

    def search(self, vectors: Any, *, k: int) -> Hits:
        """The ``k`` entries nearest to each query: fewer if the index is smaller, none if it is empty.

        Parameters
        ----------
        vectors : (Q, dimension) float32 or float16 array
            NumPy, CuPy, torch, on the host or a GPU.
        k : int
            At least 1.

        Returns
        -------
        Hits

        Raises
        ------
        InputError
            For a wrong shape, dtype or ``k``, or queries with NaN, infinity or (for cosine) length 0.
        """
        wanted = _positive("k", k)
        queries = self._checked_vectors(vectors, None)
        with self._lock.read():
            found = min(wanted, len(self._number_of))
            if found == 0 or len(queries) == 0:
                return Hits([[] for _ in queries], np.empty((len(queries), found), np.float32))
            scores, numbers = self._vectors.search(queries, found)
            return Hits([[self._id_of[number] for number in row] for row in numbers.tolist()], scores)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to a directory, in place of the index that was there.

        The step from the old index to the new one is atomic: a crash, a full disk or a loss of power at any
        point leaves one of them whole.  Searches go on meanwhile; changes wait.

        Parameters
        ----------
        path : path
            The directory; made if it does not exist.

        Raises
        ------
        SearchError
            If the files cannot be written.
        """
        with self._lock.read():
            write_snapshot(
                Path(path),
                vectors=self._vectors,
                ids=[self._id_of[number] for number in self._numbers()],
                dimension=self.dimension,
                metric=self.metric,
                model=self.model,
            )

    def _numbers(self) -> list[int]:
        """FAISS's numbers in the order of its vectors."""
        numbers: list[int] = require_faiss().vector_to_array(self._vectors.id_map).tolist()
        return numbers

    def _forget(self, names: list[str]) -> int:
        """Drop the vectors of the ids that are there; the caller holds the lock for writing."""
        numbers = [self._number_of.pop(name) for name in dict.fromkeys(names) if name in self._number_of]
        if numbers:  # each removal passes over the whole index
            self._vectors.remove_ids(np.asarray(numbers, np.int64))
        for number in numbers:
            del self._id_of[number]
        return len(numbers)

    def _checked_vectors(self, vectors: Any, names: list[str] | None) -> npt.NDArray[np.float32]:
        """The vectors as FAISS wants them, of length 1 for cosine; ``names`` is None for queries."""
        try:
            array = to_device(vectors, "cpu")
        except (TypeError, ValueError) as error:
            raise InputError(f"vectors is a {type(vectors).__name__} that NumPy cannot read: {error}") from error
        if array.dtype not in (np.float32, np.float16):
            raise InputError(f"vectors has dtype {array.dtype}; expected float32 or float16: convert with astype")
        count = "queries" if names is None else str(len(names))
        if array.ndim != 2 or array.shape[1] != self.dimension:
            raise InputError(
                f"vectors has shape {array.shape}; expected ({count}, {self.dimension}): one row for each "
                f"vector, made by model {self.model!r}"
            )
        if names is not None and len(array) != len(names):
            raise InputError(f"got {len(array)} vectors for {len(names)} ids; expected one vector for each id")
        rows = np.ascontiguousarray(array, np.float32)
        norms = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))  # float64: no overflow, no underflow
        self._refuse_bad(norms, names)
        if self.metric == "cosine":
            rows = (rows / norms[:, None]).astype(np.float32)
        return rows

    def _refuse_bad(self, norms: npt.NDArray[np.float64], names: list[str] | None) -> None:
        if self.metric == "cosine":
            out_of_range, problem = norms == 0, "length 0, which has no direction"
        else:
            out_of_range, problem = norms > _LONGEST_NORM, f"a length over {_LONGEST_NORM:.3g}"
        for bad, found in ((~np.isfinite(norms), "NaN or infinity"), (out_of_range, problem)):
            rows = np.flatnonzero(bad).tolist()
            if rows:
                which = f"queries {_some(rows)}" if names is None else f"ids {_some([names[r] for r in rows])}"
                raise InputError(
                    f"vectors with {found}: {which}; expected finite embeddings: leave these out, and look "
                    f"at their images and at the model's precision"
                )


def _checked_ids(ids: Sequence[str]) -> list[str]:
    if isinstance(ids, (str, bytes)):
        raise InputError(f"ids is the single {type(ids).__name__} {ids!r}; expected a sequence of strings: [{ids!r}]")
    names = list(ids)
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise InputError(f"ids holds {_some(wrong)}; expected strings: convert with str()")
    return [str(name) for name in names]  # NumPy's strings are subclasses that JSON and repr show differently


def _some(values: list[Any]) -> str:
    """A few of the values, and how many more there are."""
    shown = ", ".join(repr(value) for value in values[:_NAMED_IN_MESSAGES])
    more = len(values) - _NAMED_IN_MESSAGES
    return f"{shown} and {more} more" if more > 0 else shown


def _positive(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise InputError(f"{name} is {value!r}; expected an integer of at least 1")
    return number
