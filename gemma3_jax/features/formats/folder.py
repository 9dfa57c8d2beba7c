"""The files of one dictionary: a folder, or one file of it, and what the caller says of its sites."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from gemma3_jax.reading import CheckpointError, read_json
from gemma3_jax.types import JsonObject

SiteNames = str | Sequence[str]


@dataclasses.dataclass(frozen=True)
class Folder:
    """Where a dictionary is.

    Attributes:
        path: the directory.
        file: name of the file that was asked for, if it was one file.
        site_in: the site that the caller says it reads, in place of the config's; or several.
        site_out: the site that the caller says it writes.
    """

    path: Path
    file: str | None = None
    site_in: SiteNames | None = None
    site_out: SiteNames | None = None

    def has(self, name: str) -> bool:
        """Whether there is such a file, and it is the one that was asked for, if one was."""
        return (self.path / name).is_file() and self.file in (None, name)

    def numbered(self, pattern: str) -> list[Path]:
        """The files of a pattern with `{}` in place of a number, in its order.

        Raises:
            CheckpointError: one of the numbers from 0 on is missing.
        """
        before, after = pattern.split("{}")
        names = [file.name for file in self.path.glob(pattern.replace("{}", "*"))] if self.path.is_dir() else []
        numbers = sorted(
            int(number) for name in names if (number := name[len(before) : len(name) - len(after)]).isdecimal()
        )
        if numbers != list(range(len(numbers))):
            missing = next(n for n, number in enumerate([*numbers, -1]) if n != number)
            raise CheckpointError(
                f"{self.path} has {pattern.format(numbers[-1])}, but not {pattern.format(missing)}; download all"
            )
        return [self.path / pattern.format(number) for number in numbers]

    def config(self, name: str) -> JsonObject:
        """The content of a JSON file; {} if it is missing.

        Raises:
            CheckpointError: it cannot be read, or is not a mapping.
        """
        file = self.path / name
        if not file.exists():
            return {}
        content = read_json(file)
        if not isinstance(content, dict):
            raise CheckpointError(f"{file} has a {type(content).__name__}, not a mapping of settings")
        return content
