"""Whether the version that training goes on from fits the model of the settings: said early, and what to type where it does not.

Its manifest names the settings that it was trained with, and the heads of its
files the shapes of its weights; neither needs TensorFlow. What the settings
alone decide is refused by `require_same_model` before anything starts; what
only a built model knows, such as the weights of a tower of the user's own, by
`require_fit` before its program is lowered.
"""

from __future__ import annotations

import ast
import json
import shlex
from collections.abc import Collection, Mapping, Sequence

from state import layout
from state.config.sections import Model
from state.config.settings import Settings
from state.errors import ModelMismatch, RegistryError
from state.registry.manifest import Manifest
from state.registry.registry import SERVING, Registry

HEAD_BYTES = 8  # of a safetensors file: the length of its JSON head, little endian
SHOWN = 3
NAMED = ("ranker", "tower", "dim", "hidden", "options")
"""Settings of `[model]` that may change the weights of a version."""

FORMER_TOWERS = ("trainer.network:build", "trainer.model.network:build")
"""What earlier releases called the default tower; settings and versions may still name it so."""

Shapes = Mapping[str, tuple[int, ...]]


def version_to_go_on_from(registry: Registry) -> Manifest | None:
    """The newest version of control's epoch, else the one that the epoch starts from; None where none can be read.

    A damaged one is nothing to compare with: whoever loads versions sets it aside.
    """
    try:
        control = registry.control()
        if control is None:
            return None
        newest = registry.newest(control.epoch)
        found = control.base if newest is None else newest
        return None if found is None else registry.manifest(found)
    except RegistryError:
        return None


def require_same_model(settings: Settings) -> None:
    """Refuses settings with which the version at hand cannot be loaded, as far as they alone tell.

    Where nothing was trained yet, or the registry cannot be read, others will say so.

    Raises:
        ModelMismatch: The rows' or the layers' widths differ.
    """
    if not (settings.registry_dir / layout.VERSIONS).is_dir():
        return
    version = version_to_go_on_from(Registry(settings.registry_dir))
    if version is None:
        return
    differing, own, default = _differing(version, settings.model), settings.model, Model()
    if own.ranker != default.ranker or "ranker" in differing:
        return
    # A tower of the user's own need not ask for the layers.
    decisive = ["dim"] if own.tower != default.tower or "tower" in differing else ["dim", "hidden"]
    if wrong := [name for name in decisive if name in differing]:
        raise mismatch(version, settings, [f"model.{name} {differing[name]}" for name in wrong])


def require_fit(
    registry: Registry, settings: Settings, dense: Shapes, widths: Mapping[str, int], optional: Collection[str]
) -> None:
    """Refuses a built model whose weights the version at hand does not have.

    Args:
        registry: With the trainer's lock held.
        settings: All settings.
        dense: The shape of each dense weight.
        widths: Table -> width of its rows.
        optional: Tables that a version may lack, or have in another form.

    Raises:
        ModelMismatch: A weight or a table is missing on one side, or has another shape.
    """
    version = version_to_go_on_from(registry)
    if version is None or (shapes := shapes_of(registry, version)) is None:
        return
    wanted = {f"dense.{name}": shape for name, shape in dense.items()}
    wanted |= {f"{table}.rows": (width,) for table, width in widths.items()}
    wrong = [
        f"{name.removeprefix('dense.')} {_shown(shape)}, {'none' if found is None else _shown(found)} in the version"
        for name, shape in wanted.items()
        if (found := _last(shapes.get(name), len(shape))) != shape
    ]
    theirs = {name.removesuffix(".rows") for name in shapes if name.endswith(".rows")}
    wrong += [f"{table}.rows none, but in the version" for table in sorted(theirs - {*widths, *optional})]
    if wrong and _undamaged(registry, version):
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        differing = [f"model.{name} {text}" for name, text in _differing(version, settings.model).items()]
        raise mismatch(version, settings, [*differing, f"weights: {'; '.join(wrong[:SHOWN])}{more}"])


def _undamaged(registry: Registry, version: Manifest) -> bool:
    """Whether the shapes were read from the file that was written."""
    try:
        registry.read(version, SERVING)
    except RegistryError:
        return False
    return True


def shapes_of(registry: Registry, version: Manifest) -> Shapes | None:
    """The shapes of what serving is given of a version, out of the head of its file; None where it cannot be read."""
    path = registry.folder(version.kind, version.version) / SERVING
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(HEAD_BYTES), "little")
            head = json.loads(file.read(min(length, path.stat().st_size)))
        return {name: tuple(one["shape"]) for name, one in head.items() if name != "__metadata__"}
    # Whoever loads the version says what is wrong with it.
    except (OSError, ValueError, KeyError, TypeError):
        return None


def mismatch(version: Manifest, settings: Settings, differences: Sequence[str]) -> ModelMismatch:
    """The refusal, with what to type."""
    back = [
        f"--model.{name} {shlex.quote(_as_flag(version.environment[f'model.{name}']))}"
        for name in _differing(version, settings.model)
    ]
    registry, rows = settings.registry_dir, settings.serving_dir / layout.ROWS
    put_back = f"put the settings back ({' '.join(back)})" if back else "put the model's code back"
    return ModelMismatch(
        f"version {version.version} in {registry} was trained with another model: {', '.join(differences)}",
        f"{put_back}; or learn anew from the training log: stop everything, type `mv {registry} {registry}.before; "
        f"rm -r {rows}`, start again",
    )


def _differing(version: Manifest, model: Model) -> dict[str, str]:
    """Name -> how the setting differs from what the version was trained with."""
    then = {name: version.environment.get(f"model.{name}") for name in NAMED}
    if then["tower"] in FORMER_TOWERS:
        then["tower"] = Model().tower
    return {
        name: f"was {_as_flag(before) or 'empty'} and is {_as_flag(str(getattr(model, name))) or 'empty'}"
        for name, before in then.items()
        if before is not None and before != str(getattr(model, name))
    }


def _as_flag(written: str) -> str:
    """A setting's value as a flag has it.

    >>> _as_flag("(256, 128)"), _as_flag("32"), _as_flag("()"), _as_flag("my.tower:build")
    ('256,128', '32', '', 'my.tower:build')
    """
    if not written.startswith("("):
        return written
    return ",".join(map(str, ast.literal_eval(written)))


def _last(shape: tuple[int, ...] | None, axes: int) -> tuple[int, ...] | None:
    """The last axes of a tensor: tables have as many rows as they have ids."""
    return shape if shape is None or len(shape) <= axes else shape[len(shape) - axes :]


def _shown(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a number"
