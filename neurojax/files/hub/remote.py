"""A hub over HTTP: what a repository has, and the bytes of a file. All that can go wrong has a sentence."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO
from urllib.parse import quote

from neurojax.files.hub.address import Address, check_file_name
from neurojax.files.hub.cache import SHA1, SHA256


@dataclasses.dataclass(frozen=True)
class RemoteFile:
  """A file as the hub lists it.

  Attributes:
    digest: SHA-256 in hex of a large file, Git's SHA-1 of another; its name in the cache.
  """

  name: str
  size_bytes: int
  digest: str

  @property
  def sha256(self) -> str | None:
    return self.digest if SHA256.fullmatch(self.digest) else None


class Hub:
  """The hub that HF_ENDPOINT names, asked with the token of HF_TOKEN or of `hf auth login`."""

  def __init__(self, endpoint: str | None = None):
    from huggingface_hub import constants, logging

    # Its warnings are whole signed addresses, a line at each retry.
    logging.set_verbosity_error()
    self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")

  def listing(self, address: Address) -> tuple[str, dict[str, RemoteFile]]:
    """The commit of a revision, and its files.

    Raises:
      FileNotFoundError: no such model or revision.
      PermissionError: the hub wants a token, or another one.
      ConnectionError: the hub cannot be reached.
      ValueError: it is no hub, or names files that nobody should write.
    """
    from huggingface_hub import HfApi, constants, errors

    with self._errors(address):
      api = HfApi(endpoint=self.endpoint, library_name="neurojax")
      try:
        info = api.model_info(
          address.repo,
          revision=address.revision,
          files_metadata=True,
          timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
        files = [
          (
            entry.rfilename,
            *((lfs.size, lfs.sha256) if lfs else (entry.size, entry.blob_id)),
            bool(lfs),
          )
          for entry in info.siblings or ()
          for lfs in (entry.lfs,)
        ]
      except errors.HFValidationError:
        raise
      except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(self._no_hub(f"no listing of {address.repo} ({error!r:.200})")) from error
    commit = info.sha
    if not isinstance(commit, str) or not SHA1.fullmatch(commit):
      raise ValueError(self._no_hub(f"the commit {commit!r:.100} of {address}"))
    listing = {}
    for name, size, digest, is_large in files:
      if not isinstance(name, str):
        raise ValueError(self._no_hub(f"a file called {name!r:.100}"))
      check_file_name(name)
      if not isinstance(size, int) or size < 0:
        raise ValueError(self._no_hub(f"the size {size!r:.100} of {name}"))
      if not isinstance(digest, str) or not (SHA256 if is_large else SHA1).fullmatch(digest):
        raise ValueError(self._no_hub(f"the digest {digest!r:.100} of {name}"))
      listing[name] = RemoteFile(name, size, digest)
    return commit, listing

  def fetch(
    self, address: Address, commit: str, file: RemoteFile, into: BinaryIO, begin: int
  ) -> None:
    """Write a file's bytes from `begin` on. Connections that break are made anew a few times.

    Args:
      into: Positioned at `begin`. May be taken back to its start, if the hub knows no ranges.
    Raises:
      FileNotFoundError, PermissionError: as for `listing`.
      ConnectionError: no answer, or too few bytes; what came is written.
    """
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = f"{self.endpoint}/{address.repo}/resolve/{commit}/{quote(file.name)}"
    with self._errors(address, file.name):
      http_get(
        url,
        into,
        resume_size=begin,
        headers=build_hf_headers(library_name="neurojax"),
        expected_size=file.size_bytes,
        displayed_filename=file.name,
        tqdm_class=_no_bar(),
      )

  @contextmanager
  def _errors(self, address: Address, file: str | None = None) -> Iterator[None]:
    import httpx2
    from huggingface_hub import errors, get_token

    page = f"{self.endpoint}/{address.repo}"
    what = address.repo if file is None else f"{address.repo}: {file}"
    kept = "; what came is kept, and the same command goes on from there" if file else ""
    try:
      yield
    except errors.OfflineModeIsEnabled as error:
      raise ConnectionError(
        f"{what}: HF_HUB_OFFLINE is set, so the hub is not asked: unset it to download"
      ) from error
    except errors.GatedRepoError as error:
      token = "the token given has no access" if get_token() else "it wants a token"
      raise PermissionError(
        f"{what} is gated, and {token}: agree to its terms on {page}, then set HF_TOKEN to a token of "
        "that account (or `hf auth login`)"
      ) from error
    except errors.RepositoryNotFoundError as error:
      hidden = "with this token" if get_token() else "without a token (HF_TOKEN)"
      raise FileNotFoundError(
        f"{address.repo}: no such model on {self.endpoint}, or none that is shown {hidden}"
      ) from error
    except errors.RevisionNotFoundError as error:
      raise FileNotFoundError(
        f"{address.repo} has no revision {address.revision!r}: see {page}/commits"
      ) from error
    except errors.EntryNotFoundError as error:
      raise FileNotFoundError(f"{what}: listed, but not there: see {page}/tree/main") from error
    except errors.HFValidationError as error:
      raise ValueError(f"{address.repo!r} is no name of a model on the hub: org/name") from error
    except errors.HfHubHTTPError as error:
      status = error.response.status_code
      if status == 401:
        raise PermissionError(
          f"{what}: {self.endpoint} does not take the token: renew HF_TOKEN (or `hf auth login`)"
        ) from error
      if status == 403:
        raise PermissionError(
          f"{what}: {self.endpoint} forbids it to this token: see {page}"
        ) from error
      raise ConnectionError(
        f"{what}: {self.endpoint} answered {status} {error.response.reason_phrase}: try again later{kept}"
      ) from error
    except httpx2.HTTPError as error:
      raise ConnectionError(
        f"{what}: no answer from {self.endpoint} ({str(error) or type(error).__name__}): is there a network, "
        f"and is HF_ENDPOINT right?{kept}"
      ) from error
    except (httpx2.InvalidURL, UnicodeError) as error:
      raise ValueError(f"HF_ENDPOINT {self.endpoint!r} is no address: {error}") from error
    except OSError as error:
      # How http_get says that the bytes ended early.
      if "Consistency check failed" not in str(error):
        raise
      raise ConnectionError(f"{what}: the bytes ended early{kept}") from error

  def _no_hub(self, what: str) -> str:
    return f"{self.endpoint} answers {what}: that is no hub: is HF_ENDPOINT right?"


def _no_bar() -> type:
  """A progress bar that draws nothing, for `http_get`: our own bar covers all files."""
  from tqdm import tqdm

  class NoBar(tqdm):
    def __init__(self, *arguments: object, **options: object):
      options.pop("name", None)
      super().__init__(*arguments, **{**options, "disable": True})

  return NoBar
