"""Which subjects are trained on and which are held out: folds that no patient straddles, and a locked test set.

Alternatively, a fixed split: one training set, validation subjects, and the test set.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import model_validator

from delineate.core.subject import Subject
from delineate.datasets.dataset import Dataset
from delineate.errors import BadSplit, DelineateError
from delineate.io.documents import Document

_log = logging.getLogger(__name__)
_FIX = "correct it, or delete it to have a new one made"


@dataclass(frozen=True)
class Split:
    """Subjects' names by fold, and the test set that nothing is trained or selected on.

    A single fold makes it a fixed split: that fold is the training set, and the test set is held out.
    ``validation`` lists the validation subjects, whichever fold is held out; if empty, training draws its own from the
    other folds. ``always_train`` subjects are in training whichever fold is held out, and never used for validation.
    """

    folds: tuple[tuple[str, ...], ...]
    test: tuple[str, ...] = ()
    seed: int = 0
    validation: tuple[str, ...] = ()
    always_train: tuple[str, ...] = ()

    @property
    def fixed(self) -> bool:
        """Whether it is one training set and one test set."""
        return len(self.folds) == 1

    def held_out(self, fold: int) -> tuple[str, ...]:
        """Subjects of one fold; for a fixed split, the test set. Raises :class:`BadSplit` for another fold."""
        if not 0 <= fold < len(self.folds):
            there = "fold 0 only, its test set" if self.fixed else f"folds 0 to {len(self.folds) - 1}"
            raise BadSplit(f"there is no fold {fold}", fix=f"the split has {there}")
        return self.test if self.fixed else self.folds[fold]

    def training_of(self, fold: int | None) -> tuple[str, ...]:
        """Subjects of all other folds (of all folds if none is held out) and those always trained on, sorted."""
        out = () if fold is None else self.held_out(fold)
        return tuple(sorted({*self.always_train}.union(*self.folds) - {*out}))

    @property
    def subjects(self) -> frozenset[str]:
        return frozenset((*self.test, *self.validation, *self.always_train)).union(*self.folds)

    def with_always_train(self, names: Iterable[str]) -> Split:
        """The same split with these subjects moved to ``always_train``: in training whichever fold is held out.

        Raises :class:`BadSplit` for names that the split does not have, and where they are all that is held out.
        """
        moved = set(names)
        if strangers := sorted(moved - self.subjects):
            raise BadSplit(
                f"{', '.join(strangers)} cannot always be trained on: they are not in the split",
                fix="check the subjects' names",
            )
        left = {part: tuple(name for name in names if name not in moved) for part, names in self._parts.items()}
        kept = ("the training set", "always_train")
        if emptied := [part for part, names in self._parts.items() if names and not left[part] and part not in kept]:
            raise BadSplit(
                f"training always on {', '.join(sorted(moved))[:300]} leaves nobody in {', '.join(emptied)}",
                fix="draw with another seed, or ask for larger parts or fewer folds",
            )
        *folds, test, validation, always = left.values()
        return Split(tuple(folds), test, self.seed, validation, tuple(sorted({*always, *moved})))

    @property
    def _parts(self) -> dict[str, tuple[str, ...]]:
        """Subjects' names by the name of their part."""
        folds = (
            {"the training set": self.folds[0]} if self.fixed else {f"fold {i}": f for i, f in enumerate(self.folds)}
        )
        others = {"the test set": self.test, "validation": self.validation, "always_train": self.always_train}
        return folds | others

    def unassigned(self, subjects: Iterable[Subject]) -> tuple[str, ...]:
        """Subjects added after the split was made: in no fold and not in the test set."""
        return tuple(subject.id for subject in subjects if subject.id not in self.subjects)


