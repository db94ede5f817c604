"""Publishing a release on the Hugging Face hub, or on an endpoint that speaks like it (HF_ENDPOINT), in one commit."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthaug.config import Config, PushConfig
from synthaug.digest import digest_file
from synthaug.errors import ConfigError, ReleaseError, UsageError, may_pass

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "HF_TOKEN"
CHECKPOINT_PREFIX = "checkpoint/"
# What an earlier push may have left that a new one must not leave standing.
_OURS = ("data/", "dicom/", CHECKPOINT_PREFIX)
# At the top a release has these or not; `follow_verdict` would take the last one's verdict for this one's.
_OURS_AT_THE_TOP = ("verdict.json", "verdict_*.png", "contact_sheet.png", "manifest.csv", "report.html")


def check_push_allowed(config: Config) -> None:
    """Refuse what could not or must not be published, before any work. Does not touch the network.

    Raises:
        ConfigError: The release would publish real images without release.push.real_images.
        UsageError: There is no token, or the environment forbids the network.
    """
    push = config.release.push
    if push is None:
        return
    if config.release.include_real and not push.real_images:
        raise ConfigError(
            f"release.push would publish the real images on {push.repo_id}, and release.push.real_images does not say "
            "that this is wanted. Set release.include_real: false to release and publish the synthetic images alone, "
            "or release.push.real_images: true if you are allowed to publish the real ones."
        )
    _check_repo_id(push.repo_id)
    _token()
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UsageError(
            f"release.push names {push.repo_id}, but HF_HUB_OFFLINE forbids the network. Unset it, or take "
            "release.push out of the configuration."
        )


def push(
    release: Path, settings: PushConfig, *, checkpoint: Path | None = None, earlier: Mapping[str, Path] | None = None
) -> str:
    """Publish a release in one commit and return the address of the commit. Nothing local is changed.

    Files that the repository has with the same content are not uploaded again; where it has all of them, there is
    nothing to commit, and the address is that of its newest commit. What an earlier push put there and this one lacks
    (data, checkpoints, a verdict) is deleted in the same commit; other files of the repository are left alone. The
    token comes from HF_TOKEN and from nowhere else.

    Args:
        release: Directory of a complete release.
        settings: release.push of the configuration.
        checkpoint: Folder of the generator's pipeline; published below checkpoint/ if settings.checkpoint says so.
        earlier: Digest to folder of other checkpoints that the release has samples of; they are published with it, each
            below checkpoint/ and the first 12 digits of its digest.

    Raises:
        ReleaseError: The release holds real images that must not be published, the repository is public where a
            private one was asked for, or the endpoint refused or could not be reached.
        UsageError: There is no token.
        VerificationError: `release` is not a complete release.
    """
    from synthaug.formats.manifest import RELEASE_FILE, is_safe_name, read_release_file

    stated = read_release_file(release)
    n_real = sum(sum(split["n_real"]) for split in stated["splits"].values())
    if (n_real or stated["include_real"]) and not settings.real_images:
        raise ReleaseError(
            f"release {release} holds {n_real} real images and release.push.real_images is false, so nothing was "
            "published. Make a release with release.include_real: false, or set release.push.real_images: true."
        )
    for name, file in stated["files"].items():
        path = release / name
        if not is_safe_name(name) or not path.is_file() or digest_file(path) != file["sha256"]:
            raise ReleaseError(
                f"release {release} is damaged ({name!r:.100}), so nothing was published. See 'synthaug verify', and "
                "make it again."
            )
    local = {name: release / name for name in [*stated["files"], RELEASE_FILE]}
    if settings.checkpoint:
        folders = {f"{CHECKPOINT_PREFIX}{digest[:12]}/": folder for digest, folder in (earlier or {}).items()}
        for prefix, folder in {CHECKPOINT_PREFIX: checkpoint, **folders}.items():
            if folder is None or not folder.is_dir():
                raise ReleaseError(f"release.push.checkpoint is true, but there is no checkpoint folder {folder}.")
            for file in sorted(folder.rglob("*")):
                if file.is_file():
                    local[prefix + file.relative_to(folder).as_posix()] = file
    _check_repo_id(settings.repo_id)
    token = _token()
    try:
        url = _commit(settings, local, token, message=f"Release {stated['digest'][:12]} by synthaug")
    except ReleaseError:
        raise
    except Exception as error:
        # `from None`: what the libraries hang on their exceptions (requests, headers) is not for logs.
        problem = ReleaseError(_explain(error, settings, token))
        problem.may_pass = may_pass(error) or _status(error) in (409, 412)
        raise problem from None
    return url


def _commit(settings: PushConfig, local: dict[str, Path], token: str, message: str) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.hf_api import RepoFile

    from synthaug.formats.manifest import RELEASE_FILE

    repo_id = settings.repo_id
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)
    api.create_repo(repo_id, repo_type="dataset", private=settings.private, exist_ok=True)
    # Whoever has the repository already keeps its visibility, so it is asked for.
    info = api.dataset_info(repo_id)
    if settings.private and not info.private:
        raise ReleaseError(
            f"dataset {repo_id} exists and is public, but release.push.private is true, so nothing was published. "
            "Make the repository private, name another, or set release.push.private: false."
        )
    remote = {
        entry.path: entry
        for entry in api.list_repo_tree(repo_id, repo_type="dataset", revision=info.sha, recursive=True)
        if isinstance(entry, RepoFile)
    }
    if RELEASE_FILE not in remote and any(name.startswith(_OURS) for name in remote):
        raise ReleaseError(
            f"dataset {repo_id} holds data that no release of synthaug put there, so nothing was published. Name "
            "another repository in release.push.repo_id, or remove its data/ and checkpoint/ yourself."
        )
    new = {name: path for name, path in sorted(local.items()) if not _is_there(remote.get(name), path)}
    gone = [name for name in sorted(remote) if _is_ours(name) and name not in local]
    operations: list[Any] = [CommitOperationAdd(name, path) for name, path in new.items()]
    operations += [CommitOperationDelete(name, is_folder=False) for name in gone]
    if operations:
        commit = api.create_commit(
            repo_id, operations, commit_message=message, repo_type="dataset", parent_commit=info.sha
        )
        url = str(commit.commit_url)
    else:
        url = f"{api.endpoint}/datasets/{repo_id}/commit/{info.sha}"
    logger.info(
        "published in %s: %d of %d files uploaded (%s), %d were there already, %d deleted: %s",
        "one commit" if operations else "no commit, since nothing is new",
        *(len(new), len(local), _size(sum(path.stat().st_size for path in new.values()))),
        *(len(local) - len(new), len(gone), url),
    )
    return url


def _is_ours(name: str) -> bool:
    return name.startswith(_OURS) or any(fnmatchcase(name, pattern) for pattern in _OURS_AT_THE_TOP)


def _is_there(entry: RepoFile | None, path: Path) -> bool:
    """Whether the repository has a file with this content: large ones go by their SHA-256, small ones by git's id."""
    if entry is None or entry.size != path.stat().st_size:
        return False
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == digest_file(path))
    return bool(entry.blob_id == _git_blob(path))


