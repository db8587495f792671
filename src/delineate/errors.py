"""Every error that Delineate raises on purpose, with the stable code it carries.

::

    DelineateError
     ├── ScanError                   a file or folder cannot be used as it is
     │    ├── Truncated                E_TRUNCATED
     │    ├── BadGeometry              E_GEOMETRY
     │    ├── AmbiguousOrientation     E_AMBIGUOUS_ORIENTATION
     │    ├── BadShape                 E_SHAPE
     │    ├── TooLarge                 E_TOO_LARGE
     │    ├── BadPath                  E_PATH
     │    ├── BadVoxels                E_NONFINITE
     │    ├── ConstantScan             E_CONSTANT
     │    ├── BadFormat                E_FORMAT
     │    ├── GridMismatch             E_GRID_MISMATCH
     │    ├── BadLabelValue            E_LABEL_VALUE
     │    └── SeriesError              DICOM slices that do not form one volume
     │         ├── SeveralSeries       E_SEVERAL_SERIES
     │         ├── MissingSlice        E_MISSING_SLICE
     │         ├── DuplicateSlice      E_DUPLICATE_SLICE
     │         ├── MixedOrientations   E_MIXED_ORIENTATIONS
     │         ├── SeveralTimes        E_SEVERAL_TIMES
     │         ├── TiltedGantry        E_GANTRY_TILT
     │         └── UnevenSlices        E_UNEVEN_SLICES
     ├── DatasetError                a collection of scans cannot be used as it is
     │    ├── UnknownLayout            E_LAYOUT
     │    ├── MissingFile              E_MISSING
     │    ├── DuplicateSubject         E_DUPLICATE
     │    ├── BrokenSubjects           E_BROKEN_SUBJECTS
     │    ├── TooFewSubjects           E_TOO_FEW
     │    └── BadSplit                 E_SPLIT
     ├── RecipeError                 E_RECIPE      a recipe or setting is not valid
     ├── BundleError                 E_BUNDLE      a bundle is damaged or does not fit
     ├── UnknownKey                  E_KEY         the key that hides names is damaged, or is a different one
     ├── WeightsError                E_WEIGHTS     published weights are missing, damaged or for another network
     ├── CannotImport                E_IMPORT      a model of other software cannot become a bundle
     ├── CannotFetch                 E_FETCH       a packed model cannot be fetched, or is not what was published
     ├── CannotExport                E_EXPORT      a bundle cannot become a file for other software
     ├── CannotUndo                  E_UNDO        a preprocessing step cannot be undone
     ├── TrainingError               E_TRAINING    training cannot continue
     │    └── OutOfMemory              E_MEMORY      … because it needs more memory than there is
     ├── RunInUse                    E_IN_USE      another training run, or server, is using the folder
     ├── StudyError                  E_STUDY       a study is not valid, or does not fit the data
     ├── ClusterError                E_CLUSTER     a cluster cannot be reached, or cannot run a study
     ├── OutputError                 E_OUTPUT      a result cannot be written
     ├── ServingError                a server and its clients
     │    ├── ProtocolError            E_PROTOCOL
     │    ├── NotIntroduced            E_HELLO
     │    ├── VersionError             E_VERSION
     │    ├── Unreachable              E_UNREACHABLE
     │    ├── Denied                   E_DENIED
     │    ├── Busy                     E_BUSY
     │    ├── Conflict                 E_CONFLICT
     │    ├── UnknownJob               E_UNKNOWN_JOB
     │    ├── UnknownModel             E_UNKNOWN_MODEL
     │    ├── Quarantined              E_QUARANTINED
     │    ├── WorkerFailed             E_WORKER
     │    └── DeadlinePassed           E_DEADLINE
     └── Cancelled                   E_CANCELLED   the caller cancelled it

Each says what is wrong and what was found (``message``), and what to do about it (``fix``).

>>> import delineate
>>> try:
...     delineate.read("lost.nii.gz")
... except delineate.errors.DelineateError as error:
...     print(error.code)
E_MISSING
"""