def make_split(
    subjects: Sequence[Subject],
    folds: int = 5,
    test_fraction: float = 0.0,
    seed: int = 0,
    *,
    test_last: int = 0,
    validation_fraction: float = 0.0,
) -> Split:
    """Assign patients to k folds, balanced over sites, after locking away a test set stratified by site.

    A pure function of the subjects' names, patients and sites, in any order, and of the seed. Folds differ by at
    most one patient from each site, and by at most one in total. ``test_last`` locks away the last subjects by
    name instead (numbers compared as numbers). ``validation_fraction`` sets aside a share of every site for validation.
    One fold is a fixed split, which needs a test set. Raises :class:`BadSplit` if there are fewer patients than folds.
    """
    shares = (test_fraction, validation_fraction)
    if folds < 1 or not all(0 <= share < 1 for share in shares) or sum(shares) >= 1:
        raise BadSplit(
            f"{folds} folds, test fraction {test_fraction:g}, validation fraction {validation_fraction:g}",
            fix="give at least one fold, and fractions from 0 to 1 that add up to less than 1",
        )
    if test_fraction and test_last:
        raise BadSplit(
            "the test set cannot be both a fraction of the patients and the last subjects", fix="give one of them"
        )
    if folds == 1 and not (test_fraction or test_last):
        raise BadSplit("one fold without a test set holds nothing out", fix="ask for two folds, or for a test set")
    rng = np.random.default_rng(seed)
    test = _last(subjects, test_last)
    rest = [subject for subject in subjects if subject.id not in test]
    by_site = _permuted(rest, rng)
    patients_of = {site: len(groups) for site, groups in by_site.items()}
    test += _taken(by_site, patients_of, test_fraction)
    validation = _taken(by_site, patients_of, validation_fraction)
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
    ordered = [tuple(sorted(part)) for part in (*parts, test, validation)]
    return Split(tuple(ordered[:-2]), ordered[-2], seed, ordered[-1])


def drawn_over_sites(subjects: Sequence[Subject], wanted: int, rng: np.random.Generator) -> tuple[str, ...]:
    """Names of whole patients with at least ``wanted`` subjects in total, stratified by site.

    A site's share is in proportion to its patients, to within less than one patient.
    """
    by_site = _permuted(subjects, rng)
    counts = {site: len(groups) for site, groups in by_site.items()}
    names: list[str] = []
    for patients in range(1, sum(counts.values()) + 1):
        if len(names) >= wanted:
            break
        shares = _shares(counts, patients / sum(counts.values()), counts)
        names = [name for site, share in shares.items() for group in by_site[site][:share] for name in group]
    return tuple(sorted(names))


def sites_of(subjects: Iterable[Subject]) -> tuple[str, ...]:
    """Sites, sorted: the order of folds in :func:`leave_one_site_out`."""
    return tuple(sorted({subject.site for subject in subjects}))


def leave_one_site_out(subjects: Sequence[Subject]) -> Split:
    """A fold for each site of :func:`sites_of`.

    Raises :class:`BadSplit` if there is only one site, or a patient was scanned at several.
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
    test_last: int = 0,
    validation_fraction: float = 0.0,
    always_train: Sequence[str] = (),
) -> Split:
    """The split in a JSON file, which is made (by default with five folds and no test set) if it does not exist.

    An existing file decides; the seed is only for making one. Raises :class:`BadSplit` if it is
    damaged, names subjects that the data set does not have, separates a patient's scans, or lacks the
    folds or sets asked for. Subjects added later are left out with a logged warning: to include
    them, delete the file and accept new folds.
    """
    if not path.exists():
        split = make_split(
            dataset.subjects,
            folds or 5,
            test_fraction or 0.0,
            seed,
            test_last=test_last,
            validation_fraction=validation_fraction,
        ).with_always_train(always_train)
        check_split(split, dataset)
        save_split(path, split)
        return split
    split = load_split(path)
    check_split(split, dataset, str(path))
    if folds is not None and folds != len(split.folds):
        raise BadSplit(
            f"'{path}' has {len(split.folds)} folds, not the requested {folds}", fix="ask for these, or name another"
        )
    for asked, part, what in (
        (test_fraction or test_last, split.test, "test set"),
        (validation_fraction, split.validation, "validation subjects"),
        (set(always_train) - set(split.always_train), (), "such always_train subjects"),
    ):
        if asked and not part:
            raise BadSplit(
                f"'{path}' has no {what}, which the options ask for", fix="leave the option out, or name another file"
            )
    if new := split.unassigned(dataset.subjects):
        _log.warning("%d subjects are in no part of '%s' and are left out: %s", len(new), path, ", ".join(new))
    return split


class SplitFile(Document):
    """A split as written to its file: ``folds``, or one ``training`` set, and the other parts."""

    error: ClassVar[type[DelineateError]] = BadSplit
    fix: ClassVar[str] = _FIX

    folds: tuple[tuple[str, ...], ...] | None = None
    training: tuple[str, ...] | None = None
    test: tuple[str, ...]
    validation: tuple[str, ...] = ()
    always_train: tuple[str, ...] = ()
    seed: int = 0

    @model_validator(mode="after")
    def _one_kind(self) -> SplitFile:
        if (self.training is None) == (not self.folds):
            raise ValueError("it needs either folds or training")
        return self

    @classmethod
    def of(cls, split: Split) -> SplitFile:
        """The file's form of a split."""
        folds = {"training": split.folds[0]} if split.fixed else {"folds": split.folds}
        others = {name: getattr(split, name) for name in ("test", "validation", "always_train", "seed")}
        return cls.model_validate(folds | others)

    def split(self) -> Split:
        """The split that was written."""
        folds = self.folds or (self.training or (),)
        return Split(folds, self.test, self.seed, self.validation, self.always_train)


def save_split(path: Path, split: Split) -> None:
    """Write the split as JSON, all or nothing. Raises :class:`OutputError`."""
    SplitFile.of(split).write(path)


def load_split(path: Path) -> Split:
    """Read a split. Raises :class:`BadSplit` if the file is not one, or names a subject twice."""
    split = SplitFile.read(path).split()
    counts = Counter(name for part in split._parts.values() for name in part)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise BadSplit(f"'{path}' names {', '.join(twice)[:300]} in several parts", fix="keep each in one")
    return split


def check_split(split: Split, dataset: Dataset, where: str = "the split") -> None:
    """Raise :class:`BadSplit` if the split names unknown subjects or separates a patient's scans."""
    by_name = {subject.id: subject for subject in dataset.subjects}
    if strangers := sorted(split.subjects - set(by_name)):
        raise BadSplit(
            f"'{where}' names {', '.join(strangers)}, which '{dataset.name}' does not have",
            fix="bring them back, or name another file",
        )
    _refuse_straddling({part: [by_name[name] for name in names] for part, names in split._parts.items()})


def _refuse_straddling(parts: dict[str, list[Subject]]) -> None:
    where: dict[str, set[str]] = defaultdict(set)
    for part, subjects in parts.items():
        for subject in subjects:
            where[subject.patient].add(part)
    if torn := [f"{patient} ({', '.join(sorted(found))})" for patient, found in where.items() if len(found) > 1]:
        raise BadSplit(f"patients are in several parts: {'; '.join(torn)}", fix="keep each patient in one")


def _patients(subjects: Sequence[Subject]) -> dict[str, list[list[str]]]:
    """Subjects' names by patient, by site; a patient scanned at several sites counts at the one with the most scans."""
    patients: dict[str, list[Subject]] = defaultdict(list)
    for subject in sorted(subjects, key=lambda s: s.id):
        patients[subject.patient].append(subject)
    by_site: dict[str, list[list[str]]] = defaultdict(list)
    for _, group in sorted(patients.items()):
        sites = [subject.site for subject in group]
        by_site[max(sorted(set(sites)), key=sites.count)].append([subject.id for subject in group])
    return dict(sorted(by_site.items()))


def _permuted(subjects: Sequence[Subject], rng: np.random.Generator) -> dict[str, list[list[str]]]:
    """:func:`_patients`, those of each site in a random order."""
    return {site: [groups[i] for i in rng.permutation(len(groups))] for site, groups in _patients(subjects).items()}


def _taken(by_site: dict[str, list[list[str]]], counts: dict[str, int], fraction: float) -> list[str]:
    """Remove the first patients of each site, a fraction of its ``counts``, and return their subjects' names."""
    shares = _shares(counts, fraction, {site: len(groups) for site, groups in by_site.items()})
    taken = [name for site, share in shares.items() for group in by_site[site][:share] for name in group]
    for site, share in shares.items():
        del by_site[site][:share]
    return taken


def in_order(subjects: Iterable[Subject]) -> list[Subject]:
    """Subjects sorted by name, with numbers in names compared as numbers: case9 before case10."""
    return sorted(subjects, key=lambda s: [int(p) if i % 2 else p for i, p in enumerate(re.split(r"(\d+)", s.id))])


def _last(subjects: Sequence[Subject], count: int) -> list[str]:
    if not count:
        return []
    if count >= len(subjects):
        raise BadSplit(f"the last {count} of {len(subjects)} subjects leave none to train on", fix="ask for fewer")
    ordered = in_order(subjects)
    first, last = ordered[: len(ordered) - count], ordered[len(ordered) - count :]
    _refuse_straddling({"the last subjects": last, "those before": first})
    return [subject.id for subject in last]


def _shares(counts: dict[str, int], fraction: float, room: dict[str, int]) -> dict[str, int]:
    """How many from each site, rounded so that the sum is right, too (largest remainders), if there is room for it."""
    exact = {site: count * fraction for site, count in counts.items()}
    shares = {site: int(share) for site, share in exact.items()}
    # Any fraction above 0 takes at least one patient.
    missing = max(round(sum(exact.values())), 1 if fraction else 0) - sum(shares.values())
    for _ in range(missing):
        if open_sites := [site for site in exact if shares[site] < room[site]]:
            shares[max(open_sites, key=lambda site: exact[site] - shares[site])] += 1
    return shares