def _git_blob(path: Path) -> str:
    """The id that git gives to a file's content: SHA-1 of "blob", its size, a zero byte, and its bytes."""
    state = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(2**20):
            state.update(piece)
    return state.hexdigest()


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e5 else f"{n_bytes / 1e3:.1f} kB"


def _token() -> str:
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token:
        raise UsageError(
            f"release.push needs a token with write access in the environment variable {TOKEN_VARIABLE}. Set it, or "
            "take release.push out of the configuration."
        )
    return token


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise HFValidationError("it must be 'owner/name'")
    except HFValidationError as error:
        raise ConfigError(f"release.push.repo_id {repo_id!r:.100} is refused: {str(error)[:200]}") from None


def _root(error: Exception) -> Exception:
    """What the endpoint answered, which says most: an upload in a thread wraps it."""
    from huggingface_hub.errors import HfHubHTTPError

    chain = [error]
    while isinstance(cause := chain[-1].__cause__, Exception) and cause not in chain:
        chain.append(cause)
    return next((link for link in chain if isinstance(link, HfHubHTTPError)), chain[-1])


def _status(error: Exception) -> int | None:
    response = getattr(_root(error), "response", None)
    return None if response is None else int(response.status_code)


def _explain(error: Exception, settings: PushConfig, token: str) -> str:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    error = _root(error)
    words = " ".join(str(error).split()).replace(token, "***")[:300] or type(error).__name__
    where = f"dataset {settings.repo_id}"
    kept = "The release itself is complete and unchanged."
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, OfflineModeIsEnabled):
        return f"{where} was not published: HF_HUB_OFFLINE forbids the network. {kept}"
    if status in (401, 403):
        return f"{where} was not published: {TOKEN_VARIABLE} does not give write access to it ({words}). {kept}"
    if status in (409, 412):
        return f"{where} was not published: somebody else changed it meanwhile; run again ({words}). {kept}"
    if status is not None:
        return f"{where} was not published: the hub answered {status} ({words}). {kept}"
    return f"{where} was not published: the hub could not be reached or refused ({words}). {kept} Run again later."
