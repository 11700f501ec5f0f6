"""Globs as RE2 expressions, which match any name in linear time."""

from __future__ import annotations

from pipeline.errors import ConfigError


def pattern_part(base: str) -> str:
    """The part of a path or URL from its first component with `*`, `?` or `[` on; "" without any."""
    parts = base.split("/")
    first = next((index for index, part in enumerate(parts) if any(mark in part for mark in "*?[")), len(parts))
    return "/".join(parts[first:])


def translate(glob: str) -> str:
    """A glob as an RE2 expression: `**` any number of folders, `*` and `?` within one name, `[...]` one character."""
    if not glob or glob.startswith("/"):
        raise ConfigError(f"pattern {glob!r}: must be a relative glob such as '*.mp4' or 'a/**/*.mkv'")
    parts = glob.split("/")
    texts = [_translate_name(part) for part in parts]
    folders = "".join("(.*/)?" if part == "**" else f"{text}/" for part, text in zip(parts[:-1], texts, strict=False))
    return f"(?s:{folders}{'.*' if parts[-1] == '**' else texts[-1]})"


def _translate_name(glob: str) -> str:
    result, rest = "", glob
    while rest:
        end = rest.find("]", 3 if rest.startswith("[!") else 2)
        if rest[0] == "[" and end > 0:
            negated, members = rest[1] == "!", rest[1:end].removeprefix("!")
            result += ("[^" if negated else "[") + "".join(
                one if one == "-" else f"\\x{{{ord(one):x}}}" for one in members
            )
            result += "/]" if negated else "]"
            rest = rest[end + 1 :]
        else:
            result += {"*": "[^/]*", "?": "[^/]"}.get(rest[0], f"\\x{{{ord(rest[0]):x}}}")
            rest = rest[1:]
    return result
