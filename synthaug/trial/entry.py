"""A user's own classifier or backbone, named in the configuration as 'package.module:name' or 'file.py:name'.

Naming it there runs its code, as importing it would; nothing is downloaded and nothing is unpickled here.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from synthaug.digest import digest_file, digest_json
from synthaug.errors import ConfigError


def load_entry(entry: str, setting: str) -> Any:
    """Import what `entry` names.

    Args:
        setting: Where it was named ('evaluate.classifier'), for errors.

    Raises:
        ConfigError: There is no such file, module or name in it, or importing it fails.
    """
    module_name, _, name = entry.rpartition(":")
    if not module_name or not name:
        raise ConfigError(f"{setting} is {entry!r}; write 'package.module:name' or 'file.py:name'.")
    try:
        module = _file(Path(module_name), setting) if module_name.endswith(".py") else import_module(module_name)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{setting}: importing {module_name} failed: {type(error).__name__}: {error}.") from error
    if not hasattr(module, name):
        raise ConfigError(f"{setting}: {module_name} has no {name!r}.")
    return getattr(module, name)


# Digest of a module's file when this process imported it: it stays that module, whatever becomes of the file.
_imported: dict[str, str | None] = {}


def import_module(name: str) -> Any:
    """Import an installed module, or one in the working directory, as `python -m` would."""
    _look_here_too()
    if name not in sys.modules or name not in _imported:
        _imported[name] = _digest_of_module(name)
    return importlib.import_module(name)


def _look_here_too() -> None:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))


def entry_identity(entry: str | None) -> str | None:
    """What results depend on: the name, and the content of the file it is defined in."""
    if entry is None:
        return None
    module_name, _, name = entry.rpartition(":")
    if module_name.endswith(".py"):
        path = Path(module_name)
        return f"{path.name}:{name}:{digest_file(path) if path.is_file() else 'missing'}"
    return _named(entry, _digest_of_module(module_name))


def loaded_identity(entry: str | None) -> str | None:
    """`entry_identity` as this process has it: of a module that it has imported already, the content as of then."""
    module_name = entry.rpartition(":")[0] if entry is not None else ""
    if entry is not None and module_name in sys.modules and module_name in _imported:
        return _named(entry, _imported[module_name])
    return entry_identity(entry)


def _named(entry: str, digest: str | None) -> str:
    return entry if digest is None else f"{entry}:{digest}"


def _digest_of_module(name: str) -> str | None:
    """Digest of the file that a module is defined in; None where there is none."""
    _look_here_too()
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    origin = Path(spec.origin) if spec is not None and spec.origin else None
    return digest_file(origin) if origin is not None and origin.is_file() else None


def build(made: Any, channels: int, size: int, n_classes: int) -> Any:
    """Call a factory with (channels, size, n_classes), or with none of them where it takes none."""
    if not callable(made) or _is_estimator(made):
        return made
    try:
        inspect.signature(made).bind(channels, size, n_classes)
    except TypeError:
        return made()
    except ValueError:  # classes of C extensions tell no signature
        return made()
    return made() if inspect.isclass(made) and _is_estimator_class(made) else made(channels, size, n_classes)


def _is_estimator(made: Any) -> bool:
    return hasattr(made, "fit") and hasattr(made, "predict_proba") and not inspect.isclass(made)


def _is_estimator_class(made: Any) -> bool:
    return hasattr(made, "fit") and hasattr(made, "get_params")


def _file(path: Path, setting: str) -> Any:
    if not path.is_file():
        raise ConfigError(f"{setting}: there is no file {path}. Relative paths start at the configuration's folder.")
    # Named by its place and content, so that two files of one name are two modules and a changed file is run again;
    # kept, so that a process runs it once.
    name = f"synthaug_entry_{digest_json([str(path.resolve()), digest_file(path)])[:12]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None, "a .py file has a loader"
        assert spec.loader is not None, "a .py file has a loader"
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
