"""Send scans to a Delineate server and get their segmentations back. Not for diagnosis.

>>> from delineate_client import Client
>>> with Client("anna.key") as client:                                              # doctest: +SKIP
...     client.segment("scan.nii.gz", "segmentation.vtk").about["volume_ml"]
{'liver': 1512.3}
"""

from . import errors
from .serving.client import AsyncClient, Client, Result

__all__ = ["AsyncClient", "Client", "Result", "errors"]
