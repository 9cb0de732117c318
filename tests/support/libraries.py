"""Large libraries, imported before coverage traces what they do as they are imported: `-p tests.support.libraries`."""

import os

# As in conftest.py, before the libraries are imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("DO_NOT_TRACK", "1")

import boto3  # noqa: F401
import matplotlib.figure  # noqa: F401
import numba  # noqa: F401
import onnx_graphsurgeon  # noqa: F401
import onnxruntime  # noqa: F401
import polars  # noqa: F401
import scipy.stats  # noqa: F401
import torch  # noqa: F401
