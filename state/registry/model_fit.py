"""Checks that the version from which training continues fits the settings; defines upgrades to other settings.

The generation that begins the epoch of an upgrade has this plan:

    spec        digest of the feature spec that training continues with
    was         digest of the feature spec of the base version; none if training starts from scratch
    model       the settings of `SETTINGS` that training continues with, by name, as text
    carried     the parts that are carried over from the version; `trainer.versions.carrying` defines how
    anew        the parts that start from scratch, in words
"""

from __future__ import annotations

import ast
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Unpack

from state import layout
from state.config.sections import Model
from state.config.settings import Settings
from state.errors import ModelMismatch, RegistryError, SaltMismatch, SpecMismatch
from state.events.identity import Salt
from state.features.spec import FeatureSpec
from state.registry import tensor_files
from state.registry.control import Control, Decision, ServingChoice, following
from state.registry.manifest import Manifest, sees
from state.registry.registry import SERVING, Registry

SHOWN = 3
FORMER_TOWERS = ("trainer.network:build", "trainer.model.network:build")
"""Names of the default tower in earlier releases, which settings and versions may still use."""

FEATURES = {
    "actions": "events.actions",
    "windows_s": "features.windows_s",
    "half_lives_s": "features.half_lives_s",
    "history": "features.history",
    "labels": "features.recent_categories",
    "sequence": "features.sequence",
}
"""Names in a feature spec's document -> the settings that determine them."""

Shapes = Mapping[str, tuple[int, ...]]


def version_to_go_on_from(registry: Registry) -> Manifest | None:
    """The newest version of control's epoch, or else the epoch's base; None if it cannot be read."""
    try:
        control = registry.control()
        if control is None:
            return None
        newest = registry.newest(control.epoch)
        version = control.base if newest is None else newest
        return None if version is None else registry.manifest(version)
    except RegistryError:
        return None


def require_same_salt(registry: Registry, salt: Salt) -> None:
    """Refuses a salt other than the one with which the registry's users were pseudonymised.

    Raises:
        SaltMismatch: It is another salt; the message has both fingerprints.
    """
    for name in registry.specs.names():
        if (stored := str(registry.specs.spec(name)["salt"])) != salt.fingerprint:
            raise SaltMismatch.between(f"the registry {registry.path}", stored, salt.fingerprint)


def require_same_model(settings: Settings, features_only: bool = False) -> None:
    """Refuses settings that contradict those of the current version, as far as the settings alone can show.

    Does nothing if there is no version yet or the registry cannot be read; other code reports that.

    Args:
        settings: All settings.
        features_only: Whether only the features count, as for the stream, which knows no model.

    Raises:
        ModelMismatch: The features, the preprocessing, or the rows' or the layers' widths differ.
    """
    if not (settings.registry_dir / layout.VERSIONS).is_dir():
        return
    registry, spec = Registry(settings.registry_dir), FeatureSpec.from_settings(settings)
    version = version_to_go_on_from(registry)
    if version is None or accepted(registry, settings, spec):
        return
    differing = differences(registry, version, settings, spec)
    wrong = [name for name in differing if not name.startswith("model.")]
    if not features_only:
        decisive = _decisive(settings.model, differing)
        decisive += ["model.options"] if _asked_otherwise(registry, version, settings.model) else []
        wrong += [name for name in decisive if name in differing]
    if wrong:
        raise mismatch(version, settings, differing, [f"{name} {differing[name]}" for name in wrong])


def _decisive(own: Model, differing: Collection[str]) -> list[str]:
    """The settings of `[model]` that decide on their own that the model cannot fit."""
    default = Model()
    if own.ranker != default.ranker or "model.ranker" in differing:
        return ["model.preprocessing"]
    # The user's own tower may ignore the layers.
    own_tower = own.tower != default.tower or "model.tower" in differing
    return ["model.preprocessing", "model.dim", *([] if own_tower else ["model.hidden"])]


def _asked_otherwise(registry: Registry, version: Manifest, model: Model) -> bool:
    """Whether an option differs that the version's preprocessing read; its graph contains the options."""
    before = dict(option.split("=", 1) for option in ast.literal_eval(version.environment.get("model.options", "()")))
    for name in registry.specs.names():
        document = registry.specs.spec(name) if name.partition(".")[0] == version.spec else {}
        if document.get("preprocessing") == model.preprocessing:
            options = document.get("asked", {}).items()
            return any(
                before.get(option, default) != model.written.get(option, default) for option, (_, default) in options
            )
    return False


def accepted(registry: Registry, settings: Settings, spec: FeatureSpec) -> bool:
    """Whether an operator accepted these settings for the current version; False if the registry cannot be read."""
    try:
        control = registry.control()
        return control is not None and is_accepted(registry, control, settings, spec.digest)
    except RegistryError:
        return False


