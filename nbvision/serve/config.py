"""What is served, from a YAML file: every field is known and checked, and an error says where it stands."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from nbvision.errors import InputError, MissingExtraError
from nbvision.serve.pipelines import PIPELINES
from nbvision.serve.served import Limits

__all__ = ["Config", "PipelineConfig", "read_config"]

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")


@dataclass(frozen=True)
class PipelineConfig:
    """One pipeline: its kind, the options of that kind, and the limits of its queue."""

    name: str
    kind: str
    options: dict[str, Any]
    limits: Limits

    @property
    def fingerprint(self) -> str:
        """Of what answers depend on beside the models themselves."""
        described = json.dumps([self.kind, self.options], sort_keys=True, default=str)
        return hashlib.sha256(described.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Config:
    """What a service serves and what it takes.

    Attributes
    ----------
    pipelines : dict of str to PipelineConfig
    body_bytes : int
        Of a request; larger ones are refused.
    header_s : float
        Within which a request's header must have come.
    upload_s : float
        And its body.
    concurrency : int
        Requests under way at the same time; further ones are turned away.
    cache_bytes : int
        For results that are kept by the content of their images; 0 keeps none.
    token : str, optional
        What clients must send as ``Authorization: Bearer``; default: nothing.
    drain_s : float
        For what is under way when the service shall end.
    """

    pipelines: dict[str, PipelineConfig]
    body_bytes: int = 64 << 20
    header_s: float = 10.0
    upload_s: float = 30.0
    concurrency: int = 512
    cache_bytes: int = 64 << 20
    token: str | None = field(default=None, repr=False)
    drain_s: float = 30.0


def read_config(path: str | os.PathLike[str]) -> Config:
    """Read a service's file.

    Raises
    ------
    InputError
        For a file that is not there, no YAML, or says something unknown.
    MissingExtraError
        Without the extra ``serve``.
    """
    try:
        import pydantic  # noqa: F401
        import yaml
    except ImportError as error:
        raise MissingExtraError(str(error.name), extra="serve", needed_for="a service's file") from error
    try:
        written = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not read: {error}") from None
    try:
        return _config(written)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _config(written: Any) -> Config:
    given = _mapping(written, "the file")
    known = {each.name: each for each in fields(Config)}
    _refuse_unknown(given, known, "the file")
    pipelines = _mapping(given.pop("pipelines", None), "pipelines")
    if not pipelines:
        raise InputError("pipelines are none; expected a name and a kind of at least one")
    _check(given, get_type_hints(Config), "the file")
    if given.get("token") == "":
        raise InputError("token is empty; expected what clients shall send, or no token at all")
    return Config({name: _pipeline(name, described) for name, described in pipelines.items()}, **given)


def _pipeline(name: Any, described: Any) -> PipelineConfig:
    if not isinstance(name, str) or not _NAME.match(name):
        raise InputError(f"pipeline {name!r}: expected a name of letters, digits, '.', '_' and '-'")
    options = _mapping(described, f"pipeline {name!r}")
    kind = options.pop("kind", None)
    if not isinstance(kind, str) or kind not in PIPELINES:
        raise InputError(f"pipeline {name!r}: kind is {kind!r}; expected one of {sorted(PIPELINES)}")
    limits = {each.name: options.pop(each.name) for each in fields(Limits) if each.name in options}
    _check(limits, get_type_hints(Limits), f"pipeline {name!r}")
    for limit, value in limits.items():
        if value == 0:
            raise InputError(f"pipeline {name!r}: {limit} is 0; expected a positive number")
    known = dict(inspect.signature(PIPELINES[kind]).parameters)
    of_any_kind = {each.name: each for each in fields(Limits)}
    _refuse_unknown(options, known | of_any_kind, f"pipeline {name!r} of kind {kind!r}")
    if "max_batch" in known:
        options["max_batch"] = limits.get("max_batch", Limits.max_batch)
    _check(options, get_type_hints(PIPELINES[kind].__init__), f"pipeline {name!r}")
    missing = [option for option, how in known.items() if how.default is how.empty and option not in options]
    if missing:
        raise InputError(f"pipeline {name!r} of kind {kind!r} lacks {missing}")
    return PipelineConfig(name, kind, options, Limits(**limits))


def _check(given: dict[str, Any], types: dict[str, Any], what: str) -> None:
    """That values have the types that are declared, and numbers are not negative."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    for name, value in given.items():
        try:
            TypeAdapter(types[name], config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            raise InputError(f"{what}: {name} is {value!r}; {error.errors()[0]['msg']}") from None
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise InputError(f"{what}: {name} is {value!r}; expected a finite number of 0 or more")


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        got = "empty" if value is None else f"a {type(value).__name__}"
        raise InputError(f"{what} is {got}; expected names and values")
    return dict(value)


def _refuse_unknown(given: dict[str, Any], known: dict[str, Any], what: str) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise InputError(f"{what} has {unknown}; expected some of {sorted(known)}")