from __future__ import annotations

_MOST_CHARACTERS = 4000


class DelineateError(Exception):
    """Base of all errors raised on purpose: a ``code``, a ``message`` and a ``fix``, printed as one sentence.

    ``fix`` is empty where the message says it all.
    """

    code = "E_DELINEATE"

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message, fix)
        self.message, self.fix = message, fix

    def __str__(self) -> str:
        return f"{self.code}: {self.text}"

    @property
    def text(self) -> str:
        """What is wrong and what to do about it, without the code.

        Cut short where names or lists from outside make it longer than anybody would read.
        """
        text = f"{self.message}; {self.fix}" if self.fix else self.message
        return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"


class ScanError(DelineateError):
    """A file or folder cannot be used as it is."""

    code = "E_SCAN"


class Truncated(ScanError):
    """The file holds fewer (or other) bytes than its header promises."""

    code = "E_TRUNCATED"


class BadGeometry(ScanError):
    """Spacing, origin or direction is missing, not finite, or out of range."""

    code = "E_GEOMETRY"


class AmbiguousOrientation(ScanError):
    """The header holds two orientations that disagree, or nothing tells how pictures lie on their series."""

    code = "E_AMBIGUOUS_ORIENTATION"


class BadShape(ScanError):
    """The array has an empty axis, or more axes than the layout allows."""

    code = "E_SHAPE"


class TooLarge(ScanError):
    """The header asks for more voxels or bytes than the limits allow."""

    code = "E_TOO_LARGE"


class BadPath(ScanError):
    """A header names a data file outside its own folder."""

    code = "E_PATH"


class BadVoxels(ScanError):
    """Some voxels are NaN or infinite."""

    code = "E_NONFINITE"


class ConstantScan(ScanError):
    """Each channel has a single value throughout, zero or another: there is nothing to see."""

    code = "E_CONSTANT"


class BadFormat(ScanError):
    """The file is not in a known format, or its header cannot be read."""

    code = "E_FORMAT"


class GridMismatch(ScanError):
    """Two volumes that must share a grid do not share one."""

    code = "E_GRID_MISMATCH"


class BadLabelValue(ScanError):
    """A label holds a value that is not an integer, or that no target includes; or masks overlap as no target says."""

    code = "E_LABEL_VALUE"


class SeriesError(ScanError):
    """DICOM slices do not form one volume."""

    code = "E_SERIES"


class SeveralSeries(SeriesError):
    """A folder or zip holds several series where one is expected."""

    code = "E_SEVERAL_SERIES"


class MissingSlice(SeriesError):
    """A slice is missing between others."""

    code = "E_MISSING_SLICE"


class DuplicateSlice(SeriesError):
    """Two slices lie at the same position."""

    code = "E_DUPLICATE_SLICE"


class MixedOrientations(SeriesError):
    """Slices of one series do not lie in parallel planes, as localisers do."""

    code = "E_MIXED_ORIENTATIONS"


class SeveralTimes(SeriesError):
    """Each position has several slices: time points, echoes or repetitions."""

    code = "E_SEVERAL_TIMES"


class TiltedGantry(SeriesError):
    """Each slice is shifted within its plane relative to the one before."""

    code = "E_GANTRY_TILT"


class UnevenSlices(SeriesError):
    """Distances between slices differ by more than 1 %."""

    code = "E_UNEVEN_SLICES"


class DatasetError(DelineateError):
    """A collection of scans cannot be used as it is."""

    code = "E_DATASET"


class UnknownLayout(DatasetError):
    """The folder's layout is not recognised."""

    code = "E_LAYOUT"


class MissingFile(DatasetError):
    """A scan, channel, label or mask that should be there is not."""

    code = "E_MISSING"


class DuplicateSubject(DatasetError):
    """Two subjects share one name."""

    code = "E_DUPLICATE"


class BrokenSubjects(DatasetError):
    """Inspection found subjects that cannot be trained on."""

    code = "E_BROKEN_SUBJECTS"