def require_fit(
    registry: Registry,
    settings: Settings,
    spec: FeatureSpec,
    dense: Shapes,
    widths: Mapping[str, int],
    optional: Collection[str],
) -> None:
    """Refuses a built model whose weights the current version does not have.

    Args:
        registry: The registry; the caller holds the trainer's lock.
        settings: All settings.
        spec: Their feature spec.
        dense: The shape of each dense weight.
        widths: Table -> width of its rows.
        optional: Tables that a version may lack, or have in another form.

    Raises:
        ModelMismatch: A weight or a table is missing on one side, or has another shape; or the features differ.
    """
    version = version_to_go_on_from(registry)
    if version is None or accepted(registry, settings, spec) or (shapes := _shapes_of(registry, version)) is None:
        return
    wanted = {f"dense.{name}": shape for name, shape in dense.items()}
    wanted |= {f"{table}.rows": (width,) for table, width in widths.items()}
    wrong = [
        f"{name.removeprefix('dense.')} {_shown(shape)}, {'none' if present is None else _shown(present)} in the version"
        for name, shape in wanted.items()
        if (present := _last(shapes.get(name), len(shape))) != shape
    ]
    # A table that an upgrade dropped still exists, with rows of width 0.
    stored = {name.removesuffix(".rows") for name, shape in shapes.items() if name.endswith(".rows") and shape[-1]}
    wrong += [f"{table}.rows none, but in the version" for table in sorted(stored - {*widths, *optional})]
    if wrong or version.spec != spec.digest:
        try:
            registry.read(version, SERVING)
        except RegistryError:
            # The shapes may be damaged. The code that loads the version reports that.
            return
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        differing = differences(registry, version, settings, spec)
        settings_differ = [f"{name} {text}" for name, text in differing.items()]
        weights = [f"weights: {'; '.join(wrong[:SHOWN])}{more}"] if wrong else []
        raise mismatch(
            version, settings, differing, [*settings_differ, *weights] or ["its windows were computed otherwise"]
        )


def _shapes_of(registry: Registry, version: Manifest) -> Shapes | None:
    """The shapes of the tensors of a version that serving uses; None if they cannot be read."""
    try:
        return tensor_files.shapes_in(registry.path_of(version, SERVING))
    # The code that loads the version reports its defects.
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def mismatch(
    version: Manifest, settings: Settings, differing: Mapping[str, str], reasons: Sequence[str]
) -> ModelMismatch:
    """Builds the error, with the commands to type."""
    before = {f"model.{name}": version.environment.get(f"model.{name}") for name in SETTINGS}
    back = [
        f"--{name} {shlex.quote(_as_flag(written))}" for name in differing if (written := before.get(name)) is not None
    ]
    back += [f"--{name} {text.split()[1]}" for name, text in differing.items() if name in FEATURES.values()]
    put_back = f"put the settings back ({' '.join(back)})" if back else "put the model's code back"
    return ModelMismatch(
        f"version {version.version} in {settings.registry_dir} was trained with another model: {', '.join(reasons)}",
        "`springtide upgrade --dry-run` shows what is carried over, `springtide upgrade --reason TEXT` (or `springtide up "
        f"--upgrade --reason TEXT`) continues from it; or {put_back}",
    )


def differences(registry: Registry, version: Manifest, settings: Settings, spec: FeatureSpec) -> dict[str, str]:
    """Name -> how a setting of the features or of the model differs from what the version was trained with."""
    model, different = settings.model, _features(registry, version, spec)
    then = {name: version.environment.get(f"model.{name}") for name in SETTINGS}
    if then["tower"] in FORMER_TOWERS:
        then["tower"] = Model().tower
    return different | {
        f"model.{name}": f"was {_as_flag(before) or 'empty'} and is {_as_flag(str(getattr(model, name))) or 'empty'}"
        for name, before in then.items()
        if before is not None and before != str(getattr(model, name))
    }


def _features(registry: Registry, version: Manifest, spec: FeatureSpec) -> dict[str, str]:
    """The differences in features; empty if only features that this release computes differ."""
    if version.spec == spec.digest:
        return {}
    try:
        then: Mapping[str, Any] = registry.specs.spec(version.spec)["spec"]
    except (SpecMismatch, RegistryError, KeyError):
        return {"the feature spec": f"was {version.spec[:12]} and is {spec.digest[:12]}"}
    now = spec.to_json()
    return {
        setting: f"was {_listed(then.get(name, 0))} and is {_listed(now.get(name, 0))}"
        for name, setting in FEATURES.items()
        if then.get(name, 0) != now.get(name, 0)
    }


