"""Every error Ratchet raises on purpose, in one tree.

    RatchetError
    |- UserError                 the user can mend it: the command line prints the message alone
    |  |- ConfigError            (ValueError)  unknown key, wrong type, values that contradict
    |  |- DataError              (ValueError)  a problem file or pool that cannot be used
    |  |- ModelError             (ValueError)  a model folder that cannot be loaded
    |  |- BudgetError            (ValueError)  a budget that cannot buy one unit of a strategy
    |  |- TrackingError          MLflow or Prefect did not answer at the start
    |  |- LockedError            another round holds the loop (exit code 4)
    |  `- DiskError              (OSError)     no space, or a folder that cannot be written
    |- BudgetExceeded            a strategy asked for more than its budget; the scheduler ends it cleanly
    |- EngineError               the engine failed in the middle of a search
    |- VerifierError             a verifier's scores cannot be used: that problem is marked failed
    |- CorruptArtefact           a committed file no longer matches its manifest
    |- TrainingError             non-finite loss, no trainable tokens, no steps: the old model is kept
    `- StageFailed               a stage's child process ended with an error

A message names the value and the way out. Programmer errors are `assert`s. Every error pickles: it takes its
message as its only argument.
"""


class RatchetError(Exception):
    """Base of everything Ratchet raises on purpose."""

    exit_code = 1


class UserError(RatchetError):
    """Something the user can mend; shown without a traceback."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used."""

    exit_code = 2


class DataError(UserError, ValueError):
    """A data file that cannot be used."""


class ModelError(UserError, ValueError):
    """A model folder or name that cannot be loaded."""


class BudgetError(UserError, ValueError):
    """A budget too small for one unit of the strategy it was given to."""

    exit_code = 2


class TrackingError(UserError):
    """A tracking or orchestration server that was asked for does not answer."""


class LockedError(UserError):
    """Another process is writing this loop."""

    exit_code = 4


class DiskError(UserError, OSError):
    """Not enough disk space, or a folder that cannot be written."""


class BudgetExceeded(RatchetError):
    """Raised inside a strategy by its metered handle; nothing was spent by the refused call."""


class EngineError(RatchetError):
    """The engine failed; what was finished before is kept."""


class VerifierError(RatchetError):
    """A verifier returned no usable score for a problem; it is marked failed, and nothing votes."""


class CorruptArtefact(RatchetError):
    """A committed artefact does not match its manifest."""


class TrainingError(RatchetError):
    """Training produced nothing usable; the champion is untouched."""


class StageFailed(RatchetError):
    """A stage's child process failed; its log says why."""
