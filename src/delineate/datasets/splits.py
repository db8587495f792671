"""Which subjects are trained on and which are held out: folds that no patient straddles, and a locked test set."""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from delineate.core.subject import Subject
from delineate.datasets.dataset import Dataset
from delineate.errors import BadSplit
from delineate.io.files import read_json, writing_beside

_log = logging.getLogger(__name__)
_FIX = "delete it, and a new one is made"


@dataclass(frozen=True)
class Split:
    """Subjects' names by fold, and the test set that nothing is trained or chosen on."""

    folds: tuple[tuple[str, ...], ...]
    test: tuple[str, ...] = ()
    seed: int = 0

    def held_out(self, fold: int) -> tuple[str, ...]:
        """Subjects of one fold. Raises :class:`BadSplit` for a fold that does not exist."""
        if not 0 <= fold < len(self.folds):
            raise BadSplit(f"there is no fold {fold}", fix=f"the split has folds 0 to {len(self.folds) - 1}")
        return self.folds[fold]

    def training_of(self, fold: int) -> tuple[str, ...]:
        """Subjects of all other folds, sorted; never the test set."""
        out = set(self.held_out(fold))
        return tuple(sorted(name for names in self.folds for name in names if name not in out))

    @property
    def subjects(self) -> frozenset[str]:
        return frozenset(self.test).union(*self.folds)

    def unassigned(self, subjects: Iterable[Subject]) -> tuple[str, ...]:
        """Subjects added after the split was made: in no fold and not in the test set."""
        return tuple(subject.id for subject in subjects if subject.id not in self.subjects)


def make_split(subjects: Sequence[Subject], folds: int = 5, test_fraction: float = 0.0, seed: int = 0) -> Split:
    """Assign patients to k folds, balanced over sites, after locking away a test set with a share of every site.

    A pure function of the subjects' names, patients and sites, in any order, and of the seed. Folds
    differ by at most one patient from each site, and by at most one in all. Raises
    :class:`BadSplit` where there are fewer patients than folds.
    """
    if folds < 2 or not 0 <= test_fraction < 1:
        raise BadSplit(
            f"{folds} folds, test fraction {test_fraction:g}", fix="give at least two folds, and a fraction from 0 to 1"
        )
    rng = np.random.default_rng(seed)
    by_site = {site: [groups[i] for i in rng.permutation(len(groups))] for site, groups in _patients(subjects).items()}
    test: list[str] = []
    for site, count in _shares({site: len(groups) for site, groups in by_site.items()}, test_fraction).items():
        test += (name for group in by_site[site][:count] for name in group)
        del by_site[site][:count]
    left = sum(map(len, by_site.values()))
    if left < folds:
        raise BadSplit(f"{left} patients are left for {folds} folds", fix="ask for fewer folds or a smaller test set")

    parts: list[list[str]] = [[] for _ in range(folds)]
    patients = [0] * folds
    for groups in by_site.values():
        of_site = [0] * folds
        for group in groups:
            fold = min(range(folds), key=lambda k: (of_site[k], patients[k], len(parts[k])))
            parts[fold] += group
            of_site[fold] += 1
            patients[fold] += 1
    return Split(tuple(tuple(sorted(part)) for part in parts), tuple(sorted(test)), seed)


def sites_of(subjects: Iterable[Subject]) -> tuple[str, ...]:
    """Sites, sorted: the order of folds in :func:`leave_one_site_out`."""
    return tuple(sorted({subject.site for subject in subjects}))


def leave_one_site_out(subjects: Sequence[Subject]) -> Split:
    """A fold for each site of :func:`sites_of`.

    Raises :class:`BadSplit` where there is only one site, or a patient was scanned at several.
    """
    sites = sites_of(subjects)
    if len(sites) < 2:
        raise BadSplit(
            f"all subjects are from one site ({sites[0] if sites else 'none'})", fix="name sites in sites.csv"
        )
    _refuse_straddling({site: [s for s in subjects if s.site == site] for site in sites})
    return Split(tuple(tuple(sorted(s.id for s in subjects if s.site == site)) for site in sites))