class TooFewSubjects(DatasetError):
    """There are fewer patients than an interval needs."""

    code = "E_TOO_FEW"


class BadSplit(DatasetError):
    """A split cannot be made, or a split file does not match the data set."""

    code = "E_SPLIT"


class RecipeError(DelineateError):
    """A recipe or a setting is not valid."""

    code = "E_RECIPE"


class BundleError(DelineateError):
    """A bundle is damaged, or does not fit what it is used for."""

    code = "E_BUNDLE"


class UnknownKey(DelineateError):
    """The key that hides names is damaged, or is not the one that hid a bundle's names."""

    code = "E_KEY"


class WeightsError(DelineateError):
    """Published weights are missing, damaged, or for another network."""

    code = "E_WEIGHTS"


class CannotImport(DelineateError):
    """A model that other software trained is damaged, or uses something that a bundle cannot hold."""

    code = "E_IMPORT"


class CannotFetch(DelineateError):
    """A packed model cannot be fetched, or is not what was published."""

    code = "E_FETCH"


class CannotExport(DelineateError):
    """A bundle uses something that a file for other software cannot hold, or that file would predict otherwise."""

    code = "E_EXPORT"


class CannotUndo(DelineateError):
    """A preprocessing step cannot be undone."""

    code = "E_UNDO"


class TrainingError(DelineateError):
    """Training cannot continue."""

    code = "E_TRAINING"


class OutOfMemory(TrainingError):
    """A training needs more memory than there is."""

    code = "E_MEMORY"


class RunInUse(DelineateError):
    """Another training run, or a server, is using this folder."""

    code = "E_IN_USE"


class StudyError(DelineateError):
    """A study is not valid, does not fit the data, or its folder holds another one."""

    code = "E_STUDY"


class ClusterError(DelineateError):
    """A cluster cannot be reached, has no node that is large enough, or does not see the study's folders."""

    code = "E_CLUSTER"


class OutputError(DelineateError):
    """A result cannot be written where it was asked for."""

    code = "E_OUTPUT"


class Cancelled(DelineateError):
    """The caller's cancel token was set; nothing is left half written."""

    code = "E_CANCELLED"


class ServingError(DelineateError):
    """A server cannot do what a client asked for."""

    code = "E_SERVING"


class ProtocolError(ServingError):
    """A message is not one of ``delineate/1``."""

    code = "E_PROTOCOL"


class NotIntroduced(ServingError):
    """A connection has not said HELLO, or said it to a server that has restarted since."""

    code = "E_HELLO"


class VersionError(ServingError):
    """Client and server have no version of the protocol in common."""

    code = "E_VERSION"


class Unreachable(ServingError):
    """No server answers at an address."""

    code = "E_UNREACHABLE"


class Denied(ServingError):
    """A key or a token does not allow this."""

    code = "E_DENIED"


class Busy(ServingError):
    """The server is full, or starting or stopping; try again later."""

    code = "E_BUSY"


class Conflict(ServingError):
    """A job of this id has another content."""

    code = "E_CONFLICT"


class UnknownJob(ServingError):
    """The server has no such job of this client."""

    code = "E_UNKNOWN_JOB"


class UnknownModel(ServingError):
    """The server has no such model."""

    code = "E_UNKNOWN_MODEL"


class Quarantined(ServingError):
    """A job has ended two workers, and is not tried again."""

    code = "E_QUARANTINED"


class WorkerFailed(ServingError):
    """A worker failed in a way that is not the scan's fault."""

    code = "E_WORKER"


class DeadlinePassed(ServingError):
    """A job took longer than its deadline."""

    code = "E_DEADLINE"


def error_of(code: str, message: str, fix: str = "") -> DelineateError:
    """The error of a code, as it came from another process; one of this code's own if it is not known here."""
    above: list[type[DelineateError]] = [DelineateError]
    for kind in above:  # grows while it is walked
        if kind.code == code:
            return kind(message, fix)
        above += kind.__subclasses__()
    error = ServingError(message, fix)
    error.code = code
    return error
