"""A store in an object store, by `fsspec`: `s3://`, `gs://`, and every other scheme that it knows."""

from __future__ import annotations

import contextlib
import datetime
import secrets
from collections.abc import Iterable, Iterator

import fsspec
import numpy as np

from gemma3_jax.harvest.errors import StoreError
from gemma3_jax.harvest.storage import Claim

_EXPIRES = datetime.timedelta(minutes=15)  # a unit takes seconds to minutes


class Objects:
    """The objects below a name. What belongs to a `Place` is described there."""

    gap: float = 2**18
    readers = 16
    expiry = "in 15 minutes"

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        try:
            # Listings are not kept: other processes write, too.
            self._system, self._root = fsspec.url_to_fs(self.url, use_listings_cache=False)
        except ValueError as error:
            raise StoreError(f"{url} is not a store: {error}") from error
        except ImportError as error:
            raise ModuleNotFoundError(f"a store at {url} needs: pip install 'gemma3-jax[remote]' ({error})") from error

    def __str__(self) -> str:
        return self.url

    def full(self, name: str) -> str:
        return f"{self.url}/{name}"

    def size(self, name: str) -> int | None:
        with self._errors(name):
            try:
                return int(self._system.info(self._path(name))["size"])
            except FileNotFoundError:
                return None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        with self._errors(name):
            content = b"" if start == stop else self._system.cat_file(self._path(name), start=start, end=stop)
        return np.frombuffer(content, np.uint8)

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """One put, or an upload in parts that ends with one request: other processes see all of it or nothing."""
        with self._errors(name):
            self._system.pipe_file(self._path(name), b"".join(parts))

    def remove(self, name: str) -> None:
        with self._errors(name), contextlib.suppress(FileNotFoundError):
            self._system.rm_file(self._path(name))

    def names(self, folder: str) -> Iterator[str]:
        with self._errors(folder):
            return (path.rpartition("/")[2] for path in self._system.find(self._path(folder)))

    def prepare(self) -> None:
        pass

    def strangers(self) -> list[str]:
        with self._errors(""):
            try:
                return [path.rstrip("/").rpartition("/")[2] for path in self._system.ls(self._root, detail=False)]
            except FileNotFoundError:
                return []

    def tidy(self) -> None:
        pass

    def room(self) -> int | None:
        return None

    def check_claims(self) -> None:
        """Create an object twice. The second time must be an error: the store then creates only what is absent.

        Raises:
            StoreError: the store or its driver replaces what is there.
        """
        name = f"claims/test-{secrets.token_hex(8)}"
        try:
            is_new = [self._create(name) for _ in range(2)]
        except (OSError, NotImplementedError) as error:
            raise StoreError(f"{self.url} cannot be claimed from ({error}); give part=(number, count)") from error
        finally:
            self.remove(name)
        if is_new != [True, False]:
            raise StoreError(
                f"units of {self.url} cannot be claimed: the store has no conditional put. Give each process its part, "
                "part=(number, count)"
            )

    def claim(self, name: str) -> Claim | None:
        """An object that is created if it is absent. One that is old belonged to a process that is gone.

        It may happen that two processes take over an old claim. Both then write the same bytes.
        """
        if not self._create(name):
            with self._errors(name):
                try:
                    age = datetime.datetime.now(datetime.UTC) - self._system.modified(self._path(name))
                except FileNotFoundError:
                    return None
            if age < _EXPIRES:
                return None
            self.remove(name)
            if not self._create(name):
                return None
        return _Object(self, name)

    def _create(self, name: str) -> bool:
        """Create an object if it is absent; whether it was."""
        with self._errors(name):
            try:
                self._system.pipe_file(self._path(name), b"1", mode="create")
            except FileExistsError:
                return False
        return True

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Every error of a driver as OSError with the name of the object."""
        try:
            yield
        except (StoreError, NotImplementedError):
            raise
        except Exception as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise OSError(0, why, self.full(name)) from error


class _Object:
    def __init__(self, place: Objects, name: str):
        self._place, self._name = place, name

    def release(self) -> None:
        self._place.remove(self._name)
