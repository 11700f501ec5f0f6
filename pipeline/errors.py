"""The three kinds of failure a stage knows: the input is bad, the storage had a bad moment, the config is wrong."""

from __future__ import annotations


class TokenreelError(Exception):
    """Base of every error that tokenreel raises on purpose."""


class ConfigError(TokenreelError):
    """A setting or an argument is wrong; raised before any work. The CLI exits with 2."""


class DatasetError(TokenreelError):
    """A dataset on disk is damaged, foreign or was made from other inputs. The CLI exits with 1."""


class TransientIO(TokenreelError):
    """Storage failed in a way that may pass; the caller may retry."""


class OutputError(OSError):
    """What a job writes cannot be written: the disk's fault, never that of the input at hand."""


class BadVideo(TokenreelError):
    """One input cannot become a sample; permanent, so it is rejected with its reason and the job goes on.

    Args:
        reject_class: one of `schema.REJECT_CLASSES`, what a person filters rejects by.
        reason: one line for a person: the operation, the value, what was allowed.
        stderr: the tail of what ffmpeg said, as it said it but for addresses; "" where it said nothing.
    """

    def __init__(self, reject_class: str, reason: str, stderr: str = "") -> None:
        super().__init__(reject_class, reason, stderr)
        self.reject_class = reject_class
        self.reason = reason
        self.stderr = stderr

    def __str__(self) -> str:
        return f"{self.reject_class}: {self.reason}"