def load_or_make_split(
    path: Path,
    dataset: Dataset,
    *,
    folds: int | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
) -> Split:
    """The split in a JSON file, which is made (by default with five folds and no test set) if it does not exist.

    An existing file decides; the seed is only for making one. Raises :class:`BadSplit` where it is
    damaged, names subjects that the data set does not have, separates a patient's scans, or lacks the
    folds or test set asked for. Subjects added later are left out with a logged warning: to include
    them, delete the file and accept new folds.
    """
    if not path.exists():
        split = make_split(dataset.subjects, folds or 5, test_fraction or 0.0, seed)
        save_split(path, split)
        return split
    split = load_split(path)
    check_split(split, dataset, str(path))
    if folds is not None and folds != len(split.folds):
        raise BadSplit(
            f"'{path}' has {len(split.folds)} folds, {folds} are asked for", fix="ask for these, or name another"
        )
    if test_fraction and not split.test:
        raise BadSplit(f"'{path}' has no test set, but one is asked for", fix="do without, or name another file")
    if new := split.unassigned(dataset.subjects):
        _log.warning("%d subjects are in no part of '%s' and are left out: %s", len(new), path, ", ".join(new))
    return split


def save_split(path: Path, split: Split) -> None:
    """Write the split as JSON, all or nothing. Raises :class:`OutputError`."""
    about = {"seed": split.seed, "folds": [list(names) for names in split.folds], "test": list(split.test)}
    with writing_beside(path) as beside:
        beside.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def load_split(path: Path) -> Split:
    """Read a split. Raises :class:`BadSplit` where the file is not one, or names a subject twice."""
    about = read_json(path, BadSplit, fix=_FIX)
    folds, test, seed = (about.get(key) for key in ("folds", "test", "seed"))
    if not (isinstance(folds, list) and folds and all(map(_is_names, (*folds, test))) and type(seed) is int):
        raise BadSplit(f"'{path}' is not a split: it needs folds, test (lists of names) and seed", fix=_FIX)
    parts = [tuple(names) for names in (*folds, test)]
    split = Split(tuple(parts[:-1]), parts[-1], seed)
    counts = Counter(name for part in parts for name in part)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise BadSplit(f"'{path}' names {', '.join(twice)[:300]} in several parts", fix="keep each in one")
    return split


def _is_names(part: object) -> bool:
    return isinstance(part, list) and all(isinstance(name, str) for name in part)


def check_split(split: Split, dataset: Dataset, where: str = "the split") -> None:
    """Raise :class:`BadSplit` where the split names unknown subjects or separates a patient's scans."""
    by_name = {subject.id: subject for subject in dataset.subjects}
    if strangers := sorted(split.subjects - set(by_name)):
        raise BadSplit(
            f"'{where}' names {', '.join(strangers)}, which '{dataset.name}' does not have",
            fix="bring them back, or name another file",
        )
    parts = {f"fold {i}": names for i, names in enumerate(split.folds)} | {"the test set": split.test}
    _refuse_straddling({part: [by_name[name] for name in names] for part, names in parts.items()})


def _refuse_straddling(parts: dict[str, list[Subject]]) -> None:
    where: dict[str, set[str]] = defaultdict(set)
    for part, subjects in parts.items():
        for subject in subjects:
            where[subject.patient].add(part)
    if torn := [f"{patient} ({', '.join(sorted(found))})" for patient, found in where.items() if len(found) > 1]:
        raise BadSplit(f"patients are in several parts: {'; '.join(torn)}", fix="keep each patient in one")


def _patients(subjects: Sequence[Subject]) -> dict[str, list[list[str]]]:
    """Subjects' names by patient, by site; a patient scanned at several sites counts at the one with most scans."""
    patients: dict[str, list[Subject]] = defaultdict(list)
    for subject in sorted(subjects, key=lambda s: s.id):
        patients[subject.patient].append(subject)
    by_site: dict[str, list[list[str]]] = defaultdict(list)
    for _, group in sorted(patients.items()):
        sites = [subject.site for subject in group]
        by_site[max(sorted(set(sites)), key=sites.count)].append([subject.id for subject in group])
    return dict(sorted(by_site.items()))


def _shares(counts: dict[str, int], fraction: float) -> dict[str, int]:
    """How many from each site, rounded so that the sum is right too (largest remainders)."""
    exact = {site: count * fraction for site, count in counts.items()}
    shares = {site: int(share) for site, share in exact.items()}
    # Whoever asks for a test set gets one.
    missing = max(round(sum(exact.values())), 1 if fraction else 0) - sum(shares.values())
    for site in sorted(exact, key=lambda site: exact[site] - shares[site], reverse=True)[:missing]:
        shares[site] += 1
    return shares
