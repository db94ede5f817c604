"""Finding and opening the real images, whatever form they have."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from synthaug.config import DatasetConfig
from synthaug.digest import digest_json
from synthaug.errors import DatasetError
from synthaug.formats.source_rows import Rows, clean_text

logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def open_source(config: DatasetConfig, known: str) -> Rows:
    """Open the source that the settings name; the rows are read when they are iterated.

    Args:
        config: What the settings say about the dataset.
        known: Its `fingerprint`; of a dataset of the hub, the commit in it is what is opened.

    Raises:
        DatasetError: It is missing, damaged, or not in the form the settings say.
    """
    from synthaug.formats import source_arrays, source_arrow, source_dicom, source_folder, source_nifti

    _require_path(config)
    if config.format == "hub":
        return source_arrow.open_hub(config, known.rpartition("@")[2])
    openers = {
        "huggingface": source_arrow.open_directory,
        "disk": source_arrow.open_saved,
        "imagefolder": source_folder.open_folder,
        "parquet": source_arrow.open_parquet,
        "medmnist": source_arrays.open_medmnist,
        "digits": source_arrays.open_digits,
        "dicom": source_dicom.open_dicom,
        "nifti": source_nifti.open_nifti,
    }
    return openers[config.format](config)


def fingerprint(config: DatasetConfig) -> str:
    """What tells a source from a changed one without reading it: names, sizes and times, or a commit.

    Raises:
        DatasetError: The source is missing, or the hub cannot be asked.
    """
    _require_path(config)
    if config.format == "hub":
        return f"hub:{config.path}@{hub_commit(config)}"
    if config.format == "digits":
        import sklearn

        return f"digits:scikit-learn-{sklearn.__version__}"
    assert config.path is not None
    if config.format == "nifti":
        from synthaug.formats.source_nifti import nifti_fingerprint

        return nifti_fingerprint(config)
    if config.format == "dicom":
        from synthaug.formats.source_dicom import dicom_fingerprint

        return dicom_fingerprint(config)
    if config.format == "parquet":
        from synthaug.formats.source_arrow import parquet_files

        base, files = parquet_files(config.path)
        entries: list[list[str | int]] = [[os.path.relpath(file, base), *_size_and_time(file.stat())] for file in files]
    elif Path(config.path).is_file():
        entries = [[Path(config.path).name, *_size_and_time(Path(config.path).stat())]]
    else:
        entries = sorted(_entries(config.path, ""))
    return f"{config.format}:{digest_json(entries)}"


def hub_commit(config: DatasetConfig) -> str:
    """The commit that the settings' revision stands for. A full commit is taken as it is, without asking.

    Raises:
        DatasetError: No such dataset or revision, or the hub cannot be reached and the cache does not know.
    """
    dataset, revision = str(config.path), config.revision or "main"
    if not _HUB_ID.fullmatch(dataset):
        raise DatasetError(f"dataset.path {dataset!r} is not an id of the hub. It looks like 'owner/name'.")
    if Path(dataset).exists():
        # load_dataset would take the directory and say nothing.
        raise DatasetError(
            f"dataset.path '{dataset}' is also a path here, and it would be read in place of the hub's. Use format "
            "'huggingface' for the directory, or call from another directory for the hub."
        )
    if _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        commit = HfApi().dataset_info(dataset, revision=revision).sha
    except RepositoryNotFoundError:
        raise DatasetError(
            f"the hub at {constants.ENDPOINT} knows no dataset '{dataset}', or it is private. Check dataset.path, and "
            "log in with `hf auth login` if it is private."
        ) from None
    except RevisionNotFoundError:
        raise DatasetError(f"the hub's '{dataset}' has no revision '{revision}'. Check dataset.revision.") from None
    except Exception as error:  # the network fails in many classes, those of the HTTP library among them
        return _cached_commit(dataset, revision, error)
    if not commit:
        raise DatasetError(f"the hub names no commit for '{dataset}' at '{revision}'. Give one in dataset.revision.")
    return str(commit)


def _cached_commit(dataset: str, revision: str, error: Exception) -> str:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"datasets--{dataset.replace('/', '--')}" / "refs"
    file = folder / revision
    if ".." not in revision and file.is_file():
        commit = file.read_text(encoding="utf-8").strip()
        logger.warning("the hub cannot be reached: '%s' at '%s' is taken from the cache, %s", dataset, revision, commit)
        return commit
    raise DatasetError(
        f"the hub at {constants.ENDPOINT} cannot be asked for '{dataset}' at '{revision}' "
        f"({type(error).__name__}: {' '.join(str(error).split())[:300]}), and the cache does not know it. Connect, or "
        "give a full commit in dataset.revision that was fetched before."
    ) from error


def _require_path(config: DatasetConfig) -> None:
    if config.format in ("hub", "digits"):
        return
    assert config.path is not None
    if "\0" in config.path:
        raise DatasetError(f"dataset.path {config.path!r} is no path.")
    pattern = config.format == "parquet" and any(character in config.path for character in "*?[")
    if not pattern and not Path(config.path).exists():
        raise DatasetError(f"dataset.path {config.path} does not exist. Check the path in the configuration.")


def _entries(folder: str, below: str) -> Iterator[list[str | int]]:
    """Name, size and time of every file below a folder."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = os.path.join(below, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    yield [clean_text(name) + os.sep]
                    yield from _entries(entry.path, name)
                else:
                    found = entry.stat(follow_symlinks=entry.is_symlink() and os.path.exists(entry.path))
                    yield [clean_text(name), *_size_and_time(found)]
    except OSError as error:
        raise DatasetError(f"{folder} cannot be read: {error.strerror}.") from error


def _size_and_time(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns
