"""DICOM structured reports (TID 1500): what was measured within the segments of a DICOM-SEG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import isfinite
from pathlib import Path

import highdicom
from highdicom import sr
from highdicom.sr import CodedConcept
from pydicom import Dataset, dcmread
from pydicom.sr.codedict import codes as concepts
from pydicom.sr.coding import Code
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    MRImageStorage,
)

from delineate.io.dicom_seg import UTF_8, copying
from delineate.io.files import open_file, writing_beside

DEVICE_UID = "2.25.191934846071236219217402264326306518043"
"""Delineate as an observer: made once, at random."""

ABOVE_THRESHOLD = CodedConcept("ABOVE", "99DELINEATE", "Share of voxels at or above threshold")
"""A code of our own; the standard has none. The tracking identifier beside it says which threshold."""

_ML = CodedConcept("ml", "UCUM", "Milliliter")
_UNITS = {"%": concepts.UCUM.Percent, "HU": concepts.UCUM.HounsfieldUnit}
_BY_UNIT = {"%": concepts.DCM.FatFraction, "HU": concepts.DCM.AttenuationCoefficient}
_STATISTICS = {
    "mean": concepts.SCT.Mean,
    "median": concepts.SCT.Median,
    "sd": concepts.SCT.StandardDeviation,
}
_CT = {CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage}
_MR = {MRImageStorage, EnhancedMRImageStorage, LegacyConvertedEnhancedMRImageStorage}


@dataclass(frozen=True)
class Reading:
    """A quantity within a segment; ``about`` says in words what was measured, where and with which threshold.

    ``unit`` is ``%`` for a fat fraction, ``HU``, or empty if unknown. ``signal``: it is a channel of the scan, not a
    map of something else. What is undefined (NaN) is left out of a report.
    """

    about: str
    unit: str
    signal: bool
    mean: float
    median: float
    sd: float
    above_threshold_percent: float


@dataclass(frozen=True)
class Readings:
    """What was measured within a segment."""

    volume_ml: float
    quantities: Sequence[Reading] = ()


def write_report(path: Path, segmentation: Path, readings: Mapping[str, Readings]) -> None:
    """Write what was measured, by the labels of segments, as a report that refers to a DICOM-SEG and to its source.

    Patient and study are those of the segmentation; each segment is found to be what it is coded as there. Raises
    :class:`BadFormat` where headers are missing or garbled, and :class:`OutputError`.
    """
    with open_file(segmentation) as file:
        seg = dcmread(file, stop_before_pixels=True)
    with copying(segmentation):
        report = _report(seg, readings)
    with writing_beside(path) as beside:
        report.save_as(beside, enforce_file_format=True)


def _report(seg: Dataset, readings: Mapping[str, Readings]) -> sr.ComprehensiveSR:
    source = seg.ReferencedSeriesSequence[0]
    kind = source.ReferencedInstanceSequence[0].ReferencedSOPClassUID
    observer = sr.ObserverContext(
        concepts.DCM.Device,
        sr.DeviceObserverIdentifyingAttributes(
            uid=DEVICE_UID, name="Delineate", manufacturer_name="Delineate", serial_number=version("delineate")
        ),
    )
    groups = [
        _group(seg, segment, readings[segment.SegmentLabel], source.SeriesInstanceUID, kind)
        for segment in seg.SegmentSequence
        if segment.SegmentLabel in readings
    ]
    procedure = concepts.SCT.ImagingProcedure
    if kind in _CT | _MR:
        procedure = concepts.LN.CTUnspecifiedBodyRegion if kind in _CT else concepts.LN.MRIUnspecifiedBodyRegion
    return sr.ComprehensiveSR(
        evidence=[seg],
        content=sr.MeasurementReport(
            observation_context=sr.ObservationContext(observer_device_context=observer),
            procedure_reported=procedure,
            imaging_measurements=groups,
        )[0],
        series_instance_uid=highdicom.UID(),
        series_number=int(seg.SeriesNumber or 0) + 1000,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="Delineate",
        manufacturer_model_name="Delineate",
        software_versions=version("delineate"),
        series_description="Delineate: not for diagnosis",
        specific_character_set=UTF_8,
        is_complete=True,
    )


def _group(
    seg: Dataset, segment: Dataset, readings: Readings, series: str, kind: str
) -> sr.VolumetricROIMeasurementsAndQualitativeEvaluations:
    measurements = [sr.Measurement(concepts.SCT.Volume, readings.volume_ml, _ML)]
    for one in readings.quantities:
        about = sr.TrackingIdentifier(identifier=one.about)
        values = [(getattr(one, name), derivation) for name, derivation in _STATISTICS.items()]
        measurements += [
            sr.Measurement(
                _concept(one, kind),
                value,
                _UNITS.get(one.unit, concepts.UCUM.NoUnits),
                derivation=derivation,
                tracking_identifier=about,
            )
            for value, derivation in values
            if isfinite(value)
        ]
        if isfinite(share := one.above_threshold_percent):
            measurements.append(
                sr.Measurement(ABOVE_THRESHOLD, share, concepts.UCUM.Percent, tracking_identifier=about)
            )
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(identifier=segment.SegmentLabel),
        referenced_segment=sr.ReferencedSegment(
            seg.SOPClassUID,
            seg.SOPInstanceUID,
            int(segment.SegmentNumber),
            source_series=sr.SourceSeriesForSegmentation(series),
        ),
        finding_category=_coded(segment.SegmentedPropertyCategoryCodeSequence[0]),
        finding_type=_coded(segment.SegmentedPropertyTypeCodeSequence[0]),
        algorithm_id=sr.AlgorithmIdentification(name="Delineate", version=version("delineate")),
        measurements=measurements,
    )


def _concept(reading: Reading, kind: str) -> Code:
    """What is measured, as far as it is known: a fat fraction, attenuation, an MR signal, or just a quantity."""
    signal = concepts.DCM.MRSignalIntensity if reading.signal and kind in _MR else concepts.SCT.Quantity
    return _BY_UNIT.get(reading.unit, signal)


def _coded(code: Dataset) -> CodedConcept:
    return CodedConcept(code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning)
