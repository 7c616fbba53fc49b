"""Settings that are flags: fields of frozen dataclasses, with their meaning and their valid range.

A field made by ``choice`` holds one object of a registry, such as the risk. On the command line, in
``config.json`` and in sweeps a configuration is flat: ``--risk cvar --alpha 0.8`` is the field
``risk`` with the object ``CVaR(alpha=0.8)``.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_type_hints

from sqloss.common.errors import UserError
from sqloss.common.files import expanded
from sqloss.common.ranks import say
from sqloss.common.registry import Registry

LARGEST = 2**31 - 1  # of the numbers that become sizes of tensors

Kind = TypeVar("Kind")


def flag(default: Any, meaning: str, **options: Any) -> Any:
    """A field that is a flag: ``options`` go to argparse, except for three of them.

    ``since`` is the format of ``config.json`` that first had the flag, ``before`` what older runs
    did, where that is not the default. ``formerly`` is the field's name before it was renamed: the
    command line takes the old flag too, with a warning, and older runs have it.
    """
    return field(default=default, metadata={"help": meaning, **options})


def choice(registry: Registry[Any], default: str, meaning: str, **options: Any) -> Any:
    """A field that holds an object of one of the registered classes, chosen by their names."""
    metadata = {"help": meaning, "registry": registry, **options}
    return field(default=registry[default](), metadata=metadata)


NOT_FOR_ARGPARSE = ("since", "before", "formerly", "registry")


@dataclass(frozen=True)
class Setting:
    """A flag of a configuration, its own or one of what it may choose."""

    name: str
    type: Any
    default: Any
    metadata: Mapping[str, Any]

    @property
    def formerly(self) -> str:
        """The name before it was renamed, if it was."""
        return str(self.metadata.get("formerly", ""))

    def in_format(self, version: int) -> dict[str, Any]:
        """The value in runs of a format that lacks the setting, if it does."""
        is_lacking = version < self.metadata.get("since", 0)
        return {self.name: self.metadata.get("before", self.default)} if is_lacking else {}

    def takes(self, value: Any) -> bool:
        """Whether it has the type: a whole number is a float, and a bool is no number."""
        return type(value) in ((int, float) if self.type is float else (self.type,))

    @property
    def for_argparse(self) -> dict[str, Any]:
        return {k: v for k, v in self.metadata.items() if k not in NOT_FOR_ARGPARSE}


def settings_of(kind: type) -> dict[str, Setting]:
    """The settings of a configuration and of all that it may choose, by name.

    Raises:
        ValueError: a name is that of two settings, which a flat configuration cannot tell apart.
            Things of one registry may share a setting, as one of them is chosen.
    """
    hints = get_type_hints(kind)
    settings: dict[str, Setting] = {}
    owners = {each.name: (kind, None) for each in dataclasses.fields(kind)}
    for each in dataclasses.fields(kind):
        registry = each.metadata.get("registry")
        if registry is None:
            settings[each.name] = Setting(each.name, hints[each.name], each.default, each.metadata)
            continue
        metadata = {**each.metadata, "choices": tuple(registry)}
        settings[each.name] = Setting(each.name, str, each.default.name, metadata)
        for option in registry.values():
            for name, own in settings_of(option).items():
                owner, its_registry = owners.setdefault(name, (option, registry))
                settings.setdefault(name, own)
                if its_registry is not registry or settings[name].type is not own.type:
                    raise ValueError(
                        f"{option.__name__}: expected a setting of another name or type than one "
                        f"of {owner.__name__}, got {name}"
                    )
    return settings


def renamed(kind: type) -> dict[str, str]:
    """The settings of a configuration that were renamed: from the former name to today's."""
    return {s.formerly: s.name for s in settings_of(kind).values() if s.formerly}


def warn_of_renamed(former: str, name: str) -> None:
    say(
        f"sqloss: warning: {as_flag(former)} is now {as_flag(name)}; the next release will not "
        "know the old name"
    )


def configure(kind: type[Kind], **given: Any) -> Kind:
    """A configuration from flat settings; those not given have their defaults."""
    known = settings_of(kind)
    values: dict[str, Any] = {}
    chosen: dict[str, Any] = {}
    for each in dataclasses.fields(kind):  # type: ignore[arg-type]
        registry = each.metadata.get("registry")
        if registry is None:
            if each.name in given:
                values[each.name] = given.pop(each.name)
            continue
        name = given.pop(each.name, each.default.name)
        if name not in registry:
            raise UserError(
                f"{as_flag(each.name)}: expected one of {', '.join(registry)}, got {name}"
            )
        own = {k: given.pop(k) for k in settings_of(registry[name]) if k in given}
        values[each.name] = registry[name](**own)
        chosen[each.name] = registry, name
    for setting in given:
        if setting not in known:
            raise TypeError(f"no setting {setting}")
        refuse_unchosen(setting, chosen)
    return kind(**values)