def _listed(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _as_flag(written: str) -> str:
    """Formats a setting's value as a flag.

    >>> _as_flag("(256, 128)"), _as_flag("32"), _as_flag("()"), _as_flag("my.tower:build")
    ('256,128', '32', '', 'my.tower:build')
    """
    if not written.startswith("("):
        return written
    return ",".join(map(str, ast.literal_eval(written)))


def _last(shape: tuple[int, ...] | None, axes: int) -> tuple[int, ...] | None:
    """The last axes of a tensor's shape, because the number of a table's rows is the number of its ids."""
    return shape if shape is None or len(shape) <= axes else shape[len(shape) - axes :]


def _shown(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a number"


SETTINGS = ("ranker", "tower", "dim", "hidden", "options", "preprocessing")
"""Settings of `[model]` that may change the weights of a version, or their meaning."""


def environment_differences(
    then: Mapping[str, str], now: Mapping[str, str], form: str = "{name} was {then} and is {now}"
) -> list[str]:
    """The differences between two environments, one line each; a name that only one of them has is left out.

    >>> environment_differences({"numpy": "2.3", "device": "/CPU:0"}, {"numpy": "2.4", "device": "/CPU:0"})
    ['numpy was 2.3 and is 2.4']
    >>> environment_differences({"churn.days": "7.0"}, {})
    ['churn.days was 7.0 and is off']
    >>> environment_differences({"workers": "2"}, {})
    ['workers was 2 and is 1']
    >>> environment_differences({"model.tower": FORMER_TOWERS[0]}, {"model.tower": Model().tower})
    []
    """
    then = {name: Model().tower if value in FORMER_TOWERS else value for name, value in then.items()}
    # Settings of a feature that is off are not named, nor is a single worker.
    off = {name: "off" for name in then.keys() | now.keys() if name.startswith("churn.")} | {"workers": "1"}
    then, now = {**off, **then}, {**off, **now}
    return [
        form.format(name=name, then=then[name], now=now[name])
        for name in sorted(then.keys() & now.keys())
        if then[name] != now[name]
    ]


def going_on_to(settings: Settings, spec: str) -> dict[str, Any]:
    """The part of a plan that describes the settings and the digest of their feature spec.

    >>> going_on_to(Settings(), "ab")["model"]["dim"]
    '32'
    """
    return {"spec": spec, "model": {name: str(getattr(settings.model, name)) for name in SETTINGS}}


def upgrade(
    control: Control,
    base: int | None,
    plan: Mapping[str, Any],
    answers: int | None = None,
    **decision: Unpack[Decision],
) -> Control:
    """Begins an epoch in which another model, feature spec or release continues from version `base`.

    Args:
        control: The control to start from.
        base: The version to continue from; None to train from scratch.
        plan: The plan in the format that the module describes.
        answers: The version to pin serving to until the trainer has caught up; None to leave serving unchanged.
        **decision: See `Decision`.
    """
    serving = control.serving if answers is None else ServingChoice("pin", answers, then_follow=True)
    return following(
        control,
        "upgrade",
        **decision,
        epoch=control.epoch + 1,
        base=base,
        serving=serving,
        lifted=(),
        mode="fast",
        upgraded=True,
        plan=dict(plan),
    )


def pending(registry: Registry, control: Control) -> Control | None:
    """The generation that began control's epoch, if that is an upgrade that has no version yet; otherwise None.

    Raises:
        CorruptVersion: A manifest or a generation fails its digest.
    """
    began = registry.generations.beginning_of(control.epoch)
    if began is None or began.action != "upgrade" or registry.newest(control.epoch) is not None:
        return None
    return began


def is_accepted(registry: Registry, control: Control, settings: Settings, spec: str) -> bool:
    """Whether an operator accepted that these settings continue from a model that was trained with other settings.

    Raises:
        CorruptVersion: A manifest or a generation fails its digest.
    """
    began = pending(registry, control)
    if began is None or began.plan is None:
        return False
    return all(began.plan.get(name) == value for name, value in going_on_to(settings, spec).items())


def former_specs(beginnings: Iterable[Control]) -> frozenset[str]:
    """The digests of feature specs before and after all upgrades; `beginnings` are the first generations of epochs."""
    plans = [began.plan for began in beginnings if began.action == "upgrade" and began.plan is not None]
    return frozenset(str(spec) for plan in plans for spec in (plan.get("spec"), plan.get("was")) if spec)


def first_after(
    registry: Registry, beginnings: Sequence[Control], base: Manifest | None, target: Manifest
) -> Manifest | None:
    """The oldest kept version of `target`'s descent after the last upgrade since `base`; None if there is no upgrade.

    Raises:
        UnknownVersion: A version that an epoch began from is no longer kept.
    """
    began = {control.epoch: control for control in beginnings}
    epoch = target.epoch
    while (base is None or epoch > base.epoch) and epoch in began:
        control = began[epoch]
        if control.base is None:
            return None
        if control.action == "upgrade":
            numbers = (number for number in registry.versions() if sees(target.visible, number))
            return next(manifest for number in numbers if (manifest := registry.manifest(number)).epoch == epoch)
        epoch = registry.manifest(control.base).epoch
    return None
