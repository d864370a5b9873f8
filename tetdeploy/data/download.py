"""Downloading a data set through torchvision or tonic, whole or not at all."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import socket
import sys
import tarfile
import tempfile
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tetdeploy.system.extras import MissingExtraError, import_extra
from tetdeploy.wording import in_one_line

_STALL_SECONDS = 30.0


def download_torchvision(
    name: str, dataset_class: str, folder: str, data_dir: Path, *, looked_for: Sequence[str]
) -> None:
    """`download` with `torchvision.datasets.<dataset_class>`; an archive that lies in `data_dir` is unpacked."""

    def make(root: str) -> None:
        maker = getattr(import_extra("torchvision.datasets", "train"), dataset_class)
        archive = data_dir / getattr(maker, "filename", "")
        if archive.is_file():  # brought by hand to a machine without network; torchvision verifies its checksum
            shutil.copy(archive, root)
        try:
            maker(root, download=True)
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            if archive.is_file():
                reason = getattr(error, "reason", error)
                raise RuntimeError(f"{reason}; {archive} is there, but damaged or cut short") from error
            raise

    download(name, make, folder, data_dir, looked_for=looked_for)


def download(
    name: str, make: Callable[[str], object], folder: str, data_dir: Path, *, looked_for: Sequence[str]
) -> None:
    """Download into a temporary folder and put its `folder` into `data_dir`: if anything fails, nothing is left behind.

    Args:
        name: the data set, for the error.
        make: downloads, verifies and unpacks into the folder it is given, with torchvision or tonic.
        folder: what it makes below that.
        data_dir: made when missing.
        looked_for: where the data set was looked for before, for the error.

    Raises:
        OSError: the download failed or its package is not installed; says what was looked for and what to do.
    """
    # beside the target, on the same file system, so that moving it is one step
    existing = next(path for path in (data_dir, *data_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(
            f"cannot put {name} into {data_dir}: {existing} is a file; name a folder with --data-dir"
        )
    try:
        with tempfile.TemporaryDirectory(prefix=".tetdeploy-download-", dir=existing) as temporary:
            with _bounded_and_quiet():
                make(temporary)
            data_dir.mkdir(parents=True, exist_ok=True)
            made, target = Path(temporary) / folder, data_dir / folder
            try:
                made.replace(target)
            except OSError:
                if not target.exists():
                    raise
                # an earlier, incomplete one, or that of another job which has ended in between
                shutil.copytree(made, target, dirs_exist_ok=True, copy_function=os.replace)
    except (MissingExtraError, OSError, RuntimeError, EOFError, tarfile.TarError, http.client.HTTPException) as error:
        raise OSError(
            f"{name} was not found in {data_dir} and could not be downloaded ({in_one_line(error)}). "
            f"Looked for: {'; '.join(looked_for)}. Put one of these there, or name another folder with "
            "--data-dir or TETDEPLOY_DATA"
        ) from None


@contextlib.contextmanager
def _bounded_and_quiet() -> Iterator[None]:
    """Both print to stdout, where reports go, and wait for ever on a connection that is swallowed."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_STALL_SECONDS)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        socket.setdefaulttimeout(before)