def refuse_unchosen(setting: str, chosen: Mapping[str, tuple[Registry[Any], str]]) -> None:
    """Raise for a setting of something that was not chosen."""
    for field_name, (registry, name) in chosen.items():
        owners = [option for option, kind in registry.items() if setting in settings_of(kind)]
        if owners:
            raise UserError(
                f"{as_flag(setting)}: expected {as_given(field_name, ' or '.join(owners))} with "
                f"it, got {as_given(field_name, name)}"
            )


def taken(kind: type[Kind], given: Mapping[str, Any]) -> tuple[Kind, dict[str, Any]]:
    """The configuration of the settings of one kind among those given, and the rest of these."""
    names = settings_of(kind)
    own = {name: value for name, value in given.items() if name in names}
    return kind(**own), {name: value for name, value in given.items() if name not in names}


def settings_chosen(kind: type, given: Mapping[str, Any]) -> set[str]:
    """The names of the settings of a configuration and of what these settings choose."""
    names = set()
    for each in dataclasses.fields(kind):
        names.add(each.name)
        registry = each.metadata.get("registry")
        name = given.get(each.name, each.default.name) if registry is not None else None
        if registry is not None and name in registry:
            names |= settings_of(registry[name]).keys()
    return names


def flat(config: Any) -> dict[str, Any]:
    """The settings that ``configure`` makes the configuration of."""
    values: dict[str, Any] = {}
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if "registry" in each.metadata:
            values |= {each.name: value.name, **flat(value)}
        else:
            values[each.name] = value
    return values


def changed(config: Kind, **changes: Any) -> Kind:
    """The configuration with other values of some settings.

    What is chosen anew has its defaults.
    """
    values = flat(config)
    for each in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, each.name)
        if "registry" in each.metadata and changes.get(each.name, value.name) != value.name:
            for name in flat(value):
                del values[name]
    return configure(type(config), **{**values, **changes})


def in_flags(config: Any) -> str:
    """Settings as they are given."""
    return " ".join(as_given(name, value) for name, value in flat(config).items())


def as_text(value: Any) -> str:
    """A value as its flag takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


# What a Python function that was called has other names for; None on the command line.
_renamed_in_python: ContextVar[Mapping[str, str] | None] = ContextVar("function", default=None)


@contextlib.contextmanager
def called(function: str, **names: str) -> Iterator[None]:
    """Within it errors are those of a Python function: "train: batch_size: expected ...".

    Everything that names a setting does so by ``as_flag``. ``names`` are the function's own names
    of some settings.
    """
    before = _renamed_in_python.set(names)
    try:
        yield
    except UserError as error:
        error.args = (f"{function}: {error}",)
        raise
    finally:
        _renamed_in_python.reset(before)


def as_flag(name: str) -> str:
    """A setting, by the name under which whoever reads this gives it."""
    names = _renamed_in_python.get()
    return "--" + name.replace("_", "-") if names is None else names.get(name, name)


def as_given(name: str, value: Any) -> str:
    """A setting with a value, as whoever reads this gives it: "--alpha 0.8" or "alpha=0.8"."""
    between = " " if _renamed_in_python.get() is None else "="
    shown = f"{value:g}" if isinstance(value, float) else as_text(value)
    return f"{as_flag(name)}{between}{shown}"


def expect(config: object, name: str, valid: bool, expected: str) -> None:
    """Refuse the value that a configuration has in one of its fields."""
    if not valid:
        raise UserError(f"{as_flag(name)}: expected {expected}, got {getattr(config, name)}")


def make_absolute(config: object, name: str) -> None:
    """Make a path in a field of a new configuration absolute: a run may be resumed elsewhere."""
    object.__setattr__(config, name, str(expanded(getattr(config, name)).absolute()))


def expect_whole(config: object, least: int, *names: str) -> None:
    """Refuse values of these fields that are no sizes from ``least`` up."""
    for name in names:
        in_range = least <= getattr(config, name) <= LARGEST
        expect(config, name, in_range, f"a whole number from {least} to {LARGEST}")
