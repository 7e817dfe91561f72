"""Builds the compiled core; everything else about the package stands in pyproject.toml."""

from __future__ import annotations

import sysconfig

from setuptools import setup

# One wheel for CPython 3.11 and later; a free-threaded CPython has no limited API.
limited = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    cffi_modules=["pfkey/_ffi_build.py:ffibuilder"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if limited else {},
)
