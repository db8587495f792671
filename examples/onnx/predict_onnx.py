"""Segment a scan with a file that `delineate export --onnx` wrote, without Delineate. Not for diagnosis.

python predict_onnx.py MODEL.onnx LABEL.nii.gz SCAN.nii.gz [SCAN.nii.gz ...]: a scan for each channel, on one grid.
"""
# ruff: noqa: B905

import json
import sys
from itertools import product

import nibabel
import numpy as np
import onnxruntime
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform


def resample(a, sides):  # (C, X, Y, Z) to other sides, linearly, over the same extent
    places = [((np.arange(m) + 0.5) * n / m - 0.5).clip(0, n - 1) for n, m in zip(a.shape[1:], sides)]
    shares = [np.maximum(0, 1 - abs(at[:, None] - np.arange(n))) for n, at in zip(a.shape[1:], places)]
    return np.einsum("xi,yj,zk,cijk->cxyz", *shares, a, optimize=True).astype(np.float32)


def percentiles(a, shares, k=(1, 1, 1)):  # of each channel's every k-th voxel: a million at most
    while np.prod(counts := -(-np.array(a.shape[1:]) // k)) > 1e6:
        k = k + (np.arange(3) == counts.argmax())
    return np.nanpercentile(a[:, :: k[0], :: k[1], :: k[2]], shares, (1, 2, 3), keepdims=True).astype(np.float32)


model, scans = onnxruntime.InferenceSession(sys.argv[1]), [nibabel.load(path) for path in sys.argv[3:]]
about = json.loads(model.get_modelmeta().custom_metadata_map["delineate"])
(first, *steps), after, tiles, least = (about[key] for key in ("preprocessing", "postprocessing", "tiles", "threshold"))
if first != {"kind": "reorient", "to": "RAS"} or any(after.values()) or None in tiles["shape"]:
    sys.exit(f"this script cannot do one of {first}, {after}, tiles of {tiles['shape']}")
x = np.stack([nibabel.as_closest_canonical(scan).get_fdata(dtype=np.float32) for scan in scans])  # (C, X, Y, Z)
mm, sides = nibabel.affines.voxel_sizes(nibabel.as_closest_canonical(scans[0]).affine), x.shape[1:]
for step in steps:
    inside = np.where((x != 0) | (step.get("within") != "nonzero"), x, np.nan)
    match step.get("align") != "monai" and not step.get("every_voxel") and step:
        case {"kind": "resample", "axes": "all", "order": "linear", "across": "interpolate"} if x.shape[1:] == sides:
            x = resample(x, [max(1, round(n * d / (to or d))) for n, d, to in zip(sides, mm, step["spacing_mm"])])
        case {"kind": "clip_percentiles", "scope": "patient", "channels": None}:
            x = np.nan_to_num(inside.clip(*percentiles(inside, [step["lower"], step["upper"]])))
        case {"method": "zscore", "scope": "patient", "within": "all" | "nonzero", "channels": None}:  # normalise
            mean, deviation = (of(inside, (1, 2, 3), float, keepdims=True) for of in (np.nanmean, np.nanstd))
            x = np.nan_to_num((inside - mean) / deviation).astype(np.float32)
        case _:
            sys.exit(f"this script cannot do {step}")
n, tile, m = (np.array(three) for three in (x.shape[1:], tiles["shape"], tiles["margin"]))
gap, over = np.maximum(tile - n, 0), np.maximum(n - tile, 0)
x = np.pad(x, [(0, 0), *zip(gap // 2 + m, gap - gap // 2 + m)], {"zero": "constant"}.get(tiles["outside"], "edge"))
starts = [[round(i * o / max(c, 1)) for i in range(c + 1)] for o, c in zip(over, -(-over // tiles["step"]).astype(int))]
weights, sums = np.einsum("x,y,z->xyz", *tiles["weights"]), np.zeros((2, len(about["outputs"]), *n + gap), np.float32)
for at, flip in product(product(*starts), about["flips"]):
    out = model.run(None, {"tile": np.flip(x[None, :, *(slice(a, a + b) for a, b in zip(at, tile + 2 * m))], flip)})[0]
    sums[:, :, *(slice(a, a + b) for a, b in zip(at, tile))] += weights * [np.flip(out, flip)[0], np.ones_like(out[0])]
scores = resample((sums[0] / sums[1])[:, *(slice(g // 2, g // 2 + a) for g, a in zip(gap, n))].astype("f2"), sides)
target = scores.argmax(0) if least is None else ((least < scores.T) * range(1, len(scores) + 1)).max(-1).T  # the last
label = np.array([0, *(each["value"] for each in about["targets"])], np.uint16)[target]
label = apply_orientation(label, ornt_transform(axcodes2ornt("RAS"), io_orientation(scans[0].affine)))
nibabel.save(nibabel.Nifti1Image(label, scans[0].affine, scans[0].header, dtype=label.dtype), sys.argv[2])
