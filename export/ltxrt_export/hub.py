# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face hub as a source of files: listings, access, bytes from an offset, and what went wrong in words.

``huggingface_hub`` gives the listing, the token and the session. The bytes are fetched here: its own download
starts a file over when it is interrupted, and ours go on where they stopped.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from http import HTTPStatus

import httpx2
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from ltxrt.errors import ExportError, shown

from .published import PublishedRepository

__all__ = ["Hub", "InterruptedTransferError", "RemoteFile"]

_TIMEOUT_SECONDS = 30.0
_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})


class InterruptedTransferError(Exception):
    """A transfer broke off in a way that is worth another try; the message says how."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a repository, as the hub lists it.

    Attributes:
        repository: Where it is.
        revision: Commit of the listing.
        name: Path in the repository.
        bytes: Its size.
        sha256: Of its content; None for a small file that is stored in git itself.
        git_sha1: Its git blob id, where there is no SHA-256.
    """

    repository: PublishedRepository
    revision: str
    name: str
    bytes: int
    sha256: str | None
    git_sha1: str | None


@dataclass(frozen=True, slots=True)
class Hub:
    """A hub and who asks.

    Attributes:
        token: Access token; None for ``HF_TOKEN`` or the token of ``hf auth login``.
        endpoint: Address; None for the public hub, or ``HF_ENDPOINT``.
    """

    token: str | None = None
    endpoint: str | None = None

    def files(self, repository: PublishedRepository) -> list[RemoteFile]:
        """What an export needs of a repository, at its newest revision, sorted by name.

        Raises:
            ExportError: The repository cannot be listed, or a file is not in it.
        """
        with _explained(repository):
            info = HfApi(self.endpoint, self.token).model_info(
                repository.name, files_metadata=True, timeout=_TIMEOUT_SECONDS
            )
        files: list[RemoteFile] = []
        for sibling in info.siblings or []:
            if any(fnmatch(sibling.rfilename, pattern) for pattern in repository.patterns):
                sha256 = None if sibling.lfs is None else sibling.lfs.sha256
                if sibling.size is None or info.sha is None or (sha256 or sibling.blob_id) is None:
                    raise ExportError(f"{repository.name}: the hub lists {sibling.rfilename} without size or hash")
                git_sha1 = sibling.blob_id if sha256 is None else None
                files.append(RemoteFile(repository, info.sha, sibling.rfilename, sibling.size, sha256, git_sha1))
        for pattern in repository.patterns:
            if not any(fnmatch(file.name, pattern) for file in files):
                raise ExportError(f"{repository.name}: has no {pattern} any more; see {repository.page}")
        return sorted(files, key=lambda file: file.name)

    def check_access(self, repository: PublishedRepository) -> None:
        """Ask whether the files may be fetched, before the first of them is.

        Raises:
            ExportError: They may not; the message says where to accept the terms.
        """
        with _explained(repository):
            HfApi(self.endpoint, self.token).auth_check(repository.name)

    @contextmanager
    def stream(self, file: RemoteFile, offset: int) -> Generator[tuple[int, Iterator[bytes]]]:
        """Open a file at ``offset``: where it really begins (0 if the server cannot seek), and its bytes.

        Raises:
            ExportError: It may not be fetched, or is not there.
            InterruptedTransferError: The connection could not be made or broke off; another try may succeed.
        """
        url = hf_hub_url(file.repository.name, file.name, revision=file.revision, endpoint=self.endpoint)
        headers = build_hf_headers(token=self.token) | {"Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        request = get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_SECONDS, follow_redirects=True)
        try:
            with request as response:
                if response.status_code in _TRANSIENT:
                    raise InterruptedTransferError(f"the hub answers {response.status_code}")
                if response.is_error:
                    # Headers and status are what the words are made of.
                    response.read()
                    with _explained(file.repository):
                        hf_raise_for_status(response)
                # In pieces as they come: a broken connection then loses none.
                begin = offset if response.status_code == HTTPStatus.PARTIAL_CONTENT else 0
                yield begin, response.iter_bytes()
        except httpx2.TransportError as error:
            raise InterruptedTransferError(_reason(error)) from error


@contextmanager
def _explained(repository: PublishedRepository) -> Generator[None]:
    """Turn what the hub says into one line with the page to go to."""
    name, page = repository.name, repository.page
    try:
        yield
    except EntryNotFoundError as error:
        raise ExportError(f"{name}: a file is not there any more (404); see {page}") from error
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise ExportError(
            f"{name}: access is refused ({error.response.status_code}); accept the {repository.terms} on {page} with"
            " your Hugging Face account, then give a read token of that account in HF_TOKEN or with --token"
        ) from error
    except HfHubHTTPError as error:
        raise ExportError(f"{name}: {_status(error, page)}") from error
    # The library's own offline switch is a ConnectionError.
    except (httpx2.TransportError, ConnectionError) as error:
        raise ExportError(
            f"{name}: the hub cannot be reached ({_reason(error)}); check the network, then run the command again"
        ) from error


def _status(error: HfHubHTTPError, page: str) -> str:
    status = error.response.status_code
    if status == HTTPStatus.UNAUTHORIZED:
        return "the token is refused (401); make a read token on https://huggingface.co/settings/tokens"
    if status == HTTPStatus.FORBIDDEN:
        return f"access is refused (403); the token needs leave to read gated repositories, and see {page}"
    if status in _TRANSIENT:
        return f"the hub answers {status}; try again later"
    return f"the hub answers {status}; see {page}"


def _reason(error: Exception) -> str:
    return shown(str(error) or type(error).__name__).strip("'\"")
