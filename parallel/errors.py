"""What a user got wrong, in one message. Imports nothing: the command line reads it before torch is loaded."""
import difflib
from collections.abc import Iterable

__all__ = ["RunError", "UserError", "missing_package", "nearest", "raise_problems"]


class UserError(ValueError):
    """A user's mistake: one message, no traceback. `interlace` prints it and exits with 2. problems: those of `raise_problems`."""

    problems: tuple[str, ...] = ()


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice closest to `word` in spelling, or None when nothing comes close."""
    lowered = {c.lower(): c for c in choices}
    found = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    return lowered[found[0]] if found else None


def missing_package(error: Exception) -> str:
    """What to say of an import of somebody else's package that is not there; "" for any other error."""
    name = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0]
    return f"the package {name} must be installed beside interlace, got none; pip install {name}" if name and name != "interlace" else ""


def raise_problems(what: str, problems: list[str]) -> None:
    """Raise one UserError that holds every problem; return when there is none."""
    if problems:
        many = "\n  - ".join([f"{what}: {len(problems)} problems", *problems])
        error = UserError(f"{what}: {problems[0]}" if len(problems) == 1 else many)
        error.problems = tuple(problems)
        raise error


class RunError(RuntimeError):
    """A run that cannot go on, in one message without a traceback. `interlace` prints it and exits with 1."""
